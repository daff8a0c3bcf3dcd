"""Weather: snow, fog, and too much light.

All take pictures ``(N, C, H, W)`` in [0, 1], float32 or float64, the parameters of one severity (:data:`TABLES`) and
one generator a picture, and return pictures of the same kind.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator, Tensor

from lightning_robust.corruptions.filters import smeared, zoomed
from lightning_robust.corruptions.tables import Parameters
from lightning_robust.randomness import normal, uniform

__all__ = ["brightness", "fog", "plasma", "snow"]


def snow(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """Falling flakes over a whitened picture.

    Parameters: ``(mean, sigma, zoom, threshold, radius, sigma of the fall, weight of the picture)``. Flakes are normal
    noise above a threshold, enlarged, then dragged along a direction within 45 degrees of the vertical.
    """
    mean, sigma, zoom, threshold, radius, fall, weight = parameters
    flakes = zoomed(mean + sigma * normal(x[:, :1], generators), zoom)
    flakes = flakes.masked_fill(flakes < threshold, 0.0).clamp(0, 1)
    turn = uniform(x.new_empty(len(x), 1), generators)
    flakes = smeared(flakes, radius, fall, (90 * turn - 135).flatten().tolist())
    whitened = weight * x + (1 - weight) * x.maximum(1.5 * _grey(x) + 0.5)
    return (whitened + flakes + flakes.flip(2, 3)).clamp(0, 1)


def fog(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """Clouds before the picture. Parameters: ``(amount, decay)``; the larger the decay, the smoother the clouds."""
    amount, decay = parameters
    height, width = x.shape[2:]
    side = 1 << (max(height, width, 2) - 1).bit_length()
    clouds = plasma(2 * uniform(x.new_empty(len(x), side, side), generators) - 1, decay)
    brightest = x.amax((1, 2, 3), keepdim=True)
    return ((x + amount * clouds[:, None, :height, :width]) * brightest / (brightest + amount)).clamp(0, 1)


def brightness(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """More light at the same hue and saturation: the value of HSV, which is the largest channel, grows.

    Parameters: ``(growth,)``.
    """
    (growth,) = parameters
    value = x.amax(1, keepdim=True)
    brighter = (value + growth).clamp(max=1)
    # Scaling all channels alike keeps hue and saturation; black has neither, and becomes grey.
    return (x * (brighter / value)).where(value > 0, brighter).clamp(0, 1)


def plasma(noise: Tensor, decay: float) -> Tensor:
    """Clouds by midpoint displacement (diamond-square) on a torus, ``(N, S, S)`` with lowest value 0 and highest 1.

    Args:
        noise: What displaces each point, in [-1, 1]; S is a power of two.
        decay: The displacement falls by ``decay ** 2`` whenever the distance between points is halved.

    References:
        Fournier, Fussell and Carpenter, `Computer Rendering of Stochastic Models
        <https://doi.org/10.1145/358523.358553>`_, 1982.
    """
    heights = noise.new_zeros(noise.shape)
    step, strength = noise.shape[-1], 1.0
    while step > 1:
        half = step // 2
        corners = heights[:, ::step, ::step]
        rows, columns = corners + corners.roll(-1, 1), corners + corners.roll(-1, 2)  # two corners of each edge
        centres = (rows + rows.roll(-1, 2)) / 4 + strength * noise[:, half::step, half::step]
        beside, above = centres + centres.roll(1, 2), centres + centres.roll(1, 1)  # two centres beside each edge
        heights[:, half::step, ::step] = (rows + beside) / 4 + strength * noise[:, half::step, ::step]
        heights[:, ::step, half::step] = (columns + above) / 4 + strength * noise[:, ::step, half::step]
        heights[:, half::step, half::step] = centres
        step, strength = half, strength / decay**2
    low, high = heights.amin((1, 2), keepdim=True), heights.amax((1, 2), keepdim=True)
    return (heights - low) / (high - low)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x[:, :1], x[:, 1:2], x[:, 2:]
    return 0.299 * red + 0.587 * green + 0.114 * blue
