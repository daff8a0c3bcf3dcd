"""How right a model was on each single sample: as it is, and under each attack."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SampleScores"]

_SEEN, _CLEAN, _FIRST_ATTACK = 0, 1, 2  # rows of the table
_SHIFTS = (0, 16, 32, 48)


class SampleScores:
    """A table of the first ``capacity`` samples by their global index, and a hash of which samples they were.

    The order of batches means nothing, and neither does the number of processes: all state is one tensor of doubles
    that is summed over them (:meth:`state`, :meth:`load`), exactly.

    Args:
        attacks: Names of the attacks.
        capacity: How many samples are kept.

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
        self._table = torch.zeros(_FIRST_ATTACK + len(self.attacks), capacity, dtype=torch.float64)
        self._ids = 0

    def add_clean(self, index: Tensor, correct: Tensor, x: Tensor) -> None:
        """Results without an attack.

        Args:
            index: Global indices ``(N,)``, below the capacity.
            correct: How much of each sample is right, ``(N,)`` in [0, 1].
            x: The samples themselves, for the hash.
        """
        self._table[_SEEN, index] = 1.0
        self._table[_CLEAN, index] = correct.double().cpu()
        self._ids += sum(_fingerprint(i, sample) for i, sample in zip(index.tolist(), x, strict=True))

    def add_attack(self, name: str, index: Tensor, correct: Tensor) -> None:
        """Results under one attack, after those without.

        What breaks without an attack is not robust, wherever the attack happened to lead.
        """
        row = _FIRST_ATTACK + self.attacks.index(name)
        self._table[row, index] = torch.minimum(correct.double().cpu(), self._table[_CLEAN, index])

    def state(self) -> Tensor:
        """Everything, as one tensor of doubles to be summed over processes."""
        ids = torch.tensor([(self._ids >> shift) & 0xFFFF for shift in _SHIFTS], dtype=torch.float64)
        return torch.cat([self._table.flatten(), ids])

    def load(self, state: Tensor) -> None:
        """Take over the sum of several states."""
        state = state.cpu()
        self._table = state[: -len(_SHIFTS)].view_as(self._table)
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

    def accuracies(self) -> dict[str, float]:
        """Means over the samples: ``clean_accuracy``, ``accuracy`` (the worst case of each), ``accuracy_{attack}``."""
        rows = {f"accuracy_{name}": self.correct(name) for name in self.attacks}
        worst = torch.stack(list(rows.values())).amin(0)
        means = {"clean_accuracy": self.correct(), "accuracy": worst, **rows}
        return {name: float(right.sum() / self.n) for name, right in means.items()}


def _fingerprint(index: int, x: Tensor) -> int:
    """48 bits of what sample number ``index`` holds, to be summed over samples in any order."""
    content = x.detach().float().cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=6, key=str(index).encode()).digest(), "little")
