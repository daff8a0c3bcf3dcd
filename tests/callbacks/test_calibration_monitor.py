"""Calibration in every kind of run, against scikit-learn and torchmetrics on logits that a plain loop computed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
import zoo
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_robust import CalibrationMonitor, read_entry
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.randomness import RandomState

SIZES = (16, 16, 5)
MEASURES = {"ece", "ece_low", "ece_high", "ece_floor", "nll", "brier"}
shapes = pytest.mark.parametrize("shape", zoo.ZOO, ids=lambda shape: shape.__name__)


def data(n: int = 101, batch_size: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n), zoo.labels(n)), batch_size)


class Classifier(zoo.ListBatch):
    """Sure of itself, so that there is something to measure."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(4 * x)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))


def measured(trainer: pl.Trainer, area: str = "calibration/val/", suffix: str = "") -> dict[str, float]:
    found = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(area)}
    names = {key: key.removeprefix(area) for key in found}
    return {
        names[key].removesuffix(suffix): value
        for key, value in found.items()
        if key.endswith(suffix) and ("/" in names[key]) == bool(suffix)
    }


def reference(p: Tensor, labels: Tensor) -> dict[str, float]:
    """What others make of probabilities ``(R, K)`` and labels ``(R,)``."""
    classes = list(range(p.shape[1]))
    ece = torchmetrics.functional.classification.multiclass_calibration_error(p.float(), labels, len(classes), 15, "l1")
    p64 = p.double().numpy()
    p64 = p64 / p64.sum(1, keepdims=True)
    return {
        "ece": float(ece),
        "nll": log_loss(labels, p64, labels=classes),
        "brier": brier_score_loss(labels, p64, labels=classes, scale_by_half=False),
    }


def offline(module: nn.Module, loader: Any, forward: Callable[[Any], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities and labels by a plain loop."""
    module.eval()
    with torch.no_grad():
        batches = [((forward or module)(x).softmax(1), y) for x, y in loader]
    return torch.cat([p for p, _ in batches]), torch.cat([y for _, y in batches])


def by_hand(module: zoo.Shape, batches: list[Any], states: list[RandomState]) -> tuple[Tensor, Tensor]:
    """Probabilities and labels of every single prediction, from what the zoo computes without the probe."""
    module = copy.deepcopy(module).eval()
    p, labels = [], []
    for batch, state in zip(batches, states, strict=True):
        state.restore()
        with torch.no_grad():
            logits, target, _losses = module.by_hand(batch, module.image(batch).clone())
        if isinstance(module, (zoo.SigmoidMultiLabel, zoo.OneLogitBinary)):
            yes = (logits if isinstance(module, zoo.SigmoidMultiLabel) else logits.sigmoid()).flatten()
            p.append(torch.stack([1 - yes, yes], 1))
            labels.append(target.flatten().long())
        else:
            p.append(logits.softmax(1))
            labels.append(target.argmax(1) if target.ndim == 2 else target)
    return torch.cat(p), torch.cat(labels)


def evaluating(shape: type[zoo.Shape], returns: str = "loss") -> type[zoo.Shape]:
    """The shape with evaluation steps that call its own loss code, or only its network."""

    class Evaluating(shape):  # type: ignore[misc, valid-type]  # the class is a parameter
        def __init__(self) -> None:
            super().__init__()
            self.states: list[RandomState] = []  # what the random streams were when a step began

        def _evaluate(self, batch: Any) -> Any:
            self.states.append(RandomState.capture())
            if returns == "nothing":  # and computes no loss
                x = self.image(batch)
                logits = self(x) if shape in (zoo.ListBatch, zoo.NormalisesInModel, zoo.LogSoftmaxNLL) else self.net(x)
                return logits.argmax(1)
            if shape is zoo.ManualOptimisation:
                loss = F.cross_entropy(self.net(batch[0]), batch[1])
            elif shape is zoo.NoBatchIdx:
                loss = self.training_step(batch)
            else:
                loss = self.training_step(batch, 0)
            loss = loss["loss"] if isinstance(loss, dict) else loss
            self.log("loss", loss)
            return {"loss": loss, "dict": {"val_loss": loss, "more": [1]}, "none": None}[returns]

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return self._evaluate(batch)

        def test_step(self, batch: Any, batch_idx: int) -> Any:
            return self._evaluate(batch)

    Evaluating.__name__ = shape.__name__
    return Evaluating


class Last(pl.Callback):
    """Forgets the states of all evaluations but the last, and keeps its weights."""

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.states.clear()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights = copy.deepcopy(pl_module.state_dict())

    on_test_epoch_end = on_validation_epoch_end


@pytest.mark.filterwarnings("ignore:You called `self.log.'loss', ...:UserWarning")
@pytest.mark.parametrize("run", ["fit", "validate", "test"])
@shapes
def test_the_numbers_of_every_shape_are_those_of_others_offline(shape: type[zoo.Shape], run: str) -> None:
    evaluated = evaluating(shape, {"fit": "none", "validate": "dict", "test": "loss"}[run])
    module, last, monitor = zoo.built(evaluated), Last(), CalibrationMonitor()
    trainer = zoo.trainer(callbacks=[monitor, last], max_epochs=2)
    if run == "fit":
        trainer.fit(module, zoo.loader(shape), zoo.loader(shape, SIZES))
    else:
        getattr(trainer, run)(module, zoo.loader(shape, SIZES), verbose=False)
    stored = zoo.built(evaluated)
    stored.load_state_dict(last.weights)
    # One state a batch: the copy that the way was found on is taken back.
    p, labels = by_hand(stored, [shape.batch(n) for n in SIZES], module.states)
    found = measured(trainer, f"calibration/{'test' if run == 'test' else 'val'}/")
    assert set(found) == MEASURES
    expected = reference(p, labels)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5, abs=1e-6)
    assert 0 <= found["ece_low"] <= found["ece"] <= found["ece_high"] <= 1
    if run != "test":
        bins = monitor.section()["calibration"]["bins"]
        right = np.dot(bins["counts"], bins["accuracy"])
        assert (sum(bins["counts"]), right) == pytest.approx((len(p), int((p.argmax(1) == labels).sum())))


RANDOM = (zoo.NumpyMixup, zoo.SideEffects)  # their training step draws random numbers before the loss
DIRECT = [shape for shape in zoo.ZOO if shape not in (*RANDOM, zoo.WritesIntoItsBatch)]


@pytest.mark.parametrize("shape", DIRECT, ids=lambda shape: shape.__name__)
def test_a_validation_without_any_loss_is_measured_through_training_step(shape: type[zoo.Shape]) -> None:
    evaluated = evaluating(shape, "nothing")
    module, trainer = zoo.built(evaluated), zoo.trainer(callbacks=[CalibrationMonitor()])
    trainer.validate(module, zoo.loader(shape, SIZES), verbose=False)
    p, labels = by_hand(module, [shape.batch(n) for n in SIZES], [RandomState.capture()] * 3)
    expected = reference(p, labels)
    found = measured(trainer)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("shape", RANDOM, ids=lambda shape: shape.__name__)
def test_a_training_step_that_draws_random_numbers_cannot_stand_in(shape: type[zoo.Shape]) -> None:
    module, trainer = zoo.built(evaluating(shape, "nothing")), zoo.trainer(callbacks=[CalibrationMonitor()])
    with pytest.raises(ProbeError, match="logits_fn="):
        trainer.validate(module, zoo.loader(shape), verbose=False)


def test_a_batch_written_into_by_a_validation_without_loss_is_read_as_it_came() -> None:
    class Normalising(zoo.WritesIntoItsBatch):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            y.zero_()
            return self.net(x.sub_(0.5).mul_(2)).argmax(1)

    module, trainer = zoo.built(Normalising), zoo.trainer(callbacks=[CalibrationMonitor()])
    trainer.validate(module, zoo.loader(Normalising, SIZES), verbose=False)
    p, labels = by_hand(module, [Normalising.batch(n) for n in SIZES], [RandomState.capture()] * 3)
    expected = reference(p, labels)
    assert {name: measured(trainer)[name] for name in expected} == pytest.approx(expected, rel=2e-5, abs=1e-6)
