"""Callbacks that make a PyTorch Lightning model robust, and tell whether it is.

Names are resolved when they are first used: importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_robust._version import __version__

if TYPE_CHECKING:
    from lightning_robust.attach.checkpoint import read_entry
    from lightning_robust.attach.scaling import calibrated, load_temperature
    from lightning_robust.attacks import (
        APGD,
        FGSM,
        NFGSM,
        PGD,
        AutoAttack,
        Square,
        ThreatModel,
        UniformNoise,
        WorstCase,
    )
    from lightning_robust.callbacks import (
        AdversarialTraining,
        CalibrationMonitor,
        CorruptionMonitor,
        OODMonitor,
        RandomFill,
        RobustAccuracy,
        SaliencyRegularization,
        SaliencySnapshots,
        ShortcutFinder,
        TemperatureScaling,
        refit_temperature,
    )
    from lightning_robust.mixins import CalibratedMixin, RobustTrainingMixin
    from lightning_robust.modes import frozen
    from lightning_robust.penalties import (
        AttributionPrior,
        InputGradientPenalty,
        JacobianPenalty,
        RightReasons,
        SaliencyConsistency,
        SaliencyGuided,
    )
    from lightning_robust.pixels import PixelSpace

__all__ = [
    "APGD",
    "FGSM",
    "NFGSM",
    "PGD",
    "AdversarialTraining",
    "AttributionPrior",
    "AutoAttack",
    "CalibratedMixin",
    "CalibrationMonitor",
    "CorruptionMonitor",
    "InputGradientPenalty",
    "JacobianPenalty",
    "OODMonitor",
    "PixelSpace",
    "RandomFill",
    "RightReasons",
    "RobustAccuracy",
    "RobustTrainingMixin",
    "SaliencyConsistency",
    "SaliencyGuided",
    "SaliencyRegularization",
    "SaliencySnapshots",
    "ShortcutFinder",
    "Square",
    "TemperatureScaling",
    "ThreatModel",
    "UniformNoise",
    "WorstCase",
    "__version__",
    "calibrated",
    "frozen",
    "load_temperature",
    "read_entry",
    "refit_temperature",
]

_HOME = {
    "APGD": "attacks",
    "FGSM": "attacks",
    "NFGSM": "attacks",
    "PGD": "attacks",
    "AdversarialTraining": "callbacks",
    "AutoAttack": "attacks",
    "CalibratedMixin": "mixins",
    "CalibrationMonitor": "callbacks",
    "InputGradientPenalty": "penalties",
    "OODMonitor": "callbacks",
    "PixelSpace": "pixels",
    "RightReasons": "penalties",
    "RobustAccuracy": "callbacks",
    "RobustTrainingMixin": "mixins",
    "SaliencyRegularization": "callbacks",
    "SaliencySnapshots": "callbacks",
    "Square": "attacks",
    "TemperatureScaling": "callbacks",
    "ThreatModel": "attacks",
    "UniformNoise": "attacks",
    "WorstCase": "attacks",
    "calibrated": "attach.scaling",
    "frozen": "modes",
    "load_temperature": "attach.scaling",
    "read_entry": "attach.checkpoint",
    "AttributionPrior": "penalties",
    "JacobianPenalty": "penalties",
    "SaliencyConsistency": "penalties",
    "SaliencyGuided": "penalties",
    "RandomFill": "callbacks",
    "ShortcutFinder": "callbacks",
    "CorruptionMonitor": "callbacks",
    "refit_temperature": "callbacks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
