"""The fixed inputs that every snapshot explains, and how they are chosen in one pass over a stream of batches."""

from __future__ import annotations

import hashlib
from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Candidates", "Choice", "Largest", "Listed", "ProbeSet", "Sample", "Stratified"]


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample that may be chosen.

    Attributes:
        index: Its number among all.
        label: Its class.
        score: What it is ranked by, where a choice ranks.
        x: The sample.
        region: A mask of it, or an empty tensor.
    """

    index: int
    label: int
    score: float
    x: Tensor
    region: Tensor

    def kept(self) -> Sample:
        """With copies on the CPU that survive the batch."""
        x, region = (t.detach().to("cpu", copy=True) for t in (self.x, self.region))
        return Sample(self.index, self.label, self.score, x, region)


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """Samples to be explained again and again.

    Attributes:
        index: Global indices ``(n,)``.
        label: Classes ``(n,)``.
        x: The samples ``(n, ...)``, on the CPU.
        region: Masks of the samples ``(n, ...)``, where the data have any.
    """

    index: Tensor
    label: Tensor
    x: Tensor
    region: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def hash(self) -> str:
        """16 hex digits of which samples these are, what they hold and what they are called.

        Maps of two probe sets can be compared where this is equal.
        """
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.index, self.label, self.x.float()):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> ProbeSet:
        """These samples, in this order."""
        # New tensors that can be saved for a backward pass, in whatever mode the batches were made.
        with torch.inference_mode(False):
            index, label = (torch.tensor([getattr(s, name) for s in samples]).long() for name in ("index", "label"))
            if not samples:
                return cls(index, label, torch.empty(0))
            x, region = (torch.stack([getattr(s, name) for s in samples]) for name in ("x", "region"))
            return cls(index, label, x, region if region.numel() else None)


class Choice(Protocol):
    """Which of the samples that pass by are probes."""

    capacity: int

    def offer(self, sample: Sample) -> None:
        """See one sample; keep a copy if it may be chosen. One that comes twice counts once."""

    def held(self) -> Iterable[Sample]:
        """Everything that may still be chosen, at most ``capacity`` samples."""

    def chosen(self) -> list[Sample]:
        """The probes of all that was seen so far, in their order."""


class Candidates:
    """Picks a probe set out of a stream of batches, in one pass, whatever the order, the batches and the processes.

    Args:
        choice: :class:`Stratified`, :class:`Largest` or :class:`Listed`.

    Example:
        >>> candidates = Candidates(Stratified(4, seed=0))
        >>> for start in range(0, 100, 10):
        ...     index = torch.arange(start, start + 10)
        ...     candidates.offer(index, index % 2, index.float().view(-1, 1))
        >>> candidates.chosen().label
        tensor([0, 0, 1, 1])
    """

    def __init__(self, choice: Choice) -> None:
        self.choice = choice

    def offer(
        self, index: Tensor, label: Tensor, x: Tensor, score: Tensor | None = None, region: Tensor | None = None
    ) -> None:
        """See one batch; of what may be chosen, copies are kept on the CPU.

        A sample that comes twice (a distributed sampler pads) counts once.

        Args:
            index: Global indices ``(N,)``, one and the same for a sample wherever and whenever it comes.
            label: Classes ``(N,)``, whole numbers.
            x: The samples ``(N, ...)``.
            score: What samples are ranked by, ``(N,)``; 0 for all by default.
            region: Masks ``(N, ...)`` that travel with the samples.

        Raises:
            ValueError: If there is not one index, label and score per sample.
        """
        score = torch.zeros(len(x)) if score is None else score
        region = x.new_empty(len(x), 0) if region is None else region
        if any(part.shape != (len(x),) for part in (index, label, score)) or len(region) != len(x):
            raise ValueError(
                f"expected an index, a label and a score for each of {len(x)} samples, got {tuple(index.shape)}, "
                f"{tuple(label.shape)} and {tuple(score.shape)}, and {len(region)} masks."
            )
        numbers = zip(index.tolist(), label.tolist(), score.tolist(), strict=True)
        for i, (number, kind, value) in enumerate(numbers):
            self.choice.offer(Sample(int(number), int(kind), float(value), x[i], region[i]))

    def table(self, shape: torch.Size, region: torch.Size) -> Tensor:
        """Everything held as one table of doubles of a fixed size, for other processes; see :meth:`read`."""
        table = torch.zeros(self.choice.capacity, 4 + shape.numel() + region.numel(), dtype=torch.float64)
        for row, sample in zip(table, self.choice.held(), strict=False):
            row[:4] = torch.tensor([1.0, sample.index, sample.label, sample.score], dtype=torch.float64)
            row[4:] = torch.cat([sample.x.flatten().double(), sample.region.flatten().double()])
        return table

    def read(self, table: Tensor, shape: torch.Size, region: torch.Size) -> None:
        """See what another process held."""
        rows = table[table[:, 0] == 1]
        if len(rows):
            x = rows[:, 4 : 4 + shape.numel()].float().view(-1, *shape)
            masks = rows[:, 4 + shape.numel() :].float().view(len(rows), *region)
            self.offer(rows[:, 1].long(), rows[:, 2].long(), x, rows[:, 3], masks)

    def chosen(self) -> ProbeSet:
        """The probe set of everything seen so far; of no samples, an empty one."""
        return ProbeSet.of(self.choice.chosen())


class Stratified:
    """Samples of all classes, by a seed.

    The choice is a function of ``seed``, the indices and the labels. Classes are ranked by a hash of ``(seed, label)``,
    samples within a class by a hash of ``(seed, index)``. The first ``n`` classes share the ``n`` places, ``m`` classes
    at most ``ceil(n / m)`` each, dealt out in turn. A class with fewer samples than its share leaves places empty:
    others could only fill them if more samples were held. Probes are sorted by class and then by index.

    Args:
        n: Size of the probe set, at least 1. At most ``2 n`` samples are ever held.
        seed: Another seed, other probes.

    Raises:
        ValueError: If ``n`` is below 1.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.capacity = _size(n), seed, 2 * n
        self._classes: dict[int, list[tuple[int, Sample]]] = {}  # with its rank in its class

    def offer(self, sample: Sample) -> None:
        kind, number = sample.label, sample.index
        if kind not in self._classes:
            if len(self._classes) == self.n:
                last = max(self._classes, key=self._class_rank)
                if self._class_rank(kind) > self._class_rank(last):
                    return
                del self._classes[last]
            self._classes[kind] = []
        members = self._classes[kind]
        # Never smaller than it will be in the end: the number of classes only grows.
        share = -(-self.n // len(self._classes))
        rank = self._rank("sample", number)
        if any(known.index == number for _, known in members):
            return
        if len(members) >= share and (rank, number) > (members[-1][0], members[-1][1].index):
            return
        insort(members, (rank, sample.kept()), key=lambda row: (row[0], row[1].index))
        for rows in self._classes.values():
            del rows[share:]

    def held(self) -> Iterator[Sample]:
        return (sample for members in self._classes.values() for _, sample in members)

    def chosen(self) -> list[Sample]:
        members = [self._classes[kind] for kind in sorted(self._classes, key=self._class_rank)]
        in_turn = [sample for turn in zip_longest(*members) for _, sample in filter(None, turn)][: self.n]
        return sorted(in_turn, key=lambda sample: (sample.label, sample.index))

    def _class_rank(self, kind: int) -> int:
        return self._rank("class", kind)

    def _rank(self, what: str, number: int) -> int:
        key = f"{self.seed} {what} {number}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


class Largest:
    """The samples with the largest finite scores, the largest first; of equal ones those that come first.

    Example:
        >>> candidates = Candidates(Largest(2))
        >>> score = torch.tensor([1.0, 5.0, 2.0, 5.0])
        >>> candidates.offer(torch.arange(4), torch.zeros(4), torch.rand(4, 3), score)
        >>> candidates.chosen().index
        tensor([1, 3])
    """

    def __init__(self, n: int) -> None:
        self.capacity = _size(n)
        self._members: list[Sample] = []

    def offer(self, sample: Sample) -> None:
        if not abs(sample.score) < float("inf") or any(known.index == sample.index for known in self._members):
            return
        if len(self._members) == self.capacity and _place(sample) > _place(self._members[-1]):
            return
        insort(self._members, sample.kept(), key=_place)
        del self._members[self.capacity :]

    def held(self) -> Iterator[Sample]:
        return iter(self._members)

    def chosen(self) -> list[Sample]:
        return list(self._members)


class Listed:
    """The samples with these numbers, in the order in which they are given.

    Example:
        >>> candidates = Candidates(Listed([7, 2]))
        >>> candidates.offer(torch.arange(10), torch.zeros(10), torch.rand(10, 3))
        >>> candidates.chosen().index
        tensor([7, 2])
    """

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = list(dict.fromkeys(indices))
        self.capacity = _size(len(self.indices))
        self._members: dict[int, Sample] = {}

    def offer(self, sample: Sample) -> None:
        if sample.index in self.indices and sample.index not in self._members:
            self._members[sample.index] = sample.kept()

    def held(self) -> Iterator[Sample]:
        return iter(self._members.values())

    def chosen(self) -> list[Sample]:
        return [self._members[number] for number in self.indices if number in self._members]


def _place(sample: Sample) -> tuple[float, int]:
    return -sample.score, sample.index


def _size(n: int) -> int:
    if n < 1:
        raise ValueError(f"a probe set needs at least one sample, got n={n}.")
    return n
