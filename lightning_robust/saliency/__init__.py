"""What a model looks at, and how that drifts while it trains: ``method(logits_fn, x, target) -> maps``."""

from lightning_robust.saliency.cascade import Cascade, cascading_randomisation
from lightning_robust.saliency.cluster_strips import cluster_strips
from lightning_robust.saliency.clustering import spectral_clusters
from lightning_robust.saliency.completeness import completeness
from lightning_robust.saliency.concentration import concentration, mass, region_named
from lightning_robust.saliency.curves import deletion_curve, insertion_curve
from lightning_robust.saliency.drift import QuantisedMaps, drift, quantised
from lightning_robust.saliency.ensemble import Ensemble, ensemble
from lightning_robust.saliency.film import Film
from lightning_robust.saliency.filmstrip import filmstrip
from lightning_robust.saliency.layers import last_feature_map
from lightning_robust.saliency.methods import (
    METHODS,
    as_method,
    attention_rollout,
    deep_lift,
    from_captum,
    gradcam,
    gradient,
    hidden_tiles,
    input_x_gradient,
    integrated_gradients,
    layercam,
    lrp,
    method_named,
    occlusion,
    smoothgrad,
)
from lightning_robust.saliency.overlays import overlays
from lightning_robust.saliency.permutation import permuted
from lightning_robust.saliency.probe_set import Candidates, Largest, Listed, ProbeSet, Stratified
from lightning_robust.saliency.quality import attack_overlap, quality, sensitivity
from lightning_robust.saliency.sanity import insensitive, noise_floor, null_similarity, skill
from lightning_robust.saliency.shortcuts import Cluster, find_shortcuts

__all__ = [
    "METHODS",
    "Candidates",
    "Cascade",
    "Cluster",
    "Ensemble",
    "Film",
    "Largest",
    "Listed",
    "ProbeSet",
    "QuantisedMaps",
    "Stratified",
    "as_method",
    "attack_overlap",
    "attention_rollout",
    "cascading_randomisation",
    "cluster_strips",
    "completeness",
    "concentration",
    "deep_lift",
    "deletion_curve",
    "drift",
    "ensemble",
    "filmstrip",
    "find_shortcuts",
    "from_captum",
    "gradcam",
    "gradient",
    "hidden_tiles",
    "input_x_gradient",
    "insensitive",
    "insertion_curve",
    "integrated_gradients",
    "last_feature_map",
    "layercam",
    "lrp",
    "mass",
    "method_named",
    "noise_floor",
    "null_similarity",
    "occlusion",
    "overlays",
    "permuted",
    "quality",
    "quantised",
    "region_named",
    "sensitivity",
    "skill",
    "smoothgrad",
    "spectral_clusters",
]
