"""The same pixels and accuracies come out wherever the normalisation stands, and in whatever units pixels are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PGD, AdversarialTraining, PixelSpace, RobustAccuracy, ThreatModel

MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.25, 0.3)
N = 40


@cache
def images() -> Tensor:
    """Bytes, so that the same pictures can be had in every type."""
    return torch.randint(0, 256, (N, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def column(values: Any) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - column(MEAN)) / column(STD)


def network() -> nn.Sequential:
    """For normalised images; smooth, and without padding, so that its first layer can take the normalisation in."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 10)
    ).eval()  # fmt: skip


@cache
def labels() -> Tensor:
    """What the network says of the clean images, except for each fifth, so that it is right on four of five."""
    with torch.no_grad():
        said = network()(normalised(images() / 255)).argmax(1)
    said[::5] = (said[::5] + 1) % 10
    return said


class Module(pl.LightningModule):
    """Normalised images come in, and go into the network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network().train()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]  # a tensor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class InForward(Module):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(normalised(x))


class InStep(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(normalised(batch[0])), batch[1])


class InTransfer(Module):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [normalised(batch[0]), batch[1]]


class Nowhere(Module):
    """Pixels go into a network whose first layer has learnt what normalisation does."""

    def __init__(self) -> None:
        super().__init__()
        conv = self.net[0]
        with torch.no_grad():
            conv.weight.div_(column(STD))
            conv.bias.sub_((conv.weight * column(MEAN)).sum((1, 2, 3)))


class Of255InForward(Module):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(normalised(x / 255))


class BytesInStep(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(normalised(batch[0].float() / 255)), batch[1])


class Data(pl.LightningDataModule):
    """Pictures as a data set holds them."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.data = TensorDataset(x, labels())

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, N)

    def val_dataloader(self) -> Any:
        return DataLoader(self.data, 16)


class Transferring(Data):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [normalised(batch[0]), batch[1]]


@dataclass(frozen=True)
class Case:
    """A way to write the same thing."""

    module: type[Module]
    pixels: PixelSpace
    x: str = "unit"
    make: type[Data] = Data

    @property
    def range(self) -> float:
        return self.pixels.bounds[1]

    def data(self, stage: str) -> Any:
        """A DataModule only where it has something to do: Lightning warns of one beside a module's own transfer."""
        unit = images() / 255
        kinds = {
            "unit": unit,
            "normalised": normalised(unit),
            "255": images().float(),
            "normalised 255": (images().float() - column(MEAN) * 255) / (column(STD) * 255),
            "bytes": images(),
        }
        data = self.make(kinds[self.x])
        return getattr(data, f"{stage}_dataloader")() if self.make is Data else data

    def threat(self, norm: Any, eps: float) -> ThreatModel:
        return ThreatModel(norm, eps * self.range, self.pixels)


UNIT, OF_255 = PixelSpace(), PixelSpace(bounds=(0, 255))
NORMALISED = PixelSpace(mean=MEAN, std=STD)
NORMALISED_255 = PixelSpace((0, 255), tuple(255 * m for m in MEAN), tuple(255 * s for s in STD))
CASES = {
    "in the model's forward": Case(InForward, UNIT),
    "in the data set": Case(Module, NORMALISED, "normalised"),
    "in the DataModule's transfer": Case(Module, NORMALISED, make=Transferring),
    "in the module's transfer": Case(InTransfer, NORMALISED),
    "in the step": Case(InStep, UNIT),
    "nowhere": Case(Nowhere, UNIT),
    "0..255, in the model's forward": Case(Of255InForward, OF_255, "255"),
    "0..255, in the data set": Case(Module, NORMALISED_255, "normalised 255"),
    "bytes, cast in the step": Case(BytesInStep, OF_255, "bytes"),
}
FIRST = next(iter(CASES))
OTHERS = [name for name in CASES if name != FIRST]

EPS = {"linf": 0.03, "l2": 0.4}
MEASURED = {"linf": 0.008, "l2": 0.08}  # some samples stay right
ATTACKS = {
    "PGD linf": ("madry", lambda case: PGD(case.threat("linf", EPS["linf"]), steps=3)),
    "PGD l2": ("madry", lambda case: PGD(case.threat("l2", EPS["l2"]), steps=3)),
    "N-FGSM": ("n-fgsm", lambda case: case.threat("linf", EPS["linf"])),
    "TRADES": ("trades", lambda case: PGD(case.threat("linf", EPS["linf"]), steps=3)),
}


@cache
def perturbed(name: str, attack: str) -> Tensor:
    """What training on the first batch was fed or compared with, as pixels in [0, 1]."""
    case, seen = CASES[name], []

    class Keeping(AdversarialTraining):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(case.pixels.to_pixels(self._perturbed()) / case.range)

    method, adversary = ATTACKS[attack]
    trainer = zoo.trainer(callbacks=[Keeping(adversary(case), method)], limit_val_batches=0)
    trainer.fit(case.module(), case.data("train"))
    (x,) = seen
    return x


@cache
def accuracies(name: str, norm: str) -> tuple[float, float]:
    case = CASES[name]
    attack = PGD(case.threat(norm, MEASURED[norm]), steps=5)
    trainer = zoo.trainer(callbacks=[RobustAccuracy({"pgd": attack})])
    trainer.validate(case.module(), case.data("val"), verbose=False)
    return tuple(float(trainer.callback_metrics[f"robust/val/{key}"]) for key in ("clean_accuracy", "accuracy"))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", OTHERS)
def test_training_meets_the_same_pixels_wherever_the_normalisation_stands(name: str, attack: str) -> None:
    torch.testing.assert_close(perturbed(name, attack), perturbed(FIRST, attack), rtol=0, atol=1e-6)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", CASES)
def test_the_radius_is_in_pixels_whatever_the_network_sees(name: str, attack: str) -> None:
    moved = (perturbed(name, attack) - images() / 255).flatten(1)
    if attack == "PGD l2":
        assert moved.norm(dim=1).max() <= EPS["l2"] + 1e-5
        assert moved.norm(dim=1).min() > 0.9 * EPS["l2"]
    else:
        reach = EPS["linf"] * (3 if attack == "N-FGSM" else 1)  # noise of 2 eps, then a step of eps
        assert moved.abs().max() == pytest.approx(reach, rel=0.02)
        assert moved.abs().max() <= reach + 1e-6


@pytest.mark.parametrize("norm", MEASURED)
@pytest.mark.parametrize("name", OTHERS)
def test_robust_accuracy_is_the_same_wherever_the_normalisation_stands(name: str, norm: str) -> None:
    clean, robust = accuracies(FIRST, norm)
    assert clean == pytest.approx(0.8)
    assert 0.1 < robust < 0.7
    assert accuracies(name, norm) == (clean, robust)
