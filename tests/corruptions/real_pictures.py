"""Two photographs that ship with scikit-learn, as four pictures of any size."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

__all__ = ["real_pictures"]


def real_pictures(side: int, channels: int = 3) -> Tensor:
    """``(4, channels, side, side)`` in [0, 1], at whole multiples of 1/255 where there are three channels."""
    made = []
    for name in ("china.jpg", "flower.jpg"):
        photograph = Image.fromarray(load_sample_image(name))
        for left in (0, 213):
            square = photograph.crop((left, 0, left + 427, 427)).resize((side, side), Image.Resampling.BOX)
            made.append(torch.from_numpy(np.array(square)))
    pictures = torch.stack(made).permute(0, 3, 1, 2).float() / 255
    return (pictures if channels == 3 else pictures.mean(1, keepdim=True)).contiguous()
