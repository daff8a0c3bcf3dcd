"""The temperature that a checkpoint brings to measurements under shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_robust.attach.scaling import applied_temperature

__all__ = ["Brought", "brought"]


@dataclass(frozen=True)
class Brought:
    """A temperature out of a checkpoint.

    Attributes:
        temperature: T.
        stale: What to say where it is about other weights; empty where it is about those of the checkpoint.
    """

    temperature: float
    stale: str


def brought(entry: Mapping[str, Any], area: str) -> Brought | None:
    """The newest temperature of a checkpoint; None if there is none.

    A fit without CorruptionMonitor may have had TemperatureScaling, and a temperature may have been fitted again after
    the fit. At its lower bound it says nothing, and nothing is changed.

    Args:
        entry: What this package wrote into the checkpoint.
        area: The section of CorruptionMonitor.

    Example:
        >>> entry = {"global_step": 9, "shift": {"temperature": 2.0, "measured_step": 5}}
        >>> brought(entry | {"calibration": {"temperature": 1.5, "fit_step": 9}}, "shift")
        Brought(temperature=1.5, stale='')
    """
    steps = ((area, "measured_step"), ("calibration", "fit_step"))
    found = [(entry[name].get(step, -1), entry[name]) for name, step in steps if "temperature" in entry.get(name, {})]
    if not found:
        return None
    fitted, section = max(found, key=lambda one: one[0])  # the first of equals
    weights = entry.get("global_step", fitted)
    stale = (
        f"the temperature of the checkpoint was fitted at step {fitted}, its weights are from step {weights}: what is "
        "measured at this temperature belongs to other weights. Validate before saving, or fit it again "
        "(refit_temperature)."
    )
    return Brought(applied_temperature(section), "" if fitted == weights else stale)
