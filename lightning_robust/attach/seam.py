"""The seam: the only file that touches a ``training_step``.

A step is *fed* (another batch), *added to* (penalties) or *run under* (other weights); never replaced. All callbacks
share one dispatcher per module, so that their order means nothing: feed (who changes the data, then the adversary),
enter, run the user's own step, add, leave.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.patch import patch
from lightning_robust.attach.running import Add, Before, Feed, Handle, Running, Track, Under
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import is_unheard

__all__ = ["Handle", "clean_batch", "install", "leave_weights", "perturbed", "robust_loss"]

_SEAM = "_lightning_robust_seam"


@dataclass
class _Seam:
    handles: list[Handle] = field(default_factory=list)
    running: Running | None = None
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
    adversary: bool | None = None,
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
            of the loss call, in ``step.tracked``. None where it differentiates by nothing this time.
        loss_index: Which loss call of the step ``add`` is about.
        adversary: Whether it attacks. By default who feeds does; with False, ``feed`` changes the data itself (fills in
            what a mask marks): it comes first, and what it returns is the clean batch. A step has one adversary.
        watched: Whether ``add`` is about a loss call that can be seen. Under manual optimisation it is added in the
            first ``manual_backward`` behind that call; else in the first one whose loss trains one of its parameters.
        at: ``"fed"``, or ``"clean"`` where ``add`` is about the batch before it was attacked (it is then given no loss
            call).
        by_hand: The step itself asks for the batch that it is fed (:func:`perturbed`) and for what is added
            (:func:`robust_loss`).

    Returns:
        A handle; ``detach()`` ends it.

    Raises:
        RuntimeError: If two callbacks attack the step.
    """
    seam: _Seam = vars(module).get(_SEAM) or _Seam()
    adversary = feed is not None if adversary is None else adversary
    if adversary:
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
        adversary,
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


def clean_batch(module: nn.Module, batch: Any) -> Any:
    """The batch of the running training step before it was attacked; None where ``batch`` is that one.

    For who adds to the loss of the step, and is given the attacked batch.
    """
    seam: _Seam | None = vars(module).get(_SEAM)
    if seam is None or seam.running is None:
        return None
    clean = seam.running.clean.batch if seam.running.asked is None else seam.running.asked
    return None if clean is batch else clean


def _dispatch(self: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    seam: _Seam = vars(self)[_SEAM]
    if not _in_training(self):
        return original(*args, **kwargs)
    args = inspect.signature(original).bind(*args, **kwargs).args if kwargs else args
    handles = list(seam.handles)
    clean = fed = Step(self, "training_step", original, args)
    # What is attacked are the data as they are trained on: first who changes those, in an order of their own.
    for handle in sorted(handles, key=lambda handle: (handle.adversary, handle.owner)):
        if handle.feed is not None and not handle.by_hand:
            fed = fed.with_batch(handle.feed(fed))
            clean = clean if handle.adversary else fed
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
    running = seam.running = Running(clean, fed, handles)
    try:
        return _with_terms(running, fed)
    finally:
        seam.running = None


def _with_terms(running: Running, fed: Step) -> Any:
    automatic = getattr(fed.module, "automatic_optimization", True)
    with ExitStack() as ended:
        if running.pending and not automatic:
            ended.callback(patch(fed.module, "manual_backward", running.backward))
        output = running.run()
    if not automatic:
        running.check_pending()
    skipped = output is None and automatic
    for owner, missing in () if skipped else sorted(running.unused):
        raise RuntimeError(
            f"{owner}: {type(fed.module).__name__} says that its training_step does this by hand (by_hand = True), but "
            f"the step did not call {missing}."
        )
    total = 0.0 if output is None or not automatic else running.added(running.pending)
    running.end()
    return None if output is None else _plus(output, total)


def _plus(output: Any, term: Tensor | float) -> Any:
    if isinstance(output, torch.Tensor):
        return output + term
    if isinstance(output, Mapping) and "loss" in output:
        return {**output, "loss": output["loss"] + term}
    raise RuntimeError(
        f"expected training_step to return a tensor, a mapping with 'loss' or None, got {type(output).__name__}; "
        f"Lightning takes nothing else."
    )
