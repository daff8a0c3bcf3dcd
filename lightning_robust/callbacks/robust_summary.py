"""What a table of samples under attack says: intervals, classes, groups, and a curve over the radius."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_robust.attach.checkpoint import pack_bits
from lightning_robust.attach.groups import Groups
from lightning_robust.charts import accuracy_curve
from lightning_robust.intervals import share_interval, wilson
from lightning_robust.metrics import SampleScores

__all__ = ["curve_picture", "entry", "summary"]


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
        if found:
            values["worst_group_accuracy"] = min(robust for _, _, robust in found.values())
    return values


def entry(
    scores: SampleScores, attacks: Mapping[str, Any], radii: Sequence[float], groups: Groups | None
) -> dict[str, Any]:
    """What checkpoints get: settings and accuracy of each attack, and right or wrong, one bit a sample."""
    accuracies = scores.accuracies()
    found: dict[str, Any] = {
        "attacks": {
            name: {
                "settings": repr(attack),
                "n": scores.n,
                "accuracy": accuracies[f"accuracy_{name}"],
                "correct": pack_bits(scores.correct(name) == 1),
            }
            for name, attack in attacks.items()
        },
        "n": scores.n,
        "clean_accuracy": accuracies["clean_accuracy"],
        "clean_correct": pack_bits(scores.correct() == 1),
        "sample_ids": scores.sample_ids,
        "classes": {str(part): list(measured) for part, measured in scores.by("class").items()},
    }
    if groups is not None:
        found["groups"] = {groups.name(part): list(measured) for part, measured in scores.by("group").items()}
    if radii:
        found["curve"] = {"radii": list(radii), "accuracy": scores.holding(radii)}
    return found


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
