"""How inputs are perturbed inside a threat model: ``attack(logits_fn, x, y, generator=...) -> x_adv``."""

from lightning_robust.attacks.guard import AttackError, guard
from lightning_robust.attacks.joint import JointThreat
from lightning_robust.attacks.n_fgsm import NFGSM
from lightning_robust.attacks.objectives import cross_entropy, margin
from lightning_robust.attacks.pgd import PGD
from lightning_robust.attacks.threat import ThreatModel

__all__ = ["NFGSM", "PGD", "AttackError", "JointThreat", "ThreatModel", "cross_entropy", "guard", "margin"]
