"""OOD monitors for one or two gloo processes, as a script: ``python two_processes_ood.py PROCESSES RESULT.json``."""

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
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PGD, OODMonitor, ThreatModel
from lightning_robust.ood import KNN

SAMPLES = 101
SITES = ("north", "south", "east")


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch["image"]), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OneFails(KNN):
    """Fails in the second process alone."""

    name = "one_fails"

    def add(self, *rows: Any, **more: Any) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise ArithmeticError("not here")
        super().add(*rows, **more)


class Logged(pl.loggers.logger.DummyLogger):
    """Remembers what went past the Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.scalars: dict[str, float] = {}

    def log_metrics(self, metrics: Any, step: Any = None, *_: Any, **__: Any) -> None:
        self.scalars |= {key: float(value) for key, value in metrics.items()}


class Writing(pl.Callback):
    """What was logged, written by the first process: forked ones keep their loggers to themselves."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.is_global_zero:
            found = {key: float(value) for key, value in trainer.callback_metrics.items()}
            self.path.write_text(json.dumps(found | trainer.logger.scalars))


def rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    draws = torch.Generator().manual_seed(seed)
    patterns = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    x = (torch.rand(n, 1, 8, 8, generator=draws) + patterns[torch.arange(n) % 10]) / 2
    return [{"image": image, "label": i % 10, "site": SITES[i * 7 % 3]} for i, image in enumerate(x)]


def run(kind: str, callbacks: list[Any], path: Path, settings: dict[str, Any], module: Module, **data: Any) -> Any:
    trainer = pl.Trainer(callbacks=[*callbacks, Writing(path)], logger=Logged(), max_epochs=1, **settings)
    getattr(trainer, kind)(module, **data)
    return json.loads(path.read_text())


def main(processes: int, result: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": processes,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    if processes > 1:
        settings["strategy"] = "ddp_fork"
    module, own, path = Module(), DataLoader(rows(SAMPLES, 1), 16), result.with_suffix(".part")
    images: Tensor = 1 - torch.stack([row["image"] for row in rows(37, 2)])
    foreign = {"set": TensorDataset(images), "few": DataLoader(TensorDataset(images[:3]), 5)}  # one process has none
    known = rows(90)
    detectors: dict[str, Any] = {"detectors": ["mahalanobis", "knn", "vim"], "scores": ["msp"], "fit_samples": 70}
    attack = PGD(ThreatModel("linf", 0.05), steps=2)
    monitors = [
        OODMonitor(foreign, **detectors, fit_data=known_set(known), near=["few"], far=["set"], max_samples=30),
        OODMonitor(foreign, **detectors, fit_data=DataLoader(known, 16), name="loader"),
        # 5 of them in one batch, which one process reads.
        OODMonitor(foreign, scores=["msp"], detectors=["knn"], fit_data=DataLoader(known[:5], 5), name="small"),
        OODMonitor(foreign, group_key="site", scores=["energy", "gen"], attacked=attack, name="groups"),
        OODMonitor(foreign, streaming=True, **detectors, fit_data=DataLoader(known, 7), attacked=attack, name="counts"),
        OODMonitor(foreign, scores=["msp"], detectors=[OneFails(), "knn"], fit_data=DataLoader(known, 16), name="ill"),
    ]
    found = run("validate", monitors, path, settings, module, dataloaders=own, verbose=False)
    everyones = {**settings, "use_distributed_sampler": False}  # all processes get all samples
    counted = OODMonitor(foreign, streaming=True, scores=["msp"], attacked=attack, max_samples=40, name="all")
    found |= run("validate", [counted], path, everyones, module, dataloaders=own, verbose=False)
    training = OODMonitor(foreign, **detectors, name="fit")
    # A rate of nothing: the weights stay as they are, however the samples are dealt.
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    loaders = {"train_dataloaders": DataLoader(known, 16), "val_dataloaders": own}
    found |= run("fit", [training], path, settings, module, **loaders)
    if processes > 1:
        # What one process alone cannot read, all leave out together.
        bad = OODMonitor(foreign, **detectors, fit_data=OneSided(known), name="bad")
        found |= run("fit", [bad], path, {**settings, "num_sanity_val_steps": 0}, module, **loaders)
    result.write_text(json.dumps(found))


class Known(torch.utils.data.Dataset[Any]):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def known_set(rows: list[dict[str, Any]]) -> Known:
    return Known(rows)


class OneSided(Known):
    """Breaks in the second process."""

    def __getitem__(self, index: int) -> Any:
        if torch.distributed.get_rank() == 1:
            raise OSError("a broken file")
        return super().__getitem__(index)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
