"""Weights of files, one after the other, on all processes or on none; and the module as it was."""

from __future__ import annotations

import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_robust.callbacks.after_fit import weights_of


class Counting(nn.Module):
    """State that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.seen = {"batches": 0}

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


def alone(*counts: int) -> list[int]:
    return [int(n) for n in counts]


def saved(folder: Path, step: int) -> Path:
    module = Counting()
    nn.init.constant_(module.weight, step)
    module.seen["batches"] = step
    torch.save({"state_dict": module.state_dict(), "global_step": step}, folder / f"{step}.ckpt")
    return folder / f"{step}.ckpt"


def test_each_file_is_loaded_and_the_last_weights_are_back_in_the_end(tmp_path: Path) -> None:
    module = Counting()
    module.seen["batches"] = 7
    seen = []
    for file, step in weights_of(module, [saved(tmp_path, 1), saved(tmp_path, 2)], alone):
        seen.append((file.name, step, module.weight.tolist(), module.seen["batches"]))
        module.seen["batches"] += 100  # a forward that counts: the state of the end is a copy
    assert seen == [("1.ckpt", 1, [1.0, 1.0], 1), ("2.ckpt", 2, [2.0, 2.0], 2)]
    assert (module.weight.tolist(), module.seen) == ([0.0, 0.0], {"batches": 7})


def test_whoever_stops_half_way_has_the_last_weights_too(tmp_path: Path) -> None:
    module = Counting()
    with closing(weights_of(module, [saved(tmp_path, 1), saved(tmp_path, 2)], alone)) as loaded:
        assert next(loaded)[1] == 1
        assert module.weight.tolist() == [1.0, 1.0]
    assert module.weight.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("expected", [False, True])
def test_a_missing_file_is_worth_a_warning_where_it_was_asked_for(tmp_path: Path, expected: bool) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not list(weights_of(Counting(), [tmp_path / "missing.ckpt"], alone, expected=expected))
    assert ["FileNotFoundError" in str(w.message) for w in said] == [True] * expected


def test_a_file_of_another_shape_is_left_out(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.ones(3)}, "global_step": 1}, tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match=r"x.ckpt could not be given a temperature.*RuntimeError"):
        found = [step for _, step in weights_of(Counting(), [tmp_path / "x.ckpt", saved(tmp_path, 2)], alone)]
    assert found == [2]


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0)], ids=["missing", "broken"])
def test_what_another_process_cannot_load_is_left_out_here_too(tmp_path: Path, other: tuple[int, ...]) -> None:
    def with_another(*counts: int) -> list[int]:
        return [int(own) + n for own, n in zip(counts, other, strict=True)]

    with pytest.warns(UserWarning, match="not every process can read it"):
        assert not list(weights_of(Counting(), [saved(tmp_path, 1)], with_another))
