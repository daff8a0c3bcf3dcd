"""Mean and scatter of rows, against numpy, scikit-learn and integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ood.processes_together import together
from sklearn.covariance import EmpiricalCovariance
from torch import Tensor

from lightning_robust.ood.moments import Moments

ROWS = torch.randn(101, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(
    4, 4, generator=torch.Generator().manual_seed(1)
)


def filled(rows: Tensor, size: int) -> Moments:
    moments = Moments(rows.shape[1])
    for part in rows.split(size):
        moments.add(part)
    return moments


@pytest.mark.parametrize("size", [1, 7, 100, 101])
def test_mean_and_covariance_are_those_of_scikit_learn(size: int) -> None:
    moments, reference = filled(ROWS, size), EmpiricalCovariance().fit(ROWS.double().numpy())
    np.testing.assert_allclose(moments.mean, reference.location_, rtol=1e-13)
    np.testing.assert_allclose(moments.scatter / moments.count, reference.covariance_, rtol=1e-12)


def test_large_means_cancel_nothing() -> None:
    """Whole numbers around a hundred million: the squares of their sums have no exact doubles, their variances do."""
    small = (ROWS * 8).round().double()
    near, far = filled(small, 9), filled(small + 1e8, 9)
    torch.testing.assert_close(far.scatter, near.scatter, rtol=1e-9, atol=0)


def test_half_precision_is_summed_in_double() -> None:
    half = ROWS.to(torch.bfloat16)
    assert torch.equal(filled(half, 10).scatter, filled(half.double(), 10).scatter)


def test_a_batch_without_rows_adds_nothing() -> None:
    moments = filled(ROWS, 10)
    before = moments.scatter.clone()
    moments.add(ROWS[:0])
    assert moments.count == 101
    assert torch.equal(moments.scatter, before)


@pytest.mark.parametrize("shares", [(50, 51), (100, 1, 0), (0, 101)])
def test_several_processes_find_what_one_finds(shares: tuple[int, ...]) -> None:
    far = ROWS + 1e4
    parts = [filled(rows, 8) if len(rows) else Moments(4) for rows in far.split(list(shares))]
    together([part.reduce for part in parts])
    whole = filled(far, 101)
    for part in parts:
        assert part.count == 101
        torch.testing.assert_close(part.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(part.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


def test_what_was_begun_in_inference_mode_goes_on_outside_of_it() -> None:
    moments = Moments(4)
    with torch.inference_mode():
        moments.add(ROWS[:50].clone())
    moments.add(ROWS[50:].clone().requires_grad_())
    torch.testing.assert_close(moments.scatter, filled(ROWS, 101).scatter)
    assert not moments.scatter.requires_grad
