"""Shift in one or two gloo processes, as a script: ``python two_processes_shift.py PROCESSES RESULT.json``."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassF1Score

from lightning_robust import CorruptionMonitor

SAMPLES = 101


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.seen = float(loss)  # not logged: Lightning itself would wait for a process that has no batch

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def tensors() -> tuple[Tensor, Tensor]:
    x = torch.rand(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, (x.flatten(1) @ torch.randn(64, 10, generator=torch.Generator().manual_seed(1))).argmax(1)


class Grouped(Dataset[Any]):
    """Groups by name, of which one stands in the last sample alone: only one process has seen its name."""

    def __init__(self) -> None:
        self.x, self.y = tensors()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i], "last" if i == SAMPLES - 1 else f"group {i % 2}"


class FirstProcessOnly(IterableDataset[Any]):
    """A stream that gives the second process nothing."""

    def __iter__(self) -> Any:
        yield from zip(*tensors(), strict=True) if int(pl.utilities.rank_zero_only.rank) == 0 else ()


def job(name: str) -> tuple[list[CorruptionMonitor], Any]:
    plain = DataLoader(TensorDataset(*tensors()), 16)
    x, y = tensors()
    other = TensorDataset(x[:37].sqrt(), y[:37])
    few: dict[str, Any] = {"corruptions": ["fog", "gaussian_noise"], "severities": [5], "scores": ["msp", "energy"]}
    return {
        "whole": lambda: (
            [
                CorruptionMonitor(**few, max_samples=70, metrics={"f1": MulticlassF1Score(10)}),
                # The second process has no sample that counts, and no batch of the loader.
                CorruptionMonitor(**few, max_samples=1, shift_loaders={"set": other}, name="one"),
                CorruptionMonitor(
                    corruptions=[],
                    shift_loaders={"set": other, "loader": DataLoader(other, 5)},
                    max_samples=30,
                    name="other",
                ),
            ],
            plain,
        ),
        "groups": lambda: ([CorruptionMonitor(**few, group_key=2)], DataLoader(Grouped(), 16)),
        # The second process has no batch at all: it does not know which corruptions grey pictures take.
        "stream": lambda: ([CorruptionMonitor(severities=[3], table="small")], DataLoader(FirstProcessOnly(), 16)),
    }[name]()


def main(processes: int, result: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    pl.seed_everything(0, verbose=False)
    module = Module()
    trainer = pl.Trainer(max_epochs=20, **settings)
    trainer.fit(module, DataLoader(TensorDataset(*tensors()), 16))
    two = {**settings, "devices": processes, **({"strategy": "ddp_fork"} if processes > 1 else {})}
    metrics: dict[str, float] = {}
    for name in ("whole", "groups", "stream"):
        callbacks, loader = job(name)
        trainer = pl.Trainer(callbacks=[*callbacks], default_root_dir=result.parent, **two)
        trainer.validate(module, loader, verbose=False)
        metrics |= {f"{name} {key}": float(value) for key, value in trainer.callback_metrics.items()}
    callbacks, loader = job("whole")
    fitting = pl.Trainer(callbacks=[*callbacks], max_epochs=1, default_root_dir=result.parent, **two)
    fitting.fit(module, loader, loader)  # with its sanity check
    result.write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
