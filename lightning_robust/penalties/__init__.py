"""Scalars that are added to a loss."""

from lightning_robust.divergence import kl_divergence
from lightning_robust.penalties.attribution_prior import AttributionPrior
from lightning_robust.penalties.consistency import SaliencyConsistency
from lightning_robust.penalties.input_gradient import InputGradientPenalty
from lightning_robust.penalties.jacobian import JacobianPenalty
from lightning_robust.penalties.mart import misclassification_aware
from lightning_robust.penalties.right_reasons import RightReasons
from lightning_robust.penalties.saliency_guided import SaliencyGuided

__all__ = [
    "PENALTIES",
    "AttributionPrior",
    "InputGradientPenalty",
    "JacobianPenalty",
    "RightReasons",
    "SaliencyConsistency",
    "SaliencyGuided",
    "kl_divergence",
    "misclassification_aware",
]

PENALTIES = (
    InputGradientPenalty,
    RightReasons,
    JacobianPenalty,
    SaliencyGuided,
    AttributionPrior,
    SaliencyConsistency,
)
"""The classes whose instances are added to a loss: ``(logits_fn, x, y) -> scalar``."""
