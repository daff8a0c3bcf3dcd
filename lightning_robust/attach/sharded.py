"""Modules whose weights lie in pieces on all processes: every forward is one that all processes run together.

A process that leaves one out (it holds no sample that counts) would have the others wait for ever.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["NOBODY", "is_sharded", "takes_part"]

NOBODY = 2**62
"""Number of a sample that counts nowhere: of a forward that is run only because the others run one."""

_KINDS = {"FSDPModule", "FullyShardedDataParallel"}  # by name: not every torch has both


def is_sharded(module: nn.Module | None) -> bool:
    """Whether a part of the module is sharded (``fully_shard``, or FSDP's wrapper).

    Example:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    parts = () if module is None else module.modules()
    return any(kind.__name__ in _KINDS for part in parts for kind in type(part).__mro__)


def takes_part(trainer: Any, module: nn.Module, index: Tensor, keep: Tensor, limit: int) -> bool:
    """Whether this process reads an evaluation batch: if a sample counts, or if one of another process might.

    Args:
        trainer: Knows which process this is, and of how many.
        module: The module that is read.
        index: Number of each sample among those of all processes, ``(N,)``, dealt like cards.
        keep: Which of them count, ``(N,)``.
        limit: Samples from this number on do not count.
    """
    if trainer.world_size == 1 or not is_sharded(module):
        return bool(keep.any())
    return bool(index[0] - trainer.global_rank < limit)  # the first of the first process: all come to one answer
