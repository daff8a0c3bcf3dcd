"""One callback a file; state and timing, no mathematics."""

from lightning_robust.callbacks.adversarial_training import AdversarialTraining
from lightning_robust.callbacks.calibration_monitor import CalibrationMonitor
from lightning_robust.callbacks.corruption_monitor import CorruptionMonitor
from lightning_robust.callbacks.ood_monitor import OODMonitor
from lightning_robust.callbacks.random_fill import RandomFill
from lightning_robust.callbacks.refit import Refit, refit_temperature
from lightning_robust.callbacks.robust_accuracy import RobustAccuracy
from lightning_robust.callbacks.saliency_regularization import SaliencyRegularization
from lightning_robust.callbacks.saliency_snapshots import SaliencySnapshots
from lightning_robust.callbacks.shortcut_finder import ShortcutFinder
from lightning_robust.callbacks.temperature_scaling import TemperatureScaling

__all__ = [
    "AdversarialTraining",
    "CalibrationMonitor",
    "CorruptionMonitor",
    "OODMonitor",
    "RandomFill",
    "Refit",
    "RobustAccuracy",
    "SaliencyRegularization",
    "SaliencySnapshots",
    "ShortcutFinder",
    "TemperatureScaling",
    "refit_temperature",
]
