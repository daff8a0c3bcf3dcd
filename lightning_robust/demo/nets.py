"""Small networks and a plain LightningModule, written as users write theirs: nothing of this package is in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MLP", "Classifier", "PlainCNN", "SmallCNN"]

Net = Literal["cnn", "plain-cnn", "gelu-cnn", "mlp"]
"""Which net a :class:`Classifier` has."""


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


class PlainCNN(nn.Sequential):
    """Two convolutions with stride 2, a hidden layer and a linear one, without BatchNorm: quick, and easily misled.

    Args:
        channels: Of the input images.
        classes: Number of logits.
        size: Height and width of the input images, divisible by 4.
        width: Of the first convolution; the second has twice as many channels, the hidden layer four times as many.
        activation: Between the layers; ``nn.GELU`` for a smooth net.

    Example:
        >>> PlainCNN()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        size: int = 28,
        width: int = 16,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        wide, hidden = 2 * width, 4 * width
        super().__init__(
            *(nn.Conv2d(channels, width, 3, stride=2, padding=1), activation()),
            *(nn.Conv2d(width, wide, 3, stride=2, padding=1), activation(), nn.Flatten()),
            *(nn.Linear(wide * (size // 4) ** 2, hidden), activation()),
            nn.Linear(hidden, classes),
        )


class MLP(nn.Sequential):
    """Two hidden layers of 50 and 30 with ReLU: the net that Ross et al. train on Decoy-MNIST.

    Args:
        channels: Of the input images.
        classes: Number of logits.
        size: Height and width of the input images.

    Example:
        >>> MLP()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    References:
        Ross et al., `Right for the Right Reasons <https://arxiv.org/abs/1703.03717>`_, 2017, section 4.
    """

    def __init__(self, channels: int = 1, classes: int = 10, size: int = 28) -> None:
        super().__init__(
            *(nn.Flatten(), nn.Linear(channels * size**2, 50), nn.ReLU()),
            *(nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, classes)),
        )


CNNS: dict[str, Callable[..., nn.Module]] = {
    "cnn": SmallCNN,
    "plain-cnn": PlainCNN,
    "gelu-cnn": partial(PlainCNN, activation=nn.GELU),
}


class Classifier(LightningModule):
    """An ordinary image classifier: cross-entropy, Adam, one-cycle learning rate.

    Args:
        lr: Highest learning rate of the cycle.
        channels: Of the input images.
        classes: Number of classes.
        size: Height and width of the input images.
        width: Of the net; see :class:`SmallCNN`. The MLP has none.
        net: ``"cnn"`` is :class:`SmallCNN`, ``"plain-cnn"`` :class:`PlainCNN`, ``"gelu-cnn"`` the same with GELU,
            ``"mlp"`` :class:`MLP`.

    Raises:
        ValueError: If there is no such net.
    """

    def __init__(
        self,
        lr: float = 4e-3,
        channels: int = 1,
        classes: int = 10,
        size: int = 28,
        width: int = 32,
        net: Net = "cnn",
    ) -> None:
        if net not in get_args(Net):
            raise ValueError(f"Classifier(net=) must be one of {', '.join(map(repr, get_args(Net)))}, got {net!r}.")
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        image = (channels, classes, size)
        self.net: nn.Module = MLP(*image) if net == "mlp" else CNNS[net](*image, width)

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
