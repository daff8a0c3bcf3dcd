"""Risk against coverage as a metric."""

from __future__ import annotations

import pytest
import torch

from lightning_robust.metrics import SelectiveRisk
from lightning_robust.randomness import seeded


def test_a_random_confidence_has_the_error_rate() -> None:
    sure = 1 + 4 * torch.rand(20_000, generator=seeded(0))
    metric = SelectiveRisk()
    metric.update(torch.stack([sure, torch.zeros(20_000)], dim=1), (torch.arange(20_000) % 4 == 0).long())
    assert float(metric.compute()) == pytest.approx(0.25, abs=0.01)


def test_scaling_all_logits_of_two_classes_changes_nothing() -> None:
    z, y = torch.randn(2000, generator=seeded(0)), torch.arange(2000) % 2
    plain, scaled = SelectiveRisk(), SelectiveRisk()
    plain.update(z, y)
    scaled.update(20 * z, y)
    assert float(plain.compute()) == pytest.approx(float(scaled.compute()), abs=1e-3)


def test_the_curve_can_be_read() -> None:
    metric = SelectiveRisk()
    metric.update(torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1, 0, 0]))
    coverage, risk = metric.grid.risk_coverage()
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
