"""The same attack in its shortest form, to find out whether it works at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_robust.attacks.apgd import APGD
from lightning_robust.attacks.auto_attack import AutoAttack
from lightning_robust.attacks.pgd import PGD
from lightning_robust.attacks.square import Square
from lightning_robust.attacks.worst_case import WorstCase

__all__ = ["shortened"]


def shortened(attack: Any) -> Any:
    """An attack of ours with one step, one restart or one query; others as they are.

    Example:
        >>> from lightning_robust import ThreatModel
        >>> shortened(PGD(ThreatModel("linf", eps=0.1), steps=50, restarts=5)).name
        'pgd1_linf_0.1'
    """
    if isinstance(attack, WorstCase):
        return replace(attack, attacks=tuple(shortened(part) for part in attack.attacks))
    if isinstance(attack, PGD):
        return replace(attack, steps=1, restarts=1, step_size=None)
    if isinstance(attack, APGD):
        return replace(attack, steps=1, restarts=1)
    if isinstance(attack, Square):
        return replace(attack, queries=1)
    return replace(attack, only=("apgd-ce",)) if isinstance(attack, AutoAttack) else attack
