"""Completeness errors in closed form."""

from __future__ import annotations

import pytest
import torch

from lightning_robust.saliency.completeness import completeness

WEIGHT = torch.tensor([[1.0, 3.0], [1.0, -4.0]])
X, TARGET = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([1, 0])
RISE = torch.tensor([-5.0, 4.0])


def test_the_error_is_relative_to_the_rise_of_the_logit() -> None:
    maps = torch.stack([RISE * 1.1, torch.zeros(2)], 1)
    found = completeness(lambda x: x @ WEIGHT, X, TARGET, maps)
    assert found.tolist() == pytest.approx([0.1, 0.1], abs=1e-6)
    assert found.dtype == torch.float64


def test_the_baseline_and_chunks_are_those_of_the_maps() -> None:
    baseline = torch.tensor([[0.5, 0.0]])
    rise = ((X - baseline) @ WEIGHT).gather(1, TARGET[:, None])
    for size in (None, 1):
        found = completeness(lambda x: x @ WEIGHT, X, TARGET, rise, baseline, chunk_size=size)
        assert found.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_a_map_that_adds_up_is_complete_also_where_nothing_rises() -> None:
    assert completeness(lambda x: x @ WEIGHT, X * 0, TARGET, X * 0).tolist() == [0.0, 0.0]


def test_other_maps_than_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a map for each of 2 inputs, got maps \(3, 2\)"):
        completeness(lambda x: x @ WEIGHT, X, TARGET, torch.zeros(3, 2))
