"""Scores in fixed memory: levels in order, measures next to the exact ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_robust.ood import MEASURES, StreamedScores, entropy, ordered_keys, separation, separation_streamed
from lightning_robust.randomness import seeded

SPECIAL = [-math.inf, -3.4e38, -5000.0, -4096.0, -1.0, -0.0625, -1e-3, -1e-38, -4e-39, 0.0]
ORDER = torch.tensor(SPECIAL + [-x for x in SPECIAL[-2::-1]])


def streamed(scores: Tensor, batch: int = 4096) -> StreamedScores:
    return sum(map(StreamedScores.of, scores.split(batch)), StreamedScores.zero())


def normal(n: int, mean: float, sd: float, seed: int) -> Tensor:
    return mean + sd * torch.randn(n, generator=seeded(seed))


def test_a_higher_score_has_a_higher_level() -> None:
    keys = ordered_keys(ORDER)
    assert keys.dtype == torch.int64
    assert bool((keys.diff() > 0).all())
    assert (int(keys.min()) >= 0, int(keys.max()) < 65536) == (True, True)


def test_levels_of_random_bits_are_in_order() -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=seeded(0)).int()
    scores = bits.view(torch.float32)
    scores = scores[~scores.isnan()].sort().values
    assert bool((ordered_keys(scores).diff() >= 0).all())


def test_zero_and_minus_zero_share_a_level_and_denormals_do_not_change_sides() -> None:
    least = 2.0**-149
    below, minus, zero, above = ordered_keys(torch.tensor([-least, -0.0, 0.0, least])).tolist()
    assert below < minus == zero <= above


def test_negative_scores_mirror_positive_ones() -> None:
    scores = normal(1000, 0, 10, seed=1).abs()
    assert torch.equal(ordered_keys(-scores), 65535 - ordered_keys(scores))


@pytest.mark.parametrize(
    ("low", "high", "width"), [(2.0**-7, 2.0**15, 2.0**-10), (2.0**-40, 2.0**-7, 2.0**-7), (2.0**40, 2.0**120, 2.0**-4)]
)
def test_a_level_is_as_wide_as_documented(low: float, high: float, width: float) -> None:
    scores = torch.logspace(math.log2(low) + 0.01, math.log2(high) - 0.01, 5000, base=2, dtype=torch.float64)
    apart, near = scores * (1 + 2.01 * width), scores * (1 + width / 100)
    assert bool((ordered_keys(apart) > ordered_keys(scores)).all())
    assert float((ordered_keys(near) == ordered_keys(scores)).double().mean()) > 0.97


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_have_the_levels_of_single(dtype: torch.dtype) -> None:
    scores = normal(500, 0, 3, seed=2).to(dtype)
    assert torch.equal(ordered_keys(scores), ordered_keys(scores.float()))


RANGES = {
    "around zero": (0.0, 1.0),
    "energies": (-10.0, 2.0),
    "squared distances": (300.0, 60.0),
    "large": (6000.0, 2000.0),
    "tiny": (0.0, 1e-4),
    "all above 17": (100.0, 20.0),
}


@pytest.mark.parametrize(("mean", "sd"), RANGES.values(), ids=RANGES)
def test_measures_are_next_to_the_exact_ones_whatever_the_range(mean: float, sd: float) -> None:
    s_in, s_out = normal(100_000, mean, sd, seed=3), normal(100_000, mean + sd, sd, seed=4)
    exact, found = separation(s_in, s_out), separation_streamed(streamed(s_in), streamed(s_out))
    assert found["auroc"] == pytest.approx(exact["auroc"], abs=1e-5)
    for key in MEASURES:
        assert found[key] == pytest.approx(exact[key], abs=2e-3)


@pytest.mark.parametrize(("mean", "sd"), [(1e9, 5e8), (0.0, 1e-9), (-3e11, 1e11)])
def test_measures_of_huge_and_of_minute_scores_are_good_to_half_a_percent(mean: float, sd: float) -> None:
    s_in, s_out = normal(100_000, mean, sd, seed=3), normal(100_000, mean + sd, sd, seed=4)
    exact, found = separation(s_in, s_out), separation_streamed(streamed(s_in), streamed(s_out))
    assert found["auroc"] == pytest.approx(exact["auroc"], abs=5e-5)
    for key in MEASURES:
        assert found[key] == pytest.approx(exact[key], abs=5e-3)


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-30, 40.0])
def test_a_constant_score_says_nothing(value: float) -> None:
    scores = streamed(torch.full((60,), value))
    found = separation_streamed(scores, scores)
    assert (found["auroc"], found["fpr95_ood_positive"], found["fpr95_id_positive"]) == (0.5, 1.0, 1.0)


def share_at_95(positive: np.ndarray, negative: np.ndarray) -> float:
    enough = next(t for t in sorted(positive.tolist(), reverse=True) if np.mean(positive >= t) >= 0.95)
    return float(np.mean(negative >= enough))


@pytest.mark.parametrize("seed", range(5))
def test_fifty_samples_have_the_rates_of_trying_every_threshold(seed: int) -> None:
    s_in, s_out = normal(50, 0, 1, 2 * seed + 10), normal(50, 1, 1, 2 * seed + 11)
    found = separation_streamed(streamed(s_in), streamed(s_out))
    assert found["fpr95_ood_positive"] == share_at_95(s_out.numpy(), s_in.numpy())
    assert found["fpr95_id_positive"] == share_at_95(-s_in.numpy(), -s_out.numpy())


def test_scores_that_are_levels_lose_nothing() -> None:
    s_in, s_out = normal(3000, -8, 2, 5).round(), normal(2000, -6, 2, 6).round()
    assert separation_streamed(streamed(s_in), streamed(s_out)) == separation(s_in, s_out)


def test_entropies_in_batches_of_8_are_those_in_one_go() -> None:
    logits = 3 * torch.randn(1000, 10, generator=seeded(0))
    parts = sum((StreamedScores.of(entropy(z)) for z in logits.split(8)), StreamedScores.zero())
    assert torch.equal(parts.state(), StreamedScores.of(entropy(logits)).state())


def test_order_batches_and_processes_mean_nothing() -> None:
    scores = normal(1000, 0, 5, seed=7)
    whole = streamed(scores).state()
    assert torch.equal(streamed(scores.flip(0), batch=7).state(), whole)
    first, second = streamed(scores[:300]), streamed(scores[300:])
    summed = StreamedScores.load(first.state() + second.state())
    assert torch.equal(summed.state(), whole)
    assert summed.n == 1000


def test_the_state_is_half_a_mebibyte_of_doubles_and_a_copy() -> None:
    scores = streamed(normal(10, 0, 1, 8))
    state = scores.state()
    assert (state.dtype, state.shape) == (torch.float64, (65537,))
    loaded = StreamedScores.load(state)
    state.add_(1)
    assert loaded.n == scores.n == 10
    assert scores.counts.dtype == loaded.counts.dtype == torch.int64
    assert scores.counts.numel() * 8 == 2**19


def test_nan_and_infinite_scores_are_counted_apart() -> None:
    scores = streamed(torch.tensor([1.0, math.nan, math.inf, -math.inf, 2.0]))
    assert (scores.n, scores.invalid) == (2, 3)
    assert StreamedScores.load(scores.state()).invalid == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_scores_of_any_precision_are_counted(dtype: torch.dtype) -> None:
    scores = StreamedScores.of(torch.tensor([1, -2, 3], dtype=dtype))
    assert torch.equal(scores.counts, StreamedScores.of(torch.tensor([1.0, -2.0, 3.0])).counts)


def test_a_double_beyond_every_float32_is_no_infinity() -> None:
    scores = streamed(torch.tensor([1e300, -1e300], dtype=torch.float64))
    assert (scores.n, scores.invalid) == (2, 0)


@pytest.mark.parametrize(("mean", "sd"), [(0.0, 1.0), (-10.0, 2.0), (-1000.0, 300.0)])
@pytest.mark.parametrize("q", [0.05, 0.5, 0.95, 1.0])
def test_a_quantile_has_the_share_at_it_or_below(mean: float, sd: float, q: float) -> None:
    scores = normal(10_000, mean, sd, seed=9)
    found = streamed(scores).quantile(q)
    exact = float(np.quantile(scores.numpy(), q, method="inverted_cdf"))
    assert float((scores <= found).double().mean()) >= q
    assert exact <= found <= exact + abs(exact) / 500 + 1e-3


def test_nineteen_of_twenty_are_95_percent_and_a_negative_power_of_two_is_its_own_edge() -> None:
    assert streamed(torch.tensor([-2.0] * 19 + [5.0])).quantile(0.95) == -2.0
    assert streamed(torch.cat([torch.full((57,), 1.0), torch.full((3,), 9.0)])).quantile(0.95) < 2  # 57 of 60


def test_the_quantile_of_no_share_is_the_lowest_level() -> None:
    assert 1.0 <= streamed(torch.tensor([1.0, 5.0, 9.0])).quantile(0) < 1.01


def test_a_quantile_of_nothing_is_nan_and_one_beyond_1_an_error() -> None:
    assert math.isnan(StreamedScores.zero().quantile(0.5))
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 95"):
        StreamedScores.zero().quantile(95)


def test_a_histogram_is_that_of_numpy_but_for_levels_that_edges_cut() -> None:
    scores = normal(20_000, -10, 2, seed=10)
    edges = torch.linspace(-16, -4, 49, dtype=torch.float64)
    counts = streamed(scores).to_histogram(edges)
    expected, _ = np.histogram(scores.clamp(-15.99, -4.01).numpy(), edges.numpy())
    assert float(counts.sum()) == pytest.approx(20_000)
    np.testing.assert_allclose(counts.numpy(), expected, atol=25)


def test_scores_at_levels_of_either_sign_fall_into_their_bins() -> None:
    scores = torch.tensor([-4.0, -3.5, 0.0, 1.0, 1.5, 3.75])
    counts = streamed(scores).to_histogram(torch.tensor([-5.0, -3.0, -1.0, 1.0, 3.0, 5.0]))
    assert counts.tolist() == [2, 0, 1, 2, 1]


def test_a_histogram_of_nothing_is_empty_and_one_without_width_an_error() -> None:
    assert StreamedScores.zero().to_histogram(torch.tensor([0.0, 1.0, 2.0])).tolist() == [0.0, 0.0]
    for wrong in ([1.0, 0.0], [1.0, 1.0], [1.0], [0.0, math.inf]):
        with pytest.raises(ValueError, match="increasing edges"):
            streamed(torch.ones(3)).to_histogram(torch.tensor(wrong))


def test_what_is_not_one_score_a_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"scores \(N,\), got \(3, 1\)"):
        StreamedScores.of(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="65537 numbers"):
        StreamedScores.load(torch.zeros(65536))
    with pytest.raises(ValueError, match="finite score in s_out, got none and 1 invalid"):
        separation_streamed(streamed(torch.ones(3)), streamed(torch.tensor([math.nan])))
