"""Train a model to look at the right things: a penalty on input gradients, added to the user's own loss."""

from __future__ import annotations

import inspect
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.base import RobustCallback
from lightning_robust.attach.batches import InputKey, Key, Path, as_path, get, shown
from lightning_robust.attach.compiled import is_compiled
from lightning_robust.attach.inputs import Inputs
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.schedule import Weight, WeightGiven, epochs_done, warm
from lightning_robust.attach.seam import clean_batch, install
from lightning_robust.attach.step import Step
from lightning_robust.callbacks.adversary import threat_of
from lightning_robust.losses import LossCall
from lightning_robust.penalties import (
    AttributionPrior,
    InputGradientPenalty,
    JacobianPenalty,
    RightReasons,
    SaliencyConsistency,
    SaliencyGuided,
)
from lightning_robust.penalties.preflight import preflight, way_around
from lightning_robust.randomness import RandomState, seeded

__all__ = ["SaliencyRegularization"]

OFFERED = ("call", "logits", "reuse", "mask", "generator", "clean", "attacked")  # to a penalty, by keyword

Penalty = (
    InputGradientPenalty
    | RightReasons
    | JacobianPenalty
    | SaliencyGuided
    | AttributionPrior
    | SaliencyConsistency
    | Callable[..., Any]
)


class SaliencyRegularization(RobustCallback):
    """Add a weighted penalty on input gradients to the loss of an unchanged module.

    =========================  =============================================================  ====================
    penalty                    what is penalised                                              more forwards a step
    =========================  =============================================================  ====================
    ``InputGradientPenalty``   how fast the loss changes with the input                       1, or 0 (see method)
    ``RightReasons``           what a mask in the batch says must not matter                  1, or 0
    ``JacobianPenalty``        how fast any output changes with the input                     1 a projection, or 0
    ``SaliencyGuided``         a prediction that rests on what is not salient                 1
    ``AttributionPrior``       explanations that are not smooth, or not sparse                1 a sample
    ``SaliencyConsistency``    explanations that change under attack                          1, and its own attack
    =========================  =============================================================  ====================

    The penalty reads the step's own forward: the loss that the step calls (class weights, label smoothing, in-step
    mixup with soft targets) and the batch that it gets, the attacked one where
    :class:`~lightning_robust.AdversarialTraining` feeds it. Before the first step the penalty and its gradients are
    computed once, so that a network without second derivatives fails at once, with the remedy. BatchNorm's running
    statistics see nothing of it.

    Args:
        penalty: A penalty of :mod:`lightning_robust.penalties`, or a function ``(logits_fn, x, y) -> scalar``; it is
            given ``call``, ``logits``, ``reuse``, ``mask``, ``generator`` (seeded), ``clean`` (the input before it was
            attacked; None if it was not) and, if it has an ``attack`` of its own, ``attacked`` too, as far as it takes
            such keywords.
        weight: What it is multiplied by. It does not depend on the batch size. ``{0: 0.0, 5: 0.1}``: by epochs done, in
            straight lines, in each step a little. ``"auto"``: measured in the first step, so that the weighted penalty
            is as large there as the loss call that is read (not what the step returns); the same on all processes, and
            kept in checkpoints. Where the penalty is 0 in that step, it is measured in the first one in which it is
            not. RightReasons, InputGradientPenalty and JacobianPenalty, which are next to 0 before training, are
            measured over the first epoch in which the model learns: their weight is 0 until then, and mean loss over
            mean penalty afterwards; a tenth of it for the two that know no mask, as they are never to win. Not for
            SaliencyGuided and SaliencyConsistency. A weight of exactly 0 costs nothing: the penalty is not computed.
        at: ``"fed"``: at the batch that the step gets. ``"clean"``: at the batch as it was (one more forward where an
            attack feeds the step).
        warmup_epochs: The weight, whatever it is, grows linearly from 0 over so many epochs, in each step a little.
        seed: Of the penalty's random numbers, if it draws any; they are a function of (seed, rank, step, batch), the
            penalty and ``name``.
        input_key: Where in the batch the input is, if it cannot be told; a list for several inputs.
        target_key: Where the target is, if the loss cannot be read.
        logits_fn: ``(module, batch) -> logits`` for hand-written losses; needs ``target_key``.
        loss_index: Which loss call of the step is meant, 0 for the first: of a step that calls its loss twice (mixup as
            two cross-entropies) one is read.
        name: Tells two callbacks of this class with one kind of penalty apart.

    Logs ``robust/train/{penalty}`` (weighted) and ``robust/train/{penalty}_weight``, e.g.
    ``robust/train/input_gradient``. Under manual optimisation it joins the first ``self.manual_backward(loss)``
    behind the loss that it is about; with ``logits_fn=`` the first one whose loss trains some of its parameters.

    Raises:
        ValueError: If a setting is out of range.
        TypeError: If the penalty is no callable, or an attribution of captum, which cannot train anything.

    Example:
        >>> SaliencyRegularization(RightReasons(mask_key=2), weight=1.0).key("train", "right_reasons")
        'robust/train/right_reasons'

    References:
        Ross and Doshi-Velez, 2018, https://arxiv.org/abs/1711.09404. Finlay and Oberman, 2019,
        https://arxiv.org/abs/1905.11468. Ross et al., 2017, https://arxiv.org/abs/1703.03717 (also for ``"auto"``).
        Hoffman et al., 2019, https://arxiv.org/abs/1908.02729. Ismail et al., 2021, https://arxiv.org/abs/2111.14338.
        Erion et al., 2021, https://arxiv.org/abs/1906.10670. Wang and Kong, 2022, https://arxiv.org/abs/2205.07279.
    """

    def __init__(
        self,
        penalty: Penalty,
        weight: WeightGiven = 0.1,
        *,
        at: str = "fed",
        warmup_epochs: float = 0.0,
        seed: int = 0,
        input_key: InputKey | None = None,
        target_key: Key | None = None,
        logits_fn: Callable[..., Any] | None = None,
        loss_index: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__("robust", name, Probe(input_key, target_key, logits_fn, loss_index))
        owner = getattr(penalty, "__self__", penalty)  # of a bound method
        if str(getattr(owner, "__module__", "")).split(".")[0] == "captum":
            raise TypeError(
                f"{getattr(owner, '__name__', type(owner).__name__)} of captum is not differentiable with respect to "
                "parameters: as a penalty it trains nothing. Use InputGradientPenalty or another one of "
                "lightning_robust.penalties, or write one with torch.autograd.grad(..., create_graph=True)."
            )
        if not callable(penalty) or isinstance(penalty, type):
            raise TypeError(f"penalty= must be a callable (logits_fn, x, y) -> scalar, got {penalty!r}.")
        self.weight = Weight(
            weight,
            type(self).__name__,
            gradual=bool(getattr(penalty, "starts_flat", False)),
            share=float(getattr(penalty, "auto_share", 1.0)),
        )
        if weight == "auto" and getattr(penalty, "starts_at_zero", False):
            raise ValueError(
                f"weight='auto' is measured in the first step, where {type(penalty).__name__} is next to 0: weights of "
                "thousands would follow. Its scale does not depend on the model; give a number, 1 to begin with."
            )
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs= must not be negative, got {warmup_epochs}.")
        if at not in ("fed", "clean"):
            raise ValueError(f"at= must be 'fed' or 'clean', got {at!r}.")
        self.penalty, self.at, self.warmup_epochs, self.seed = penalty, at, warmup_epochs, seed
        named = getattr(penalty, "name", None) or getattr(penalty, "__name__", type(penalty).__name__)
        self.penalty_name = str(named).strip("<>")  # of a lambda
        self._takes = _keywords(penalty)
        key = getattr(penalty, "mask_key", None)
        self._mask_path: Path | None = None if key is None else as_path(key)
        self._trainer: Any = None
        self._batch_idx = 0
        self._checked = False
        self._reuse = True
        self._waits = False  # a weight that could not be measured yet was said to be so

    @property
    def state_key(self) -> str:
        return f"{super().state_key}{self.penalty_name}"

    def clashes(self, other: RobustCallback) -> bool:
        return self.penalty_name == getattr(other, "penalty_name", None)

    def settings(self) -> Mapping[str, Any]:
        return {
            "penalty": self.penalty,
            "weight": self.weight.given,
            "at": self.at,
            "warmup_epochs": self.warmup_epochs,
        }

    def __str__(self) -> str:
        return f"SaliencyRegularization({self.penalty_name})"

    # -- when ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.global_step == 0:  # a checkpoint is read after this
            self.weight.forget()

    def section(self) -> Mapping[str, Any]:
        measured = self.weight.measured
        return {} if measured is None else {"penalty_weights": {self.key("train", self.penalty_name): measured}}

    def restore(self, entry: Mapping[str, Any]) -> None:
        if self.weight.open:
            self.weight.measured = entry.get("penalty_weights", {}).get(self.key("train", self.penalty_name))

    def attach(self, trainer: Any, pl_module: Any) -> None:
        self._trainer, self._checked, self._waits = trainer, False, False
        self.weight.start()
        if self.weight.open and self.weight.gradual and trainer.max_epochs == 1:
            warnings.warn(
                f"{self}: weight='auto' is measured over the first epoch, and 0 until then; with max_epochs=1 the "
                "penalty trains nothing. Give a number.",
                stacklevel=2,
            )
        # A compiled network keeps no graph for a second backward pass; the direction then costs a forward of its own.
        self._reuse = not is_compiled(pl_module)
        if not self._reuse and getattr(self.penalty, "method", None) == "double_backward":
            raise RuntimeError(
                f"{self}: a compiled network has no second derivative. Use {way_around(self.penalty)}, or leave the "
                "network uncompiled."
            )
        handle = install(
            pl_module,
            str(self),
            add=self._add,
            # Who does not take the logits does not differentiate them by the input: nobody pays for its gradient.
            track=self._tracked if self._reuse and "logits" in self._takes and self.probe.logits_fn is None else None,
            watched=self.probe.logits_fn is None,
            loss_index=self.probe.loss_index,
            at=self.at,
            by_hand=self.by_hand,
        )
        self.on_detach(handle.detach)
        self.on_detach(self._forget)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch_idx = batch_idx

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        # Not at the end of the epoch: validation, and what it saves, comes before that.
        found = self.weight.settle(trainer) if self.weight.open and trainer.is_last_batch else None
        if found is not None:
            self._tell(trainer, found)

    def _forget(self) -> None:
        self._trainer = None

    # -- what ----------------------------------------------------------------------------------------------------

    def _input(self, step: Step) -> Inputs:
        return self.probe.route(step).inputs

    def _tracked(self, step: Step) -> Inputs | None:
        """Where the step's input is; nothing where the penalty will not be computed: its gradient costs."""
        return self._input(step) if self.weight.open or self._weight() else None

    def _weight(self) -> float:
        done = epochs_done(self._trainer, self._batch_idx)
        return self.weight.at(done) * warm(done, self.warmup_epochs)

    def _add(self, step: Step, call: LossCall | None, state: RandomState) -> Mapping[str, Tensor]:
        if not self._checked:
            self._first_batch(step, state)
        value: Tensor | None = None
        if self.weight.open or self._weight():
            value, seen = self._value(step, call, state)
            if self.weight.open:
                # Who may ask for the loss of another input first is not measured by what it asks for.
                self._measure(step, call or (seen if self.weight.gradual else None), state, value)
        weight = self._weight()
        # Not 0 times the penalty, which may be NaN.
        term = weight * value if weight and value is not None else None
        rows = len(self._input(step).of(step.batch))
        weighted = 0.0 if term is None else term.detach()
        for metric, logged in {self.penalty_name: weighted, f"{self.penalty_name}_weight": weight}.items():
            step.module.log(self.key("train", metric), logged, on_step=False, on_epoch=True, batch_size=rows)  # type: ignore[operator]  # a LightningModule
        return {} if term is None else {self.penalty_name: term}

    def _value(self, step: Step, call: LossCall | None, state: RandomState) -> tuple[Tensor, LossCall | None]:
        """The penalty without a weight, and the first loss that it asked for: that of the input, if it asked at all."""
        more = self._offered(step)
        asked: list[LossCall] = []
        # As the step is: train mode, dropout masks and mixup replayed; running statistics stay with the step's own.
        with self.probe.reading(step, training=None, state=state) as reading:
            leaf = step.tracked.get(self._input(step))
            own = call if leaf is not None or not self._reuse or "logits" not in self._takes else None

            def loss_of(logits: Tensor) -> LossCall:
                seen = own or reading.call
                if seen is None:
                    raise RuntimeError(f"{self}: the penalty asked for the loss before it computed any logits.")
                asked.append(seen.again(logits))
                return asked[-1]

            offered = {"call": loss_of, "logits": own and own.logits, "reuse": self._reuse, **more}
            value: Tensor = self.penalty(
                reading.logits,
                reading.x if own is None or leaf is None else leaf,
                reading.y if own is None else own.target,
                **{keyword: value for keyword, value in offered.items() if keyword in self._takes},
            )
        return value, asked[0] if asked else None

    def _mask(self, step: Step, path: Path) -> Tensor:
        mask = get(step.batch, path)
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"{self} expects masks, a tensor, at {shown(path)}, got {type(mask).__name__}; where nothing is marked "
                "the batch holds zeros."
            )
        return mask

    def _offered(self, step: Step) -> dict[str, Any]:
        """What a penalty may need beside the forward of the step."""
        offered: dict[str, Any] = {"generator": self._generator()} if "generator" in self._takes else {}
        if self._mask_path is not None:
            offered["mask"] = self._mask(step, self._mask_path)
        if "clean" in self._takes:
            clean = clean_batch(step.module, step.batch)
            offered["clean"] = None if clean is None else self._input(step).of(clean)
        attack = getattr(self.penalty, "attack", None)
        if "attacked" in self._takes and attack is not None and offered.get("clean") is None:
            with self.probe.reading(step) as reading:
                fitted = reading.fitted(attack, lambda threat: threat.widened())
                noise = self._generator(1)
                offered["attacked"] = reading.guarded(fitted)(reading.logits, reading.x, reading.y, generator=noise)
        return offered

    def _generator(self, *more: int) -> torch.Generator:
        # Who draws is part of it: two callbacks of one seed would draw the same numbers.
        who = zlib.crc32(f"{self} {self.name}".encode())
        return seeded(self.seed, self._trainer.global_rank, self._trainer.global_step, self._batch_idx, who, *more)

    def _measure(self, step: Step, call: LossCall | None, state: RandomState, term: Tensor) -> None:
        """Set a weight that makes the penalty as large as the loss that it stands beside."""
        if call is None:  # the step's own loss was another one, or could not be seen
            with torch.no_grad(), self.probe.reading(step, training=None, state=state) as reading:
                call = reading.read(reading.x)
        if self.weight.gradual:
            self.weight.gather(call.mean(), term, call.scaled(1e30).mean())  # at that temperature all classes are alike
        else:
            self._tell(self._trainer, self.weight.measure(self._trainer, call.mean(), term))

    def _tell(self, trainer: Any, found: str) -> None:
        if not (self.weight.open and self._waits):
            self.say(trainer, f"{self}: {found}.")
        self._waits = self.weight.open

    def _first_batch(self, step: Step, state: RandomState) -> None:
        self._checked = True
        threat = threat_of(getattr(self.penalty, "attack", None))
        # A forward of its own, whose graph may be used up.
        bare = Step(step.module, step.name, step.function, step.args)
        with self.probe.reading(step) as reading:
            if threat is not None:
                reading.threat(threat).pixels.check(reading.x)
            found = reading.found
        parameters = step.module.parameters()
        preflight(
            lambda: self._value(bare, None, state)[0],
            parameters,
            str(self),
            way_around(self.penalty),
            may_vanish=self._mask_path is not None and not bool(self._mask(step, self._mask_path).any()),
        )
        weight = self.weight.given if isinstance(self.weight.given, (str, dict)) else f"{self.weight.given:g}"
        weight = f"{weight} (of the first epoch)" if self.weight.open and self.weight.gradual else weight
        beside = ""
        if isinstance(self.penalty, SaliencyConsistency):
            own = "noise of its own" if self.penalty.attack is None else "its own attack"
            beside = f" against {own if clean_batch(step.module, step.batch) is None else 'the clean one'}"
        self.say(self._trainer, f"{self}: {self.penalty}, weight {weight} at the {self.at} batch{beside}; {found}.")


def _keywords(penalty: Callable[..., Any]) -> frozenset[str]:
    """Which of what is offered a penalty takes; a plain function of ``(logits_fn, x, y)`` takes nothing more."""
    try:
        parameters = list(inspect.signature(penalty).parameters.values())
    except (TypeError, ValueError):  # written in C
        return frozenset()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return frozenset(OFFERED)
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    taken = positional[:3]  # by logits_fn, x and y, whatever they are called there
    return frozenset(OFFERED) & {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY} - set(taken)
