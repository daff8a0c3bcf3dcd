"""What one feature is, and how far it ranges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_robust.penalties.features import channels_of, ranges, spread


def test_an_image_ranges_by_its_own_channels() -> None:
    x = torch.rand(2, 3, 4, 5)
    low, high = ranges(x, 1)
    assert low.shape == high.shape == (2, 3, 1, 1)
    assert torch.equal(low[1, 2, 0, 0], x[1, 2].min())
    assert torch.equal(high[0, 1, 0, 0], x[0, 1].max())


def test_without_channels_it_ranges_as_a_whole() -> None:
    x = torch.rand(2, 3, 4)
    assert torch.equal(ranges(x, None)[1].flatten(), x.flatten(1).max(1).values)


def test_the_last_dimension_may_be_that_of_channels() -> None:
    x = torch.rand(2, 7, 3)
    assert torch.equal(ranges(x, -1)[0].squeeze(1), x.amin(1))


def test_a_table_ranges_by_its_columns() -> None:
    x = torch.rand(6, 4)
    assert torch.equal(ranges(x, 1)[0][0], x.min(0).values)


@pytest.mark.parametrize("dim", [0, 4, -4])
def test_a_dimension_that_cannot_be_that_of_channels_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=rf"channel_dim={dim} is no dimension of features .*expected 1 to 3"):
        channels_of(torch.zeros(2, 3, 4, 5), dim)


def test_a_mask_without_channels_is_spread_over_them() -> None:
    mask = torch.tensor([[[1, 0], [0, 1]]])
    assert torch.equal(spread(mask, torch.zeros(1, 3, 2, 2)), mask[:, None].float().expand(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("shape", "mask", "expected"),
    [
        ((2, 5, 3), (2, 5), (2, 5, 1)),  # a sequence: points in time
        ((2, 3, 5), (2, 5), (2, 1, 5)),  # a signal: places in all channels
        ((2, 1, 5), (2, 5), (2, 1, 5)),
        ((2, 5, 5), (2, 1), (2, 1, 1)),
        ((2, 3, 3, 3), (2, 3, 3), (2, 1, 3, 3)),  # images: channels come first
    ],
)
def test_a_mask_lacks_the_dimension_that_its_size_says(shape: Any, mask: Any, expected: Any) -> None:
    marks = (torch.rand(mask) < 0.5).float()
    assert torch.equal(spread(marks, torch.zeros(shape)), marks.reshape(expected).expand(shape))


def test_a_mask_that_fits_in_two_ways_is_asked_for_its_dimension() -> None:
    x, marks = torch.zeros(2, 5, 5), torch.eye(2, 5)
    with pytest.raises(ValueError, match=r"fits inputs \(2, 5, 5\) in two ways: make it \(2, 1, 5\) .* or \(2, 5, 1\)"):
        spread(marks, x)
    assert torch.equal(spread(marks[:, :, None], x)[0].nonzero()[:, 0], torch.zeros(5).long())
