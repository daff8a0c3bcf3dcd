"""Groups of samples that a batch names: hospitals, cameras, speakers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.batches import Key, as_path, get, shown

__all__ = ["GroupSums", "Groups", "parts"]


class Groups:
    """Whole numbers for the groups of a batch, and the names that they stand for.

    Args:
        key: Where in the batch the groups are: integers ``(N,)``, or a list of integers or strings.

    Example:
        >>> groups = Groups("site")
        >>> codes = groups.codes({"site": ["a", "b", "a"]}, 3)
        >>> [groups.name(code) for code in codes.tolist()]
        ['a', 'b', 'a']
    """

    def __init__(self, key: Key) -> None:
        self.path = as_path(key)
        self._names: dict[int, str] = {}

    def codes(self, batch: Any, n: int) -> Tensor:
        """A number for the group of each of ``n`` samples, ``(n,)``.

        Raises:
            ValueError: If the batch has no group for each sample there.
        """
        found = get(batch, self.path)
        if isinstance(found, Tensor) and found.shape == (n,) and not found.is_floating_point():
            return found.long().cpu()
        if isinstance(found, (list, tuple)) and len(found) == n and all(isinstance(name, str) for name in found):
            return torch.tensor([self._code(name) for name in found], dtype=torch.long)
        if isinstance(found, (list, tuple)) and len(found) == n and all(isinstance(code, int) for code in found):
            return torch.tensor(found, dtype=torch.long)
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"group_key= must lead to a whole number or a string for each of {n} samples, got {what} at "
            f"{shown(self.path)}."
        )

    def name(self, code: int) -> str:
        """What a number stands for."""
        return self._names.get(code, str(code))

    def share(self, trainer: Any) -> None:
        """Learn the names that other processes have seen; to be called by all of them."""
        for names in _everyones(trainer, self._names):
            self._names |= names

    def _code(self, name: str) -> int:
        name = str(name)  # numpy's strings are not plain ones, and files that hold them are not loaded unasked
        # A function of the name alone, so that all processes agree; small enough for a double to hold.
        code = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "little")
        self._names[code] = name
        return code


class GroupSums:
    """Sums of fixed size for each group, over all processes.

    Args:
        groups: What the numbers of groups stand for.
        size: How many doubles a group's state has.

    Example:
        >>> sums = GroupSums(Groups("site"), 2)
        >>> sums.add(7, torch.tensor([1.0, 2.0])), sums.add(7, torch.tensor([1.0, 0.0]))
        (None, None)
        >>> sums.states
        {7: tensor([2., 2.], dtype=torch.float64)}
    """

    def __init__(self, groups: Groups, size: int) -> None:
        self.groups, self.size = groups, size
        self.states: dict[int, Tensor] = {}

    def add(self, code: int, state: Tensor) -> None:
        """Add to the sums of a group."""
        self.states[code] = self.states.get(code, torch.zeros(self.size, dtype=torch.float64)) + state.cpu().double()

    def everyones(self, trainer: Any, summed: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The sums of all processes by name of the group; to be called by all of them."""
        self.groups.share(trainer)
        codes = sorted({code for codes in _everyones(trainer, list(self.states)) for code in codes})
        if not codes:
            return {}
        none = torch.zeros(self.size, dtype=torch.float64)
        table = summed(torch.stack([self.states.get(code, none) for code in codes]))
        return {self.groups.name(code): state for code, state in zip(codes, table, strict=True)}


def parts(codes: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each group that occurs, and which rows are of it.

    Example:
        >>> [(code, rows.tolist()) for code, rows in parts(torch.tensor([4, 2, 4]))]
        [(2, [False, True, False]), (4, [True, False, True])]
    """
    for code in sorted(set(codes.tolist())):
        yield int(code), codes == code


def _everyones(trainer: Any, own: Any) -> list[Any]:
    """An object of each process."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return [own]
    everybody: list[Any] = [None for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(everybody, own)
    return everybody
