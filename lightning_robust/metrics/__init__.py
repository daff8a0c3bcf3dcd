"""Measurements with state of fixed size."""

from lightning_robust.metrics.adaptive_calibration_error import AdaptiveCalibrationError
from lightning_robust.metrics.brier_score import BrierScore
from lightning_robust.metrics.calibration_error import CalibrationError
from lightning_robust.metrics.classwise_calibration_error import ClasswiseCalibrationError
from lightning_robust.metrics.reservoir import Reservoir
from lightning_robust.metrics.sample_scores import SampleScores
from lightning_robust.metrics.score_table import ScoreTable
from lightning_robust.metrics.selective_risk import SelectiveRisk
from lightning_robust.metrics.separation import Separation
from lightning_robust.metrics.streamed_table import StreamedTable
from lightning_robust.metrics.under_attack import UnderAttack

__all__ = [
    "AdaptiveCalibrationError",
    "BrierScore",
    "CalibrationError",
    "ClasswiseCalibrationError",
    "Reservoir",
    "SampleScores",
    "ScoreTable",
    "SelectiveRisk",
    "Separation",
    "StreamedTable",
    "UnderAttack",
]
