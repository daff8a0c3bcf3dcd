"""A small network and a plain LightningModule, written as users write theirs: nothing of this package is in them."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Classifier", "SmallCNN"]


class SmallCNN(nn.Sequential):
    """Four convolutions (32, 32 with stride 2, 64, 64 with stride 2) with BatchNorm and ReLU, and a linear layer.

    Args:
        channels: Of the input images.
        classes: Number of logits.
        size: Height and width of the input images, divisible by 4.
        width: Of the first two convolutions; the others have twice as many channels.

    Example:
        >>> SmallCNN()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int = 1, classes: int = 10, size: int = 28, width: int = 32) -> None:
        layers: list[nn.Module] = []
        wide = 2 * width
        for inputs, outputs, stride in ((channels, width, 1), (width, width, 2), (width, wide, 1), (wide, wide, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(wide * (size // 4) ** 2, classes))


class Classifier(LightningModule):
    """An ordinary image classifier: cross-entropy, Adam, one-cycle learning rate.

    Args:
        lr: Highest learning rate of the cycle.
        channels: Of the input images.
        classes: Number of classes.
        size: Height and width of the input images.
        width: Of the net; see :class:`SmallCNN`.
    """

    def __init__(self, lr: float = 4e-3, channels: int = 1, classes: int = 10, size: int = 28, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net: nn.Module = SmallCNN(channels, classes, size, width)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, *_ = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, stage: str) -> None:
        x, y, *_ = batch
        logits = self(x)
        self.log(f"{stage}/loss", F.cross_entropy(logits, y))
        self.log(f"{stage}/accuracy", (logits.argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
