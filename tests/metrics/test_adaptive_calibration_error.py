"""Bins of equal mass as a metric."""

from __future__ import annotations

import pytest
import torch

from lightning_robust.metrics import AdaptiveCalibrationError
from lightning_robust.randomness import seeded

LOGITS, TARGETS = torch.randn(500, 5, generator=seeded(0)), torch.arange(500) % 5


@pytest.mark.parametrize("bins", [1, 15, 100])
def test_bins_are_made_when_they_are_asked_for(bins: int) -> None:
    metric = AdaptiveCalibrationError(bins)
    metric.update(LOGITS, TARGETS)
    assert float(metric.compute()) == pytest.approx(metric.grid.adaptive(bins), rel=1e-6)


def test_one_bin_is_the_gap_of_all() -> None:
    metric = AdaptiveCalibrationError(bins=1)
    metric.update(LOGITS, TARGETS)
    confidence, predicted = LOGITS.double().softmax(1).max(1)
    assert float(metric.compute()) == pytest.approx(
        abs(float(confidence.mean()) - float((predicted == TARGETS).double().mean())), rel=1e-6
    )


def test_no_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="bins=0"):
        AdaptiveCalibrationError(bins=0)
