"""Attacks in short: the same objective and threat, as little work as there is."""

from __future__ import annotations

from lightning_robust.attacks import APGD, FGSM, PGD, AutoAttack, Square, ThreatModel, UniformNoise, WorstCase
from lightning_robust.attacks.rehearsal import shortened

THREAT = ThreatModel("linf", 0.1)


def test_settings_that_cost_shrink_and_all_others_stay() -> None:
    long = PGD(THREAT, steps=50, step_size=0.01, restarts=5, objective="dlr", keep="best", targeted=None)
    assert shortened(long) == PGD(THREAT, steps=1, objective="dlr", keep="best")
    assert shortened(APGD(THREAT, restarts=2, targets=9)) == APGD(THREAT, steps=1, targets=9)
    assert shortened(Square(THREAT)) == Square(THREAT, queries=1)
    assert shortened(AutoAttack(THREAT)).only == ("apgd-ce",)
    inner = shortened(WorstCase([long, WorstCase([APGD(THREAT), Square(THREAT)])])).attacks
    assert (inner[0].steps, inner[1].attacks[0].steps, inner[1].attacks[1].queries) == (1, 1, 1)
    for attack in (FGSM(THREAT), UniformNoise(THREAT), print):
        assert shortened(attack) is attack
