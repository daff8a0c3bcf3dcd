"""What a model looks at and how that changes, as one picture that explains itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.pictures import (
    BAD,
    GOOD,
    MARGIN,
    MIN_SIDE,
    TEXT_HEIGHT,
    captioned,
    diverging,
    enlarged,
    sequential,
    table_of,
    text_width,
    to_rgb,
    wrapped,
    written,
)

__all__ = ["brightest", "filmstrip", "seen_as", "shares", "shrunk"]

_GAP = 6
_BAR = 64
_FRAME = 0.75  # a light grey


def filmstrip(
    images: Tensor,
    labels: Tensor,
    predictions: Tensor,
    confidences: Tensor,
    snapshots: Sequence[tuple[str, Tensor]],
    bounds: tuple[float, float],
    names: Sequence[str] | None = None,
) -> Tensor:
    """One row a probe: the input, its maps from the first snapshot to now, and what changed in between.

    Each map is divided by its own mean magnitude: colour means a *share* of the attention, whatever the scale of the
    gradients. A row then has one colour scale for all times, the 99th percentile of its first map (but at least twice
    the average share, so that an empty or even first map does not make everything bright). Maps without negative
    values go from dark to bright, others from blue over white to red.

    Args:
        images: Pixels ``(N, C, H, W)``.
        labels: Right classes ``(N,)``.
        predictions: Present predictions ``(N,)``.
        confidences: Probabilities of those predictions, ``(N,)`` in [0, 1].
        snapshots: A caption and maps ``(N, H, W)`` of the right classes each, the oldest first; the last one is "now".
            From two on there is a last column with the change.
        bounds: The pixel range.
        names: Names of the classes; without them classes are numbers.

    Returns:
        The picture ``(3, H', W')`` in [0, 1]; tiles of 112 to 223 pixels, a legend in words below.

    Raises:
        ValueError: If there is no image or no snapshot, or shapes do not fit.

    Example:
        >>> x, zeros = torch.rand(2, 1, 28, 28), torch.zeros(2, dtype=torch.long)
        >>> maps = [("first: epoch 0", torch.rand(2, 28, 28)), ("now: epoch 1", torch.rand(2, 28, 28))]
        >>> filmstrip(x, zeros, zeros, torch.ones(2), maps, (0.0, 1.0)).shape  # 2 rows, 4 columns
        torch.Size([3, ..., ...])
    """
    _check(images, snapshots)
    maps = torch.stack([shares(shrunk(m[:, None])[:, 0]) for _, m in snapshots])
    scale = brightest(maps[0])
    signed, changes = bool((maps < 0).any()), len(maps) > 1
    tiles = list((diverging if signed else sequential)(maps / scale))
    captions = [caption for caption, _ in snapshots]
    if changes:
        tiles.append(diverging((maps[-1] - maps[0]) / scale))
        captions.append("change since first")
    columns = [_framed(enlarged(column)) for column in tiles]

    inputs = _framed(to_rgb(shrunk(images), *bounds))
    seen = seen_as(labels, predictions, confidences, names)
    colors = [GOOD if right else BAD for right in (labels == predictions).tolist()]
    # The column of inputs gives way to long names of classes, up to a point.
    side = inputs.shape[-1]
    width = min(max(side, *(math.ceil(text_width(text)) + MARGIN for text in seen)), 2 * side)
    inputs = F.pad(inputs, (0, width - side), value=1.0)

    seen = [wrapped(text, width) for text in seen]
    captions = [wrapped(caption, side) for caption in captions]
    lines = max(text.count("\n") for text in seen + captions)
    seen, captions = ([text + "\n" * (lines - text.count("\n")) for text in texts] for texts in (seen, captions))

    left = table_of([[captioned(*row)] for row in zip(inputs, seen, colors, strict=True)], _GAP)
    right = table_of([list(map(captioned, row, captions)) for row in zip(*columns, strict=True)], _GAP)
    table = torch.cat([F.pad(left, (0, _GAP), value=1.0), right], dim=2)
    return torch.cat([table, _legend(signed, changes, table.shape[-1])], dim=1)


def _check(images: Tensor, snapshots: Sequence[tuple[str, Tensor]]) -> None:
    if images.ndim != 4 or not len(images) or not snapshots:
        raise ValueError(
            f"a filmstrip needs images (N, C, H, W) and at least one snapshot, got {tuple(images.shape)} and "
            f"{len(snapshots)} snapshots. Maps of other data have no picture; log their drift alone."
        )
    expected = (len(images), *images.shape[2:])
    for caption, maps in snapshots:
        if maps.shape != expected:
            raise ValueError(f"expected maps {expected} for these images, got {tuple(maps.shape)} in {caption!r}.")


def shrunk(images: Tensor) -> Tensor:
    """Large images averaged down by a whole factor: a picture of many tiles has to stay a picture."""
    times = max(1, max(images.shape[2:]) // MIN_SIDE)
    size = [math.ceil(side / times) for side in images.shape[2:]]
    return images if times == 1 else F.interpolate(images.detach().float(), size, mode="area")


def shares(maps: Tensor) -> Tensor:
    """Maps in units of their own mean magnitude; what is not a number shows as nothing."""
    maps = maps.detach().float().cpu().nan_to_num(0, 0, 0)
    mean = maps.abs().mean((1, 2), keepdim=True)
    return maps / mean.where(mean > 0, 1.0)


def brightest(maps: Tensor) -> Tensor:
    """What is shown at full strength, ``(N, 1, 1)``: the 99th percentile of each map, at least twice its mean."""
    return maps.abs().flatten(1).quantile(0.99, dim=1).clamp(min=2)[:, None, None]


def _framed(tiles: Tensor) -> Tensor:
    """A thin grey line around each tile: white maps would otherwise have no edge on white paper."""
    return F.pad(tiles[..., 1:-1, 1:-1], (1, 1, 1, 1), value=_FRAME)


def seen_as(labels: Tensor, predictions: Tensor, confidences: Tensor, names: Sequence[str] | None) -> list[str]:
    """A line for each sample: what it is, and what it is taken for."""

    def name(kind: int) -> str:
        return names[kind] if names is not None and 0 <= kind < len(names) else str(kind)

    rows = zip(labels.tolist(), predictions.tolist(), confidences.tolist(), strict=True)
    return [f"{name(label)}, seen as {name(seen)} ({100 * sure:.0f} %)" for label, seen, sure in rows]


def _legend(signed: bool, changes: bool, width: int) -> Tensor:
    """For each colour map in use, a bar of its colours and what they mean."""
    ramp = torch.linspace(0, 1, _BAR).expand(TEXT_HEIGHT, _BAR)
    both_ways = diverging(2 * ramp - 1)
    same = "Along a row the scale is one and the same."
    if signed:
        entries = [(both_ways, f"red: speaks for the right class, blue: against it, white: does not matter. {same}")]
        more, less = "speaks more for the right class than at first", "less"
    else:
        entries = [(sequential(ramp), f"bright: the model looks here, dark: this does not matter. {same}")]
        more, less = "the model looks here more than at first", "less"
    if changes:
        entries.append((both_ways, f"last column, red: {more}, blue: {less}, white: no change."))
    lines = [torch.ones(3, _GAP, width)]
    for bar, meaning in entries:
        room = width - _BAR - _GAP
        words = written(wrapped(meaning, room), room)
        lines.append(torch.cat([F.pad(bar, (0, _GAP, 4, words.shape[1] - TEXT_HEIGHT - 4), value=1.0), words], dim=2))
    return torch.cat(lines, dim=1)
