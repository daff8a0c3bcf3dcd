"""How inputs are perturbed inside a threat model: ``attack(logits_fn, x, y, generator=...) -> x_adv``."""

from lightning_robust.attacks.adapters import from_foolbox, from_torchattacks
from lightning_robust.attacks.apgd import APGD
from lightning_robust.attacks.auto_attack import AutoAttack
from lightning_robust.attacks.fgsm import FGSM
from lightning_robust.attacks.guard import AttackError, guard
from lightning_robust.attacks.heads import YesNo
from lightning_robust.attacks.joint import JointThreat
from lightning_robust.attacks.n_fgsm import NFGSM
from lightning_robust.attacks.noise import UniformNoise
from lightning_robust.attacks.objectives import cross_entropy, dlr, margin, targeted_dlr
from lightning_robust.attacks.pgd import PGD
from lightning_robust.attacks.square import Square
from lightning_robust.attacks.threat import ThreatModel
from lightning_robust.attacks.worst_case import WorstCase

__all__ = [
    "APGD",
    "FGSM",
    "NFGSM",
    "PGD",
    "AttackError",
    "AutoAttack",
    "JointThreat",
    "Square",
    "ThreatModel",
    "UniformNoise",
    "WorstCase",
    "YesNo",
    "cross_entropy",
    "dlr",
    "from_foolbox",
    "from_torchattacks",
    "guard",
    "margin",
    "targeted_dlr",
]
