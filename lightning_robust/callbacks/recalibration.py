"""Fits on held-out predictions, and what each of them does to predictions that it was not fitted on."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_robust.attach.everyone import Everyone
from lightning_robust.calibration import (
    RECALIBRATORS,
    PredictionSets,
    Recalibrator,
    Temperature,
    TemperatureFit,
    cross_fitted,
    fit_prediction_sets,
    fit_recalibrator,
    fit_temperature,
)
from lightning_robust.randomness import priorities

__all__ = ["SETS", "TEMPERATURE", "Recalibration", "Rows", "check_head", "check_methods"]

SETS = ("lac", "aps")
TEMPERATURE = "temperature"


@dataclass(frozen=True, eq=False)
class Rows:
    """Predictions of this process.

    Attributes:
        log_p: Log-probabilities ``(R, K)``.
        labels: Right classes ``(R,)``.
        sample: Number of the sample of each, ``(R,)``.
        codes: Its group, ``(R,)``, where samples have one.
    """

    log_p: Tensor
    labels: Tensor
    sample: Tensor
    codes: Tensor | None = None

    def where(self, chosen: Tensor) -> Rows:
        """Some of them."""
        codes = None if self.codes is None else self.codes[chosen]
        return Rows(self.log_p[chosen], self.labels[chosen], self.sample[chosen], codes)

    def finite(self) -> Rows:
        """Those with a finite loss."""
        right = self.labels.long().clamp(0, self.log_p.shape[1] - 1)
        finite = self.log_p.gather(1, right[:, None])[:, 0].isfinite()
        return self if bool(finite.all()) else self.where(finite)

    def half(self, share: float, seed: int) -> Tensor:
        """Which belong to a random share of the samples, ``(R,)``; a function of (seed, sample)."""
        return priorities(self.sample, seed) < share

    def __len__(self) -> int:
        return len(self.labels)


def check_methods(methods: Sequence[str], alpha: float | None) -> None:
    """Whether there are such recalibrators beside the temperature, and such prediction sets.

    Raises:
        ValueError: If not.
        ModuleNotFoundError: If ``"isotonic"`` is asked for without scikit-learn.
    """
    unknown = [m for m in methods if m not in RECALIBRATORS or m == TEMPERATURE]
    if isinstance(methods, str) or unknown:
        near = difflib.get_close_matches(str(methods if isinstance(methods, str) else unknown[0]), RECALIBRATORS[1:], 1)
        hint = f" Did you mean [{near[0]!r}]?" if near else ""
        raise ValueError(f"methods= takes some of {', '.join(RECALIBRATORS[1:])} in a list, got {methods!r}.{hint}")
    if "isotonic" in methods and importlib.util.find_spec("sklearn") is None:
        raise ModuleNotFoundError("methods=['isotonic'] needs scikit-learn: pip install scikit-learn")
    if alpha is not None and not 0 < alpha < 1:
        raise ValueError(
            f"prediction_sets= is the share of samples whose set may miss the right class, between 0 and 1, got "
            f"{alpha}."
        )


def check_head(methods: Sequence[str], log_p: Tensor) -> None:
    """Whether methods take predictions ``(R, K)``.

    Raises:
        ValueError: If there are too many classes for one.
    """
    if "platt" in methods and log_p.shape[1] != 2:
        raise ValueError(
            f"methods=['platt'] is for yes/no outputs and two classes, these predictions have {log_p.shape[1]}; "
            "take 'vector' for more."
        )


class Recalibration:
    """Temperature, other recalibrators and prediction sets, fitted on some rows and reported on others.

    Args:
        methods: Recalibrators beside the temperature.
        alpha: Of prediction sets; None for none.
        seed: Of the halves, and of the sets.
        everyone: All processes.
    """

    def __init__(self, methods: Sequence[str], alpha: float | None, seed: int, everyone: Everyone) -> None:
        self.methods, self.alpha, self.seed, self.everyone = methods, alpha, seed, everyone
        self.recalibrators: dict[str, Recalibrator] = {}
        self.sets: dict[str, PredictionSets] = {}

    def fit(self, rows: Rows) -> TemperatureFit:
        """Fit everything on these rows; what the fit of the temperature found, as it is applied.

        Raises:
            ValueError: If a method does not fit the number of classes, or no process has a row.
        """
        reduce = self.everyone.reduce
        found = fit_temperature(rows.log_p, rows.labels, reduce=reduce).applied
        self.recalibrators = {
            TEMPERATURE: Temperature(found.temperature, found.at_bound),
            **{m: fit_recalibrator(m, rows.log_p, rows.labels, reduce=reduce) for m in self.methods},
        }
        scaled = self.recalibrators[TEMPERATURE](rows.log_p)
        self.sets = self._sets(scaled, rows)
        return found

    def _sets(self, scaled: Tensor, rows: Rows) -> dict[str, PredictionSets]:
        if self.alpha is None:
            return {}
        return {
            method: fit_prediction_sets(
                scaled,
                rows.labels,
                alpha=self.alpha,
                method=method,
                seed=self.seed + 2,  # not that of the halves: the draws of one half would all be large
                sample=rows.sample,
                reduce=self.everyone.reduce,
            )
            for method in SETS
        }

    # -- reporting -----------------------------------------------------------------------------------------------

    def crossed(self, rows: Rows) -> dict[str, Tensor] | None:
        """Log-probabilities of the very rows that were fitted on, by method, each half by the fit on the other.

        None where there are no two halves.
        """
        first = rows.half(0.5, self.seed + 1)
        if not min(self.everyone.total(int(first.sum()), int((~first).sum()))):
            return None
        reduce = self.everyone.reduce
        return {m: cross_fitted(m, rows.log_p, rows.labels, first, reduce=reduce) for m in (TEMPERATURE, *self.methods)}

    def sets_of_half(self, rows: Rows) -> tuple[dict[str, PredictionSets], Tensor, Rows]:
        """Sets that are fitted, temperature and all, on one half of rows; the other half, scaled and as it is."""
        first = rows.half(0.5, self.seed + 1)
        fitted_on, rest = rows.where(first), rows.where(~first)
        found = fit_temperature(fitted_on.log_p, fitted_on.labels, reduce=self.everyone.reduce).applied
        at = Temperature(found.temperature, found.at_bound)
        return self._sets(at(fitted_on.log_p), fitted_on), at(rest.log_p), rest

    def recalibrated(self, rows: Rows) -> dict[str, Tensor]:
        """Log-probabilities of rows that were not fitted on, by method."""
        return {method: recalibrator(rows.log_p) for method, recalibrator in self.recalibrators.items()}
