"""How far an input lies from its class, measured by the spread of features within classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.ood.feature_rows import Summed, TrainingRows, agreed, scores_of
from lightning_robust.ood.moments import Moments

__all__ = ["RelativeMahalanobis"]

# Of the largest variance: what float32 leaves of a direction in which features do not vary.
RANK = 1e-12
SINGULAR = 1e-12  # of the variance over all classes: what double precision leaves of one that is 0 within them


@dataclass(frozen=True, eq=False)
class _Gaussians:
    """What was learned.

    Attributes:
        mean: Of all features, ``(D,)``.
        whitening: ``(D, R)``; it makes the covariance of all features the identity and that within classes diagonal.
        within: Inverse standard deviations within classes after that, ``(R,)``.
        centres: Classes, whitened and divided by their spread, ``(C, R)``.
        relative: Whether the distance to the mean of all counts.
    """

    mean: Tensor
    whitening: Tensor
    within: Tensor
    centres: Tensor
    relative: bool


class RelativeMahalanobis:
    r"""Distance to the nearest class, less the distance to the training data as a whole.

    .. math:: \min_c\, (x - \mu_c)^\top \Sigma^{-1} (x - \mu_c) - (x - \mu_0)^\top \Sigma_0^{-1} (x - \mu_0)

    Classes have means :math:`\mu_c` and share the covariance :math:`\Sigma` within classes; :math:`\mu_0` and
    :math:`\Sigma_0` belong to all samples (all covariances divide by N). With ``relative=False`` only the first
    distance counts, which is the detector of Lee et al. without input preprocessing and without an ensemble of layers.

    Directions in which no training feature varies (units that are always silent, features that repeat others) are
    left out, as by a pseudo-inverse: what an input does there does not count. To the variances in all others
    ``shrinkage`` times their mean is added, so that directions which vary between classes only do not count without
    bound. Classes without samples are left out.

    Means and second moments are streamed in double precision: C x D + D x D numbers, however many samples come.

    Args:
        shrinkage: Share of the mean variance (trace / number of directions) that is added to each, in [0, 1).
        relative: Whether the second distance is subtracted.

    Raises:
        ValueError: If ``shrinkage`` is outside [0, 1).

    Example:
        >>> from lightning_robust.randomness import seeded
        >>> labels = torch.arange(100) % 2
        >>> features = torch.randn(100, 3, generator=seeded(0)) + 10 * labels[:, None]
        >>> detector = RelativeMahalanobis()
        >>> detector.add(features, torch.zeros(100, 2), labels, index=torch.arange(100))
        >>> detector.fit(None)
        >>> near, far = detector(torch.tensor([[10.0, 10.0, 10.0], [10.0, 0.0, 10.0]]), torch.zeros(2, 2))
        >>> bool(near < 0 < far)
        True

    References:
        Ren et al., `A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection
        <https://arxiv.org/abs/2106.09022>`_, 2021, equations 1 to 3; Lee et al., `A Simple Unified Framework for
        Detecting Out-of-Distribution Samples and Adversarial Attacks <https://arxiv.org/abs/1807.03888>`_, 2018.
    """

    _moments: Moments | None

    def __init__(self, *, shrinkage: float = 1e-6, relative: bool = True) -> None:
        if not 0 <= shrinkage < 1:
            raise ValueError(f"expected a shrinkage in [0, 1), a share of the mean variance, got {shrinkage}.")
        self.shrinkage, self.relative = shrinkage, relative
        self.begin()

    @property
    def name(self) -> str:
        """``mahalanobis``, or ``mahalanobis_absolute`` where the distance is not relative."""
        return "mahalanobis" if self.relative else "mahalanobis_absolute"

    def begin(self) -> None:
        """Forget what was learned."""
        self._fit: _Gaussians | None = None
        self._start()

    def add(self, features: Tensor, logits: Tensor, labels: Tensor, index: Tensor) -> None:
        """Learn from training samples; see :class:`~lightning_robust.ood.detectors.Detector`.

        Rows with a negative label are left out.

        Raises:
            ValueError: If shapes do not fit, or labels are not class numbers in ``[0, K)``.
        """
        features, logits, labels, _ = self._rows(features, logits, labels, index)
        classes = logits.shape[1]
        if labels.ndim != 1 or labels.is_floating_point() or (len(labels) and int(labels.max()) >= classes):
            raise ValueError(
                f"expected labels (N,), whole numbers in [0, {classes}) or negative where there is none, got "
                f"{labels.dtype} {tuple(labels.shape)}"
                + (f" up to {labels.max().item()}" if len(labels) else "")
                + "; 'knn' and 'vim' need no labels."
            )
        known = labels >= 0
        x, labels = features.cpu()[known].double(), labels[known].long()
        moments, counts, sums = self._sums(x.shape[1], classes)
        moments.add(x)
        self._counts = counts + labels.bincount(minlength=classes)
        self._class_sums = sums.index_add(0, labels, x)

    def reduce(self, summed: Summed) -> None:
        """Make the samples of all processes known to each."""
        sizes = agreed(self._rows.sizes, summed)
        if not sizes:
            return
        moments, counts, sums = self._sums(*sizes)
        moments.reduce(summed)
        total = summed(torch.cat([counts.double()[:, None], sums], 1))
        self._counts, self._class_sums = total[:, 0].long(), total[:, 1:].contiguous()

    def fit(self, head: nn.Linear | None = None) -> None:
        """Be ready to score; training samples are let go of.

        Raises:
            ValueError: If there were no labelled training samples, all are of one class (every relative score would
                be 0), their features do not vary, or they do not vary within classes and there is no shrinkage.
        """
        if self._moments is None or not self._moments.count:
            raise ValueError("Mahalanobis distances need labelled training samples: call add() before fit().")
        seen = self._counts > 0
        counts, sums = self._counts[seen].double(), self._class_sums[seen]
        if self.relative and len(counts) < 2:
            raise ValueError(
                f"a relative distance needs training samples of two classes, got {self._moments.count} of one; "
                "relative=False does with one."
            )
        mean = self._moments.mean
        share, means = counts / counts.sum(), sums / counts[:, None] - mean
        variances, directions = torch.linalg.eigh(self._moments.scatter / self._moments.count)
        kept = variances > RANK * variances[-1].clamp_min(torch.finfo(torch.float64).tiny)
        variances, directions = variances[kept], directions[:, kept]
        if not len(variances):
            raise ValueError(f"the features of {self._moments.count} training samples are all the same.")
        ridged = variances + self.shrinkage * variances.mean()
        whitening = directions / ridged.sqrt()
        means = means @ whitening
        # Within classes is what is left of all; in these units both are shares of the variance over all classes.
        between = (means.T * share) @ means
        mean_within = (variances - between.diagonal() * ridged).mean()
        within = torch.diag((variances + self.shrinkage * mean_within) / ridged) - between
        spread, rotation = torch.linalg.eigh(within)
        if float(spread[0]) <= SINGULAR:
            raise ValueError(
                f"the features of {self._moments.count} training samples do not vary within their {len(counts)} "
                f"classes in some direction; raise shrinkage={self.shrinkage}, give more samples, or look for a "
                "collapsed model."
            )
        scale = spread.rsqrt()
        self._fit = _Gaussians(mean, whitening @ rotation, scale, means @ rotation * scale, self.relative)
        self._start()

    def __call__(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """Squared distances ``(N,)`` in doubles; NaN for features that are not finite.

        Raises:
            RuntimeError: If nothing was fitted.
            ValueError: If the features have another width.
        """
        if self._fit is None:
            raise RuntimeError("RelativeMahalanobis is not fitted: call add() with training samples, then fit().")
        return scores_of(features, len(self._fit.mean), self._distances)

    def state(self) -> dict[str, Any]:
        """What was learned, for a checkpoint; empty before that. It holds D x D + C x D numbers."""
        return {} if self._fit is None else vars(_on(self._fit, torch.device("cpu"))).copy()

    def load(self, state: dict[str, Any]) -> None:
        """Score as the one did that wrote ``state``, whatever the settings here."""
        self.begin()
        self._fit = _Gaussians(**state) if state else None

    def _start(self) -> None:
        self._rows = TrainingRows()
        self._moments = None
        self._counts = self._class_sums = torch.zeros(0)

    def _sums(self, width: int, classes: int) -> tuple[Moments, Tensor, Tensor]:
        if self._moments is None:
            self._moments = Moments(width)
            self._counts = torch.zeros(classes, dtype=torch.long)
            self._class_sums = torch.zeros(classes, width, dtype=torch.float64)
        return self._moments, self._counts, self._class_sums

    def _distances(self, x: Tensor) -> Tensor:
        assert self._fit is not None  # __call__ has looked
        if self._fit.mean.device != x.device:
            self._fit = _on(self._fit, x.device)
        fit = self._fit
        u = (x - fit.mean) @ fit.whitening
        v = u * fit.within
        nearest = (fit.centres.square().sum(1) - 2 * v @ fit.centres.T).amin(1)
        distance = (nearest + v.square().sum(1)).clamp_min(0)
        return distance - u.square().sum(1) if fit.relative else distance


def _on(fit: _Gaussians, device: torch.device) -> _Gaussians:
    moved: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(fit).items()
    }
    return _Gaussians(**moved)
