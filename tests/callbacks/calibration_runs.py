"""What the tests of calibration share: a module that says what it is told to, and the measures by plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

SITES = ["north", "south", "east"]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        return z * self.by


class Said(pl.LightningModule):
    """The input is the logits: what is measured is known before anything runs."""

    rate = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.net = Scale()

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)  # type: ignore[no-any-return]  # a tensor

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch), batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), batch_size=1)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class SaidAtSites(Said):
    """Batches are dicts that say where each sample is from."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch["logits"]), batch["label"])


class YesNo(Said):
    def loss(self, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])


class Sites(Dataset[Any]):
    """Samples as dicts, with the name and the number of a group."""

    def __init__(self, z: Tensor, y: Tensor, names: bool = True) -> None:
        self.z, self.y, self.names = z, y, names

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, i: int) -> Any:
        site = self.site(i)
        return {"logits": self.z[i], "label": self.y[i], "site": SITES[site] if self.names else site}

    @staticmethod
    def site(i: int) -> int:
        return 0 if i % 2 else 1 + (i // 2) % 2


def spoken(n: int = 301, classes: int = 4, seed: int = 0, temperature: float = 1.8) -> tuple[Tensor, Tensor]:
    """Logits of a model that is too sure, above all of class 0, and answers drawn at another temperature."""
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(n, classes, generator=generator)
    bent = z / temperature
    bent[:, 0] -= 0.7
    return z, torch.multinomial(bent.softmax(1), 1, generator=generator)[:, 0]


def told(n: int = 301, labels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Yes/no logits and answers ``(n, labels)``."""
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(n, labels, generator=generator)
    return z, (torch.rand(z.shape, generator=generator) < (z / 2 - torch.arange(labels) / 2).sigmoid()).float()


def loader(*columns: Tensor, batch_size: int = 64) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*columns), batch_size)


class Memory(Logger):
    """What loggers are handed, by key."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Not of interest."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.values |= {key: float(value) for key, value in metrics.items()}


def logged(trainer: pl.Trainer, area: str = "calibration/val/") -> dict[str, float]:
    """What Lightning knows of."""
    return {k.removeprefix(area): float(v) for k, v in trainer.callback_metrics.items() if k.startswith(area)}


# -- measures by plain loops -----------------------------------------------------------------------------------------


def softmax(z: Any, temperature: float = 1.0) -> np.ndarray:
    z = np.asarray(z, dtype=np.float64) / temperature
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)  # type: ignore[no-any-return]  # an array


def nll(p: np.ndarray, y: Any) -> float:
    return float(-np.mean([math.log(row[label]) for row, label in zip(p, np.asarray(y), strict=True)]))


def brier(p: np.ndarray, y: Any) -> float:
    return float(((p - np.eye(p.shape[1])[np.asarray(y)]) ** 2).sum(1).mean())


def accuracy(p: np.ndarray, y: Any) -> float:
    return float((p.argmax(1) == np.asarray(y)).mean())


def bins_of(confidence: Any, right: Any, bins: int = 15) -> list[tuple[int, float, float]]:
    """How many, mean confidence and share that is right, of each bin ``((m-1)/M, m/M]`` that holds anything."""
    found = []
    for m in range(bins):
        inside = [i for i, c in enumerate(confidence) if (m / bins < c or (m == 0 and c <= 0)) and c <= (m + 1) / bins]
        if inside:
            means = (float(np.mean([float(column[i]) for i in inside])) for column in (confidence, right))
            found.append((len(inside), *means))
    return found  # type: ignore[return-value]  # three numbers each


def ece_of(confidence: Any, right: Any, bins: int = 15) -> float:
    return sum(n * abs(c - a) for n, c, a in bins_of(confidence, right, bins)) / len(confidence)


def ece(p: np.ndarray, y: Any, bins: int = 15) -> float:
    return ece_of(p.max(1), p.argmax(1) == np.asarray(y), bins)


def worst_class(p: np.ndarray, y: Any) -> tuple[int, float]:
    """The class with the largest calibration error, one against the rest."""
    errors = [ece_of(p[:, k], np.asarray(y) == k) for k in range(p.shape[1])]
    return int(np.argmax(errors)), max(errors)


def best_temperature(z: Any, y: Any) -> float:
    """By scipy, in double precision."""
    bound = math.log(64)
    found = minimize_scalar(
        lambda log_t: nll(softmax(z, math.exp(log_t)), y), bounds=(-bound, bound), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    return math.exp(found.x)
