"""CIFAR-10 from a folder on disk, and the network and schedule that adversarial training is published with."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_robust.demo.nets import Classifier

__all__ = ["CIFAR10", "PreActClassifier", "PreActResNet18"]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
FOLDER = "cifar-10-batches-py"


class CIFAR10(LightningDataModule):
    """CIFAR-10, images ``(N, 3, 32, 32)`` in [0, 1]: shifted and flipped to train, as they are to evaluate.

    Nothing is downloaded: ``root`` holds the folder ``cifar-10-batches-py`` of the python version of the data set
    (https://www.cs.toronto.edu/~kriz/cifar.html).

    Args:
        root: Where that folder is.
        batch_size: Of training; evaluation uses batches of 250.
        held_out: Training images, the last ones, that select weights and are not trained on.
        workers: Processes that load training images.

    Raises:
        FileNotFoundError: If the folder is not there.

    References:
        Krizhevsky, `Learning Multiple Layers of Features from Tiny Images
        <https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf>`_, 2009.
    """

    def __init__(self, root: str = "data", batch_size: int = 128, held_out: int = 1000, workers: int = 0) -> None:
        super().__init__()
        self.root, self.batch_size, self.held_out, self.workers = root, batch_size, held_out, workers
        self.parts: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        folder = Path(self.root) / FOLDER
        if not folder.is_dir():
            raise FileNotFoundError(
                f"expected CIFAR-10 in {folder}: get cifar-10-python.tar.gz from "
                "https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and give the folder above as vars.root=."
            )
        images, labels = _read([folder / f"data_batch_{i}" for i in range(1, 6)])
        cut = len(images) - self.held_out
        self.parts = {
            "train": TensorDataset(images[:cut], labels[:cut]),
            "val": TensorDataset(images[cut:], labels[cut:]),
            "test": TensorDataset(*_read([folder / "test_batch"])),
        }

    def train_dataloader(self) -> Any:
        shifted = _Shifted(self.parts["train"])
        return DataLoader(shifted, self.batch_size, shuffle=True, drop_last=True, num_workers=self.workers)

    def val_dataloader(self) -> Any:
        return DataLoader(self.parts["val"], 250)

    def test_dataloader(self) -> Any:
        return DataLoader(self.parts["test"], 250)


class _Shifted(Dataset[tuple[Tensor, Tensor]]):
    """Up to four pixels to any side, and mirrored half of the time."""

    def __init__(self, images: TensorDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, label = self.images[i]
        down, right, mirrored = (int(torch.randint(n, ())) for n in (9, 9, 2))
        image = F.pad(image, (4, 4, 4, 4))[:, down : down + 32, right : right + 32]
        return image.flip(2) if mirrored else image, label


def _read(files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    parts = []
    for file in files:
        with file.open("rb") as stream:
            parts.append(pickle.load(stream, encoding="bytes"))  # the data set's own format
    images = torch.cat([torch.as_tensor(part[b"data"]) for part in parts]).view(-1, 3, 32, 32).float() / 255
    return images, torch.cat([torch.as_tensor(part[b"labels"]) for part in parts])


class _Block(nn.Module):
    """Two convolutions, each behind BatchNorm and ReLU, beside a short cut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        beside = x if self.short is None else self.short(active)
        found: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active)))) + beside
        return found


class PreActResNet18(nn.Module):
    """ResNet-18 with pre-activation for 32 x 32 pictures; it normalises pixels in [0, 1] itself.

    Args:
        classes: Number of logits.
        width: Channels of the first stage, doubled three times; 64 as published.

    Example:
        >>> PreActResNet18(width=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    References:
        He et al., `Identity Mappings in Deep Residual Networks <https://arxiv.org/abs/1603.05027>`_, 2016.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(_Block(inputs, width * 2**stage, stride))
                inputs = width * 2**stage
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), *blocks, nn.BatchNorm2d(inputs), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net((x - self.mean) / self.std)
        return logits


class PreActClassifier(Classifier):
    """The network above with SGD: momentum 0.9, weight decay 5e-4, the rate divided by ten at two epochs.

    Args:
        lr: First learning rate.
        drops: Epochs at which it is divided by ten.
        width: Of the network.
    """

    def __init__(self, lr: float = 0.1, drops: Sequence[int] = (100, 150), width: int = 64) -> None:
        super().__init__(lr, channels=3, size=32, width=1)
        self.save_hyperparameters()
        self.drops = list(drops)
        self.net = PreActResNet18(width=width)  # in the place of the small one

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, self.drops)]
