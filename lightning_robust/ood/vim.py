"""How much of an input's features lies where those of the training data have next to nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.ood.feature_bank import FeatureBank
from lightning_robust.ood.feature_rows import Summed, TrainingRows, agreed, scores_of
from lightning_robust.ood.moments import Moments
from lightning_robust.ood.scores import energy

__all__ = ["ViM"]

NOTHING = 1e-6  # of the features' size: the residual that float32 leaves of a vector inside the subspace


@dataclass(frozen=True, eq=False)
class _Virtual:
    """What was learned: origin ``(D,)``, an orthonormal basis of the residual ``(D, D - dim)``, and alpha."""

    origin: Tensor
    residual: Tensor
    alpha: float


class ViM:
    r"""Virtual-logit matching: :math:`\alpha \lVert R^\top (x - o) \rVert_2 - \log \sum_k e^{z_k}`.

    R spans what the ``dim`` principal directions of the training features leave over, seen from the origin
    :math:`o = -W^+ b`, where all logits of the last layer are zero. :math:`\alpha` makes that norm as large, on
    average over training samples, as the largest logit. The score is the virtual logit plus the free energy
    (:func:`~lightning_robust.ood.energy`), and the log-odds of the virtual class in the paper's softmax.

    Second moments and the largest logit are means over all training samples; the norm is averaged over a random sample
    of them, chosen by (seed, number of the sample) alone.

    Args:
        dim: Dimensions of the principal subspace. ``None``: 1000 of 2048 features or more, 512 of 768 or more, as in
            the paper; of fewer, half of them; never more than half the number of training samples.
        capacity: Training samples of which the norm is averaged; 5000 make it good to about one per cent.
        seed: Of their choice.

    Raises:
        ValueError: If ``dim`` is below 1.

    Example:
        >>> vim = ViM(dim=1)
        >>> features = torch.tensor([[3.0, 0.1], [-3.0, 0.1], [2.0, -0.1], [-2.0, -0.1]])
        >>> head = nn.Linear(2, 2, bias=False)
        >>> logits = torch.tensor([[3.0, -3.0], [-3.0, 3.0], [2.0, -2.0], [-2.0, 2.0]])
        >>> vim.add(features, logits, labels=torch.tensor([0, 1, 0, 1]), index=torch.arange(4))
        >>> vim.fit(head)  # alpha = 2.5 / 0.1
        >>> vim(torch.tensor([[3.0, 0.0], [3.0, 1.0]]), torch.tensor([[3.0, -3.0], [3.0, -3.0]]))
        tensor([-3.0025, 21.9975], dtype=torch.float64)

    References:
        Wang et al., `ViM: Out-Of-Distribution with Virtual-logit Matching <https://arxiv.org/abs/2203.10807>`_, 2022,
        section 4.
    """

    _moments: Moments | None
    _largest_logits: float

    def __init__(self, dim: int | None = None, *, capacity: int = 5000, seed: int = 0) -> None:
        if dim is not None and dim < 1:
            raise ValueError(f"expected a principal subspace of at least one dimension, got dim={dim}.")
        self.dim, self.capacity, self.seed = dim, capacity, seed
        self.begin()

    def begin(self) -> None:
        """Forget what was learned."""
        self._fit: _Virtual | None = None
        self._start()

    def add(self, features: Tensor, logits: Tensor, labels: Tensor, index: Tensor) -> None:
        """Learn from training samples; see :class:`~lightning_robust.ood.detectors.Detector`. Labels mean nothing.

        Raises:
            ValueError: If shapes do not fit, or ``dim`` is not below the number of features.
        """
        features, logits, _, index = self._rows(features, logits, labels, index)
        if self._moments is None:
            dim_of(features.shape[1], self.dim)  # an error should come before a pass over the training set
            self._moments = Moments(features.shape[1])
        self._moments.add(features)
        self._bank.add(features, index)
        self._largest_logits += float(logits.float().amax(1).sum(dtype=torch.float64)) if len(logits) else 0.0

    def reduce(self, summed: Summed) -> None:
        """Make the samples of all processes known to each."""
        sizes = agreed(self._rows.sizes, summed)
        if not sizes:
            return
        self._moments = self._moments or Moments(sizes[0])
        self._moments.reduce(summed)
        self._bank.reduce(summed)
        self._largest_logits = float(summed(torch.tensor([self._largest_logits], dtype=torch.float64)))

    def fit(self, head: nn.Linear | None) -> None:
        """Be ready to score; training samples are let go of.

        Args:
            head: The last layer, which makes logits of these features. Without a bias the origin is 0.

        Raises:
            ValueError: If there is no head, it takes other features, there were no training samples, all of them
                lie in the subspace, or their largest logits are not positive on average.
        """
        if self._moments is None or not self._moments.count:
            raise ValueError("ViM has no training features: call add() with training samples before fit().")
        mean, count = self._moments.mean, self._moments.count
        width = len(mean)
        dim = dim_of(width, self.dim)
        if self.dim is None:  # as many directions as samples leave nothing over
            dim = max(1, min(dim, int(count) // 2))
        origin = _origin(head, width)
        # About the origin, not about the mean: a typical input lies where features are, not at the residual's zero.
        second = torch.addr(self._moments.scatter / count, mean - origin, mean - origin)
        _, directions = torch.linalg.eigh(second)  # from the least to the most principal
        residual = directions[:, : width - dim].contiguous()
        norm = float(_norms(self._bank.rows().double(), origin, residual).mean())
        if norm <= NOTHING * float(second.trace().sqrt()):
            raise ValueError(
                f"all training features lie in {dim} of {width} dimensions, so nothing is left over to measure "
                f"(mean residual {norm:.2g}, of {count} samples); give ViM a smaller dim, or more training samples."
            )
        largest = self._largest_logits / count
        if largest <= 0:
            raise ValueError(
                f"expected logits whose largest is positive on average, got {largest:.3g}, which would turn ViM's "
                "score about; log-probabilities are never positive, give it the outputs of the last layer."
            )
        self._fit = _Virtual(origin, residual, largest / norm)
        self._start()

    def __call__(self, features: Tensor, logits: Tensor) -> Tensor:
        """Scores ``(N,)`` in doubles; NaN for features that are not finite.

        Raises:
            RuntimeError: If nothing was fitted.
            ValueError: If the features have another width, or the logits have not two or more classes.
        """
        if self._fit is None:
            raise RuntimeError("ViM is not fitted: call add() with training samples, then fit() with the last layer.")
        return scores_of(features, len(self._fit.origin), lambda x: self._scores(x, logits))

    def state(self) -> dict[str, Any]:
        """What was learned, for a checkpoint; empty before that. It holds D x (D - dim) numbers."""
        if self._fit is None:
            return {}
        return {**vars(self._fit), "origin": self._fit.origin.cpu(), "residual": self._fit.residual.cpu()}

    def load(self, state: dict[str, Any]) -> None:
        """Score as the one did that wrote ``state``, whatever the settings here."""
        self.begin()
        self._fit = _Virtual(**state) if state else None

    def _start(self) -> None:
        self._rows, self._bank = TrainingRows(), FeatureBank(self.capacity, self.seed)
        self._moments = None
        self._largest_logits = 0.0

    def _scores(self, x: Tensor, logits: Tensor) -> Tensor:
        assert self._fit is not None  # __call__ has looked
        if self._fit.origin.device != x.device:
            self._fit = replace(
                self._fit, origin=self._fit.origin.to(x.device), residual=self._fit.residual.to(x.device)
            )
        virtual = self._fit.alpha * _norms(x, self._fit.origin, self._fit.residual)
        return virtual + energy(logits.detach()).to(x.device).double()


def dim_of(width: int, dim: int | None) -> int:
    """Dimensions of the principal subspace of ``width`` features.

    Raises:
        ValueError: If nothing would be left over.

    Example:
        >>> dim_of(2048, None), dim_of(768, None), dim_of(512, None), dim_of(512, 100)
        (1000, 512, 256, 100)
    """
    if dim is None:
        dim = 1000 if width >= 2048 else 512 if width >= 768 else width // 2
    if not 1 <= dim < width:
        raise ValueError(
            f"expected 1 <= dim < {width}, the number of features, got dim={dim}: ViM measures what the principal "
            f"subspace leaves over; half of the features is dim={width // 2}."
        )
    return dim


def _origin(head: nn.Linear | None, width: int) -> Tensor:
    if head is None:
        raise ValueError(
            "ViM needs the last layer, a linear one that makes logits of the features; name the module whose output "
            "the logits are, or take 'mahalanobis' or 'knn', which need none."
        )
    weight = head.weight.detach().cpu().double()
    if weight.shape[1] != width:
        raise ValueError(
            f"expected the last layer to take the {width} features that were learned from, got one that takes "
            f"{weight.shape[1]}; features and head must belong together."
        )
    if head.bias is None:
        return weight.new_zeros(width)
    origin: Tensor = -torch.linalg.pinv(weight) @ head.bias.detach().cpu().double()
    return origin


def _norms(x: Tensor, origin: Tensor, residual: Tensor) -> Tensor:
    return ((x - origin) @ residual).square().sum(1).sqrt()
