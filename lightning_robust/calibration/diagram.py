"""The reliability diagram: accuracy against confidence, as a picture for TensorBoard."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_robust.calibration.reliability import Reliability
from lightning_robust.intervals import wilson

__all__ = ["reliability_diagram"]

SIDE = 420
LEFT, RIGHT = 40, 404  # confidence 0 and 1
TOP, BOTTOM = 84, 314  # accuracy 1 and 0
STRIP_TOP, STRIP_BOTTOM = 340, 378
TEXT, TITLE = 12, 14
BAR, STRIP, INK, PALE, LINE = (108, 156, 212), (160, 160, 160), (20, 20, 20), (225, 225, 225), (190, 60, 40)


def reliability_diagram(
    reliability: Reliability,
    title: str = "",
    beside: Reliability | None = None,
    titles: tuple[str, str] = ("as it is", "scaled"),
) -> Tensor:
    """Draw how often predictions are right, by how sure they are.

    Each bar is the accuracy of one bin of confidence, with its 95 % band (Wilson) as a whisker. A perfect model's bars
    end on the line. The grey strip shows how many predictions each bin holds, relative to the fullest. The caption
    gives the calibration error, its 95 % interval, and the error that a perfect model would show here by chance.

    Args:
        reliability: What was counted.
        title: A line above, e.g. the stage and the epoch.
        beside: What a second panel shows, on the same axes, e.g. the same predictions at another temperature.
        titles: What the two panels are called; not written without a second.

    Returns:
        ``(3, 420, 420)``, with a second panel ``(3, 420, 840)``; float32 in [0, 1].

    Example:
        >>> counted = Reliability.of(torch.tensor([[0.8, 0.2]]).log(), torch.tensor([0]))
        >>> reliability_diagram(counted, "validation, epoch 3").shape
        torch.Size([3, 420, 420])
        >>> reliability_diagram(counted, "validation, epoch 3", beside=counted).shape
        torch.Size([3, 420, 840])
    """
    if beside is None:
        return _panel(reliability, title, most=int(reliability.counts.max()))
    # One scale for both grey strips: the panels are compared.
    most = int(max(reliability.counts.max(), beside.counts.max()))
    left = _panel(reliability, f"{title}: {titles[0]}" if title else titles[0], most)
    return torch.cat([left, _panel(beside, titles[1], most)], dim=2)


def _panel(reliability: Reliability, title: str, most: int) -> Tensor:
    """One diagram; a bin of ``most`` predictions fills the strip."""
    # Pillow comes with TensorBoard; it is needed for pictures alone.
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(canvas)
    _axes(draw)
    _bars(draw, reliability, most)
    draw.line((LEFT, BOTTOM, RIGHT, TOP), fill=LINE, width=2)
    _words(draw, reliability, title)
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3)
    return pixels.permute(2, 0, 1).float() / 255


def _x(confidence: float) -> int:
    return round(LEFT + confidence * (RIGHT - LEFT))


def _y(accuracy: float) -> int:
    return round(BOTTOM - accuracy * (BOTTOM - TOP))


@lru_cache(maxsize=2)
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def _axes(draw: Any) -> None:
    for tenths in range(0, 11, 2):
        at, text = tenths / 10, f"{tenths / 10:.1f}"
        draw.line((LEFT, _y(at), RIGHT, _y(at)), fill=PALE)
        draw.text((LEFT - 6, _y(at)), text, fill=INK, font=_font(TEXT), anchor="rm")
        draw.line((_x(at), STRIP_BOTTOM, _x(at), STRIP_BOTTOM + 3), fill=INK)
        draw.text((_x(at), STRIP_BOTTOM + 5), text, fill=INK, font=_font(TEXT), anchor="ma")
    draw.line((LEFT, TOP, LEFT, BOTTOM, RIGHT, BOTTOM), fill=INK)
    draw.line((LEFT, STRIP_BOTTOM, RIGHT, STRIP_BOTTOM), fill=INK)


def _bars(draw: Any, reliability: Reliability, most: int) -> None:
    table = reliability.to_dict()
    bins = len(table["counts"])
    for m, (count, accuracy) in enumerate(zip(table["counts"], table["accuracy"], strict=True)):
        if not count:
            continue
        left, right = _x(m / bins) + 1, _x((m + 1) / bins) - 1
        draw.rectangle((left, _y(accuracy), right, BOTTOM), fill=BAR)
        top = round(STRIP_BOTTOM - (STRIP_BOTTOM - STRIP_TOP) * count / most)
        draw.rectangle((left, top, right, STRIP_BOTTOM), fill=STRIP)
        low, high = wilson(accuracy, count)
        middle = (left + right) // 2
        draw.line((middle, _y(low), middle, _y(high)), fill=INK, width=2)
        for end in (low, high):
            draw.line((middle - 3, _y(end), middle + 4, _y(end)), fill=INK)


def _words(draw: Any, reliability: Reliability, title: str) -> None:
    m = reliability.measures()
    caption = "nothing was counted"
    if reliability.n:
        interval = f"[{m['ece_low']:.3f}, {m['ece_high']:.3f}]"
        caption = f"ECE {m['ece']:.3f} {interval}, floor {m['ece_floor']:.3f}, n {reliability.n}"
    middle = (LEFT + RIGHT) // 2
    draw.text((8, 6), title, fill=INK, font=_font(TITLE))
    draw.text((8, 26), caption, fill=INK, font=_font(TEXT))
    draw.text((8, 44), "bars below the line: over-confident", fill=LINE, font=_font(TEXT))
    draw.text((8, TOP - 22), "accuracy", fill=INK, font=_font(TEXT))
    draw.text((LEFT, STRIP_TOP - 18), "predictions per bin", fill=INK, font=_font(TEXT))
    draw.text((middle, STRIP_BOTTOM + 21), "confidence", fill=INK, font=_font(TEXT), anchor="ma")
