"""Groups of samples that a batch names: hospitals, cameras, speakers."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.batches import Key, as_path, get, shown

__all__ = ["Groups"]


class Groups:
    """Whole numbers for the groups of a batch, and the names that they stand for.

    Args:
        key: Where in the batch the groups are: integers ``(N,)``, or a list of strings.

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
            return torch.tensor([self._code(name) for name in found])
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
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            everybody: list[dict[int, str]] = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(everybody, self._names)
            for names in everybody:
                self._names |= names

    def _code(self, name: str) -> int:
        # A function of the name alone, so that all processes agree; small enough for a double to hold.
        code = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "little")
        self._names[code] = name
        return code
