"""Which forwards all processes have to run together; real sharded runs are in tests/processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.attach.loaders import own_batches
from lightning_robust.attach.sharded import NOBODY, is_sharded, takes_part


class FSDPModule:
    """As torch's: mixed into the class of whatever is sharded."""


class Sharded(FSDPModule, nn.Linear):
    pass


WHOLE, PARTLY = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), Sharded(2, 2))


def process(rank: int, module: nn.Module) -> SimpleNamespace:
    return SimpleNamespace(world_size=2, global_rank=rank, lightning_module=module)


def test_a_module_is_sharded_if_a_part_of_it_is() -> None:
    assert is_sharded(PARTLY)
    assert not is_sharded(WHOLE)


@pytest.mark.parametrize(("samples", "rounds"), [(5, 1), (10, 1), (11, 2), (20, 2)])
def test_processes_get_equally_many_batches_and_each_sample_counts_once(samples: int, rounds: int) -> None:
    loader = DataLoader(TensorDataset(torch.arange(samples)), 5)
    shares = [list(own_batches(process(rank, PARTLY), loader)) for rank in (0, 1)]
    assert [len(share) for share in shares] == [rounds, rounds]
    numbers = torch.cat([index for share in shares for _batch, index in share])
    assert sorted(numbers[numbers < NOBODY].tolist()) == list(range(samples))
    whole = [len(list(own_batches(process(rank, WHOLE), loader))) for rank in (0, 1)]
    assert sum(whole) == -(-samples // 5)


@pytest.mark.parametrize("limit", [1, 16, 17])
def test_who_holds_no_sample_that_counts_reads_where_others_may(limit: int) -> None:
    # Two batches of 8 for each of two processes: 0, 2, ... 14 and 1, 3, ... 15, then from 16 on.
    for first in (0, 16):
        answers = []
        for rank in (0, 1):
            index = first + torch.arange(8) * 2 + rank
            answers.append(takes_part(process(rank, PARTLY), PARTLY, index, index < limit, limit))
        assert answers == [first < limit] * 2
    assert not takes_part(process(1, WHOLE), WHOLE, torch.tensor([1, 3]), torch.tensor([False, False]), 1)
