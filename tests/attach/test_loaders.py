"""Evaluation loaders in the forms that Lightning keeps them in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_robust.attach.loaders import count, evaluation_loaders, name_of, nth, true_length

DATA = TensorDataset(torch.zeros(101))
ONE, TWO = DataLoader(DATA), DataLoader(DATA, 2)


@pytest.mark.parametrize(
    ("loaders", "names"), [(ONE, ["0"]), ([ONE, TWO], ["0", "1"]), ({"near": ONE, "far": TWO}, ["near", "far"])]
)
def test_loaders_are_counted_and_named(loaders: Any, names: list[str]) -> None:
    assert [name_of(loaders, i) for i in range(count(loaders))] == names
    assert nth(loaders, 0) is ONE


def test_the_stage_decides_which_loaders_are_meant() -> None:
    assert evaluation_loaders(SimpleNamespace(testing=True, test_dataloaders=ONE, val_dataloaders=TWO)) is ONE
    assert evaluation_loaders(SimpleNamespace(testing=False, test_dataloaders=ONE, val_dataloaders=TWO)) is TWO


def test_a_distributed_sampler_does_not_lengthen_the_data() -> None:
    sampler = DistributedSampler(DATA, num_replicas=2, rank=0, shuffle=False)
    assert len(sampler) * 2 == 102  # one sample is dealt twice
    trainer = SimpleNamespace(testing=False, val_dataloaders=DataLoader(DATA, sampler=sampler))
    assert true_length(trainer, 0, world=2) == 101
