"""One batch of a user's step, read any number of times with other inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.batches import copied, get, rebuilt, resized
from lightning_robust.attach.route import Route
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.attacks.guard import Guarded, guard
from lightning_robust.attacks.joint import JointThreat, side_by_side
from lightning_robust.attacks.threat import ThreatModel
from lightning_robust.losses import LossCall
from lightning_robust.randomness import RandomState, untouched_random_state

if TYPE_CHECKING:
    from lightning_robust.attach.probe import Probe

__all__ = ["Reading"]


class Reading:
    """One batch, ready to be read any number of times; made by :meth:`Probe.reading`.

    Every read starts from the same random state as the real step, so that mixup in the step mixes the same pairs.

    Attributes:
        x: The input, ``(N, ...)``; several inputs side by side, ``(N, D)``.
        call: The loss call of the last read.
    """

    def __init__(self, probe: Probe, route: Route, step: Step, state: RandomState) -> None:
        self._probe, self._route, self._step, self._state = probe, route, step, state
        self.x: Tensor = route.inputs.of(step.batch)
        self.call: LossCall | None = None
        self._draws: bool | None = None  # whether the step draws random numbers before its loss

    @property
    def module(self) -> nn.Module:
        """The module whose step is read."""
        return self._step.module

    @property
    def found(self) -> str:
        """What was found, for the user to check."""
        return f"input {self._route.inputs} {tuple(self.x.shape)}, {self._route.found}"

    def threat(self, threat: ThreatModel | JointThreat) -> ThreatModel | JointThreat:
        """A threat model for what :attr:`x` holds, side by side where it holds several inputs."""
        return side_by_side(threat, self._route.inputs.shapes(self._step.batch))

    def guarded(self, attack: Any) -> Guarded:
        """The attack, held to its own threat model on what :attr:`x` holds."""
        promised = getattr(attack, "threat", None)
        return guard(attack, None if promised is None else self.threat(promised))

    @property
    def y(self) -> Tensor:
        """The targets as the loss gets them."""
        if self.call is None:
            path = self._route.target
            leaf = None if path is None else get(self._step.batch, path)
            if isinstance(leaf, Tensor) and not self._probe.overridden and not self._route.cast:
                return leaf
            with torch.no_grad():
                self.read(self.x)
        if self.call is None:
            raise ProbeError("no targets were read.")
        return self.call.target

    def read(self, x: Tensor) -> LossCall:
        """Run the step on ``x`` in the place of the input, up to its loss."""
        if self._draws is False:  # moving the streams about is a good part of reading a tiny net
            return self._read(x)
        # An attack that draws from the global streams goes on with them afterwards: only the step sees a replay.
        with untouched_random_state():
            self._state.restore()
            call = self._read(x)
            if self._draws is None:
                self._draws = not self._state.is_current()
        return call

    def _read(self, x: Tensor) -> LossCall:
        # Another number of inputs (a probe set, steps of a path integral) travels in a template of that many samples.
        template = self._step.batch if len(x) == len(self.x) else resized(self._step.batch, len(self.x), len(x))
        # Copies, since steps may write into their batch; of x as well, since a leaf must not be written to.
        batch = rebuilt(template, self._route.inputs.into(template, x.clone()), copied)
        try:
            self.call = self._probe.call(self._step.with_batch(batch), self._route)
        except (IndexError, RuntimeError, ValueError) as error:
            if template is self._step.batch or isinstance(error, ProbeError):
                raise
            raise ProbeError(
                f"{type(self.module).__name__}.{self._step.name} does not take {len(x)} samples in the place of the "
                f"{len(self.x)} of its batch; do rows of the batch refer to each other (a graph, pairs)? Then other "
                f"inputs cannot travel in it. It says: {type(error).__name__}: {error}"
            ) from error
        return self.call

    def logits(self, x: Tensor) -> Tensor:
        """The logits of ``x``, differentiable: the ``logits_fn`` that attacks are given."""
        return self.read(x).logits

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """The user's own loss for the last read, one number a sample: the objective that attacks climb."""
        return self._last().again(logits).per_sample()

    def margin(self, logits: Tensor, y: Tensor) -> Tensor:
        """How far wrong answers lie above right ones, for this head."""
        return self._last().again(logits).margin()

    def _last(self) -> LossCall:
        if self.call is None:
            raise ProbeError("the objective was asked for before any logits were read.")
        return self.call

    def batch_with(self, x: Tensor) -> Any:
        """The batch with ``x`` in the place of the input: new containers, everything else as it was."""
        return rebuilt(self._step.batch, self._route.inputs.into(self._step.batch, x))
