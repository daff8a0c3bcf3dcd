"""Digits of other people, written on other paper and scanned otherwise: a natural shift that ships inside a package."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

__all__ = ["UCIDigits"]

MISSING = "pip install 'lightning-robust[demo]'"


class UCIDigits(Dataset[tuple[Tensor, int]]):
    """The 1,797 digits that ship with ``scikit-learn``, 8 x 8 pixels in 17 shades, enlarged to the size of MNIST's.

    The same ten classes as :class:`~lightning_robust.demo.Digits`, another source: what a model makes of them is
    accuracy under a natural shift, not clean accuracy. Items are ``(image, label)``: float ``(1, 28, 28)`` in [0, 1].

    Raises:
        ModuleNotFoundError: At first use, if ``scikit-learn`` is missing; ``pip install 'lightning-robust[demo]'``
            brings it.

    Example:
        >>> image, label = UCIDigits()[3]
        >>> len(UCIDigits()), image.shape, label
        (1797, torch.Size([1, 28, 28]), 3)
    """

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """All pictures ``(N, 1, 28, 28)`` and labels ``(N,)``, made when they are first asked for."""
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"the UCI digits need scikit-learn: {MISSING}") from error
        images, labels = load_digits(return_X_y=True)
        small = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        # MNIST's digits fill 20 of 28 pixels; these touch the edges of their 8.
        large = F.interpolate(small, size=20, mode="bilinear", align_corners=False)
        return F.pad(large, (4, 4, 4, 4)), torch.tensor(labels, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.tensors[1])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.tensors
        return images[index], int(labels[index])
