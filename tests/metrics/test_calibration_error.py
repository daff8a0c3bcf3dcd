"""The metric: logits of every kind of head, sums that no cast can touch."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassCalibrationError

from lightning_robust.calibration import Reliability
from lightning_robust.metrics import CalibrationError
from lightning_robust.randomness import seeded

LOGITS = 3 * torch.randn(2000, 7, generator=seeded(0))
TARGETS = torch.multinomial((LOGITS / 2).softmax(1), 1, generator=seeded(1))[:, 0]


def measured(logits: Tensor = LOGITS, targets: Tensor = TARGETS, batch: int = 300) -> CalibrationError:
    metric = CalibrationError()
    for z, y in zip(logits.split(batch), targets.split(batch), strict=True):
        metric.update(z, y)
    return metric


def test_it_agrees_with_torchmetrics() -> None:
    theirs = MulticlassCalibrationError(num_classes=7, n_bins=15, norm="l1")(LOGITS.softmax(1), TARGETS)
    assert float(measured().compute()) == pytest.approx(float(theirs), abs=1e-6)


def test_logits_between_zero_and_one_are_still_logits() -> None:
    small = LOGITS.sigmoid()
    expected = Reliability.of(small.log_softmax(1), TARGETS).ece
    assert float(measured(small).compute()) == pytest.approx(expected, abs=1e-7)
    theirs = MulticlassCalibrationError(num_classes=7, n_bins=15, norm="l1")(small, TARGETS)
    assert abs(float(theirs) - expected) > 0.1  # takes them for probabilities


def test_pixels_count_one_by_one_and_those_without_a_label_do_not() -> None:
    maps, labels = LOGITS.view(20, 10, 10, 7).permute(0, 3, 1, 2), TARGETS.view(20, 10, 10).clone()
    assert measured(maps, labels, 3).compute() == measured().compute()
    labels[:, 5:] = -100
    kept = (torch.arange(2000) // 10) % 10 < 5
    assert measured(maps, labels, 3).reliability.n == 1000
    assert measured(maps, labels, 3).compute() == measured(LOGITS[kept], TARGETS[kept]).compute()


def test_a_yes_no_head_is_one_of_two_classes() -> None:
    z, y = LOGITS[:, 0], (TARGETS == 0).long()
    two = measured(torch.stack([torch.zeros_like(z), z], dim=1), y).reliability.state()
    for logits, targets in ((z, y), (z, y.float()), (z[:, None], y), (z[:, None], y[:, None].float())):
        assert torch.allclose(measured(logits, targets).reliability.state(), two, rtol=1e-6)


def test_several_labels_count_one_by_one() -> None:
    y = F.one_hot(TARGETS, 7).float()
    assert measured(LOGITS, y).reliability.n == 14_000
    assert measured(LOGITS, y).compute() == measured(LOGITS.flatten(), y.flatten()).compute()


def test_what_was_counted_can_be_read() -> None:
    reliability = measured().reliability
    assert reliability.n == 2000
    assert reliability.mean_nll == pytest.approx(float(F.cross_entropy(LOGITS, TARGETS)), rel=1e-6)
    assert reliability.accuracy == pytest.approx(float((LOGITS.argmax(1) == TARGETS).double().mean()))


def test_forward_gives_the_batch_and_remembers_the_rest() -> None:
    metric = CalibrationError()
    batches = zip(LOGITS.split(500), TARGETS.split(500), strict=True)
    values = [metric(z, y) for z, y in batches]
    assert values[1] == measured(LOGITS[500:1000], TARGETS[500:1000]).compute()
    assert metric.compute() == measured().compute()


def test_reset_forgets() -> None:
    metric = measured()
    metric.reset()
    assert metric.reliability.n == 0
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(metric.compute())


@pytest.mark.skipif(not hasattr(CalibrationError, "merge_state"), reason="this torchmetrics merges no states")
def test_two_halves_are_merged_into_one() -> None:
    first, second = measured(LOGITS[:700], TARGETS[:700]), measured(LOGITS[700:], TARGETS[700:])
    first.merge_state(second)
    assert torch.allclose(first.total, measured().total, rtol=1e-14)
    assert first.compute() == measured().compute()


def test_two_processes_are_summed() -> None:
    first, second = measured(LOGITS[:700], TARGETS[:700]), measured(LOGITS[700:], TARGETS[700:])
    first.dist_sync_fn = lambda state, group: [state, second.total]
    first.distributed_available_fn = lambda: True
    with first.sync_context(dist_sync_fn=first.dist_sync_fn):
        assert first.reliability.n == 2000
    assert first.compute() == measured().compute()
    assert first.reliability.n == 700


def test_a_pickled_metric_goes_on_counting() -> None:
    metric = pickle.loads(pickle.dumps(measured(LOGITS[:700], TARGETS[:700])))
    metric.update(LOGITS[700:], TARGETS[700:])
    assert metric.compute() == measured().compute()


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
def test_no_cast_of_the_module_around_it_touches_the_sums(cast: Callable[[nn.Module], object]) -> None:
    metric = measured(LOGITS[:700], TARGETS[:700])
    cast(nn.ModuleList([metric, nn.Linear(2, 2)]))
    assert metric.total.dtype == torch.float64
    metric.update(LOGITS[700:], TARGETS[700:])
    assert torch.allclose(metric.total, measured().total, rtol=1e-14)
    metric.reset()
    assert metric.total.dtype == torch.float64


def test_the_state_follows_the_module_to_its_device() -> None:
    metric = measured().to("meta")
    assert (metric.total.device.type, metric.total.dtype) == ("meta", torch.float64)


def test_it_can_be_updated_in_inference_mode_and_afterwards() -> None:
    metric = CalibrationError()
    with torch.inference_mode():
        metric.update(LOGITS[:700], TARGETS[:700])
    metric.update(LOGITS[700:], TARGETS[700:])
    assert metric.compute() == measured().compute()


def test_misuse_is_named() -> None:
    metric = CalibrationError()
    with pytest.raises(ValueError, match=r"labels from 0 to 6, .*got labels from 0 to 9"):
        metric.update(LOGITS[:2], torch.tensor([9, 0]))
    with pytest.raises(ValueError, match="integer classes"):
        metric.update(LOGITS[:2], torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="bins=0"):
        CalibrationError(bins=0)
