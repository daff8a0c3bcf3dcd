"""What the shapes of user code share: small pictures, small nets, loaders, and how a shape is declared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PixelSpace

GROUPS = ("attacks", "robustness", "penalties", "calibration", "ood", "shift", "saliency")
CLASSES = 3


@dataclass(frozen=True)
class Shape:
    """What is expected of one shape of user code; a reader can check it against the file by reading.

    Attributes:
        about: What it is, in one sentence.
        inputs: Where in the batch an attack must change something, and nowhere else.
        arguments: What callbacks must be told.
        in_training: What only those that change training must be told, where batches differ between the loaders.
        errors: For a group of callbacks, a pattern of the error that it ends with.
        says: For a group of monitors, a pattern of the warning that nothing is measured.
        gaps: For a group of callbacks, why it does not serve this shape and has no clear error for it.
        warns: Patterns of other warnings of ours, in every fit with callbacks.
        monitors_warn: Patterns of other warnings of monitors.
        noise: Patterns of warnings that Lightning or torch give with or without us.
        pixels: Of the input.
        eps: Of the attack, in pixels.
        threat: The threat model, where a pixel space does not say it.
        samples: In the first validation loader.
        trainer: Settings of the Trainer.
        namespace: The Lightning that the module is written for.
    """

    about: str
    inputs: tuple[tuple[str | int, ...], ...] = ((0,),)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    in_training: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
    says: Mapping[str, str] = field(default_factory=dict)
    gaps: Mapping[str, str] = field(default_factory=dict)
    warns: tuple[str, ...] = ()
    monitors_warn: tuple[str, ...] = ()
    noise: tuple[str, ...] = ()
    pixels: PixelSpace = field(default_factory=PixelSpace)
    eps: float = 0.1
    threat: Any = None
    samples: int = 16
    trainer: Mapping[str, Any] = field(default_factory=dict)
    namespace: str = "pytorch_lightning"

    def __post_init__(self) -> None:
        unknown = (set(self.errors) | set(self.says) | set(self.gaps)) - set(GROUPS)
        assert not unknown, unknown


NO_BOX = PixelSpace(bounds=None)
# What several shapes say alike.
NO_GRADIENT = r"no gradient reaches a floating-point input"
NO_FLOATS = r"no floating-point input to differentiate"
NO_LOSS = r"calls none of the losses that can be read"
ONE_PREDICTION = r"scores are about one prediction a sample"
ONE_CLASS = r"one class a sample can be explained"
NO_PICTURES = r"synthetic sets are made of pictures"
NO_CORRUPTIONS = r"corruptions are made for pictures"


def images(n: int = 8, seed: int = 0, channels: int = 1) -> Tensor:
    """Pictures in [0, 1] with a patch whose place tells the class, so that there is something to learn."""
    x = 0.6 * torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(seed))
    for i, label in enumerate(labels(n)):
        x[i, :, :, 2 * int(label) : 2 * int(label) + 3] += 0.3
    return x


def labels(n: int = 8, classes: int = CLASSES) -> Tensor:
    return torch.arange(n) % classes


def rows(n: int = 8, seed: int = 0, width: int = 6) -> Tensor:
    """Rows of a table, of about zero mean."""
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + labels(n)[:, None]


def conv_net(outputs: int = CLASSES, channels: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(4 * 64, outputs),
    )


def features(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, width), nn.ReLU())


def pairs(n: int = 16) -> DataLoader[Any]:
    """The usual loader: two batches of eight pictures and labels, as default_collate makes them."""
    return DataLoader(TensorDataset(images(n), labels(n)), 8)


def batches(make: Callable[[int], Any], n: int = 2) -> DataLoader[Any]:
    """Ready-made batches, as a collate function of the user's own would make them; ``make`` is given a seed."""
    # Without a collate function lists would come out where tuples went in.
    return DataLoader([make(seed) for seed in range(n)], batch_size=None, collate_fn=_same)


def _same(batch: Any) -> Any:
    return batch
