"""Detectors on features in a run: fitted on training samples, fed from the last linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.batches import described
from lightning_robust.attach.features import Caught, FeatureTap, Tapped
from lightning_robust.attach.labelled import check_make, kinds_of, read_labelled, training_data
from lightning_robust.attach.loaders import own_batches, transferred
from lightning_robust.attach.plain import plain, size_in_bytes
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.losses import LossCall

__all__ = ["Detecting"]


class Detecting:
    """The detectors of one monitor.

    One that fails is left out of an evaluation, and the others go on; what keeps all of them from being fitted is a
    ValueError, in every process alike.

    Args:
        detectors: By name; see :class:`~lightning_robust.ood.Detector`.
        layer: Name of the submodule whose output the features are; None for what goes into the last linear layer.
        source: What to fit on; None for training samples.
        samples: How many, at most.
        seed: Of the choice.
        warn: ``(message, about)``, once.
        strict: Raise what a detector raises.

    Attributes:
        fitted: Those that are fitted on the weights that are measured now.
        broken: Those that then gave no scores.
        several: Whether the module gives several answers a sample (pixels, labels), which no detector is about.
    """

    def __init__(
        self,
        detectors: Mapping[str, Any],
        layer: str | None,
        source: Any,
        samples: int,
        seed: int,
        warn: Callable[[str, str], None],
        strict: bool = False,
    ) -> None:
        self.detectors, self.source, self.samples, self.seed = detectors, source, samples, seed
        self.warn, self.strict = warn, strict
        self.tap = FeatureTap(layer)
        self.fitted: list[str] = []
        self.broken: set[str] = set()
        self.several = False
        self._seen: Any = None  # a loader over training samples, of the last fit
        self._stored: dict[str, Any] = {}
        self._make: tuple[Any, str] | None = None  # of the evaluation batches, once one was seen, and in words
        self._joined = False

    # -- before training -----------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Another run may have another module."""
        self.tap.found, self._make, self.several = False, None, False

    def see(self, trainer: Any) -> None:
        """Keep hold of the training samples of a fit: a ``Trainer.test`` after it has none of its own."""
        self._seen = None if self.source is not None else training_data(trainer, self.samples, self.seed)

    @property
    def remembers(self) -> bool:
        """Whether training samples of an earlier fit are at hand."""
        return self._seen is not None

    def rehearse(self, trainer: Any, probe: Probe, step: Step) -> None:
        """Find the features, and read one batch of what will be fitted on where that is known before training.

        Raises:
            ValueError: If that cannot be done, with what to do about it.
        """
        self._make = kinds_of(step.batch), described(step.batch)
        try:
            self._find(probe, step)
            if self.source is not None and not self.several:
                for reading, _index, _counts in read_labelled(trainer, probe, step, self.source, 1, "fit_data"):
                    self._read(step.module, partial(reading.read, reading.x))
        except ProbeError as error:
            raise ValueError(f"{self._all}: {error}") from error

    def check_training_data(self, trainer: Any, module: nn.Module) -> None:
        """Whether they can be fitted on training samples, where they are to be.

        Raises:
            ValueError: If not.
        """
        if self.source is not None or self.several:
            return
        loader, remedy = training_data(trainer, 1, self.seed), "give fit_data=, a data set or loader whose batches are"
        if loader is None:
            raise ValueError(
                f"{self._all}: fitted on training samples, but the training loader is not one DataLoader over a data "
                "set that knows its length, with a sampler of torch's own that tells which samples it draws; "
                f"{remedy} made like those of the evaluation loader."
            )
        for batch, _index in own_batches(trainer, loader, 1):
            moved = transferred(trainer, module, batch)
            try:
                if self._make is not None:
                    check_make("the training loader", moved, *self._make)
            except ProbeError as other:
                raise ValueError(f"{self._all}: {other} So {remedy} like the latter.") from other

    # -- fitting -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A new evaluation, for which nothing is fitted yet."""
        self.fitted, self.broken = [], set()

    def fit(self, trainer: Any, probe: Probe, step: Step, summed: Callable[[Tensor], Tensor] | None) -> None:
        """Fit all detectors on the weights as they are now; else take those of the checkpoint.

        Where the module gives several answers a sample, none is fitted.

        Args:
            trainer: Its training data; where it has none, those of the last fit are taken.
            probe: How steps are read.
            step: The evaluation step with the first batch.
            summed: Sums over processes, each of which calls this inside of :meth:`meeting`; None for one process.

        Raises:
            ValueError: If they cannot be fitted.
        """
        self.begin()
        problem: Exception | None = None
        failed: dict[str, Exception] = {}
        source = self.source
        try:
            self._find(probe, step)
            if source is None:
                if trainer.train_dataloader is not None:  # a new one in each epoch, as some have it
                    self.see(trainer)
                source = self._seen
            if source is not None and not self.several:
                self._learn(trainer, probe, step, source, failed)
        except Exception as error:  # others wait for this process at the sum
            problem = error
        self._agree(summed, problem is not None, failed)
        if problem is not None:
            self.tap.found = False  # the module may have changed: look again
            raise ValueError(f"{self._all}: {problem}") from problem
        if self.several:
            return
        for name in self.detectors if source is None else ():
            self._tried(name, partial(self._load, name), failed)
        for name in () if source is None else self.detectors:
            if name not in failed:
                self._tried(name, partial(self._fit, name, self._head(step.module), summed), failed)
        self._agree(summed, False, failed)
        self.fitted = [name for name in self.detectors if name not in failed]
        for name, why in failed.items():
            self.warn(f"the detector {name!r} is left out, others go on: {why}", f"detector {name}")

    @contextmanager
    def meeting(self, summed: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
        """Around what calls :meth:`fit`: where it does not come to that, the other processes get to know."""
        self._joined = False
        try:
            yield
        except Exception:
            self._stay_away(summed)
            raise
        self._stay_away(summed)

    def _stay_away(self, summed: Callable[[Tensor], Tensor] | None) -> None:
        if not self._joined and summed is not None:
            summed(torch.tensor([1.0, *[0.0] * len(self.detectors)], dtype=torch.float64))

    def _agree(self, summed: Callable[[Tensor], Tensor] | None, problem: bool, failed: dict[str, Exception]) -> None:
        """What failed in one process has failed in all: they do together what they go on with."""
        self._joined = True
        if summed is None:
            return
        votes = [float(problem), *(float(name in failed) for name in self.detectors)]
        anywhere, *each = summed(torch.tensor(votes, dtype=torch.float64)).bool().tolist()
        for name, failure in zip(self.detectors, each, strict=True):
            if failure:
                failed.setdefault(name, RuntimeError("it failed in another process."))
        if anywhere and not problem:
            raise ValueError(f"{self._all}: another process could not read what they are fitted on.")

    def _learn(self, trainer: Any, probe: Probe, step: Step, source: Any, failed: dict[str, Exception]) -> None:
        for name, detector in self.detectors.items():
            self._tried(name, detector.begin, failed)
        what = "the training loader (give fit_data=)" if self.source is None else "fit_data"
        for reading, index, counts in read_labelled(trainer, probe, step, source, self.samples, what, self.seed):
            caught, call = self._read(step.module, partial(reading.read, reading.x))
            logits, labels = logits_of(call, caught), call.labels().reshape(-1)
            if logits is None or not len(logits) == len(labels) == len(caught.features):
                raise ProbeError(
                    f"detectors are about one prediction a sample; this module's loss gets {tuple(call.logits.shape)} "
                    f"for {len(reading.x)} samples."
                )
            labels = labels.masked_fill(~call.counted().reshape(-1), -1)
            keep = counts.nonzero().squeeze(1)
            rows = [part.detach().cpu()[keep] for part in (caught.features, logits, labels)]
            for name, detector in self.detectors.items():
                if name not in failed:
                    self._tried(name, partial(detector.add, *rows, index[keep]), failed)

    def _fit(self, name: str, head: nn.Linear | None, summed: Callable[[Tensor], Tensor] | None) -> None:
        if summed is not None:
            self.detectors[name].reduce(summed)
        self.detectors[name].fit(head)

    def _tried(self, name: str, do: Callable[[], Any], failed: dict[str, Exception]) -> None:
        try:
            do()
        except Exception as error:  # users write detectors, too
            if self.strict:
                raise
            failed[name] = error

    def _load(self, name: str) -> None:
        if name not in self._stored:
            raise LookupError(
                "there is no training data here to fit it on, and no checkpoint brought it fitted: pass ckpt_path= of "
                "one that was saved with it, or fit_data=."
            )
        self.detectors[name].load(self._stored[name])

    def _head(self, module: nn.Module) -> nn.Linear | None:
        head = self.tap.linear(module)
        if head is None:
            return None
        # A copy on the CPU in full precision, where the features are compared.
        # Made without its initial weights, which would be drawn from the user's random stream.
        copied = nn.utils.skip_init(nn.Linear, head.in_features, head.out_features, bias=head.bias is not None)  # type: ignore[no-untyped-call]  # as torch has it
        copied.weight.data = head.weight.detach().float().cpu()
        if head.bias is not None:
            copied.bias.data = head.bias.detach().float().cpu()
        return copied  # type: ignore[no-any-return]  # what skip_init makes

    # -- reading -------------------------------------------------------------------------------------------------

    def listen(self, module: nn.Module) -> AbstractContextManager[Tapped]:
        """Catch the features of the step that Lightning is about to run."""
        return self.tap.open(module, listening=True)

    def read(self, module: nn.Module, run: Callable[[], LossCall]) -> tuple[LossCall, Caught | None]:
        """Run a forward of ours; what it said, and its features where they are wanted and were caught."""
        if not self.fitted:
            return run(), None
        with self.tap.open(module) as tapped:
            call = run()
        return call, tapped.of(call)

    def _read(self, module: nn.Module, run: Callable[[], LossCall]) -> tuple[Caught, LossCall]:
        with self.tap.open(module) as tapped:
            call = run()
        caught = tapped.of(call)
        if caught is None:
            raise ProbeError(
                f"the features of {type(module).__name__} were not caught in a forward (is it compiled away from "
                "hooks, or does it leave its last linear layer out?): name a layer that runs, feature_layer=."
            )
        return caught, call

    def _find(self, probe: Probe, step: Step) -> None:
        """Find the features in one read of the step, once a run; or that there are several answers a sample."""
        if self.tap.found or self.several:
            return
        with probe.reading(step, listening=True) as reading, torch.no_grad():

            def read() -> LossCall:
                call = reading.read(reading.x)
                self.several = several_answers(call, len(reading.x))
                return call

            try:
                self.tap.find(step.module, read)
            except ProbeError:
                if not self.several:  # else nobody wants any
                    raise

    def scores(self, caught: Caught | None, call: LossCall) -> dict[str, Tensor]:
        """The score ``(N,)`` of each detector on the CPU; not a number where there is none."""
        logits = None if caught is None else logits_of(call, caught)
        scores = {name: torch.full((len(call.logits),), float("nan")) for name in self.detectors}
        if caught is None or logits is None:  # one batch of many: its rows count as not finite
            return scores
        features, logits = caught.features.detach().float().cpu(), logits.detach().float().cpu()
        for name in self.fitted:
            try:
                found = self.detectors[name](features, logits).detach().cpu()
                if found.shape != scores[name].shape:
                    raise ValueError(f"expected a score for each of {len(logits)} samples, got {tuple(found.shape)}.")
                scores[name] = found
            except Exception as error:  # as in fitting
                if self.strict:
                    raise
                self.broken.add(name)
                self.warn(f"the detector {name!r} gives no scores: {error}", f"detector {name}")
        return scores

    def state(self, limit: float = math.inf) -> dict[str, Any]:
        """What a checkpoint needs to use them; nothing, with a warning, where that takes more than ``limit`` bytes.

        No warning where there is ``fit_data=``, on which they are fitted in any process.
        """
        states: dict[str, Any] = {}
        for name in self.fitted:
            try:
                states[name] = plain(self.detectors[name].state(), "its state()")
            except Exception as error:  # users write detectors, too
                self.warn(f"the detector {name!r} is left out of checkpoints: {error}", f"state of {name}")
        size = size_in_bytes(states)
        if size <= limit:
            return states
        if self.source is None:  # else every evaluation fits them
            self.warn(
                f"the fitted detectors take {size / 2**20:.0f} MiB, more than the {limit / 2**20:.0f} that go into "
                "every checkpoint: a Trainer.test in another process than the fit needs fit_data=.",
                "size",
            )
        return {}

    def remember(self, stored: Mapping[str, Any]) -> None:
        """Take note of what a checkpoint brought."""
        self._stored = dict(stored)

    @property
    def _all(self) -> str:
        return ", ".join(self.detectors)


def several_answers(call: LossCall, n: int) -> bool:
    """Whether a module says more, or less, than one prediction for each of ``n`` samples."""
    logits = call.class_logits()
    if logits is None and not call.binary and call.logits.ndim == 2:
        logits = call.logits
    return logits is None or len(logits) != n


def logits_of(call: LossCall, caught: Caught) -> Tensor | None:
    """Logits ``(N, K)`` of one prediction a sample; None if there are several.

    Where the loss gets log-probabilities, which have lost what ViM needs, the output of the last layer itself.
    """
    logits = call.class_logits()
    if logits is not None or call.binary or call.logits.ndim != 2:
        return logits
    return (call.logits if caught.output is None else caught.output).reshape(call.logits.shape).float()
