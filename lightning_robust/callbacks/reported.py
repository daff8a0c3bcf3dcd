"""What recalibration does to predictions that it was not fitted on: sums of fixed size, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_robust.attach.everyone import Everyone
from lightning_robust.attach.groups import Groups, GroupSums, parts
from lightning_robust.calibration import Classwise, PredictionSets, Reliability, SetSums, reliability_diagram
from lightning_robust.callbacks.recalibration import TEMPERATURE, Rows

__all__ = ["UNSCALED", "Reported"]

UNSCALED = "unscaled"
ECE = ("ece", "ece_low", "ece_high", "ece_floor")


class Reported:
    """Predictions as they are and recalibrated.

    Args:
        bins: Of the calibration errors.
        classwise: Whether classes are counted by themselves.
        groups: Of the samples, if they have any.
    """

    def __init__(self, bins: int, classwise: bool, groups: Groups | None) -> None:
        self.bins, self.classwise, self.groups = bins, classwise, groups
        self.unknown = False  # whose rows are whose: then no groups are reported, by no process
        self.by_method: dict[str, Reliability] = {}
        self._classes: dict[str, Classwise] = {}
        size = len(Reliability.zero(bins).state())
        self._by_group = {} if groups is None else {when: GroupSums(groups, size) for when in (UNSCALED, TEMPERATURE)}
        self._sets: dict[str, SetSums] = {}
        self._groups: dict[str, dict[str, Reliability]] = {}

    def add(self, rows: Rows, after: Mapping[str, Tensor]) -> None:
        """Count predictions.

        Args:
            rows: As they are.
            after: Log-probabilities of the same rows, by method.
        """
        for name, log_p in {UNSCALED: rows.log_p, **after}.items():
            counted = Reliability.of(log_p, rows.labels, self.bins)
            self.by_method[name] = self.by_method[name] + counted if name in self.by_method else counted
            if name not in (UNSCALED, TEMPERATURE) or not len(rows):
                continue
            if self.classwise:
                classes = Classwise.of(log_p, rows.labels, self.bins)
                self._classes[name] = self._classes[name] + classes if name in self._classes else classes
            if self.groups is not None and rows.codes is not None:
                for code, members in parts(rows.codes):
                    members = members.to(log_p.device)
                    own = Reliability.of(log_p[members], rows.labels[members], self.bins)
                    self._by_group[name].add(code, own.state())

    def add_sets(self, sets: Mapping[str, PredictionSets], scaled: Tensor, rows: Rows) -> None:
        """Count prediction sets.

        Args:
            sets: By method.
            scaled: Log-probabilities at the temperature.
            rows: The same rows.
        """
        for name, fitted in sets.items() if len(rows) else ():
            measured = fitted.measured(scaled, rows.labels, rows.sample)
            self._sets[name] = self._sets[name] + measured if name in self._sets else measured

    def everyones(self, everyone: Everyone, methods: list[str], sets: list[str]) -> None:
        """Take over the sums of all processes; to be called by all of them.

        Args:
            everyone: All processes.
            methods: Names of the recalibrators, the temperature among them.
            sets: Names of the kinds of prediction sets.
        """
        for name in (UNSCALED, *methods):
            own = self.by_method.get(name, Reliability.zero(self.bins))
            self.by_method[name] = Reliability.load(everyone.summed(own.state()))
        for name in (UNSCALED, TEMPERATURE) if self.classwise else ():
            state = everyone.of(self._classes[name].state() if name in self._classes else None)
            if state is not None:
                self._classes[name] = Classwise.load(state, (len(state) - 1) // (3 * (self.bins + 1)))
        for name in sets:
            state = everyone.of(self._sets[name].state() if name in self._sets else None)
            if state is not None:
                self._sets[name] = SetSums.load(state)
        self._groups = {
            name: {group: Reliability.load(state) for group, state in found.items()}
            for name, sums in self._by_group.items()
            if (found := sums.everyones(everyone.trainer, everyone.summed))
        }
        if self.groups is not None and everyone.total(self.unknown)[0]:
            self._groups = {}
        self._groups = {name: found for name, found in self._groups.items() if any(sums.n for sums in found.values())}

    @property
    def n(self) -> int:
        """How many predictions were counted, by all processes."""
        return self.by_method[UNSCALED].n if UNSCALED in self.by_method else 0

    def values(self) -> dict[str, float]:
        """All values by metric, after :meth:`everyones`."""
        values: dict[str, float] = {}
        for name, sums in self.by_method.items():
            if name == TEMPERATURE:
                measures = sums.measures()
                values |= {key.replace("ece", "ece_scaled"): measures[key] for key in ECE}
                values |= {"nll_scaled": sums.mean_nll, "brier_scaled": sums.mean_brier}
            elif name != UNSCALED:
                values |= {f"ece_{name}": sums.ece, f"nll_{name}": sums.mean_nll, f"accuracy_{name}": sums.accuracy}
        shown = {UNSCALED: UNSCALED, TEMPERATURE: "scaled"}
        for name, classes in self._classes.items():
            values[f"worst_class_ece_{shown[name]}"] = classes.worst()[1]
        for name, groups in self._groups.items():
            worst = max((sums for sums in groups.values() if sums.n), key=lambda sums: sums.ece)
            values[f"worst_group_ece_{shown[name]}"] = worst.ece
            values[f"worst_group_ece_floor_{shown[name]}"] = worst.floor()
        for name, sets in self._sets.items():
            values |= {
                f"coverage_{name}": sets.coverage,
                f"set_size_{name}": sets.mean_size,
                f"empty_{name}": sets.empty_share,
                f"worst_class_coverage_{name}": sets.worst_class[1],
            }
        return values

    def picture(self, title: str, scaled: str) -> Tensor:
        """A reliability diagram of both sides, as they are and, named ``scaled``, at the temperature: ``(3, H, W)``."""
        beside = self.by_method[TEMPERATURE]
        return reliability_diagram(self.by_method[UNSCALED], title, beside, ("as it is", scaled))
