"""The training step that is running: what feeds it by hand, what is added to its loss, and by which inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_robust.attach.batches import Path, copied, rebuilt
from lightning_robust.attach.inputs import Inputs
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import LossWatcher, unheard
from lightning_robust.losses import LossCall
from lightning_robust.randomness import RandomState, untouched_random_state

__all__ = ["Add", "Before", "Feed", "Handle", "Running", "Track", "Under"]

Feed = Callable[[Step], Any]
Before = Callable[[Step], None]
Add = Callable[[Step, LossCall | None, RandomState], Mapping[str, Tensor]]
Under = Callable[[Step], AbstractContextManager[Any]]
Track = Callable[[Step], Inputs | None]


PERTURBED, ROBUST_LOSS = "self.perturbed(batch)", "self.robust_loss(loss)"
"""What a step that is fed, or added to, by hand has to call."""


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


class Running:
    """The training step that is running, for what is added to it and for who calls us out of it."""

    def __init__(self, clean: Step, fed: Step, handles: list[Handle]) -> None:
        self.clean, self.fed = clean, fed
        self.adding = [handle for handle in handles if handle.add is not None]
        self.feeding_by_hand = [handle for handle in handles if handle.by_hand and handle.feed is not None]
        # What a step that does this by hand has yet to call, for whom.
        by_hand = [handle for handle in handles if handle.by_hand]
        self.unused = {(handle.owner, PERTURBED) for handle in by_hand if handle.feed is not None}
        self.unused |= {(handle.owner, ROBUST_LOSS) for handle in by_hand if handle.add is not None}
        self.asked: Any = None
        self.pending = [handle for handle in self.adding if not handle.by_hand]
        # Under manual optimisation: terms that know no loss call, until they meet a loss of their parameters.
        self.waiting: list[tuple[Handle, Tensor]] = []
        blind = any(not handle.watched for handle in self.pending)
        self.trainable = [p for p in clean.module.parameters() if p.requires_grad] if blind else []
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
        tracked = {
            inputs: inputs.of(batch).detach().clone().requires_grad_() for inputs in wanted if inputs is not None
        }
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
                    self.unused.discard((handle.owner, PERTURBED))
        self.fed = step
        return self.tracked()

    def backward(self, _module: Any, original: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In the place of ``manual_backward``: what is added goes into the first call behind the loss it is about.

        Where that loss cannot be seen, it goes into the first call whose loss trains some of the same parameters:
        another one may be that of another network (a discriminator).
        """
        unseen = [handle for handle in self.pending if not handle.watched]
        ready = [h for h in self.pending if h.watched and self.watchers[h.loss_index].call is not None]
        self.pending = [handle for handle in self.pending if handle not in ready and handle not in unseen]
        total = loss + self.added(ready)
        with _trained(self.trainable):
            terms = [(handle, self._term(handle)) for handle in unseen]
        self.waiting += [(handle, term) for handle, term in terms if isinstance(term, Tensor)]
        if self.waiting:
            here = _parameters_of(loss)
            meets = [bool(here & _parameters_of(term)) for _, term in self.waiting]
            for (handle, term), met in zip(self.waiting, meets, strict=True):
                if met:
                    handle.used, total = True, total + term
            self.waiting = [entry for entry, met in zip(self.waiting, meets, strict=True) if not met]
        return original(total, *args, **kwargs)

    def added(self, handles: list[Handle]) -> Tensor | float:
        """The sum of what handles add."""
        total: Tensor | float = 0.0
        for handle in handles:
            if handle.add is not None:
                handle.used = True
                total = total + self._term(handle)
                self.unused.discard((handle.owner, ROBUST_LOSS))
        return total

    def _term(self, handle: Handle) -> Tensor | float:
        """The sum of what one handle adds; 0.0 where that is nothing this time."""
        total: Tensor | float = 0.0
        step, call = self._step_of(handle), self.watchers[handle.loss_index].call
        with unheard():
            added = {} if handle.add is None else handle.add(step, call if step is self.fed else None, self.state)
        for term in added.values():
            total = total + term
        return total

    def check_pending(self) -> None:
        """Under manual optimisation: what was to be added must have met a backward pass by now.

        Raises:
            RuntimeError: If a step called its loss, and no ``manual_backward`` behind it; or if no loss that it gave to
                one trains what a term would train.
        """
        for handle, _ in self.waiting:
            if not handle.used:
                raise RuntimeError(
                    f"{handle.owner} adds a term to the loss, and no loss that {type(self.fed.module).__name__}."
                    "training_step (manual optimisation) gave to self.manual_backward trains a parameter that this "
                    "term trains. Is logits_fn= about the network of that loss, and is the step's first batch one that "
                    "trains it?"
                )
        for handle in self.pending:
            seen = not handle.watched or self.watchers[handle.loss_index].call is not None
            if seen and not handle.used:  # once it was added, a step without a backward pass is one that was skipped
                raise RuntimeError(
                    f"{handle.owner} adds a term to the loss, and {type(self.fed.module).__name__}.training_step "
                    "(manual optimisation) called no self.manual_backward(loss) behind its loss. Call that instead of "
                    "loss.backward(), use a method that only feeds the step (method='madry'), or let the step ask for "
                    "the term: RobustTrainingMixin with by_hand = True."
                )

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


@contextmanager
def _trained(parameters: list[nn.Parameter]) -> Iterator[None]:
    """With gradients for all that was trained when the step began, also where its optimizers take turns (toggle)."""
    off = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in off:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in off:
            parameter.requires_grad_(False)


def _parameters_of(value: Tensor) -> set[int]:
    """The parameters that a backward pass from here reaches, by ``id``."""
    found: set[int] = set()
    seen: set[Any] = set()
    todo: list[Any] = [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of what accumulates the gradient of a leaf
        if isinstance(variable, nn.Parameter):
            found.add(id(variable))
        todo += [following for following, _ in node.next_functions]
    return found


def _constants(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a module, or one of its parts, holds a tensor without a graph: in which dict, and under which name."""
    holders = [holder for part in module.modules() for holder in (vars(part), vars(part)["_buffers"])]
    return [
        (holder, name)
        for holder in holders
        for name, value in holder.items()
        if isinstance(value, Tensor) and not value.requires_grad
    ]
