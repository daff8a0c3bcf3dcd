"""Pictures for TensorBoard, composed as tensors; text is at least 10 pixels high."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["attack_strips", "captioned", "table_of", "to_rgb"]

TEXT_HEIGHT = 12
MIN_SIDE = 112


def to_rgb(images: Tensor, low: float, high: float) -> Tensor:
    """Images ``(N, C, H, W)`` in ``[low, high]`` to ``(N, 3, H', W')`` in [0, 1], enlarged to be seen.

    One and three channels are shown as they are; of other numbers the mean is shown.
    """
    images = ((images.detach().float().cpu() - low) / (high - low)).clamp(0, 1)
    if images.shape[1] != 3:
        images = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    factor = max(1, round(MIN_SIDE / max(images.shape[-2:])))
    return F.interpolate(images, scale_factor=factor, mode="nearest")


def captioned(image: Tensor, text: str, color: tuple[int, int, int] = (20, 20, 20)) -> Tensor:
    """An image ``(3, H, W)`` with a line of text above it, on white."""
    # Pillow comes with TensorBoard; it is needed for text alone.
    from PIL import Image, ImageDraw, ImageFont

    height = TEXT_HEIGHT + 8
    canvas = Image.new("RGB", (image.shape[-1], height), "white")
    font: Any = ImageFont.load_default(size=TEXT_HEIGHT)
    ImageDraw.Draw(canvas).text((2, 3), text, fill=color, font=font)
    band = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(height, image.shape[-1], 3)
    return torch.cat([band.permute(2, 0, 1).float() / 255, image], dim=1)


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
    good, bad = (20, 110, 40), (180, 30, 30)
    columns = [to_rgb(clean, low, high), to_rgb(middle + times * change, low, high), to_rgb(adversarial, low, high)]
    rows = []
    for i, (label, was, now) in enumerate(zip(labels.tolist(), before.tolist(), after.tolist(), strict=True)):
        rows.append(
            [
                captioned(columns[0][i], f"{label} seen as {was}", good if was == label else bad),
                captioned(columns[1][i], f"change x {times:.3g}"),
                captioned(columns[2][i], f"{label} seen as {now}", good if now == label else bad),
            ]
        )
    return table_of(rows)
