"""Metrics of summed doubles: batches, processes and casts mean nothing to any of them."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_robust import calibration
from lightning_robust.metrics import (
    AdaptiveCalibrationError,
    BrierScore,
    CalibrationError,
    ClasswiseCalibrationError,
    SelectiveRisk,
)
from lightning_robust.metrics.doubles import SummedDoubles
from lightning_robust.randomness import seeded

LOGITS = 3 * torch.randn(2000, 7, generator=seeded(0))
TARGETS = torch.multinomial((LOGITS / 2).softmax(1), 1, generator=seeded(1))[:, 0]
Make = Callable[[], SummedDoubles]
METRICS: dict[str, tuple[Make, Callable[[Tensor, Tensor], float]]] = {
    "calibration": (CalibrationError, calibration.calibration_error),
    "adaptive": (AdaptiveCalibrationError, calibration.adaptive_calibration_error),
    "classwise": (lambda: ClasswiseCalibrationError(7), calibration.classwise_calibration_error),
    "brier": (BrierScore, calibration.brier_score),
    "selective": (SelectiveRisk, calibration.aurc),
}
each = pytest.mark.parametrize("make", [make for make, _ in METRICS.values()], ids=list(METRICS))


def measured(make: Make, rows: slice = slice(None), batch: int = 300) -> SummedDoubles:
    metric = make()
    for z, y in zip(LOGITS[rows].split(batch), TARGETS[rows].split(batch), strict=True):
        metric.update(z, y)
    return metric


def same(one: SummedDoubles, other: SummedDoubles) -> bool:
    """Equal but for the last places of single rows in float32, which vary with the layout of a batch."""
    return torch.allclose(one.total, other.total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", METRICS)
def test_in_batches_it_is_the_function_of_all(name: str) -> None:
    make, function = METRICS[name]
    value = measured(make).compute()
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(function(LOGITS, TARGETS), rel=1e-6)


@each
def test_the_size_of_batches_means_nothing(make: Make) -> None:
    assert same(measured(make, batch=7), measured(make, batch=2000))


@each
def test_pixels_without_a_label_do_not_count(make: Make) -> None:
    maps, labels = LOGITS.view(20, 10, 10, 7).permute(0, 3, 1, 2), TARGETS.view(20, 10, 10).clone()
    labels[10:] = -100
    metric = make()
    metric.update(maps, labels)
    assert same(metric, measured(make, slice(1000)))


@each
def test_forward_gives_the_batch_and_remembers_the_rest(make: Make) -> None:
    metric = make()
    batches = zip(LOGITS.split(500), TARGETS.split(500), strict=True)
    values = [metric(z, y) for z, y in batches]
    assert float(values[1]) == pytest.approx(float(measured(make, slice(500, 1000)).compute()), rel=1e-6)
    assert float(metric.compute()) == pytest.approx(float(measured(make).compute()), rel=1e-6)


@each
def test_reset_forgets(make: Make) -> None:
    metric = measured(make)
    metric.reset()
    assert not metric.total.any()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(metric.compute())


@pytest.mark.skipif(not hasattr(CalibrationError, "merge_state"), reason="this torchmetrics merges no states")
@each
def test_two_halves_are_merged_into_one(make: Make) -> None:
    first, second = measured(make, slice(700)), measured(make, slice(700, None))
    first.merge_state(second)
    assert same(first, measured(make))


@each
def test_two_processes_are_summed(make: Make) -> None:
    first, second = measured(make, slice(700)), measured(make, slice(700, None))
    alone = first.total.clone()
    first.dist_sync_fn = lambda state, group: [state, second.total]
    first.distributed_available_fn = lambda: True
    with first.sync_context(dist_sync_fn=first.dist_sync_fn):
        assert same(first, measured(make))
    assert float(first.compute()) == pytest.approx(float(measured(make).compute()), rel=1e-6)
    assert torch.equal(first.total, alone)


@each
def test_a_pickled_metric_goes_on_counting(make: Make) -> None:
    metric: SummedDoubles = pickle.loads(pickle.dumps(measured(make, slice(700))))
    metric.update(LOGITS[700:], TARGETS[700:])
    assert same(metric, measured(make))


CASTS: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "float": lambda module: module.float(),
    "to": lambda module: module.to(torch.float16),
    "to device and dtype": lambda module: module.to("cpu", torch.bfloat16),
    "set_dtype": lambda module: module[0].set_dtype(torch.float16),  # type: ignore[index]
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@each
def test_no_cast_of_the_module_around_it_touches_the_sums(make: Make, cast: Callable[[nn.Module], object]) -> None:
    metric = measured(make, slice(700))
    cast(nn.ModuleList([metric, nn.Linear(2, 2)]))
    assert metric.total.dtype == torch.float64
    metric.update(LOGITS[700:], TARGETS[700:])
    assert same(metric, measured(make))
    metric.reset()
    assert metric.total.dtype == torch.float64


@each
def test_the_state_follows_the_module_to_its_device(make: Make) -> None:
    metric = measured(make).to("meta")
    assert (metric.total.device.type, metric.total.dtype) == ("meta", torch.float64)


@each
def test_it_can_be_updated_in_inference_mode_and_afterwards(make: Make) -> None:
    metric = make()
    with torch.inference_mode():
        metric.update(LOGITS[:700], TARGETS[:700])
    metric.update(LOGITS[700:], TARGETS[700:])
    assert same(metric, measured(make))


@each
def test_logits_that_are_trained_keep_their_gradients(make: Make) -> None:
    logits = LOGITS[:100].clone().requires_grad_()
    loss = nn.functional.cross_entropy(logits, TARGETS[:100])
    metric = make()
    metric.update(logits, TARGETS[:100])
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no types there
    assert not metric.total.requires_grad
    assert logits.grad is not None
