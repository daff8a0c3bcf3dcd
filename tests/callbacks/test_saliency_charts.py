"""The layout of TensorBoard's Custom Scalars tab names tags that are logged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import zoo
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import SaliencySnapshots


def written(folder: Path, *callbacks: Any) -> tuple[layout_pb2.Layout, list[str]]:
    logger = pl.loggers.TensorBoardLogger(folder)
    loader = DataLoader(TensorDataset(zoo.images(40), zoo.labels(40)), 16)
    trainer = zoo.trainer(callbacks=list(callbacks), max_epochs=2, logger=logger)
    trainer.fit(zoo.built(zoo.ListBatch), loader, loader)
    logger.finalize("success")
    events = EventAccumulator(str(logger.log_dir), size_guidance={"tensors": 0})
    events.Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    return layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]), events.Tags()["scalars"]


def test_every_chart_finds_the_tags_that_it_is_about(tmp_path: Path) -> None:
    callback = SaliencySnapshots(["gradient", "integrated_gradients"], samples=4, ensemble=True, probes=["hardest"])
    layout, tags = written(tmp_path, callback, SaliencySnapshots(["gradient"], samples=4, name="deep"))
    assert [category.title for category in layout.category] == ["saliency: val_hardest", "saliency.deep: val"]
    charts = [chart for category in layout.category for chart in category.chart]
    for chart in charts:
        if chart.multiline.tag:
            found = [tag for pattern in chart.multiline.tag for tag in tags if re.fullmatch(pattern, tag)]
            assert len(found) >= len(chart.multiline.tag), chart.title
        for series in chart.margin.series:
            assert {series.value, series.lower, series.upper} <= set(tags)
    assert sum(len(chart.margin.series) for chart in charts) == 4  # one a method
