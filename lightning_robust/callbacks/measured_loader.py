"""The calibration of one evaluation loader: sums of fixed size, batch by batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.everyone import Everyone
from lightning_robust.attach.groups import Groups, GroupSums, parts
from lightning_robust.attach.listener import Heard
from lightning_robust.calibration import Classwise, ConfidenceGrid, Reliability

__all__ = ["MODES", "UNKNOWN", "MeasuredLoader", "codes_of_rows"]

MODES = ("top_label", "positive", "per_label")


class MeasuredLoader:
    """What is counted of one loader.

    Args:
        bins: Of confidence.
        mode: What a confidence is about: the likeliest class, or each yes of a yes/no output.
        classwise: Whether every class is counted by itself.
        groups: Of the samples, if they have any.

    Attributes:
        sums: Of all predictions.
        grid: Of all predictions, by confidence, finely.
        classes: By class, if wanted; None before the first batch.
        by_group: Of each group, after :meth:`everyones`; empty where a batch's rows were not of its samples.
        accuracies: Of each group, in [0, 1], after :meth:`everyones`.
    """

    def __init__(self, bins: int, mode: str, classwise: bool, groups: Groups | None) -> None:
        self.bins, self.mode, self.classwise = bins, mode, classwise
        self.sums, self.grid = Reliability.zero(bins), ConfidenceGrid.zero()
        self.classes: Classwise | None = None
        none = torch.zeros(0, 2)
        self.groups = None if groups is None else GroupSums(groups, len(self._of_group(none, none[:, 0].long())))
        self._unknown = False  # whose rows are whose, in one batch at least
        self.by_group: dict[str, Reliability] = {}
        self.accuracies: dict[str, float] = {}

    def add(self, heard: Heard, codes: Tensor | None) -> None:
        """Count a batch.

        Args:
            heard: What was said of it.
            codes: The group of each sample, ``(N,)``.

        Raises:
            ValueError: If the mode is about yes/no outputs and these are classes.
        """
        log_p, labels, sample = heard.rows
        outputs = log_p.shape[1]
        if self.mode != "top_label" and (outputs != 2 or (self.mode == "per_label" and not heard.call.binary)):
            raise ValueError(
                f"mode={self.mode!r} is about yes/no outputs, but the loss ({heard.call.kind}) tells {outputs} "
                "classes apart; use mode='top_label', and classwise=True for every class by itself."
            )
        self.sums = self.sums + self._counted(log_p, labels)
        self.grid = self.grid + ConfidenceGrid.of(log_p, labels)
        if self.classwise:
            classes = self._by_class(heard, log_p, labels)
            self.classes = classes if self.classes is None else self.classes + classes
        if self.groups is not None and codes is not None:
            self._unknown |= not heard.by_sample
            of_rows = codes_of_rows(heard, codes, sample)
            for code, rows in parts(of_rows):
                rows = rows.to(log_p.device)
                self.groups.add(code, self._of_group(log_p[rows], labels[rows]))

    def _counted(self, log_p: Tensor, labels: Tensor) -> Reliability:
        if self.mode == "top_label":
            return Reliability.of(log_p, labels, self.bins)
        # In log space: 1 - p of a float32 probability of 1 is 0, and a sure error would be infinitely wrong.
        nll = -log_p.gather(1, labels.long()[:, None]).squeeze(1)
        return Reliability.of_events(log_p[:, 1].exp(), labels == 1, self.bins, nll=nll)

    def _of_group(self, log_p: Tensor, labels: Tensor) -> Tensor:
        state = self._counted(log_p, labels).state()
        # Sums over events do not know how often the likelier answer is right: that stands behind them.
        return state if self.mode == "top_label" else torch.cat([state, Reliability.of(log_p, labels, 1).state()])

    def _by_class(self, heard: Heard, log_p: Tensor, labels: Tensor) -> Classwise:
        if self.mode != "per_label":
            return Classwise.of(log_p, labels, self.bins)
        n, kept = len(heard.x), heard.counts.to(log_p.device)
        p, y = (v if len(v) == n else v.reshape(n, -1) for v in (heard.call.probabilities(), heard.call.labels()))
        # Labels of a sample, or of each of its pixels.
        p, y = (v[kept].movedim(1, -1).flatten(0, -2) if v.ndim > 1 else v[kept][:, None] for v in (p, y))
        return Classwise.of_labels(p, y, self.bins)

    def everyones(self, everyone: Everyone) -> None:
        """Take over the sums of all processes; to be called by all of them."""
        own, grid = self.sums.state(), self.grid.state()
        total = everyone.summed(torch.cat([own, grid]))
        self.sums, self.grid = Reliability.load(total[: len(own)]), ConfidenceGrid.load(total[len(own) :])
        if self.classwise:
            state = everyone.of(None if self.classes is None else self.classes.state())
            if state is not None:
                self.classes = Classwise.load(state, (len(state) - 1) // (3 * (self.bins + 1)))
        if self.groups is not None:
            found = self.groups.everyones(everyone.trainer, everyone.summed)
            found = {} if everyone.total(self._unknown)[0] else found
            end = len(own)
            self.by_group = {name: Reliability.load(state[:end]) for name, state in found.items()}
            start = 0 if self.mode == "top_label" else end
            self.accuracies = {name: Reliability.load(state[start:]).accuracy for name, state in found.items()}

    def measures(self) -> dict[str, float]:
        """All values by metric, the most wanted first."""
        values = self.sums.measures()
        if self.mode == "top_label":  # the grid is of the likelier answer
            values["ece_adaptive"] = self.grid.adaptive(self.bins)
        values["accuracy"] = self.grid.accuracy_at(1.0)
        values["aurc"] = self.grid.aurc
        values |= {f"accuracy_at_{percent}": self.grid.accuracy_at(percent / 100) for percent in (95, 90, 80)}
        if self.classes is not None:
            worst, error = self.classes.worst()
            values |= {"ece_classwise": self.classes.ece, "worst_class_ece": error, "worst_class": float(worst)}
            accuracy = self.classes.accuracy
            if bool(accuracy.isfinite().any()):  # not of several labels
                values["worst_class_accuracy"] = float(accuracy[accuracy.isfinite()].min())
        counted = {name: sums for name, sums in self.by_group.items() if sums.n}
        if counted:
            for name, sums in counted.items():
                own = {"accuracy": self.accuracies[name], "ece": sums.ece, "ece_floor": sums.floor()}
                values |= {f"group/{name}/{metric}": value for metric, value in own.items()}
            group = self._worst_group()
            values["worst_group_accuracy"] = min(self.accuracies[name] for name in counted)
            values["worst_group_ece"] = counted[group].ece
            values["worst_group_ece_floor"] = values[f"group/{group}/ece_floor"]
        return values

    def _worst_group(self) -> str:
        """The group with the largest calibration error."""
        return max((name for name, sums in self.by_group.items() if sums.n), key=lambda name: self.by_group[name].ece)

    def tables(self) -> dict[str, Any]:
        """By class and by group, as plain lists and dicts."""
        tables: dict[str, Any] = {}
        if self.classes is not None:
            tables["classes"] = {"ece": self.classes.errors.tolist()}
            if self.mode != "per_label":
                tables["classes"]["accuracy"] = self.classes.accuracy.tolist()
        if self.by_group:
            groups = self.by_group.items()
            accuracy = self.accuracies
            tables["groups"] = {name: {"n": s.n, "accuracy": accuracy[name], "ece": s.ece} for name, s in groups}
            if any(sums.n for sums in self.by_group.values()):
                tables["worst_group"] = self._worst_group()
        return tables


UNKNOWN = (
    "a loss gets fewer rows than the batch has samples, or not equally many of each, and which row is of which sample "
    "cannot be told: groups are not reported. Give the loss all rows, with ignore_index for those that do not count."
)
"""Said where groups cannot be reported."""


def codes_of_rows(heard: Heard, codes: Tensor, sample: Tensor) -> Tensor:
    """The group of each row, of the groups of the batch's samples."""
    return codes[torch.searchsorted(heard.index, sample)]
