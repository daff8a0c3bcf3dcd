"""The same losses as a codec's: apart by far less than either is from the original."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from corruptions.real_pictures import real_pictures
from PIL import Image
from torch import Tensor

from lightning_robust.corruptions.jpeg import jpeg


def through_pillow(x: Tensor, quality: int) -> Tensor:
    """Levels 0..255 of one picture ``(C, H, W)`` after Pillow wrote and read it."""
    levels = (x * 255).round().byte()
    picture = Image.fromarray((levels[0] if len(x) == 1 else levels.permute(1, 2, 0)).numpy())
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    made = torch.from_numpy(np.array(Image.open(file)))
    return made[None] if len(x) == 1 else made.permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [28, 32, 100, 224])
@pytest.mark.parametrize("quality", [7, 25, 40, 80, 100])
def test_the_losses_are_those_of_pillow(channels: int, side: int, quality: int) -> None:
    for x in real_pictures(side, channels):
        ours, theirs = 255 * jpeg(x[None], (quality,), [])[0], through_pillow(x, quality)
        # Frequencies right between two steps may be rounded to either.
        assert float((ours - theirs).abs().mean()) < 0.25 * float((255 * x - theirs).abs().mean()) + 0.1


def test_results_are_whole_levels() -> None:
    levels = 255 * jpeg(real_pictures(32), (40,), [])
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)


def test_two_channels_are_two_pictures() -> None:
    x = torch.rand(1, 2, 20, 12)
    assert torch.equal(jpeg(x, (30,), [])[:, 1:], jpeg(x[:, 1:], (30,), []))


def test_a_flat_grey_stays() -> None:
    x = torch.full((1, 3, 16, 16), 128 / 255)
    torch.testing.assert_close(jpeg(x, (50,), []), x)
