"""Saliency in two gloo processes, as a script: ``two_processes_saliency.py penalty|snapshots|sets RESULT.json``."""

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

from lightning_robust import (
    PGD,
    AdversarialTraining,
    InputGradientPenalty,
    SaliencyRegularization,
    SaliencySnapshots,
    ThreatModel,
)
from lightning_robust.callbacks.random_fill import RandomFill
from lightning_robust.penalties import AttributionPrior, JacobianPenalty, SaliencyConsistency, SaliencyGuided

SAMPLES = 61
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Gathered(pl.Callback):
    """The weights of all processes, brought home in the metrics (attributes stay in the workers)."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        everywhere = trainer.strategy.all_gather(weights)
        gap = (everywhere[0] - everywhere[1]).abs().max() if trainer.world_size > 1 else torch.zeros(())
        pl_module.log("gap", gap, rank_zero_only=False)


def data(n: int = SAMPLES) -> TensorDataset:
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    # Of one norm: the finite step is a share of its mean, which each process takes by itself.
    return TensorDataset(3 * x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1), torch.arange(n) % 10)


def fit(processes: int, callbacks: list[Any], training: Any, validation: Any = None, epochs: int = 1) -> Any:
    pl.seed_everything(0, verbose=False)
    module = Module()
    settings: dict[str, Any] = {"strategy": "ddp_fork"} if processes > 1 else {}
    trainer = pl.Trainer(
        accelerator="cpu", devices=processes, max_epochs=epochs, callbacks=callbacks, **settings, **QUIET
    )
    trainer.fit(module, training, validation)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return torch.cat([p.detach().flatten() for p in module.parameters()]), metrics


def penalty() -> dict[str, Any]:
    """All samples in each step (Lightning shuffles for several processes): two see together what one sees."""
    found = {}
    plain, _ = fit(1, [], DataLoader(data(64), 64), epochs=4)
    for method in ("finite_differences", "double_backward", "madry"):

        def callbacks(method: str = method) -> list[Any]:
            attack = [AdversarialTraining(PGD(ThreatModel("linf", 0.1), steps=2))] if method == "madry" else []
            kind: Any = "finite_differences" if method == "madry" else method
            return [*attack, SaliencyRegularization(InputGradientPenalty(kind), 0.5), Gathered()]

        one, _ = fit(1, callbacks(), DataLoader(data(64), 64), epochs=4)
        two, metrics = fit(2, callbacks(), DataLoader(data(64), 32), epochs=4)
        found[method] = {
            "between processes": metrics["gap"],
            "to one process": float((one - two).abs().max()),
            "to plain": float((two - plain).abs().max()),
        }
    return found | others()


class Steep(JacobianPenalty):
    """Measured in the first step: on these labels, which say nothing, no model learns."""

    starts_flat, auto_share = False, 1.0


def others() -> dict[str, Any]:
    """The other penalties beside an attack; with as many projections as outputs chance has no part in the Jacobian."""
    found = {}
    plain, _ = fit(1, [], DataLoader(data(64), 64), epochs=4)
    exact: Any = Steep(10, "double_backward")
    for name, kinds in {
        "jacobian": [exact],
        "all": [SaliencyGuided(), AttributionPrior(), SaliencyConsistency()],
    }.items():

        def callbacks(name: str = name, kinds: list[Any] = kinds) -> list[Any]:
            attack = [AdversarialTraining(PGD(ThreatModel("linf", 0.1), steps=2))] if name == "all" else []
            fill = [RandomFill(2)] if name == "all" else []
            weights: list[Any] = ["auto"] if name == "jacobian" else [1.0, "auto", 1.0]
            penalties = [SaliencyRegularization(k, w, warmup_epochs=40) for k, w in zip(kinds, weights, strict=True)]
            return [*attack, *fill, *penalties, Gathered()]

        masked = TensorDataset(*data(64).tensors, (torch.arange(64) % 8 < 3).float().expand(64, 1, 8, 64)[..., :8])
        one, alone = fit(1, callbacks(), DataLoader(masked, 64), epochs=4)
        two, metrics = fit(2, callbacks(), DataLoader(masked, 32), epochs=4)
        found[name] = {
            "between processes": metrics["gap"],
            "to one process": float((one - two).abs().max()),
            "to plain": float((two - plain).abs().max()),
            # Of one process the mean over both is its own, if both have the same.
            "weights": max(abs(v - alone[k]) / alone[k] for k, v in metrics.items() if k.endswith("jacobian_weight"))
            if name == "jacobian"
            else 0.0,
        }
    return found


def snapshots() -> dict[str, Any]:
    """The same weights explained by one process and by two, on an uneven number of samples."""
    found = {}
    for processes in (1, 2):
        callback = SaliencySnapshots(["gradient", "gradcam"], samples=6)

        class Keeping(pl.Callback):
            """Fails the run if processes explain other samples; what they are goes home in the metrics."""

            def on_train_epoch_end(self, trainer: Any, pl_module: Any, callback: Any = callback) -> None:
                numbers = callback.sets.first("val").probes.index.double()
                for row in trainer.strategy.all_gather(numbers).view(-1, len(numbers)):
                    assert torch.equal(row, numbers)
                for place, number in enumerate(numbers.float()):
                    pl_module.log(f"saliency_probe_{place}", number, sync_dist=True)

        training = DataLoader(data(64), 64 // processes)
        _, metrics = fit(processes, [callback, Keeping()], training, DataLoader(data(), 8), epochs=3)
        found[str(processes)] = {key: value for key, value in metrics.items() if key.startswith("saliency")}
    return found


def sets() -> dict[str, Any]:
    """All kinds of probe sets, and all that is measured of one, chosen and measured by one process and by two.

    In two runs: what a forked process says goes through a pipe of 64 KB, which holds some 150 metrics.
    """
    extra = {"other": TensorDataset(torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(4)))}
    attack = PGD(ThreatModel("linf", 0.1), steps=2)
    probes = ["stratified", "hardest", "confident_wrong"]
    settings: list[dict[str, Any]] = [
        {"methods": ["gradient"], "probes": probes, "extra": extra, "attack": attack},
        {"methods": ["gradient", "integrated_gradients"], "ensemble": True, "cascade": True, "quality": True},
    ]
    found: dict[str, Any] = {str(processes): {"indices": {}, "metrics": {}} for processes in (1, 2)}
    for number, given in enumerate(settings):
        for processes in (1, 2):
            callback = SaliencySnapshots(samples=5, budget=1e-9, **given)

            class Keeping(pl.Callback):
                def on_train_epoch_end(self, trainer: Any, pl_module: Any, callback: Any = callback) -> None:
                    for name, watched in callback.sets.of("val").items():
                        for place, index in enumerate(watched.probes.index.tolist()):
                            pl_module.log(f"index_{name}_{place}", float(index), sync_dist=True)

            training = DataLoader(data(64), 64 // processes)
            _, metrics = fit(processes, [callback, Keeping()], training, DataLoader(data(), 8), epochs=2)
            for key, value in metrics.items():
                if key != "val_loss":
                    found[str(processes)]["indices" if key.startswith("index") else "metrics"][f"{key} {number}"] = (
                        value
                    )
    return found


def main(what: str, result: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result.write_text(json.dumps({"penalty": penalty, "snapshots": snapshots, "sets": sets}[what]()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
