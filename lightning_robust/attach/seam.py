"""The seam: the only file that touches a ``training_step``.

A step is *fed* (another batch), *added to* (penalties) or *run under* (other weights); never replaced. All callbacks
share one dispatcher per module, so that their order means nothing: feed, enter, run the user's own step, add, leave.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.batches import Path, copied, rebuilt
from lightning_robust.attach.inputs import Inputs
from lightning_robust.attach.patch import patch
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import LossWatcher, is_unheard, unheard
from lightning_robust.losses import LossCall
from lightning_robust.randomness import RandomState, untouched_random_state

__all__ = ["Handle", "install", "leave_weights", "perturbed", "robust_loss"]

Feed = Callable[[Step], Any]
Before = Callable[[Step], None]
Add = Callable[[Step, LossCall | None, RandomState], Mapping[str, Tensor]]
Under = Callable[[Step], AbstractContextManager[Any]]
Track = Callable[[Step], Inputs]

_SEAM = "_lightning_robust_seam"


@dataclass(eq=False)
class Handle:
    """What one callback does to a step, and the way to end it."""

    owner: str
    feed: Feed | None = None
    before: Before | None = None
    add: Add | None = None
    under: Under | None = None
    track: Track | None = None
    loss_index: int = 0
    adversary: bool = False
    at: str = "fed"
    by_hand: bool = False
    watched: bool = True
    used: bool = False
    _detach: Callable[[Handle], None] | None = None

    def detach(self) -> None:
        """Take the callback out of the seam; safe to call twice. The last one out puts the module back."""
        if self._detach is not None:
            detach, self._detach = self._detach, None
            detach(self)


class _Running:
    """The training step that is running, for what is added to it and for who calls us out of it."""

    def __init__(self, clean: Step, fed: Step, handles: list[Handle]) -> None:
        self.clean, self.fed = clean, fed
        self.adding = [handle for handle in handles if handle.add is not None]
        # Who adds (TRADES) attacks beside the step: its own batch stays as it is, by hand as otherwise.
        self.feeding_by_hand = [h for h in handles if h.by_hand and h.feed is not None and h.add is None]
        self.unused = {handle.owner: handle for handle in handles if handle.by_hand}
        self.asked: Any = None
        self.pending = [handle for handle in self.adding if not handle.by_hand]
        self.state = RandomState.capture()
        self.constants = _constants(clean.module)
        self.watchers = {handle.loss_index: LossWatcher(handle.loss_index) for handle in self.adding}

    def run(self) -> Any:
        # What is fed by hand is tracked when it is asked for: crafting does not start from inputs with a graph.
        batch = rebuilt(self.fed.batch, {}, copied) if self.feeding_by_hand else self.tracked()
        with ExitStack() as watched:
            for watcher in self.watchers.values():
                watched.enter_context(watcher)
            return self.fed.with_batch(batch).run()

    def tracked(self) -> Any:
        """A copy of the batch for the user's step, with inputs that lead back to leaves which penalties know.

        A copy, since steps write into their batch, and what is added reads it once more.
        """
        batch = self.fed.batch
        wanted = {
            handle.track(self.fed) for handle in self.adding if handle.track and self._step_of(handle) is self.fed
        }
        tracked = {inputs: inputs.of(batch).detach().clone().requires_grad_() for inputs in wanted}
        self.fed = replace(self.fed, tracked=tracked)
        fed: dict[Path, Tensor] = {}
        for inputs, leaf in tracked.items():
            places = inputs.into(batch, leaf.clone())
            if fed.keys() & places.keys():
                raise RuntimeError(
                    f"two penalties on {type(self.fed.module).__name__} differentiate by different inputs that overlap "
                    f"({' / '.join(map(str, tracked))}); give them the same input_key=."
                )
            fed |= places
        return rebuilt(batch, fed, copied)

    def perturbed(self, batch: Any) -> Any:
        """What :func:`perturbed` returns, from the random state that the step started from."""
        if not self.feeding_by_hand:
            return batch
        if self.asked is not None:
            raise RuntimeError(
                f"{type(self.clean.module).__name__}.training_step calls self.perturbed(batch) twice. One step has one "
                "attacked batch: call it once, with the whole batch, and keep what it returns."
            )
        self.asked = batch
        with untouched_random_state():
            self.state.restore()
            step = self.clean.with_batch(batch)
            for handle in self.feeding_by_hand:
                if handle.feed is not None:
                    step = step.with_batch(handle.feed(step))
                    self.unused.pop(handle.owner, None)
        self.fed = step
        return self.tracked()

    def backward(self, _module: Any, original: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In the place of ``manual_backward``: what is added goes into the first call behind the loss it is about."""
        ready = [h for h in self.pending if not h.watched or self.watchers[h.loss_index].call is not None]
        self.pending = [handle for handle in self.pending if handle not in ready]
        return original(loss + self.added(ready), *args, **kwargs)

    def added(self, handles: list[Handle]) -> Tensor | float:
        """The sum of what handles add."""
        total: Tensor | float = 0.0
        with unheard():
            for handle in handles:
                if handle.add is None:
                    continue
                handle.used = True
                step, call = self._step_of(handle), self.watchers[handle.loss_index].call
                for term in handle.add(step, call if step is self.fed else None, self.state).values():
                    total = total + term
                self.unused.pop(handle.owner, None)
        return total

    def end(self) -> None:
        """Statistics that a step keeps of its inputs (running means) have no graph otherwise: nor do they with ours.

        Else the next step would lead back into this one, whose graph is used up.
        """
        for holder, name in self.constants:
            now = holder.get(name)
            if isinstance(now, Tensor) and now.requires_grad:
                holder[name] = now.detach()  # the same memory; the graph of this step goes on with the other one

    def _step_of(self, handle: Handle) -> Step:
        return self.fed if handle.at == "fed" or self.fed.batch is self.clean.batch else self.clean


@dataclass
class _Seam:
    handles: list[Handle] = field(default_factory=list)
    running: _Running | None = None
    undo: Callable[[], None] | None = None
    weights: ExitStack = field(default_factory=ExitStack)

    def __deepcopy__(self, memo: Any) -> _Seam:
        return self  # a copy of the module (averaged weights) is run through the same callbacks, if it is run at all


def install(
    module: nn.Module,
    owner: str,
    *,
    feed: Feed | None = None,
    before: Before | None = None,
    add: Add | None = None,
    under: Under | None = None,
    track: Track | None = None,
    loss_index: int = 0,
    adversary: bool = False,
    at: str = "fed",
    by_hand: bool = False,
    watched: bool = True,
) -> Handle:
    """Attach to the ``training_step`` of one module instance.

    Args:
        module: The user's LightningModule.
        owner: Who attaches, for error messages.
        feed: ``(step) -> batch``: the batch that the step gets instead of its own.
        before: ``(step) -> None``: called with the fed step before it runs (crafting that leaves the batch alone).
        add: ``(step, loss_call, random_state) -> {name: weighted scalar}``: added to the loss that the step returns.
            It is given the step's own loss call, graph included (``None`` if no loss was seen), and the random state
            that the step started from.
        under: ``(step) -> context manager``: entered before the step, left after its backward pass
            (:func:`leave_weights`).
        track: ``(step) -> inputs``: the input that ``add`` differentiates by. It then finds its leaf, part of the graph
            of the loss call, in ``step.tracked``.
        loss_index: Which loss call of the step ``add`` is about.
        adversary: Whether ``before`` crafts; who feeds always does. A step has one adversary.
        watched: Whether ``add`` is about a loss call that can be seen. Under manual optimisation it is added in the
            first ``manual_backward`` behind that call; else in the first of the step.
        at: ``"fed"``, or ``"clean"`` where ``add`` is about the batch before it was fed (it is then given no loss
            call).
        by_hand: The step itself asks for the batch that it is fed (:func:`perturbed`) and for what is added
            (:func:`robust_loss`).

    Returns:
        A handle; ``detach()`` ends it.

    Raises:
        RuntimeError: If two callbacks attack the step.
    """
    seam: _Seam = vars(module).get(_SEAM) or _Seam()
    if adversary or feed is not None:
        for other in seam.handles:
            if other.adversary:
                raise RuntimeError(
                    f"{owner} and {other.owner} both want to attack {type(module).__name__}.training_step; one step "
                    f"has one adversary. Keep one of them."
                )
    if seam.undo is None:
        seam.undo = patch(module, "training_step", _dispatch)
        vars(module)[_SEAM] = seam
    handle = Handle(
        owner,
        feed,
        before,
        add,
        under,
        track,
        loss_index,
        adversary or feed is not None,
        at=at,
        by_hand=by_hand,
        watched=watched,
    )
    seam.handles.append(handle)

    def detach(gone: Handle) -> None:
        seam.handles.remove(gone)
        if not seam.handles:
            seam.weights.close()
            if seam.undo is not None:
                seam.undo()
                seam.undo = None
            vars(module).pop(_SEAM, None)

    handle._detach = detach
    return handle


def leave_weights(module: nn.Module) -> None:
    """Leave what ``under`` entered; for ``on_after_backward``. Does nothing where nothing was entered."""
    seam: _Seam | None = vars(module).get(_SEAM)
    if seam is not None:
        seam.weights.close()


def perturbed(module: nn.Module, batch: Any) -> Any:
    """The batch that callbacks feed by hand; the same batch outside of a training step, and while a step is read."""
    seam: _Seam | None = vars(module).get(_SEAM)
    return batch if seam is None or seam.running is None or is_unheard() else seam.running.perturbed(batch)


def robust_loss(module: nn.Module, loss: Tensor) -> Tensor:
    """``loss`` with what callbacks add by hand; the same loss outside of a training step, and while a step is read."""
    seam: _Seam | None = vars(module).get(_SEAM)
    if seam is None or seam.running is None or is_unheard():
        return loss
    return loss + seam.running.added([handle for handle in seam.running.adding if handle.by_hand])


def _dispatch(self: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    seam: _Seam = vars(self)[_SEAM]
    if not _in_training(self):
        return original(*args, **kwargs)
    args = inspect.signature(original).bind(*args, **kwargs).args if kwargs else args
    handles = list(seam.handles)
    clean = fed = Step(self, "training_step", original, args)
    for handle in handles:
        if handle.feed is not None and not handle.by_hand:
            fed = fed.with_batch(handle.feed(fed))
    seam.weights.close()
    try:
        for handle in handles:
            if handle.under is not None:
                seam.weights.enter_context(handle.under(fed))
        for handle in handles:
            if handle.before is not None:
                handle.before(fed)
        output = _run_and_add(seam, clean, fed, handles)
    except BaseException:
        seam.weights.close()
        raise
    if output is None:  # a skipped step has no backward pass that would end it
        seam.weights.close()
    return output


def _in_training(module: Any) -> bool:
    """False where a validation_step calls ``self.training_step``: nobody wants to be attacked there."""
    try:
        return bool(module.trainer.training)
    except (AttributeError, RuntimeError):  # a seam in a plain loop, without a Trainer
        return True


def _run_and_add(seam: _Seam, clean: Step, fed: Step, handles: list[Handle]) -> Any:
    if not any(handle.add is not None or handle.by_hand for handle in handles):
        return fed.run()
    running = seam.running = _Running(clean, fed, handles)
    automatic = getattr(fed.module, "automatic_optimization", True)
    with ExitStack() as ended:
        ended.callback(setattr, seam, "running", None)
        if running.pending and not automatic:
            ended.callback(patch(fed.module, "manual_backward", running.backward))
        output = running.run()
    if not automatic:
        _check_pending(running)
    skipped = output is None and automatic
    for owner, handle in () if skipped else running.unused.items():
        missing = "self.perturbed(batch)" if handle.add is None else "self.robust_loss(loss)"
        raise RuntimeError(
            f"{owner}: {type(fed.module).__name__} says that its training_step does this by hand (by_hand = True), but "
            f"the step did not call {missing}."
        )
    total = 0.0 if output is None or not automatic else running.added(running.pending)
    running.end()
    return None if output is None else _plus(output, total)


def _check_pending(running: _Running) -> None:
    for handle in running.pending:
        seen = not handle.watched or running.watchers[handle.loss_index].call is not None
        if seen and not handle.used:  # once it was added, a step without a backward pass is one that was skipped
            raise RuntimeError(
                f"{handle.owner} adds a term to the loss, and {type(running.fed.module).__name__}.training_step "
                "(manual optimisation) called no self.manual_backward(loss) behind its loss. Call that instead of "
                "loss.backward(), use a method that only feeds the step (method='madry'), or let the step ask for the "
                "term: RobustTrainingMixin with by_hand = True."
            )


def _constants(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a module, or one of its parts, holds a tensor without a graph: in which dict, and under which name."""
    holders = [holder for part in module.modules() for holder in (vars(part), vars(part)["_buffers"])]
    return [
        (holder, name)
        for holder in holders
        for name, value in holder.items()
        if isinstance(value, Tensor) and not value.requires_grad
    ]


def _plus(output: Any, term: Tensor | float) -> Any:
    if isinstance(output, torch.Tensor):
        return output + term
    if isinstance(output, Mapping) and "loss" in output:
        return {**output, "loss": output["loss"] + term}
    raise RuntimeError(
        f"expected training_step to return a tensor, a mapping with 'loss' or None, got {type(output).__name__}; "
        f"Lightning takes nothing else."
    )
