"""Predictions kept for a fit: how many, which, and the same ones however they come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from scipy.stats import binom, kstest
from torch import Tensor

from lightning_robust.metrics import Reservoir
from lightning_robust.randomness import priorities


def offered(n: int, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(n, classes, generator=generator).log_softmax(1)
    return log_p, torch.arange(n) % classes, torch.arange(n)


def filled(rows: tuple[Tensor, ...], sizes: int | Sequence[int], capacity: int, seed: int = 0) -> Reservoir:
    kept = Reservoir(capacity, seed)
    for part in zip(*(column.split(sizes) for column in rows), strict=True):
        kept.add(*part)
    return kept


def in_order(rows: Sequence[Tensor]) -> list[Tensor]:
    order = rows[2].argsort(stable=True)
    return [column[order] for column in rows]


def test_below_its_capacity_it_keeps_everything_as_it_came() -> None:
    rows = offered(10)
    for capacity in (10, 11, 1000):
        assert all(map(torch.equal, filled(rows, 3, capacity).rows(), rows))


@pytest.mark.parametrize("capacity", [1, 2, 99, 100])
def test_it_keeps_those_with_the_smallest_priority(capacity: int) -> None:
    rows = offered(101)
    kept = in_order(filled(rows, 7, capacity, seed=5).rows())
    # Of a sample with one prediction the key is its number, shifted.
    smallest = priorities(rows[2] << 24, 5).argsort()[:capacity].sort().values
    assert all(torch.equal(column, whole[smallest]) for column, whole in zip(kept, rows, strict=True))


@pytest.mark.parametrize("sizes", [1, 4, 50, 1000, [999, 1], [1, 499, 500]])
def test_batches_mean_nothing(sizes: Any) -> None:
    rows = offered(1000)
    whole, parts = (in_order(filled(rows, s, 40).rows()) for s in (1000, sizes))
    assert all(map(torch.equal, whole, parts))


def test_the_order_of_samples_means_nothing() -> None:
    rows = offered(300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    shuffled = filled(tuple(column[order] for column in rows), 9, 40)
    assert all(map(torch.equal, in_order(filled(rows, 9, 40).rows()), in_order(shuffled.rows())))


def test_another_seed_keeps_others() -> None:
    rows = offered(1000)
    first, other = (set(filled(rows, 100, 100, seed).rows()[2].tolist()) for seed in (0, 1))
    # By chance a tenth of them are in both.
    assert binom.cdf(len(first & other), 100, 0.1) == pytest.approx(0.5, abs=0.499)


def test_what_is_kept_is_spread_evenly() -> None:
    kept = filled(offered(20_000), 128, 2000).rows()[2]
    assert kstest(kept.double().numpy() / 20_000, "uniform").pvalue > 1e-3


def test_pixels_of_one_picture_are_chosen_by_themselves() -> None:
    """Four pictures of 500 predictions: some of each are kept, none of them twice."""
    log_p, labels, _ = offered(2000)
    rows = log_p, labels, torch.arange(4).repeat_interleave(500)
    for sizes in ([500] * 4, [1000, 1000], [2000]):
        kept = filled(rows, sizes, 200).rows()
        assert len({tuple(row) for row in kept[0].tolist()}) == 200
        counts = kept[2].bincount(minlength=4)
        assert counts.sum() == 200
        assert counts.min() >= binom.ppf(1e-4, 200, 0.25)
        keys = (rows[2] << 24) + torch.arange(500).repeat(4)
        smallest = priorities(keys, 0).argsort()[:200].sort().values
        assert sorted(map(tuple, kept[0].tolist())) == sorted(map(tuple, log_p[smallest].tolist()))


@pytest.mark.parametrize("size", [1, 30, 400])
def test_memory_is_bounded_by_a_tenth_more_than_the_capacity(size: int) -> None:
    kept, rows = Reservoir(50), offered(4_000)
    for part in zip(*(column.split(size) for column in rows), strict=True):
        kept.add(*part)
        assert sum(len(held[1]) for held in kept._parts) <= 55
    assert kept.offered == 4_000
    assert len(kept.rows()[1]) == 50


def test_only_what_is_kept_is_copied_to_the_cpu() -> None:
    copied: list[int] = []

    class OnDevice(Tensor):
        def cpu(self, *args: Any, **kwargs: Any) -> Any:
            copied.append(len(self))
            return self.as_subclass(Tensor)

    log_p, labels, sample = offered(1000)
    kept = Reservoir(20)
    kept.add(log_p.as_subclass(OnDevice), labels, sample)  # type: ignore[arg-type]  # a tensor
    assert copied == [20]


def test_with_very_many_classes_fewer_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{Reservoir.__module__}.LARGEST", 120)
    rows = offered(101)  # of 3 classes
    kept = in_order(filled(rows, 7, 100).rows())
    assert all(map(torch.equal, kept, in_order(filled(rows, 101, 40).rows())))
    assert len(filled(rows, 7, 39).rows()[1]) == 39


def test_what_is_kept_is_float32_on_the_cpu_without_a_graph() -> None:
    log_p, labels, sample = offered(5)
    kept = Reservoir(3)
    kept.add(log_p.to(torch.bfloat16).requires_grad_(), labels.int(), sample)
    found, found_labels, _ = kept.rows()
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert found_labels.tolist() == labels[kept.rows()[2]].tolist()


def test_nothing_offered_is_nothing_kept() -> None:
    kept = Reservoir(3)
    kept.add(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert [len(column) for column in kept.rows()] == [0, 0, 0]
    assert kept.rows()[0].ndim == 2


def test_reading_twice_and_going_on_afterwards_is_allowed() -> None:
    rows = offered(300)
    kept, early = Reservoir(40), tuple(column[:150] for column in rows)
    kept.add(*early)
    assert all(map(torch.equal, kept.rows(), kept.rows()))
    kept.add(*(column[150:] for column in rows))
    assert all(map(torch.equal, in_order(kept.rows()), in_order(filled(rows, 300, 40).rows())))


def test_a_reservoir_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prediction, got capacity 0"):
        Reservoir(0)


# -- several processes -----------------------------------------------------------------------------------------------


def together(reservoirs: Sequence[Reservoir]) -> list[tuple[Tensor, ...]]:
    """``rows`` in every one of several processes at once, played by threads that add up their tensors."""
    world = len(reservoirs)
    barrier, box, found = threading.Barrier(world), [torch.zeros(0)] * world, [()] * world

    def summed_by(rank: int) -> Callable[[Tensor], Tensor]:
        def summed(state: Tensor) -> Tensor:
            box[rank] = state.clone()
            barrier.wait(5)
            total = torch.stack(box).sum(0)
            barrier.wait(5)
            return total

        return summed

    def run(rank: int) -> None:
        found[rank] = reservoirs[rank].rows(summed_by(rank), rank, world)  # type: ignore[call-overload]  # a tuple

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found  # type: ignore[return-value]  # filled by the threads


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("capacity", [1, 40, 100, 101, 500])
def test_several_processes_keep_what_one_keeps(world: int, capacity: int) -> None:
    rows = offered(101)
    dealt = [filled(tuple(column[rank::world] for column in rows), 8, capacity) for rank in range(world)]
    found = in_order([torch.cat(column) for column in zip(*together(dealt), strict=True)])
    assert all(map(torch.equal, found, in_order(filled(rows, 101, capacity).rows())))


def test_a_process_without_samples_takes_part() -> None:
    rows = offered(101)
    found = together([filled(rows, 8, 40), Reservoir(40)])
    assert all(map(torch.equal, in_order(found[0]), in_order(filled(rows, 101, 40).rows())))
    assert len(found[1][1]) == 0


def test_several_processes_agree_on_how_few_are_kept_of_very_many_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = offered(101)
    expected = in_order(filled(rows, 101, 40).rows())
    monkeypatch.setattr(f"{Reservoir.__module__}.LARGEST", 120)
    found = together([filled(rows, 8, 100), Reservoir(100)])
    assert all(map(torch.equal, in_order(found[0]), expected))
