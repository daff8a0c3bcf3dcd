"""Settings of the Trainer's loops, with every callback attached."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from pytorch_lightning.utilities import CombinedLoader
from trainer_runs import Slow, data, defence, flat, monitors, offline, offline_shift, ours

NO_VALIDATION = "ignore:.*this fit has n.*:UserWarning"

# What is set, optimizer steps, validations that measure.
SETTINGS: dict[str, tuple[dict[str, Any], int, int]] = {
    "plain": ({"max_epochs": 2}, 6, 2),
    "fast_dev_run": ({"fast_dev_run": True}, 1, 1),
    "fast_dev_run=2": ({"fast_dev_run": 2}, 2, 1),
    "overfit_batches": ({"overfit_batches": 2, "max_epochs": 2}, 4, 2),
    "limit_train_batches": ({"limit_train_batches": 2, "max_epochs": 2}, 4, 2),
    "limit_train_batches, a share": ({"limit_train_batches": 0.34}, 1, 1),
    "limit_val_batches": ({"limit_val_batches": 1, "max_epochs": 2}, 6, 2),
    "limit_val_batches, a share": ({"limit_val_batches": 0.67}, 3, 1),
    "limit_train_batches=0": ({"limit_train_batches": 0}, 0, 0),
    "limit_val_batches=0": ({"limit_val_batches": 0}, 3, 0),
    "val_check_interval=0.34": ({"val_check_interval": 0.34}, 3, 3),
    "val_check_interval=2": ({"val_check_interval": 2, "max_epochs": 2, "check_val_every_n_epoch": None}, 6, 3),
    "check_val_every_n_epoch": ({"check_val_every_n_epoch": 2, "max_epochs": 4}, 12, 2),
    "no sanity check": ({"num_sanity_val_steps": 0}, 3, 1),
    "sanity check of everything": ({"num_sanity_val_steps": -1}, 3, 1),
    "max_steps": ({"max_steps": 4, "max_epochs": -1}, 4, 1),
    "reload_dataloaders": ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, 6, 2),
    "deterministic": ({"deterministic": True}, 3, 1),
    "detect_anomaly": ({"detect_anomaly": True}, 3, 1),
    "inference_mode=False": ({"inference_mode": False}, 3, 1),
    "profiler": ({"profiler": "simple"}, 3, 1),
    "progress bar": ({"enable_progress_bar": True}, 3, 1),
    "accumulation": ({"accumulate_grad_batches": 3, "max_epochs": 2}, 2, 2),
    "clipping": ({"gradient_clip_val": 0.1}, 3, 1),
}


class Counting(pl.Callback):
    """How often all callbacks had measured by the end of a validation, and the weights that were measured."""

    def __init__(self) -> None:
        self.measured: list[dict[str, float]] = []
        self.expected: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.measured.append(ours(trainer))
            batches = list(data())[: trainer.num_val_batches[0]]
            self.expected.append({**offline(pl_module, batches), **offline_shift(pl_module, batches)})


class WithLoaders(Slow):
    def train_dataloader(self) -> Any:
        return data()

    def val_dataloader(self) -> Any:
        return data()


def fitted(callbacks: list[Any], settings: dict[str, Any]) -> tuple[Slow, pl.Trainer]:
    module = zoo.built(WithLoaders)
    trainer = zoo.trainer(callbacks=callbacks, **settings)
    trainer.fit(module)
    return module, trainer


@pytest.mark.filterwarnings(NO_VALIDATION)
@pytest.mark.filterwarnings("ignore:.*overfit_batches.*")
@pytest.mark.parametrize("name", SETTINGS)
def test_training_takes_its_steps_and_monitors_measure_the_weights_of_each_validation(name: str) -> None:
    settings, steps, validations = SETTINGS[name]
    counting = Counting()
    module, trainer = fitted([*defence("madry"), *defence("penalty"), *monitors(), counting], settings)
    assert trainer.global_step == steps
    assert len(counting.measured) == validations
    for measured, expected in zip(counting.measured, counting.expected, strict=True):
        assert {key: measured[key] for key in expected} == pytest.approx(expected, rel=1e-5)
        assert {"calibration/val/temperature", "saliency/val/flips", "ood/val/other/energy_auroc"} <= measured.keys()
    alone, _ = fitted([*defence("madry"), *defence("penalty")], settings)
    assert torch.equal(flat(module), flat(alone))
    assert "training_step" not in vars(module)


def test_barebones_trains_the_same_weights() -> None:
    callbacks = [*defence("madry"), *defence("penalty")]
    bare = pl.Trainer(accelerator="cpu", barebones=True, max_epochs=1, callbacks=callbacks)
    module = zoo.built(Slow)
    with pytest.warns(UserWarning, match="barebones"):
        bare.fit(module, data())
    assert torch.equal(flat(module), flat(fitted(callbacks, {"limit_val_batches": 0})[0]))


class TwoHeads(Slow):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("kind", ["list", "dict", "combined"])
def test_of_several_loaders_the_first_keeps_its_keys_and_the_others_get_names(kind: str) -> None:
    loaders = {"near": data(32), "far": data(48, seed=3)}
    given: Any = {"list": list(loaders.values()), "dict": loaders, "combined": CombinedLoader(loaders, "sequential")}
    module, trainer = zoo.built(TwoHeads), zoo.trainer(callbacks=monitors())
    trainer.validate(module, given[kind], verbose=False)
    second = "1" if kind == "list" else "far"
    for suffix, loader in (("", loaders["near"]), (f"/{second}", loaders["far"])):
        expected = {key + suffix: value for key, value in offline(module, loader).items()}
        assert {key: ours(trainer)[key] for key in expected} == pytest.approx(expected, rel=1e-5)
