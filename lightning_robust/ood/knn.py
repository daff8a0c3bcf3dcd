"""How far an input lies from the training samples that are nearest to it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.ood.feature_bank import FeatureBank
from lightning_robust.ood.feature_rows import Summed, TrainingRows, in_double, scores_of

__all__ = ["KNN"]

CHUNK = 2**22  # distances at once, 32 MB


@dataclass(frozen=True, eq=False)
class _Neighbours:
    """What was learned: features ``(R, D)`` in float32, which of them counts, and how they become points."""

    features: Tensor
    k: int
    normalize: bool


class KNN:
    r"""The distance to the k-th nearest training sample in the direction of its features.

    .. math:: \lVert z - z_{(k)} \rVert_2, \quad z = x / \lVert x \rVert_2

    Training features are kept for a random sample of the training set, chosen by (seed, number of the sample) alone.
    Distances are computed in double precision, so that they stay exact where features nearly agree.

    Args:
        k: Which neighbour. The paper takes 50 for CIFAR-10, 200 for CIFAR-100 and 1000 for ImageNet, of all training
            samples; of a sample of them that is a share ``capacity / N``, take so much smaller a ``k``. The default, 5
            of the few thousand that a run fits on, is such a share: the 5th of 5000 lies where the 50th of 50,000 does.
        normalize: Whether features are brought to length 1 first, as in the paper, where much depends on it.
        capacity: Training samples kept, over all processes; a score costs as many distances.
        seed: Of their choice.

    Raises:
        ValueError: If ``k`` is not in ``[1, capacity]``.

    Example:
        >>> knn = KNN(k=1)
        >>> logits, labels = torch.zeros(2, 2), torch.tensor([0, 1])
        >>> knn.add(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), logits, labels, index=torch.arange(2))
        >>> knn.fit(None)
        >>> knn(torch.tensor([[5.0, 0.0], [-1.0, 0.0]]), logits)
        tensor([0.0000, 1.4142], dtype=torch.float64)

    References:
        Sun et al., `Out-of-Distribution Detection with Deep Nearest Neighbors <https://arxiv.org/abs/2204.06507>`_,
        2022, algorithm 1.
    """

    def __init__(self, k: int = 5, *, normalize: bool = True, capacity: int = 5000, seed: int = 0) -> None:
        if not 1 <= k <= capacity:
            raise ValueError(f"expected 1 <= k <= capacity, got k={k} and capacity={capacity}.")
        self.k, self.normalize, self.capacity, self.seed = k, normalize, capacity, seed
        self.begin()

    def begin(self) -> None:
        """Forget what was learned."""
        self._fit: _Neighbours | None = None
        self._points: Tensor | None = None  # of the fit, in doubles, where they were last needed
        self._start()

    def add(self, features: Tensor, logits: Tensor, labels: Tensor, index: Tensor) -> None:
        """Learn from training samples; see :class:`~lightning_robust.ood.detectors.Detector`. Labels mean nothing."""
        features, _, _, index = self._rows(features, logits, labels, index)
        self._bank.add(features, index)

    def reduce(self, summed: Summed) -> None:
        """Make the samples of all processes known to each."""
        self._bank.reduce(summed)

    def fit(self, head: nn.Linear | None = None) -> None:
        """Be ready to score; training samples are let go of, except for those that are kept.

        With fewer samples than ``k`` the farthest of them takes the place of the k-th, with a warning: that is a score
        too, and a small training set is no reason to end a run.

        Raises:
            ValueError: If there were no training samples.
        """
        rows = self._bank.rows()
        if not len(rows):
            raise ValueError("KNN has no training features: call add() with training samples before fit().")
        if len(rows) < self.k:
            warnings.warn(f"k={self.k} is more than the {len(rows)} training features; k={len(rows)}.", stacklevel=2)
        self._fit = _Neighbours(rows, min(self.k, len(rows)), self.normalize)
        self._points = None
        self._start()

    def __call__(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """Distances ``(N,)`` in doubles, in [0, 2] if normalised; NaN for features that are not finite.

        Raises:
            RuntimeError: If nothing was fitted.
            ValueError: If the features have another width.
        """
        if self._fit is None:
            raise RuntimeError("KNN is not fitted: call add() with training samples, then fit().")
        return scores_of(features, self._fit.features.shape[1], self._distances)

    def state(self) -> dict[str, Any]:
        """What was learned, for a checkpoint; empty before that. It holds the kept features, R x D numbers."""
        return {} if self._fit is None else {**vars(self._fit), "features": self._fit.features.cpu()}

    def load(self, state: dict[str, Any]) -> None:
        """Score as the one did that wrote ``state``, whatever the settings here."""
        self.begin()
        self._fit = _Neighbours(**state) if state else None

    def _start(self) -> None:
        self._rows, self._bank = TrainingRows(), FeatureBank(self.capacity, self.seed)

    def _distances(self, x: Tensor) -> Tensor:
        assert self._fit is not None  # __call__ has looked
        k, normalize = self._fit.k, self._fit.normalize
        if self._points is None or self._points.device != x.device:
            self._points = _points(self._fit.features.to(x.device), normalize)
        known = self._points
        parts = torch.split(_points(x, normalize), max(1, CHUNK // len(known)))
        # By matrix products: in double precision they are as exact as differences are in single, and much faster.
        distances = (torch.cdist(part, known, compute_mode="use_mm_for_euclid_dist") for part in parts)
        return torch.cat([part.kthvalue(k, dim=1).values for part in distances])


def _points(features: Tensor, normalize: bool) -> Tensor:
    x = in_double(features)
    # A network whose units are all silent gives the zero vector, which has no direction and stays where it is.
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) if normalize else x
