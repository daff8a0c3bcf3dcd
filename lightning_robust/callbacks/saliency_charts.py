"""How TensorBoard's Custom Scalars tab shows saliency: drift side by side, each in its band of null and noise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["charts", "show_charts"]

_LINES = {
    "skill to the previous snapshot": "iou10_skill_to_previous",
    "mass on the border, in the region": "mass_(on_border|in_region)",
    "concentration (Gini)": "gini",
}
"""Charts of a method: title, and a regular expression of what they show."""


def charts(area: str, sets: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """A layout for ``SummaryWriter.add_custom_scalars``.

    Args:
        area: First part of the keys.
        sets: Names of probe sets as they stand in keys, e.g. ``val``.
        methods: Names of methods.

    Example:
        >>> layout = charts("saliency", ["val"], ["gradient"])
        >>> layout["saliency: val"]["gradient: skill to the previous snapshot"]
        ['Multiline', ['saliency/val_gradient/iou10_skill_to_previous']]
    """
    layout: dict[str, dict[str, list[Any]]] = {}
    for name in sets:
        shown: dict[str, list[Any]] = {}
        for method in methods:
            key = f"{area}/{name}_{method}"
            shown[f"{method}: overlap with the first snapshot, in its band of null and noise"] = [
                "Margin",
                [f"{key}/iou10_{end}" for end in ("to_anchor", "null", "floor")],
            ]
            for title, metrics in _LINES.items():
                shown[f"{method}: {title}"] = ["Multiline", [f"{re.escape(key)}/{metrics}"]]
        shown["predicted otherwise than at first"] = ["Multiline", [f"{re.escape(f'{area}/{name}')}/flips"]]
        shown["alarms"] = ["Multiline", [f"{re.escape(f'{area}/{name}_{method}')}/alarm" for method in methods]]
        layout[f"{area}: {name}"] = shown
    return layout


def show_charts(trainer: Any, layout: dict[str, dict[str, list[Any]]]) -> None:
    """Write the layout into every logger that takes one; a later layout takes the place of an earlier one."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if hasattr(getattr(logger, "experiment", None), "add_custom_scalars"):
                logger.experiment.add_custom_scalars(layout)
