"""Every number of a monitor, in every mode and on every head, against scikit-learn, torchmetrics and plain loops."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from callbacks.calibration_runs import (
    Memory,
    Said,
    YesNo,
    accuracy,
    bins_of,
    ece,
    ece_of,
    loader,
    logged,
    softmax,
    spoken,
    told,
)
from scipy.stats import binom
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_calibration_error

from lightning_robust import CalibrationMonitor
from lightning_robust.attach.listener import Heard
from lightning_robust.callbacks.measured_loader import MeasuredLoader
from lightning_robust.losses import LossCall


def measured(module: pl.LightningModule, data: Any, **settings: Any) -> tuple[dict[str, float], dict[str, float]]:
    """What Lightning got and what went to the loggers alone."""
    memory = Memory()
    trainer = zoo.trainer(callbacks=[CalibrationMonitor(**settings)], logger=memory)
    trainer.validate(module, data, verbose=False)
    found, area = logged(trainer), "calibration/val/"
    values = {k.removeprefix(area): v for k, v in memory.values.items() if k.startswith(area)}
    return found, {k: v for k, v in values.items() if k not in found}


def test_every_number_is_the_one_of_a_plain_loop() -> None:
    z, y = spoken()
    found, beside = measured(Said(), loader(z, y))
    p, labels = softmax(z), y.numpy()
    n, confidence, right = len(p), p.max(1), p.argmax(1) == labels
    bins = bins_of(confidence, right)
    overall = float(right.mean())
    ranked = right[np.argsort(-confidence)]
    errors = [float((~ranked[:k]).mean()) for k in range(1, n + 1)]
    filled = [math.ceil(n * m / 15) for m in range(16)]
    rising = np.argsort(confidence)
    masses = [rising[a:b] for a, b in pairwise(filled)]
    expected = {
        "ece": ece(p, labels),
        "nll": log_loss(labels, p),
        "brier": brier_score_loss(labels, p, labels=range(4), scale_by_half=False),
        "ece_rms": math.sqrt(sum(k * (c - a) ** 2 for k, c, a in bins) / n),
        "ece_max": max(abs(c - a) for _, c, a in bins),
        # What a perfect model shows: the mean absolute deviation of a binomial, in closed form.
        "ece_floor": sum(k * _mean_deviation(k, c) for k, c, _ in bins) / n,
        "ece_adaptive": sum(abs(confidence[i].sum() - right[i].sum()) for i in masses) / n,
        "accuracy": overall,
        "aurc": float(np.mean(errors)),
        **{f"accuracy_at_{s}": _accuracy_of_surest(ranked, n * s / 100) for s in (95, 90, 80)},
    }
    # Random draws; and neighbours that are equally sure on a grid, one of them right.
    near = {"ece_floor": 0.05, "ece_adaptive": 2e-2, "aurc": 2e-3, "accuracy_at_80": 5e-3}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=near.get(name, 1e-4)), name
    assert set(found) == {*expected, "ece_low", "ece_high"}
    assert 0 < found["ece_low"] < found["ece"] < found["ece_high"] < 1
    assert beside == pytest.approx(
        {
            "ece_debiased": sum(k * ((c - a) ** 2 - a * (1 - a) / (k - 1)) for k, c, a in bins if k > 1) / n,
            "brier_reliability": sum(k * (c - a) ** 2 for k, c, a in bins) / n,
            "brier_resolution": sum(k * (a - overall) ** 2 for k, _, a in bins) / n,
            "brier_uncertainty": overall * (1 - overall),
        },
        rel=1e-4,
    )


def _mean_deviation(n: int, p: float) -> float:
    k = np.arange(n + 1)
    return float((binom.pmf(k, n, p) * abs(k / n - p)).sum())


def _accuracy_of_surest(ranked: np.ndarray, many: float) -> float:
    whole = int(many)
    return float(ranked[:whole].sum() + (many - whole) * ranked[whole]) / many


def yes(z: Tensor) -> np.ndarray:
    return 1 / (1 + np.exp(-z.double().numpy()))  # type: ignore[no-any-return]  # an array


class Classes(Said):
    """A yes/no output as two classes."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(torch.stack([-self(batch[0]) / 2, self(batch[0]) / 2], 1), batch[1].long())


class Column(Said):
    def loss(self, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0])[:, None], batch[1][:, None])


class Probability(Said):
    def loss(self, batch: Any) -> Tensor:
        return F.binary_cross_entropy(self(batch[0]).sigmoid(), batch[1])


@pytest.mark.parametrize("shape", [YesNo, Column, Classes, Probability])
def test_the_positive_mode_holds_the_probability_of_yes_against_how_often_it_is_yes(shape: type[Said]) -> None:
    z, y = (column[:, 0] for column in told())
    found, beside = measured(shape(), loader(z, y), mode="positive")
    p = torch.from_numpy(yes(z)).float()
    for name, norm in {"ece": "l1", "ece_rms": "l2", "ece_max": "max"}.items():
        assert found[name] == pytest.approx(float(binary_calibration_error(p, y.long(), 15, norm)), rel=1e-4)
    assert found["nll"] == pytest.approx(log_loss(y, p.double()), rel=1e-4)
    assert found["brier"] == pytest.approx(2 * brier_score_loss(y, p.double()), rel=1e-4)
    likelier = accuracy(np.stack([1 - p, p], 1), y.long())
    assert found["accuracy"] == pytest.approx(likelier)
    assert found["accuracy_at_80"] > likelier
    assert "ece_adaptive" not in found
    assert beside["brier_uncertainty"] == pytest.approx(float(y.mean() * (1 - y.mean())), rel=1e-4)


def test_a_sure_error_is_counted_with_its_loss_though_its_probability_rounds_to_one() -> None:
    z, y = torch.tensor([200.0, 1.0, -1.0, -150.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    found, _ = measured(YesNo(), loader(z, y), mode="positive")
    assert found["nll"] == pytest.approx((350 + 2 * math.log(1 + math.exp(-1))) / 4)


@pytest.mark.parametrize("flat", [False, True])
def test_the_per_label_mode_has_a_table_by_label(flat: bool) -> None:
    class Flat(Said):
        """Every label in one row, as some write their loss."""

        def loss(self, batch: Any) -> Tensor:
            return F.binary_cross_entropy_with_logits(self(batch[0]).flatten(), batch[1].flatten())

    z, y = told()
    monitor = CalibrationMonitor(mode="per_label")
    trainer = zoo.trainer(callbacks=[monitor])
    trainer.validate((Flat if flat else YesNo)(), loader(z, y), verbose=False)
    found, p = logged(trainer), torch.from_numpy(yes(z)).float()
    errors = [float(binary_calibration_error(p[:, k].contiguous(), y[:, k].long(), 15)) for k in range(3)]
    assert found["ece"] == pytest.approx(float(binary_calibration_error(p.flatten(), y.flatten().long(), 15)), rel=1e-4)
    assert found["ece_classwise"] == pytest.approx(float(np.mean(errors)), rel=1e-4)
    assert found["worst_class_ece"] == pytest.approx(max(errors), rel=1e-4)
    assert found["worst_class"] == int(np.argmax(errors))
    assert monitor.section()["calibration"]["classes"] == {"ece": pytest.approx(errors, rel=1e-4)}


def test_labels_of_every_pixel_are_labels_not_classes_of_their_own() -> None:
    z, y = (column.view(50, 2, 3, 3).movedim(2, 1) for column in told(900, 1))  # (50, 3, 2, 3) after the move
    found, _ = measured(YesNo(), loader(z, y, batch_size=16), mode="per_label")
    p = torch.from_numpy(yes(z)).float()
    errors = [float(binary_calibration_error(p[:, k].flatten(), y[:, k].flatten().long(), 15)) for k in range(3)]
    assert found["ece_classwise"] == pytest.approx(float(np.mean(errors)), rel=1e-4)


def test_dense_predictions_leave_out_what_has_no_label() -> None:
    class Dense(Said):
        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], ignore_index=255)

    z, y = spoken(600)
    y[::7] = 255
    found, _ = measured(Dense(), loader(z.view(25, 4, 6, 4).movedim(3, 1), y.view(25, 4, 6)), classwise=True)
    p, labels = softmax(z)[y != 255], y[y != 255].numpy()
    errors = [ece_of(p[:, k], labels == k) for k in range(4)]
    expected = {"ece": ece(p, labels), "nll": log_loss(labels, p), "ece_classwise": float(np.mean(errors))}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mode", ["positive", "per_label"])
def test_a_mode_that_does_not_fit_the_head_is_an_error_before_the_first_training_step(mode: str) -> None:
    steps: list[int] = []

    class Counting(Said):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    data = loader(*spoken(classes=2 if mode == "per_label" else 3))
    says = rf"mode='{mode}' is about yes/no outputs.*\(cross_entropy\) tells [23] classes apart.*classwise=True"
    with pytest.raises(ValueError, match=says):
        zoo.trainer(callbacks=[CalibrationMonitor(mode=mode)]).fit(Counting(), data, data)
    assert not steps
    with pytest.raises(ValueError, match=says):
        zoo.trainer(callbacks=[CalibrationMonitor(mode=mode)]).validate(Said(), data, verbose=False)


def test_an_unknown_mode_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="one of top_label, positive, per_label, got 'classwise'"):
        CalibrationMonitor(mode="classwise")


def size(value: Any) -> int:
    """Bytes in all tensors of an object, however deep."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if is_dataclass(value):
        return sum(size(getattr(value, f.name)) for f in fields(value))
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    return sum(map(size, vars(value).values())) if hasattr(value, "__dict__") else 0


@pytest.mark.parametrize("n", [10, 5000])
def test_the_state_of_a_loader_has_the_same_size_whatever_its_length(n: int) -> None:
    found = MeasuredLoader(15, "top_label", True, None)
    for _ in range(3):
        z, y = spoken(n)
        call = LossCall("cross_entropy", z, y)
        found.add(Heard(call, z, torch.arange(n), torch.ones(n, dtype=torch.bool)), None)
    assert size(found.sums) <= 400
    assert size(found) == 15 * 3 * 8 + 3 * 4096 * 8 + 4 * 3 * 16 * 8
    assert found.sums.n == 3 * n
