"""Histograms of a score over familiar and foreign inputs, as a picture for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["score_histograms"]

WIDTH, HEIGHT = 560, 440
LEFT, RIGHT, TOP, BOTTOM = 16, 544, 124, 390
LEGEND = 52  # four lines of two entries
TEXT, TITLE = 12, 14
OWN, INK, THRESHOLD = (176, 196, 222), (20, 20, 20), (0, 0, 0)
FOREIGN = ((200, 60, 40), (230, 150, 20), (40, 140, 70), (130, 70, 170), (20, 150, 170), (150, 100, 60))


def score_histograms(
    inside: Tensor,
    outside: Mapping[str, Tensor],
    edges: Tensor,
    threshold: float = math.nan,
    title: str = "",
    aurocs: Mapping[str, float] | None = None,
) -> Tensor:
    """Draw how a score is spread, over the model's own kind of data and over each foreign set.

    Own data are a filled area, foreign sets are coloured lines; each histogram is scaled by its own number of samples,
    so that sets of different sizes can be compared. What lies to the right of the dashed line is taken for foreign by a
    threshold that accepts 95 % of the own data.

    Args:
        inside: Own samples in each bin, ``(B,)``; whole numbers or not.
        outside: Samples of each foreign set in the same bins, ``(B,)``, by name. Colours come again after six sets.
        edges: Where bins begin and end, ``(B + 1,)``, increasing and of equal width.
        threshold: In units of the score; left out if it is NaN or beyond the edges.
        title: A line above, e.g. the score, the stage and the epoch.
        aurocs: AUROC of the sets by name, for the legend.

    Returns:
        ``(3, 440, 560)``, float32 in [0, 1].

    Raises:
        ValueError: If a histogram does not fit the edges.

    Example:
        >>> own, far = torch.tensor([5.0, 3.0, 0.0]), {"noise": torch.tensor([0.0, 1.0, 4.0])}
        >>> score_histograms(own, far, torch.linspace(-9, 0, 4), -3.5, "energy, epoch 3", {"noise": 0.95}).shape
        torch.Size([3, 440, 560])
    """
    # Pillow comes with TensorBoard; it is needed for pictures alone.
    from PIL import Image, ImageDraw

    for name, counts in {"inside": inside, **outside}.items():
        if counts.ndim != 1 or edges.shape != (len(counts) + 1,) or not len(counts):
            raise ValueError(
                f"expected counts (B,) and edges (B + 1,), got {tuple(counts.shape)} of {name!r} and "
                f"{tuple(edges.shape)} edges."
            )
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(canvas)
    own, foreign = _shares(inside), {name: _shares(counts) for name, counts in outside.items()}
    highest = max([1e-12, *own, *(share for shares in foreign.values() for share in shares)])
    draw.polygon([(LEFT, BOTTOM), *_steps(own, highest), (RIGHT, BOTTOM)], fill=OWN)
    colours = {name: FOREIGN[i % len(FOREIGN)] for i, name in enumerate(foreign)}
    for name, shares in foreign.items():
        draw.line(_steps(shares, highest), fill=colours[name], width=2)
    low, high = float(edges[0]), float(edges[-1])
    draw.line((LEFT, BOTTOM, RIGHT, BOTTOM), fill=INK)
    if low <= threshold <= high:  # on top of everything
        x = _across(threshold, low, high)
        for y in range(TOP, BOTTOM, 8):
            draw.line((x, y, x, y + 5), fill=THRESHOLD, width=2)
    _words(draw, low, high, title, colours, aurocs or {})
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(HEIGHT, WIDTH, 3)
    return pixels.permute(2, 0, 1).float() / 255


def _shares(counts: Tensor) -> list[float]:
    counts = counts.detach().cpu().double()
    shares: list[float] = (counts / counts.sum().clamp_min(1e-12)).tolist()
    return shares


def _across(score: float, low: float, high: float) -> int:
    return round(LEFT + (RIGHT - LEFT) * (score - low) / (high - low))


def _steps(shares: list[float], highest: float) -> list[tuple[int, int]]:
    """The outline of a histogram from left to right."""
    points = []
    for m, share in enumerate(shares):
        y = round(BOTTOM - (BOTTOM - TOP) * share / highest)
        points += [(_across(m, 0, len(shares)), y), (_across(m + 1, 0, len(shares)), y)]
    return points


def _words(
    draw: Any,
    low: float,
    high: float,
    title: str,
    colours: Mapping[str, tuple[int, int, int]],
    aurocs: Mapping[str, float],
) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(size=TEXT)
    draw.text((8, 6), title, fill=INK, font=ImageFont.load_default(size=TITLE))
    draw.text(
        (8, 28),
        "share of samples; dashed: accepts 95 % of own data, right of it: taken for foreign",
        fill=INK,
        font=font,
    )
    for tick in range(5):
        score = low + (high - low) * tick / 4
        x = _across(score, low, high)
        draw.line((x, BOTTOM, x, BOTTOM + 3), fill=INK)
        anchor = "la" if tick == 0 else "ra" if tick == 4 else "ma"
        draw.text((x, BOTTOM + 6), f"{score:.3g}", fill=INK, font=font, anchor=anchor)
    draw.text(((LEFT + RIGHT) // 2, BOTTOM + 26), "score, higher = more foreign", fill=INK, font=font, anchor="ma")
    legend = {"own data": OWN} | {
        f"{name}, AUROC {aurocs[name]:.3f}" if name in aurocs else name: colour for name, colour in colours.items()
    }
    for i, (text, colour) in enumerate(legend.items()):
        x, y = (LEFT, (LEFT + RIGHT) // 2)[i % 2], LEGEND + 16 * (i // 2)
        draw.rectangle((x, y, x + 10, y + 10), fill=colour)
        draw.text((x + 16, y - 2), text, fill=INK, font=font)
