"""Train a model to look at the right things: a penalty on input gradients, added to the user's own loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_robust.attach.base import RobustCallback
from lightning_robust.attach.batches import InputKey, Key, Path, as_path, get
from lightning_robust.attach.inputs import Inputs
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.seam import install
from lightning_robust.attach.step import Step
from lightning_robust.losses import LossCall
from lightning_robust.penalties import InputGradientPenalty, RightReasons
from lightning_robust.penalties.preflight import preflight
from lightning_robust.randomness import RandomState

__all__ = ["SaliencyRegularization"]

OFFERED = ("call", "logits", "reuse", "mask")  # to a penalty, by keyword


class SaliencyRegularization(RobustCallback):
    """Add a weighted penalty on input gradients to the loss of an unchanged module.

    =========================  =============================================================  ====================
    penalty                    what is penalised                                              more forwards a step
    =========================  =============================================================  ====================
    ``InputGradientPenalty``   how fast the loss changes with the input                       1, or 0 (see method)
    ``RightReasons``           what a mask in the batch says must not matter                  1, or 0
    =========================  =============================================================  ====================

    The penalty reads the step's own forward: the loss that the step calls (class weights, label smoothing, in-step
    mixup) and the batch that it gets, the attacked one where :class:`~lightning_robust.AdversarialTraining` feeds it.
    Before the first step the penalty and its gradients are computed once, so that a network without second
    derivatives fails at once, with the remedy. BatchNorm's running statistics see nothing of it.

    Args:
        penalty: A penalty of :mod:`lightning_robust.penalties`, or a function ``(logits_fn, x, y) -> scalar``; it is
            given ``call``, ``logits``, ``reuse`` and ``mask`` too, as far as it takes such keywords.
        weight: What it is multiplied by. It does not depend on the batch size.
        at: ``"fed"``: at the batch that the step gets. ``"clean"``: at the batch as it was (one more forward where an
            attack feeds the step).
        warmup_epochs: The weight grows linearly from 0 over so many epochs, in each step a little.
        input_key: Where in the batch the input is, if it cannot be told; a list for several inputs.
        target_key: Where the target is, if the loss cannot be read.
        logits_fn: ``(module, batch) -> logits`` for hand-written losses; needs ``target_key``.
        loss_index: Which loss call of the step is meant, 0 for the first.
        name: Tells two callbacks of this class with one kind of penalty apart.

    Logs ``robust/train/{penalty}`` (weighted) and ``robust/train/{penalty}_weight``, e.g.
    ``robust/train/input_gradient``. Under manual optimisation it joins the first ``self.manual_backward(loss)``
    behind the loss that it is about.

    Raises:
        ValueError: If a setting is out of range.
        TypeError: If the penalty is no callable, or an attribution of captum, which cannot train anything.

    Example:
        >>> SaliencyRegularization(RightReasons(mask_key=2), weight=1.0).key("train", "right_reasons")
        'robust/train/right_reasons'

    References:
        Ross and Doshi-Velez, 2018, https://arxiv.org/abs/1711.09404. Finlay and Oberman, 2019,
        https://arxiv.org/abs/1905.11468. Ross et al., 2017, https://arxiv.org/abs/1703.03717.
    """

    def __init__(
        self,
        penalty: InputGradientPenalty | RightReasons | Callable[..., Any],
        weight: float = 0.1,
        *,
        at: str = "fed",
        warmup_epochs: float = 0.0,
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
                "parameters: as a penalty it trains nothing. Use InputGradientPenalty or RightReasons, or write one "
                "with torch.autograd.grad(..., create_graph=True)."
            )
        if not callable(penalty) or isinstance(penalty, type):
            raise TypeError(f"penalty= must be a callable (logits_fn, x, y) -> scalar, got {penalty!r}.")
        if weight < 0 or warmup_epochs < 0:
            raise ValueError(f"weight= and warmup_epochs= must not be negative, got {weight} and {warmup_epochs}.")
        if at not in ("fed", "clean"):
            raise ValueError(f"at= must be 'fed' or 'clean', got {at!r}.")
        self.penalty, self.weight, self.at, self.warmup_epochs = penalty, float(weight), at, warmup_epochs
        named = getattr(penalty, "name", None) or getattr(penalty, "__name__", type(penalty).__name__)
        self.penalty_name = str(named).strip("<>")  # of a lambda
        self._takes = _keywords(penalty)
        key = getattr(penalty, "mask_key", None)
        self._mask_path: Path | None = None if key is None else as_path(key)
        self._trainer: Any = None
        self._batch_idx = 0
        self._checked = False
        self._reuse = True

    @property
    def state_key(self) -> str:
        return f"{super().state_key}{self.penalty_name}"

    def clashes(self, other: RobustCallback) -> bool:
        return self.penalty_name == getattr(other, "penalty_name", None)

    def settings(self) -> Mapping[str, Any]:
        return {
            "penalty": self.penalty,
            "weight": self.weight,
            "at": self.at,
            "warmup_epochs": self.warmup_epochs,
        }

    def __str__(self) -> str:
        return f"SaliencyRegularization({self.penalty_name})"

    # -- when ----------------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any) -> None:
        self._trainer, self._checked = trainer, False
        # A compiled network keeps no graph for a second backward pass; the direction then costs a forward of its own.
        self._reuse = not _is_compiled(pl_module)
        if not self._reuse and getattr(self.penalty, "method", None) == "double_backward":
            raise RuntimeError(
                f"{self}: a compiled network has no second derivative. Use method='finite_differences', or leave the "
                "network uncompiled."
            )
        handle = install(
            pl_module,
            str(self),
            add=self._add,
            track=self._input if self._reuse and self.probe.logits_fn is None else None,
            watched=self.probe.logits_fn is None,
            loss_index=self.probe.loss_index,
            at=self.at,
            by_hand=self.by_hand,
        )
        self.on_detach(handle.detach)
        self.on_detach(self._forget)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch_idx = batch_idx

    def _forget(self) -> None:
        self._trainer = None

    # -- what ----------------------------------------------------------------------------------------------------

    def _input(self, step: Step) -> Inputs:
        return self.probe.route(step).inputs

    def _add(self, step: Step, call: LossCall | None, state: RandomState) -> Mapping[str, Tensor]:
        if not self._checked:
            self._first_batch(step, state)
        weight = self.weight * self._warm()
        value = weight * self._value(step, call, state)
        rows = len(self._input(step).of(step.batch))
        for metric, logged in {self.penalty_name: value.detach(), f"{self.penalty_name}_weight": weight}.items():
            step.module.log(self.key("train", metric), logged, on_step=False, on_epoch=True, batch_size=rows)  # type: ignore[operator]  # a LightningModule
        return {self.penalty_name: value}

    def _value(self, step: Step, call: LossCall | None, state: RandomState) -> Tensor:
        # As the step is: train mode, dropout masks and mixup replayed; running statistics stay with the step's own.
        with self.probe.reading(step, training=None, state=state) as reading:
            leaf = step.tracked.get(self._input(step))
            own = call if leaf is not None or not self._reuse else None

            def loss_of(logits: Tensor) -> LossCall:
                seen = own or reading.call
                if seen is None:
                    raise RuntimeError(f"{self}: the penalty asked for the loss before it computed any logits.")
                return seen.again(logits)

            offered: dict[str, Any] = {"call": loss_of, "logits": own and own.logits, "reuse": self._reuse}
            if self._mask_path is not None:
                offered["mask"] = get(step.batch, self._mask_path)
            value: Tensor = self.penalty(
                reading.logits,
                reading.x if own is None or leaf is None else leaf,
                reading.y if own is None else own.target,
                **{keyword: value for keyword, value in offered.items() if keyword in self._takes},
            )
        return value

    def _warm(self) -> float:
        if not self.warmup_epochs:
            return 1.0
        batches = self._trainer.num_training_batches
        part = 0.0 if batches == float("inf") else (self._batch_idx + 1) / batches
        return float(min(1.0, (self._trainer.current_epoch + part) / self.warmup_epochs))

    def _first_batch(self, step: Step, state: RandomState) -> None:
        self._checked = True
        # A forward of its own, whose graph may be used up.
        bare = Step(step.module, step.name, step.function, step.args)
        preflight(lambda: self._value(bare, None, state), step.module.parameters(), str(self))
        with self.probe.reading(step) as reading:
            found = reading.found
        self.say(self._trainer, f"{self}: {self.penalty}, weight {self.weight:g} at the {self.at} batch; {found}.")


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


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiler_ctx", None) is not None or any(
        type(part).__name__ == "OptimizedModule"
        or getattr(part, "_compiled_call_impl", None) is not None
        or any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(part).values())  # a compiled function
        for part in module.modules()
    )
