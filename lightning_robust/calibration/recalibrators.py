"""Recalibrators: whatever turns logits into honest log-probabilities, fitted, applied and stored in one way."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_robust.calibration.isotonic import IsotonicCalibration, fit_isotonic
from lightning_robust.calibration.platt import PlattScaling, fit_platt
from lightning_robust.calibration.temperature import Temperature, fit_temperature
from lightning_robust.calibration.vector import VectorScaling, fit_vector

__all__ = ["RECALIBRATORS", "Recalibrator", "cross_fitted", "fit_recalibrator", "load_recalibrator"]

RECALIBRATORS = ("temperature", "vector", "platt", "isotonic")
"""The methods by name: 1, 2 K, 2 (two classes only) and some hundred numbers per class."""


class Recalibrator(Protocol):
    """A fitted, immutable map from logits to recalibrated log-probabilities."""

    @property
    def name(self) -> str:
        """One of :data:`RECALIBRATORS`."""

    @property
    def keeps_order(self) -> bool:
        """Whether classes keep their order in every row, so that accuracy cannot change."""

    @property
    def at_bound(self) -> bool:
        """Whether the data had no optimum to speak of: no error, or nothing said about the labels."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Log-probabilities ``(R, K)`` of logits or log-probabilities ``(R, K)``; rows with NaN stay NaN."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings; :func:`load_recalibrator` reads them."""


def fit_recalibrator(
    method: str, logits: Tensor, labels: Tensor, *, reduce: Callable[[Tensor], Tensor] | None = None
) -> Recalibrator:
    """Fit one of :data:`RECALIBRATORS`.

    Args:
        method: Its name.
        logits: Logits or log-probabilities, ``(R, K)``. A process without rows gives ``(0, K)``.
        labels: Right classes ``(R,)``, integers in ``[0, K)``.
        reduce: Sums a double tensor on the CPU over processes; every process calls it equally often and gets the same
            fit. ``None`` for one process.

    Raises:
        ValueError: If there is no such method (the message names the nearest one), if it does not fit the number of
            classes, if shapes or labels are wrong, or if no row has a finite loss.

    Example:
        >>> z, y = torch.tensor([[3.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])  # 95 % sure, 75 % right
        >>> fit_recalibrator("temperature", z, y)(z[:1]).exp()
        tensor([[0.7500, 0.2500]])
    """
    if method == "temperature":
        fit = fit_temperature(logits, labels, reduce=reduce).applied
        return Temperature(fit.temperature, fit.at_bound)
    if method == "vector":
        return fit_vector(logits, labels, reduce=reduce)
    if method == "platt":
        return fit_platt(logits, labels, reduce=reduce)
    if method == "isotonic":
        return fit_isotonic(logits, labels, reduce=reduce)
    raise _unknown(method)


def load_recalibrator(plain: Mapping[str, Any]) -> Recalibrator:
    """The recalibrator whose :meth:`~Recalibrator.to_dict` this is.

    Raises:
        ValueError: If its name is none of :data:`RECALIBRATORS`.

    Example:
        >>> load_recalibrator({"name": "temperature", "temperature": 1.5, "at_bound": False})
        Temperature(temperature=1.5, at_bound=False)
    """
    for kind in (Temperature, VectorScaling, PlattScaling, IsotonicCalibration):
        if plain.get("name") == kind.name:
            loaded: Recalibrator = kind.load(plain)
            return loaded
    raise _unknown(plain.get("name"))


def cross_fitted(
    method: str,
    logits: Tensor,
    labels: Tensor,
    first: Tensor,
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Recalibrated log-probabilities of the very rows that are fitted on, each half by the fit on the other.

    What is measured on them is what a fit on half of the rows does to rows that it has not seen.

    Args:
        method: One of :data:`RECALIBRATORS`.
        logits: Logits or log-probabilities, ``(R, K)``.
        labels: Right classes ``(R,)``.
        first: Which rows are in the first half, ``(R,)`` bool. Let it depend on the sample alone
            (:func:`~lightning_robust.randomness.priorities`), so that the number of processes changes nothing.
        reduce: See :func:`fit_recalibrator`.

    Returns:
        ``(R, K)``, float64 for float64 logits, else float32.

    Raises:
        ValueError: As :func:`fit_recalibrator`, which includes a half that is empty on all processes.

    Example:
        >>> z = torch.tensor([[3.0, 0.0]]).expand(20, 2)
        >>> y = torch.tensor([0] * 9 + [1] + [0] * 8 + [1, 1])  # 9 of 10 right, then 8 of 10
        >>> cross_fitted("temperature", z, y, first=torch.arange(20) < 10)[[0, 10], 0].exp()
        tensor([0.8000, 0.9000])
    """
    if first.shape != labels.shape or first.dtype != torch.bool:
        raise ValueError(f"expected first= (R,) bool for {len(labels)} rows, got {tuple(first.shape)} {first.dtype}.")
    z = logits if logits.dtype == torch.float64 else logits.float()
    result = torch.empty_like(z)
    for half in (first, ~first):
        other = fit_recalibrator(method, z[~half], labels[~half], reduce=reduce)
        result[half] = other(z[half])
    return result


def _unknown(name: object) -> ValueError:
    near = difflib.get_close_matches(str(name), RECALIBRATORS, 1, cutoff=0.3)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"expected a recalibrator out of {', '.join(RECALIBRATORS)}; got {name!r}.{hint}")
