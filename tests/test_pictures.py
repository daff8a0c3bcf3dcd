from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lightning_robust.pictures import (
    MIN_SIDE,
    TEXT_HEIGHT,
    attack_strips,
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

BAND = TEXT_HEIGHT + 8


@pytest.mark.parametrize(
    ("shape", "side"), [((2, 1, 28, 28), (112, 112)), ((2, 3, 32, 32), (128, 128)), ((1, 5, 224, 112), (224, 112))]
)
def test_small_images_are_enlarged_by_a_whole_factor_and_large_ones_are_not(
    shape: tuple[int, ...], side: tuple[int, int]
) -> None:
    picture = to_rgb(torch.rand(shape), 0.0, 1.0)
    assert picture.shape == (shape[0], 3, *side)
    assert max(side) >= MIN_SIDE


def test_three_channels_are_colours_and_other_numbers_are_grey() -> None:
    colours = torch.rand(1, 3, 112, 112)
    assert torch.equal(to_rgb(colours, 0.0, 1.0), colours)
    many = torch.rand(1, 4, 112, 112)
    torch.testing.assert_close(to_rgb(many, 0.0, 1.0), many.mean(1, keepdim=True).expand(1, 3, 112, 112))


def test_the_pixel_range_becomes_black_to_white_and_what_leaves_it_is_clipped() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 9.0]).view(5, 1, 1, 1).expand(5, 3, 112, 112)
    picture = to_rgb(values, -1.0, 1.0)
    assert picture.flatten(1).amin(1).tolist() == picture.flatten(1).amax(1).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_pictures_of_inputs_that_need_gradients_do_not_need_them() -> None:
    assert not to_rgb(torch.rand(1, 1, 8, 8, requires_grad=True), 0.0, 1.0).requires_grad


def test_a_caption_is_a_white_band_with_ink_above_an_unchanged_image() -> None:
    image = torch.rand(3, 40, 120)
    picture = captioned(image, "7 seen as 1", color=(180, 30, 30))
    assert picture.shape == (3, 40 + BAND, 120)
    assert torch.equal(picture[:, BAND:], image)
    band = picture[:, :BAND]
    assert float(band.max()) == 1.0
    ink = (band < 1).any(0)
    assert int(ink.any(1).sum()) >= 8  # rows of text
    assert 20 <= int(ink.any(0).sum()) <= 118
    darkest = band[:, ink].amin(1)
    torch.testing.assert_close(darkest, torch.tensor([180.0, 30.0, 30.0]) / 255, atol=0.02, rtol=0)


def test_other_words_make_another_band_and_no_words_leave_it_white() -> None:
    image = torch.zeros(3, 8, 120)
    assert not torch.equal(captioned(image, "one"), captioned(image, "two"))
    assert bool((captioned(image, "")[:, :BAND] == 1).all())


def test_a_table_has_every_image_in_its_place_and_white_gaps() -> None:
    cells = [[torch.full((3, 4, 5), (3 * i + j) / 10) for j in range(3)] for i in range(2)]
    picture = table_of(cells, gap=2)
    assert picture.shape == (3, 2 * 4 + 2, 3 * 5 + 2 * 2)
    for i in range(2):
        for j in range(3):
            assert torch.equal(picture[:, i * 6 : i * 6 + 4, j * 7 : j * 7 + 5], cells[i][j])
    assert bool((picture[:, 4:6] == 1).all())
    assert bool((picture[:, :, 5:7] == 1).all())


@pytest.mark.parametrize("channels", [1, 3])
def test_attack_strips_have_a_row_a_sample_and_three_columns_of_colours_in_range(channels: int) -> None:
    clean = torch.rand(4, channels, 28, 28)
    labels = torch.arange(4)
    strips = attack_strips(clean, (clean + 0.3).clamp(max=1), labels, labels, labels.flip(0), (0.0, 1.0))
    assert strips.shape == (3, 4 * (112 + BAND) + 3 * 6, 3 * 112 + 2 * 6)
    assert float(strips.min()) >= 0
    assert float(strips.max()) <= 1


def test_the_largest_change_is_black_or_white_half_of_it_halfway_and_no_change_grey() -> None:
    clean = torch.full((1, 1, 112, 112), 100.0)
    changed = clean.clone()
    changed[..., 0, :3] = torch.tensor([108.0, 92.0, 104.0])
    zero = torch.zeros(1, dtype=torch.long)
    strip = attack_strips(clean, changed, zero, zero, zero, (0.0, 255.0))
    middle = strip[0, BAND:, 118 : 118 + 112]
    assert [*middle[0, :3].tolist(), float(middle[5, 5])] == pytest.approx([1.0, 0.0, 0.75, 0.5])
    unchanged = attack_strips(clean, clean, zero, zero, zero, (0.0, 255.0))[0, BAND:, 118 : 118 + 112]
    assert bool((unchanged == 0.5).all())


@pytest.mark.parametrize(("side", "shown"), [(8, 112), (57, 114), (96, 192), (111, 222), (112, 112), (300, 300)])
def test_whatever_its_size_no_picture_is_too_small_to_be_seen(side: int, shown: int) -> None:
    assert enlarged(torch.rand(1, 2, side, side // 2)).shape == (1, 2, shown, shown // side * (side // 2))


def lightness(colours: torch.Tensor) -> torch.Tensor:
    """L* of CIELAB, 0 to 100, from the sRGB values."""
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    y = (linear * torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1)).sum(0)
    return torch.where(y > 0.008856, 116 * y ** (1 / 3) - 16, 903.3 * y)


def test_more_is_brighter_all_the_way_and_in_even_steps() -> None:
    light = lightness(sequential(torch.linspace(0, 1, 6)[None])[:, 0])
    assert float(light[0]) < 5
    assert float(light[-1]) > 90
    steps = light.diff()
    assert float(steps.min()) > 0.5 * float(steps.mean())
    assert float(steps.max()) < 1.6 * float(steps.mean())
    assert bool((lightness(sequential(torch.linspace(0, 1, 255)[None])[:, 0]).diff() > 0).all())


def test_both_signs_are_equally_strong_colours_and_nothing_is_white() -> None:
    colours = diverging(torch.linspace(-1, 1, 255)[None])[:, 0]
    assert colours[:, 127].tolist() == pytest.approx([250 / 255] * 3)
    assert bool((colours[2, :100] > colours[0, :100]).all())  # blue
    assert bool((colours[0, 155:] > colours[2, 155:]).all())  # red
    light = lightness(colours)
    torch.testing.assert_close(light[:127], light[128:].flip(0), atol=8.0, rtol=0)


@pytest.mark.parametrize("colours", [sequential, diverging])
def test_colours_have_the_shape_of_what_they_show_and_stop_at_the_ends(colours: Callable[..., torch.Tensor]) -> None:
    amounts = torch.tensor([[1.0, 5.0], [1e9, torch.inf]]).expand(3, 4, 2, 2)
    assert colours(amounts).shape == (3, 4, 3, 2, 2)
    assert torch.equal(colours(amounts), colours(torch.ones(3, 4, 2, 2)))
    low = -torch.ones(1, 2)
    assert torch.equal(colours(9 * low), colours(low))


def test_each_line_of_text_has_its_own_rows() -> None:
    both, first = written("one\ntwo", 112), written("one", 112)
    assert both.shape == (3, BAND + 15, 112)
    assert torch.equal(both[:, :17], first[:, :17])
    assert bool((both[:, 17:] < 0.5).any())


def test_text_that_is_too_long_ends_in_dots_inside_of_its_width() -> None:
    band = written("a very long caption that does not fit into this width", 100)
    assert bool((band[:, :, 98:] == 1).all())
    assert bool((band[:, :, 80:98] < 0.5).any())
    assert torch.equal(written("fits", 100), written("fits\n", 100)[:, :BAND])
    assert bool((written("nothing fits", 8) == 1).all())


def test_wrapped_text_keeps_its_words_and_fits() -> None:
    text = "bright: the model looks here, dark: this does not matter."
    lines = wrapped(text, 120).split("\n")
    assert " ".join(lines) == text
    assert len(lines) > 2
    assert all(text_width(line) <= 116 for line in lines)
    assert wrapped(text, 1000) == text
    assert wrapped("one incomprehensibilities", 40) == "one\nincomprehensibilities"
