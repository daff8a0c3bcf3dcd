"""What cells say together, against means by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_robust.callbacks.shift_cells import CLEAN, Cell
from lightning_robust.callbacks.shift_summary import ShiftSummary, means

FOUND = {
    CLEAN: {"accuracy": 0.8, "confidence": 0.9},
    Cell("fog", 3): {"accuracy": 0.4, "confidence": 0.7},
    Cell("fog", 5): {"accuracy": 0.2, "confidence": 0.5},
    Cell("other"): {"accuracy": 0.6, "confidence": 0.8},
}
OFTEN = {Cell("fog", 3)}
GROUPS = {"a": torch.tensor([4.0, 3.0, 8.0, 4.0]), "b": torch.tensor([0.0, 0.0, 10.0, 1.0])}


def summed_up(complete: bool = True) -> ShiftSummary:
    return ShiftSummary(FOUND, OFTEN, ["other"], complete, GROUPS)


def test_every_cell_counts_alike_in_the_means() -> None:
    found = {Cell("a", 1): {"accuracy": 0.5, "nll": 1.0}, Cell("b", 1): {"accuracy": 0.25}}
    assert means(found, 0.75) == {"mean_accuracy": 0.375, "mean_nll": 1.0, "retention": 0.5}
    assert math.isnan(means(found, 0.0)["retention"])
    assert means({}, 0.5) == {}


def test_a_cell_of_which_nothing_is_known_is_no_part_of_any_mean_nor_the_worst() -> None:
    found = {**FOUND, Cell("snow", 3): {"accuracy": math.nan, "ece_scaled": math.nan}}
    summary = ShiftSummary(found, {*OFTEN, Cell("snow", 3)}, ["other"], True, {})
    assert summary.values["mean_accuracy"] == pytest.approx(0.3)
    assert summary.values["sampled_accuracy"] == pytest.approx(0.4)
    assert summary.values["worst_accuracy"] == 0.2
    assert summary.values["retention"] == pytest.approx(0.375)
    assert math.isnan(means({Cell("snow", 3): found[Cell("snow", 3)]}, 0.5)["retention"])
    assert set(dict(summary.pictures("val"))) == {"accuracy", "ece_scaled"}


def test_means_are_over_corruptions_alone_and_confidence_goes_into_the_loggers() -> None:
    summary = summed_up()
    assert summary.values == pytest.approx(
        {
            "clean_accuracy": 0.8,
            "sampled_accuracy": 0.4,
            "mean_accuracy": 0.3,
            "retention": 0.375,
            "worst_accuracy": 0.2,
            "other/accuracy": 0.6,
            "other/retention": 0.75,
            "sampled_worst_group_accuracy": 0.75,
            "worst_group_accuracy": 0.1,
        }
    )
    assert summary.beside["mean_confidence"] == pytest.approx(0.6)
    assert summary.beside["group/b/accuracy"] == pytest.approx(0.1)
    assert summary.beside["fog_5/accuracy"] == 0.2


def test_where_not_all_cells_are_measured_there_is_no_mean_and_no_picture() -> None:
    summary = summed_up(complete=False)
    assert set(summary.values) == {
        "clean_accuracy",
        "sampled_accuracy",
        "other/accuracy",
        "other/retention",
        "sampled_worst_group_accuracy",
    }
    assert list(summary.pictures("val")) == []
    assert not summary.entry(10, None)["complete"]


def test_the_entry_holds_all_cells_and_the_temperature_where_there_is_one() -> None:
    entry = summed_up().entry(10, 1.5)
    assert entry["cells"]["other"] == FOUND[Cell("other")]
    assert (entry["n"], entry["complete"], entry["temperature"]) == (10, True, 1.5)
    assert not [metric for metric in entry if "/" in metric]
    assert "temperature" not in summed_up().entry(10, None)


def test_the_picture_is_of_what_was_measured_of_every_cell() -> None:
    pictures = dict(summed_up().pictures("val"))
    assert list(pictures) == ["accuracy"]  # there was no temperature
    assert pictures["accuracy"].shape[0] == 3
