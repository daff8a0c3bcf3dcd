"""What every evaluation must show on a trained net: more radius, more steps and more knowledge never help the model."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from robust_digits import small_and_robust

from lightning_robust.attacks import APGD, FGSM, PGD, Square, ThreatModel, UniformNoise, WorstCase
from lightning_robust.randomness import seeded

NORMS: tuple[tuple[Literal["linf", "l2"], float], ...] = (("linf", 0.15), ("l2", 0.6))


def accuracy(norm: Literal["linf", "l2"], attack: Any) -> float:
    """Right as it is and under attack, of 397 digits."""
    net, x, y = small_and_robust(norm)
    found = attack(net, x, y, generator=[seeded(0, i) for i in range(len(x))])
    with torch.no_grad():
        return float(((net(found).argmax(1) == y) & (net(x).argmax(1) == y)).float().mean())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_accuracy_falls_with_the_radius_and_reaches_zero(norm: Literal["linf", "l2"]) -> None:
    whole = {"linf": 1.0, "l2": 8.0}[norm]  # every pixel may be anything
    shares = [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0]
    measured = [
        accuracy(norm, PGD(ThreatModel(norm, share * whole), steps=20, keep="best", early_exit=True))
        for share in shares
    ]
    assert measured[0] > 0.9
    assert measured == sorted(measured, reverse=True)
    assert measured[1] - measured[-1] > 0.3
    assert measured[-1] == 0


@pytest.mark.parametrize(("norm", "eps"), NORMS)
def test_attacks_that_know_and_do_more_find_more(norm: Literal["linf", "l2"], eps: float) -> None:
    threat = ThreatModel(norm, eps)
    noise, one, ten = (
        accuracy(norm, attack) for attack in (UniformNoise(threat), FGSM(threat), PGD(threat, keep="best"))
    )
    auto, square = accuracy(norm, APGD(threat, steps=30)), accuracy(norm, Square(threat, queries=300))
    worst = accuracy(norm, WorstCase([PGD(threat, keep="best"), APGD(threat, steps=30), Square(threat, queries=300)]))
    assert noise > one + 0.02
    assert noise > square + 0.02
    assert one >= ten >= worst
    # In the worst case they start from other random numbers than alone.
    assert worst <= min(ten, auto, square) + 0.01
    assert auto <= ten + 0.01
