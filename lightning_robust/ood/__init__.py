"""How foreign an input looks to a model: scores of logits, how well they separate, and pictures that are foreign."""

from lightning_robust.ood.scores import SCORES, energy, entropy, max_logit, msp, scores_named, two_class
from lightning_robust.ood.separation import separation
from lightning_robust.ood.synthetic import SYNTHETIC, mosaic, noise, shuffle

__all__ = [
    "SCORES",
    "SYNTHETIC",
    "energy",
    "entropy",
    "max_logit",
    "mosaic",
    "msp",
    "noise",
    "scores_named",
    "separation",
    "shuffle",
    "two_class",
]
