"""Contrast and colour in closed form, pixels as Pillow makes them, and a sheet that moves as it is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from corruptions.real_pictures import real_pictures
from PIL import Image
from skimage.color import hsv2rgb, rgb2hsv
from torch import Tensor

from lightning_robust.corruptions.digital import contrast, elastic, pixelate, saturate
from lightning_robust.randomness import seeded


def colours() -> Tensor:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, :, 0] = 0  # black, grey and white have no hue
    x[0, :, 1] = 0.4
    x[0, :, 2] = 1
    return x


@pytest.mark.parametrize("parameters", [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)])
def test_saturation_is_that_of_hsv(parameters: tuple[float, float]) -> None:
    hsv = rgb2hsv(colours().movedim(1, -1).numpy())
    hsv[..., 1] = (hsv[..., 1] * parameters[0] + parameters[1]).clip(0, 1)
    expected = torch.from_numpy(hsv2rgb(hsv)).movedim(-1, 1)
    torch.testing.assert_close(saturate(colours(), parameters, []), expected)


def test_contrast_keeps_the_mean_of_each_channel_and_shrinks_the_rest() -> None:
    x = colours()
    made = contrast(x, (0.4,), [])
    torch.testing.assert_close(made.mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(made.std((2, 3)), 0.4 * x.std((2, 3)))


@pytest.mark.parametrize("side", [28, 32, 50, 224])
@pytest.mark.parametrize("share", [0.95, 0.9, 0.65, 0.6, 0.25])
def test_pixels_are_those_of_pillow(side: int, share: float) -> None:
    x = real_pictures(side)[:1]
    picture = Image.fromarray((x[0] * 255).byte().permute(1, 2, 0).numpy())
    small = picture.resize((int(side * share), int(side * share)), Image.Resampling.BOX)
    expected = torch.from_numpy(np.array(small.resize((side, side), Image.Resampling.BOX))).permute(2, 0, 1)
    # Pillow rounds after rows and after columns.
    assert float((255 * pixelate(x, (share,), [])[0] - expected).abs().max()) < 1.01


def test_a_sheet_at_rest_changes_nothing() -> None:
    x = torch.rand(2, 3, 20, 27)
    made = elastic(x, (0, 0, 0), [seeded(0), seeded(1)])
    torch.testing.assert_close(made, x, atol=1e-4, rtol=0)


def test_a_slant_is_affine() -> None:
    # Two ramps tell where each pixel came from; far from the border nothing was mirrored.
    row, column = torch.meshgrid(torch.arange(60.0), torch.arange(60.0), indexing="ij")
    x = torch.stack([row, column])[None].expand(10, -1, -1, -1) / 60
    made = elastic(x, (0, 0, 0.1), [seeded(i) for i in range(10)])[:, :, 20:40, 20:40]
    assert float((made - x[:, :, 20:40, 20:40]).abs().max()) > 0.02
    for dim in (2, 3):
        bend = made.diff(n=2, dim=dim).abs().max()
        assert float(bend) < 1e-4


def test_three_points_move_by_at_most_the_slant() -> None:
    row, column = torch.meshgrid(torch.arange(60.0), torch.arange(60.0), indexing="ij")
    x = torch.stack([row, column])[None].expand(50, -1, -1, -1) / 60
    moved = 60 * (elastic(x, (0, 0, 0.05), [seeded(i) for i in range(50)]) - x)
    at = {"first": (50, 50), "second": (50, 10), "third": (10, 10)}
    for place in at.values():
        distance = moved[:, :, place[0], place[1]].abs()
        assert float(distance.max()) <= 3 + 1e-3
        assert float(distance.max()) > 2.5
