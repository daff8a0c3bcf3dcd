"""Wherever the normalisation stands, and in whatever units pixels come: one attack finds the same pixels."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from trainer_runs import Slow

from lightning_robust import NFGSM, PGD, AdversarialTraining, PixelSpace, RobustAccuracy, ThreatModel

MEAN, STD = 0.3, 0.2
N = 32
LEVELS = (zoo.images(N) * 255).round()  # what bytes can hold
NORMALISED = PixelSpace(mean=MEAN, std=STD)
BYTES = PixelSpace(bounds=(0, 255))


def normalised(x: Tensor) -> Tensor:
    return (x - MEAN) / STD


class InData(Slow):
    """The data set has done it."""


class InModel(Slow):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(normalised(x))


class InStep(Slow):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((normalised(batch[0]), batch[1]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((normalised(batch[0]), batch[1]), batch_idx)


class InModulesHook(Slow):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [normalised(batch[0]), batch[1]]


class OfBytes(Slow):
    """0..255, bytes or floats."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(normalised(x.float() / 255))


class Data(pl.LightningDataModule):
    def __init__(self, x: Tensor, in_hook: bool = False) -> None:
        super().__init__()
        self.x, self.in_hook = x, in_hook

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.x, zoo.labels(N)), 16)

    val_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [normalised(batch[0]), batch[1]] if self.in_hook else batch


class OnlyLoaders(Data):
    """Without the hook, so that the module's own is called."""

    on_after_batch_transfer = pl.LightningDataModule.on_after_batch_transfer


PIXELS = LEVELS / 255
CASES: dict[str, tuple[type[Slow], Any, PixelSpace]] = {
    "in the model": (InModel, lambda: Data(PIXELS), PixelSpace()),
    "in the step": (InStep, lambda: Data(PIXELS), PixelSpace()),
    "in the data set": (InData, lambda: Data(normalised(PIXELS)), NORMALISED),
    "in the hook of the data module": (InData, lambda: Data(PIXELS, in_hook=True), NORMALISED),
    "in the hook of the module": (InModulesHook, lambda: OnlyLoaders(PIXELS), NORMALISED),
    "0..255 as floats": (OfBytes, lambda: Data(LEVELS), BYTES),
    "0..255 as bytes": (OfBytes, lambda: Data(LEVELS.to(torch.uint8)), BYTES),
}
ATTACKS: dict[str, Any] = {
    "madry, linf": lambda threat: (PGD(threat("linf", 0.1), steps=3), "madry"),
    "madry, l2": lambda threat: (PGD(threat("l2", 0.8), steps=3), "madry"),
    "n-fgsm": lambda threat: (NFGSM(threat("linf", 0.1)), "n-fgsm"),
    "trades": lambda threat: (PGD(threat("linf", 0.1), steps=2), "trades"),
}


def run(case: str, attack: str) -> tuple[Tensor, dict[str, float]]:
    """The perturbed pixels of the first step in [0, 1], and what RobustAccuracy says of the untrained module."""
    shape, data, pixels = CASES[case]
    unit = 255.0 if pixels is BYTES else 1.0

    def threat(norm: Any, eps: float) -> ThreatModel:
        return ThreatModel(norm, eps * unit, pixels)

    seen: list[Tensor] = []

    class Keeping(AdversarialTraining):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(pixels.to_pixels(self._perturbed()) / unit)

    zoo.trainer(max_steps=1, limit_val_batches=0, callbacks=[Keeping(*ATTACKS[attack](threat))]).fit(
        zoo.built(shape), datamodule=data()
    )
    trainer = zoo.trainer(callbacks=[RobustAccuracy({"attack": PGD(threat("linf", 0.05), steps=3)})])
    trainer.validate(zoo.built(shape), datamodule=data(), verbose=False)
    return seen[0], {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("robust")}


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in `LightningModule`")
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_same_pixels_come_out_of_the_same_attack_in_every_set_up(attack: str) -> None:
    reference, accuracies = run("in the model", attack)
    assert float((reference - PIXELS[:16]).abs().max()) > 0.02
    assert accuracies.keys() == {f"robust/val/{name}" for name in ("clean_accuracy", "accuracy", "accuracy_attack")}
    for case in CASES:
        pixels, measured = run(case, attack)
        # Signs of gradients near zero may differ in the last bit, where a pixel is undecided.
        off = (pixels - reference).abs() > 1e-5
        assert int(off.sum()) <= 1, case
        assert measured == accuracies, case
