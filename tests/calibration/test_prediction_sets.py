"""Prediction sets: they hold the right class as often as promised, whatever the model, and no class too many."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_robust.calibration.prediction_sets import PredictionSets, SetSums, fit_prediction_sets
from lightning_robust.randomness import RandomState, priorities, seeded

METHODS = ["lac", "aps"]
ROW = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()


def wrong_model(n: int, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Over-confident log-probabilities: coverage must not depend on their being right."""
    z = torch.randn(n, classes, generator=seeded(seed), dtype=torch.float64)
    labels = torch.multinomial(z.softmax(1), 1, generator=seeded(seed, 1))[:, 0]
    return (3 * z).log_softmax(1), labels


def by_hand(log_p: Tensor, method: str, u: Tensor) -> np.ndarray:
    """The score of each class, by loops over what the papers say."""
    p = log_p.exp().numpy()
    scores = np.empty_like(p)
    for i, row in enumerate(p):
        order = sorted(range(len(row)), key=lambda k: (-row[k], k))
        for rank, k in enumerate(order):
            mass = sum(row[j] for j in order[:rank])
            scores[i, k] = -np.log(row[k]) if method == "lac" else mass + u[i] * row[k]
    return scores


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "alpha"), [(50, 0.1), (99, 0.1), (200, 0.25)])
def test_the_coverage_is_the_closed_form(method: str, n: int, alpha: float) -> None:
    repeats, rows = 200, 200
    coverages = []
    for repeat in range(repeats):
        log_p, y = wrong_model(n + rows, seed=repeat)
        sets = fit_prediction_sets(log_p[:n], y[:n], alpha=alpha, method=method, seed=repeat)
        coverages.append(sets.measured(log_p[n:], y[n:]).coverage)
    expected = math.ceil((n + 1) * (1 - alpha) - 1e-9) / (n + 1)
    # Coverage of one fit is Beta distributed; what 200 rows show of it is binomial.
    variance = expected * (1 - expected) * (1 / (n + 2) + 1 / rows)
    assert np.mean(coverages) == pytest.approx(expected, abs=3 * math.sqrt(variance / repeats))
    assert np.var(coverages) == pytest.approx(variance, rel=0.4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("randomized", [True, False])
def test_sets_and_threshold_are_those_of_brute_force(method: str, randomized: bool) -> None:
    log_p, y = wrong_model(60)
    sets = fit_prediction_sets(log_p, y, alpha=0.2, method=method, seed=3, randomized=randomized)
    u = priorities(torch.arange(60), 3) if randomized else torch.ones(60).double()
    right = np.sort(by_hand(log_p, method, u)[np.arange(60), y.numpy()])
    assert sets.threshold == pytest.approx(right[math.ceil(61 * 0.8) - 1], rel=1e-12)

    fresh = wrong_model(60, seed=1)[0]
    u = priorities(torch.arange(60), 4) if randomized else torch.ones(60).double()
    assert np.array_equal(sets(fresh, torch.arange(60)).numpy(), by_hand(fresh, method, u) <= sets.threshold)


@pytest.mark.parametrize(
    ("method", "threshold", "expected"),
    [
        ("lac", -math.log(0.6), [False, False, False, False]),
        ("lac", -math.log(0.4), [True, False, False, False]),
        ("lac", -math.log(0.1), [True, True, True, False]),
        ("aps", 0.4, [False, False, False, False]),
        ("aps", 0.5 + 1e-9, [True, False, False, False]),
        ("aps", 0.94, [True, True, False, False]),
        ("aps", 0.96, [True, True, True, False]),
        ("aps", 1.0, [True, True, True, True]),
    ],
)
def test_one_row_can_be_checked_by_thinking(method: str, threshold: float, expected: list[bool]) -> None:
    assert PredictionSets(method, 0.1, threshold, 99, randomized=False)(ROW).tolist() == [expected]


def test_the_random_number_is_a_share_of_the_classes_own_probability() -> None:
    # At 0.65 the second class is in if 0.5 + 0.3 u <= 0.65: for half of all rows.
    sets = PredictionSets("aps", 0.1, 0.65, 99)(ROW.expand(20_000, 4), torch.arange(20_000))
    assert sets.double().mean(0).tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=0.015)


def test_without_random_numbers_the_coverage_is_the_same_and_sets_are_larger() -> None:
    log_p, y = wrong_model(20_000)
    random, plain = (
        fit_prediction_sets(log_p[:5000], y[:5000], method="aps", randomized=randomized).measured(
            log_p[5000:], y[5000:]
        )
        for randomized in (True, False)
    )
    assert random.coverage == pytest.approx(0.9, abs=0.02)
    assert plain.coverage == pytest.approx(0.9, abs=0.02)
    assert plain.mean_size > random.mean_size


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("n", "alpha", "everything"), [(8, 0.1, True), (9, 0.1, False), (98, 0.01, True), (99, 0.01, False)]
)
def test_too_few_rows_for_a_promise_give_all_classes(method: str, n: int, alpha: float, everything: bool) -> None:
    log_p, y = wrong_model(n)
    sets = fit_prediction_sets(log_p, y, alpha=alpha, method=method)
    assert sets.everything is everything
    assert bool(sets(log_p).all()) or not everything
    assert PredictionSets.load(json.loads(json.dumps(sets.to_dict()))) == sets


@pytest.mark.parametrize(("n", "alpha"), [(9, 0.1), (29, 0.1), (69, 0.1), (99, 0.7), (999, 0.05), (19, 0.15)])
def test_the_rank_is_not_spoilt_by_round_off(n: int, alpha: float) -> None:
    p = torch.linspace(0.9, 0.5, n, dtype=torch.float64)
    log_p = torch.stack([p, 1 - p], 1).log()
    sets = fit_prediction_sets(log_p, torch.zeros(n, dtype=torch.long), alpha=alpha)
    rank = -(-(n + 1) * (100 - round(100 * alpha)) // 100)  # in whole numbers, rounded up
    assert math.exp(-sets.threshold) == pytest.approx(float(p[rank - 1]), rel=1e-12)


def test_ties_at_the_threshold_are_all_within() -> None:
    log_p = torch.tensor([[0.7, 0.3]]).log().expand(99, 2)
    y = (torch.arange(99) < 20).long()
    sets = fit_prediction_sets(log_p, y, alpha=0.1)
    assert sets(log_p).all()
    assert fit_prediction_sets(log_p, y, alpha=0.3)(log_p)[0].tolist() == [True, False]


@pytest.mark.parametrize("randomized", [True, False])
def test_equally_likely_classes_are_taken_one_after_the_other(randomized: bool) -> None:
    even = torch.full((4000, 4), 0.25, dtype=torch.float64).log()
    y = torch.randint(4, (4000,), generator=seeded(0))
    sets = fit_prediction_sets(even, y, alpha=0.3, method="aps", randomized=randomized)
    sizes = sets.measured(even, y, torch.arange(4000))
    assert sizes.mean_size == pytest.approx(2.8 if randomized else 3.0, abs=0.1)
    assert sizes.coverage >= 0.68


def test_two_classes_and_a_perfect_model() -> None:
    p = torch.rand(20_000, generator=seeded(0), dtype=torch.float64)
    log_p, y = torch.stack([1 - p, p], 1).log(), (torch.rand(20_000, generator=seeded(1)) < p).long()
    found = fit_prediction_sets(log_p[:10_000], y[:10_000], alpha=0.25).measured(log_p[10_000:], y[10_000:])
    # The right class has a density of 2 p at p, so that p >= 1/2 covers 3/4: one class in each set.
    assert found.coverage == pytest.approx(0.75, abs=0.02)
    assert found.mean_size == pytest.approx(1.0, abs=0.03)


def test_the_sets_of_lac_are_the_smaller_ones() -> None:
    z = 2 * torch.randn(20_000, 10, generator=seeded(0))
    y = torch.multinomial(z.softmax(1), 1, generator=seeded(1))[:, 0]
    log_p = z.log_softmax(1)
    lac, aps = (
        fit_prediction_sets(log_p[:5000], y[:5000], method=method).measured(log_p[5000:], y[5000:])
        for method in METHODS
    )
    assert lac.mean_size < aps.mean_size
    assert lac.coverage == pytest.approx(0.9, abs=0.02)
    assert aps.coverage == pytest.approx(0.9, abs=0.02)


def test_coverage_is_counted_for_each_class() -> None:
    log_p = torch.tensor([[0.7, 0.2, 0.1]]).log().expand(6, 3)
    sums = PredictionSets("lac", 0.1, -math.log(0.15), 99).measured(log_p, torch.tensor([0, 0, 0, 1, 2, 2]))
    assert (sums.counts.tolist(), sums.covered.tolist()) == ([3, 1, 2], [3, 1, 0])
    assert (sums.n, sums.size, sums.empty, sums.invalid) == (6, 12, 0, 0)
    assert sums.coverage == pytest.approx(4 / 6)
    assert sums.worst_class == (2, 0.0)
    assert sums.measures()["mean_size"] == 2.0


def test_batches_add_up_to_the_whole() -> None:
    log_p, y = wrong_model(500)
    sets, sample = fit_prediction_sets(log_p, y, method="aps"), torch.arange(500)
    whole = sets.measured(log_p, y, sample)
    parts = [sets.measured(log_p[i], y[i], i) for i in torch.randperm(500, generator=seeded(2)).split(33)]
    assert torch.equal(sum(parts[1:], parts[0]).state(), whole.state())
    assert torch.equal(SetSums.load(torch.stack([part.state() for part in parts]).sum(0)).state(), whole.state())


def test_a_class_without_rows_is_not_the_worst() -> None:
    assert SetSums(torch.tensor([0, 4]), torch.tensor([0, 3]), 4, 0, 0).worst_class == (1, 0.75)
    nothing = SetSums.load(torch.zeros(7))
    assert (nothing.n, nothing.worst_class[0]) == (0, -1)
    assert all(math.isnan(value) for value in nothing.measures().values())


def test_a_row_of_which_nothing_is_known_may_be_anything() -> None:
    log_p, y = wrong_model(100)
    for method in METHODS:
        sets = fit_prediction_sets(log_p, y, method=method)
        dirty = log_p[:3].clone()
        dirty[1, 2] = math.nan
        assert sets(dirty)[1].all()
        found = sets.measured(dirty, y[:3])
        assert (found.n, found.invalid) == (2, 1)


def test_rows_without_a_finite_loss_are_left_out_of_the_fit() -> None:
    log_p, y = wrong_model(200)
    dirty, kept = log_p.clone(), torch.arange(200) != 5
    dirty[5, 1] = math.nan
    for method in METHODS:
        with pytest.warns(UserWarning, match="1 of 200 rows"):
            sets = fit_prediction_sets(dirty, y, method=method)
        numbered = torch.arange(200)[kept]
        assert sets == fit_prediction_sets(log_p[kept], y[kept], method=method, sample=numbered)


def test_random_numbers_depend_on_the_sample_and_on_nothing_else() -> None:
    log_p, y = wrong_model(300)
    sample, order = torch.arange(300), torch.randperm(300, generator=seeded(1))
    state = RandomState.capture()
    sets = fit_prediction_sets(log_p, y, method="aps", sample=sample)
    assert fit_prediction_sets(log_p[order], y[order], method="aps", sample=sample[order]) == sets
    assert torch.equal(sets(log_p[order], sample[order]), sets(log_p, sample)[order])
    assert state.is_current()
    other = replace(sets, seed=1)
    assert not torch.equal(other(log_p, sample), sets(log_p, sample))


def shards(log_p: Tensor, y: Tensor, *cuts: int, **settings: Any) -> list[PredictionSets]:
    """Fit in one thread for each shard; ``reduce`` adds what all of them hand in."""
    sample = torch.arange(len(y))
    parts = list(zip(log_p.tensor_split(cuts), y.tensor_split(cuts), sample.tensor_split(cuts), strict=True))
    barrier, given = Barrier(len(parts), timeout=20), [torch.empty(0)] * len(parts)

    def run(rank: int) -> PredictionSets:
        def reduce(sums: Tensor) -> Tensor:
            given[rank] = sums
            barrier.wait()
            total = torch.stack(given).sum(0)
            barrier.wait()
            return total

        rows, labels, numbers = parts[rank]
        return fit_prediction_sets(rows, labels, sample=numbers, reduce=reduce, **settings)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5])
def test_processes_together_have_a_threshold_a_hair_above_that_of_one(method: str, scale: float, alpha: float) -> None:
    log_p, y = wrong_model(2000)
    log_p = (scale * log_p).log_softmax(1)
    found = shards(log_p, y, 700, 700, method=method, alpha=alpha)  # three, the second without rows
    one = fit_prediction_sets(log_p, y, method=method, alpha=alpha)
    assert found[0] == found[1] == found[2]
    # A cell is 2**-16 wide in s, or in s / (1 + s).
    width = 2**-16 * (1 if method == "aps" else (1 + one.threshold) ** 2 * 1.01)
    assert one.threshold <= found[0].threshold <= one.threshold + width
    assert found[0].samples == 2000


def test_processes_with_too_few_rows_agree_on_all_classes() -> None:
    assert all(sets.everything for sets in shards(*wrong_model(8), 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_is_raised_first(dtype: torch.dtype) -> None:
    log_p, y = wrong_model(300)
    low = log_p.to(dtype)
    for method in METHODS:
        sets = fit_prediction_sets(low, y, method=method)
        assert sets == fit_prediction_sets(low.float(), y, method=method)
        assert torch.equal(sets(low), sets(low.float()))


def test_misuse_is_named() -> None:
    log_p, y = wrong_model(10)
    with pytest.raises(ValueError, match="out of lac, aps; got 'raps'"):
        fit_prediction_sets(log_p, y, method="raps")
    with pytest.raises(ValueError, match="alpha=1"):
        fit_prediction_sets(log_p, y, alpha=1)
    with pytest.raises(ValueError, match=r"sample= \(R,\) for 10 rows, got \(9,\)"):
        fit_prediction_sets(log_p, y, sample=torch.arange(9))
    with pytest.raises(ValueError, match="rows with a finite loss"):
        fit_prediction_sets(log_p[:0], y[:0])
    with pytest.raises(ValueError, match="a state of 2 K"):
        SetSums.load(torch.zeros(4))
    with pytest.raises(ValueError, match=r"targets in \[0, 5\)"):
        fit_prediction_sets(log_p, y).measured(log_p, y + 3)


def test_sets_of_inputs_that_come_one_by_one_are_those_of_a_batch() -> None:
    log_p = torch.randn(400, 5, generator=torch.Generator().manual_seed(3)).log_softmax(1)
    labels = torch.distributions.Categorical(logits=log_p).sample()
    fitted = fit_prediction_sets(log_p[:200], labels[:200], alpha=0.2, method="aps", sample=torch.arange(200))
    at_once = fitted(log_p[200:])
    assert torch.equal(at_once, torch.cat([fitted(row[None]) for row in log_p[200:]]))
    assert torch.equal(at_once.flip(0), fitted(log_p[200:].flip(0)))
    # What is drawn is uniform: coverage is what it is for numbers that count up.
    counted = fitted(log_p[200:], sample=torch.arange(200))
    shares = [float(sets.gather(1, labels[200:, None]).double().mean()) for sets in (at_once, counted)]
    assert abs(shares[0] - shares[1]) < 4 * (0.8 * 0.2 / 200) ** 0.5
