"""What happens to a picture inside a machine: contrast, colour, resolution, and a rubber sheet.

All take pictures ``(N, C, H, W)`` in [0, 1], float32 or float64, the parameters of one severity (:data:`TABLES`) and
one generator a picture, and return pictures of the same kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lightning_robust.corruptions.filters import blurred, separable
from lightning_robust.corruptions.tables import Parameters
from lightning_robust.randomness import uniform

__all__ = ["contrast", "elastic", "pixelate", "saturate"]


def contrast(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """Each channel nearer to its mean. Parameters: ``(share of the distance that is left,)``."""
    (share,) = parameters
    # Picture by picture: how a sum is split up depends on the size of the batch.
    mean = torch.stack([picture.mean((1, 2), keepdim=True) for picture in x])
    return (mean + share * (x - mean)).clamp(0, 1)


def saturate(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """Colours stronger or weaker, at the same hue and value of HSV; three channels only.

    Parameters: ``(factor, growth)`` of the saturation. Grey has no hue: as usual it counts as red.
    """
    factor, growth = parameters
    value = x.amax(1, keepdim=True)
    spread = value - x.amin(1, keepdim=True)
    saturation = spread / value.clamp_min(torch.finfo(x.dtype).tiny)
    wanted = (factor * saturation + growth).clamp(0, 1)
    red = value * x.new_tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1)
    below = ((value - x) / saturation).where(spread > 0, red)  # how far each channel is below the value, at full colour
    return (value - wanted * below).clamp(0, 1)


def pixelate(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """Fewer, larger pixels, each the mean of those it replaces. Parameters: ``(share of each side that is left,)``."""
    (share,) = parameters
    rows, columns = (_cells(side, max(1, int(side * share))) for side in x.shape[2:])
    return separable(x, rows, columns).clamp(0, 1)


def elastic(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """A rubber sheet: slanted as a whole, then rippled by smooth noise.

    Parameters: ``(strength of the ripple, its smoothness, slant)``, all as shares of the shorter side. The slant moves
    three points around the middle by up to that share; the ripple is uniform noise in [-1, 1] under a Gaussian filter,
    times the strength.
    """
    strength, smoothness, slant = parameters
    n, _, height, width = x.shape
    side = min(height, width)
    moves = slant * side * (2 * uniform(x.new_empty(n, 3, 2, 1, 1), generators) - 1)
    ripple = 2 * uniform(x.new_empty(n, 2, height, width), generators) - 1
    ripple = strength * side * blurred(ripple, smoothness * side, truncate=3)
    row, column = torch.meshgrid(
        torch.arange(height, dtype=x.dtype, device=x.device),
        torch.arange(width, dtype=x.dtype, device=x.device),
        indexing="ij",
    )
    down, right = row + ripple[:, 0] - height // 2, column + ripple[:, 1] - width // 2
    # The one affine map that moves the points (1, 1), (1, -1) and (-1, -1), times a third of the side, as drawn.
    first, second, third = moves.unbind(1)
    arm = 2 * (side // 3)
    shift = (first + third) / 2 + ((second - third) * down[:, None] + (first - second) * right[:, None]) / arm
    at_row, at_column = down + height // 2 + shift[:, 0], right + width // 2 + shift[:, 1]
    grid = torch.stack([2 * at_column / (width - 1) - 1, 2 * at_row / (height - 1) - 1], dim=-1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=True).clamp(0, 1)


def _cells(side: int, cells: int) -> Tensor:
    """The matrix that replaces each pixel of a line by the mean of its cell, ``(side, side)``; double precision."""
    twice = (2 * torch.arange(side) + 1) * cells  # middles of pixels, in cells, times twice the side
    # A pixel right between two cells counts in the first, and shows the second, as in Pillow.
    counted, shown = (twice - 1) // (2 * side), twice // (2 * side)
    same = (shown[:, None] == counted).double()
    return same / same.sum(1, keepdim=True)
