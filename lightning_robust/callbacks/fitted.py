"""What one evaluation fitted and what that does: for the checkpoint, for the log, and for a test that takes it up."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_robust.calibration import (
    PredictionSets,
    Recalibrator,
    Temperature,
    TemperatureFit,
    load_recalibrator,
)
from lightning_robust.callbacks.recalibration import TEMPERATURE, Recalibration, Rows
from lightning_robust.callbacks.reported import UNSCALED, Reported

__all__ = ["Fitted", "StoredFits", "report"]


@dataclass(frozen=True, eq=False)
class Fitted:
    """Fits, and what they do to predictions that they were not fitted on.

    Attributes:
        fit: Of the temperature.
        recalibration: Everything that was fitted.
        reported: Nothing counted where there are no predictions to report on.
    """

    fit: TemperatureFit
    recalibration: Recalibration
    reported: Reported

    def values(self) -> dict[str, float]:
        """All values by metric."""
        return {"temperature": self.fit.temperature, **self.reported.values()}

    def entry(self, step: int) -> dict[str, Any]:
        """What checkpoints get.

        Args:
            step: That the weights are from.
        """
        fit, reported = self.fit, self.reported
        # Of the same predictions both, before and after.
        before, after = (reported.by_method[m].mean_nll if reported.n else None for m in (UNSCALED, TEMPERATURE))
        entry: dict[str, Any] = {
            "temperature": fit.temperature,
            "at_bound": fit.at_bound,
            "fit_step": step,
            "samples": fit.samples,
            "nll": fit.nll if before is None else before,
            "nll_scaled": fit.nll_scaled if after is None else after,
        }
        fitted = self.recalibration.recalibrators.items()
        others = {name: recalibrator.to_dict() for name, recalibrator in fitted if name != TEMPERATURE}
        sets = {name: one.to_dict() for name, one in self.recalibration.sets.items()}
        return entry | ({"recalibrators": others} if others else {}) | ({"prediction_sets": sets} if sets else {})


def report(recalibration: Recalibration, rows: Rows, others: Rows | None, reported: Reported) -> Reported:
    """Count what fits do to predictions that they were not fitted on; to be called by all processes.

    Args:
        recalibration: That was fitted.
        rows: What it was fitted on.
        others: Predictions to report on; None for the same ones, cross-fitted.
        reported: Counts nothing yet, and goes on so where there are none.
    """
    everyone = recalibration.everyone
    if others is not None:
        if everyone.total(len(others))[0]:
            after = recalibration.recalibrated(others)
            reported.add(others, after)
            reported.add_sets(recalibration.sets, after[TEMPERATURE], others)
    else:
        crossed = recalibration.crossed(rows)
        if crossed is not None:
            reported.add(rows, crossed)
            if recalibration.sets:
                reported.add_sets(*recalibration.sets_of_half(rows))
    if everyone.total(reported.n)[0]:
        reported.everyones(everyone, list(recalibration.recalibrators), list(recalibration.sets))
    return reported


@dataclass(frozen=True, eq=False)
class StoredFits:
    """What was fitted before, which a test reports on.

    Attributes:
        recalibrators: By name, the temperature first.
        sets: Prediction sets by kind.
    """

    recalibrators: Mapping[str, Recalibrator]
    sets: Mapping[str, PredictionSets]

    @classmethod
    def load(cls, entry: Mapping[str, Any], methods: Sequence[str], alpha: float | None) -> StoredFits:
        """What an entry has of what is asked for, which may be nothing; a warning says what is missing.

        Args:
            entry: See :meth:`Fitted.entry`.
            methods: Recalibrators beside the temperature.
            alpha: Of prediction sets; None for none.
        """
        if entry.get("temperature") is None:
            return cls({}, {})
        stored = entry.get("recalibrators", {})
        at_bound = bool(entry.get("at_bound"))
        recalibrators: dict[str, Recalibrator] = {TEMPERATURE: Temperature(entry["temperature"], at_bound)}
        recalibrators |= {name: load_recalibrator(stored[name]) for name in methods if name in stored}
        plain = {} if alpha is None else entry.get("prediction_sets", {})
        sets = {name: PredictionSets.load(one) for name, one in plain.items() if one["alpha"] == alpha}
        missing = [f"methods=[{name!r}]" for name in methods if name not in stored]
        missing += [] if alpha is None or sets else [f"prediction_sets={alpha:g}"]
        if missing:
            warnings.warn(
                f"TemperatureScaling tests without {' and '.join(missing)}, of which nothing was fitted for these "
                "weights: fit or validate with the same settings first.",
                stacklevel=2,
            )
        return cls(recalibrators, sets)

    def count(self, reported: Reported, rows: Rows) -> None:
        """Count predictions of a test."""
        after = {name: recalibrator(rows.log_p) for name, recalibrator in self.recalibrators.items()}
        reported.add(rows, after)
        reported.add_sets(self.sets, after[TEMPERATURE], rows)
