"""What the user brings to every run in this folder: a module, data, and how they see what happened."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from lightning_robust import (
    PGD,
    CalibrationMonitor,
    CorruptionMonitor,
    OODMonitor,
    RobustAccuracy,
    SaliencySnapshots,
    TemperatureScaling,
    ThreatModel,
)

THREAT = ThreatModel("linf", 0.1)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def labelled(n: int, seed: int = 0) -> TensorDataset:
    """Something to learn: the class is the brightest quarter of the picture."""
    x = images(n, seed)
    y = F.avg_pool2d(x, 4).flatten(1).argmax(1)
    return TensorDataset(
        0.5 * x + 0.5 * x * F.one_hot(y, 4).view(-1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3), y
    )


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Draws in the worker processes, whose seeds come from the global stream."""

    def __init__(self, n: int) -> None:
        self.data = labelled(n)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[i]
        return (0.9 * x + 0.1 * torch.rand(x.shape)), y


class Module(pl.LightningModule):
    """BatchNorm, dropout, in-step mixup with numpy, and a schedule that reacts to the validation loss."""

    def __init__(self, dropout: float = 0.0, mixup: bool = False, norm: bool = True) -> None:
        super().__init__()
        self.mixup = mixup
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(4 * 64, 4),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.mixup:
            share = float(np.random.beta(0.5, 0.5))
            x = share * x + (1 - share) * x[torch.from_numpy(np.random.permutation(len(x)))]
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]), sync_dist=True)
        self.log("val_accuracy", (logits.argmax(1) == batch[1]).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.05)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def monitors() -> list[pl.Callback]:
    # Few scores: of some 220 metrics and more Lightning's forked processes wait for ever at the end of a fit, since all
    # that the first one logged goes through a pipe that nobody reads before it has ended.
    return [
        RobustAccuracy(PGD(THREAT, steps=2), max_samples=30),
        CalibrationMonitor(classwise=True),
        OODMonitor(
            max_samples=20,
            scores=["msp"],
            detectors=["mahalanobis", "knn", "vim"],
            fit_data=labelled(30, 2),
            attacked=PGD(THREAT, steps=2),
        ),
        OODMonitor({"given": TensorDataset(1 - images(21))}, scores=["energy"], name="given", streaming=True),
        CorruptionMonitor(max_samples=20, per_epoch=2, shift_loaders={"other": labelled(9, 3)}),
        SaliencySnapshots(["gradient", "gradcam"], samples=4),
        TemperatureScaling(methods=["vector"], prediction_sets=0.1, classwise=True),
    ]


AREAS = ("robust", "calibration", "ood", "shift", "saliency")


def ours(key: str) -> bool:
    """Whether a log key is one of the plugin's."""
    return key.split("/")[0].split(".")[0] in AREAS


def sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Diary(pl.Callback):
    """One JSON line an epoch and process: weights, optimizer state, and everything that was logged, to the last bit."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.losses: list[str] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]).hex())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        state = trainer.optimizers[0].state_dict()["state"]
        momentum = {f"{i}": entry["momentum_buffer"] for i, entry in state.items()}
        line = {
            "epoch": trainer.current_epoch,
            "weights": sha256(pl_module.state_dict()),
            "optimizer": sha256(momentum),
            "rate": trainer.optimizers[0].param_groups[0]["lr"],
            "losses": self.losses,
            "logged": {key: float(value).hex() for key, value in sorted(trainer.callback_metrics.items())},
        }
        self.losses = []
        with self.file(trainer.global_rank).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def file(self, rank: int) -> Path:
        return self.folder / f"{self.name}.{rank}.jsonl"

    def read(self, rank: int = 0) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file(rank).read_text().splitlines()]
