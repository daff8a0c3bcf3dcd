"""Measurements with state of fixed size."""

from lightning_robust.metrics.calibration_error import CalibrationError
from lightning_robust.metrics.reservoir import Reservoir
from lightning_robust.metrics.sample_scores import SampleScores
from lightning_robust.metrics.score_table import ScoreTable
from lightning_robust.metrics.under_attack import UnderAttack

__all__ = ["CalibrationError", "Reservoir", "SampleScores", "ScoreTable", "UnderAttack"]
