"""Monitors listen: in two processes too, weights and logged values stay the same to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Lines = list[dict[str, Any]]
AREAS = {"robust", "calibration", "ood", "shift", "saliency"}


def area(key: str) -> str:
    return key.split("/")[0].split(".")[0]


@pytest.fixture(scope="module")
def diaries(
    start: Callable[..., Any], finish: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Lines]:
    folder = tmp_path_factory.mktemp("unchanged")
    finish(start("unchanged.py", folder), timeout=200)
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.iterdir()}


def of_the_user(lines: Lines) -> Lines:
    return [{**line, "logged": {k: v for k, v in line["logged"].items() if area(k) not in AREAS}} for line in lines]


@pytest.mark.parametrize("rank", [0, 1])
def test_weights_and_all_that_the_user_logs_are_the_same_with_every_monitor_on(
    diaries: dict[str, Lines], rank: int
) -> None:
    none, every = diaries[f"none.{rank}"], diaries[f"every.{rank}"]
    assert [line["epoch"] for line in none] == [0, 1, 2]
    assert {len(line["losses"]) for line in none} == {4}  # 51 samples in batches of 16
    assert set(none[0]["logged"]) == {"train_loss", "val_loss", "val_accuracy"}
    assert of_the_user(every) == none
    assert {area(key) for key in every[-1]["logged"]} & AREAS == AREAS


def test_both_processes_end_with_one_set_of_weights(diaries: dict[str, Lines]) -> None:
    for run in ("none", "every"):
        for first, second in zip(diaries[f"{run}.0"], diaries[f"{run}.1"], strict=True):
            assert first["weights"] == second["weights"]
            assert first["losses"] != second["losses"]  # of other samples


def test_what_monitors_log_is_equal_in_both_processes(diaries: dict[str, Lines]) -> None:
    first, second = (diaries[f"every.{rank}"][-1]["logged"] for rank in (0, 1))
    assert {k: v for k, v in first.items() if area(k) in AREAS} == {k: v for k, v in second.items() if area(k) in AREAS}


def test_one_number_drawn_from_the_global_stream_would_have_been_noticed(diaries: dict[str, Lines]) -> None:
    none, drawn = diaries["none.0"], diaries["one_draw.0"]
    assert drawn[0] == none[0]
    assert drawn[1]["weights"] != none[1]["weights"]
