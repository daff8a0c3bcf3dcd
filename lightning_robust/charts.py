"""Line charts for TensorBoard: accuracy against the radius of the attack, risk against coverage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["accuracy_curve", "risk_curve"]

SIDE = 420
LEFT, RIGHT, TOP, BOTTOM = 44, 400, 64, 370
TEXT, TITLE = 12, 14
INK, PALE, LINE, BAND = (20, 20, 20), (225, 225, 225), (52, 96, 160), (200, 216, 238)


def accuracy_curve(
    radii: Sequence[float], accuracies: Sequence[float], bands: Sequence[tuple[float, float]], title: str, caption: str
) -> Tensor:
    """Draw accuracy over the radius of an attack, with a band of uncertainty.

    Args:
        radii: Increasing, in pixel units; 0 for clean inputs.
        accuracies: One for each radius.
        bands: Lowest and highest for each radius.
        title: A line above.
        caption: What the radius is measured in, below.

    Returns:
        ``(3, 420, 420)``, float32 in [0, 1].

    Example:
        >>> accuracy_curve([0.0, 0.1], [0.9, 0.4], [(0.88, 0.92), (0.36, 0.44)], "validation", "linf radius").shape
        torch.Size([3, 420, 420])
    """
    # Pillow comes with TensorBoard; it is needed for pictures alone.
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(canvas)
    farthest = max(radii) or 1.0

    def x(radius: float) -> int:
        return round(LEFT + (RIGHT - LEFT) * radius / farthest)

    def y(accuracy: float) -> int:
        return round(BOTTOM - (BOTTOM - TOP) * accuracy)

    low = [(x(radius), y(band[0])) for radius, band in zip(radii, bands, strict=True)]
    high = [(x(radius), y(band[1])) for radius, band in zip(radii, bands, strict=True)]
    draw.polygon(low + high[::-1], fill=BAND)
    for tenths in range(0, 11, 2):
        draw.line((LEFT, y(tenths / 10), RIGHT, y(tenths / 10)), fill=PALE)
        draw.text((LEFT - 6, y(tenths / 10)), f"{tenths / 10:.1f}", fill=INK, font=_font(TEXT), anchor="rm")
    draw.line((LEFT, TOP, LEFT, BOTTOM, RIGHT, BOTTOM), fill=INK)
    points = [(x(radius), y(accuracy)) for radius, accuracy in zip(radii, accuracies, strict=True)]
    draw.line(points, fill=LINE, width=2)
    written = -SIDE
    for radius, (across, up) in zip(radii, points, strict=True):
        draw.ellipse((across - 3, up - 3, across + 3, up + 3), fill=LINE)
        if across - written > 40:  # labels that do not run into each other
            draw.text((across, BOTTOM + 5), f"{radius:.3g}", fill=INK, font=_font(TEXT), anchor="ma")
            written = across
    draw.text((8, 6), title, fill=INK, font=_font(TITLE))
    draw.text((8, TOP - 22), "accuracy, 95 % band", fill=INK, font=_font(TEXT))
    draw.text(((LEFT + RIGHT) // 2, BOTTOM + 26), caption, fill=INK, font=_font(TEXT), anchor="ma")
    return _tensor(canvas)


def risk_curve(coverage: Tensor, risk: Tensor, title: str) -> Tensor:
    """Draw the error rate among the surest predictions over how many of them are answered.

    Args:
        coverage: Shares in (0, 1], increasing, ``(C,)``.
        risk: Error rate at each, ``(C,)``.
        title: A line above.

    Returns:
        ``(3, 420, 420)``, float32 in [0, 1].

    Example:
        >>> risk_curve(torch.tensor([0.5, 1.0]), torch.tensor([0.0, 0.1]), "validation").shape
        torch.Size([3, 420, 420])
    """
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(canvas)
    # Errors are rare: the scale ends at a round number above the largest that counts.
    top = next(end for end in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if float(risk[coverage >= 0.1].max()) <= end)

    def x(share: float) -> int:
        return round(LEFT + (RIGHT - LEFT) * share)

    def y(error: float) -> int:
        return round(BOTTOM - (BOTTOM - TOP) * min(error, top) / top)

    for fifth in range(6):
        draw.line((LEFT, y(top * fifth / 5), RIGHT, y(top * fifth / 5)), fill=PALE)
        draw.text((LEFT - 6, y(top * fifth / 5)), f"{top * fifth / 5:g}"[:5], fill=INK, font=_font(TEXT), anchor="rm")
        draw.text((x(fifth / 5), BOTTOM + 5), f"{fifth / 5:.1f}", fill=INK, font=_font(TEXT), anchor="ma")
    draw.line((LEFT, TOP, LEFT, BOTTOM, RIGHT, BOTTOM), fill=INK)
    # Among equally sure predictions a random order has the same risk from the first on.
    shares, errors = [0.0, *coverage.tolist()], [float(risk[0]), *risk.tolist()]
    draw.line([(x(c), y(r)) for c, r in zip(shares, errors, strict=True)], fill=LINE, width=2)
    draw.text((8, 6), title, fill=INK, font=_font(TITLE))
    draw.text((8, TOP - 22), "error rate among what is answered", fill=INK, font=_font(TEXT))
    caption = "coverage: share answered, the surest first"
    draw.text(((LEFT + RIGHT) // 2, BOTTOM + 26), caption, fill=INK, font=_font(TEXT), anchor="ma")
    return _tensor(canvas)


def _tensor(canvas: Any) -> Tensor:
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3)
    return pixels.permute(2, 0, 1).float() / 255


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)
