"""How right a model was on each single sample: as it is, and under each attack."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SampleScores"]

_SEEN, _CLEAN, _LABEL, _GROUP, _RADIUS, _FIRST_ATTACK = range(6)  # rows of the table
_NONE = -(2.0**52)  # no class, no group
_SHIFTS = (0, 16, 32, 48)


class SampleScores:
    """A table of the first ``capacity`` samples by their global index, and a hash of which samples they were.

    The order of batches means nothing, and neither does the number of processes: all state is one tensor of doubles
    that is summed over them (:meth:`state`, :meth:`load`), exactly.

    Args:
        attacks: Names of the attacks.
        capacity: How many samples are kept at most; memory grows with those that come.

    Example:
        >>> scores = SampleScores(["pgd"], capacity=4)
        >>> index = torch.tensor([0, 1])
        >>> scores.add_clean(index, torch.tensor([1.0, 1.0]), torch.zeros(2, 3))
        >>> scores.add_attack("pgd", index, torch.tensor([0.0, 1.0]))
        >>> scores.accuracies()
        {'clean_accuracy': 1.0, 'accuracy': 0.5, 'accuracy_pgd': 0.5}
    """

    def __init__(self, attacks: Sequence[str], capacity: int) -> None:
        self.attacks = list(attacks)
        self.capacity = capacity
        self._table = torch.zeros(_FIRST_ATTACK + len(self.attacks), 0, dtype=torch.float64)
        self._ids = 0

    def add_clean(
        self, index: Tensor, correct: Tensor, x: Tensor, labels: Tensor | None = None, groups: Tensor | None = None
    ) -> None:
        """Results without an attack.

        Args:
            index: Global indices ``(N,)``, below the capacity.
            correct: How much of each sample is right, ``(N,)`` in [0, 1].
            x: The samples themselves, for the hash.
            labels: Right classes ``(N,)``, where a sample has one.
            groups: What group each sample belongs to, ``(N,)`` whole numbers.
        """
        self._grow(int(index.max()) + 1 if len(index) else 0)
        self._table[_SEEN, index] = 1.0
        self._table[_CLEAN, index] = correct.double().cpu()
        self._table[_LABEL, index] = _NONE if labels is None else labels.double().cpu()
        self._table[_GROUP, index] = _NONE if groups is None else groups.double().cpu()
        self._table[_RADIUS, index] = torch.where(correct.cpu() > 0, torch.inf, 0.0).double()
        self._ids += sum(_fingerprint(i, sample) for i, sample in zip(index.tolist(), x, strict=True))

    def add_attack(self, name: str, index: Tensor, correct: Tensor) -> None:
        """Results under one attack, after those without.

        What breaks without an attack is not robust, wherever the attack happened to lead.
        """
        row = _FIRST_ATTACK + self.attacks.index(name)
        self._table[row, index] = torch.minimum(correct.double().cpu(), self._table[_CLEAN, index])

    def add_radius(self, index: Tensor, radius: Tensor) -> None:
        """How far samples had to be moved to be fooled, ``(N,)``, infinite where they were not; the smallest counts."""
        self._table[_RADIUS, index] = torch.minimum(self._table[_RADIUS, index], radius.double().cpu())

    @property
    def size(self) -> int:
        """How many samples the table has room for now."""
        return self._table.shape[1]

    def _grow(self, size: int) -> None:
        if size > self.capacity:
            raise IndexError(f"expected numbers of samples below {self.capacity}, got {size - 1}.")
        if size > self.size:
            self._resize(min(self.capacity, max(size, 2 * self.size)))

    def _resize(self, size: int) -> None:
        self._table = torch.nn.functional.pad(self._table, (0, size - self.size))

    def state(self, size: int = 0) -> Tensor:
        """Everything, as one tensor of doubles to be summed over processes, which all have to use one ``size``."""
        self._resize(max(self.size, min(size, self.capacity)))
        ids = torch.tensor([(self._ids >> shift) & 0xFFFF for shift in _SHIFTS], dtype=torch.float64)
        return torch.cat([self._table.flatten(), ids])

    def load(self, state: Tensor) -> None:
        """Take over the sum of several states."""
        state = state.cpu()
        self._table = state[: -len(_SHIFTS)].view(len(self._table), -1)
        parts = zip(state[-len(_SHIFTS) :].tolist(), _SHIFTS, strict=True)
        self._ids = sum(int(part) << shift for part, shift in parts) % 2**64

    @property
    def n(self) -> int:
        """How many samples were measured."""
        return int(self._table[_SEEN].sum())

    @property
    def sample_ids(self) -> str:
        """A hash of which samples they were, the same for the same samples in any order."""
        return f"{self._ids:016x}"

    def correct(self, attack: str | None = None) -> Tensor:
        """How much of each measured sample is right, ``(n,)``; without an attack, or under one."""
        row = _CLEAN if attack is None else _FIRST_ATTACK + self.attacks.index(attack)
        return self._table[row, self._table[_SEEN] > 0]

    def worst(self) -> Tensor:
        """How much of each measured sample is right under the worst attack on it, ``(n,)``."""
        return torch.stack([self.correct(name) for name in self.attacks]).amin(0)

    def radii(self) -> Tensor:
        """The smallest perturbation found that fools each measured sample, ``(n,)``: 0 where it was wrong before."""
        return self._table[_RADIUS, self._table[_SEEN] > 0]

    def holding(self, radii: Sequence[float]) -> list[float]:
        """Share of the samples that no perturbation found inside each radius fools."""
        # A perturbation that touches the ball counts; round-off must not move it outside.
        return [float((self.radii() > radius * (1 + 1e-5)).double().mean()) for radius in radii]

    def by(self, what: str) -> dict[int, tuple[int, float, float]]:
        """Number of samples, clean and robust accuracy of each class (``"class"``) or group (``"group"``)."""
        of = self._table[_LABEL if what == "class" else _GROUP, self._table[_SEEN] > 0]
        clean, worst = self.correct(), self.worst()
        parts = {int(part): of == part for part in sorted(set(of.tolist())) if part != _NONE}
        return {
            part: (int(rows.sum()), float(clean[rows].mean()), float(worst[rows].mean()))
            for part, rows in parts.items()
        }

    def accuracies(self) -> dict[str, float]:
        """Means over the samples: ``clean_accuracy``, ``accuracy`` (the worst case of each), ``accuracy_{attack}``."""
        rows = {f"accuracy_{name}": self.correct(name) for name in self.attacks}
        means = {"clean_accuracy": self.correct(), "accuracy": self.worst(), **rows}
        return {name: float(right.sum() / self.n) for name, right in means.items()}


def _fingerprint(index: int, x: Tensor) -> int:
    """48 bits of what sample number ``index`` holds, to be summed over samples in any order."""
    content = x.detach().float().cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=6, key=str(index).encode()).digest(), "little")
