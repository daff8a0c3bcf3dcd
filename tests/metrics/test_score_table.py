"""Scores by sample: any order, any number of processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_robust.metrics import ScoreTable

NAMES = ["energy", "msp"]
SCORES = {
    "energy": torch.randn(20, generator=torch.Generator().manual_seed(0)),
    "msp": -torch.rand(20, generator=torch.Generator().manual_seed(1)),
}


def table(rows: list[int], batch_size: int = 1, capacity: int = 32) -> ScoreTable:
    made = ScoreTable(NAMES, capacity)
    for batch in torch.tensor(rows).split(batch_size):
        made.add(batch, {name: values[batch] for name, values in SCORES.items()})
    return made


def same(one: ScoreTable, other: ScoreTable) -> bool:
    return one.n == other.n and all(torch.equal(one.of(name), other.of(name)) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_scores_come_back_in_the_order_of_their_indices(name: str) -> None:
    made = table([7, 2, 19, 5], batch_size=3)
    assert made.n == 4
    assert made.of(name).dtype == torch.float64
    assert torch.equal(made.of(name), SCORES[name][[2, 5, 7, 19]].double())


def test_order_and_batches_mean_nothing() -> None:
    everything = list(range(20))
    assert same(table(everything), table(everything[::-1], batch_size=8))


def test_two_processes_are_one_also_through_a_second_sum() -> None:
    summed = ScoreTable(NAMES, capacity=32)
    summed.load(table(list(range(0, 20, 2))).state() + table(list(range(1, 20, 2))).state())
    assert same(summed, table(list(range(20))))
    again = ScoreTable(NAMES, capacity=32)
    again.load(summed.state() + ScoreTable(NAMES, capacity=32).state())
    assert same(again, summed)


def test_a_sample_that_two_processes_saw_counts_once() -> None:
    # A distributed sampler repeats samples, so that all processes have equally many.
    summed = ScoreTable(NAMES, capacity=32)
    summed.load(table([0, 2, 4]).state() + table([1, 3, 0]).state())
    assert same(summed, table([0, 1, 2, 3, 4]))


def test_the_state_is_doubles_and_zero_where_nothing_was_seen() -> None:
    state = table([3], capacity=5).state().view(3, 5)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    expected[:, 3] = torch.tensor([1.0, SCORES["energy"][3], SCORES["msp"][3]], dtype=torch.float64)
    assert torch.equal(state, expected)


def test_a_sum_in_place_does_not_reach_the_table() -> None:
    made = table([3])
    made.state().add_(1)
    assert same(made, table([3]))


def test_indices_from_the_capacity_on_are_passed_over() -> None:
    assert same(table([0, 9, 10, 19], batch_size=4, capacity=10), table([9, 0], capacity=10))
    assert table([12, 13], batch_size=2, capacity=10).n == 0


def test_double_precision_is_kept() -> None:
    made = ScoreTable(["s"], capacity=1)
    made.add(torch.tensor([0]), {"s": torch.tensor([1 / 3], dtype=torch.float64)})
    assert made.of("s").item() == 1 / 3


def test_a_score_without_samples_is_empty() -> None:
    assert ScoreTable(NAMES, capacity=4).of("msp").shape == (0,)


@pytest.mark.parametrize("given", [["energy"], ["energy", "msp", "entropy"], ["energy", "mps"]])
def test_other_scores_than_those_announced_are_an_error(given: list[str]) -> None:
    scores: dict[str, Tensor] = {name: torch.zeros(1) for name in given}
    with pytest.raises(ValueError, match=r"expected the scores \['energy', 'msp'\]"):
        ScoreTable(NAMES, capacity=4).add(torch.tensor([0]), scores)


def test_scores_of_another_number_of_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="'msp' of 2 samples"):
        ScoreTable(NAMES, capacity=4).add(torch.arange(2), {"energy": torch.zeros(2), "msp": torch.zeros(1)})
