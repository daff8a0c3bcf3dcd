"""By name, severity and index: the same picture wherever it is made, in the units it came in."""

from __future__ import annotations

import warnings

import pytest
import torch
from corruptions.real_pictures import real_pictures
from torch import Tensor

from lightning_robust.corruptions import CORRUPTIONS, SEVERITIES, TABLES, applicable, corrupt
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import untouched_random_state

MANY = [17, 4, 1000, 0, 3]
NORMALISED = PixelSpace(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
each_corruption = pytest.mark.parametrize("name", CORRUPTIONS)
random_ones = pytest.mark.parametrize(
    "name",
    sorted(
        set(CORRUPTIONS)
        - {"gaussian_blur", "defocus_blur", "zoom_blur", "brightness", "contrast", "saturate", "pixelate", "jpeg"}
    ),
)


def pictures(n: int = 5, channels: int = 3, height: int = 28, width: int = 28) -> Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(0))


@each_corruption
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [28, 70])
def test_a_picture_is_the_same_to_the_last_bit_in_any_batch(name: str, channels: int, side: int) -> None:
    if not applicable(name, channels):
        channels = 3
    x = pictures(5, channels, side, side)
    for severity in (1, 5):
        together = corrupt(x, name, severity, index=MANY)
        for rows in ([0], [4, 2], [1, 2, 3]):
            again = corrupt(x[rows], name, severity, index=torch.tensor([MANY[i] for i in rows]))
            assert torch.equal(again, together[rows])


@random_ones
def test_another_index_seed_or_severity_is_another_draw(name: str) -> None:
    x = pictures(1)
    made = corrupt(x, name, 3, index=[0])
    assert not torch.equal(made, corrupt(x, name, 3, index=[1]))
    assert not torch.equal(made, corrupt(x, name, 3, index=[0], seed=1))


def test_severities_and_corruptions_draw_independently() -> None:
    grey = torch.full((1, 1, 64, 64), 0.5)
    noises = [
        (corrupt(grey, name, severity, index=[0]) - 0.5).flatten()
        for name in ("gaussian_noise", "speckle_noise")
        for severity in (1, 2)
    ]
    others = torch.corrcoef(torch.stack(noises)) - torch.eye(4)
    assert float(others.abs().max()) < 4 / 64


@each_corruption
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_type_shape_and_range_stay(name: str, dtype: torch.dtype) -> None:
    x = pictures(2).to(dtype)
    for severity in (1, 5):
        made = corrupt(x, name, severity, index=[0, 1])
        assert (made.dtype, made.shape) == (dtype, x.shape)
        assert 0 <= made.min() <= made.max() <= 1


@each_corruption
def test_doubles_are_corrupted_as_floats_are(name: str) -> None:
    x = pictures(2)
    made = corrupt(x.double(), name, 3, index=[0, 1])
    torch.testing.assert_close(made, corrupt(x, name, 3, index=[0, 1]).double(), atol=1e-6, rtol=0)


@each_corruption
@pytest.mark.parametrize("table", TABLES)
def test_pictures_need_not_be_square_nor_large(name: str, table: str) -> None:
    for height, width in ((4, 4), (9, 30), (33, 8)):
        for severity in SEVERITIES:
            made = corrupt(pictures(2, 3, height, width), name, severity, index=[0, 1], table=table)
            assert made.shape == (2, 3, height, width)
            assert bool(torch.isfinite(made).all())


@each_corruption
def test_black_and_white_pictures_are_no_trouble(name: str) -> None:
    for value in (0.0, 1.0):
        for severity in SEVERITIES:
            made = corrupt(torch.full((1, 3, 16, 16), value), name, severity, index=[0])
            assert 0 <= made.min() <= made.max() <= 1


@each_corruption
def test_normalised_pictures_are_corrupted_as_plain_ones_are(name: str) -> None:
    x = real_pictures(32)
    expected = corrupt(x, name, 3, index=range(4))
    made = NORMALISED.to_pixels(corrupt(NORMALISED.to_model(x), name, 3, index=range(4), pixels=NORMALISED))
    # Round-off may tip a rounding or a count of photons here and there.
    assert float(((made - expected).abs() < 1e-5).float().mean()) > 0.99


def test_bounds_are_the_range_of_pixels() -> None:
    x = real_pictures(32)
    made = corrupt(255 * x, "fog", 2, index=range(4), pixels=PixelSpace(bounds=(0, 255)))
    torch.testing.assert_close(made / 255, corrupt(x, "fog", 2, index=range(4)))


@each_corruption
def test_global_streams_and_inputs_stay_as_they_are(name: str) -> None:
    x = pictures()
    with untouched_random_state() as state:
        corrupt(x, name, 5, index=MANY)
        assert state.is_current()
    assert torch.equal(x, pictures())


@each_corruption
def test_memory_format_autocast_and_inference_mode_make_no_difference(name: str) -> None:
    x = pictures()
    expected = corrupt(x, name, 4, index=MANY)
    assert torch.equal(corrupt(x.to(memory_format=torch.channels_last), name, 4, index=MANY), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(corrupt(x, name, 4, index=MANY), expected)
    with torch.inference_mode():
        assert torch.equal(corrupt(x.clone(), name, 4, index=MANY), expected)


@each_corruption
def test_results_carry_no_gradient_and_nothing_warns(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not corrupt(pictures().requires_grad_(), name, 2, index=MANY).requires_grad


@each_corruption
def test_no_pictures_make_no_pictures(name: str) -> None:
    assert corrupt(pictures(0), name, 1, index=[]).shape == (0, 3, 28, 28)


def test_a_table_can_be_chosen() -> None:
    x = pictures()
    weak, strong = (corrupt(x, "contrast", 5, index=MANY, table=table).std() for table in ("small", "imagenet"))
    assert float(strong) < float(weak) / 2
    assert torch.equal(corrupt(x, "contrast", 5, index=MANY).std(), weak)


def test_two_channels_are_corrupted_too() -> None:
    x = pictures(2, 2)
    for name in CORRUPTIONS:
        if applicable(name, 2):
            assert corrupt(x, name, 3, index=[0, 1]).shape == x.shape


@pytest.mark.parametrize("severity", [0, 6, -1, True, 2.5, "3"])
def test_other_severities_are_an_error(severity: int) -> None:
    with pytest.raises(ValueError, match=r"expected a severity in 1, 2, 3, 4, 5; got"):
        corrupt(pictures(), "fog", severity, index=MANY)


def test_an_unknown_corruption_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"got 'gausian_noise'\. Did you mean 'gaussian_noise'\?"):
        corrupt(pictures(), "gausian_noise", 1, index=MANY)
    with pytest.raises(ValueError, match=r"Did you mean 'saturate'\?"):
        applicable("saturation", 3)


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected tables out of imagenet, small; got 'tiny'"):
        corrupt(pictures(), "fog", 1, index=MANY, table="tiny")


@pytest.mark.parametrize(
    "x", [torch.tensor(0.5), torch.zeros(5, 8), torch.zeros(5, 3, 8), torch.zeros(5, 3, 3, 8), pictures().byte()]
)
def test_what_is_no_picture_is_an_error(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected float pictures \(N, C, H, W\) with sides of at least 4, got torch"):
        corrupt(x, "fog", 1, index=MANY)


def test_saturation_of_one_channel_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected three channels for 'saturate', got 1"):
        corrupt(pictures(5, 1), "saturate", 1, index=MANY)


def test_a_pixel_space_without_bounds_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"got PixelSpace\(bounds=None\).*e\.g\. bounds=\(0, 1\)"):
        corrupt(pictures(), "fog", 1, index=MANY, pixels=PixelSpace(bounds=None))


def test_one_index_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected one index per picture, got 4 for 5"):
        corrupt(pictures(), "fog", 1, index=MANY[:4])


def test_pictures_outside_the_bounds_are_an_error_unless_they_may_be() -> None:
    x = pictures() * 3 - 1
    with pytest.raises(ValueError, match=r"expected pixels within \[0, 1\]") as caught:
        corrupt(x, "fog", 1, index=MANY)
    assert "eps" not in str(caught.value)
    made = corrupt(x, "fog", 1, index=MANY, pixels=PixelSpace(outside="widen"))
    assert torch.equal(made, corrupt(x.clamp(0, 1), "fog", 1, index=MANY))


@pytest.mark.parametrize("pixels", [PixelSpace(), PixelSpace(outside="widen")])
def test_values_that_are_not_finite_are_an_error(pixels: PixelSpace) -> None:
    x = pictures()
    x[2, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="expected finite inputs, got 1 NaN"):
        corrupt(x, "contrast", 1, index=MANY, pixels=pixels)
