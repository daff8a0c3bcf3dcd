"""The probe: reads inputs, logits and targets out of the user's own step.

The step runs up to its first loss call and is stopped there, so that nothing behind the loss (logging, metrics,
optimizer steps) happens twice. No assumption is made about how a batch looks or which way leads to the network.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.batches import InputKey, Key, as_path, as_paths, copied, described, get, rebuilt, shown
from lightning_robust.attach.discovery import counted_by, floats_of, input_of, may_have_input, no_input, tracked
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.route import Route, call_at, producer_of, target_of
from lightning_robust.attach.step import Step, defines
from lightning_robust.attach.watcher import (
    Followed,
    LossWatcher,
    NoLossError,
    ProbeError,
    Stop,
    quiet,
    run_until_stop,
)
from lightning_robust.losses import LOSSES, LossCall
from lightning_robust.randomness import RandomState, reseed

__all__ = ["Probe"]


class Probe:
    """Finds out how a module's steps get from a batch to logits, and reads them.

    Args:
        input_key: Where the input is, if it cannot be told: a key, an index, or a tuple of them (``("image", 0)``); a
            list of such for several inputs.
        target_key: Where the target is, likewise.
        logits_fn: ``(module, batch) -> logits`` for losses that no probe can see; needs ``target_key``.
        loss_index: Which loss call of the step to read, 0 for the first.
        mask_key: Where a mask is, 1 where an attack may change the input.
        eps_key: Where the radius of each sample is, in pixel units.
    """

    def __init__(
        self,
        input_key: InputKey | None = None,
        target_key: Key | None = None,
        logits_fn: Callable[..., Any] | None = None,
        loss_index: int = 0,
        mask_key: Key | None = None,
        eps_key: Key | None = None,
    ) -> None:
        if logits_fn is not None and target_key is None:
            raise ValueError(
                "logits_fn= says where logits come from; target_key= must say where their targets are, e.g. "
                "target_key=1."
            )
        if loss_index < 0:
            raise ValueError(f"loss_index= counts the loss calls of a step from 0, got {loss_index}.")
        self.input_paths = None if input_key is None else as_paths(input_key)
        self.target_path = None if target_key is None else as_path(target_key)
        self.logits_fn, self.loss_index = logits_fn, loss_index
        self.mask_path = None if mask_key is None else as_path(mask_key)
        self.eps_path = None if eps_key is None else as_path(eps_key)
        self.divisible: dict[tuple[str, bool], bool] = {}  # whether the samples of a step's batch can be read apart
        self.routes: dict[str, Route] = {}
        self._kind: type | None = None  # of the module that the routes belong to
        self._said: set[str] = set()  # steps that were warned about
        self._unheard: set[str] = set()  # steps that have nothing to be heard
        self._stand_ins: dict[str, str] = {}  # steps that cannot be read, and which one is read for them

    @property
    def overrides(self) -> tuple[Any, ...]:
        """What the user said; probes that were told the same find the same."""
        return self.input_paths, self.target_path, self.logits_fn, self.loss_index, self.mask_path, self.eps_path

    @property
    def overridden(self) -> bool:
        """Whether the user said where targets are."""
        return self.target_path is not None

    # -- reading -------------------------------------------------------------------------------------------------

    @contextmanager
    def reading(
        self,
        step: Step,
        *,
        training: bool | None = False,
        keep_buffers: bool = False,
        state: RandomState | None = None,
        listening: bool = False,
    ) -> Iterator[Reading]:
        """Read one step; the module is frozen meanwhile and untouched afterwards.

        Args:
            step: The call that Lightning makes (or would make).
            training: Mode of the module: ``False`` for eval, ``None`` for as it is.
            keep_buffers: Let BatchNorm keep what it saw.
            state: Random state that every read starts from; by default the present one.
            listening: Logits and targets are enough; no gradient needs to reach an input.

        Raises:
            ProbeError: If the step cannot be read.
        """
        self._forget_others(step.module)
        route = self.route(step, listening=listening)
        with quiet(step.module, None if route.trains_only else training, keep_buffers) as now:
            yield Reading(self, route, step, state or now)

    def route(self, step: Step, *, listening: bool = False) -> Route:
        """The route of a step, found now if it is not known or its batch is of another make."""
        known = self.routes.get(step.name)
        if known is not None and self._fits(known, step.batch) and (listening or known.differentiable):
            return known
        return self.discover(step, listening=listening)

    @staticmethod
    def _fits(route: Route, batch: Any) -> bool:
        """Whether a batch has what the route needs; another loader may bring another make of batch."""
        try:
            return all(isinstance(get(batch, path), Tensor) for path in route.inputs.paths) and (
                route.target is None or get(batch, route.target) is not None
            )
        except KeyError:
            return False

    def _forget_others(self, module: nn.Module) -> None:
        """One callback may serve several modules in turn; what was found in one says nothing about another."""
        if self._kind not in (None, type(module)):
            self.routes, self._stand_ins, self._unheard, self.divisible = {}, {}, set(), {}
        self._kind = type(module)

    def call(self, step: Step, route: Route, followed: Followed | None = None) -> LossCall:
        """Run a step (inside :func:`~lightning_robust.attach.watcher.quiet`) until its logits are known."""
        if self.logits_fn is not None:
            logits = self.logits_fn(step.module, step.batch)
            return LossCall.for_head(logits, get(step.batch, self.target_path or ()))
        if route.stop_at_module:
            call = self._until_module(step, route)
        else:
            watcher = LossWatcher(self.loss_index, stop=True, followed=followed)
            run_until_stop(step, watcher)
            call = self._seen(watcher, step)
        if self.target_path is None:
            return call
        named = get(step.batch, self.target_path)
        conformed = call.conformed(named) if isinstance(named, Tensor) else None
        return replace(call, target=named if conformed is None else conformed)

    def _seen(self, watcher: LossWatcher, step: Step) -> LossCall:
        if watcher.call is not None:
            return watcher.call
        where = f"{type(step.module).__name__}.{step.name}"
        if watcher.count:
            raise ProbeError(
                f"loss_index={self.loss_index}, but {where} calls only {watcher.count} loss functions; count from 0."
            )
        hint = f" The last candidate seen was {watcher.hint}." if watcher.hint else ""
        raise NoLossError(
            f"{where} calls none of the losses that can be read ({', '.join(sorted(set(LOSSES.values())))}).{hint} Say "
            "where its logits come from: logits_fn=lambda module, batch: ..., with target_key=... for the targets. "
            f"The batch has {described(step.batch)}. Regression and detection have no logits and are not served.",
            watcher.candidate,
        )

    def _until_module(self, step: Step, route: Route) -> LossCall:
        found: list[Tensor] = []

        def stop(_module: nn.Module, _args: Any, output: Tensor) -> None:
            found.append(output)
            raise Stop

        handle = step.module.get_submodule(route.module or "").register_forward_hook(stop)
        try:
            run_until_stop(step, None)
        finally:
            handle.remove()
        if not found:
            raise ProbeError(
                f"{type(step.module).__name__}.{step.name} does not run {route.module!r}, the module that gave "
                f"logits before; give logits_fn=."
            )
        target = self.target_path or route.target
        if target is None:
            raise ProbeError(
                f"{step.name} computes no loss, so its targets are unknown: say where they are with target_key=."
            )
        return call_at(route, found[0], get(step.batch, target))

    def found(self, step: Step) -> str:
        """What was found in a step, in words."""
        return self.routes[step.name].found if step.name in self.routes else "what logits_fn= returns"

    # -- discovery -----------------------------------------------------------------------------------------------

    def discover(self, step: Step, *, listening: bool = False, graph: bool = True) -> Route:
        """Find the route of one kind of step on its first batch, and remember it.

        Args:
            step: The call that Lightning makes (or would make).
            listening: Logits and targets are enough: token ids, frozen backbones and steps without gradients will do.
            graph: Whether gradients are on.

        Raises:
            ProbeError: With what was found, and the argument that settles it.
        """
        batch, where = step.batch, f"{type(step.module).__name__}.{step.name}"
        for key in [key for key in self.divisible if key[0] == step.name]:
            del self.divisible[key]
        if hasattr(batch, "__next__"):
            raise ProbeError(
                f"{where} takes an iterator instead of a batch (dataloader_iter); there is no batch to read."
            )
        if self.input_paths is not None and not listening:
            self._check_named(batch)
        elif not listening and not may_have_input(batch):
            raise no_input(batch, where)
        try:
            route, call = self._found(step, listening, graph, training=False)
        except ProbeError:
            raise
        except Exception as error:  # in eval mode; whatever the step then does with what its network gives it
            if not step.module.training:
                raise
            try:
                route, call = self._found(step, listening, graph, training=None)
            except Exception:
                raise error from None  # it is not for the mode
        self._warn_of_squashing(call, where)
        self.routes[step.name] = route
        return route

    def _found(self, step: Step, listening: bool, graph: bool, training: bool | None) -> tuple[Route, LossCall]:
        batch = step.batch
        with quiet(step.module, training, False) as state:
            read = tracked(self.call, step, floats_of(batch), state, graph)
            try:
                paths, integer = input_of(self.call, read, step, state, self.input_paths)
            except ProbeError:
                if not listening:
                    raise
                paths, integer = (), False
            call, differentiable = read.call, bool(paths)
            paths = paths or (counted_by(call, batch),)
            found = target_of(call, batch, read.fed, read.followed)
            target, cast = (self.target_path, True) if self.target_path else found
            module = producer_of(call.logits, read.outputs)
            same = module is None or read.outputs[module][0].shape == call.logits.shape
            shape = None if same else tuple(call.logits.shape[1:])
            route = Route(
                step.name,
                paths[0],
                target,
                call.kind,
                module,
                shape=shape,
                cast=cast,
                ignore_index=call.options.get("ignore_index", -100),
                differentiable=differentiable,
                others=paths[1:],
                integer=integer,
                trains_only=training is None,
            )
        return route, call

    def _check_named(self, batch: Any) -> None:
        for path in self.input_paths or ():
            leaf = get(batch, path)  # says what there is
            if not isinstance(leaf, Tensor) or leaf.dtype == torch.bool:
                raise ProbeError(
                    f"input_key names {shown(path)}, which is no tensor of numbers; the batch has {described(batch)}."
                )

    def _warn_of_squashing(self, call: LossCall, where: str) -> None:
        twice = call.squashed()
        if twice and where not in self._said:
            self._said.add(where)
            warnings.warn(
                f"{where}: {twice} What the loss gets is trained on and measured as it is; hand the loss what stands "
                "before the softmax or sigmoid.",
                stacklevel=2,
            )

    def for_listening(self, module: nn.Module, names: Sequence[str], *args: Any) -> Step:
        """The step to hear a validation or test batch in; gradients are not asked for.

        Raises:
            ProbeError: If no step has logits and targets that can be read.
        """
        self._forget_others(module)
        written = [Step.of(module, name, *args) for name in names if defines(module, name)]
        for step in written:
            if step.name in self.routes:
                return step
            if step.name in self._unheard:
                continue
            # With the graph that others need, without an input in it, and where that graph is too large, without it.
            for how in ({}, {"listening": True}, {"listening": True, "graph": False}):
                with contextlib.suppress(ProbeError, torch.cuda.OutOfMemoryError):  # the last resort says what is wrong
                    self.discover(step, **how)
                    return step
            self._unheard.add(step.name)
        return self.for_evaluation(module, names, *args)

    def for_evaluation(self, module: nn.Module, names: Sequence[str], *args: Any) -> Step:
        """The step to read a validation or test batch through, found on the first batch.

        The steps in ``names`` that the user wrote are tried in order; then the module that gave logits before (in
        training, or in a run whose checkpoint was loaded); then ``training_step``, if two reads under different seeds
        agree.

        Raises:
            ProbeError: If none of them works.
        """
        self._forget_others(module)
        wanted = names[0]
        known = self.routes.get(wanted)
        if wanted in self._stand_ins or (known is not None and known.differentiable):
            return Step.of(module, self._stand_ins.get(wanted, wanted), *args)
        written = [name for name in names if defines(module, name)]
        errors: list[str] = []
        for name in written:
            try:
                self.discover(Step.of(module, name, *args))
            except ProbeError as error:
                errors.append(str(error))
            else:
                self._stand_ins[wanted] = name
                return Step.of(module, name, *args)
        elsewhere = [route for route in self.routes.values() if route.module is not None and route.differentiable]
        if written and elsewhere:
            step = Step.of(module, written[0], *args)
            route = replace(
                elsewhere[0], step=step.name, target=self.target_path or elsewhere[0].target, stop_at_module=True
            )
            with quiet(module, False, False):
                readable = self.call(step.with_batch(rebuilt(step.batch, {}, copied)), route).logits.requires_grad
            if readable:  # not so under a decorator such as @torch.no_grad()
                self.routes[step.name] = route
                return step
        if defines(module, "training_step"):
            step = Step.of(module, "training_step", *args)
            if self._agrees_with_itself(step):
                self._stand_ins[wanted] = step.name
                return step
            errors.append(
                "training_step draws random numbers on the way to its logits, so it cannot stand in for a "
                "validation step."
            )
        raise ProbeError(
            " ".join(errors[:1]) or f"{type(module).__name__} defines none of {', '.join(names)}; nothing can be read."
        )

    def _agrees_with_itself(self, step: Step) -> bool:
        try:
            route = self.routes.get(step.name) or self.discover(step)
            reads = []
            for seed in (0, 1):
                with quiet(step.module, False, False):
                    reseed(seed)
                    reads.append(self.call(step.with_batch(rebuilt(step.batch, {}, copied)), route).logits)
        except (RuntimeError, KeyError, IndexError, TypeError, AttributeError, ValueError):
            return False  # a training step that cannot take a validation batch is no route; the caller reports it
        return torch.equal(*reads)
