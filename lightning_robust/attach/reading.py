"""One batch of a user's step, read any number of times with other inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.batches import copied, get, rebuilt, resized, selected
from lightning_robust.attach.compiled import is_compiled
from lightning_robust.attach.route import Route
from lightning_robust.attach.sharded import is_sharded
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.attacks.guard import Guarded, guard
from lightning_robust.attacks.heads import objective_named
from lightning_robust.attacks.joint import JointThreat, side_by_side
from lightning_robust.attacks.threat import ThreatModel
from lightning_robust.losses import LossCall
from lightning_robust.randomness import RandomState, seeded, uniform, untouched_random_state

if TYPE_CHECKING:
    from lightning_robust.attach.probe import Probe

__all__ = ["ReadLogits", "Reading"]


@dataclass(frozen=True, eq=False)
class ReadLogits:
    """Model inputs to logits, through the user's own step."""

    reading: Reading

    def __call__(self, x: Tensor) -> Tensor:
        return self.reading.read(x).logits

    def at(self, rows: Tensor) -> ReadLogits:
        return ReadLogits(self.reading.at(rows))

    @property
    def divisible(self) -> bool:
        return self.reading.divisible


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
        self._part: tuple[Tensor, Reading] | None = None  # the rows that were asked for last
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

    def fitted(self, attack: Any, change: Callable[[Any], Any] = lambda threat: threat, **settings: Any) -> Any:
        """An attack of ours, set to this batch: to what :attr:`x` holds, and to the user's loss or an own objective.

        Args:
            attack: Any attack; a foreign one is returned as it is.
            change: Of its threat model, in the end.
            settings: Other values of fields, where the attack has such fields and leaves them open (None).
        """
        known = set() if isinstance(attack, type) or not is_dataclass(attack) else {f.name for f in fields(attack)}
        if not known & {"attacks", "threat"} and (self._probe.mask_path or self._probe.eps_path):
            raise ValueError(
                f"mask_key= and eps_key= go to the `threat` of an attack, and {getattr(attack, 'name', attack)} has "
                "none: it would move all samples alike. Use PGD, APGD, Square or FGSM."
            )
        if not known:
            return attack
        kept: Any = attack
        if getattr(kept, "targeted", None) == "given":
            raise ValueError(
                f"{kept.name} takes the classes to reach in the place of y, but a callback's y are the right ones: it "
                "would help the model. Use targeted='random', 'least-likely' or 'runner-up'."
            )
        new: dict[str, Any] = {name: v for name, v in settings.items() if getattr(kept, name, v) is None}
        if "attacks" in known:
            new["attacks"] = tuple(self.fitted(part, change, **settings) for part in kept.attacks)
        if "objective" in known:
            new["objective"] = self.objective(kept.objective)
        if isinstance(getattr(kept, "threat", None), (ThreatModel, JointThreat)) and "threat" in known:
            new["threat"] = change(self.local(self.threat(kept.threat)))
        if getattr(kept, "keep", None) == "last":
            new.pop("early_exit", None)  # what is left alone keeps its best iterate
        return replace(kept, **new)

    def local(self, threat: ThreatModel | JointThreat) -> Any:
        """Where the batch says so: a region, and a radius for each sample."""
        mask, eps = (
            None if path is None else get(self._step.batch, path)
            for path in (self._probe.mask_path, self._probe.eps_path)
        )
        if mask is None and eps is None:
            return threat
        if isinstance(threat, JointThreat):
            raise ValueError("mask_key= and eps_key= are about one input; here are several (input_key=[...]).")
        if mask is not None:
            mask = mask.unsqueeze(1) if mask.ndim == self.x.ndim - 1 else mask
            if mask.ndim != self.x.ndim or any(m not in (1, n) for m, n in zip(mask.shape, self.x.shape, strict=True)):
                raise ValueError(
                    f"mask_key= must lead to a mask for inputs {tuple(self.x.shape)} (1 where they may change), got "
                    f"{tuple(mask.shape)}."
                )
        if eps is not None and eps.shape != self.x.shape[:1]:
            raise ValueError(
                f"eps_key= must lead to a radius for each of {len(self.x)} samples, got {tuple(eps.shape)}."
            )
        return threat.within(mask, eps)

    def objective(self, given: Any) -> Any:
        """An objective by name or as a function, on this head; None for the user's own loss."""
        return objective_named(given, self, lambda: self.read(self.x).logits, self.y if given == "kl" else self.x)

    def guarded(self, attack: Any) -> Guarded:
        """The attack, held to its own threat model on what :attr:`x` holds."""
        promised = getattr(attack, "threat", None)
        return guard(attack, self.threat(promised) if isinstance(promised, (ThreatModel, JointThreat)) else promised)

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

    @property
    def logits(self) -> ReadLogits:
        """The ``logits_fn`` that attacks are given: differentiable, and able to read some samples only."""
        return ReadLogits(self)

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """The user's own loss for the last read, one number a sample: the objective that attacks climb."""
        return self._last().again(logits).per_sample()

    def margin(self, logits: Tensor, y: Tensor) -> Tensor:
        """How far wrong answers lie above right ones, for this head."""
        return self._last().again(logits).margin()

    def head(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(N, K, ...)`` and classes, whatever this head is; see :meth:`LossCall.class_view`."""
        return self._last().again(logits).class_view()

    def at(self, rows: Tensor) -> Reading:
        """The same step on some samples of its batch; the same object for the same ``rows``."""
        if self._part is None or self._part[0] is not rows:
            batch = selected(self._step.batch, len(self.x), rows.tolist())
            part = Reading(self._probe, self._route, self._step.with_batch(batch), self._state)
            part._draws = self._draws
            self._part = rows, part
        return self._part[1]

    @property
    def divisible(self) -> bool:
        """Whether samples can be read apart from each other with the same result; tried out once for each step.

        They cannot where rows refer to each other (pairs, graphs) or where the step draws random numbers (mixup).
        """
        known, key = self._probe.divisible, (self._step.name, self.module.training)
        if key not in known and len(self.x) > 1:
            known[key] = self._falls_apart()
        return known.get(key, False)

    def _falls_apart(self) -> bool:
        # A compiled network would be compiled anew for each number of samples; of a sharded one all processes run the
        # same number of forwards.
        if is_sharded(self.module) or is_compiled(self.module):
            return False
        before, n = self.call, len(self.x)
        # Two parts drawn at random: pairs must not stay together, nor all samples with the one that they refer to.
        order = uniform(torch.empty(n), seeded(n)).argsort().to(self.x.device)
        try:
            with torch.no_grad():
                whole = self.read(self.x)
                if self._draws or len(whole.logits) != n or len(whole.target) != n:
                    return False
                return all(self._agrees(whole, rows.sort().values) for rows in (order[: n // 2], order[n // 2 :]))
        except (IndexError, KeyError, RuntimeError, ValueError):
            return False
        finally:
            self.call, self._part = before, None

    def _agrees(self, whole: LossCall, rows: Tensor) -> bool:
        """Whether these samples, read by themselves, give what they gave among the others."""
        part = self.at(rows).read(self.x[rows])
        if len(part.logits) != len(rows) or not torch.equal(whole.target[rows], part.target):
            return False
        size = float(whole.logits.abs().max()) + 1e-6
        return bool(((whole.logits[rows] - part.logits).abs() <= 1e-3 * size).all())

    def _last(self) -> LossCall:
        if self.call is None:
            raise ProbeError("the objective was asked for before any logits were read.")
        return self.call

    def batch_with(self, x: Tensor) -> Any:
        """The batch with ``x`` in the place of the input: new containers, everything else as it was."""
        return rebuilt(self._step.batch, self._route.inputs.into(self._step.batch, x))
