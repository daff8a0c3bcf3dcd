"""The probe sets of a callback: chosen in an evaluation, over all processes, and kept from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.batches import Path, get
from lightning_robust.attach.foreign import foreign_input, foreign_loader, through_hooks
from lightning_robust.attach.listener import Heard
from lightning_robust.attach.loaders import own_batches
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.step import Step
from lightning_robust.callbacks.watched_probes import WatchedProbes
from lightning_robust.saliency import Candidates, Largest, Listed, ProbeSet, Stratified, mass

__all__ = ["ATTACKED", "CHOICES", "ProbeSets", "joined", "without_channel"]

CHOICES = ("stratified", "hardest", "confident_wrong")
"""How probes are chosen from evaluation data; the first one gives its keys no suffix."""

ATTACKED = "attacked"

Summed = Callable[[Tensor], Tensor]
"""A table of doubles, summed over all processes."""


class ProbeSets:
    """Probe sets by stage and name; a name is what stands behind the stage in keys, and may be empty.

    Args:
        stages: Of evaluation.
        choices: Of :data:`CHOICES`, a set each.
        indices: Numbers of samples, a set of their own in the place of ``choices``.
        extra: Data sets and loaders by name.
        attacked: Whether there is a set ``attacked``, of the same samples as the first set.
        samples: Of each set.
        seed: Of the choice.
        region_path: Where a batch holds a mask of each sample.
    """

    def __init__(
        self,
        stages: Sequence[str],
        choices: Sequence[str],
        indices: Sequence[int] | None,
        extra: Mapping[str, Any],
        attacked: bool,
        samples: int,
        seed: int,
        region_path: Path | None,
    ) -> None:
        if indices is not None and (not len(indices) or min(indices) < 0):
            raise ValueError(f"indices= takes the numbers of samples in the loader, from 0 on; got {list(indices)}.")
        taken = {*CHOICES, ATTACKED, ""}
        for name in extra:
            if name in taken or not all(letter.isalnum() or letter in "_-." for letter in name):
                raise ValueError(
                    f"a probe set of extra= cannot be called {name!r}: names are part of log keys (letters, digits, "
                    f"'_', '-', '.'), and {', '.join(sorted(taken - {''}))} are taken."
                )
        self.choices = {"": "listed"} if indices is not None else {"" if c == CHOICES[0] else c: c for c in choices}
        self.indices, self.extra, self.samples, self.seed = indices, extra, samples, seed
        self.region_path = region_path
        self.names = [*self.choices, *([ATTACKED] if attacked else []), *extra]
        self.sets = {stage: {name: WatchedProbes(name) for name in self.names} for stage in stages}
        self._stored: dict[str, Any] = {}  # entries of sets that are not among these
        self._region: Tensor | None = None  # of the present batch
        self._shapes = torch.Size(), torch.Size([0])  # of a sample and its region

    def of(self, stage: str) -> Mapping[str, WatchedProbes]:
        """The sets of a stage."""
        return self.sets[stage]

    def started(self, stage: str) -> bool:
        """Whether there is a snapshot of any set."""
        return any(watched.started for watched in self.sets[stage].values())

    def ready(self, stage: str) -> bool:
        """Whether there is anything to explain."""
        chosen = any(watched.probes is not None for watched in self.sets[stage].values())
        return chosen or bool(self.extra and self.choices)

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The history of the set that has the longest."""
        return max((watched.history for watched in self.sets[stage].values()), key=len)

    def first(self, stage: str) -> WatchedProbes:
        """The first set of a stage."""
        return self.sets[stage][self.names[0]]

    def open(self, stage: str) -> dict[str, Candidates]:
        """Sets whose probes are being chosen."""
        return {name: w.candidates for name, w in self.sets[stage].items() if w.candidates is not None}

    def close(self, stage: str) -> None:
        """Choose nothing in this evaluation."""
        for watched in self.sets[stage].values():
            watched.candidates = None

    def reconsider(self) -> None:
        """The next evaluation may be of other data: choose again, and compare."""
        for watched in self._all().values():
            watched.reconsider()

    def section(self) -> dict[str, Any]:
        """For checkpoints."""
        found = {key: watched.to_dict() for key, watched in self._all().items()}
        return {**self._stored, **{key: entry for key, entry in found.items() if entry is not None}}

    def restore(self, section: Mapping[str, Any]) -> None:
        """What :meth:`section` gave."""
        ours = self._all()
        self._stored = {key: entry for key, entry in section.items() if key not in ours}
        for key in ours.keys() & section.keys():
            ours[key].restore(section[key])

    def rehearse(self, step: Step, maps: Tensor | None) -> None:
        """On the first batch in the sanity check: whether masks are where they should be, and fit the maps.

        Raises:
            KeyError or ValueError: If not.
        """
        if self.region_path is None or maps is None:
            return
        region = get(step.batch, self.region_path)
        if not isinstance(region, Tensor) or len(region) < len(maps):
            raise ValueError(f"region_key= must lead to a mask for each sample, got {type(region).__name__}.")
        mass(maps, without_channel(region[: len(maps)], maps))

    # -- choosing from the evaluation data -------------------------------------------------------------------------

    def begin(self, stage: str) -> None:
        """Before an evaluation: what has no probes yet chooses them in it."""
        for name, choice in self.choices.items():
            watched = self.sets[stage][name]
            watched.candidates = None if watched.probes is not None else Candidates(self._choice(choice, watched.known))

    def look_at(self, stage: str, batch: Any) -> None:
        """Before the step runs, and perhaps writes into its batch: copy the masks."""
        wanted = self.region_path is not None and self.open(stage)
        self._region = get(batch, self.region_path or ()).detach().clone().cpu() if wanted else None

    def hear(self, stage: str, heard: Heard) -> None:
        """Offer the samples of a batch to all sets that are open."""
        kept = heard.counts & heard.call.counted().cpu()
        labels, x = heard.call.labels().flatten().cpu()[kept], heard.x.cpu()[kept]
        region = None if self._region is None else self._region[kept]
        self._shapes = heard.x.shape[1:], torch.Size([0]) if region is None else region.shape[1:]
        log_p = heard.call.log_probabilities().cpu()
        log_p = log_p.reshape(len(log_p), log_p.shape[1], -1)[kept][..., 0]
        for name, candidates in self.open(stage).items():
            candidates.offer(heard.index[kept], labels, x, score_of(self.choices[name], log_p, labels), region)

    def settle(self, trainer: Any, stage: str, summed: Summed) -> Iterator[str]:
        """After the last batch: choose; yields sentences about films that have to begin anew."""
        for name, candidates in self.open(stage).items():
            watched, probes = self.sets[stage][name], self._everyones(trainer, candidates, summed)
            said = watched.settle(probes)
            watched.candidates = None
            if said is not None:
                yield said
            if self.choices[name] == "listed" and len(probes) < len(set(self.indices or [])):
                missing = sorted(set(self.indices or []) - set(probes.index.tolist()))
                yield f"the {stage} data hold no sample (with a label) of the numbers {missing} that indices= asks for."
        first = self.first(stage).probes
        attacked = self.sets[stage].get(ATTACKED)
        if attacked is not None and attacked.probes is None and first is not None:
            attacked.settle(first)

    def _choice(self, choice: str, known: Mapping[str, Any] | None) -> Stratified | Largest | Listed:
        if choice == CHOICES[0]:
            return Stratified(self.samples, self.seed)
        if choice == "listed":
            return Listed(self.indices or [])
        # What was hardest once stays in the set, however easy it is by now.
        return Largest(self.samples) if known is None else Listed(known["indices"])

    def _everyones(self, trainer: Any, candidates: Candidates, summed: Summed) -> ProbeSet:
        """What all processes chose together: a table with a place for each of them, summed."""
        if trainer.world_size > 1:
            own = candidates.table(*self._shapes)
            table = torch.zeros(trainer.world_size, *own.shape, dtype=torch.float64)
            table[trainer.global_rank] = own
            candidates.read(summed(table).flatten(0, 1), *self._shapes)
        return candidates.chosen()

    # -- other data ------------------------------------------------------------------------------------------------

    def choose_extra(
        self, trainer: Any, stage: str, template: Step, place: Path, reading: Reading, summed: Summed
    ) -> Iterator[str]:
        """The first samples of other sets, labelled with what the model takes them for now; once."""
        for name, source in self.extra.items():
            watched = self.sets[stage][name]
            if watched.probes is not None:
                continue
            candidates, like = Candidates(Listed(range(self.samples))), get(template.batch, place)
            loader = foreign_loader(source, len(like), self.samples, self.seed)
            for batch, index in own_batches(trainer, loader, self.samples):
                moved = through_hooks(trainer, template, batch, like, place)
                found = None if moved is None else get(moved, place)
                x = foreign_input(batch, found, like, f"probe set {name!r}")
                candidates.offer(index, torch.zeros(len(x)), x)
            self._shapes = like.shape[1:], torch.Size([0])
            probes = self._everyones(trainer, candidates, summed)
            if not len(probes):
                raise ValueError(f"probe set {name!r} is empty: give a data set or loader that holds samples.")
            known = watched.known
            if known is not None and known["indices"] == probes.index.tolist():
                label = torch.tensor(known["labels"])
            else:
                with torch.no_grad():
                    seen = reading.read(probes.x.to(reading.x.device, reading.x.dtype)).predictions()
                label = seen.flatten().cpu()
            said = watched.settle(replace(probes, label=label))
            if said is not None:
                yield said

    def _all(self) -> dict[str, WatchedProbes]:
        return {joined(stage, name): watched for stage, sets in self.sets.items() for name, watched in sets.items()}


def score_of(choice: str, log_p: Tensor, labels: Tensor) -> Tensor | None:
    """What samples are ranked by, ``(N,)``; infinite for those that cannot be chosen.

    Args:
        choice: One of :data:`CHOICES`.
        log_p: Log-probabilities ``(N, K)``.
        labels: Right classes ``(N,)``.

    Example:
        >>> log_p = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
        >>> score_of("confident_wrong", log_p, torch.tensor([0, 0])).exp()
        tensor([0.0000, 0.8000])
    """
    if choice == "hardest":
        return -log_p.gather(1, labels[:, None])[:, 0]
    if choice == "confident_wrong":
        sure, seen = log_p.max(1)
        return torch.where(seen == labels, -torch.inf, sure)
    return None


def without_channel(region: Tensor, maps: Tensor) -> Tensor:
    """Masks ``(N, 1, ...)`` of images as masks ``(N, ...)`` of their maps, as numbers."""
    region = region[:, 0] if region.ndim == maps.ndim + 1 and region.shape[1] == 1 else region
    return region.float()


def joined(stage: str, name: str) -> str:
    """How a set, or a method, stands in keys.

    Example:
        >>> joined("val", "hardest"), joined("val", "")
        ('val_hardest', 'val')
    """
    return f"{stage}_{name}" if name else stage
