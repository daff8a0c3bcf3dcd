"""The fixed inputs that every snapshot explains."""

from __future__ import annotations

import hashlib
from bisect import insort
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

__all__ = ["Candidates", "ProbeSet"]

Row = tuple[int, int, Tensor]
"""Rank of a sample in its class, its global index, and the sample."""


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """Samples to be explained again and again, sorted by class and then by index.

    Attributes:
        index: Global indices ``(n,)``.
        label: Classes ``(n,)``.
        x: The samples ``(n, ...)``, on the CPU.
    """

    index: Tensor
    label: Tensor
    x: Tensor

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


class Candidates:
    """Picks a probe set out of a stream of batches: stratified by class, seeded, in one pass.

    The choice is a function of ``seed``, the indices and the labels. Batch size, order and the number of processes mean
    nothing to it. Classes are ranked by a hash of ``(seed, label)``, samples within a class by a hash of
    ``(seed, index)``. The first ``n`` classes share the ``n`` places, ``m`` classes at most ``ceil(n / m)`` each, dealt
    out in turn. A class with fewer samples than its share leaves places empty: others could only fill them if more
    samples were held.

    Args:
        n: Size of the probe set, at least 1. At most ``2 n`` samples are ever held.
        seed: Another seed, other probes.

    Raises:
        ValueError: If ``n`` is below 1.

    Example:
        >>> candidates = Candidates(4, seed=0)
        >>> for start in range(0, 100, 10):
        ...     index = torch.arange(start, start + 10)
        ...     candidates.offer(index, index % 2, index.float().view(-1, 1))
        >>> candidates.chosen().label
        tensor([0, 0, 1, 1])
    """

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"a probe set needs at least one sample, got n={n}.")
        self.n, self.seed = n, seed
        self._classes: dict[int, list[Row]] = {}

    def offer(self, index: Tensor, label: Tensor, x: Tensor) -> None:
        """See one batch; of what may be chosen, copies are kept on the CPU.

        A sample that comes twice (a distributed sampler pads) counts once.

        Args:
            index: Global indices ``(N,)``, one and the same for a sample wherever and whenever it comes.
            label: Classes ``(N,)``, whole numbers.
            x: The samples ``(N, ...)``.

        Raises:
            ValueError: If there is not one index and one label per sample.
        """
        if index.shape != (len(x),) or label.shape != (len(x),):
            raise ValueError(
                f"expected an index and a label for each of {len(x)} samples, got {tuple(index.shape)} and "
                f"{tuple(label.shape)}."
            )
        for i, (number, kind) in enumerate(zip(index.tolist(), label.tolist(), strict=True)):
            self._offer(int(number), int(kind), x[i])

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Index, label and x of everything held, for :meth:`offer` in another process."""
        rows = [(number, kind, x) for kind, members in self._classes.items() for _, number, x in members]
        if not rows:
            return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0)
        numbers, kinds, samples = zip(*rows, strict=True)
        # New tensors that can be saved for a backward pass, in whatever mode the batches were made.
        with torch.inference_mode(False):
            return torch.tensor(numbers), torch.tensor(kinds), torch.stack(samples)

    def chosen(self) -> ProbeSet:
        """The probe set of everything seen so far; of no samples, an empty one."""
        members = [self._classes[kind] for kind in sorted(self._classes, key=self._class_rank)]
        in_turn = [number for turn in zip_longest(*members) for _, number, _ in filter(None, turn)][: self.n]
        index, label, x = self.rows()
        places = zip(label.tolist(), index.tolist(), range(len(index)), strict=True)
        order = [place for _, number, place in sorted(places) if number in in_turn]
        with torch.inference_mode(False):
            return ProbeSet(index[order], label[order], x[order])

    def _offer(self, number: int, kind: int, x: Tensor) -> None:
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
        place = self._rank("sample", number), number
        if any(known == number for _, known, _ in members) or (len(members) >= share and place > members[-1][:2]):
            return
        insort(members, (*place, x.detach().to("cpu", copy=True)), key=lambda row: row[:2])
        for rows in self._classes.values():
            del rows[share:]

    def _class_rank(self, kind: int) -> int:
        return self._rank("class", kind)

    def _rank(self, what: str, number: int) -> int:
        key = f"{self.seed} {what} {number}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
