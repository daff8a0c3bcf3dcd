"""Two numbers for yes/no outputs: those of logistic regression, and none where there is no optimum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.calibration import platt
from lightning_robust.calibration.platt import PlattLabels, PlattScaling, fit_platt, fit_platt_labels
from lightning_robust.randomness import seeded


def scores(n: int, slope: float, intercept: float, unit: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-odds ``(n,)`` that are right after ``slope * s / unit + intercept``, and answers."""
    s = torch.randn(n, generator=seeded(seed), dtype=torch.float64) + 1
    return unit * s, (torch.rand(n, generator=seeded(seed, 1)) < (slope * s + intercept).sigmoid()).long()


def two(s: Tensor) -> Tensor:
    return torch.stack([-s / 2, s / 2], dim=1)


CASES = [
    (5000, 0.4, 0.7, 1.0),
    (300, 3.0, -2.0, 1.0),
    (5000, 0.4, 0.7, 1000.0),
    (200, 1.0, 0.0, 1e-4),
    (9000, 1, -6, 2),
]


@pytest.mark.parametrize(("n", "slope", "intercept", "unit"), CASES)
def test_the_fit_is_that_of_scikit_learn(n: int, slope: float, intercept: float, unit: float) -> None:
    s, y = scores(n, slope, intercept, unit)
    theirs = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000, solver="newton-cholesky")
    theirs.fit((s / unit).numpy()[:, None], y.numpy())
    fit = fit_platt(two(s), y)
    assert fit.slope == pytest.approx(theirs.coef_.item() / unit, rel=1e-7)
    assert fit.intercept == pytest.approx(theirs.intercept_.item(), rel=1e-7)
    assert not fit.at_bound


def test_single_precision_will_do() -> None:
    s, y = scores(5000, 0.4, 0.7)
    single, double = fit_platt(two(s).float(), y), fit_platt(two(s), y)
    assert (single.slope, single.intercept) == pytest.approx((double.slope, double.intercept), rel=1e-6)


@pytest.mark.parametrize(("n", "slope", "intercept", "unit"), CASES)
def test_few_passes_are_enough(n: int, slope: float, intercept: float, unit: float) -> None:
    calls: list[Tensor] = []

    def counting(sums: Tensor) -> Tensor:
        calls.append(sums)
        return sums

    s, y = scores(n, slope, intercept, unit)
    fit_platt(two(s), y, reduce=counting)
    assert len(calls) <= 14


def test_the_opposite_of_what_was_said_has_a_negative_slope() -> None:
    s, y = scores(1000, -1.0, 0.0)
    assert fit_platt(two(s), y).slope == pytest.approx(-1.0, abs=0.3)


def without_optimum() -> dict[str, tuple[Tensor, Tensor]]:
    s, y = scores(200, 1.0, 0.0)
    return {
        "never wrong": (s, (s > 0.3).long()),
        "always wrong": (s, (s < 0.3).long()),
        "yes only": (s, torch.ones_like(y)),
        "no only": (s, torch.zeros_like(y)),
        "one score": (torch.full_like(s, 0.7), y),
        "no score": (torch.zeros_like(s), y),
        "both answers at the one score between": (s.clamp(min=0.3), torch.where(s > 0.3, 1, torch.arange(200) % 2)),
        "one row": (s[:1], y[:1]),
    }


@pytest.mark.parametrize("name", without_optimum())
def test_without_an_optimum_nothing_is_changed(name: str) -> None:
    s, y = without_optimum()[name]
    assert fit_platt(two(s), y) == PlattScaling(1.0, 0.0, at_bound=True)


def test_one_error_among_many_is_enough_for_an_optimum() -> None:
    s, _ = scores(500, 1.0, 0.0)
    y = (s > 0.3).long()
    y[int(s.argmax())] = 0
    theirs = LogisticRegression(C=np.inf, tol=1e-12, solver="newton-cholesky").fit(s.numpy()[:, None], y.numpy())
    assert fit_platt(two(s), y).slope == pytest.approx(theirs.coef_.item(), rel=1e-7)


def test_scores_that_say_nothing_leave_the_share_of_yes() -> None:
    s, y = torch.tensor([1.0, 2.0] * 20), torch.tensor([1, 1, 0, 0, 0, 0, 0, 0] * 5)
    fit = fit_platt(two(s), y)
    assert (fit.at_bound, fit.slope) == (False, pytest.approx(0, abs=1e-9))
    assert fit(two(s))[:, 1].exp().tolist() == pytest.approx([0.25] * 40)


def test_smoothed_targets_are_those_of_platt() -> None:
    s, y = scores(60, 2.0, 0.5)
    yes = int(y.sum())
    target = torch.where(y > 0, (yes + 1) / (yes + 2), 1 / (60 - yes + 2)).double()
    theirs = minimize(
        lambda ab: float(F.binary_cross_entropy_with_logits(ab[0] * s + ab[1], target)), [1.0, 0.0], tol=1e-12
    )
    fit = fit_platt(two(s), y, smoothed=True)
    assert [fit.slope, fit.intercept] == pytest.approx(list(theirs.x), rel=1e-4)


def test_smoothed_targets_have_an_optimum_without_an_error() -> None:
    s = torch.tensor([-1.0] * 3 + [1.0] * 6)
    fit = fit_platt(two(s), (s > 0).long(), smoothed=True)
    assert fit(two(s))[[0, 8], 1].exp().tolist() == pytest.approx([1 / 5, 7 / 8])  # Laplace's estimates


def test_a_switched_off_answer_stays_off() -> None:
    log_q = PlattScaling(0.5, 1.0)(torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]]))
    assert log_q.exp().tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_many_labels_are_fitted_as_if_each_were_alone() -> None:
    parts = [scores(400, 0.5, 1.0), scores(400, 2.0, -1.0, unit=30.0, seed=1), scores(400, -1.0, 0.0, 0.01, seed=2)]
    z, y = torch.stack([s for s, _ in parts], 1), torch.stack([y for _, y in parts], 1)
    fit = fit_platt_labels(z, y)
    for label, (s, answers) in enumerate(parts):
        alone = fit_platt(two(s), answers)
        assert float(fit.slope[label]) == pytest.approx(alone.slope, rel=1e-9)
        assert float(fit.intercept[label]) == pytest.approx(alone.intercept, rel=1e-9)


def test_a_label_of_one_class_is_flagged_and_stays_as_it_is() -> None:
    s, y = scores(400, 0.5, 1.0)
    fit = fit_platt_labels(torch.stack([s, s, s], 1), torch.stack([y, torch.ones(400), torch.zeros(400)], 1))
    assert fit.at_bound.tolist() == [False, True, True]
    z = torch.randn(5, 3, generator=seeded(1))
    assert torch.equal(fit(z)[:, 1:], z[:, 1:])
    assert not torch.equal(fit(z)[:, 0], z[:, 0])


def test_logits_that_are_not_finite_are_left_out_of_their_own_label_only() -> None:
    s, y = scores(400, 0.5, 1.0)
    z, answers = torch.stack([s, s], 1), torch.stack([y, y], 1)
    z[[3, 7], 0] = torch.tensor([math.nan, math.inf], dtype=torch.float64)
    with pytest.warns(UserWarning, match="2 of 800 logits"):
        fit = fit_platt_labels(z, answers)
    kept = torch.tensor([i for i in range(400) if i not in (3, 7)])
    assert float(fit.slope[0]) == pytest.approx(fit_platt(two(s[kept]), y[kept]).slope, rel=1e-9)
    assert float(fit.slope[1]) == pytest.approx(fit_platt(two(s), y).slope, rel=1e-9)


def test_labels_pass_through_plain_values() -> None:
    fit = PlattLabels(torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.0]), torch.tensor([False, True]))
    z = torch.randn(4, 2, generator=seeded(0))
    assert torch.equal(PlattLabels.load(fit.to_dict())(z), fit(z))


def test_no_more_passes_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platt, "MAX_PASSES", 2)
    assert fit_platt(two(scores(100, 0.5, 1.0)[0]), scores(100, 0.5, 1.0)[1]).at_bound


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match=r"two classes.*'vector'"):
        fit_platt(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(4,\)"):
        fit_platt_labels(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ValueError, match="0 or 1"):
        fit_platt_labels(torch.zeros(4, 3), torch.full((4, 3), 0.5))
    with pytest.raises(ValueError, match=r"expected logits \(N, 1\)"):
        PlattLabels(torch.ones(1), torch.zeros(1), torch.zeros(1))(torch.zeros(4, 3))
