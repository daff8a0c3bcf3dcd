"""How far a run has come, for radii and weights that grow, and weights that are measured at the start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Weight", "WeightGiven", "epochs_done", "piecewise", "warm"]

WeightGiven = float | Literal["auto"] | dict[int, float]
"""A number, ``"auto"``, or numbers by epoch."""

_EVEN = 0.9  # a loss that is hardly below that of even predictions
_HUGE = 1000.0  # a weight that then is an accident


def epochs_done(trainer: Any, batch_idx: int) -> float:
    """Epochs of training so far, the present batch included; whole ones where their length is not known."""
    batches = trainer.num_training_batches
    part = 0.0 if batches == float("inf") else (batch_idx + 1) / batches
    return float(trainer.current_epoch + part)


def warm(done: float, over: float, start: float = 0.0) -> float:
    """A factor that grows linearly from 0 to 1 over so many epochs.

    Example:
        >>> [warm(done, over=4, start=1) for done in (0.5, 2, 5, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    if not over:
        return 1.0
    return min(1.0, max(0.0, (done - start) / over))


def piecewise(done: float, points: Mapping[float, float]) -> float:
    """A value that runs straight from point to point, and stays before the first and behind the last.

    Args:
        done: Epochs so far.
        points: Values by epoch.

    Example:
        >>> [piecewise(done, {1: 0.0, 5: 0.5}) for done in (0, 2, 5, 9)]
        [0.0, 0.125, 0.5, 0.5]
    """
    ordered = sorted(points.items())
    if done <= ordered[0][0]:
        return float(ordered[0][1])
    for (start, low), (end, high) in pairwise(ordered):
        if done <= end:
            return float(low + (high - low) * (done - start) / (end - start))
    return float(ordered[-1][1])


class Weight:
    """The weight of a penalty: a number, one that changes with the epochs, or one measured at the start.

    Args:
        given: A number; ``{epoch: number}``, with straight lines between (:func:`piecewise`); or ``"auto"``: that which
            makes the weighted penalty as large as the loss in the first step in which there is any.
        owner: Who has it, for error messages.
        gradual: Measure ``"auto"`` over an epoch instead (:meth:`gather`, :meth:`settle`), for penalties that are next
            to 0 before training: of one step of those weights of thousands would follow.
        share: How large the weighted penalty is to be beside the loss, for ``"auto"``.

    Attributes:
        given: As it was given.
        measured: What ``"auto"`` came to; None before that.

    Raises:
        ValueError: If a number is negative or not finite, or there are no epochs or negative ones.

    Example:
        >>> Weight({0: 0.0, 4: 0.1}, "it").at(3.0), Weight("auto", "it").at(3.0)
        (0.07500000000000001, 0.0)

    References:
        The rule for ``"auto"``: Ross et al., `Right for the Right Reasons <https://arxiv.org/abs/1703.03717>`_, 2017,
        section 3: so that "right answers" and "right reasons" have similar orders of magnitude.
    """

    def __init__(
        self, given: float | str | Mapping[int, float], owner: str, *, gradual: bool = False, share: float = 1.0
    ) -> None:
        self.given: float | str | dict[float, float]
        self.owner, self.gradual, self.share = owner, gradual, share
        self.measured: float | None = None
        self._sums: Tensor | None = None  # of loss, penalty and steps
        if isinstance(given, Mapping):
            self.given = {float(epoch): float(number) for epoch, number in given.items()}
            numbers = [*self.given, *self.given.values()]
        elif isinstance(given, str):
            self.given, numbers = given, [] if given != "auto" else [0.0]
        else:
            self.given = float(given)
            numbers = [self.given]
        if not numbers:
            raise ValueError(
                f"{owner}(weight=) must be a number, 'auto', or numbers by epoch such as {{0: 0.0, 5: 0.1}}, got "
                f"{given!r}."
            )
        if not all(0 <= number < math.inf for number in numbers):
            raise ValueError(f"{owner}(weight=) must not be negative, and finite (its epochs too), got {given!r}.")

    @property
    def open(self) -> bool:
        """Whether it has yet to be measured."""
        return self.given == "auto" and self.measured is None

    def forget(self) -> None:
        """Measure anew: another run begins."""
        self.measured = None
        self.start()

    def start(self) -> None:
        """Forget what was gathered: it belongs to another stretch of training."""
        self._sums = None

    def at(self, done: float) -> float:
        """The weight after so many epochs; 0 as long as it has yet to be measured."""
        if isinstance(self.given, dict):
            return piecewise(done, self.given)
        return self.measured or 0.0 if isinstance(self.given, str) else self.given

    def measure(self, trainer: Any, loss: Tensor, term: Tensor) -> str:
        """Set a measured weight, the same one on all processes, and say what was found.

        Args:
            trainer: Brings the processes together: loss and term are the means over all of them.
            loss: The loss that the penalty stands beside, a scalar.
            term: The penalty, without a weight.

        Raises:
            ValueError: If the penalty is negative, so that no weight makes it as large as the loss.
        """
        pair = torch.stack([loss.detach().float(), term.detach().float()])
        loss_is, term_is = trainer.strategy.reduce(pair, reduce_op="mean").tolist()
        return self._set(loss_is, term_is, "step")

    def gather(self, loss: Tensor, term: Tensor, even: Tensor) -> None:
        """Count a step in what :meth:`settle` measures, unless it overflowed. Nothing waits for a device here.

        Args:
            loss: The loss that the penalty stands beside, a scalar.
            term: The penalty, without a weight.
            even: What the loss would be if all classes were equally likely.
        """
        sort = torch.float32 if loss.device.type == "mps" else torch.float64
        step = torch.stack([value.detach().to(sort) for value in (loss, term, even, torch.ones_like(loss))])
        step = torch.where(step.isfinite().all(), step, 0.0)
        self._sums = step if self._sums is None else self._sums + step

    def settle(self, trainer: Any) -> str | None:
        """Set the weight from the means of what was gathered, the same one on all processes, and say what was found.

        It stays open where predictions are still next to even, and the weight would be in the thousands (or is to be a
        part of the loss only): then the penalty has yet to find its scale. To be called by all processes. What was
        gathered is forgotten; None where that was nothing.

        Args:
            trainer: Brings the processes together.

        Raises:
            ValueError: If the penalty is negative, so that no weight makes it as large as the loss.
        """
        if self._sums is None:
            return None
        *sums, steps = trainer.strategy.reduce(self._sums, reduce_op="mean").tolist()
        self.start()
        loss, term, even = (total / steps if steps else 0.0 for total in sums)
        if loss > _EVEN * even and (self.share < 1 or 0 <= term * _HUGE < loss):
            return (
                f"weight 'auto' stays 0 for now: the penalty is {term:.4g}, and predictions are next to even (loss "
                f"{loss:.4g}, of even ones {even:.4g}); it is measured over the first epoch in which the model learns; "
                "where a task is so hard that it never does, give a number"
            )
        return self._set(loss, term, "epoch")

    def _set(self, loss_is: float, term_is: float, when: str) -> str:
        # Smaller than that it is lost in the rounding of the loss: a share of it that nobody meant.
        swallowed = 1e-7 * abs(loss_is)
        if term_is < -swallowed:
            raise ValueError(
                f"{self.owner}(weight='auto') needs a penalty that is not negative, got {term_is:g} in the first "
                f"{when}; give a number."
            )
        if not (math.isfinite(loss_is) and math.isfinite(term_is)) or loss_is <= 0 or term_is <= swallowed:
            return (
                f"weight 'auto' stays 0 for now: the penalty is {term_is:g}, the loss {loss_is:g}; it is measured in "
                f"the first {when} in which both are above 0"
            )
        self.measured = self.share * loss_is / term_is
        part = "" if self.share == 1 else f"{self.share:g} x "
        return f"weight 'auto' is {self.measured:.4g} ({part}loss {loss_is:.4g} / penalty {term_is:.4g})"
