"""Pictures for TensorBoard, composed as tensors; text is at least 10 pixels high."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "attack_strips",
    "captioned",
    "diverging",
    "enlarged",
    "sequential",
    "table_of",
    "text_width",
    "to_rgb",
    "wrapped",
    "written",
]

TEXT_HEIGHT = 12
LINE_HEIGHT = TEXT_HEIGHT + 3
MIN_SIDE = 112
MARGIN = 4  # left and right of text, together
INK, GOOD, BAD = (20, 20, 20), (20, 110, 40), (180, 30, 30)

# Dark to bright in even steps of lightness, so that more always looks like more, in grey as well.
_SEQUENTIAL = ((6, 6, 26), (52, 20, 102), (124, 36, 124), (202, 62, 98), (248, 134, 64), (255, 246, 178))
_DIVERGING = ((24, 60, 150), (108, 160, 220), (250, 250, 250), (236, 134, 104), (165, 15, 36))
_SHADES = 255


def enlarged(images: Tensor) -> Tensor:
    """Images ``(N, C, H, W)`` by the least whole factor that makes the longer side at least 112 pixels."""
    factor = math.ceil(MIN_SIDE / max(images.shape[-2:]))
    return F.interpolate(images, scale_factor=factor, mode="nearest") if factor > 1 else images


def to_rgb(images: Tensor, low: float, high: float) -> Tensor:
    """Images ``(N, C, H, W)`` in ``[low, high]`` to ``(N, 3, H', W')`` in [0, 1], enlarged to be seen.

    One and three channels are shown as they are; of other numbers the mean is shown.
    """
    images = ((images.detach().float().cpu() - low) / (high - low)).clamp(0, 1)
    if images.shape[1] != 3:
        images = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return enlarged(images)


def sequential(amounts: Tensor) -> Tensor:
    """Amounts ``(..., H, W)`` from 0 (nearly black) to 1 (pale yellow) as colours ``(..., 3, H, W)`` in [0, 1].

    Example:
        >>> sequential(torch.tensor([[0.0, 1.0]])).mean(0)
        tensor([[0.0497, 0.8876]])
    """
    return _colours(amounts, _SEQUENTIAL)


def diverging(amounts: Tensor) -> Tensor:
    """Amounts ``(..., H, W)`` from -1 (blue) over 0 (white) to 1 (red) as colours ``(..., 3, H, W)`` in [0, 1].

    Example:
        >>> red, green, blue = diverging(torch.tensor([[-1.0, 0.0, 1.0]]))
        >>> (blue - red)[0]
        tensor([ 0.4941,  0.0000, -0.5059])
    """
    return _colours((amounts + 1) / 2, _DIVERGING)


def _colours(shares: Tensor, anchors: tuple[tuple[int, int, int], ...]) -> Tensor:
    # A look-up in few shades is several times faster than interpolating every pixel, and looks the same.
    table = F.interpolate(torch.tensor(anchors).T[None] / 255, _SHADES, mode="linear", align_corners=True)[0].T
    shades = (shares.detach().float().cpu().clamp(0, 1) * (_SHADES - 1)).round().long()
    return table[shades].movedim(-1, -3)


def captioned(image: Tensor, text: str, color: tuple[int, int, int] = INK) -> Tensor:
    """An image ``(3, H, W)`` with text above it, on white; line breaks count, lines too long for it are shortened."""
    return torch.cat([written(text, image.shape[-1], color), image], dim=1)


def written(text: str, width: int, color: tuple[int, int, int] = INK) -> Tensor:
    r"""Text on white, ``(3, H, width)``; 20 pixels high, and 15 more for each further line.

    Example:
        >>> written("one line", 112).shape, written("two\nlines", 112).shape
        (torch.Size([3, 20, 112]), torch.Size([3, 35, 112]))
    """
    # Pillow comes with TensorBoard; it is needed for text alone.
    from PIL import Image, ImageDraw

    lines = text.split("\n")
    height = LINE_HEIGHT * len(lines) + 5
    canvas = Image.new("RGB", (width, height), "white")
    for i, line in enumerate(lines):
        fitting = _shortened(line, width - MARGIN)
        ImageDraw.Draw(canvas).text((2, 3 + i * LINE_HEIGHT), fitting, fill=color, font=_font())
    band = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return band.permute(2, 0, 1).float() / 255


def text_width(text: str) -> float:
    """How many pixels a line of text takes."""
    return float(_font().getlength(text))


def wrapped(text: str, width: int) -> str:
    """Text with line breaks between words, so that :func:`written` need not shorten it at this width."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}") <= width - MARGIN:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def _shortened(line: str, width: int) -> str:
    if text_width(line) <= width:
        return line
    return next((cut for end in range(len(line), 0, -1) if text_width(cut := line[:end] + "…") <= width), "")


@cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=TEXT_HEIGHT)


def table_of(rows: Sequence[Sequence[Tensor]], gap: int = 6) -> Tensor:
    """Equally large images in rows and columns, one picture ``(3, H, W)`` on white."""
    height, width = rows[0][0].shape[-2:]
    picture = torch.ones(3, len(rows) * (height + gap) - gap, len(rows[0]) * (width + gap) - gap)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (height + gap), j * (width + gap)
            picture[:, top : top + height, left : left + width] = image
    return picture


def attack_strips(
    clean: Tensor, adversarial: Tensor, labels: Tensor, before: Tensor, after: Tensor, bounds: tuple[float, float]
) -> Tensor:
    """One row a sample: clean input, magnified change, attacked input, with both predictions; ``(3, H, W)``.

    Args:
        clean: Pixels ``(N, C, H, W)``.
        adversarial: Pixels of the same shape.
        labels: Right classes ``(N,)``.
        before: Predictions for the clean inputs ``(N,)``.
        after: Predictions for the attacked inputs ``(N,)``.
        bounds: The pixel range.

    Example:
        >>> x = torch.rand(2, 1, 28, 28)
        >>> zeros = torch.zeros(2, dtype=torch.long)
        >>> attack_strips(x, x + 0.1, zeros, zeros, zeros, (0.0, 1.0)).shape
        torch.Size([3, 270, 348])
    """
    low, high = bounds
    change = adversarial - clean
    largest = float(change.abs().max())
    times = (high - low) / (2 * largest) if largest > 0 else 1.0
    middle = (low + high) / 2
    columns = [to_rgb(clean, low, high), to_rgb(middle + times * change, low, high), to_rgb(adversarial, low, high)]
    rows = []
    for i, (label, was, now) in enumerate(zip(labels.tolist(), before.tolist(), after.tolist(), strict=True)):
        rows.append(
            [
                captioned(columns[0][i], f"{label} seen as {was}", GOOD if was == label else BAD),
                captioned(columns[1][i], f"change x {times:.3g}"),
                captioned(columns[2][i], f"{label} seen as {now}", GOOD if now == label else BAD),
            ]
        )
    return table_of(rows)
