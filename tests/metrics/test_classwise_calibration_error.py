"""Every class against the rest as a metric: heads of classes, of labels, of yes and no."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import BinaryCalibrationError

from lightning_robust.metrics import ClasswiseCalibrationError
from lightning_robust.randomness import seeded

LOGITS = 2 * torch.randn(1000, 4, generator=seeded(0))
TARGETS = torch.multinomial((LOGITS / 2).softmax(1), 1, generator=seeded(1))[:, 0]


def binary(p: torch.Tensor, y: torch.Tensor) -> float:
    return float(BinaryCalibrationError(n_bins=15, norm="l1")(p, y))


def test_errors_are_those_of_torchmetrics_for_each_class() -> None:
    metric = ClasswiseCalibrationError(classes=4)
    metric.update(LOGITS, TARGETS)
    p, y = LOGITS.softmax(1), F.one_hot(TARGETS, 4)
    expected = [binary(p[:, k], y[:, k]) for k in range(4)]
    assert metric.classwise.errors.tolist() == pytest.approx(expected, abs=1e-6)
    assert float(metric.compute()) == pytest.approx(sum(expected) / 4, abs=1e-6)


def test_labels_have_errors_of_their_own() -> None:
    metric = ClasswiseCalibrationError(classes=4)
    y = F.one_hot(TARGETS, 4)
    metric.update(LOGITS, y.float())
    expected = [binary(LOGITS[:, k].sigmoid(), y[:, k]) for k in range(4)]
    assert metric.classwise.errors.tolist() == pytest.approx(expected, abs=1e-6)


def test_yes_and_no_are_two_classes_of_one_error() -> None:
    metric, y = ClasswiseCalibrationError(classes=2), (TARGETS == 0).long()
    metric.update(LOGITS[:, 0], y)
    expected = binary(LOGITS[:, 0].sigmoid(), y)
    assert metric.classwise.errors.tolist() == pytest.approx([expected, expected], abs=1e-6)


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="4 classes, got 2; give classes=2"):
        ClasswiseCalibrationError(classes=4).update(LOGITS[:, 0], (TARGETS == 0).long())
    with pytest.raises(ValueError, match="classes=0"):
        ClasswiseCalibrationError(classes=0)
