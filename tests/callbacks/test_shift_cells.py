"""Cells, in which order they are measured, and what can be corrupted."""

from __future__ import annotations

import torch

from lightning_robust.callbacks.shift_cells import Cell, cells_of, corrupted, first_cells, is_picture
from lightning_robust.pixels import PixelSpace


def test_cells_are_called_as_log_keys_have_them() -> None:
    assert (Cell("fog", 3).key, Cell("other").key) == ("fog_3", "other")


def test_the_first_cells_are_of_all_corruptions_at_one_severity_before_the_next() -> None:
    every = cells_of(["fog", "contrast", "jpeg"], [1, 3, 5])
    chosen = first_cells(every, 4, every, seed=0)
    assert [cell.severity for cell in chosen] == [3, 3, 3, 5]
    assert {cell.name for cell in chosen[:3]} == {"fog", "contrast", "jpeg"}
    assert set(first_cells(every, None, every, seed=0)) == set(every)


def test_the_order_does_not_depend_on_what_is_left_to_choose_from() -> None:
    every = cells_of(["fog", "contrast", "jpeg"], [3])
    order = first_cells(every, None, every, seed=1)
    assert first_cells(order[1:], None, every, seed=1) == order[1:]


def test_bytes_stay_bytes_and_are_corrupted_like_numbers() -> None:
    x = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).remainder(256).to(torch.uint8)
    settings = {"seed": 0, "table": "small", "pixels": PixelSpace()}
    cell, index = Cell("contrast", 3), torch.arange(2)
    made = corrupted(cell, x, index, **settings)  # type: ignore[arg-type]  # of several kinds
    numbers = corrupted(cell, x / 255, index, **settings)  # type: ignore[arg-type]  # likewise
    assert made.dtype == torch.uint8
    assert float((made - 255 * numbers).abs().max()) < 0.51


def test_pictures_are_float_or_bytes_and_large_enough() -> None:
    for picture in (torch.zeros(1, 1, 4, 9), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)):
        assert is_picture(picture, 4)
    for other in (torch.zeros(1, 1, 3, 9), torch.zeros(1, 4, 9), torch.zeros(1, 1, 8, 8, dtype=torch.long)):
        assert not is_picture(other, 4)
