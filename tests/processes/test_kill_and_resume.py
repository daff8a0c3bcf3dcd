"""SIGKILL in the middle of an epoch, and on from the last checkpoint as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from lightning_robust import read_entry

EPOCHS, BATCHES = 4, 5
KILLED_AT = (2, 3)  # the fourth batch of the third epoch; the last checkpoints are those of steps 10 (an epoch) and 12


class Run:
    """What a run left in its folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"{self.name}.{kind}.jsonl").read_text().splitlines()]

    @property
    def epochs(self) -> dict[int, dict[str, Any]]:
        return {line["epoch"]: line for line in self.lines("0")}

    @property
    def steps(self) -> dict[tuple[int, int], dict[str, Any]]:
        return {(line["epoch"], line["batch"]): line for line in self.lines("steps")}

    def entry(self, epoch: int = EPOCHS - 1) -> dict[str, Any]:
        return dict(read_entry(self.folder / self.name / f"epoch{epoch}.ckpt"))


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Any], finish: Callable[..., str]
) -> Callable[[float, str], tuple[Run, Run]]:
    """An uninterrupted run, and one that was killed and resumed from one of its checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    killed: dict[float, Path] = {}

    def made(dropout: float, checkpoint: str) -> tuple[Run, Run]:
        here = folder / f"dropout{dropout}"
        if dropout not in killed:
            here.mkdir()
            whole = start("killed.py", here, "whole", -1, -1, dropout)
            victim = start("killed.py", here, "victim", *KILLED_AT, dropout)
            deadline = time.monotonic() + 120
            while not (here / "victim.waits").exists():
                assert victim.poll() is None, victim.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.killpg(victim.pid, signal.SIGKILL)
            victim.communicate()
            assert victim.returncode == -signal.SIGKILL
            finish(whole)
            killed[dropout] = here
        name = f"from_{Path(checkpoint).stem}"
        finish(start("killed.py", here, name, -1, -1, dropout, here / "victim" / checkpoint))
        return Run(here, "whole"), Run(here, name)

    return made


def equal(one: Any, other: Any) -> bool:
    """Nested and to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def assert_continued(whole: Run, resumed: Run, first: tuple[int, int]) -> None:
    """From its first step on, the resumed run is the uninterrupted one."""
    assert min(resumed.steps) == first
    assert resumed.steps == {place: line for place, line in whole.steps.items() if place >= first}
    for epoch in range(first[0] + (first[1] > 0), EPOCHS):
        assert resumed.epochs[epoch] == whole.epochs[epoch]  # weights, optimizer, losses and every logged value
    assert resumed.epochs[EPOCHS - 1]["weights"] == whole.epochs[EPOCHS - 1]["weights"]
    before, after = whole.entry(), resumed.entry()
    assert before["calibration"]["temperature"] == after["calibration"]["temperature"] != 1.0
    anchor, drift = before["saliency"]["val"]["films"], before["saliency"]["val"]["drift"]
    assert len(drift) == EPOCHS
    assert equal(anchor, after["saliency"]["val"]["films"])
    assert equal(before, after)


def test_from_the_end_of_an_epoch_everything_goes_on_to_the_last_bit(runs: Any) -> None:
    whole, resumed = runs(0.0, "epoch1.ckpt")
    assert len(whole.steps) == EPOCHS * BATCHES
    assert_continued(whole, resumed, (2, 0))


@zoo.recent
def test_from_the_middle_of_an_epoch_everything_goes_on_where_the_loader_can(runs: Any) -> None:
    """Lightning hands a loader its state back and counts on; what the epoch had summed up until then is lost to it."""
    whole, resumed = runs(0.0, "step=12.ckpt")
    assert_continued(whole, resumed, (2, 2))


@pytest.mark.slow
def test_with_dropout_lightning_keeps_no_random_stream_and_our_noise_goes_on_all_the_same(runs: Any) -> None:
    """The user's masks come from the global stream, which no checkpoint of Lightning holds: other losses are right.

    What we draw is a function of (seed, rank, step, batch): the first resumed step starts from the same weights, and in
    it the attack (which crafts in eval mode) finds the very same perturbation.
    """
    whole, resumed = runs(0.3, "epoch1.ckpt")
    first = (2, 0)
    assert resumed.steps[first]["clean"] == whole.steps[first]["clean"]
    assert resumed.steps[first]["noise"] == whole.steps[first]["noise"]
    assert resumed.steps[first]["loss"] != whole.steps[first]["loss"]
    before, after = whole.entry(), resumed.entry()
    assert before["saliency"]["val"]["hash"] == after["saliency"]["val"]["hash"]
    early = [drift for drift in before["saliency"]["val"]["drift"] if drift["epoch"] <= 2]
    assert equal(early, after["saliency"]["val"]["drift"][: len(early)])
