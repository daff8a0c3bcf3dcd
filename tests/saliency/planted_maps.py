"""Saliency maps with a shortcut that is known."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.randomness import seeded

SIDE = 14


def planted(seed: int, n: int = 120) -> tuple[Tensor, Tensor]:
    """Maps with squares amid the picture, a quarter with one in the bottom left corner instead; and which."""
    maps = torch.zeros(n, SIDE, SIDE)
    stamped = torch.rand(n, generator=seeded(seed)).argsort() < n // 4
    spots = torch.randint(4, 9, (n, 2), generator=seeded(seed, 1))
    for one, (row, column), there in zip(maps, spots, stamped, strict=True):
        if there:
            one[-2:, :2] = 1
        else:
            one[row : row + 2, column : column + 2] = 1
    return maps + 0.005 * torch.rand(maps.shape, generator=seeded(seed, 2)), stamped
