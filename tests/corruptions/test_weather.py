"""Snow, fog and light: closed forms, and scikit-image's colour space."""

from __future__ import annotations

import pytest
import torch
from skimage.color import hsv2rgb, rgb2hsv
from torch import Tensor

from lightning_robust.corruptions.weather import brightness, fog, plasma, snow
from lightning_robust.randomness import seeded


def colours() -> Tensor:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, :, 0] = 0  # black, grey and white have no hue
    x[0, :, 1] = 0.4
    x[0, :, 2] = 1
    return x


@pytest.mark.parametrize("growth", [0.1, 0.5])
def test_brightness_is_the_value_of_hsv(growth: float) -> None:
    hsv = rgb2hsv(colours().movedim(1, -1).numpy())
    hsv[..., 2] = (hsv[..., 2] + growth).clip(0, 1)
    expected = torch.from_numpy(hsv2rgb(hsv)).movedim(-1, 1)
    torch.testing.assert_close(brightness(colours(), (growth,), []), expected)


def test_brightness_of_one_channel_is_a_sum() -> None:
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(brightness(x, (0.3,), []), (x + 0.3).clamp(max=1))


def test_plasma_of_two_points_a_side_by_hand() -> None:
    noise = torch.tensor([[[9.0, 0.1], [0.2, 0.4]]])
    # The centre is its displacement, 0.4; each edge the mean of it, twice, and of two corners at 0, plus its own.
    heights = torch.tensor([[0.0, 0.2 + 0.1], [0.2 + 0.2, 0.4]])
    torch.testing.assert_close(plasma(noise, 2.0)[0], heights / 0.4)


def test_plasma_goes_from_zero_to_one_and_a_larger_decay_makes_it_smoother() -> None:
    noise = 2 * torch.rand(5, 64, 64) - 1
    steps = []
    for decay in (1.4, 2.0, 3.0):
        clouds = plasma(noise, decay)
        assert torch.equal(clouds.amin((1, 2)), torch.zeros(5))
        assert torch.equal(clouds.amax((1, 2)), torch.ones(5))
        steps.append(float(clouds.diff(dim=1).abs().mean()))
    assert steps[0] > steps[1] > steps[2]


def test_fog_keeps_a_black_picture_black_and_lightens_dark_places() -> None:
    assert not bool(fog(torch.zeros(1, 3, 20, 30), (2.0, 2.0), [seeded(0)]).any())
    x = torch.zeros(4, 3, 20, 30)
    x[..., 0, 0] = 1
    made = fog(x, (2.0, 2.0), [seeded(i) for i in range(4)])
    assert float(made[..., 1:, :].mean()) > 0.1
    assert float(made.max()) <= 1


def test_snow_only_lightens_what_is_not_light() -> None:
    x = torch.full((4, 3, 32, 32), 0.3)
    made = snow(x, (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55), [seeded(i) for i in range(4)])
    assert bool((made >= x).all())
    assert float((made - x).mean()) > 0.1


def test_snow_is_white() -> None:
    x = torch.full((1, 3, 32, 32), 0.3)
    made = snow(x, (0.1, 0.3, 1, 0.5, 10, 4, 0.8), [seeded(0)])
    torch.testing.assert_close(made[:, 0], made[:, 1])
    torch.testing.assert_close(made[:, 0], made[:, 2])
