"""Hears the logits and targets of an evaluation step while Lightning runs it: no second forward, nothing changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.batches import copied, get, rebuilt
from lightning_robust.attach.inputs import Inputs
from lightning_robust.attach.loaders import evaluation_loaders, is_everyones, true_length
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.route import Route, call_at
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import UNSCALED, LossWatcher, ProbeError, is_unheard
from lightning_robust.losses import LossCall

__all__ = ["STEPS", "Heard", "Listener", "step_context"]

STEPS = {"val": ("validation_step",), "test": ("test_step", "validation_step")}
"""Which step is read in which stage, the first that the user wrote."""


def step_context(trainer: Any, stage: str) -> AbstractContextManager[Any]:
    """The precision in which Lightning runs the steps of a stage."""
    precision = trainer.precision_plugin
    context: AbstractContextManager[Any] = (
        precision.test_step_context() if stage == "test" else precision.val_step_context()
    )
    return context


@dataclass(frozen=True)
class Heard:
    """What one evaluation batch said.

    Attributes:
        call: The loss call, its logits and targets as copies without a graph.
        x: The input.
        index: Number of each sample among all samples of its loader, ``(N,)``, over all processes.
        counts: Whether a sample counts, ``(N,)``: a distributed sampler repeats some to deal evenly.
    """

    call: LossCall
    x: Tensor
    index: Tensor
    counts: Tensor

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities ``(R, K)``, labels ``(R,)`` and sample numbers ``(R,)`` of all that counts."""
        log_p, labels, sample = self.call.rows()
        # A loss may get its rows flattened, several a sample (tokens), or only some of them (those under a mask).
        each = max(1, len(self.call.logits) // max(1, len(self.x)))
        sample = (sample // each).clamp(max=len(self.x) - 1).cpu()
        kept = self.counts[sample]
        on_device = kept.to(log_p.device)
        return log_p[on_device], labels[on_device], self.index[sample[kept]]

    @property
    def by_sample(self) -> bool:
        """Whether it is known which sample each row is of: each has equally many, and none were left out before."""
        n, rows = len(self.x), len(self.call.logits)
        return rows == 0 if n == 0 else rows >= n and rows % n == 0


class Listener:
    """Listens to one evaluation batch after the other; shared by all callbacks that read steps the same way.

    The way to the logits is found once for each loader, on a copy of its first batch. From then on a forward hook reads
    them where they are the output of a module and the target is a leaf of the batch; elsewhere the step's loss call is
    watched. Only where the running step says nothing (another step stands in for it, or ``logits_fn=``), or its
    network is compiled away from hooks, each batch costs one more forward.

    Attributes:
        index: Number of each sample of the present batch among all samples of its loader, over all processes.
        counts: Whether each of them counts: a distributed sampler repeats some to deal evenly.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.index = self.counts = torch.zeros(0)
        self._open: tuple[int, int] | None = None  # batch and loader that is listened to
        self._args: tuple[int, ...] = ()
        self._input = Inputs(((),))
        self._step: Step | None = None
        self._batch: Any = None  # a copy, since steps may write into theirs
        self._context: Callable[[], AbstractContextManager[Any]] = ExitStack
        self._seen: dict[int, int] = {}
        self._routes: dict[tuple[str, int], Route] = {}
        # Which of the calls of the hooked module gives the logits, by loader and number of calls in a step.
        self._places: dict[tuple[int, int], int | None] = {}
        self._end = ExitStack()
        self._hear: Callable[[], LossCall | None] | None = None
        self._heard: Heard | None = None
        self._warned = self.announced = False

    def reset(self) -> None:
        """Count samples from 0 again."""
        self.close()
        self._seen = {}

    def close(self) -> None:
        """Let go of the module and the batch; safe to call at any time."""
        self._end.close()
        self._open = self._step = self._hear = self._heard = self._batch = None

    def start(self, trainer: Any, module: nn.Module, stage: str, batch: Any, batch_idx: int, loader: int) -> Step:
        """Listen to the step that Lightning is about to run on ``batch``; a second call for a batch does nothing.

        Raises:
            ProbeError: If no logits can be read in this step.
        """
        if self._open == (batch_idx, loader) and self._step is not None:
            return self._step
        self.close()
        if batch is None:  # all that Lightning has to hand over where a step fetches its batches itself
            raise ProbeError(
                f"{STEPS[stage][0]} of {type(module).__name__} takes an iterator instead of a batch (dataloader_iter); "
                "there is no batch to read. Take (batch, batch_idx), or leave this callback out."
            )
        several = len(evaluation_loaders(trainer)) > 1
        self._context = partial(step_context, trainer, stage)
        self._args = (batch_idx, loader) if several else (batch_idx,)
        with self._context():
            step = self.probe.for_listening(module, STEPS[stage], batch, *self._args)
            route = self._route(step, loader)
        self._open, self._step, self._batch = (batch_idx, loader), step, rebuilt(batch, {}, copied)
        self.index, self.counts = self._numbers(trainer, loader, len(get(batch, route.input)))
        self._input = route.inputs
        self._hear = self._listen(step, route, loader, step.name == STEPS[stage][0])
        return step

    def readable(self, stage: str) -> Step:
        """The step through which other inputs can be read, with gradients; often the one that is listened to.

        Raises:
            ProbeError: If no gradient reaches an input in any step.
        """
        if self._step is None:
            raise ProbeError("no batch is being listened to.")
        return self.probe.for_evaluation(self._step.module, STEPS[stage], self._step.batch, *self._args)

    def heard(self) -> Heard | None:
        """What the step that has just ended said; None if it called no loss this time."""
        if self._heard is None and self._hear is not None and self._step is not None:
            self._end.close()
            call = self._hear()
            self._hear = None
            if call is None and not self._warned:
                self._warned = True
                warnings.warn(
                    f"{type(self._step.module).__name__}: a batch called no loss, though the first one did; it is left "
                    "out of what is measured.",
                    stacklevel=2,
                )
            x = self._input.of(self._batch)
            self._heard = None if call is None else Heard(call, x, self.index, self.counts)
        return self._heard

    def _numbers(self, trainer: Any, loader: int, n: int) -> tuple[Tensor, Tensor]:
        world, rank = trainer.world_size, trainer.global_rank
        source = evaluation_loaders(trainer)[loader][1]
        index = self._seen.get(loader, 0) + torch.arange(n)
        self._seen[loader] = self._seen.get(loader, 0) + n
        if world > 1 and not is_everyones(source):
            index = index * world + rank  # a distributed sampler deals samples like cards: rank, rank + world, ...
        return index, index < true_length(source, world)

    def _route(self, step: Step, loader: int) -> Route:
        if loader == 0:
            return self.probe.route(step, listening=True)
        if (step.name, loader) not in self._routes:
            # Each loader may have a head of its own; what others read, and checkpoints record, is about the first.
            first = self.probe.routes.get(step.name)
            with suppress(ProbeError):  # a step without loss, known by what training found
                self._routes[step.name, loader] = self.probe.discover(step, listening=True)
            if first is not None:
                self.probe.routes[step.name] = first
        return self._routes.get((step.name, loader)) or self.probe.route(step, listening=True)

    def _listen(self, step: Step, route: Route, loader: int, runs: bool) -> Callable[[], LossCall | None]:
        if route.module is not None and route.target is not None:
            return self._hook(step, route, loader)
        if runs and self.probe.logits_fn is None:
            return self._watch(step, route)
        return lambda: self._read(step)

    def _watch(self, step: Step, route: Route) -> Callable[[], LossCall | None]:
        watcher = LossWatcher(self.probe.loss_index, detach=True)
        self._end.enter_context(watcher)
        raw: list[Tensor] = []
        if route.module is not None:

            def keep(_module: nn.Module, _args: Any, output: Any) -> None:
                if hasattr(output, UNSCALED) and not is_unheard():
                    raw.append(getattr(output, UNSCALED).detach().clone())

            self._end.callback(step.module.get_submodule(route.module).register_forward_hook(keep).remove)

        def hear() -> LossCall | None:
            if watcher.call is None:
                return None
            call = self._retargeted(watcher.call)
            return call.again(route.logits_from(raw[-1])) if raw else call

        return hear

    def _retargeted(self, call: LossCall) -> LossCall:
        if self.probe.target_path is None:
            return call
        leaf = get(self._batch, self.probe.target_path)
        conformed = call.conformed(leaf)
        return replace(call, target=leaf if conformed is None else conformed)

    def _hook(self, step: Step, route: Route, loader: int) -> Callable[[], LossCall | None]:
        outputs: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not is_unheard():
                outputs.append(getattr(output, UNSCALED, output).detach().clone())

        hook = step.module.get_submodule(route.module or "").register_forward_hook(keep)
        self._end.callback(hook.remove)

        def hear() -> LossCall | None:
            # Pictures for a log, or test-time augmentation: which of several calls is meant is found out by reading.
            seen = (loader, len(outputs))
            place = 0 if len(outputs) == 1 else self._places.get(seen)
            if place is not None:
                return call_at(route, outputs[place], get(self._batch, route.target or ()))
            try:
                call = self._read(step)
            except ProbeError:
                if outputs:
                    raise
                return None  # a batch that the step leaves alone
            alike = [i for i, output in enumerate(outputs) if _alike(route.logits_from(output), call.logits)]
            self._places[seen] = alike[0] if alike else None
            return call

        return hear

    def _read(self, step: Step) -> LossCall:
        # As the loop runs it: whoever keeps dropout on in validation is measured with it.
        again = step.with_batch(self._batch)
        with self._context(), self.probe.reading(again, training=None, listening=True) as reading, torch.no_grad():
            return reading.read(reading.x).detached()


def _alike(output: Tensor, logits: Tensor) -> bool:
    return output.shape == logits.shape and torch.allclose(output.float(), logits.float(), rtol=1e-4, atol=1e-5)
