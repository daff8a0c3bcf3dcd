"""The seam: the only file that touches a ``training_step``.

A step is *fed* (another batch), *added to* (penalties) or *run under* (other weights); never replaced. All callbacks
share one dispatcher per module, so that their order means nothing: feed, enter, run the user's own step, add, leave.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.patch import patch
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import LossWatcher
from lightning_robust.losses import LossCall
from lightning_robust.randomness import RandomState

__all__ = ["Handle", "install"]

Feed = Callable[[Step], Any]
Before = Callable[[Step], None]
Add = Callable[[Step, LossCall | None, RandomState], Mapping[str, Tensor]]
Under = Callable[[Step], AbstractContextManager[Any]]

_SEAM = "_lightning_robust_seam"


@dataclass(eq=False)
class Handle:
    """What one callback does to a step, and the way to end it."""

    owner: str
    feed: Feed | None = None
    before: Before | None = None
    add: Add | None = None
    under: Under | None = None
    loss_index: int = 0
    adversary: bool = False
    _detach: Callable[[Handle], None] | None = None

    def detach(self) -> None:
        """Take the callback out of the seam; safe to call twice. The last one out puts the module back."""
        if self._detach is not None:
            detach, self._detach = self._detach, None
            detach(self)


@dataclass
class _Seam:
    handles: list[Handle] = field(default_factory=list)
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
    loss_index: int = 0,
    adversary: bool = False,
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
        loss_index: Which loss call of the step ``add`` is about.
        adversary: Whether ``before`` crafts; who feeds always does. A step has one adversary.

    Returns:
        A handle; ``detach()`` ends it.

    Raises:
        RuntimeError: If two callbacks attack the step, or a penalty meets manual optimisation.
    """
    seam: _Seam = vars(module).get(_SEAM) or _Seam()
    if adversary or feed is not None:
        for other in seam.handles:
            if other.adversary:
                raise RuntimeError(
                    f"{owner} and {other.owner} both want to attack {type(module).__name__}.training_step; one step "
                    f"has one adversary. Keep one of them."
                )
    if add is not None and not getattr(module, "automatic_optimization", True):
        raise RuntimeError(
            f"{owner} adds a term to the loss, but {type(module).__name__} uses manual optimisation, where the step "
            "calls backward itself. Use a method that only feeds the step (e.g. method='madry'), or automatic "
            "optimisation."
        )
    if seam.undo is None:
        seam.undo = patch(module, "training_step", _dispatch)
        vars(module)[_SEAM] = seam
    handle = Handle(owner, feed, before, add, under, loss_index, adversary or feed is not None)
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


def _dispatch(self: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    seam: _Seam = vars(self)[_SEAM]
    if not _in_training(self):
        return original(*args, **kwargs)
    args = inspect.signature(original).bind(*args, **kwargs).args if kwargs else args
    handles = list(seam.handles)
    step = Step(self, "training_step", original, args)
    for handle in handles:
        if handle.feed is not None:
            step = step.with_batch(handle.feed(step))
    seam.weights.close()
    try:
        for handle in handles:
            if handle.under is not None:
                seam.weights.enter_context(handle.under(step))
        for handle in handles:
            if handle.before is not None:
                handle.before(step)
        output = _run_and_add(step, [handle for handle in handles if handle.add is not None])
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


def _run_and_add(step: Step, adding: list[Handle]) -> Any:
    if not adding:
        return step.run()
    state = RandomState.capture()
    watchers = {index: LossWatcher(index) for index in {handle.loss_index for handle in adding}}
    with ExitStack() as watched:
        for watcher in watchers.values():
            watched.enter_context(watcher)
        output = step.run()
    if output is None:
        return None
    total: Tensor | float = 0.0
    for handle in adding:
        if handle.add is not None:
            for term in handle.add(step, watchers[handle.loss_index].call, state).values():
                total = total + term
    return _plus(output, total)


def _plus(output: Any, term: Tensor | float) -> Any:
    if isinstance(output, torch.Tensor):
        return output + term
    if isinstance(output, Mapping) and "loss" in output:
        return {**output, "loss": output["loss"] + term}
    raise RuntimeError(
        f"expected training_step to return a tensor, a mapping with 'loss' or None, got {type(output).__name__}; "
        f"Lightning takes nothing else."
    )
