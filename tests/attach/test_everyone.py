"""Sums over all processes, played by threads, of states that some do not have."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_robust.attach.everyone import Everyone


def together(work: Callable[[Everyone, int], Any], world: int) -> list[Any]:
    """What every process gets; one that is not called as often as the others breaks the barrier."""
    barrier, box, found = threading.Barrier(world), [torch.zeros(0)] * world, [None] * world

    def run(rank: int) -> None:
        def summed(state: Tensor) -> Tensor:
            box[rank] = state.clone()
            barrier.wait(5)
            total = torch.stack(box).sum(0)
            barrier.wait(5)
            return total

        found[rank] = work(Everyone(SimpleNamespace(world_size=world, global_rank=rank), summed), rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


@pytest.mark.parametrize("has", [(0, 1, 2), (1,), (0, 2)])
def test_who_has_no_state_gets_the_sum_of_the_others(has: Sequence[int]) -> None:
    states = {rank: torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64) * (rank + 1) for rank in has}
    found = together(lambda everyone, rank: everyone.of(states.get(rank)), 3)
    expected = sum(states.values())
    assert all(torch.equal(state, expected) for state in found)  # type: ignore[arg-type]  # a tensor


def test_where_nobody_has_a_state_nobody_gets_one() -> None:
    assert together(lambda everyone, rank: everyone.of(None), 2) == [None, None]


def test_integers_are_summed_one_by_one() -> None:
    assert together(lambda everyone, rank: everyone.total(rank, 2**52), 2) == [[1, 2**53], [1, 2**53]]


def test_alone_nothing_is_asked_of_others() -> None:
    def refuse(state: Tensor) -> Tensor:
        raise AssertionError

    alone = Everyone(SimpleNamespace(world_size=1, global_rank=0), refuse)
    state = torch.ones(3, dtype=torch.float64)
    assert alone.of(state) is state
    assert alone.of(None) is None
    assert alone.reduce is None
