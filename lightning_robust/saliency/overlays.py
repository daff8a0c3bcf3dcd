"""Maps laid over their inputs: where a person looks first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_robust.pictures import BAD, GOOD, captioned, diverging, enlarged, sequential, table_of, to_rgb, wrapped
from lightning_robust.saliency.filmstrip import brightest, shares, shrunk

__all__ = ["overlaid", "overlays"]

COLUMNS = 4


def overlays(
    images: Tensor, maps: Tensor, captions: Sequence[str], right: Sequence[bool], bounds: tuple[float, float]
) -> Tensor:
    """Inputs in grey, with colour where the map is: the more attention, the less of the input shines through.

    Args:
        images: Pixels ``(N, C, H, W)``.
        maps: Maps ``(N, H, W)``.
        captions: A line for each.
        right: Whether each is predicted right; decides the colour of its line.
        bounds: The pixel range.

    Returns:
        The picture ``(3, H', W')`` in [0, 1], four in a row.

    Example:
        >>> overlays(torch.rand(5, 1, 28, 28), torch.rand(5, 28, 28), ["3"] * 5, [True] * 5, (0.0, 1.0)).shape
        torch.Size([3, ..., ...])
    """
    amounts = shares(shrunk(maps[:, None])[:, 0])
    mixed = overlaid(to_rgb(shrunk(images), *bounds), (amounts / brightest(amounts)).clamp(-1, 1))
    width = mixed.shape[-1]
    lines = [wrapped(caption, width) for caption in captions]
    most = max(line.count("\n") for line in lines)
    tiles = [
        captioned(tile, line + "\n" * (most - line.count("\n")), GOOD if good else BAD)
        for tile, line, good in zip(mixed, lines, right, strict=True)
    ]
    blank = torch.ones_like(tiles[0])
    columns = min(COLUMNS, len(tiles))
    tiles += [blank] * (math.ceil(len(tiles) / columns) * columns - len(tiles))
    return table_of([tiles[i : i + columns] for i in range(0, len(tiles), columns)])


def overlaid(images: Tensor, amounts: Tensor) -> Tensor:
    """Pictures in grey under colours: the larger an amount, the less of the picture shines through.

    Args:
        images: Pictures ``(N, 3, H', W')`` in [0, 1], as large as the amounts when these are enlarged to be seen.
        amounts: From 0 to 1, ``(N, H, W)``, shown from dark to bright; or from -1, then blue over white to red.

    Returns:
        Pictures like ``images``.

    Example:
        >>> amounts = torch.tensor([[[0.0, 1.0]]]).expand(1, 112, 2)  # a grey half, and one of the brightest colour
        >>> overlaid(torch.full((1, 3, 112, 2), 0.5), amounts)[0, :, 0]
        tensor([[0.5000, 1.0000],
                [0.5000, 0.9647],
                [0.5000, 0.6980]])
    """
    colours = (diverging if bool((amounts < 0).any()) else sequential)(amounts)
    grey, cover = images.mean(1, keepdim=True), enlarged(amounts.abs()[:, None].float())
    return grey * (1 - cover) + enlarged(colours) * cover
