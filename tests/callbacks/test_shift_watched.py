"""Callbacks that watch what CorruptionMonitor logs in the last validation alone."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import zoo
from callbacks.shift_by_hand import data, trained

from lightning_robust import CorruptionMonitor


def watched(metric: str, settings: Any, **trainer: Any) -> pl.Trainer:
    monitor = CorruptionMonitor(corruptions=["fog"], severities=[3, 5], **{"per_epoch": 1, **settings})
    stopping = pl.callbacks.EarlyStopping(metric, mode="max", patience=9)
    made = zoo.trainer(callbacks=[stopping, monitor], **{"max_epochs": 2, **trainer})
    made.fit(trained(), data(), data())
    return made


@pytest.mark.parametrize("metric", ["mean_accuracy", "mean_ece", "retention", "worst_accuracy"])
def test_waiting_for_means_of_all_cells_is_refused_before_the_first_step(metric: str) -> None:
    with pytest.raises(ValueError, match=rf"monitor='shift/val/{metric}'.*sampled_accuracy.*per_epoch=None"):
        watched(f"shift/val/{metric}", {})


def test_what_every_validation_logs_can_be_watched() -> None:
    for metric, settings, trainer in (
        ("shift/val/sampled_accuracy", {}, {}),
        ("shift/val/mean_accuracy", {"per_epoch": None}, {}),
        ("shift/val/mean_accuracy", {}, {"max_epochs": 1}),
        ("shift.two/val/retention", {"per_epoch": None, "name": "two"}, {}),
    ):
        assert metric in watched(metric, settings, **trainer).callback_metrics
