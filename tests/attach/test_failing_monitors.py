"""No run is lost to a monitor: what fails in mid-run is said once, marked as missing, and training goes on."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import (
    PGD,
    CalibrationMonitor,
    CorruptionMonitor,
    OODMonitor,
    RobustAccuracy,
    SaliencySnapshots,
    TemperatureScaling,
    ThreatModel,
    read_entry,
)

THREAT = ThreatModel("linf", 0.1)
EPOCHS = 3


def data(n: int = 32) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n), zoo.labels(n)), 16)


MONITORS: dict[str, tuple[type[Any], tuple[Any, ...], str, str]] = {
    "RobustAccuracy": (RobustAccuracy, (PGD(THREAT, steps=1),), "robust/val/accuracy", "codes"),
    "CalibrationMonitor": (CalibrationMonitor, (), "calibration/val/ece", "hear"),
    "OODMonitor": (OODMonitor, (), "ood/val/synthetic_noise/energy_auroc", "_score_synthetic"),
    "CorruptionMonitor": (CorruptionMonitor, (), "shift/val/sampled_accuracy", "_read_corrupted"),
    "SaliencySnapshots": (SaliencySnapshots, (["gradient"],), "saliency/val/flips", "_snapshot"),
    "TemperatureScaling": (TemperatureScaling, (), "calibration/val/temperature", "_fit"),
}


class History(pl.Callback):
    """What was logged in each validation, seen where ModelCheckpoint sees it."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.values.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def failing(name: str, at: set[int], **settings: Any) -> Any:
    """A monitor that fails in the evaluations whose numbers are given, counted from 1."""
    cls, arguments, _, method = MONITORS[name]
    monitor, original, evaluations = cls(*arguments, **settings), getattr(cls, method), [0]
    begin = monitor.begin

    def count(*args: Any, **kwargs: Any) -> None:
        evaluations[0] += 1
        begin(*args, **kwargs)

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        if evaluations[0] in at:
            raise ZeroDivisionError("the monitor's own fault.")
        return original(monitor, *args, **kwargs)

    vars(monitor).update({"begin": count, method: sometimes})
    return monitor


def weights(module: pl.LightningModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def fitted(*callbacks: Any, **settings: Any) -> tuple[Any, pl.Trainer]:
    module = zoo.built(zoo.SharedStepWithMetrics)
    trainer = zoo.trainer(callbacks=list(callbacks), max_epochs=EPOCHS, **settings)
    trainer.fit(module, data(), data())
    return module, trainer


@pytest.mark.parametrize("name", MONITORS)
def test_a_failure_in_mid_run_is_said_once_and_its_metric_is_missing_until_it_works_again(name: str) -> None:
    key, history = MONITORS[name][2], History()
    with pytest.warns(UserWarning, match="failed in val") as said:
        module, trainer = fitted(failing(name, {1, 2}), history)
    told = [str(w.message) for w in said if "failed" in str(w.message)]
    assert len(told) == 1
    assert told[0].startswith(f"{name}: failed in val at step 2: ZeroDivisionError: the monitor's own fault.")
    assert "missing (NaN), and training goes on; strict=True raises" in told[0]
    assert [math.isnan(epoch[key]) for epoch in history.values] == [True, True, False]
    assert trainer.global_step == 2 * EPOCHS
    assert torch.equal(weights(module), weights(fitted()[0]))


@pytest.mark.parametrize("name", MONITORS)
def test_strict_raises_in_mid_run(name: str) -> None:
    with pytest.raises(ZeroDivisionError, match="the monitor's own fault"):
        fitted(failing(name, {2}, strict=True))


@pytest.mark.parametrize("name", MONITORS)
def test_outside_of_a_fit_the_first_batch_raises(name: str) -> None:
    if name in ("SaliencySnapshots", "TemperatureScaling"):  # these work when all batches have been heard
        with pytest.warns(UserWarning, match="missing"):
            zoo.trainer(callbacks=[failing(name, {1})]).validate(zoo.built(zoo.ListBatch), data(), verbose=False)
        return
    with pytest.raises(ZeroDivisionError):
        zoo.trainer(callbacks=[failing(name, {1})]).validate(zoo.built(zoo.ListBatch), data(), verbose=False)


@pytest.mark.filterwarnings("ignore:.*failed in val:UserWarning")
def test_a_checkpoint_callback_that_selects_by_the_missing_metric_goes_on(tmp_path: Any) -> None:
    keep = pl.callbacks.ModelCheckpoint(
        tmp_path, "{epoch}", monitor="robust/val/accuracy", mode="max", auto_insert_metric_name=False, save_top_k=-1
    )
    fitted(failing("RobustAccuracy", {1}), keep, enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) == EPOCHS
    assert "robust" not in read_entry(tmp_path / "0.ckpt")
    assert "accuracy" in str(read_entry(tmp_path / "1.ckpt")["robust"])


def test_what_is_wrong_from_the_start_stops_in_the_sanity_check() -> None:
    stranger = TensorDataset(torch.rand(8, 3, 8, 8))
    trainer = zoo.trainer(callbacks=[OODMonitor({"colour": stranger})])
    with pytest.raises(ValueError, match=r"OOD set 'colour': expected inputs .*1, 8, 8.*got .*3, 8, 8"):
        trainer.fit(zoo.built(zoo.ListBatch), data(), data())
    assert trainer.global_step == 0


def test_without_a_sanity_check_the_same_fault_costs_no_run() -> None:
    stranger = TensorDataset(torch.rand(8, 3, 8, 8))
    trainer = zoo.trainer(callbacks=[OODMonitor({"colour": stranger}, scores=["msp"])], num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="OODMonitor: failed in val"):
        trainer.fit(zoo.built(zoo.ListBatch), data(), data())
    assert math.isnan(trainer.callback_metrics["ood/val/colour/msp_auroc"])
    assert trainer.global_step == 2


def test_a_way_to_the_logits_that_only_training_shows_is_waited_for() -> None:
    from lightning_robust import AdversarialTraining

    class Silent(zoo.ListBatch):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).argmax(1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            noisy = batch[0] + 0.01 * torch.rand_like(batch[0])  # cannot stand in for a validation
            return super().training_step((noisy, batch[1]), batch_idx)

    callbacks = [AdversarialTraining(PGD(THREAT, steps=1)), RobustAccuracy(PGD(THREAT, steps=1))]
    trainer = zoo.trainer(callbacks=callbacks)
    trainer.fit(zoo.built(Silent), data(), data())
    assert "robust/val/accuracy" in trainer.callback_metrics


@pytest.mark.parametrize("name", MONITORS)
def test_a_fit_without_validation_is_told_so_once(name: str) -> None:
    cls, arguments, _, _ = MONITORS[name]
    trainer = zoo.trainer(callbacks=[cls(*arguments)])
    with pytest.warns(UserWarning, match="this fit has no") as said:
        trainer.fit(zoo.built(zoo.ListBatch), data())
    assert len([w for w in said if "this fit has no" in str(w.message)]) == 1
    assert trainer.global_step == 2


def test_who_measures_in_test_alone_needs_no_validation() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*this fit has no.*")
        trainer = zoo.trainer(callbacks=[CalibrationMonitor(stages=["test"])])
        trainer.fit(zoo.built(zoo.ListBatch), data())
    assert trainer.global_step == 2
