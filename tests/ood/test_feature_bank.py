"""Features kept for a detector: how many, whose, and the same ones however they come."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from ood.processes_together import together
from scipy.stats import kstest
from torch import Tensor

from lightning_robust.ood.feature_bank import SLACK, FeatureBank
from lightning_robust.randomness import priorities

INDEX = torch.arange(1000)
FEATURES = torch.cat([INDEX[:, None].float(), torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))], 1)


def filled(index: Tensor, size: int, capacity: int, seed: int = 0) -> FeatureBank:
    bank = FeatureBank(capacity, seed)
    for part in index.split(size):
        bank.add(FEATURES[part], part)
    return bank


def test_below_its_capacity_it_keeps_everything_in_the_order_of_the_data() -> None:
    assert torch.equal(filled(INDEX.flip(0), 7, 1000).rows(), FEATURES)


@pytest.mark.parametrize("capacity", [1, 40, 999])
def test_it_keeps_those_with_the_smallest_priority(capacity: int) -> None:
    smallest = priorities(INDEX, 5).argsort()[:capacity].sort().values
    assert torch.equal(filled(INDEX, 64, capacity, seed=5).rows(), FEATURES[smallest])


@pytest.mark.parametrize("size", [1, 4, 50, 999])
def test_batches_and_the_order_of_samples_mean_nothing(size: int) -> None:
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(filled(shuffled, size, 40).rows(), filled(INDEX, 1000, 40).rows())


def test_another_seed_keeps_others() -> None:
    assert not torch.equal(filled(INDEX, 100, 40, seed=1).rows(), filled(INDEX, 100, 40).rows())


def test_what_is_kept_is_spread_evenly() -> None:
    kept = filled(INDEX, 128, 200).rows()[:, 0]
    assert kstest(kept.double().numpy() / 1000, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("size", [1, 30, 400])
def test_memory_is_bounded(size: int) -> None:
    bank = FeatureBank(50)
    for part in INDEX.split(size):
        bank.add(FEATURES[part], part)
        assert sum(map(len, bank._rows)) <= SLACK * 50


def test_what_is_kept_is_float32_without_a_graph() -> None:
    bank = FeatureBank(3)
    bank.add(FEATURES[:5].to(torch.bfloat16).requires_grad_(), INDEX[:5])
    assert bank.rows().dtype == torch.float32
    assert not bank.rows().requires_grad


def test_reading_twice_and_going_on_afterwards_is_allowed() -> None:
    bank = filled(INDEX[:500], 50, 40)
    assert torch.equal(bank.rows(), bank.rows())
    bank.add(FEATURES[500:], INDEX[500:])
    assert torch.equal(bank.rows(), filled(INDEX, 1000, 40).rows())


def test_nothing_offered_is_nothing_kept() -> None:
    bank = FeatureBank(3)
    bank.add(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long))
    assert bank.rows().shape == (0, 0)


def test_a_bank_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample, got capacity 0"):
        FeatureBank(0)


def test_negative_numbers_of_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="numbers of samples from 0, got -1"):
        FeatureBank(3).add(torch.zeros(2, 3), torch.tensor([0, -1]))


# -- several processes -----------------------------------------------------------------------------------------------


def reduced(parts: Sequence[Tensor], capacity: int) -> list[Tensor]:
    banks = [filled(part, 64, capacity) for part in parts]
    together([bank.reduce for bank in banks])
    return [bank.rows() for bank in banks]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("capacity", [1, 40, 999, 2000])
def test_each_of_several_processes_keeps_what_one_keeps(world: int, capacity: int) -> None:
    whole = filled(INDEX, 1000, capacity).rows()
    assert all(torch.equal(rows, whole) for rows in reduced([INDEX[rank::world] for rank in range(world)], capacity))


def test_a_process_without_samples_takes_part() -> None:
    whole = filled(INDEX, 1000, 40).rows()
    assert all(torch.equal(rows, whole) for rows in reduced([INDEX, INDEX[:0]], 40))
    assert [rows.shape for rows in reduced([INDEX[:0], INDEX[:0]], 40)] == [(0, 0), (0, 0)]


def test_a_sample_that_two_processes_have_counts_once() -> None:
    whole = filled(INDEX, 1000, 40).rows()
    assert all(torch.equal(rows, whole) for rows in reduced([INDEX, INDEX[:900]], 40))


def test_numbers_that_count_nothing_are_refused_by_all_processes_alike() -> None:
    banks = [FeatureBank(3), FeatureBank(3)]
    banks[0].add(FEATURES[:1], torch.tensor([2**40]))
    banks[1].add(FEATURES[1:2], torch.tensor([1]))
    with pytest.raises(ValueError, match="number the samples of the training set from 0"):
        together([bank.reduce for bank in banks])
