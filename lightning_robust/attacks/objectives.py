"""The per-sample scalars that an attack climbs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.divergence import kl_divergence
from lightning_robust.protocols import Objective

__all__ = [
    "OBJECTIVES",
    "DivergenceFrom",
    "OnHead",
    "Towards",
    "UsualHead",
    "YesNo",
    "check_objective",
    "cross_entropy",
    "dlr",
    "gaps",
    "head_of",
    "margin",
    "margin_of",
    "narrowed",
    "objective_named",
    "sample_margin",
    "targeted_dlr",
]

_NO_SPREAD = 1e-12  # logits that are all equal


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits ``(N, K, ...)`` and classes ``(N, ...)`` or class probabilities, ``(N,)``.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    return (
        F.cross_entropy(logits.float(), y, reduction="none").flatten(1).sum(1)
        if logits.ndim > 2
        else (F.cross_entropy(logits.float(), y, reduction="none"))
    )


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """How far the best wrong class lies above the right one, ``(N,)``; above 0 the model is fooled.

    Unlike cross-entropy it ranks a confident mistake above an unsure right answer, whatever the number of classes.

    Args:
        logits: Shape ``(N, K, ...)`` with ``K >= 2``; further dimensions (pixels) are averaged.
        y: Classes ``(N, ...)`` or class probabilities ``(N, K, ...)``.

    Raises:
        ValueError: If the shapes do not belong together.

    Example:
        >>> margin(torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1]))
        tensor([-2.,  2.])
    """
    gap = gaps(logits, y)
    return gap.flatten(1).mean(1) if gap.ndim > 1 else gap


def sample_margin(gap: Tensor, counted: Tensor | None = None) -> Tensor:
    """How far a sample is fooled, ``(N,)``, from the margins of its predictions; above 0 all of them are wrong.

    Where there are several (pixels, labels) it is the share that is wrong, minus 1, and their mean margin decides
    between equal shares. What is NaN is no answer, and wrong.

    Args:
        gap: Of every prediction, ``(N, ...)``.
        counted: Which predictions have a label, ``(N, ...)``; None for all.

    Example:
        >>> sample_margin(torch.tensor([[3.0, -1.0], [3.0, 1.0]])) > 0
        tensor([False,  True])
    """
    gap = gap.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if gap.shape[1:].numel() == 1:
        return gap.reshape(len(gap))
    gap = gap.flatten(1)
    counts = torch.ones_like(gap) if counted is None else counted.flatten(1).to(gap)
    number = counts.sum(1).clamp_min(1)
    wrong = ((gap > 0) * counts).sum(1) / number
    mean = (gap.clamp(-1e6, 1e6) * counts).sum(1) / number
    return wrong - 1 + 0.5 * mean.tanh() / number


def gaps(logits: Tensor, y: Tensor) -> Tensor:
    """The margin of every prediction, ``(N, ...)``; 0 where there is no right class. See :func:`margin`."""
    if y.shape == logits.shape and logits.ndim > 1:
        y = y.argmax(1)
    if logits.ndim < 2 or logits.shape[1] < 2 or y.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"margin expects logits (N, K, ...) with K >= 2 and classes (N, ...), got {tuple(logits.shape)} and "
            f"{tuple(y.shape)}. An objective for another head brings its own `margin` method."
        )
    z = logits.float()
    # Ignored targets (negative by convention) have no right class; index 0 stands in and is masked below.
    ignored = y < 0
    index = y.clamp_min(0).long().unsqueeze(1)
    right = z.gather(1, index).squeeze(1)
    wrong = z.scatter(1, index, -torch.inf).amax(1)
    return (wrong - right).masked_fill(ignored, 0.0)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    r"""Difference of logits ratio, ``(N,)``: the margin in units of the logits' own spread.

    .. math:: -\frac{z_y - \max_{i \ne y} z_i}{z_{(1)} - z_{(3)}}

    Neither a shift nor a factor of the logits moves it, so that a network which is merely too sure of itself cannot
    hide. Where there is no third (finite) logit to divide by, it is the margin.

    Args:
        logits: Shape ``(N, K, ...)`` with ``K >= 2``; further dimensions (pixels) are averaged.
        y: Classes ``(N, ...)`` or class probabilities ``(N, K, ...)``.

    Example:
        >>> dlr(torch.tensor([[3.0, 1.0, 0.0], [300.0, 100.0, 0.0]]), torch.tensor([0, 0]))
        tensor([-0.6667, -0.6667])

    References:
        Croce and Hein, `Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks <https://arxiv.org/abs/2003.01690>`_, 2020, equation 6.
    """
    gap = gaps(logits, y)
    if logits.shape[1] > 2:
        top = logits.float().topk(3, 1).values
        gap = gap / _spread(top[:, 0] - top[:, 2])
    return gap.flatten(1).mean(1) if gap.ndim > 1 else gap


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    r"""The same towards one class, ``(N,)``.

    .. math:: -\frac{z_y - z_t}{z_{(1)} - (z_{(3)} + z_{(4)}) / 2}

    With fewer than four (finite) logits it is the difference ``z_t - z_y`` alone.

    Args:
        logits: Shape ``(N, K, ...)`` with ``K >= 2``; further dimensions (pixels) are averaged.
        y: Classes ``(N, ...)`` to leave; negative where there is none.
        target: Classes ``(N, ...)`` to reach.

    Example:
        >>> targeted_dlr(torch.tensor([[4.0, 2.0, 1.0, 1.0]]), torch.tensor([0]), torch.tensor([1]))
        tensor([-0.6667])

    References:
        Croce and Hein, 2020, equation 7.
    """
    z = logits.float()
    gap = (z.gather(1, target.unsqueeze(1)) - z.gather(1, y.clamp_min(0).unsqueeze(1))).squeeze(1)
    gap = gap.masked_fill(y < 0, 0.0)
    if z.shape[1] >= 4:
        top = z.topk(4, 1).values
        gap = gap / _spread(top[:, 0] - (top[:, 2] + top[:, 3]) / 2)
    return gap.flatten(1).mean(1) if gap.ndim > 1 else gap


def _spread(spread: Tensor) -> Tensor:
    """What a difference of logits is divided by; 1 where a logit is infinite (a class that is switched off)."""
    return torch.where(spread.isfinite(), spread.clamp_min(_NO_SPREAD), 1.0)


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


OBJECTIVES: dict[str, Objective] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}
"""Objectives by name. ``"kl"`` is one more; it needs the clean prediction (:class:`DivergenceFrom`)."""


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
