"""Random numbers that belong to us, and the user's streams put back where they were."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Noise", "RandomState", "normal", "priorities", "reseed", "seeded", "uniform", "untouched_random_state"]

Noise = torch.Generator | Sequence[torch.Generator] | None
"""One generator for a batch, or one per sample (noise then does not depend on how samples are batched)."""


def seeded(*keys: int) -> torch.Generator:
    """A CPU generator that is a function of ``keys`` alone, e.g. ``(seed, rank, step)``.

    Neighbouring keys give unrelated streams, and results are the same on every device. Keys of numpy or torch are the
    whole numbers that they stand for.

    Example:
        >>> torch.equal(torch.rand(3, generator=seeded(0, 1)), torch.rand(3, generator=seeded(0, 1)))
        True
        >>> torch.equal(torch.rand(3, generator=seeded(0, 1)), torch.rand(3, generator=seeded(1, 0)))
        False
    """
    digest = hashlib.blake2b(repr(tuple(int(key) for key in keys)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def priorities(keys: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) for each integer key ``(N,)``, a function of (seed, key) alone; doubles on the CPU.

    Whoever keeps the smallest ones draws a random sample that depends neither on order nor on who holds which keys.

    Example:
        >>> a = priorities(torch.arange(5), seed=0)
        >>> torch.equal(a.flip(0), priorities(torch.arange(5).flip(0), seed=0))
        True

    References:
        The mixing function is SplitMix64 (Steele, Lea and Flood, 2014, https://doi.org/10.1145/2660193.2660195).
    """
    digest = hashlib.blake2b(repr(int(seed)).encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        z = keys.cpu().numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = z + np.frombuffer(digest, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) / 2**53)


def uniform(like: Tensor, noise: Noise = None) -> Tensor:
    """Uniform numbers in ``[0, 1)`` shaped like ``like``."""
    return _draw(torch.rand, like, noise)


def normal(like: Tensor, noise: Noise = None) -> Tensor:
    """Standard normal numbers shaped like ``like``."""
    return _draw(torch.randn, like, noise)


def _draw(function: Any, like: Tensor, noise: Noise) -> Tensor:
    if isinstance(noise, Sequence):
        if len(noise) != len(like):
            raise ValueError(f"expected one generator per sample, got {len(noise)} for {len(like)} samples.")
        rows = [function(like.shape[1:], generator=g, dtype=like.dtype, device=g.device) for g in noise]
        return torch.stack(rows).to(like.device) if rows else torch.empty_like(like)
    device = like.device if noise is None else noise.device
    drawn: Tensor = function(like.shape, generator=noise, dtype=like.dtype, device=device)
    return drawn.to(like.device)


@dataclass(frozen=True)
class RandomState:
    """The global streams of torch, numpy and ``random`` at one moment."""

    cpu: Tensor
    cuda: list[Tensor]
    numpy: Any
    python: Any

    @classmethod
    def capture(cls) -> RandomState:
        """Remember all global streams."""
        # Asking an idle CUDA for its state would start it up.
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # torch has no types there
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())

    def is_current(self) -> bool:
        """Whether nothing was drawn since."""
        now: Any = np.random.get_state()
        return (
            torch.equal(self.cpu, torch.get_rng_state())
            and all(map(torch.equal, self.cuda, torch.cuda.get_rng_state_all() if self.cuda else []))
            and now[2:] == self.numpy[2:]
            and np.array_equal(now[1], self.numpy[1])
            and random.getstate() == self.python
        )

    def restore(self) -> None:
        """Put all global streams back."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def reseed(seed: int) -> None:
    """Seed all three global streams; to be used inside :func:`untouched_random_state` only."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def untouched_random_state() -> Iterator[RandomState]:
    """Whatever is drawn inside, the global streams go on afterwards as if nothing had happened."""
    state = RandomState.capture()
    try:
        yield state
    finally:
        state.restore()
