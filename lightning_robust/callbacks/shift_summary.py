"""What the cells of one evaluation say together: means, what is left of the clean accuracy, groups, heat maps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_robust.callbacks.shift_cells import CLEAN, Cell
from lightning_robust.corruptions import shift_heat_map

__all__ = ["ShiftSummary", "means"]

BESIDE = ("confidence", "nll_scaled")  # into the loggers alone


class ShiftSummary:
    """One evaluation.

    Args:
        found: Values by metric of each cell, :data:`~lightning_robust.callbacks.shift_cells.CLEAN` among them.
        often: Cells that every evaluation measures.
        loaders: Names of loaders of other data.
        complete: Whether all cells were measured.
        groups: By name how many samples and how many right ones the cells of ``often`` had, and all cells, ``(4,)``.

    Attributes:
        corrupted: Values of the cells that are corruptions.
        values: Metrics for Lightning.
        beside: Those for the loggers alone.
    """

    def __init__(
        self,
        found: Mapping[Cell, Mapping[str, float]],
        often: Collection[Cell],
        loaders: Collection[str],
        complete: bool,
        groups: Mapping[str, Tensor],
    ) -> None:
        self.found, self.often, self.complete = found, often, complete
        self.corrupted = {cell: measured for cell, measured in found.items() if cell.severity}
        values = self._of_cells([cell for cell in found if cell.name in loaders])
        single = {CLEAN: found[CLEAN], **self.corrupted}
        beside = {f"{c.key}/{metric}": value for c, measured in single.items() for metric, value in measured.items()}
        self._by_group(groups, values, beside)
        beside |= {metric: values.pop(metric) for metric in list(values) if _last(metric) in BESIDE}
        self.values, self.beside = values, beside

    def _of_cells(self, loaders: Collection[Cell]) -> dict[str, float]:
        clean = self.found[CLEAN]["accuracy"]
        values = {"clean_accuracy": clean}
        sampled = {cell: measured for cell, measured in self.corrupted.items() if cell in self.often}
        if sampled:
            values["sampled_accuracy"] = means(sampled, clean)["mean_accuracy"]
        if self.corrupted and self.complete:
            values |= means(self.corrupted, clean)
            accuracies = _known(measured["accuracy"] for measured in self.corrupted.values())
            values["worst_accuracy"] = min(accuracies, default=math.nan)
        for cell in loaders:
            measured = self.found[cell]
            values |= {f"{cell.key}/{metric}": value for metric, value in measured.items()}
            values[f"{cell.key}/retention"] = measured["accuracy"] / clean if clean else math.nan
        return values

    def _by_group(self, groups: Mapping[str, Tensor], values: dict[str, float], beside: dict[str, float]) -> None:
        often = [float(right / n) for n, right, _, _ in groups.values() if n]
        measured = {name: float(right / n) for name, (_, _, n, right) in groups.items() if n}
        beside |= {f"group/{name}/accuracy": accuracy for name, accuracy in measured.items()}
        if often:
            values["sampled_worst_group_accuracy"] = min(often)
        if measured and self.complete:
            values["worst_group_accuracy"] = min(measured.values())

    def entry(self, n: int, temperature: float | None) -> dict[str, Any]:
        """What checkpoints get.

        Args:
            n: How many clean predictions there were.
            temperature: Of the clean data.
        """
        whole = {metric: value for metric, value in {**self.values, **self.beside}.items() if "/" not in metric}
        cells = {cell.key: dict(measured) for cell, measured in self.found.items()}
        stored = {**whole, "cells": cells, "n": n, "complete": bool(self.corrupted) and self.complete}
        return stored if temperature is None else {**stored, "temperature": temperature}

    def pictures(self, title: str) -> Iterator[tuple[str, Tensor]]:
        """Heat maps by metric, where all cells were measured."""
        clean = self.found[CLEAN]
        for metric, what in (("accuracy", "accuracy"), ("ece_scaled", "ECE at the temperature of clean data")):
            values = {(cell.name, cell.severity): m[metric] for cell, m in self.corrupted.items() if metric in m}
            if values and self.complete:
                error = metric != "accuracy"
                high = max([0.1, *_known(values.values())]) if error else 1.0
                known = clean.get(metric)
                yield metric, shift_heat_map(values, f"{title}: {what}", clean=known, high=high, error=error)


def means(found: Mapping[Cell, Mapping[str, float]], clean: float) -> dict[str, float]:
    """Means over cells, each counting alike, and how much of the accuracy is left of ``clean``; NaN is left out."""
    values: dict[str, float] = {}
    for metric in dict.fromkeys(metric for measured in found.values() for metric in measured):
        known = _known(measured[metric] for measured in found.values() if metric in measured)
        values[f"mean_{metric}"] = math.fsum(known) / len(known) if known else math.nan
    if found:
        values["retention"] = values["mean_accuracy"] / clean if clean else math.nan
    return values


def _known(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _last(metric: str) -> str:
    return metric.split("/")[-1].removeprefix("mean_")
