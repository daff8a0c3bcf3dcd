"""What all recalibrators have in common: one way to fit, to store, to share between processes and to fail."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from lightning_robust.calibration import Reliability
from lightning_robust.calibration.recalibrators import (
    RECALIBRATORS,
    Recalibrator,
    cross_fitted,
    fit_recalibrator,
    load_recalibrator,
)
from lightning_robust.calibration.temperature import Temperature, fit_temperature
from lightning_robust.randomness import RandomState, seeded

Sum = Callable[[Tensor], Tensor]


def over_confident(n: int = 2000, classes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits twice too large, and with an offset of the last class."""
    z = 2 * torch.randn(n, classes, generator=seeded(seed))
    labels = torch.multinomial(z.softmax(1), 1, generator=seeded(seed, 1))[:, 0]
    return 2 * z + torch.arange(classes) / classes, labels


def together(work: list[Callable[[Sum], Tensor]]) -> tuple[list[Tensor], list[int]]:
    """Each piece of work in a thread of its own; their ``reduce`` adds. Also how often each of them called it."""
    barrier, given, calls = Barrier(len(work), timeout=20), [torch.empty(0)] * len(work), [0] * len(work)

    def run(rank: int) -> Tensor:
        def reduce(sums: Tensor) -> Tensor:
            assert (sums.dtype, sums.device.type) == (torch.float64, "cpu")
            given[rank] = sums
            calls[rank] += 1
            barrier.wait()
            total = torch.stack(given).sum(0)
            barrier.wait()
            return total

        return work[rank](reduce)

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(run, range(len(work)))), calls


def fitted(method: str, classes: int = 2) -> Recalibrator:
    return fit_recalibrator(method, *over_confident(classes=classes))


def several(method: str) -> int:
    return 2 if method == "platt" else 5


@pytest.mark.parametrize("method", RECALIBRATORS)
def test_held_out_probabilities_become_honest(method: str) -> None:
    z, y = over_confident(classes=several(method), seed=5)
    before = Reliability.of(z.log_softmax(1), y)
    after = Reliability.of(fitted(method, several(method))(z), y)
    assert after.ece < before.ece / 1.5
    assert after.mean_nll < before.mean_nll - 0.1


@pytest.mark.parametrize("method", RECALIBRATORS)
def test_the_result_is_log_probabilities_in_the_precision_that_came(method: str) -> None:
    recalibrator, (z, _) = fitted(method, several(method)), over_confident(50, several(method), seed=1)
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2]:
        log_q = recalibrator(z.to(dtype))
        assert (log_q.dtype, log_q.shape) == (expected, z.shape)
        torch.testing.assert_close(log_q.exp().sum(1), torch.ones(50, dtype=expected))


@pytest.mark.parametrize("method", RECALIBRATORS)
def test_log_probabilities_will_do_for_logits(method: str) -> None:
    z, y = (over_confident(classes=several(method))[i] for i in (0, 1))
    z = z.double() + torch.randn(len(z), 1, generator=seeded(3))
    a, b = fit_recalibrator(method, z, y), fit_recalibrator(method, z.log_softmax(1), y)
    torch.testing.assert_close(a(z), b(z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a(z), a(z.log_softmax(1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", RECALIBRATORS)
def test_it_passes_through_a_checkpoint_and_a_json_file(method: str) -> None:
    recalibrator, (z, _) = fitted(method, several(method)), over_confident(50, several(method), seed=1)
    file = io.BytesIO()
    torch.save(recalibrator.to_dict(), file)
    file.seek(0)
    for plain in (torch.load(file, weights_only=True), json.loads(json.dumps(recalibrator.to_dict()))):
        loaded = load_recalibrator(plain)
        assert type(loaded) is type(recalibrator)
        assert loaded.name == method
        assert torch.equal(loaded(z), recalibrator(z))


@pytest.mark.parametrize("method", RECALIBRATORS)
def test_processes_together_find_the_fit_of_one(method: str) -> None:
    z, y = over_confident(classes=several(method))
    cuts = [300, 300]  # three processes, the second without rows
    parts = zip(z.tensor_split(cuts), y.tensor_split(cuts), strict=True)
    found, calls = together([lambda r, p=part: fit_recalibrator(method, *p, reduce=r)(z) for part in parts])  # type: ignore[misc]  # the default is never given
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert calls[0] == calls[1] == calls[2]
    torch.testing.assert_close(found[0], fit_recalibrator(method, z, y)(z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", RECALIBRATORS)
def test_each_half_is_recalibrated_by_the_other(method: str) -> None:
    z, y = over_confident(classes=several(method))
    first = torch.rand(len(y), generator=seeded(2)) < 0.5
    crossed = cross_fitted(method, z, y, first)
    assert torch.equal(crossed[first], fit_recalibrator(method, z[~first], y[~first])(z[first]))
    assert torch.equal(crossed[~first], fit_recalibrator(method, z[first], y[first])(z[~first]))


@pytest.mark.parametrize("method", RECALIBRATORS)
def test_processes_together_cross_fit_as_one(method: str) -> None:
    z, y = over_confident(classes=several(method))
    first = torch.rand(len(y), generator=seeded(2)) < 0.5
    first[:300] = True  # the first process has nothing of the second half
    cuts = [300, 300]
    parts = zip(z.tensor_split(cuts), y.tensor_split(cuts), first.tensor_split(cuts), strict=True)
    found, calls = together([lambda r, p=part: cross_fitted(method, *p, reduce=r) for part in parts])  # type: ignore[misc]  # the default is never given
    assert calls[0] == calls[1] == calls[2]
    torch.testing.assert_close(torch.cat(found), cross_fitted(method, z, y, first), rtol=1e-5, atol=1e-5)


def test_cross_fitting_shows_what_the_fit_flatters() -> None:
    z, y = over_confident(200, classes=20)
    flattered = Reliability.of(fit_recalibrator("vector", z, y)(z), y).mean_nll
    honest = Reliability.of(cross_fitted("vector", z, y, torch.arange(200) % 2 == 0), y).mean_nll
    assert flattered < honest - 0.1


@pytest.mark.parametrize("method", RECALIBRATORS)
@pytest.mark.parametrize(
    "kind", ["always right", "right and certain", "always least likely", "random", "one class", "nothing said"]
)
def test_degenerate_data_give_finite_probabilities(method: str, kind: str) -> None:
    z, _ = over_confident(500, several(method))
    random = torch.randint(several(method), (500,), generator=seeded(8))
    z, y = {
        "always right": (z, z.argmax(1)),
        "right and certain": (1e5 * z, z.argmax(1)),
        "always least likely": (z, z.argmin(1)),
        "random": (30 * z, random),
        "one class": (z, torch.ones_like(random)),
        "nothing said": (torch.zeros_like(z), random),
    }[kind]
    recalibrator = fit_recalibrator(method, z, y)
    log_q = recalibrator(z)
    assert not bool(log_q.isnan().any())
    assert bool(log_q.exp().isfinite().all())
    torch.testing.assert_close(log_q.exp().sum(1), torch.ones(500))
    # One class against the rest, 40 % may be right in one row and wrong in the next, though the likeliest always is.
    if kind == "right and certain" or (kind == "always right" and method != "isotonic"):
        assert recalibrator.at_bound


@pytest.mark.parametrize("method", ["temperature", "vector"])
def test_a_half_without_an_error_does_not_make_those_of_the_other_half_dear(method: str) -> None:
    z = 4 * torch.randn(200, 5, generator=seeded(0))
    y, first = z.argmax(1), torch.arange(200) < 100
    y[120] = z[120].argsort()[-2]  # the one error, in the second half
    plain = Reliability.of(z.log_softmax(1), y).mean_nll
    assert Reliability.of(cross_fitted(method, z, y, first), y).mean_nll < plain + 0.02


@pytest.mark.parametrize("method", RECALIBRATORS)
def test_ordinary_data_are_not_flagged(method: str) -> None:
    assert not fitted(method, several(method)).at_bound


@pytest.mark.parametrize("method", RECALIBRATORS)
def test_rows_without_a_finite_loss_are_left_out_counted_and_stay_without_a_number(method: str) -> None:
    z, y = over_confident(classes=several(method))
    dirty, kept = z.clone(), torch.arange(len(y)) >= 3
    dirty[0, 1], dirty[1, 0], dirty[2, y[2]] = math.nan, math.inf, -math.inf
    with pytest.warns(UserWarning, match="3 of 2000 rows"):
        fit = fit_recalibrator(method, dirty, y)
    torch.testing.assert_close(fit(z), fit_recalibrator(method, z[kept], y[kept])(z))
    assert bool(fit(dirty)[0].isnan().all())


@pytest.mark.parametrize("method", RECALIBRATORS)
def test_nothing_to_fit_is_an_error(method: str) -> None:
    classes = several(method)
    with pytest.raises(ValueError, match="rows with a finite loss"):
        fit_recalibrator(method, torch.empty(0, classes), torch.empty(0, dtype=torch.long))


@pytest.mark.parametrize("method", RECALIBRATORS)
def test_it_works_in_inference_mode_and_leaves_everything_alone(method: str) -> None:
    z, y = over_confident(classes=several(method))
    outside, state = fit_recalibrator(method, z, y)(z), RandomState.capture()
    before = z.clone()
    with torch.inference_mode():
        assert torch.equal(fit_recalibrator(method, z.clone(), y.clone())(z), outside)
    assert torch.equal(z, before)
    assert state.is_current()


@pytest.mark.parametrize("at", [0.1, 0.3, 1.0, 1.6, 5.0, 20.0, 50.0])
def test_a_temperature_never_changes_a_prediction(at: float) -> None:
    z = 2 * torch.randn(200_000, 10, generator=seeded(0))
    near = z.clone()  # a hair between the two likeliest, which far from 0 is lost in float32
    near[:, 7] = near.amax(1) + 2e-6
    for logits in (z, near, z.log_softmax(1)):
        assert torch.equal(Temperature(at)(logits).argmax(1), logits.argmax(1))


def test_only_a_temperature_promises_to_keep_the_order() -> None:
    assert {method: fitted(method).keeps_order for method in RECALIBRATORS} == {
        "temperature": True,
        "vector": False,
        "platt": False,
        "isotonic": False,
    }


def test_the_temperature_is_that_of_its_fit() -> None:
    z, y = over_confident(classes=5)
    fit = fit_temperature(z, y)
    assert fit_recalibrator("temperature", z, y) == Temperature(fit.temperature, fit.at_bound)
    torch.testing.assert_close(Temperature(fit.temperature)(z), (z / fit.temperature).log_softmax(1))


def test_misuse_is_named() -> None:
    z, y = over_confident(20, classes=3)
    with pytest.raises(
        ValueError, match=r"out of temperature, vector, platt, isotonic; got 'vectr'. Did you mean 'vector'"
    ):
        fit_recalibrator("vectr", z, y)
    with pytest.raises(ValueError, match="Did you mean 'isotonic'"):
        load_recalibrator({"name": "isotone"})
    with pytest.raises(ValueError, match="got None"):
        load_recalibrator({})
    with pytest.raises(ValueError, match=r"two classes.*'vector'"):
        fit_recalibrator("platt", z, y)
    with pytest.raises(ValueError, match="bool for 20 rows"):
        cross_fitted("vector", z, y, torch.zeros(20))
    with pytest.raises(ValueError, match=r"targets in \[0, 3\)"):
        fit_recalibrator("vector", z, y + 1)
