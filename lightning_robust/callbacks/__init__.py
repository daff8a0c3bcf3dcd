"""One callback a file; state and timing, no mathematics."""

from lightning_robust.callbacks.adversarial_training import AdversarialTraining
from lightning_robust.callbacks.robust_accuracy import RobustAccuracy

__all__ = ["AdversarialTraining", "RobustAccuracy"]
