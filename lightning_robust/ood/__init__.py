"""How foreign an input looks to a model: scores of logits, how well they separate, and pictures that are foreign."""

from lightning_robust.ood.detectors import DETECTORS, Detector, detectors_named
from lightning_robust.ood.histograms import score_histograms
from lightning_robust.ood.knn import KNN
from lightning_robust.ood.mahalanobis import RelativeMahalanobis
from lightning_robust.ood.scores import (
    SCORES,
    energy,
    entropy,
    gen,
    margin,
    max_logit,
    msp,
    scores_named,
    two_class,
)
from lightning_robust.ood.separation import MEASURES, separation, separation_of_counts
from lightning_robust.ood.streaming import StreamedScores, ordered_keys, separation_streamed
from lightning_robust.ood.synthetic import SYNTHETIC, mosaic, noise, shuffle
from lightning_robust.ood.vim import ViM

__all__ = [
    "DETECTORS",
    "KNN",
    "MEASURES",
    "SCORES",
    "SYNTHETIC",
    "Detector",
    "RelativeMahalanobis",
    "StreamedScores",
    "ViM",
    "detectors_named",
    "energy",
    "entropy",
    "gen",
    "margin",
    "max_logit",
    "mosaic",
    "msp",
    "noise",
    "ordered_keys",
    "score_histograms",
    "scores_named",
    "separation",
    "separation_of_counts",
    "separation_streamed",
    "shuffle",
    "two_class",
]
