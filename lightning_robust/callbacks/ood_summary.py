"""What the scores of one evaluation say: separation by set and score, kinds of sets, groups, what is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.groups import Groups
from lightning_robust.metrics.streamed_table import StreamedTable
from lightning_robust.ood import score_histograms, separation, separation_streamed

__all__ = ["GROUP", "MEASURES", "RIGHT", "WRONG", "OODSummary"]

RIGHT, WRONG, GROUP = "right", "wrong", "group"  # beside the scores in the table of the evaluation data

SELECTING = ("auroc", "fpr95")  # what weights are selected by
MEASURES = ("auroc", "aupr_in", "aupr_out", "fpr95", "fpr95_id_positive")
SHOWN = {"fpr95_ood_positive": "fpr95"}
HISTOGRAM_BINS = 64
ACCEPTED = 0.95  # of the own validation data


class OODSummary:
    """One evaluation.

    Args:
        own: Scores of the evaluation data, with ``right`` and ``group`` of each sample; of a streamed table, each score
            once more of those that are right, and of those that are wrong.
        tables: Scores of each foreign set.
        scores: Names of the scores to report.
        full: Those of them whose every measure is one of the Trainer's metrics; of others the loggers get most.
        warn: ``(message, about)``, once.
    """

    def __init__(
        self,
        own: Any,
        tables: Mapping[str, Any],
        scores: Sequence[str],
        full: Collection[str],
        warn: Callable[..., None],
    ) -> None:
        self.own, self.tables, self.scores, self.full, self.warn = own, tables, list(scores), full, warn

    @cached_property
    def found(self) -> dict[str, dict[str, dict[str, float]]]:
        """What :func:`~lightning_robust.ood.separation` says, by set and score."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for name, table in self.tables.items():
            for score in self.scores if self.own.n and table.n else ():
                inside, outside = self._finite(self.own, score, ""), self._finite(table, score, name)
                if _size(inside) and _size(outside):
                    exact = isinstance(inside, Tensor)
                    measured = separation(inside, outside) if exact else separation_streamed(inside, outside)
                    found.setdefault(name, {})[score] = measured
        return found

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """The score below which 95 % of the evaluation data lie, by score."""
        own = {score: self._finite(self.own, score, "") for score in self.scores if self.own.n}
        return {score: _quantile(values) for score, values in own.items() if _size(values)}

    def values(
        self, thresholds: Mapping[str, float] | None, groups: Groups | None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics for Lightning, and those for the loggers alone.

        Args:
            thresholds: Above which samples are rejected; those of these data themselves if None.
            groups: Names of the samples' groups, where they have any.
        """
        values: dict[str, float] = {}
        beside: dict[str, float] = {}
        for name, scores in self.found.items():
            for score, measured in scores.items():
                for metric, value in measured.items():
                    shown = SHOWN.get(metric, metric)
                    wanted = MEASURES if score in self.full else SELECTING
                    (values if shown in wanted else beside)[f"{name}/{score}_{shown}"] = value
        if self.found:
            self._accepted(thresholds or self.thresholds, values)
            if groups is not None:
                self._by_group(thresholds or self.thresholds, groups, values, beside)
        return values, beside

    def means(self, kind: str, names: Sequence[str], values: dict[str, float], beside: dict[str, float]) -> None:
        """Add means over the sets of one kind, not pooled: each set counts alike."""
        found = [self.found[name] for name in names if name in self.found]
        for score in self.scores if found and len(found) == len(names) else ():
            for metric in found[0].get(score, {}):
                shown = SHOWN.get(metric, metric)
                if shown in MEASURES and all(score in of for of in found):
                    mean = math.fsum(of[score][metric] for of in found) / len(found)
                    (values if shown in SELECTING else beside)[f"{kind}/{score}_{shown}"] = mean

    def entry(self) -> dict[str, Any]:
        """What checkpoints get."""
        entry: dict[str, Any] = {}
        for name, scores in self.found.items():
            for score, measured in scores.items():
                histograms = self._histograms(name, score)
                stored = {**measured, **histograms, "threshold95": self.thresholds[score]}
                entry.setdefault(name, {})[score] = stored
        return {**entry, "thresholds": self.thresholds} if entry else {}

    def pictures(self, title: str) -> Iterator[tuple[str, Tensor]]:
        """Histograms of the own data and all sets, by score."""
        for score in self.scores:
            sets = {
                name: self._kept(table, score)
                for name, table in self.tables.items()
                if score in self.found.get(name, {})
            }
            if not sets:
                continue
            own = self._kept(self.own, score)
            low, high = _range([own, *sets.values()])
            edges = torch.linspace(low, high, HISTOGRAM_BINS + 1, dtype=torch.float64)
            counts = {name: _counts(values, low, high) for name, values in sets.items()}
            aurocs = {name: self.found[name][score]["auroc"] for name in sets}
            picture = score_histograms(
                _counts(own, low, high), counts, edges, self.thresholds[score], f"{title}: {score}", aurocs
            )
            yield score, picture

    def _accepted(self, thresholds: Mapping[str, float], values: dict[str, float]) -> None:
        if isinstance(self.own, StreamedTable):
            self._accepted_streamed(thresholds, values)
            return
        right = self.own.of(RIGHT)
        for score in self.scores:
            if score in thresholds:
                labelled = right.isfinite() & self.own.of(score).isfinite()
                kept = labelled & (self.own.of(score) <= thresholds[score])
                values[f"accepted/{score}_coverage"] = float(kept.sum() / labelled.sum().clamp_min(1))
                values[f"accepted/{score}_accuracy"] = float(right[kept].mean()) if bool(kept.any()) else math.nan

    def _accepted_streamed(self, thresholds: Mapping[str, float], values: dict[str, float]) -> None:
        for score in self.scores:
            if score in thresholds:
                here = thresholds[score]  # what lies beyond counts at the ends
                edges = [math.nextafter(here, -math.inf), here, math.nextafter(here, math.inf)]
                counts = (self.own.of(f"{score}_{verdict}") for verdict in (RIGHT, WRONG))
                right, wrong = (of.to_histogram(torch.tensor(edges, dtype=torch.float64)) for of in counts)
                kept, labelled = float(right[0] + wrong[0]), float((right + wrong).sum())
                values[f"accepted/{score}_coverage"] = kept / max(labelled, 1.0)
                values[f"accepted/{score}_accuracy"] = float(right[0]) / kept if kept else math.nan

    def _by_group(
        self, thresholds: Mapping[str, float], groups: Groups, values: dict[str, float], beside: dict[str, float]
    ) -> None:
        codes = self.own.of(GROUP)
        for score in self.scores:
            own = self.own.of(score)
            parts = {int(code): own[(codes == code) & own.isfinite()] for code in codes.unique().tolist()}
            parts = {code: rows for code, rows in parts.items() if len(rows)}
            for code, rows in parts.items():
                rejected = float((rows > thresholds.get(score, math.inf)).double().mean())
                beside[f"group/{groups.name(code)}/{score}_rejected"] = rejected
            for name, table in self.tables.items():
                if score in self.found.get(name, {}):
                    outside = self._finite(table, score, name)
                    worst = min(separation(rows, outside)["auroc"] for rows in parts.values())
                    values[f"{name}/{score}_worst_group_auroc"] = worst

    def _finite(self, table: Any, score: str, name: str) -> Any:
        values = table.of(score)
        lost = int((~values.isfinite()).sum()) if isinstance(values, Tensor) else values.invalid
        if lost:
            where = f"{score}, {lost} of {table.n} of " + (f"the set {name!r}" if name else "the evaluation data")
            self.warn(f"scores that are NaN or infinite are left out ({where}).", f"finite {score} of {name}")
        return values[values.isfinite()] if isinstance(values, Tensor) else values

    def _kept(self, table: Any, score: str) -> Any:
        values = table.of(score)
        return values[values.isfinite()] if isinstance(values, Tensor) else values

    def _histograms(self, name: str, score: str) -> dict[str, Any]:
        """Both distributions on common edges."""
        sides = {"in": self._kept(self.own, score), "out": self._kept(self.tables[name], score)}
        low, high = _range(list(sides.values()), whole=True)
        counts = {f"histogram_{side}": _counts(scores, low, high).tolist() for side, scores in sides.items()}
        return {"range": [low, high], **counts}


def _size(values: Any) -> int:
    return len(values) if isinstance(values, Tensor) else int(values.n)


def _quantile(values: Any, share: float = ACCEPTED) -> float:
    """The lowest score with at least this share at it or below, as the FPR at 95 % TPR has it."""
    if not isinstance(values, Tensor):
        return float(values.quantile(share))
    place = math.ceil(share * len(values) - 1e-9)  # a product may come out a little above the whole number meant
    return float(values.kthvalue(max(1, place)).values)


def _range(sides: Sequence[Any], whole: bool = False) -> tuple[float, float]:
    """Common ends; for a picture without the farthest half per cent of each side."""
    tail = 0.0 if whole else 0.005
    ends = [(_quantile(side, tail), _quantile(side, 1 - tail)) for side in sides]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    nothing = high - low <= 1e-9 * max(abs(low), abs(high))  # too little for edges in between
    return low, low + max(1.0, 1e-3 * abs(low)) if nothing else high


def _counts(values: Any, low: float, high: float) -> Tensor:
    if isinstance(values, Tensor):
        return torch.histc(values.clamp(low, high), HISTOGRAM_BINS, low, high).long()
    return values.to_histogram(torch.linspace(low, high, HISTOGRAM_BINS + 1, dtype=torch.float64))  # type: ignore[no-any-return]  # of StreamedScores
