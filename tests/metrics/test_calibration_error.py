"""The metric: logits of every kind of head, every norm and mode; sums and processes are in ``test_doubles.py``."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

from lightning_robust.calibration import Reliability
from lightning_robust.calibration.reliability import Norm
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


@pytest.mark.parametrize("norm", get_args(Norm))
def test_every_norm_is_that_of_the_sums(norm: Norm) -> None:
    metric = CalibrationError(norm=norm)
    metric.update(LOGITS, TARGETS)
    assert float(metric.compute()) == pytest.approx(metric.reliability.error(norm), rel=1e-6)


def test_the_probability_of_yes_is_that_of_torchmetrics() -> None:
    z, y = LOGITS[:, 0], (TARGETS == 0).long()
    metric = CalibrationError(mode="positive")
    for some_z, some_y in zip(z.split(300), y.split(300), strict=True):
        metric.update(some_z, some_y)
    theirs = BinaryCalibrationError(n_bins=15, norm="l1")(z.sigmoid(), y)
    assert float(metric.compute()) == pytest.approx(float(theirs), abs=1e-6)


def test_labels_are_events_of_their_own() -> None:
    y = F.one_hot(TARGETS, 7)
    metric = CalibrationError(mode="per_label")
    metric.update(LOGITS, y.float())
    theirs = BinaryCalibrationError(n_bins=15, norm="l1")(LOGITS.sigmoid().flatten(), y.flatten())
    assert float(metric.compute()) == pytest.approx(float(theirs), abs=1e-6)


def test_misuse_is_named() -> None:
    metric = CalibrationError()
    with pytest.raises(ValueError, match=r"labels from 0 to 6, .*got labels from 0 to 9"):
        metric.update(LOGITS[:2], torch.tensor([9, 0]))
    with pytest.raises(ValueError, match="integer classes"):
        metric.update(LOGITS[:2], torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="bins=0"):
        CalibrationError(bins=0)
    with pytest.raises(ValueError, match="got 'l2'"):
        CalibrationError(norm="l2")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="got 'binary'"):
        CalibrationError(mode="binary")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="7 classes"):
        CalibrationError(mode="positive").update(LOGITS, TARGETS)


def test_two_modes_in_a_collection_stay_two_metrics() -> None:
    yes = torch.tensor([1.0, 2.0, 3.0])  # of the first batch both modes say the same
    both = MetricCollection({mode: CalibrationError(mode=mode) for mode in ("positive", "top_label")})
    alone = {mode: CalibrationError(mode=mode) for mode in ("positive", "top_label")}
    for z, y in ((yes, torch.tensor([1, 1, 0])), (-yes, torch.tensor([0, 1, 0]))):
        both.update(z, y)
        for metric in alone.values():
            metric.update(z, y)
    found = both.compute()
    assert {mode: float(found[mode]) for mode in alone} == {mode: float(m.compute()) for mode, m in alone.items()}
    assert float(found["positive"]) != pytest.approx(float(found["top_label"]), abs=1e-3)
