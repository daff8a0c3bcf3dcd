"""Counts of several scores: any order, any number of processes, always the same size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_robust.metrics import ScoreTable
from lightning_robust.metrics.streamed_table import StreamedTable
from lightning_robust.ood import separation, separation_streamed
from lightning_robust.ood.streaming import LEVELS, ordered_keys

NAMES = ["energy", "msp"]
SCORES = {
    "energy": torch.randn(200, generator=torch.Generator().manual_seed(0)),
    "msp": -torch.rand(200, generator=torch.Generator().manual_seed(1)),
}


def table(rows: Tensor, batch_size: int = 7) -> StreamedTable:
    made = StreamedTable(NAMES)
    for batch in rows.split(batch_size):
        made.add(batch, {name: values[batch] for name, values in SCORES.items()})
    return made


def same(one: StreamedTable, other: StreamedTable) -> bool:
    return one.n == other.n and all(torch.equal(one.of(name).counts, other.of(name).counts) for name in NAMES)


def test_each_score_is_counted_at_its_level() -> None:
    made = table(torch.arange(200))
    for name in NAMES:
        assert torch.equal(made.of(name).counts, torch.bincount(ordered_keys(SCORES[name]), minlength=LEVELS))


def test_order_and_batches_mean_nothing() -> None:
    assert same(table(torch.arange(200)), table(torch.arange(200).flip(0), batch_size=64))


def test_two_processes_are_one_also_through_a_second_sum() -> None:
    whole, summed = table(torch.arange(200)), StreamedTable(NAMES)
    summed.load(table(torch.arange(0, 200, 2)).state() + table(torch.arange(1, 200, 2)).state())
    assert same(summed, whole)
    again = StreamedTable(NAMES)
    again.load(summed.state() + StreamedTable(NAMES).state())
    assert same(again, whole)


def test_the_state_is_doubles_of_one_size_however_many_samples_came() -> None:
    for n in (0, 3, 200):
        state = table(torch.arange(n)).state()
        assert state.dtype == torch.float64
        assert state.shape == (2 * (LEVELS + 1),)
        assert float(state.sum()) == 2 * n


def test_what_is_not_finite_is_counted_apart_and_belongs_to_the_number_of_samples() -> None:
    made = StreamedTable(["s"])
    made.add(torch.arange(4), {"s": torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])})
    assert (made.n, made.of("s").n, made.of("s").invalid) == (4, 1, 3)


def test_doubles_beyond_single_precision_stay_finite() -> None:
    made = StreamedTable(["s"])
    made.add(torch.arange(2), {"s": torch.tensor([1e300, -1e300], dtype=torch.float64)})
    assert made.of("s").n == 2


def test_separation_is_that_of_kept_scores_up_to_ties() -> None:
    inside, outside = ScoreTable(["s"], 200), ScoreTable(["s"], 200)
    counted_in, counted_out = StreamedTable(["s"]), StreamedTable(["s"])
    index, s_in, s_out = torch.arange(200), {"s": SCORES["energy"]}, {"s": SCORES["energy"].flip(0) * 1.1 + 0.5}
    for tables, scores in (((inside, counted_in), s_in), ((outside, counted_out), s_out)):
        for each in tables:
            each.add(index, scores)
    exact = separation(inside.of("s"), outside.of("s"))["auroc"]
    assert separation_streamed(counted_in.of("s"), counted_out.of("s"))["auroc"] == pytest.approx(exact, abs=2e-4)


@pytest.mark.parametrize("given", [["energy"], ["energy", "msp", "entropy"], ["energy", "mps"]])
def test_other_scores_than_those_announced_are_an_error(given: list[str]) -> None:
    with pytest.raises(ValueError, match=r"expected the scores \['energy', 'msp'\]"):
        StreamedTable(NAMES).add(torch.tensor([0]), {name: torch.zeros(1) for name in given})


def test_scores_of_another_number_of_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="'msp' of 2 samples"):
        StreamedTable(NAMES).add(torch.arange(2), {"energy": torch.zeros(2), "msp": torch.zeros(1)})
