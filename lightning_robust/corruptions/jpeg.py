"""What JPEG leaves of a picture, without a codec: the transform, the quantisation, and the way back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lightning_robust.corruptions.tables import Parameters

__all__ = ["jpeg"]

BLOCK = 8
# ITU-T T.81, tables K.1 and K.2: by how much each frequency is divided at quality 50.
_LUMINANCE = (
    *(16, 11, 10, 16, 24, 40, 51, 61),
    *(12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77),
    *(24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101),
    *(72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    *(17, 18, 24, 47, 99, 99, 99, 99),
    *(18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, 99, 99, 99, 99, 99, 99),
    *(99,) * 32,
)


def jpeg(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """The losses of JPEG, block by block: no file is written, as only the quantisation loses anything.

    Three channels become luminance and two of colour, which are halved in size (4:2:0) and interpolated afterwards; of
    any other number each counts as luminance.

    Args:
        x: Pictures ``(N, C, H, W)`` in [0, 1], float32 or float64.
        parameters: ``(quality,)`` in [1, 100], as the common codecs count it.
        generators: Not used.

    Returns:
        Pictures of the same kind, at whole multiples of 1/255.

    References:
        ITU-T, `Recommendation T.81 <https://www.w3.org/Graphics/JPEG/itu-t81.pdf>`_, 1992, annexes A and K.
    """
    (quality,) = parameters
    # Picture by picture: a sum in another order could tip a rounding.
    return torch.stack([_one(picture, quality) for picture in x])


def _one(picture: Tensor, quality: float) -> Tensor:
    channels, height, width = picture.shape
    multiple = 2 * BLOCK if channels == 3 else BLOCK
    margins = (0, -width % multiple, 0, -height % multiple)
    levels = F.pad((picture * 255).round()[None], margins, mode="replicate")[0]
    if channels == 3:
        levels = _coloured(levels, quality)
    else:
        levels = _quantised(levels - 128, _table(_LUMINANCE, quality, levels)) + 128
    return levels.round().clamp(0, 255)[:, :height, :width] / 255


def _coloured(levels: Tensor, quality: float) -> Tensor:
    """RGB levels ``(3, H, W)`` through luminance and colour difference and back."""
    red, green, blue = levels
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    colour = torch.stack([(blue - luminance) / 1.772, (red - luminance) / 1.402])
    small = F.avg_pool2d(colour.round(), 2).round()
    light = _quantised(luminance.round()[None] - 128, _table(_LUMINANCE, quality, levels))[0] + 128
    small = _quantised(small, _table(_CHROMINANCE, quality, levels))
    to_blue, to_red = F.interpolate(small[None], scale_factor=2, mode="bilinear")[0].round()
    red, blue = light + 1.402 * to_red, light + 1.772 * to_blue
    green = (light - 0.299 * red - 0.114 * blue) / 0.587
    return torch.stack([red, green, blue])


def _quantised(planes: Tensor, table: Tensor) -> Tensor:
    """Levels around 0, ``(P, H, W)`` with sides divisible by 8, after the frequencies of each block were rounded."""
    count, height, width = planes.shape
    waves = _waves(planes)
    blocks = planes.view(count, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    columns = waves @ blocks.reshape(-1, BLOCK, width)
    frequencies = (columns.view(-1, BLOCK) @ waves.T).view(-1, BLOCK, width // BLOCK, BLOCK)
    table = table.view(BLOCK, 1, BLOCK)
    kept = (frequencies / table).round() * table
    columns = (kept.view(-1, BLOCK) @ waves).view(-1, BLOCK, width)
    return (waves.T @ columns).view(count, height, width).round().clamp(-128, 127)


def _waves(like: Tensor) -> Tensor:
    """The orthonormal cosine transform of eight values, ``(8, 8)``; one row a frequency."""
    steps = torch.arange(BLOCK, dtype=torch.float64)
    waves = (math.pi / BLOCK * (steps + 0.5) * steps[:, None]).cos() * math.sqrt(2 / BLOCK)
    waves[0] /= math.sqrt(2)
    return waves.to(like)


def _table(at_50: tuple[int, ...], quality: float, like: Tensor) -> Tensor:
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return like.new_tensor([min(max((entry * scale + 50) // 100, 1), 255) for entry in at_50])
