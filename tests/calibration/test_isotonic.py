"""Monotone curves: scikit-learn's, up to the width of a cell, finite everywhere, and small to store."""

from __future__ import annotations

import builtins
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from lightning_robust.calibration import Reliability
from lightning_robust.calibration.isotonic import CELLS, WIDEST, IsotonicCalibration, fit_isotonic
from lightning_robust.randomness import seeded

WIDTH = 2 * WIDEST / CELLS


def bent(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-odds that no temperature mends: right after a cube root."""
    s = 3 * torch.randn(n, generator=seeded(seed), dtype=torch.float64)
    p = (s.sign() * s.abs() ** (1 / 3)).sigmoid()
    return torch.stack([-s / 2, s / 2], 1), (torch.rand(n, generator=seeded(seed, 1)) < p).long()


def skewed(n: int, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    z = 2 * torch.randn(n, classes, generator=seeded(seed))
    bias = torch.randn(classes, generator=seeded(7))
    return 2 * z, torch.multinomial((z + bias).softmax(1), 1, generator=seeded(seed, 1))[:, 0]


def curve(fit: IsotonicCalibration, s: Tensor) -> Tensor:
    return fit(torch.stack([torch.zeros_like(s), s], 1))[:, 1].exp()


def test_the_curve_is_that_of_scikit_learn_up_to_the_width_of_a_cell() -> None:
    z, y = bent(5000)
    s = z[:, 1] - z[:, 0]
    theirs = IsotonicRegression(out_of_bounds="clip", y_min=1 / 5002, y_max=5001 / 5002).fit(s, y)
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    ours = curve(fit_isotonic(z, y), x).numpy()
    # Both are monotone, so that rows that share a cell can move a step by that cell only.
    assert (ours >= theirs.predict(x - WIDTH) - 0.02).all()
    assert (ours <= theirs.predict(x + WIDTH) + 0.02).all()
    assert np.abs(ours - theirs.predict(x)).mean() < 0.004


def test_scores_with_a_cell_each_have_exactly_the_curve_of_scikit_learn() -> None:
    s = torch.arange(-20, 21, dtype=torch.float64).repeat(30) / 4
    y = (torch.rand(len(s), generator=seeded(3)) < (s / 2).sigmoid()).long()
    z = torch.stack([torch.zeros_like(s), s], 1)
    theirs = IsotonicRegression(out_of_bounds="clip", y_min=1 / (len(s) + 2), y_max=(len(s) + 1) / (len(s) + 2))
    x = torch.linspace(-6, 6, 999, dtype=torch.float64)
    np.testing.assert_allclose(curve(fit_isotonic(z, y), x), theirs.fit(s, y).predict(x), rtol=1e-9)


def test_held_out_probabilities_become_honest() -> None:
    fit, (z, y) = fit_isotonic(*bent(5000)), bent(5000, seed=1)
    before, after = Reliability.of(z.log_softmax(1), y), Reliability.of(fit(z), y)
    assert after.ece < before.ece / 5
    assert after.mean_nll < before.mean_nll - 0.05


def test_held_out_probabilities_of_many_classes_become_honest() -> None:
    fit, (z, y) = fit_isotonic(*skewed(5000)), skewed(5000, seed=1)
    before, after = Reliability.of(z.log_softmax(1), y), Reliability.of(fit(z), y)
    assert after.ece < before.ece / 4
    assert after.accuracy > before.accuracy  # the offsets between classes are mended, too


def test_rows_sum_to_one() -> None:
    z, y = skewed(1000)
    torch.testing.assert_close(fit_isotonic(z, y)(z).exp().sum(1), torch.ones(1000))


def test_two_classes_are_treated_alike() -> None:
    z, y = bent(2000)
    torch.testing.assert_close(
        fit_isotonic(z.flip(1), 1 - y)(z.flip(1)).flip(1), fit_isotonic(z, y)(z), atol=0.02, rtol=0
    )


def test_no_probability_is_so_small_that_one_row_makes_the_likelihood_infinite() -> None:
    z, y = skewed(1000)
    fit = fit_isotonic(50 * z, (50 * z).argmax(1))
    assert fit.at_bound
    values = torch.tensor([value for values in fit.values for value in values])
    assert (float(values.min()), float(values.max())) == (pytest.approx(1 / 1002), pytest.approx(1001 / 1002))
    assert Reliability.of(fit(50 * z), y).mean_nll < math.log(1005)


def test_what_is_said_against_all_evidence_gives_flat_curves() -> None:
    z, _ = skewed(2000)
    fit = fit_isotonic(z, z.argmin(1))
    assert fit.at_bound
    torch.testing.assert_close(fit(z).exp()[0], torch.bincount(z.argmin(1)) / 2000, atol=1e-6, rtol=1e-6)


def test_certain_rows_are_told_apart_by_the_other_classes() -> None:
    # In float32 the likeliest class has a probability of exactly 1 in all of these.
    margin = torch.tensor([18.0, 20.0, 22.0]).repeat_interleave(100)
    z = torch.stack([torch.zeros(300), margin], 1)
    y = torch.tensor(([1] * 7 + [0] * 3) * 10 + ([1] * 8 + [0] * 2) * 10 + ([1] * 9 + [0]) * 10)
    assert bool((z.softmax(1)[:, 1] == 1).all())
    fit = fit_isotonic(z, y)
    for rows in (z, z.log_softmax(1)):
        assert fit(rows)[[0, 100, 200], 1].exp().tolist() == pytest.approx([0.7, 0.8, 0.9], abs=1e-5)


def test_only_the_knots_are_stored() -> None:
    fit = fit_isotonic(*skewed(5000))
    assert sum(len(at) for at in fit.at) < 5 * 120
    for at, values in zip(fit.at, fit.values, strict=True):
        assert list(at) == sorted(set(at))
        assert list(values) == sorted(values)


def test_a_class_that_is_switched_off_stays_off() -> None:
    z, y = skewed(1000)
    off = torch.cat([z, torch.full((1000, 1), -math.inf)], dim=1)
    fit = fit_isotonic(off, y)
    assert bool((fit(off)[:, 5] == -math.inf).all())
    torch.testing.assert_close(fit(off)[:, :5], fit_isotonic(z, y)(z))


def test_without_scikit_learn_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        fit_isotonic(*skewed(100))


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected logits \(R, 5\), as fitted, got \(3, 4\)"):
        fit_isotonic(*skewed(100))(torch.zeros(3, 4))
