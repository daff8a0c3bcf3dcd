"""Whether probabilities mean what they say, and how to mend them."""

from lightning_robust.calibration.diagram import reliability_diagram
from lightning_robust.calibration.reliability import Reliability
from lightning_robust.calibration.temperature import TemperatureFit, fit_temperature

__all__ = ["Reliability", "TemperatureFit", "fit_temperature", "reliability_diagram"]
