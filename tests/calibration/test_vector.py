"""A slope and an offset for each class: the optimum, never worse than the temperature, and the same for log-odds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.calibration.temperature import fit_temperature
from lightning_robust.calibration.vector import VectorScaling, fit_vector
from lightning_robust.randomness import seeded


def skewed(n: int, classes: int, wanted: float = 1.6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of which each class needs another slope and offset."""
    z = 2 * torch.randn(n, classes, generator=seeded(seed))
    scale = 1 + 0.3 * torch.randn(classes, generator=seeded(seed, 1))
    bias = 0.7 * torch.randn(classes, generator=seeded(seed, 2))
    p = (scale * z.log_softmax(1) + bias).softmax(1)
    return wanted * z, torch.multinomial(p, 1, generator=seeded(seed, 3))[:, 0]


def penalised(z: Tensor, y: Tensor, theta: NDArray[np.float64], start: float) -> tuple[float, NDArray[np.float64]]:
    """The documented objective and its gradient, by autograd in doubles; ``theta`` holds T w and b."""
    free = torch.from_numpy(theta.reshape(2, -1)).requires_grad_()
    loss = F.cross_entropy(z.double().log_softmax(1) / start * free[0] + free[1], y)
    loss = loss + ((free[0] - 1).square().sum() + free[1].square().sum()) / (2 * len(z))
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no types there
    assert free.grad is not None
    return float(loss.detach()), free.grad.numpy().ravel()


@pytest.mark.parametrize(("n", "classes", "wanted"), [(3000, 10, 1.6), (400, 5, 0.3), (1000, 3, 12.0), (300, 40, 1.0)])
def test_the_fit_is_that_of_scipy(n: int, classes: int, wanted: float) -> None:
    z, y = skewed(n, classes, wanted)
    start = fit_temperature(z.log_softmax(1), y).temperature
    theirs = minimize(
        lambda theta: penalised(z, y, theta, start),
        np.r_[np.ones(classes), np.zeros(classes)],
        jac=True,
        method="BFGS",
        options={"gtol": 1e-9, "maxiter": 2000},
    )
    ours = fit_vector(z.double(), y)
    found = torch.stack([ours.scale * start, ours.bias])
    assert penalised(z, y, found.numpy().ravel(), start)[0] == pytest.approx(theirs.fun, rel=1e-9)
    np.testing.assert_allclose(found.ravel(), theirs.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(10))
def test_the_likelihood_is_never_worse_than_that_of_the_temperature(seed: int) -> None:
    n, classes = 5 + 20 * seed, 2 + 3 * seed
    z = torch.randn(n, classes, generator=seeded(seed)) * 10 ** (seed % 4 - 1)
    y = torch.randint(classes, (n,), generator=seeded(seed, 1))
    temperature = fit_temperature(z, y)
    assert float(F.nll_loss(fit_vector(z, y)(z.double()), y)) <= temperature.nll_scaled + 1e-6


def test_where_a_temperature_is_all_that_is_missing_the_slopes_are_its_inverse() -> None:
    z = 2 * torch.randn(100_000, 4, generator=seeded(0))
    y = torch.multinomial(z.softmax(1), 1, generator=seeded(1))[:, 0]
    fit = fit_vector(3 * z, y)
    assert fit.scale.tolist() == pytest.approx([1 / 3] * 4, abs=0.01)
    assert fit.bias.tolist() == pytest.approx([0.0] * 4, abs=0.05)


def test_the_penalty_vanishes_as_data_come() -> None:
    z, y = skewed(500, 3)
    one, many = fit_vector(z, y), fit_vector(z.repeat(200, 1), y.repeat(200))
    log_p = z.double().log_softmax(1)

    def free(theta: NDArray[np.float64]) -> float:
        scale, bias = torch.from_numpy(theta.reshape(2, 3))
        return float(F.cross_entropy(log_p * scale + bias, y))

    best = minimize(free, np.r_[np.ones(3) / 2, np.zeros(3)]).fun
    ours = [float(F.nll_loss(fit(z.double()), y)) for fit in (one, many)]
    assert ours[0] - best > 10 * (ours[1] - best) >= -1e-9


def test_logits_and_log_probabilities_give_the_same_result() -> None:
    z, y = skewed(500, 5)
    shifted = z.double() + torch.randn(500, 1, generator=seeded(9))
    a, b = fit_vector(z.double(), y), fit_vector(shifted.log_softmax(1), y)
    torch.testing.assert_close(a.scale, b.scale, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a(z.double()), a(shifted))


def test_the_formula_is_the_documented_one() -> None:
    z = torch.randn(20, 3, generator=seeded(0))
    fit = VectorScaling(torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 1.0, -1.0]))
    expected = log_softmax(log_softmax(z.numpy(), 1) * [1, 2, 0.5] + [0, 1, -1], 1)
    np.testing.assert_allclose(fit(z), expected, rtol=1e-5)


def test_a_class_that_is_switched_off_stays_off() -> None:
    z, y = skewed(500, 5)
    off = torch.cat([z, torch.full((500, 1), -math.inf)], dim=1)
    fit, without = fit_vector(off, y), fit_vector(z, y)
    torch.testing.assert_close(fit.scale[:5], without.scale, rtol=1e-5, atol=1e-5)
    assert bool((fit(off)[:, 5] == -math.inf).all())
    assert not bool(fit(off).isnan().any())


def test_a_class_without_any_row_keeps_a_finite_probability() -> None:
    z, y = skewed(300, 5)
    fit = fit_vector(z, y.clamp(max=3))
    assert bool(fit(z).isfinite().all())
    assert float(fit(z).exp()[:, 4].mean()) < float(z.softmax(1)[:, 4].mean())


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected logits \(R, 2\), as fitted, got \(3, 4\)"):
        VectorScaling(torch.ones(2), torch.zeros(2))(torch.zeros(3, 4))
