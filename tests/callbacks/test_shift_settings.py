"""What CorruptionMonitor refuses when it is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_robust import CorruptionMonitor
from lightning_robust.corruptions import CORRUPTIONS

OTHER = TensorDataset(torch.zeros(1, 1, 8, 8), torch.zeros(1).long())

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a typo": ({"corruptions": ["fogg"]}, ValueError, "got 'fogg'.*Did you mean 'fog'"),
    "one corruption": ({"corruptions": "fog"}, ValueError, r"corruptions= takes a list, got 'fog'; write .*\['fog'\]"),
    "one severity": ({"severities": 3}, ValueError, r"severities= takes a list, got 3; write severities=\[3\]"),
    "no severity": ({"severities": []}, ValueError, "severities= takes some of 1, 2, 3, 4, 5"),
    "severity 6": ({"severities": [6]}, ValueError, r"severities= takes some of 1, 2, 3, 4, 5, got \[6\]"),
    "one score": ({"scores": "msp"}, ValueError, r"scores= takes a list, got 'msp'"),
    "another score": ({"scores": ["mps"]}, ValueError, "mps"),
    "nothing": ({"corruptions": []}, ValueError, "needs corruptions= or shift_loaders=, got neither"),
    "a table": ({"table": "cifar"}, ValueError, "table= must be one of imagenet, small"),
    "no samples": ({"max_samples": 0}, ValueError, "max_samples= must be at least 1"),
    "fewer than no cells": ({"per_epoch": -1}, ValueError, "per_epoch= not negative, got 500 and -1"),
    "a loader without a name": (
        {"shift_loaders": [OTHER]},
        TypeError,
        "names and labelled data sets.*got a list",
    ),
    "no loader": ({"shift_loaders": {"o": None}}, TypeError, r"\['o'\] takes a labelled data set.*got a NoneType"),
    "metrics without names": ({"metrics": [MulticlassAccuracy(3)]}, TypeError, r"names and torchmetrics.*got a list"),
    "a loader named fog": ({"shift_loaders": {"fog": OTHER}}, ValueError, "something else in its keys, got 'fog'"),
    "a loader named fog_3": ({"shift_loaders": {"fog_3": OTHER}}, ValueError, "got 'fog_3'; rename it"),
    "a loader named clean": ({"shift_loaders": {"clean": OTHER}}, ValueError, "got 'clean'; rename it"),
    "an iterator": ({"shift_loaders": {"once": iter([])}}, ValueError, r"\['once'\] is an iterator.*once only"),
    "a metric named accuracy": ({"metrics": {"accuracy": MulticlassAccuracy(3)}}, ValueError, r"got \['accuracy'\]"),
    "several inputs": ({"input_key": ["left", "right"]}, ValueError, "is about one input"),
    "a stage": ({"stages": ["train"]}, ValueError, "takes a list of 'val', 'test'"),
}


@pytest.mark.parametrize(("settings", "error", "says"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_measured_is_refused_at_once(settings: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        CorruptionMonitor(**settings)


def test_all_corruptions_at_all_severities_are_the_default_and_doubles_count_once() -> None:
    assert len(CorruptionMonitor().cells) == 5 * len(CORRUPTIONS) >= 5 * 14
    assert len(CorruptionMonitor(corruptions=["fog", "fog"], severities=[1, 1, 2]).cells) == 2


def test_its_settings_are_plain_enough_for_a_logger() -> None:
    settings = CorruptionMonitor(corruptions=["fog"], shift_loaders={"other": OTHER}).settings()
    assert settings["corruptions"] == "fog"
    assert settings["loaders"] == "other"
