"""What is measured: users' modules, and the same training and attacks written by hand, as tightly as a person would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.demo.cifar import PreActResNet18
from lightning_robust.demo.nets import SmallCNN
from lightning_robust.randomness import seeded

__all__ = [
    "EPS",
    "STEPS",
    "HandDoubleBackward",
    "HandFiniteDifferences",
    "HandMadry",
    "HandNFGSM",
    "HandTrades",
    "HandValidated",
    "Plain",
    "Subject",
]

EPS, STEPS = 8 / 255, 10
STEP_SIZE = 2.5 * EPS / STEPS  # PGD's default


class Plain(pl.LightningModule):
    """An ordinary classifier; ``Hand...`` below are what its author would have to write without this package."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        self.log("val/loss", F.cross_entropy(logits, y))
        self.log("val/accuracy", (logits.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Subject:
    """A net and batches for it.

    Args:
        kind: ``"cnn"``, ``"resnet"`` (ResNet-18 for pictures of 3x32x32) or ``"mlp"`` (64-32-10).
        batch: Samples a batch.
        batches: Number of batches.
        size: Height and width of the CNN's inputs.
        channels: Of the CNN's inputs.
        width: Of the ResNet; 64 as published.
    """

    def __init__(
        self, kind: str, batch: int, batches: int = 1, size: int = 32, channels: int = 3, width: int = 64
    ) -> None:
        torch.manual_seed(0)
        shape = (64,) if kind == "mlp" else (channels, size, size)
        self.kind = kind
        named = f"ResNet-18 of width {width}" if kind == "resnet" else kind.upper()
        self.name = f"{named} {'x'.join(map(str, shape))}, batch {batch}"
        builds: dict[str, Callable[[], nn.Module]] = {
            "cnn": lambda: SmallCNN(channels=channels, size=size),
            "resnet": lambda: PreActResNet18(width=width),
            "mlp": lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        }
        self.build = builds[kind]
        self.x, self.y = torch.rand(batch * batches, *shape), torch.randint(10, (batch * batches,))
        self.loader = DataLoader(TensorDataset(self.x, self.y), batch_size=batch)

    def net(self) -> nn.Module:
        """A new net, always with the same weights."""
        torch.manual_seed(1)
        return self.build()


def trainer(*callbacks: Any, **settings: Any) -> pl.Trainer:
    """A Trainer that does nothing besides training."""
    return pl.Trainer(
        accelerator="cpu", callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **settings,
    )  # fmt: skip


# -- attacks by hand ---------------------------------------------------------------------------------------------------


def uniform_start(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random point of the ball."""
    return (x + (2 * torch.rand(x.shape, generator=generator) - 1) * EPS).clamp(0, 1)


def climb(net: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Plain PGD, the way papers' repositories write it, with gradients of the input alone."""
    adversarial = start
    for _ in range(STEPS):
        adversarial.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(net(adversarial)), adversarial)
        moved = adversarial.detach() + STEP_SIZE * gradient.sign()
        adversarial = (x + (moved - x).clamp(-EPS, EPS)).clamp(0, 1)
    return adversarial


def pgd(net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """PGD on cross-entropy from a random start."""
    return climb(net, x, lambda logits: F.cross_entropy(logits, y, reduction="sum"), uniform_start(x, generator))


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode for a while."""
    net.eval()
    try:
        yield
    finally:
        net.train()


class HandMadry(Plain):
    """PGD adversarial training."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        with evaluating(self.net):
            x = pgd(self.net, x, y, seeded(0, 0, self.global_step, batch_idx))
        return super().training_step((x, y), batch_idx)


class HandNFGSM(Plain):
    """N-FGSM."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        generator = seeded(0, 0, self.global_step, batch_idx)
        noisy = (x + (2 * torch.rand(x.shape, generator=generator) - 1) * 2 * EPS).clamp(0, 1).requires_grad_()
        with evaluating(self.net):
            (gradient,) = torch.autograd.grad(F.cross_entropy(self.net(noisy), y, reduction="sum"), noisy)
        return super().training_step(((noisy.detach() + EPS * gradient.sign()).clamp(0, 1), y), batch_idx)


class HandTrades(Plain):
    """TRADES with beta 6; the clean prediction is computed once a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        generator = seeded(0, 0, self.global_step, batch_idx)
        with evaluating(self.net):
            with torch.no_grad():
                clean = self.net(x).log_softmax(1)

            def divergence(logits: Tensor) -> Tensor:
                return F.kl_div(logits.log_softmax(1), clean, reduction="sum", log_target=True)

            start = (x + 0.001 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
            adversarial = climb(self.net, x, divergence, start)
        logits = self.net(x)
        log_p, log_q = logits.log_softmax(1), self.net(adversarial).log_softmax(1)
        kl = 6.0 * F.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(x)
        loss = F.cross_entropy(logits, y)
        self.log_dict({"train/loss": loss, "train/kl": kl}, on_step=False, on_epoch=True)
        return loss + kl


class HandValidated(Plain):
    """Robust accuracy in the author's own validation_step, where the clean forward serves twice."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        with torch.inference_mode(False), torch.enable_grad():
            x, y = x.clone(), y.clone()
            adversarial = pgd(self.net, x, y, seeded(0))
        logits = self.net(x)
        clean, robust = logits.argmax(1) == y, self.net(adversarial).argmax(1) == y
        self.log("val/loss", F.cross_entropy(logits, y))
        self.log("val/accuracy", clean.float().mean())
        self.log("val/robust_accuracy", (clean & robust).float().mean())


class HandFiniteDifferences(Plain):
    """The penalty on the input gradient along its own direction, as in Finlay and Oberman's paper."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = x.clone().requires_grad_()
        logits = self.net(x)
        loss, losses = F.cross_entropy(logits, y), F.cross_entropy(logits, y, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
        direction = F.normalize(gradient.flatten(1)).view_as(x)
        h = 0.13 * x.detach().flatten(1).norm(dim=1).mean()
        there = F.cross_entropy(self.net(x.detach() + h * direction), y, reduction="none")
        penalty = 0.1 * ((there - losses) / h).square().mean()
        self.log_dict({"train/loss": loss, "train/penalty": penalty}, on_step=False, on_epoch=True)
        return loss + penalty


class HandDoubleBackward(Plain):
    """The penalty on the input gradient itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = x.clone().requires_grad_()
        logits = self.net(x)
        loss, losses = F.cross_entropy(logits, y), F.cross_entropy(logits, y, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        penalty = 0.1 * gradient.flatten(1).square().sum(1).mean()
        self.log_dict({"train/loss": loss, "train/penalty": penalty}, on_step=False, on_epoch=True)
        return loss + penalty
