"""What a model looks at, and how that drifts while it trains: ``method(logits_fn, x, target) -> maps``."""

from lightning_robust.saliency.drift import QuantisedMaps, drift, quantised
from lightning_robust.saliency.film import Film
from lightning_robust.saliency.filmstrip import filmstrip
from lightning_robust.saliency.layers import last_feature_map
from lightning_robust.saliency.methods import METHODS, gradcam, gradient, integrated_gradients, method_named
from lightning_robust.saliency.probe_set import Candidates, ProbeSet

__all__ = [
    "METHODS",
    "Candidates",
    "Film",
    "ProbeSet",
    "QuantisedMaps",
    "drift",
    "filmstrip",
    "gradcam",
    "gradient",
    "integrated_gradients",
    "last_feature_map",
    "method_named",
    "quantised",
]
