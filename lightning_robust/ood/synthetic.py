"""Out-of-distribution pictures made of in-distribution ones: where there is no other data set at hand.

They are easier to tell than most real foreign data. Their names say ``synthetic``, so that nobody takes a number about
them for one about real data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import uniform

__all__ = ["SYNTHETIC", "mosaic", "noise", "shuffle"]

GRID = 4  # patches a side of a mosaic


def noise(x: Tensor, generators: Sequence[Generator], pixels: PixelSpace) -> Tensor:
    """Uniform noise, each value by itself, over the whole range of pixels.

    Args:
        x: Pictures ``(N, C, H, W)`` in model units, each side at least 4.
        generators: One a picture; the picture depends on its own alone.
        pixels: The pixel space. Without bounds the noise spans the values of the picture it replaces.

    Returns:
        Pictures of the same shape and type, in model units.

    Raises:
        ValueError: If ``x`` holds no pictures, or there is not one generator for each.

    Example:
        >>> from lightning_robust.randomness import seeded
        >>> made = noise(torch.zeros(2, 1, 8, 8), [seeded(0), seeded(1)], PixelSpace())
        >>> made.shape, bool((made >= 0).all() and (made <= 1).all())
        (torch.Size([2, 1, 8, 8]), True)
    """
    _check(x, generators)
    image = pixels.to_pixels(x)
    low: Tensor | float
    high: Tensor | float
    if pixels.bounds is None:
        low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    else:
        low, high = pixels.bounds
    return pixels.to_model(low + (high - low) * uniform(image, generators), x.dtype)


def shuffle(x: Tensor, generators: Sequence[Generator], pixels: PixelSpace) -> Tensor:
    """The pixels of each picture in random places, none in its own; colours stay together.

    Args:
        x: Pictures ``(N, C, H, W)`` in model units, each side at least 4.
        generators: One a picture.
        pixels: The pixel space; moving pixels about changes nothing there.

    Returns:
        Pictures of the same shape and type, in model units.

    Raises:
        ValueError: If ``x`` holds no pictures, or there is not one generator for each.

    Example:
        >>> from lightning_robust.randomness import seeded
        >>> x = torch.arange(16.0).view(1, 1, 4, 4)
        >>> made = shuffle(x, [seeded(0)], PixelSpace())
        >>> torch.equal(made.flatten().sort().values, x.flatten()), bool((made == x).any())
        (True, False)
    """
    _check(x, generators)
    return _gathered(x, _moved(x.shape[2] * x.shape[3], generators))


def mosaic(x: Tensor, generators: Sequence[Generator], pixels: PixelSpace) -> Tensor:
    """The patches of each picture, 4 x 4 of them, in random places, none in its own.

    Where a side is not divisible by 4, some patches are a pixel longer than others. A patch that comes to a longer
    place brings its neighbours' next row or column along, one that comes to a shorter place loses its last.

    Args:
        x: Pictures ``(N, C, H, W)`` in model units, each side at least 4.
        generators: One a picture.
        pixels: The pixel space; moving patches about changes nothing there.

    Returns:
        Pictures of the same shape and type, in model units; every pixel is one of the original.

    Raises:
        ValueError: If ``x`` holds no pictures, or there is not one generator for each.

    Example:
        >>> from lightning_robust.randomness import seeded
        >>> x = torch.arange(16.0).repeat_interleave(3).view(1, 1, 4, 12)  # patches of 1 x 3 pixels
        >>> mosaic(x, [seeded(0)], PixelSpace())[0, 0, 0].int()
        tensor([13, 13, 13, 15, 15, 15, 12, 12, 12,  7,  7,  7], dtype=torch.int32)
    """
    _check(x, generators)
    moved = _moved(GRID * GRID, generators).view(-1, GRID, GRID)
    (rows, top), (columns, left) = _cells(x.shape[2]), _cells(x.shape[3])
    source = moved[:, rows][:, :, columns]  # for each pixel, which patch comes there
    row = top[source // GRID] + (torch.arange(len(rows)) - top[rows])[:, None]
    column = left[source % GRID] + (torch.arange(len(columns)) - left[columns])
    return _gathered(x, (row * x.shape[3] + column).flatten(1))


SYNTHETIC: dict[str, Callable[[Tensor, Sequence[Generator], PixelSpace], Tensor]] = {
    "synthetic_noise": noise,
    "synthetic_shuffle": shuffle,
    "synthetic_mosaic": mosaic,
}
"""The makers by the name under which their sets are reported."""


def _cells(side: int) -> tuple[Tensor, Tensor]:
    """Which of the four stretches of a side each pixel lies in, ``(side,)``, and where they begin, ``(4,)``."""
    begins = torch.arange(GRID) * side // GRID
    # The last stretch is never shorter than another, so that nothing that comes from it runs over the edge.
    return (GRID * torch.arange(side) + GRID - 1) // side, begins


def _moved(n: int, generators: Sequence[Generator]) -> Tensor:
    """For each picture, a random order of ``n`` things in which none keeps its place, ``(N, n)``."""
    if not generators:
        return torch.empty(0, n, dtype=torch.long)
    # Things in a random ring, each taking the next one's place: unlike a plain permutation, never the identity.
    rings = torch.stack([torch.randperm(n, generator=g, device=g.device).cpu() for g in generators])
    return torch.empty_like(rings).scatter(1, rings, rings.roll(1, dims=1))


def _gathered(x: Tensor, places: Tensor) -> Tensor:
    """Each pixel from the given place ``(N, H * W)`` of its picture, the same place in every channel."""
    places = places.to(x.device).unsqueeze(1).expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, places).view_as(x)


def _check(x: Tensor, generators: Sequence[Generator]) -> None:
    if x.ndim != 4 or min(x.shape[2:]) < GRID or not x.is_floating_point():
        raise ValueError(
            f"expected float pictures (N, C, H, W) with sides of at least {GRID}, got {x.dtype} {tuple(x.shape)}; "
            "synthetic out-of-distribution sets are made of pictures only, for other data give a set of your own."
        )
    if len(generators) != len(x):
        raise ValueError(f"expected one generator per picture, got {len(generators)} for {len(x)}.")
