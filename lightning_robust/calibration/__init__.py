"""Whether probabilities mean what they say, and how to mend them."""

from lightning_robust.calibration.classwise import Classwise
from lightning_robust.calibration.confidence_grid import ConfidenceGrid
from lightning_robust.calibration.diagram import reliability_diagram
from lightning_robust.calibration.functional import (
    adaptive_calibration_error,
    aurc,
    brier_score,
    calibration_error,
    classwise_calibration_error,
    negative_log_likelihood,
)
from lightning_robust.calibration.isotonic import IsotonicCalibration, fit_isotonic
from lightning_robust.calibration.platt import PlattLabels, PlattScaling, fit_platt, fit_platt_labels
from lightning_robust.calibration.prediction_sets import PredictionSets, SetSums, fit_prediction_sets
from lightning_robust.calibration.recalibrators import (
    RECALIBRATORS,
    Recalibrator,
    cross_fitted,
    fit_recalibrator,
    load_recalibrator,
)
from lightning_robust.calibration.reliability import Reliability
from lightning_robust.calibration.temperature import Temperature, TemperatureFit, fit_temperature
from lightning_robust.calibration.vector import VectorScaling, fit_vector

__all__ = [
    "RECALIBRATORS",
    "Classwise",
    "ConfidenceGrid",
    "IsotonicCalibration",
    "PlattLabels",
    "PlattScaling",
    "PredictionSets",
    "Recalibrator",
    "Reliability",
    "SetSums",
    "Temperature",
    "TemperatureFit",
    "VectorScaling",
    "adaptive_calibration_error",
    "aurc",
    "brier_score",
    "calibration_error",
    "classwise_calibration_error",
    "cross_fitted",
    "fit_isotonic",
    "fit_platt",
    "fit_platt_labels",
    "fit_prediction_sets",
    "fit_recalibrator",
    "fit_temperature",
    "fit_vector",
    "load_recalibrator",
    "negative_log_likelihood",
    "reliability_diagram",
]
