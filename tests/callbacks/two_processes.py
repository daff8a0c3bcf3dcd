"""A run for one or two gloo processes, as a script: ``python two_processes.py PROCESSES RESULT.json``."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import (
    PGD,
    AdversarialTraining,
    CalibrationMonitor,
    OODMonitor,
    RobustAccuracy,
    TemperatureScaling,
    ThreatModel,
)

SAMPLES = 101


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SameWeights(pl.Callback):
    """Fails the run if the processes drift apart, or if their noise is the same."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        adversarial = next(c for c in trainer.callbacks if isinstance(c, AdversarialTraining))
        for tensor, equal in ((adversarial._perturbed(), False), (pl_module.net[1].weight.detach(), True)):
            everywhere = trainer.strategy.all_gather(tensor.contiguous())
            assert torch.equal(everywhere[0], everywhere[1]) is equal


def data() -> TensorDataset:
    x = torch.rand(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, torch.arange(SAMPLES) % 10)


def main(processes: int, result: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    threat = ThreatModel("linf", 0.05)
    pl.seed_everything(0, verbose=False)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": processes, **quiet}
    if processes > 1:
        settings["strategy"] = "ddp_fork"
    module = Module()
    one_process = pl.Trainer(accelerator="cpu", max_epochs=30, **quiet)
    one_process.fit(module, DataLoader(data(), 16))  # something to lose, the same in both cases
    report = RobustAccuracy({"weak": PGD(threat, steps=2), "strong": PGD(threat, steps=5, restarts=2)}, max_samples=90)
    whole = RobustAccuracy(PGD(threat, steps=2), name="whole")
    foreign = TensorDataset(1 - data().tensors[0][:37])
    monitors = [
        CalibrationMonitor(),
        OODMonitor(max_samples=70, seed=1),
        OODMonitor({"set": foreign, "loader": DataLoader(foreign, 5)}, name="given"),
        OODMonitor({"one": TensorDataset(foreign.tensors[0][:1])}, scores=["msp"], name="single"),  # one rank has none
        TemperatureScaling(),
    ]
    few = TemperatureScaling(max_samples=60, name="few")  # a random choice, the same whoever holds which samples
    evaluation = pl.Trainer(callbacks=[report, whole, *monitors, few], **settings)
    evaluation.validate(module, DataLoader(data(), 16), verbose=False)
    metrics = {key: float(value) for key, value in evaluation.callback_metrics.items()}
    testing = pl.Trainer(callbacks=monitors[:3], **settings)  # forked processes keep temperatures to themselves
    testing.test(module, DataLoader(data(), 16), verbose=False)
    metrics |= {key: float(value) for key, value in testing.callback_metrics.items()}
    if processes > 1:
        for method in ("madry", "trades"):
            callbacks = [AdversarialTraining(PGD(threat, steps=2), method), SameWeights(), report]
            training = pl.Trainer(max_epochs=1, callbacks=callbacks, **settings)
            training.fit(module, DataLoader(data(), 16), DataLoader(data(), 16))
            metrics[f"trained_{method}"] = float(training.callback_metrics["robust/val/accuracy"])
    result.write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
