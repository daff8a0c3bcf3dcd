"""One temperature: the right one, a flag where there is none, and the same on every process."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logsumexp
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.calibration import TemperatureFit, fit_temperature, temperature
from lightning_robust.randomness import seeded

TEMPERATURES = [0.05, 0.3, 1.6, 6.0, 8.0, 12.0, 30.0, 60.0]


def scaled(wanted: float, n: int = 5000, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits whose labels were drawn from softmax(z / wanted)."""
    z = 2 * torch.randn(n, classes, generator=seeded(seed))
    labels = torch.multinomial(z.softmax(1), 1, generator=seeded(seed, 1))[:, 0]
    return wanted * z, labels


def nll(z: Tensor, y: Tensor, at: float) -> float:
    return float(F.cross_entropy(z.double() / at, y))


def best(z: Tensor, y: Tensor) -> float:
    """The best temperature, by scipy in double precision."""
    logits, rows = z.double().numpy(), np.arange(len(z))
    logits = logits - logits.max(1, keepdims=True)

    def slope(beta: float) -> float:
        p = np.exp(beta * logits - logsumexp(beta * logits, axis=1, keepdims=True))
        return float(((p * logits).sum(1) - logits[rows, y.numpy()]).mean())

    return 1 / brentq(slope, 1 / 64, 64, xtol=1e-14, rtol=1e-13)


@pytest.mark.parametrize("wanted", TEMPERATURES)
def test_the_temperature_is_that_of_scipy(wanted: float) -> None:
    z, y = scaled(wanted)
    fit = fit_temperature(z, y)
    assert fit.temperature == pytest.approx(best(z, y), rel=1e-6)
    assert fit.temperature == pytest.approx(wanted, rel=0.05)
    assert fit.nll == pytest.approx(nll(z, y, 1), rel=1e-6)
    assert fit.nll_scaled == pytest.approx(nll(z, y, fit.temperature), rel=1e-6)
    assert (fit.at_bound, fit.samples) == (False, 5000)
    assert fit.passes <= 12


@pytest.mark.parametrize("wanted", TEMPERATURES)
def test_no_other_temperature_is_better(wanted: float) -> None:
    z, y = scaled(wanted, classes=100, n=2000)
    lowest = minimize_scalar(lambda log_t: nll(z, y, math.exp(log_t)), bounds=(-4.1, 4.1), method="bounded")
    fit = fit_temperature(z.double(), y)
    assert fit.nll_scaled <= lowest.fun + 1e-12
    assert math.log(fit.temperature) == pytest.approx(lowest.x, abs=1e-4)


@pytest.mark.parametrize(("margin", "right"), [(3.0, 0.75), (1.0, 0.9), (20.0, 0.6)])
def test_two_classes_and_one_margin_have_a_closed_form(margin: float, right: float) -> None:
    z = torch.tensor([[margin, 0.0]]).expand(100, 2)
    y = (torch.arange(100) >= 100 * right).long()
    expected = margin / math.log(right / (1 - right))
    assert fit_temperature(z, y).temperature == pytest.approx(expected, rel=1e-6)


def degenerate() -> dict[str, tuple[Tensor, Tensor, float]]:
    z = torch.randn(500, 10, generator=seeded(5))
    return {
        "always right": (z, z.argmax(1), 1 / 64),
        "right by a hair": (1e-3 * z, z.argmax(1), 1 / 64),
        "right and certain": (1e5 * z, z.argmax(1), 1 / 64),
        "always least likely": (z, z.argmin(1), 64.0),
        "nothing said": (torch.zeros(500, 10), torch.arange(500) % 10, 64.0),
        "wrong and certain": (1e5 * z, z.argmin(1), 64.0),
        "every label once for each row": (z.repeat_interleave(10, 0), torch.arange(5000) % 10, 64.0),
        "beyond the bounds, cold": (*scaled(1 / 200), 1 / 64),
        "beyond the bounds, hot": (*scaled(200.0), 64.0),
    }


@pytest.mark.parametrize("name", degenerate())
def test_without_an_optimum_the_bound_is_flagged(name: str) -> None:
    z, y, bound = degenerate()[name]
    fit = fit_temperature(z, y)
    assert (fit.temperature, fit.at_bound) == (bound, True)
    assert math.isfinite(fit.nll_scaled)
    assert fit.nll_scaled <= fit.nll


@pytest.mark.parametrize("name", degenerate())
def test_the_lower_bound_is_not_applied_and_the_upper_one_is(name: str) -> None:
    z, y, bound = degenerate()[name]
    fit = fit_temperature(z, y)
    assert fit.applied.at_bound
    assert (fit.applied.temperature, fit.applied.nll_scaled) == ((1.0, fit.nll) if bound < 1 else (64, fit.nll_scaled))


def test_a_temperature_that_was_found_is_applied_as_it_is() -> None:
    fit = fit_temperature(*scaled(0.3))
    assert fit.applied is fit


def test_one_error_among_many_is_enough_for_an_optimum() -> None:
    z, _ = scaled(1.0)
    y = z.argmax(1)
    y[7] = z[7].argmin()
    fit = fit_temperature(z, y)
    assert not fit.at_bound
    assert fit.temperature == pytest.approx(best(z, y), rel=1e-6)


def test_the_fit_is_never_worse_than_no_fit() -> None:
    for seed in range(150):
        generator = seeded(seed)
        n, classes = int(torch.randint(1, 30, (), generator=generator)), 2 + seed % 5
        z = torch.randn(n, classes, generator=generator) * 10 ** float(4 * torch.rand((), generator=generator) - 2)
        y = torch.randint(classes, (n,), generator=generator)
        fit = fit_temperature(z, y)
        assert fit.nll_scaled <= fit.nll
        assert nll(z, y, fit.temperature) <= nll(z, y, 1) + 1e-6 * abs(nll(z, y, 1))
        assert fit.passes < temperature.MAX_PASSES


@pytest.mark.parametrize("wanted", [0.3, 6.0, 30.0])
def test_no_prediction_changes(wanted: float) -> None:
    z, y = scaled(wanted)
    assert torch.equal((z / fit_temperature(z, y).temperature).argmax(1), z.argmax(1))


@pytest.mark.parametrize("wanted", TEMPERATURES)
def test_single_and_double_precision_agree(wanted: float) -> None:
    z, y = scaled(wanted)
    assert fit_temperature(z, y).temperature == pytest.approx(fit_temperature(z.double(), y).temperature, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_first(dtype: torch.dtype) -> None:
    z, y = scaled(1.6)
    assert fit_temperature(z.to(dtype), y) == fit_temperature(z.to(dtype).float(), y)


def test_log_probabilities_have_the_temperature_of_their_logits() -> None:
    z, y = scaled(1.6)
    fit = fit_temperature(z.double(), y)
    assert fit_temperature(z.double().log_softmax(1), y).temperature == pytest.approx(fit.temperature, rel=1e-9)


def test_it_works_in_inference_mode_and_leaves_the_logits_alone() -> None:
    z, y = scaled(6.0)
    with torch.inference_mode():
        inside = z.clone()
        assert fit_temperature(inside, y.clone()) == fit_temperature(z, y)
        assert torch.equal(inside, z)
    wanting = z.clone().requires_grad_()
    assert fit_temperature(wanting, y) == fit_temperature(z, y)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = scaled(1.6)
    whole = fit_temperature(z, y)
    monkeypatch.setattr(temperature, "CHUNK", 70)
    # torch's float32 exp2 rounds otherwise at the end of a vector: a few parts in a trillion of the mean.
    assert fit_temperature(z, y).temperature == pytest.approx(whole.temperature, rel=1e-10)


def shards(z: Tensor, y: Tensor, *cuts: int) -> tuple[list[TemperatureFit], list[int]]:
    """Fit in one thread for each shard; ``reduce`` adds what all of them hand in. Also how often each called it."""
    parts = list(zip(z.tensor_split(cuts), y.tensor_split(cuts), strict=True))
    barrier, given, calls = Barrier(len(parts), timeout=20), [torch.empty(0)] * len(parts), [0] * len(parts)

    def run(rank: int) -> TemperatureFit:
        def reduce(sums: Tensor) -> Tensor:
            given[rank] = sums
            calls[rank] += 1
            barrier.wait()
            total = torch.stack(given).sum(0)
            barrier.wait()
            return total

        return fit_temperature(*parts[rank], reduce=reduce)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts)))), calls


def test_processes_together_find_the_temperature_of_one() -> None:
    z, y = scaled(6.0)
    fits, calls = shards(z, y, 1200, 1200)  # three, the second without rows
    assert fits[0] == fits[1] == fits[2]
    assert calls == [fits[0].passes] * 3
    one = fit_temperature(z, y)
    assert fits[0].temperature == pytest.approx(one.temperature, rel=1e-12)
    assert (fits[0].samples, fits[0].passes) == (5000, one.passes)


def test_processes_without_any_row_fail_together() -> None:
    with pytest.raises(ValueError, match="got 0 rows"):
        shards(torch.empty(0, 10), torch.empty(0, dtype=torch.long), 0)


def test_rows_without_a_finite_loss_are_left_out_and_counted() -> None:
    z, y = scaled(1.6)
    dirty = z.clone()
    dirty[0, 3], dirty[10, 2], dirty[20, y[20]] = math.nan, math.inf, -math.inf
    kept = torch.ones(5000, dtype=torch.bool)
    kept[[0, 10, 20]] = False
    with pytest.warns(UserWarning, match="3 of 5000 rows"):
        fit = fit_temperature(dirty, y)
    assert fit.samples == 4997
    assert fit.temperature == pytest.approx(fit_temperature(z[kept], y[kept]).temperature, rel=1e-9)


def test_a_class_that_is_switched_off_does_not_count() -> None:
    z, y = scaled(1.6)
    off = torch.cat([z, torch.full((5000, 1), -math.inf)], dim=1)
    assert fit_temperature(off, y) == fit_temperature(z, y)


def test_misuse_is_named() -> None:
    z, y = scaled(1.0, n=5)
    with pytest.raises(ValueError, match="expected rows with a finite loss"):
        fit_temperature(z[:0], y[:0])
    with pytest.raises(ValueError, match=r"targets in \[0, 10\), got \[-100, 10\]"):
        fit_temperature(z, torch.tensor([0, -100, 10, 3, 4]))
    with pytest.raises(ValueError, match=r"got \(5, 10\) and \(4,\)"):
        fit_temperature(z, y[:4])
    with pytest.raises(ValueError, match=r"got \(2, 10\)"):
        fit_temperature(z, y, bounds=(2, 10))
