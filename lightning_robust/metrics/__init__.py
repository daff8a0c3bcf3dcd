"""Measurements with state of fixed size."""

from lightning_robust.metrics.sample_scores import SampleScores

__all__ = ["SampleScores"]
