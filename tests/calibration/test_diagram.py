"""The diagram: bars as high as accuracies, and numbers that a reader can trust."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_robust.calibration import Reliability, reliability_diagram
from lightning_robust.calibration.diagram import BAR, BOTTOM, LEFT, RIGHT, STRIP, STRIP_BOTTOM, STRIP_TOP, TOP
from lightning_robust.intervals import wilson


def counted(bins: int = 10, **filled: tuple[int, int]) -> Reliability:
    """``b7=(200, 150)``: bin 7 holds 200 predictions, 150 of them right."""
    state = Reliability.zero(bins).state()
    for name, (count, right) in filled.items():
        m = int(name[1:])
        state[m], state[bins + m], state[2 * bins + m] = count, count * (m + 0.5) / bins, right
    return Reliability.load(state)


def rows_of(picture: Tensor, color: tuple[int, int, int], column: int) -> list[int]:
    """In which rows a column of pixels has a colour."""
    match = (picture[:, :, column] * 255).round() == torch.tensor(color)[:, None]
    return torch.nonzero(match.all(0))[:, 0].tolist()


def column(confidence: float) -> int:
    return round(LEFT + confidence * (RIGHT - LEFT))


def test_a_picture_has_three_channels_of_floats_from_zero_to_one() -> None:
    picture = reliability_diagram(counted(b7=(200, 150)), "validation, epoch 3")
    assert picture.shape == (3, 420, 420)
    assert picture.dtype == torch.float32
    assert (float(picture.min()), float(picture.max())) == (pytest.approx(0.08, abs=0.08), 1.0)


@pytest.mark.parametrize("accuracy", [0.25, 0.5, 1.0])
def test_a_bar_is_as_high_as_its_accuracy(accuracy: float) -> None:
    picture = reliability_diagram(counted(b2=(10_000, round(10_000 * accuracy))))
    bar = rows_of(picture, BAR, column(0.22))  # beside the whisker
    assert bar[0] == pytest.approx(BOTTOM - accuracy * (BOTTOM - TOP), abs=1)
    assert bar[-1] == BOTTOM
    assert not rows_of(picture, BAR, column(0.32))


def test_the_strip_shows_where_predictions_are() -> None:
    picture = reliability_diagram(counted(b3=(100, 50), b8=(400, 300)))
    few, most, none = (rows_of(picture, STRIP, column(at)) for at in (0.35, 0.85, 0.55))
    height = STRIP_BOTTOM - STRIP_TOP
    assert len(most) == pytest.approx(height + 1, abs=1)
    assert len(few) == pytest.approx(height / 4 + 1, abs=1)
    assert none == []


def test_few_predictions_have_a_long_whisker() -> None:
    def whisker(n: int) -> int:
        picture = reliability_diagram(counted(b7=(n, n // 2)))
        dark = rows_of(picture, (20, 20, 20), (column(0.7) + column(0.8)) // 2)
        return len([row for row in dark if TOP <= row < BOTTOM])

    assert whisker(10) > 2 * whisker(100) > 0


def test_the_band_is_wilsons() -> None:
    # Ten of ten: the lower end is 1 / (1 + z**2 / n), the upper end 1.
    assert wilson(1.0, 10) == (pytest.approx(1 / (1 + 1.96**2 / 10)), pytest.approx(1.0))
    low, high = wilson(0.5, 10**6)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 1000, rel=1e-4)


def test_the_title_and_the_numbers_are_written() -> None:
    empty, plain = Reliability.zero(), counted(b7=(200, 150))
    head = slice(0, TOP - 22)
    with_title, without = reliability_diagram(plain, "test"), reliability_diagram(plain)
    assert not torch.equal(with_title[:, :24], without[:, :24])
    assert torch.equal(with_title[:, 24:], without[:, 24:])
    assert not torch.equal(reliability_diagram(empty)[:, head], without[:, head])


def test_nothing_counted_is_drawn_as_nothing() -> None:
    picture = reliability_diagram(Reliability.zero())
    assert not any(rows_of(picture, color, x) for color in (BAR, STRIP) for x in range(LEFT + 1, RIGHT))


def test_beside_each_other_both_panels_are_drawn_on_the_same_axes() -> None:
    one, other = counted(b7=(200, 150)), counted(b7=(100, 20), b9=(100, 90))
    both = reliability_diagram(one, "test", beside=other)
    assert both.shape == (3, 420, 840)
    left, right = both[:, :, :420], both[:, :, 420:]
    below = slice(TOP - 22, None)
    assert torch.equal(left[:, below], reliability_diagram(one)[:, below])
    assert rows_of(right, BAR, column(0.72))[0] == pytest.approx(BOTTOM - 0.2 * (BOTTOM - TOP), abs=1)
    assert not rows_of(left, BAR, column(0.92))


def test_beside_each_other_the_strips_have_one_scale() -> None:
    both = reliability_diagram(counted(b7=(200, 150)), beside=counted(b7=(100, 20), b9=(100, 90)))
    left, right = (len(rows_of(half, STRIP, column(0.75))) for half in (both[:, :, :420], both[:, :, 420:]))
    assert left == pytest.approx(2 * right, abs=2)


def test_each_panel_has_its_name() -> None:
    one, head = counted(b7=(200, 150)), slice(0, 24)
    usual = reliability_diagram(one, "test", one)[:, head]
    named = reliability_diagram(one, "test", one, ("a", "b"))[:, head]
    assert not torch.equal(usual[:, :, :420], named[:, :, :420])
    assert not torch.equal(usual[:, :, 420:], named[:, :, 420:])
    assert torch.equal(reliability_diagram(one, "test: a")[:, head], named[:, :, :420])
