"""Intervals against scipy's."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binomtest, norm

from lightning_robust.intervals import share_interval, wilson
from lightning_robust.randomness import seeded


@pytest.mark.parametrize(("right", "n"), [(450, 500), (0, 20), (20, 20), (1, 1), (7, 1000)])
def test_it_is_wilsons(right: int, n: int) -> None:
    theirs = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-5)
    bits = torch.cat([torch.ones(right), torch.zeros(n - right)])
    assert share_interval(bits) == pytest.approx((theirs.low, theirs.high), abs=1e-5)


def test_shares_of_a_sample_have_the_interval_of_their_mean() -> None:
    shares = torch.rand(400, generator=seeded(0))
    mean, error = float(shares.mean()), float(shares.double().std()) / math.sqrt(400)
    assert share_interval(shares) == pytest.approx(norm.interval(0.95, mean, error), abs=1e-5)
    assert share_interval(torch.tensor([0.99, 1.0, 0.1]))[1] == 1.0  # no share is above it


def test_without_samples_there_is_none() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        share_interval(torch.empty(0))
