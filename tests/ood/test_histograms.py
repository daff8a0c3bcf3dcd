"""The picture of a score: areas, lines and a threshold where they belong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_robust.ood import score_histograms
from lightning_robust.ood.histograms import BOTTOM, FOREIGN, LEFT, OWN, RIGHT, THRESHOLD, TOP

EDGES = torch.linspace(-8, 0, 5)
OWN_COUNTS = torch.tensor([50.0, 100.0, 50.0, 0.0])
FAR = {"svhn": torch.tensor([0.0, 0.0, 1.0, 3.0])}


def rows_of(picture: Tensor, colour: tuple[int, int, int], column: int) -> list[int]:
    """In which rows of the plot a column of pixels has a colour."""
    match = (picture[:, :, column] * 255).round() == torch.tensor(colour)[:, None]
    return [row for row in torch.nonzero(match.all(0))[:, 0].tolist() if TOP <= row < BOTTOM]


def column(score: float) -> int:
    return round(LEFT + (RIGHT - LEFT) * (score + 8) / 8)


def height(share: float, highest: float) -> int:
    return round(BOTTOM - (BOTTOM - TOP) * share / highest)


def test_a_picture_has_three_channels_of_floats_from_zero_to_one() -> None:
    picture = score_histograms(OWN_COUNTS, FAR, EDGES, -2.5, "energy", {"svhn": 0.9})
    assert picture.shape == (3, 440, 560)
    assert picture.dtype == torch.float32
    assert 0 <= float(picture.min()) < 0.2
    assert float(picture.max()) == 1.0


def test_own_data_are_an_area_as_high_as_their_share() -> None:
    picture = score_histograms(OWN_COUNTS, FAR, EDGES)
    for score, share in ((-7, 0.25), (-5, 0.5)):
        area = rows_of(picture, OWN, column(score))
        assert area[0] == pytest.approx(height(share, 0.75), abs=1)
        assert area[-1] == BOTTOM - 1
    assert rows_of(picture, OWN, column(-1)) == []


def test_foreign_data_are_a_line_of_their_own_share_whatever_their_number() -> None:
    many = {"svhn": 1000 * FAR["svhn"]}
    picture = score_histograms(OWN_COUNTS, FAR, EDGES)
    assert torch.equal(picture, score_histograms(OWN_COUNTS, many, EDGES))
    assert rows_of(picture, FOREIGN[0], column(-1))[0] == pytest.approx(TOP, abs=1)
    assert rows_of(picture, FOREIGN[0], column(-3))[0] == pytest.approx(height(0.25, 0.75), abs=1)


def test_every_set_has_its_colour() -> None:
    two = {"a": torch.tensor([0.0, 0.0, 0.0, 1.0]), "b": torch.tensor([0.0, 0.0, 1.0, 0.0])}
    picture = score_histograms(OWN_COUNTS, two, EDGES)
    assert rows_of(picture, FOREIGN[0], column(-1))
    assert rows_of(picture, FOREIGN[1], column(-3))


@pytest.mark.parametrize("threshold", [-6.4, -2.5, -0.3])
def test_the_threshold_is_a_dashed_line_where_it_should_be(threshold: float) -> None:
    picture = score_histograms(OWN_COUNTS, FAR, EDGES, threshold)
    dashes = {x for x in range(LEFT, RIGHT) if len(rows_of(picture, THRESHOLD, x)) > (BOTTOM - TOP) / 3}
    assert dashes == {column(threshold), column(threshold) + 1}


def test_the_threshold_lies_on_top_of_all_else_and_is_the_darkest() -> None:
    everywhere = {"svhn": torch.ones(4)}
    with_line = score_histograms(OWN_COUNTS, everywhere, EDGES, -2.5)
    line = column(-2.5)
    across = height(0.25, 0.5)  # where the line of the set runs
    dashes = rows_of(with_line, THRESHOLD, line)
    assert any(abs(row - across) <= 4 for row in dashes)
    assert float(with_line.min()) == sum(THRESHOLD) / 3 / 255


@pytest.mark.parametrize("threshold", [math.nan, 3.0, -math.inf])
def test_a_threshold_beyond_the_edges_is_left_out(threshold: float) -> None:
    picture = score_histograms(OWN_COUNTS, FAR, EDGES, threshold)
    assert torch.equal(picture, score_histograms(OWN_COUNTS, FAR, EDGES))


def test_different_inputs_make_different_pictures() -> None:
    picture = score_histograms(OWN_COUNTS, FAR, EDGES)
    assert not torch.equal(picture, score_histograms(OWN_COUNTS.flip(0), FAR, EDGES))
    assert not torch.equal(picture, score_histograms(OWN_COUNTS, {"svhn": FAR["svhn"].flip(0)}, EDGES))


def test_title_and_areas_are_written_above_the_plot() -> None:
    plain = score_histograms(OWN_COUNTS, FAR, EDGES)
    for other in (
        score_histograms(OWN_COUNTS, FAR, EDGES, title="energy, epoch 3"),
        score_histograms(OWN_COUNTS, FAR, EDGES, aurocs={"svhn": 0.93}),
    ):
        assert not torch.equal(other[:, :TOP], plain[:, :TOP])
        assert torch.equal(other[:, TOP:], plain[:, TOP:])


def test_sets_without_samples_are_drawn_as_nothing() -> None:
    picture = score_histograms(torch.zeros(4), {"svhn": torch.zeros(4)}, EDGES)
    assert rows_of(picture, OWN, column(-5)) == []


def test_whole_counts_and_an_inference_tensor_will_do() -> None:
    with torch.inference_mode():
        picture = score_histograms(OWN_COUNTS.long(), {"svhn": FAR["svhn"].long()}, EDGES)
    assert torch.equal(picture, score_histograms(OWN_COUNTS, FAR, EDGES))


def test_histograms_on_other_edges_are_an_error_that_names_the_set() -> None:
    with pytest.raises(ValueError, match=r"got \(3,\) of 'svhn' and \(5,\) edges"):
        score_histograms(OWN_COUNTS, {"svhn": torch.ones(3)}, EDGES)
    with pytest.raises(ValueError, match="'inside'"):
        score_histograms(torch.ones(5), {}, EDGES)
