"""Noise has the distribution that it promises."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from torch import Generator, Tensor

from lightning_robust.corruptions.noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise
from lightning_robust.randomness import seeded

GREY = torch.full((20, 1, 32, 32), 0.5, dtype=torch.float64)


def generators() -> list[Generator]:
    return [seeded(i) for i in range(20)]


def test_gaussian_noise_is_normal() -> None:
    noise = gaussian_noise(GREY, (0.08,), generators()) - 0.5
    assert scipy.stats.kstest(noise.flatten(), "norm", (0, 0.08)).pvalue > 0.01


def test_speckle_noise_grows_with_the_signal() -> None:
    noise = speckle_noise(GREY, (0.2,), generators()) - 0.5
    assert scipy.stats.kstest(noise.flatten(), "norm", (0, 0.1)).pvalue > 0.01
    assert torch.equal(speckle_noise(0 * GREY, (0.2,), generators()), 0 * GREY)


def test_shot_noise_counts_photons() -> None:
    counts = (60 * shot_noise(GREY, (60,), generators())).flatten()
    torch.testing.assert_close(counts, counts.round())
    assert float(counts.mean()) == pytest.approx(30, abs=4 * (30 / 20480) ** 0.5)
    assert float(counts.var()) == pytest.approx(30, rel=0.05)


def test_impulse_noise_makes_black_and_white_equally_often_and_leaves_the_rest() -> None:
    made = impulse_noise(GREY, (0.2,), generators())
    black, white = int((made == 0).sum()), int((made == 1).sum())
    assert black + white == int((made != 0.5).sum())
    for count in (black, white):
        assert scipy.stats.binomtest(count, made.numel(), 0.1).pvalue > 0.01


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_noise_stays_in_range(value: float) -> None:
    x: Tensor = torch.full((20, 3, 8, 8), value)
    for made in (
        gaussian_noise(x, (0.38,), generators()),
        shot_noise(x, (3,), generators()),
        impulse_noise(x, (0.27,), generators()),
        speckle_noise(x, (0.6,), generators()),
    ):
        assert 0 <= made.min() <= made.max() <= 1
