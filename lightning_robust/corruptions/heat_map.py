"""A heat map for TensorBoard: what is left under each corruption, at each severity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_robust.pictures import sequential

__all__ = ["shift_heat_map"]

CELL_WIDTH, CELL_HEIGHT, GAP = 46, 22, 2
LEFT, TOP, RIGHT, BOTTOM = 128, 66, 8, 8
MEAN_GAP = 10  # sets the column of means apart
TEXT, TITLE = 12, 14
INK, PALE, HATCH, NONE = (20, 20, 20), (250, 250, 250), (190, 190, 190), (232, 232, 232)

Box = tuple[int, int, int, int]


def shift_heat_map(
    values: Mapping[tuple[str, int], float],
    title: str,
    *,
    clean: float | None = None,
    low: float = 0.0,
    high: float = 1.0,
    error: bool = False,
) -> Tensor:
    """Draw one number for each corruption (rows) and severity (columns), with the mean of each row.

    The larger the number, the brighter its cell. What is missing or NaN is hatched, and not part of the mean. The mean
    in the second line is that of the rows.

    Args:
        values: ``(corruption, severity)`` to a number, e.g. the accuracy; rows stand in the order of their first entry.
        title: A line above, e.g. the stage and the epoch.
        clean: The number without any corruption, written into the second line.
        low: What is shown darkest.
        high: What is shown brightest.
        error: Whether a larger number is a worse one; then the second line says so.

    Returns:
        ``(3, H, W)``, float32 in [0, 1].

    Raises:
        ValueError: If there are no values, or ``low`` is not below ``high``.

    Example:
        >>> shift_heat_map({("fog", 1): 0.9, ("fog", 3): 0.6, ("snow", 1): 0.8}, "validation", clean=0.95).shape
        torch.Size([3, 122, 288])
    """
    # Pillow comes with TensorBoard; it is needed for pictures alone.
    from PIL import Image, ImageDraw

    if not values or not low < high:
        raise ValueError(
            f"expected at least one value, and low < high; got {len(values)} values, low {low}, high {high}."
        )
    rows = list(dict.fromkeys(name for name, _ in values))
    severities = sorted({severity for _, severity in values})
    table = [[values.get((name, severity), math.nan) for severity in severities] for name in rows]
    means = [_mean(row) for row in table]
    width = LEFT + (len(severities) + 1) * (CELL_WIDTH + GAP) - GAP + MEAN_GAP + RIGHT
    height = TOP + len(rows) * (CELL_HEIGHT + GAP) - GAP + BOTTOM + 2
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 6), title, fill=INK, font=_font(TITLE))
    overall = _written(_mean(means))
    caption = f"mean {overall}" if clean is None else f"mean {overall}, clean {_written(clean)}"
    caption += "; brighter = worse" if error else ""
    draw.text((8, 26), caption, fill=INK, font=_font(TEXT))
    for j, head in enumerate([*map(str, severities), "mean"]):
        left, _, right, _ = _box(0, j, len(severities))
        draw.text(((left + right) // 2, TOP - 6), head, fill=INK, font=_font(TEXT), anchor="ms")
    colours = _colours([[*row, mean] for row, mean in zip(table, means, strict=True)], low, high)
    for i, name in enumerate(rows):
        middle = (_box(i, 0, 1)[1] + _box(i, 0, 1)[3]) // 2
        draw.text((LEFT - 8, middle), name, fill=INK, font=_font(TEXT), anchor="rm")
        for j, value in enumerate([*table[i], means[i]]):
            _cell(draw, _box(i, j, len(severities)), value, colours[i][j])
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return pixels.permute(2, 0, 1).float() / 255


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def _box(row: int, column: int, severities: int) -> Box:
    left = LEFT + column * (CELL_WIDTH + GAP) + (MEAN_GAP if column == severities else 0)
    top = TOP + row * (CELL_HEIGHT + GAP)
    return left, top, left + CELL_WIDTH - 1, top + CELL_HEIGHT - 1


def _colours(table: list[list[float]], low: float, high: float) -> list[list[tuple[int, ...]]]:
    shares = (torch.tensor(table, dtype=torch.float64).nan_to_num(low) - low) / (high - low)
    shades: Tensor = (sequential(shares).movedim(0, -1) * 255).round().int()
    return [[tuple(shade) for shade in row] for row in shades.tolist()]


def _cell(draw: Any, box: Box, value: float, colour: tuple[int, ...]) -> None:
    left, top, right, bottom = box
    if math.isnan(value):
        draw.rectangle(box, fill=NONE)
        for start in range(left, right - CELL_HEIGHT + 2, 6):
            draw.line((start, bottom, start + CELL_HEIGHT - 1, top), fill=HATCH)
        return
    draw.rectangle(box, fill=colour)
    light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 128
    middle = ((left + right) // 2, (top + bottom) // 2)
    draw.text(middle, _written(value), fill=INK if light else PALE, font=_font(TEXT), anchor="mm")


def _written(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 or math.isnan(value) else f"{value:.3g}"


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)
