"""Which samples were measured: a hash that does not depend on batches, order or processes."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["fingerprint", "joined", "split"]


def fingerprint(index: int, x: Tensor) -> int:
    """48 bits of what sample number ``index`` holds, to be summed over samples in any order."""
    content = x.detach().float().cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=6, key=str(index).encode()).digest(), "little")


def split(number: int) -> Tensor:
    """An integer as four doubles that can be summed exactly over processes."""
    return torch.tensor([(number >> shift) & 0xFFFF for shift in (0, 16, 32, 48)], dtype=torch.float64)


def joined(parts: Tensor) -> int:
    """The inverse of :func:`split`, also for sums."""
    return sum(int(part) << shift for part, shift in zip(parts.tolist(), (0, 16, 32, 48), strict=True)) % 2**64
