"""Whether the model notices that a picture is none of its own: separation of foreign data in every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_robust.attach.batches import Key, Path, get, leaves, one_input, rebuilt, resized
from lightning_robust.attach.foreign import foreign_input, foreign_loader, through_hooks
from lightning_robust.attach.listener import Heard, step_context
from lightning_robust.attach.loaders import own_batches, true_length
from lightning_robust.attach.monitor import Monitor
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.sharded import takes_part
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.losses import LossCall
from lightning_robust.metrics import ScoreTable
from lightning_robust.ood import SYNTHETIC, scores_named, separation
from lightning_robust.ood.synthetic import GRID
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

__all__ = ["OODMonitor"]

IN_DISTRIBUTION = 50_000  # samples whose scores are kept: 0.4 MB a score
HISTOGRAM_BINS = 64


class OODMonitor(Monitor):
    """Measure how well scores of the logits tell foreign inputs from the evaluation data.

    In-distribution scores come from the logits of the user's own evaluation step; foreign inputs travel through the
    same step, without gradients, between its first and last batch. All scores are higher for more foreign inputs.

    Logs, for each set and score, ``ood/val/{set}/{score}_auroc``, ``_aupr_in`` and ``_aupr_out`` (which of the two is
    the positive class), ``_fpr95`` (share of own data taken for foreign where 95 % of the foreign are found) and
    ``_fpr95_id_positive`` (share of foreign data accepted where 95 % of the own are), with ``test`` for ``val`` in
    ``Trainer.test``. Exact, whole tie groups. The first loader holds the data that are not foreign. Log-probabilities
    (``nll_loss``) have no energy; several answers a sample (pixels, labels) are not measured.

    Args:
        sets: Names and data sets or loaders, of inputs as the evaluation data have them (labels are ignored). Batches
            made like those of the evaluation loader pass the same transfer hooks; others hold inputs as the model sees
            them. Token ids travel with the masks of their batch. By default three synthetic sets made of the evaluation
            pictures themselves: noise, shuffled pixels and mosaics of patches. They are easier to tell than most real
            foreign data.
        scores: ``"energy"``, ``"max_logit"``, ``"msp"`` (in log space), ``"entropy"``.
        max_samples: Of each set: a seeded random choice of a data set, the first ones of a loader.
        stages: Where to measure: ``"val"`` (every validation, in ``fit`` too), ``"test"``, or both.
        pixels: The pixel space of the inputs, for noise; by default [0, 1].
        seed: Of the choice and of the synthetic sets.
        input_key: Where in the batch the input is, if it cannot be told.
        target_key: Where the target is, if no loss tells.
        logits_fn: ``(module, batch) -> logits`` where no loss can be read; needs ``target_key``.
        loss_index: Which loss call of the step is read, 0 for the first.
        strict: Raise whenever measuring fails; else a failure in the middle of a run is said once, its metrics are
            logged as NaN, and the run goes on.
        name: Tells two callbacks of this class apart: keys start with ``ood.{name}``.

    Raises:
        TypeError: If sets are given without names.
        ValueError: If there is no set, one that can be iterated only once, no or an unknown score, or max_samples is
            below 1.

    Example:
        >>> OODMonitor(scores=["energy", "msp"]).sets.keys()
        dict_keys(['synthetic_noise', 'synthetic_shuffle', 'synthetic_mosaic'])

    References:
        Hendrycks and Gimpel, 2017, https://arxiv.org/abs/1610.02136 (msp). Liu et al., 2020,
        https://arxiv.org/abs/2010.03759 (energy). Hendrycks et al., 2022, https://arxiv.org/abs/1911.11132 (max_logit).
    """

    def __init__(
        self,
        sets: dict[str, Dataset | DataLoader] | None = None,  # type: ignore[type-arg]  # jsonargparse builds `Dataset[Any]` itself
        *,
        scores: Sequence[str] = ("energy", "max_logit", "msp", "entropy"),
        max_samples: int = 1000,
        stages: Sequence[str] = ("val", "test"),
        pixels: PixelSpace | None = None,
        seed: int = 0,
        input_key: Key | None = None,
        target_key: Key | None = None,
        logits_fn: Callable[..., Any] | None = None,
        loss_index: int = 0,
        strict: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            "ood",
            name,
            Probe(one_input(input_key, type(self).__name__), target_key, logits_fn, loss_index),
            stages,
            strict=strict,
        )
        if sets is not None and not isinstance(sets, Mapping):
            raise TypeError(
                f"sets= takes names and data sets, OODMonitor({{'other': loader}}); got a {type(sets).__name__}."
            )
        if sets is not None and not sets:
            raise ValueError("OODMonitor needs at least one set, or sets=None for synthetic ones.")
        for key, source in (sets or {}).items():
            if hasattr(source, "__next__"):
                raise ValueError(
                    f"OOD set {key!r} is an iterator, which can be iterated once only; give a data set, a list or a "
                    "DataLoader, which every evaluation can go through."
                )
        if isinstance(scores, str) or not scores:
            raise ValueError(f"scores= takes a list of scores, e.g. ['energy', 'msp'], got {scores!r}.")
        if max_samples < 1:
            raise ValueError(f"max_samples= must be at least 1, got {max_samples}.")
        self.sets: Mapping[str, Any] = SYNTHETIC if sets is None else sets
        self.synthetic = sets is None
        self.scores = scores_named(scores)
        self.max_samples, self.pixels, self.seed = max_samples, pixels or PixelSpace(), seed
        self._tables: dict[str, ScoreTable] = {}
        self._own = ScoreTable(list(self.scores), 1)
        self._log_probabilities = False  # whether the loss gets these

    def settings(self) -> Mapping[str, Any]:
        sets = ", ".join(self.sets)
        return {"sets": sets, "scores": ", ".join(self.scores), "max_samples": self.max_samples, "seed": self.seed}

    # -- when ----------------------------------------------------------------------------------------------------

    def headlines(self) -> Sequence[str]:
        measures = ("auroc", "aupr_in", "aupr_out", "fpr95", "fpr95_id_positive")
        return [f"{name}/{score}_{measure}" for name in self.sets for score in self.scores for measure in measures]

    def rehearse(self, trainer: Any, step: Step, loader: int, stage: str) -> None:
        if loader or self.synthetic:
            return
        with self._readable(trainer, step, stage):
            for name in self.sets:
                # One batch of each set: whether it is made as this model needs it.
                with closing(self._calls(trainer, step, name, 1)) as calls:
                    first = next(calls, None)
                if first is None and trainer.world_size == 1:  # of several processes one may well have no batch
                    raise ValueError(
                        f"OOD set {name!r}: expected foreign inputs, got no batch at all. Give a data set or loader "
                        "that is not empty (drop_last=False where it holds less than a batch), or leave it out."
                    )

    def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._log_probabilities = False
        self._own = ScoreTable(list(self.scores), IN_DISTRIBUTION)
        self._tables = {name: ScoreTable(list(self.scores), self.max_samples) for name in self.sets}

    def before(self, trainer: Any, step: Step, batch_idx: int, loader: int, stage: str) -> None:
        if loader or self._unreadable or not (self.synthetic or batch_idx == 0):
            return
        with self._readable(trainer, step, stage):
            if self.synthetic:
                self._score_synthetic(trainer, step)
            else:
                self._score_sets(trainer, step)

    @contextmanager
    def _readable(self, trainer: Any, step: Step, stage: str) -> Iterator[None]:
        """Where foreign inputs cannot travel through this step at all, that is said and nothing is measured."""
        try:
            with step_context(trainer, stage), torch.no_grad():
                self._find_input(step)
                yield
        except ProbeError as error:
            if self.strict:
                raise
            self._unreadable = True
            self.begin(trainer, step.module, stage)  # a part of a set is no set
            self.warn_once(f"foreign inputs cannot be read, nothing is measured: {error}")

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        if loader == 0:
            self._add(self._own, heard.call, heard.index, heard.counts)

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        own = self._own
        own.load(self.summed(trainer, pl_module, own.state()))
        entry: dict[str, Any] = {}
        for name, table in self._tables.items():
            table.load(self.summed(trainer, pl_module, table.state()))
            for score in self._served() if own.n and table.n else ():
                inside, outside = self._finite(own.of(score), name, score), self._finite(table.of(score), name, score)
                if len(inside) and len(outside):
                    found = separation(inside, outside)
                    self._log(pl_module, stage, name, score, found, len(outside))
                    entry.setdefault(name, {})[score] = {**found, **_histograms(inside, outside)}
        if stage == "val":
            self.record(trainer, entry)
        self._tables = {}
        self._own = ScoreTable(list(self.scores), 1)

    # -- what ----------------------------------------------------------------------------------------------------

    def _score_synthetic(self, trainer: Any, step: Step) -> None:
        index, keep = self.listener.index, self.listener.counts & (self.listener.index < self.max_samples)
        if not takes_part(trainer, step.module, index, keep, self.max_samples):
            return
        with self.probe.reading(step, listening=True) as reading:
            x = reading.x
            if x.ndim != 4 or min(x.shape[2:]) < GRID or not x.is_floating_point():
                self.warn_once(
                    f"synthetic sets are made of pictures (N, C, H, W) with sides of at least {GRID}, the input is "
                    f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}: name data sets or loaders of foreign "
                    "inputs, OODMonitor({'other': loader})."
                )
                return
            for number, (name, make) in enumerate(self.sets.items()):
                foreign = make(x, [seeded(self.seed, number, int(i)) for i in index], self.pixels)
                self._add(self._tables[name], reading.read(foreign), index, keep)

    def _score_sets(self, trainer: Any, step: Step) -> None:
        for name in self.sets:
            for call, index, keep in self._calls(trainer, step, name, self.max_samples):
                self._add(self._tables[name], call, index, keep)

    def _calls(
        self, trainer: Any, step: Step, name: str, limit: int
    ) -> Generator[tuple[LossCall, Tensor, Tensor], None, None]:
        """What the step says of the batches of a set, the number of each sample, and whether it counts."""
        route = self.probe.route(step, listening=True)
        like = get(step.batch, route.input)
        loader = foreign_loader(self.sets[name], len(like), self.max_samples, self.seed)
        length = true_length(loader, trainer.world_size)
        for batch, index in own_batches(trainer, loader, limit):
            moved = through_hooks(trainer, step, batch, like, route.input)
            if moved is not None and not like.is_floating_point():
                # Texts are no texts without their own masks; only what they are labelled with is not asked for.
                targets = _targets(step, route.target, len(like), len(index))
                with self.probe.reading(step.with_batch(rebuilt(moved, targets)), listening=True) as reading:
                    call = reading.read(reading.x)
            else:
                found = None if moved is None else get(moved, route.input)
                foreign = foreign_input(batch, found, like, f"OOD set {name!r}")
                with self.probe.reading(step, listening=True) as reading:
                    call = reading.read(foreign)
            yield call, index, index < length

    def _find_input(self, step: Step) -> None:
        """Where no gradient tells, the input is the largest of what has a row for every sample and is no target."""
        route = self.probe.route(step, listening=True)
        if route.differentiable:
            return
        n = len(get(step.batch, route.input))
        rows = [(path, x) for path, x in leaves(step.batch) if isinstance(x, Tensor) and x.ndim and len(x) == n]
        fits = [(path, x) for path, x in rows if path != route.target]
        largest = max(fits, key=lambda row: row[1].ndim, default=(route.input, None))[0]  # of several, the first
        self.probe.routes[step.name] = replace(
            route, input=self.probe.input_paths[0] if self.probe.input_paths else largest
        )

    def _add(self, table: ScoreTable, call: LossCall, index: Tensor, keep: Tensor) -> None:
        logits = call.class_logits()
        if logits is None and call.kind in ("nll_loss", "kl_div") and call.logits.ndim == 2:
            logits = call.logits.float()  # right but for the energy, which log-probabilities have lost
            self._log_probabilities = True
            if "energy" in self.scores:
                self.warn_once(f"the loss ({call.kind}) gets log-probabilities, which have no energy; use msp.")
        if logits is None or len(logits) != len(index):
            self.warn_once(
                f"scores are about one prediction a sample; this module's loss gets {tuple(call.logits.shape)} for "
                f"{len(index)} samples ({call.kind}). Nothing is measured.",
                "head",
            )
            return
        keep = keep.to(index.device)
        table.add(index[keep], {name: score(logits).cpu()[keep.cpu()] for name, score in self.scores.items()})

    def _served(self) -> list[str]:
        return [score for score in self.scores if not (self._log_probabilities and score == "energy")]

    def _finite(self, scores: Tensor, name: str, score: str) -> Tensor:
        finite = scores.isfinite()
        if not bool(finite.all()):
            lost = f"{int((~finite).sum())} of {len(scores)} here, {score} for the set {name!r}"
            self.warn_once(f"scores that are NaN or infinite are left out ({lost}).", "finite")
        return scores[finite]

    def _log(self, pl_module: Any, stage: str, name: str, score: str, found: Mapping[str, float], n: int) -> None:
        shown = {"fpr95_ood_positive": "fpr95"}
        values = {
            self.key(stage, f"{name}/{score}_{shown.get(metric, metric)}"): value for metric, value in found.items()
        }
        self.log_values(pl_module, values, n)


def _targets(step: Step, path: Path | None, n: int, wanted: int) -> Mapping[Path, Any]:
    """The targets of the step's own batch, for another number of samples."""
    return {} if path is None else {path: get(resized(step.batch, n, wanted), path)}


def _histograms(inside: Tensor, outside: Tensor) -> dict[str, Any]:
    """Both distributions on common edges, and the score below which 95 % of the own data lie."""
    both = torch.cat([inside, outside])
    low, high = float(both.min()), float(both.max())
    counts = {
        f"histogram_{side}": torch.histc(scores, HISTOGRAM_BINS, low, high).long().tolist()
        for side, scores in (("in", inside), ("out", outside))
    }
    return {"range": [low, high], **counts, "threshold95": float(inside.quantile(0.95))}
