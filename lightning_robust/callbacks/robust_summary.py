"""What a table of samples under attack says: intervals, classes, groups, and a curve over the radius."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_robust.attach.groups import Groups
from lightning_robust.charts import accuracy_curve
from lightning_robust.intervals import share_interval, wilson
from lightning_robust.metrics import SampleScores

__all__ = ["curve_picture", "summary"]


def summary(scores: SampleScores, radii: Sequence[float], groups: Groups | None) -> dict[str, float]:
    """Metrics beside the accuracies.

    Args:
        scores: The samples.
        radii: Of the curve, increasing; may be empty.
        groups: Names of groups, where samples have any.
    """
    low, high = share_interval(scores.worst())
    values = {"interval_low": low, "interval_high": high, "samples": float(scores.n)}
    if radii:
        values["mean_radius"] = float(scores.radii().clamp(max=radii[-1]).mean())
        values |= {f"curve/{radius:.4g}": share for radius, share in zip(radii, scores.holding(radii), strict=True)}
    classes = scores.by("class")
    if classes:
        values["worst_class_accuracy"] = min(robust for _, _, robust in classes.values())
    if groups is not None:
        found = {groups.name(code): measured for code, measured in scores.by("group").items()}
        for name, (_, clean, robust) in found.items():
            values |= {f"group/{name}/clean_accuracy": clean, f"group/{name}/accuracy": robust}
        values["worst_group_accuracy"] = min(robust for _, _, robust in found.values())
    return values


def curve_picture(scores: SampleScores, radii: Sequence[float], name: str, attack: Any, title: str) -> Tensor:
    """Accuracy over the radius of an attack, ``(3, H, W)``."""
    threat = attack.threat
    all_radii = [0.0, *radii]
    shares = scores.holding(all_radii)
    return accuracy_curve(
        all_radii,
        shares,
        [wilson(share, scores.n) for share in shares],
        f"{title}: {name.removesuffix(f'_{threat}')}, n {scores.n}",
        f"radius ({threat.norm}, pixels)",
    )
