"""One call each: every kind of head, compared with scikit-learn, torchmetrics and thinking."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

from lightning_robust.calibration import (
    adaptive_calibration_error,
    aurc,
    brier_score,
    calibration_error,
    classwise_calibration_error,
    negative_log_likelihood,
)
from lightning_robust.calibration.reliability import Norm
from lightning_robust.randomness import seeded

LOGITS = 3 * torch.randn(2000, 7, generator=seeded(0))
TARGETS = torch.multinomial((LOGITS / 2).softmax(1), 1, generator=seeded(1))[:, 0]
YES = (TARGETS == 0).long()
EVERY = [
    calibration_error,
    brier_score,
    negative_log_likelihood,
    adaptive_calibration_error,
    classwise_calibration_error,
    aurc,
]


@pytest.mark.parametrize(("norm", "theirs"), [("l1", "l1"), ("rms", "l2"), ("max", "max")])
def test_calibration_errors_are_those_of_torchmetrics(norm: Norm, theirs: str) -> None:
    metric = MulticlassCalibrationError(num_classes=7, n_bins=15, norm=theirs)  # type: ignore[arg-type]  # a literal
    expected = float(metric(LOGITS.softmax(1), TARGETS))
    assert calibration_error(LOGITS, TARGETS, norm=norm) == pytest.approx(expected, abs=1e-6)


def test_the_probability_of_yes_is_held_against_how_often_it_is_yes() -> None:
    z = LOGITS[:, 0]
    expected = float(BinaryCalibrationError(n_bins=15, norm="l1")(z.sigmoid(), YES))
    for logits, targets in ((z, YES), (z, YES.float()), (z[:, None], YES)):
        assert calibration_error(logits, targets, mode="positive") == pytest.approx(expected, abs=1e-6)
    two = torch.stack([torch.zeros_like(z), z], dim=1)
    assert calibration_error(two, YES, mode="positive") == pytest.approx(expected, abs=1e-6)
    assert abs(calibration_error(z, YES) - expected) > 0.01  # the likelier answer is another question


def test_all_labels_of_a_sample_are_events() -> None:
    y = F.one_hot(TARGETS, 7)
    expected = float(BinaryCalibrationError(n_bins=15, norm="l1")(LOGITS.sigmoid().flatten(), y.flatten()))
    assert calibration_error(LOGITS, y.float(), mode="per_label") == pytest.approx(expected, abs=1e-6)


def test_loss_and_score_are_those_of_scikit_learn() -> None:
    p = LOGITS.double().softmax(1).numpy()
    assert negative_log_likelihood(LOGITS, TARGETS) == pytest.approx(log_loss(TARGETS, p), rel=1e-6)
    errors = p - np.eye(7)[TARGETS.numpy()]
    assert brier_score(LOGITS, TARGETS) == pytest.approx((errors**2).sum(1).mean(), rel=1e-6)
    yes = LOGITS[:, 0].double().sigmoid().numpy()
    assert brier_score(LOGITS[:, 0], YES) == pytest.approx(2 * brier_score_loss(YES, yes), rel=1e-6)
    assert negative_log_likelihood(LOGITS[:, 0], YES) == pytest.approx(log_loss(YES, yes), rel=1e-6)


def test_the_area_is_the_mean_risk_of_the_surest() -> None:
    log_p = LOGITS.double().log_softmax(1)
    confidence, predicted = log_p.max(1)
    wrong = (predicted != TARGETS)[confidence.argsort(descending=True)].double()
    expected = float((wrong.cumsum(0) / torch.arange(1, 2001)).mean())
    assert aurc(LOGITS, TARGETS) == pytest.approx(expected, rel=2e-3)  # cells hold a few samples each


@pytest.mark.parametrize("measure", EVERY, ids=lambda f: f.__name__)
def test_pixels_count_one_by_one_and_those_without_a_label_do_not(measure) -> None:  # type: ignore[no-untyped-def]
    maps, labels = LOGITS.view(20, 10, 10, 7).permute(0, 3, 1, 2), TARGETS.view(20, 10, 10).clone()
    assert measure(maps, labels) == pytest.approx(measure(LOGITS, TARGETS), rel=1e-7)
    labels[:, 5:] = -100
    kept = (torch.arange(2000) // 10) % 10 < 5
    assert measure(maps, labels) == pytest.approx(measure(LOGITS[kept], TARGETS[kept]), rel=1e-7)


@pytest.mark.parametrize("measure", EVERY, ids=lambda f: f.__name__)
def test_logits_stay_as_they_are(measure) -> None:  # type: ignore[no-untyped-def]
    for logits in (LOGITS.clone(), LOGITS.log_softmax(1), LOGITS[:, :1].clone()):
        before = logits.clone()
        measure(logits, YES)
        assert torch.equal(logits, before)


@pytest.mark.parametrize("measure", EVERY, ids=lambda f: f.__name__)
def test_logits_between_zero_and_one_are_still_logits(measure) -> None:  # type: ignore[no-untyped-def]
    small = LOGITS.sigmoid()
    assert measure(small, TARGETS) == pytest.approx(measure(small - 100, TARGETS), rel=1e-3)


def test_a_sure_error_is_no_invalid_row() -> None:
    # Float32 probabilities of 1.0, where log(1 - p) is infinite.
    assert math.isfinite(calibration_error(torch.full((4,), 60.0), torch.zeros(4), mode="positive"))


def refused(logits: Tensor, targets: Tensor, mode: str) -> str:
    with pytest.raises(ValueError, match="mode") as caught:
        calibration_error(logits, targets, mode=mode)  # type: ignore[arg-type]  # on purpose
    return str(caught.value)


def test_a_head_that_does_not_fit_the_mode_is_refused() -> None:
    labels = F.one_hot(TARGETS, 7).float()
    assert "two classes, got 7 classes" in refused(LOGITS, TARGETS, "positive")
    assert "use mode='per_label'" in refused(LOGITS, labels, "positive")
    assert "classwise_calibration_error" in refused(LOGITS, TARGETS, "per_label")
    assert "top_label, positive, per_label, got 'classwise'" in refused(LOGITS, TARGETS, "classwise")
