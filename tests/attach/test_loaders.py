"""Evaluation loaders in the forms that Lightning keeps them in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_robust.attach.loaders import evaluation_loaders, named, true_length

DATA = TensorDataset(torch.zeros(101))
ONE, TWO = DataLoader(DATA), DataLoader(DATA, 2)


@pytest.mark.parametrize(
    ("loaders", "names"),
    [
        (ONE, ["0"]),
        ([ONE, TWO], ["0", "1"]),
        ({"near": ONE, "far": TWO}, ["near", "far"]),
        ({"a": [ONE, TWO], "b": ONE}, ["a/0", "a/1", "b"]),
    ],
)
def test_loaders_are_named_in_order(loaders: Any, names: list[str]) -> None:
    assert [name for name, _ in named(loaders)] == names
    assert named(loaders)[0][1] is ONE


def test_the_stage_decides_which_loaders_are_meant() -> None:
    assert evaluation_loaders(SimpleNamespace(testing=True, test_dataloaders=ONE, val_dataloaders=TWO)) == [("0", ONE)]
    assert evaluation_loaders(SimpleNamespace(testing=False, test_dataloaders=ONE, val_dataloaders=TWO)) == [("0", TWO)]


def test_a_distributed_sampler_does_not_lengthen_the_data() -> None:
    sampler = DistributedSampler(DATA, num_replicas=2, rank=0, shuffle=False)
    assert len(sampler) * 2 == 102  # one sample is dealt twice
    assert true_length(DataLoader(DATA, sampler=sampler), world=2) == 101
