"""Training with FSDP2 or DDP on two gloo processes, or on one: ``sharded.py fsdp|ddp|one CASE JOBS RESULT.json``.

Cases say where the user shards and where the loss is called: ``net`` (the network and its parts are sharded, the loss
stands in ``training_step``), ``root`` (the module itself is sharded and its ``forward`` is called), ``inside`` (the
loss is called in the sharded forward), ``method`` (the whole ``training_step`` is a forward of the sharded module).
"""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from user_code import QUIET, THREAT, images, labelled, monitors

from lightning_robust import (
    NFGSM,
    PGD,
    AdversarialTraining,
    CalibrationMonitor,
    CorruptionMonitor,
    InputGradientPenalty,
    OODMonitor,
    RobustAccuracy,
    SaliencyRegularization,
    SaliencySnapshots,
    TemperatureScaling,
)
from lightning_robust.attach.probe import Probe

SAMPLES = 32


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh())
        self.second = nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.Tanh())
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = self.head(self.second(self.first(x)))
        return logits if y is None else (F.cross_entropy(logits, y), logits)


class Module(pl.LightningModule):
    def __init__(self, case: str, sharded: bool) -> None:
        super().__init__()
        self.case, self.sharded = case, sharded
        self.net = Network()

    def configure_model(self) -> None:
        if not self.sharded or isinstance(next(self.parameters()), DTensor):
            return
        mesh = self.device_mesh["data_parallel"]
        for part in (self.net.first, self.net.second):
            fully_shard(part, mesh=mesh)
        fully_shard(self.net if self.case in ("net", "inside") else self, mesh=mesh)
        if self.case == "method":
            for name in ("training_step", "validation_step"):
                register_fsdp_forward_method(self, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        if self.case == "inside":
            return self.net(*batch)[0]
        return F.cross_entropy(self(batch[0]) if self.case == "root" else self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def job(name: str) -> list[pl.Callback]:
    attack = PGD(THREAT, steps=2, start="zero")
    one_batch = DataLoader(TensorDataset(1 - images(5)), 5)
    return {
        "plain": lambda: [],
        "madry": lambda: [AdversarialTraining(attack)],
        "trades": lambda: [AdversarialTraining(PGD(THREAT, steps=2), "trades")],
        "n-fgsm": lambda: [AdversarialTraining(NFGSM(THREAT, noise=0.0), "n-fgsm")],
        "finite": lambda: [SaliencyRegularization(InputGradientPenalty(), 0.5)],
        "double": lambda: [SaliencyRegularization(InputGradientPenalty("double_backward"), 0.5)],
        "madry+finite": lambda: [AdversarialTraining(attack), SaliencyRegularization(InputGradientPenalty(), 0.5)],
        "calibration": lambda: [CalibrationMonitor()],
        "temperature": lambda: [TemperatureScaling()],
        "robust": lambda: [RobustAccuracy(attack)],
        "restarts": lambda: [RobustAccuracy(PGD(THREAT, steps=2, restarts=2))],
        "ood": lambda: [OODMonitor()],
        "shift": lambda: [CorruptionMonitor(severities=[3], per_epoch=3, shift_loaders={"other": labelled(9, 3)})],
        # The second process has no sample that counts, or no batch.
        "few": lambda: [
            RobustAccuracy(attack, max_samples=1),
            OODMonitor(max_samples=1),
            CorruptionMonitor(corruptions=["fog", "snow"], shift_loaders={"single": labelled(1, 3)}, max_samples=1),
            OODMonitor({"few": one_batch, "single": TensorDataset(1 - images(1))}, name="given"),
        ],
        "after-fit": lambda: [TemperatureScaling(when="after_fit", dataloader=DataLoader(labelled(5), 5))],
        "snapshots": lambda: [SaliencySnapshots(["gradient", "gradcam", "integrated_gradients"], samples=4)],
        "every": lambda: [AdversarialTraining(attack), *monitors()],
    }[name]()


def unsharded(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if not isinstance(p, DTensor)]


class Watch(pl.Callback):
    """Whether all parameters are sharded after each of our readings and whenever the optimizer or Lightning looks."""

    def __init__(self, sharded: bool) -> None:
        self.sharded = sharded
        self.loose: dict[str, list[str]] = {}

    def look(self, when: str, module: nn.Module) -> None:
        if self.sharded and unsharded(module):
            self.loose.setdefault(when, unsharded(module))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.look("optimizer", pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.look("batch end", pl_module)


def full(module: nn.Module) -> dict[str, Tensor]:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in module.named_parameters()}


def fit(kind: str, case: str, name: str) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    module = Module(case, kind == "fsdp")
    strategy: Any = {"one": "auto", "ddp": "ddp"}.get(kind) or ModelParallelStrategy(2, 1)
    processes = 1 if kind == "one" else 2
    watch = Watch(kind == "fsdp")
    trainer = pl.Trainer(devices=processes, strategy=strategy, max_epochs=3, callbacks=[*job(name), watch], **QUIET)
    reading = Probe.reading

    @contextmanager
    def watched(self: Any, step: Any, **settings: Any) -> Any:
        before = unsharded(step.module)
        with reading(self, step, **settings) as result:
            yield result
        if unsharded(step.module) != before:
            watch.look("reading", step.module)

    Probe.reading = watched  # type: ignore[method-assign]
    try:
        data = labelled(SAMPLES)
        trainer.fit(module, DataLoader(data, SAMPLES // processes), DataLoader(data, 8))
    finally:
        Probe.reading = reading  # type: ignore[method-assign]
    return {
        "weights": {n: p.flatten().tolist() for n, p in full(module).items()},
        "loose": watch.loose,
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
    }


def main(kind: str, case: str, names: str, result: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in names.split(","):
        try:
            found[name] = fit(kind, case, name)
        except RuntimeError as error:  # what a user would see
            found[name] = {"error": str(error)}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
