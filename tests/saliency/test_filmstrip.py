"""Filmstrips: what is where, in which colour, and that colours mean the same at all times."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_robust.pictures import BAD, GOOD, MARGIN, MIN_SIDE, diverging, sequential, text_width
from lightning_robust.randomness import seeded
from lightning_robust.saliency import filmstrip

SIDE, BAND, GAP = 112, 20, 6
LEGEND = GAP + 20  # with one line of text


def strip(maps: list[Tensor], captions: list[str] | None = None, **other: Any) -> Tensor:
    """A strip of grey inputs that are all seen as what they are, at 50 %, unless told otherwise."""
    n, side = len(maps[0]), maps[0].shape[-1]
    inputs: dict[str, Any] = {
        "images": torch.full((n, 1, side, side), 0.5),
        "labels": torch.arange(n),
        "predictions": torch.arange(n),
        "confidences": torch.full((n,), 0.5),
        "snapshots": list(zip(captions or [f"epoch {i}" for i in range(len(maps))], maps, strict=True)),
        "bounds": (0.0, 1.0),
    }
    return filmstrip(**(inputs | other))


def first_column(texts: list[str]) -> int:
    return max(SIDE, *(math.ceil(text_width(text)) + MARGIN for text in texts))


def tile(picture: Tensor, row: int, column: int, left: int, band: int = BAND, side: int = SIDE) -> Tensor:
    """One tile without its frame; column 0 is the input, and ``left`` pixels wide with its caption."""
    top = row * (band + side + GAP) + band
    start = 0 if column == 0 else left + GAP + (column - 1) * (side + GAP)
    return picture[:, top + 1 : top + side - 1, start + 1 : start + side - 1]


def noise(n: int, side: int = 28, seed: int = 0) -> Tensor:
    return torch.rand(n, side, side, generator=seeded(seed))


LEFT = first_column(["0, seen as 0 (50 %)"])


@pytest.mark.parametrize("times", [1, 2, 5])
def test_there_is_a_row_a_probe_and_a_column_a_snapshot_and_one_for_the_change(times: int) -> None:
    picture = strip([noise(3, seed=i) for i in range(times)])
    columns = times + (times > 1)
    assert picture.shape[2] == LEFT + columns * (GAP + SIDE)
    assert picture.shape[1] >= 3 * (BAND + SIDE) + 2 * GAP + LEGEND
    assert float(picture.min()) >= 0
    assert float(picture.max()) <= 1


def test_nothing_is_dark_and_much_is_bright() -> None:
    maps = torch.zeros(1, 28, 28)
    maps[0, :14] = 1  # half of the inputs have all: twice the average share, the end of the scale
    shown = tile(strip([maps]), 0, 1, LEFT)
    assert torch.equal(shown[:, 20, 60], sequential(torch.ones(1, 1))[:, 0, 0])
    assert torch.equal(shown[:, 90, 60], sequential(torch.zeros(1, 1))[:, 0, 0])


def test_maps_with_signs_are_blue_white_and_red() -> None:
    maps = torch.zeros(1, 28, 28)
    maps[0, :7], maps[0, 21:] = 1, -1
    shown = tile(strip([maps]), 0, 1, LEFT)
    for place, value in ((10, 1.0), (55, 0.0), (100, -1.0)):
        assert torch.equal(shown[:, place, 60], diverging(torch.full((1, 1), value))[:, 0, 0])


def test_the_scale_is_the_top_percent_of_the_first_map() -> None:
    first = torch.zeros(1, 10, 10)
    first.view(-1)[:20] = torch.arange(1.0, 21.0)  # mean 2.1
    later = torch.zeros(1, 10, 10)
    later[0, 0, 0], later[0, 9] = 2.0, 0.8  # mean .1
    scale = float((first.flatten() / 2.1).quantile(0.99))
    shown = tile(strip([first, later]), 0, 2, left=120, side=120)
    assert torch.equal(shown[:, 5, 5], sequential(torch.ones(1, 1))[:, 0, 0])  # 20 times the average, cut off
    assert torch.equal(shown[:, 115, 60], sequential(torch.full((1, 1), 8 / scale))[:, 0, 0])


def test_colours_mean_the_same_at_all_times() -> None:
    a, b, c = (noise(2, seed=i) ** 3 for i in range(3))
    short, long = strip([a, b]), strip([a, c, 100 * b, b])
    for row in range(2):
        assert torch.equal(tile(long, row, 1, LEFT), tile(short, row, 1, LEFT))
        # A map keeps its colours, whatever came in between; and the size of the gradients says nothing.
        assert torch.equal(tile(long, row, 3, LEFT), tile(short, row, 2, LEFT))
        assert torch.equal(tile(long, row, 4, LEFT), tile(short, row, 2, LEFT))
        assert torch.equal(tile(long, row, 5, LEFT), tile(short, row, 3, LEFT))


def test_more_attention_than_at_first_is_red_less_is_blue_and_none_white() -> None:
    first, now = torch.zeros(1, 28, 28), torch.zeros(1, 28, 28)
    first[0, :14], now[0, 7:21] = 1, 3
    shown = tile(strip([first, now]), 0, 3, LEFT)
    for place, value in ((10, -1.0), (40, 0.0), (70, 1.0), (100, 0.0)):
        assert torch.equal(shown[:, place, 60], diverging(torch.full((1, 1), value))[:, 0, 0])
    still = tile(strip([first, 5 * first]), 0, 3, LEFT)
    assert torch.equal(still, diverging(torch.zeros(SIDE - 2, SIDE - 2)))


def test_empty_and_broken_maps_are_dark_and_do_not_light_up_what_comes_later() -> None:
    empty, later = torch.zeros(1, 28, 28), torch.ones(1, 28, 28)
    broken = torch.full((1, 28, 28), torch.nan)
    picture = strip([empty, broken, later])
    for column, share in ((1, 0.0), (2, 0.0), (3, 0.5)):  # an even map is half way: its average is half the scale
        assert torch.equal(
            tile(picture, 0, column, LEFT), sequential(torch.full((1, 1), share)).expand(3, SIDE - 2, SIDE - 2)
        )


def colours_of(text: Tensor) -> Tensor:
    return text[:, (text < 1).any(0)].amin(1)


def test_captions_are_green_if_right_and_red_if_wrong() -> None:
    picture = strip([noise(2)], predictions=torch.tensor([0, 0]), confidences=torch.tensor([0.824, 1.0]))
    left = first_column(["0, seen as 0 (82 %)", "1, seen as 0 (100 %)"])
    second = BAND + SIDE + GAP
    for top, expected in ((0, GOOD), (second, BAD)):
        ink = colours_of(picture[:, top : top + BAND, :left])
        torch.testing.assert_close(ink, torch.tensor(expected) / 255, atol=0.02, rtol=0)


@pytest.mark.parametrize("names", [None, ["aeroplane", "automobile", "a dog of an uncommonly long name"]])
def test_captions_do_not_reach_into_tiles_or_each_other(names: list[str] | None) -> None:
    captions = ["first: epoch 0", "previous snapshot: epoch 1048576", "now: epoch 12"]
    maps = [torch.zeros(3, 28, 28)] * 3
    black = torch.zeros(3, 1, 28, 28)
    picture = strip(maps, captions, names=names, images=black)
    left = picture.shape[2] - 4 * (SIDE + GAP)
    lines = next(n for n in range(1, 9) if picture[:, n * 15 + 5, 5].lt(0.9).all())
    band = 15 * lines + 5
    assert lines > 1
    for row in range(3):
        assert bool((tile(picture, row, 0, left, band) == 0).all())
        for column in (1, 2, 3):
            dark = sequential(torch.zeros(SIDE - 2, SIDE - 2))
            assert torch.equal(tile(picture, row, column, left, band), dark)
        top = row * (band + SIDE + GAP)
        for column in range(4):
            start = left + column * (SIDE + GAP)
            assert bool((picture[:, top : top + band, start : start + GAP] == 1).all())
            assert bool((picture[:, top : top + band, start + GAP : start + GAP + SIDE] < 0.5).any())


def test_below_are_words_for_each_colour_map_beside_its_bar() -> None:
    for maps, bars in ((noise(2), [sequential]), (noise(2) - 0.5, [diverging])):
        picture = strip([maps] * 5)
        legend = picture[:, -40:]
        assert bool((picture[:, -46:-40] == 1).all())
        for colours, top in zip([*bars, diverging], (0, 20), strict=True):
            ends = torch.tensor([[0.0 if colours is sequential else -1.0, 1.0]])
            assert torch.equal(legend[:, top + 8, [0, 63]], colours(ends)[:, 0])
            words = (legend[:, top : top + 20, 70:] < 0.5).all(0)
            assert int(words.any(1).sum()) >= 11  # rows of ink: the text is that high
    assert not torch.equal(strip([noise(2)] * 5)[:, -40:], strip([noise(2) - 0.5] * 5)[:, -40:])


def test_a_narrow_strip_has_the_legend_on_several_lines() -> None:
    one = strip([noise(1)])
    assert one.shape[1] - (BAND + SIDE) >= GAP + 3 * 15 + 5


@pytest.mark.parametrize(
    ("side", "shown"), [(8, 112), (28, 112), (96, 192), (200, 200), (224, 112), (512, 128), (600, 120)]
)
def test_tiles_are_large_enough_to_be_seen_and_small_enough_to_be_stored(side: int, shown: int) -> None:
    picture = strip([noise(1, side)] * 2)
    assert picture.shape[2] == max(LEFT, shown) + 3 * (GAP + shown)
    assert shown >= MIN_SIDE


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="0 snapshots"):
        filmstrip(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1), torch.zeros(1), [], (0.0, 1.0))
    with pytest.raises(ValueError, match=r"expected maps \(2, 28, 28\) .* got \(2, 14, 14\) in 'epoch 1'"):
        strip([noise(2), noise(2, 14)])
    with pytest.raises(ValueError, match=r"needs images \(N, C, H, W\)"):
        strip([noise(2)], images=torch.zeros(2, 28))


def test_eight_rows_of_seven_columns_take_well_below_a_tenth_of_a_second() -> None:
    maps = [noise(8, 32, seed=i) for i in range(5)]
    strip(maps)
    taken = []
    for _ in range(5):
        start = time.process_time()
        strip(maps)
        taken.append(time.process_time() - start)
    assert min(taken) < 0.1
