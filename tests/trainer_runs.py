"""What the tests of the Trainer's settings share: one small module, its data, and every callback there is."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import (
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
    ThreatModel,
)
from lightning_robust.corruptions import corrupt

THREAT = ThreatModel("linf", 0.1)
ATTACK = PGD(THREAT, steps=2, start="zero", keep="last")
METHODS = ("madry", "trades", "n-fgsm", "penalty", "trades and penalty")
SHIFT = ("gaussian_noise", 3)
OURS = ("robust", "calibration", "ood", "shift", "saliency")


class Net(zoo.ListBatch):
    """BatchNorm and lopsided logits; no dropout, so that a step can be written out by hand."""

    rate = 1.0  # plain SGD with it takes away the gradient itself

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 64, 10)
        )
        with torch.no_grad():
            self.net[-1].weight.mul_(3)
            self.net[-1].bias.copy_(torch.linspace(-1, 2, 10))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])  # type: ignore[no-any-return]  # a tensor

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class Slow(Net):
    """The same at a rate at which it learns."""

    rate = 0.05


def data(n: int = 48, seed: int = 0, batch_size: int = 16, **settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n, seed), zoo.labels(n)), batch_size=batch_size, **settings)


def defence(method: str) -> list[Any]:
    """The callbacks that change training, for one of METHODS."""
    penalty = SaliencyRegularization(InputGradientPenalty(), weight=0.05)
    if method == "penalty":
        return [penalty]
    first = method.split()[0]
    adversary: Any = THREAT if first == "n-fgsm" else ATTACK if first == "madry" else PGD(THREAT, steps=2)
    return [AdversarialTraining(adversary, first), *([penalty] if "penalty" in method else [])]


def monitors(samples: int = 1000) -> list[Any]:
    return [
        RobustAccuracy(ATTACK, max_samples=samples),
        CalibrationMonitor(),
        OODMonitor({"other": TensorDataset(zoo.images(20, 9), zoo.labels(20))}),
        CorruptionMonitor(corruptions=[SHIFT[0]], severities=[SHIFT[1]], max_samples=samples),
        TemperatureScaling(),
        SaliencySnapshots(methods=["gradient"], samples=4),
    ]


def weights(module: nn.Module) -> str:
    """A hash of every parameter and buffer."""
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in module.state_dict().values())).hexdigest()


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def ours(trainer: pl.Trainer) -> dict[str, float]:
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(OURS)}


def offline(module: nn.Module, batches: Any) -> dict[str, float]:
    """Clean accuracy, accuracy under ATTACK and NLL of a module in eval mode, by a plain loop."""
    was = module.training
    module.eval()
    right, robust, nll, n = 0, 0, 0.0, 0
    for x, y in batches:
        attacked = x
        for _ in range(ATTACK.steps):
            leaf = attacked.clone().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(F.cross_entropy(module(leaf), y, reduction="sum"), leaf)
            moved = attacked + 2.5 * THREAT.eps / ATTACK.steps * gradient.sign()
            attacked = (x + (moved - x).clamp(-THREAT.eps, THREAT.eps)).clamp(0, 1)
        with torch.no_grad():
            logits, worst = module(x), module(attacked)
        correct = logits.argmax(1) == y
        right += int(correct.sum())
        robust += int((correct & (worst.argmax(1) == y)).sum())
        nll += float(F.cross_entropy(logits.double(), y, reduction="sum"))
        n += len(y)
    module.train(was)
    return {"robust/val/clean_accuracy": right / n, "robust/val/accuracy": robust / n, "calibration/val/nll": nll / n}


def offline_shift(module: nn.Module, batches: Any) -> dict[str, float]:
    """Accuracy of a module in eval mode on corrupted samples, by a plain loop."""
    was = module.training
    module.eval()
    right = n = 0
    for x, y in batches:
        with torch.no_grad():
            made = corrupt(x, *SHIFT, index=range(n, n + len(y)))
            right += int((module(made).argmax(1) == y).sum())
        n += len(y)
    module.train(was)
    return {"shift/val/sampled_accuracy": right / n}


class Epochs(pl.Callback):
    """The last batch of each epoch, the network at the end of each epoch, and what was logged for it."""

    def __init__(self) -> None:
        self.last: Any = None
        self.nets: list[nn.Module] = []
        self.batches: list[Any] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.last = copy.deepcopy(batch)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.nets.append(copy.deepcopy(module.net))
        self.batches.append(self.last)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if self.nets:
            self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    on_train_end = on_train_epoch_start
