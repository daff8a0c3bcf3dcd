"""The Brier score as a metric: scikit-learn's, doubled."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import brier_score_loss

from lightning_robust.metrics import BrierScore
from lightning_robust.randomness import seeded


def test_a_yes_no_head_has_twice_the_score_of_scikit_learn() -> None:
    z, y = torch.randn(500, generator=seeded(0)), torch.arange(500) % 3 == 0
    metric = BrierScore()
    metric.update(z, y.long())
    assert float(metric.compute()) == pytest.approx(2 * brier_score_loss(y, z.double().sigmoid()), rel=1e-6)


def test_a_sure_error_has_the_highest_score_there_is() -> None:
    metric = BrierScore()
    metric.update(torch.tensor([[100.0, 0.0, 0.0]]), torch.tensor([1]))
    assert metric.compute() == 2


def test_its_state_is_seven_numbers() -> None:
    assert BrierScore().total.shape == (7,)
