"""What a model's outputs mean: heads, and objectives that work on any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.attacks.objectives import OBJECTIVES, cross_entropy, gaps, sample_margin
from lightning_robust.divergence import kl_divergence

__all__ = [
    "DivergenceFrom",
    "OnHead",
    "Towards",
    "UsualHead",
    "YesNo",
    "check_objective",
    "head_of",
    "margin_of",
    "narrowed",
    "objective_named",
]


class YesNo:
    """Outputs that are a yes or no each, ``(N,)``, ``(N, 1)`` or ``(N, L)``: binary cross-entropy with logits, summed.

    In plain loops ``objective=YesNo()`` tells an attack that a sample has several labels; a single output is known by
    its shape. Callbacks read the user's own loss instead.

    Example:
        >>> y = torch.tensor([[1.0, 0.0, 1.0]])
        >>> YesNo()(torch.zeros(1, 3), y)
        tensor([2.0794])
    """

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        z = logits.float()
        loss = F.binary_cross_entropy_with_logits(z, y.reshape(z.shape).to(z), reduction="none")
        return loss.flatten(1).sum(1) if loss.ndim > 1 else loss

    def head(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Two classes for every output: log-probabilities ``(N, 2, ...)`` and classes ``(N, ...)``."""
        z = logits.float()
        return torch.stack([F.logsigmoid(-z), F.logsigmoid(z)], 1), (y.reshape(z.shape) > 0.5).long()

    def margin(self, logits: Tensor, y: Tensor) -> Tensor:
        """See :func:`sample_margin`."""
        z = logits.float()
        return sample_margin(torch.where(y.reshape(z.shape) > 0.5, -z, z))


class UsualHead:
    """A head that is known by the shape of its outputs alone: a yes/no one ``(N,)`` or ``(N, 1)``, else classes."""

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        return YesNo()(logits, y) if _is_single(logits) else cross_entropy(logits, y)

    def head(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if _is_single(logits):
            return YesNo().head(logits.reshape(len(logits)), y)
        return logits, y

    def margin(self, logits: Tensor, y: Tensor) -> Tensor:
        if _is_single(logits):
            return YesNo().margin(logits, y)
        return sample_margin(gaps(logits, y), None if y.shape == logits.shape else y >= 0)


_USUAL = UsualHead()


def _is_single(logits: Tensor) -> bool:
    return logits.ndim == 1 or logits.shape[1:] == (1,)


def margin_of(objective: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The margin that belongs to an objective: its own, where its head is not a plain multi-class one."""
    own: Callable[[Tensor, Tensor], Tensor] = getattr(objective, "margin", _USUAL.margin)
    return own


def head_of(objective: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What turns a model's outputs and targets into logits ``(N, K, ...)`` and classes ``(N, ...)``."""
    own: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = getattr(objective, "head", _USUAL.head)
    return own


def narrowed(part: Any, rows: Tensor) -> Any:
    """What belongs to these samples of a batch only: ``part.at(rows)``, or ``part`` itself where rows mean nothing."""
    return part.at(rows) if hasattr(part, "at") else part


@dataclass(frozen=True)
class OnHead:
    """An objective of class logits on whatever head a model has.

    Attributes:
        function: ``(logits (N, K, ...), classes (N, ...)) -> (N,)``.
        owner: The objective whose ``head`` and ``margin`` are those of the model; None for a plain multi-class head.
    """

    function: Any
    owner: Any = None

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        value: Tensor = self.function(*self.head(logits, y))
        return value

    def head(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return head_of(self.owner)(logits, y)

    def margin(self, logits: Tensor, y: Tensor) -> Tensor:
        return margin_of(self.owner)(logits, y)

    def at(self, rows: Tensor) -> OnHead:
        return OnHead(narrowed(self.function, rows), narrowed(self.owner, rows))


@dataclass(frozen=True)
class DivergenceFrom:
    """How far a prediction has moved from a given one, ``KL(given || now)``, ``(N,)``: what TRADES climbs.

    Attributes:
        log_p: The given log-probabilities, ``(N, K, ...)``.
    """

    log_p: Tensor

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        return kl_divergence(self.log_p, logits.float().log_softmax(1))

    def at(self, rows: Tensor) -> DivergenceFrom:
        return DivergenceFrom(self.log_p[rows])


@dataclass(frozen=True)
class Towards:
    """The way to a class instead of away from the right one: a targeted attack.

    Attributes:
        target: Classes ``(N, ...)`` to reach.
        owner: As in :class:`OnHead`.
    """

    target: Tensor
    owner: Any = None

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        return -cross_entropy(*self.head(logits, y))

    def head(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z, right = head_of(self.owner)(logits, y)
        # What has no right class counts nowhere, and has no class to reach.
        nowhere = right < 0 if right.shape == self.target.shape else torch.zeros_like(self.target, dtype=torch.bool)
        return z, self.target.masked_fill(nowhere, -100)

    def margin(self, logits: Tensor, y: Tensor) -> Tensor:
        """How far the target lies above all others; above 0 it is reached, everywhere."""
        z, target = self.head(logits, y)
        return sample_margin(-gaps(z, target), target >= 0)

    def at(self, rows: Tensor) -> Towards:
        return Towards(self.target[rows], narrowed(self.owner, rows))


def objective_named(given: Any, owner: Any, clean_logits: Callable[[], Tensor], y: Tensor) -> Any:
    """The objective that a name or a function stands for, on the head of ``owner``.

    Args:
        given: One of :data:`OBJECTIVES`, ``"kl"``, a function of class logits, or None for ``owner`` itself.
        owner: The model's own loss, or None.
        clean_logits: The model's output for the inputs as they are, asked for by ``"kl"`` alone.
        y: The targets.

    Raises:
        ValueError: If there is no objective of this name.
    """
    if given is None:
        return _USUAL if owner is None else owner
    if given == "kl":
        with torch.no_grad():
            clean, _ = head_of(owner)(clean_logits(), y)
        return OnHead(DivergenceFrom(clean.float().log_softmax(1)), owner)
    if isinstance(given, str):
        check_objective(given)
        return OnHead(OBJECTIVES[given], owner)
    return given if owner is None or hasattr(given, "margin") else OnHead(given, owner)


def check_objective(given: Any) -> None:
    """Whether this is an objective, by name or as a function.

    Raises:
        ValueError: If not.
    """
    names = [*OBJECTIVES, "kl"]
    if not (given is None or callable(given) or given in names):
        raise ValueError(f"objective= must be one of {', '.join(map(repr, names))} or a callable, got {given!r}.")
