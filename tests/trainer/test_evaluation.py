"""validate, test and predict, on the trained module or a fresh one, with a checkpoint or without; tuners; two fits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from pytorch_lightning.tuner import Tuner
from trainer_runs import ATTACK, Slow, data, defence, flat, monitors, offline, ours

from lightning_robust import PGD, CalibrationMonitor, RobustAccuracy, TemperatureScaling, ThreatModel

LOADED = "ignore:Be aware that when using `ckpt_path`:UserWarning"
SAME = ("robust/val/", "calibration/val/", "ood/val/", "shift/val/")  # saliency compares with its own past


def saved(folder: Path, weights_only: bool) -> tuple[Slow, pl.Trainer, Path]:
    keep = pl.callbacks.ModelCheckpoint(folder, "x", save_weights_only=weights_only)
    module, callbacks = zoo.built(Slow), [*defence("madry"), *monitors(), keep]
    trainer = zoo.trainer(callbacks=callbacks, max_epochs=2, enable_checkpointing=True)
    trainer.fit(module, data(), data())
    return module, trainer, Path(keep.best_model_path)


def comparable(trainer: pl.Trainer) -> dict[str, float]:
    return {key: value for key, value in ours(trainer).items() if key.startswith(SAME)}


@pytest.mark.filterwarnings(LOADED)
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("fresh", [False, True], ids=["trained module", "fresh module"])
def test_validation_of_a_checkpoint_measures_what_the_run_measured(
    fresh: bool, weights_only: bool, tmp_path: Path
) -> None:
    module, trained, path = saved(tmp_path, weights_only)
    expected = comparable(trained)
    again = zoo.trainer(callbacks=monitors())
    again.validate(
        zoo.built(Slow, seed=7) if fresh else module, data(), ckpt_path=path if fresh else None, verbose=False
    )
    assert len(expected) > 20
    assert comparable(again) == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings(LOADED)
@pytest.mark.filterwarnings("ignore:.*works with a fresh|.*has no temperature:UserWarning")
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_fresh_trainer_tests_and_predicts_with_the_temperature_of_the_checkpoint(
    weights_only: bool, tmp_path: Path
) -> None:
    module, trained, path = saved(tmp_path, weights_only)
    temperature = float(trained.callback_metrics["calibration/val/temperature"])
    fresh, held_out = zoo.built(Slow, seed=7), data(32, seed=5)
    trainer = zoo.trainer(callbacks=[TemperatureScaling(apply=True), CalibrationMonitor(), RobustAccuracy(ATTACK)])
    trainer.test(fresh, held_out, ckpt_path=path, verbose=False)
    # Logged values are means over samples in float32, which cost a last bit.
    assert float(trainer.callback_metrics["calibration/test/temperature"]) == pytest.approx(temperature, rel=2e-7)
    expected = {key.replace("val", "test"): value for key, value in offline(module, held_out).items()}
    assert {key: ours(trainer)[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    predictor = zoo.trainer(callbacks=[TemperatureScaling(apply=True)])
    predicted = predictor.predict(zoo.built(Slow, seed=7), held_out, ckpt_path=path)
    with torch.no_grad():
        raw = module.eval()(next(iter(held_out))[0])
    torch.testing.assert_close(predicted[0], raw / temperature)


@pytest.mark.filterwarnings(LOADED)
def test_the_best_and_the_last_checkpoint_of_a_fit_are_measured_as_their_own_weights(tmp_path: Path) -> None:
    keep = pl.callbacks.ModelCheckpoint(
        tmp_path, monitor="robust/val/accuracy", mode="max", save_last=True, auto_insert_metric_name=False
    )
    module = zoo.built(Slow)
    trainer = zoo.trainer(callbacks=[*defence("madry"), *monitors(), keep], max_epochs=3, enable_checkpointing=True)
    trainer.fit(module, data(), data())
    best = float(keep.best_model_score)
    trainer.validate(module, data(), ckpt_path="best", verbose=False)
    assert ours(trainer)["robust/val/accuracy"] == pytest.approx(best)
    trainer.validate(module, data(), ckpt_path="last", verbose=False)
    assert ours(trainer)["robust/val/accuracy"] == pytest.approx(offline(module, data())["robust/val/accuracy"])


@pytest.mark.parametrize("one_trainer", [True, False])
def test_two_fits_with_the_same_callbacks_train_what_two_fits_with_new_ones_train(one_trainer: bool) -> None:
    def fitted(renew: bool) -> Slow:
        module, callbacks = zoo.built(Slow), [*defence("trades and penalty"), *monitors()]
        trainer = zoo.trainer(callbacks=callbacks)
        for epochs in (1, 2):
            if renew:
                callbacks = [*defence("trades and penalty"), *monitors()]
            if not one_trainer or renew:
                trainer = zoo.trainer(callbacks=callbacks)
            else:
                trainer.fit_loop.max_epochs = epochs
            trainer.fit(module, data(), data())
        return module

    if one_trainer:
        assert torch.isfinite(flat(fitted(False))).all()
        assert not torch.equal(flat(fitted(False)), flat(zoo.built(Slow)))
    else:
        assert torch.equal(flat(fitted(False)), flat(fitted(True)))


def test_several_callbacks_of_one_class_have_keys_of_their_own() -> None:
    strong = RobustAccuracy(PGD(ThreatModel("linf", 0.2), steps=3), name="strong")
    coarse = CalibrationMonitor(bins=1, name="coarse")
    trainer = zoo.trainer(callbacks=[RobustAccuracy(ATTACK), strong, CalibrationMonitor(), coarse])
    trainer.validate(zoo.built(Slow), data(), verbose=False)
    found = ours(trainer)
    assert found["robust.strong/val/accuracy"] <= found["robust/val/accuracy"]
    assert found["calibration.coarse/val/nll"] == found["calibration/val/nll"]
    assert found["calibration.coarse/val/ece"] <= found["calibration/val/ece"]  # as every refinement of bins


class Tuned(Slow):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.01, 4

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return data(batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return data()


@pytest.mark.parametrize("tool", ["lr_find", "scale_batch_size"])
def test_a_tuner_finds_what_it_finds_without_us_and_training_goes_on(tool: str, tmp_path: Path) -> None:
    def tuned(callbacks: list[Any]) -> tuple[Any, Tuned, pl.Trainer]:
        module = zoo.built(Tuned)
        settings = {"default_root_dir": tmp_path, "enable_checkpointing": True, "max_epochs": 1}
        trainer = zoo.trainer(callbacks=callbacks, **settings)
        if tool == "lr_find":
            found = Tuner(trainer).lr_find(module, num_training=12, update_attr=True).suggestion()
        else:
            found = Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=1)
        return found, module, trainer

    alone, _, _ = tuned([])
    found, module, trainer = tuned([*defence("madry"), *monitors()])
    assert found == alone
    assert "training_step" not in vars(module)
    trainer.fit(module)
    assert "robust/val/accuracy" in trainer.callback_metrics


def test_beside_the_tuners_callback_it_says_that_clean_training_is_tuned(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def fitted(callbacks: list[Any]) -> pl.Trainer:
        finder = pl.callbacks.LearningRateFinder(num_training_steps=12)
        trainer = zoo.trainer(callbacks=[finder, *callbacks], default_root_dir=tmp_path, max_epochs=1)
        trainer.fit(zoo.built(Tuned))
        return trainer

    with caplog.at_level(logging.INFO, "lightning_robust"):
        trainer = fitted([*defence("madry"), *monitors()])
    assert any("tuners run without callbacks" in record.message for record in caplog.records)
    alone = fitted([])
    assert trainer.global_step == alone.global_step
    # Older Lightnings end this fit where their finder ended.
    assert ("robust/val/accuracy" in trainer.callback_metrics) == ("val_loss" in alone.callback_metrics)
