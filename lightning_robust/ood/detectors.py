"""Out-of-distribution detectors: scores of features, learned from training samples."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_robust.ood.feature_rows import Summed
from lightning_robust.ood.knn import KNN
from lightning_robust.ood.mahalanobis import RelativeMahalanobis
from lightning_robust.ood.vim import ViM

__all__ = ["DETECTORS", "Detector", "detectors_named"]


class Detector(Protocol):
    """A score that is learned from training samples: the higher, the more foreign.

    ``begin``, then ``add`` for every batch, ``reduce`` where there are several processes, ``fit``; then it scores.
    Whoever follows this protocol is a detector, no base class is needed. An attribute ``name`` is optional.

    Example:
        How far an input's features are from those of the average training sample:

        >>> class DistanceToMean:
        ...     def begin(self):
        ...         self.sums = torch.zeros(2, dtype=torch.float64)  # of two features
        ...         self.count = torch.zeros(1, dtype=torch.float64)
        ...     def add(self, features, logits, labels, index):
        ...         self.sums, self.count = self.sums + features.cpu().double().sum(0), self.count + len(features)
        ...     def reduce(self, summed):
        ...         self.sums, self.count = summed(self.sums), summed(self.count)
        ...     def fit(self, head):
        ...         self.mean = self.sums / self.count
        ...     def __call__(self, features, logits):
        ...         return (features.double() - self.mean.to(features.device)).norm(dim=1)
        ...     def state(self):
        ...         return {"mean": self.mean}
        ...     def load(self, state):
        ...         self.mean = state["mean"]
        >>> import torch
        >>> [(name, detector)] = detectors_named([DistanceToMean()]).items()
        >>> name
        'distance_to_mean'
        >>> detector.begin()
        >>> logits, labels, index = torch.zeros(2, 2), torch.tensor([0, 1]), torch.arange(2)
        >>> detector.add(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), logits, labels, index)
        >>> detector.fit(None)
        >>> detector(torch.tensor([[1.0, 1.0], [4.0, 5.0]]), logits)
        tensor([0., 5.], dtype=torch.float64)
    """

    def begin(self) -> None:
        """Forget what was learned."""

    def add(self, features: Tensor, logits: Tensor, labels: Tensor, index: Tensor) -> None:
        """Learn from a batch of training samples.

        Args:
            features: ``(N, D)`` of any float type, on any device.
            logits: ``(N, K)``, as the model gives them.
            labels: Right classes ``(N,)``, negative where there is none.
            index: Number of each sample among all training samples, ``(N,)``, from 0. Whoever keeps some of them
                chooses by it, so that the order of samples and the number of processes mean nothing.
        """

    def reduce(self, summed: Summed) -> None:
        """Sum over processes; called once, after the last ``add``, where there are several.

        Every process calls it, also one that has no samples and knows no shapes; so all agree about these first.

        Args:
            summed: Sums a tensor of doubles on the CPU; all processes give one of the same shape.
        """

    def fit(self, head: nn.Linear | None) -> None:
        """Be ready to score.

        Args:
            head: The layer that makes logits of the features, if there is one.
        """

    def __call__(self, features: Tensor, logits: Tensor) -> Tensor:
        """Features ``(N, D)`` and logits ``(N, K)`` to scores ``(N,)``; higher = more out-of-distribution."""

    def state(self) -> dict[str, Any]:
        """What was learned, as plain numbers, strings, lists, dicts and tensors for a checkpoint."""

    def load(self, state: dict[str, Any]) -> None:
        """Score as the detector did that wrote ``state``."""


DETECTORS: dict[str, Callable[[], Detector]] = {"mahalanobis": RelativeMahalanobis, "knn": KNN, "vim": ViM}
"""The detectors by name, with default settings."""

WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # where one ends in camel case
METHODS = ("begin", "add", "reduce", "fit", "__call__", "state", "load")


def detectors_named(detectors: Sequence[str | Detector]) -> dict[str, Detector]:
    """Detectors by the name under which their scores are reported, in the order given.

    Args:
        detectors: Names out of :data:`DETECTORS`, each of which makes a new one, or objects that follow
            :class:`Detector`. Those are taken under their ``name`` if they have one, else under that in
            :data:`DETECTORS`, else under the name of their class in snake case.

    Raises:
        ValueError: If there is no such detector (the message names the nearest one), or two have the same name.
        TypeError: If something is no detector; the message names the methods that it lacks.

    Example:
        >>> list(detectors_named(["mahalanobis", KNN(k=10)]))
        ['mahalanobis', 'knn']
    """
    found: dict[str, Detector] = {}
    for given in detectors:
        name, detector = (given, _made(given)) if isinstance(given, str) else (_name_of(given), given)
        if name in found:
            raise ValueError(f"two detectors are called {name!r}; give one of them another `name`.")
        found[name] = detector
    return found


def _made(name: str) -> Detector:
    if name not in DETECTORS:
        near = difflib.get_close_matches(name, DETECTORS, 1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected detectors out of {', '.join(DETECTORS)}; got {name!r}.{hint}")
    return DETECTORS[name]()


def _name_of(detector: Detector) -> str:
    if isinstance(detector, type):
        raise TypeError(f"expected a detector, got the class {detector.__name__}; call it: {detector.__name__}().")
    missing = [method for method in METHODS if not callable(getattr(detector, method, None))]
    if missing:
        raise TypeError(
            f"expected a detector, got {type(detector).__name__} without {', '.join(missing)}; see ood.Detector."
        )
    given = getattr(detector, "name", None)
    if isinstance(given, str):
        return given
    known = [name for name, made in DETECTORS.items() if made is type(detector)]
    return known[0] if known else WORDS.sub("_", type(detector).__name__).lower()
