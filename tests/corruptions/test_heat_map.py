"""The heat map: a brighter cell for a larger number, a mean for each row, and hatching where nothing was measured."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_robust.corruptions import shift_heat_map
from lightning_robust.corruptions.heat_map import NONE, _box
from lightning_robust.pictures import sequential


def corner(picture: Tensor, row: int, column: int, severities: int) -> Tensor:
    """The colour of a cell, away from its number."""
    left, top, _, _ = _box(row, column, severities)
    return picture[:, top + 1, left + 1]


def shade(share: float) -> Tensor:
    return sequential(torch.tensor([[share]]))[:, 0, 0]


def test_a_picture_has_three_channels_of_floats_from_zero_to_one() -> None:
    picture = shift_heat_map({("fog", 1): 0.5}, "validation")
    assert picture.shape[0] == 3
    assert picture.dtype == torch.float32
    assert 0 <= picture.min() <= picture.max() == 1


def test_cells_and_means_have_the_colour_of_their_number() -> None:
    picture = shift_heat_map({("fog", 1): 0.9, ("fog", 2): 0.3, ("snow", 1): 0.2, ("snow", 2): 0.4}, "")
    for row, numbers in enumerate([(0.9, 0.3, 0.6), (0.2, 0.4, 0.3)]):
        for column, number in enumerate(numbers):
            torch.testing.assert_close(corner(picture, row, column, 2), shade(number), atol=1e-2, rtol=0)


def test_the_range_stretches_the_colours() -> None:
    picture = shift_heat_map({("fog", 1): 5.0, ("fog", 2): 10.0, ("fog", 3): 99.0}, "", low=5, high=10)
    for column, share in enumerate([0.0, 1.0, 1.0]):
        torch.testing.assert_close(corner(picture, 0, column, 3), shade(share), atol=1e-2, rtol=0)


@pytest.mark.parametrize("missing", [None, math.nan])
def test_what_is_missing_is_hatched_and_no_part_of_the_mean(missing: float | None) -> None:
    values = {("fog", 1): 0.9, ("fog", 2): 0.7, ("snow", 1): 0.5}
    if missing is not None:
        values["snow", 2] = missing
    picture = shift_heat_map(values, "")
    left, top, right, bottom = _box(1, 1, 2)
    cell = picture[:, top : bottom + 1, left : right + 1]
    assert cell.mean((1, 2)).tolist() == pytest.approx([x / 255 for x in NONE], abs=0.06)
    assert len(cell.flatten(1).unique(dim=1).T) == 2
    torch.testing.assert_close(corner(picture, 1, 2, 2), shade(0.5), atol=1e-2, rtol=0)


def test_a_row_without_any_number_is_hatched_throughout() -> None:
    picture = shift_heat_map({("fog", 1): 0.9, ("snow", 1): math.nan}, "")
    for column in (0, 1):
        assert corner(picture, 1, column, 1).tolist() == pytest.approx([x / 255 for x in NONE], abs=0.2)


def test_a_larger_table_makes_a_larger_picture() -> None:
    small = shift_heat_map({("fog", 1): 0.5}, "")
    large = shift_heat_map({(name, s): 0.5 for name in ("fog", "snow") for s in (1, 2, 3)}, "")
    assert large.shape[1] > small.shape[1]
    assert large.shape[2] > small.shape[2]


def test_the_number_without_corruption_is_written_down() -> None:
    values = {("fog", 1): 0.5}
    assert not torch.equal(shift_heat_map(values, "", clean=0.9), shift_heat_map(values, ""))


def test_that_brighter_is_worse_is_written_above_errors() -> None:
    values = {("fog", 1): 0.5, ("fog", 2): 0.7}
    plain, error = shift_heat_map(values, "", error=False), shift_heat_map(values, "", error=True)
    differs = (plain != error).any(0).any(1).nonzero()
    assert 20 < int(differs.min()) <= int(differs.max()) < 44  # in the second line, and nowhere else


@pytest.mark.parametrize(("values", "low", "high"), [({}, 0.0, 1.0), ({("fog", 1): 0.5}, 1.0, 1.0)])
def test_nothing_to_draw_and_no_range_are_errors(values: dict[tuple[str, int], float], low: float, high: float) -> None:
    with pytest.raises(ValueError, match="at least one value, and low < high"):
        shift_heat_map(values, "", low=low, high=high)
