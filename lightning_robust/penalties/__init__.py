"""Scalars that are added to a loss."""

from lightning_robust.divergence import kl_divergence
from lightning_robust.penalties.input_gradient import InputGradientPenalty
from lightning_robust.penalties.mart import misclassification_aware
from lightning_robust.penalties.right_reasons import RightReasons

__all__ = ["InputGradientPenalty", "RightReasons", "kl_divergence", "misclassification_aware"]
