"""Inputs under their maps: grey where the map is nothing, its colour where it is everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_robust.pictures import BAD, GOOD, INK, diverging, sequential
from lightning_robust.saliency.overlays import overlaid, overlays

SIDE, GAP = 112, 6  # of a tile that is not enlarged, and between tiles
CAPTION, LINE = 20, 15  # heights of a caption of one line, and of each line more


def picture(n: int, caption: str = "3", right: bool = True) -> Tensor:
    return overlays(torch.rand(n, 1, SIDE, SIDE), torch.rand(n, SIDE, SIDE), [caption] * n, [right] * n, (0.0, 1.0))


def has(area: Tensor, color: tuple[int, int, int]) -> bool:
    return bool(((area - torch.tensor(color)[:, None, None] / 255).abs() < 0.02).all(0).any())


def test_the_picture_shines_through_in_grey_where_the_map_is_nothing() -> None:
    images = torch.rand(2, 3, SIDE, SIDE)
    mixed = overlaid(images, torch.zeros(2, SIDE, SIDE))
    assert torch.equal(mixed, images.mean(1, keepdim=True).expand_as(images))


def test_the_colour_covers_the_picture_where_the_map_is_everything() -> None:
    images, ones = torch.rand(2, 3, SIDE, SIDE), torch.ones(2, SIDE, SIDE)
    torch.testing.assert_close(overlaid(images, ones), sequential(ones))


def test_in_between_the_two_are_mixed_by_the_amount() -> None:
    images, amounts = torch.rand(2, 3, SIDE, SIDE), torch.rand(2, SIDE, SIDE)
    cover = amounts[:, None]
    expected = (1 - cover) * images.mean(1, keepdim=True) + cover * sequential(amounts)
    torch.testing.assert_close(overlaid(images, amounts), expected)


def test_what_speaks_against_the_class_covers_as_much_in_blue() -> None:
    images, amounts = torch.rand(1, 3, SIDE, SIDE), torch.ones(1, SIDE, SIDE)
    amounts[..., : SIDE // 2] = -1
    torch.testing.assert_close(overlaid(images, amounts), diverging(amounts))
    red, _, blue = overlaid(images, amounts)[0]
    assert bool((blue > red)[:, : SIDE // 2].all())
    assert bool((blue < red)[:, SIDE // 2 :].all())


def test_small_maps_are_enlarged_to_the_size_of_the_picture() -> None:
    images, amounts = torch.rand(1, 3, SIDE, SIDE), torch.rand(1, 14, 14)
    cells = amounts.repeat_interleave(8, 1).repeat_interleave(8, 2)
    torch.testing.assert_close(overlaid(images, amounts), overlaid(images, cells))


@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 1), (3, 1, 3), (4, 1, 4), (5, 2, 4), (9, 3, 4)])
def test_there_are_four_tiles_in_a_row(n: int, rows: int, columns: int) -> None:
    high, wide = CAPTION + SIDE + GAP, SIDE + GAP
    assert picture(n).shape == (3, rows * high - GAP, columns * wide - GAP)


def test_what_is_left_of_the_last_row_is_white() -> None:
    assert bool((picture(5)[:, CAPTION + SIDE + GAP :, SIDE + GAP :] == 1).all())


def test_the_tile_of_a_map_with_one_place_is_grey_but_there() -> None:
    image, maps = torch.rand(1, 1, SIDE, SIDE), torch.zeros(1, SIDE, SIDE)
    maps[:, :20, :20] = 1
    tile = overlays(image, maps, ["3"], [True], (0.0, 1.0))[:, CAPTION:]
    torch.testing.assert_close(tile[:, 20:, 20:], image[0, :, 20:, 20:].expand(3, -1, -1))
    torch.testing.assert_close(tile[:, :20, :20], sequential(torch.ones(20, 20)))


@pytest.mark.parametrize(("right", "color", "other"), [(True, GOOD, BAD), (False, BAD, GOOD)])
def test_captions_are_green_where_the_prediction_is_right_and_red_where_it_is_not(
    right: bool, color: tuple[int, int, int], other: tuple[int, int, int]
) -> None:
    caption = picture(1, "MMMM", right)[:, :CAPTION]
    assert has(caption, color)
    assert not has(caption, other)
    assert not has(caption, INK)


def test_captions_that_are_too_long_are_wrapped_and_make_all_tiles_as_high() -> None:
    x, maps = torch.rand(2, 1, SIDE, SIDE), torch.rand(2, SIDE, SIDE)
    captions = ["cat", "a long caption of an animal with a long name"]
    found = overlays(x, maps, captions, [True, True], (0.0, 1.0))
    lines = (found.shape[1] - SIDE - CAPTION) // LINE + 1
    assert lines > 1
    assert found.shape == (3, CAPTION + (lines - 1) * LINE + SIDE, 2 * SIDE + GAP)
