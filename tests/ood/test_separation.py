"""Separation against scikit-learn and against loops over all thresholds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from lightning_robust.intervals import wilson
from lightning_robust.ood import MEASURES, entropy, msp, separation, separation_of_counts


def drawn(n_in: int, n_out: int, shift: float = 1.0, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s_in = torch.randn(n_in, generator=generator, dtype=torch.float64)
    return s_in, shift + scale * torch.randn(n_out, generator=generator, dtype=torch.float64)


CASES = {
    "apart": drawn(500, 400, shift=3.0),
    "alike": drawn(300, 300, shift=0.0),
    "the wrong way round": drawn(300, 200, shift=-1.0),
    "unequal variances": drawn(1000, 1000, shift=1.5, scale=0.3),
    "a tiny foreign set": drawn(200, 50, seed=1),
    "a tiny familiar set": drawn(50, 300, seed=2),
    "seven of each": drawn(7, 7, seed=3),
    "one of each": drawn(1, 1, seed=4),
    "many ties": tuple((2 * s).round() for s in drawn(400, 300, seed=5)),
    "one more tie than values": tuple(s.clamp(-0.5, 0.5) for s in drawn(400, 300, seed=6)),
    "all above 17": tuple(100 + s for s in drawn(300, 300, seed=7)),
    "straddling 1": tuple(s.abs() for s in drawn(300, 300, seed=8)),
    "single precision": tuple(s.float() for s in drawn(300, 300, seed=9)),
}

each_case = pytest.mark.parametrize(("s_in", "s_out"), CASES.values(), ids=CASES)


def share_at_95(positive: np.ndarray, negative: np.ndarray) -> float:
    """Of the negatives above the highest threshold that keeps 95 % of the positives, by trying all of them."""
    thresholds = sorted({*positive.tolist(), *negative.tolist()}, reverse=True)
    enough = next(t for t in thresholds if np.mean(positive >= t) >= 0.95)
    return float(np.mean(negative >= enough))


@each_case
def test_areas_are_those_of_scikit_learn(s_in: Tensor, s_out: Tensor) -> None:
    scores = np.concatenate([s_in.numpy(), s_out.numpy()])
    foreign = np.repeat([0, 1], [len(s_in), len(s_out)])
    found = separation(s_in, s_out)
    assert found["auroc"] == pytest.approx(roc_auc_score(foreign, scores), abs=1e-12)
    assert found["aupr_out"] == pytest.approx(average_precision_score(foreign, scores), abs=1e-12)
    assert found["aupr_in"] == pytest.approx(average_precision_score(1 - foreign, -scores), abs=1e-12)


@each_case
def test_both_false_positive_rates_are_those_of_trying_every_threshold(s_in: Tensor, s_out: Tensor) -> None:
    inside, outside = s_in.numpy(), s_out.numpy()
    found = separation(s_in, s_out)
    assert found["fpr95_ood_positive"] == share_at_95(outside, inside)
    assert found["fpr95_id_positive"] == share_at_95(-inside, -outside)


@each_case
def test_the_detection_error_is_the_least_of_trying_every_threshold(s_in: Tensor, s_out: Tensor) -> None:
    inside, outside = s_in.double().numpy(), s_out.double().numpy()
    thresholds = [*inside.tolist(), *outside.tolist(), math.inf]
    least = min((np.mean(inside >= t) + np.mean(outside < t)) / 2 for t in thresholds)
    assert separation(s_in, s_out)["detection_error"] == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("case", [name for name in CASES if name != "one of each"])  # one sample has no variance
def test_the_interval_of_the_area_is_delongs_on_the_logit_scale(case: str) -> None:
    s_in, s_out = CASES[case]
    found = separation(s_in, s_out)
    above = (s_out[:, None] > s_in).double() + 0.5 * (s_out[:, None] == s_in)
    variance = above.mean(1).var() / len(s_out) + above.mean(0).var() / len(s_in)
    half = 1.96 * float(variance.sqrt()) / (found["auroc"] * (1 - found["auroc"]))
    middle = math.log(found["auroc"] / (1 - found["auroc"]))
    expected = [1 / (1 + math.exp(-end)) for end in (middle - half, middle + half)]
    assert [found["auroc_low"], found["auroc_high"]] == pytest.approx(expected, abs=1e-9)


@each_case
def test_every_measure_is_a_share_inside_its_interval(s_in: Tensor, s_out: Tensor) -> None:
    found = separation(s_in, s_out)
    assert tuple(found) == MEASURES
    assert all(0 <= value <= 1 for value in found.values())
    assert found["auroc_low"] <= found["auroc"] <= found["auroc_high"]
    assert found["fpr95_low"] <= found["fpr95_ood_positive"] <= found["fpr95_high"]


@each_case
def test_both_false_positive_rates_lie_on_the_curve_of_scikit_learn(s_in: Tensor, s_out: Tensor) -> None:
    scores = np.concatenate([s_in.numpy(), s_out.numpy()])
    foreign = np.repeat([0, 1], [len(s_in), len(s_out)])
    found = separation(s_in, s_out)
    for key, labels, s in (("fpr95_ood_positive", foreign, scores), ("fpr95_id_positive", 1 - foreign, -scores)):
        fpr, tpr, _ = roc_curve(labels, s, drop_intermediate=False)
        assert found[key] == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-12)


def test_the_two_rates_differ_widely_where_the_variances_do() -> None:
    found = separation(*CASES["unequal variances"])
    assert found["fpr95_ood_positive"] < 0.5 * found["fpr95_id_positive"]


PLAIN = ["auroc", "aupr_in", "aupr_out", "fpr95_ood_positive", "fpr95_id_positive", "detection_error"]


def test_perfect_scores_are_perfect_and_negated_ones_are_not() -> None:
    low, high = torch.arange(20.0), 20 + torch.arange(20.0)
    assert [separation(low, high)[key] for key in PLAIN] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    turned = separation(high, low)
    assert [turned[key] for key in PLAIN if "aupr" not in key] == [0.0, 1.0, 1.0, 0.5]


@pytest.mark.parametrize("value", [0.0, -3.5, 40.0])
def test_a_constant_score_says_nothing(value: float) -> None:
    found = separation(torch.full((60,), value), torch.full((20,), value))
    assert [found[key] for key in PLAIN] == [0.5, 0.75, 0.25, 1.0, 1.0, 0.5]
    assert found["auroc_low"] < 0.4 < 0.6 < found["auroc_high"]


def test_values_are_those_of_pytorch_ood() -> None:
    # pytorch_ood 0.4.0, metrics.functional auroc and fpr_at_tpr on these scores; its aupr is a trapezoid, not a step.
    generator = torch.Generator().manual_seed(0)
    s_in = torch.randn(400, generator=generator, dtype=torch.float64)
    s_out = 1 + torch.randn(300, generator=generator, dtype=torch.float64)
    plain, tied = separation(s_in, s_out), separation((2 * s_in).round(), (2 * s_out).round())
    assert plain["auroc"] == pytest.approx(0.7709666666666666, abs=1e-12)
    assert (plain["fpr95_ood_positive"], plain["fpr95_id_positive"]) == pytest.approx((0.7225, 0.6933333333333334))
    assert plain["aupr_out"] == pytest.approx(0.7185138376722797, abs=1e-3)
    assert tied["auroc"] == pytest.approx(0.7639750000000001, abs=1e-12)
    assert (tied["fpr95_ood_positive"], tied["fpr95_id_positive"]) == pytest.approx((0.77, 0.77))


@pytest.mark.parametrize("n", [5, 50, 5000])
def test_the_lower_end_of_a_perfect_area_is_1_96_errors_of_hanley_and_mcneil_away(n: int) -> None:
    found = separation(torch.arange(float(n)), n + torch.arange(2.0 * n))
    area = found["auroc_low"]
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    # Newcombe's method 5 puts the mean of both numbers of samples where their formula has one each.
    more = (1.5 * n - 1) * (q1 - area**2 + q2 - area**2)
    assert (1 - area) ** 2 == pytest.approx(1.96**2 * (area * (1 - area) + more) / (2 * n * n), rel=1e-6)
    assert found["auroc_high"] == 1.0
    turned = separation(n + torch.arange(2.0 * n), torch.arange(float(n)))
    assert turned["auroc_low"] == 0.0
    assert turned["auroc_high"] == pytest.approx(1 - area)


def test_the_interval_of_a_rate_is_at_least_that_of_a_share_and_not_a_point_at_zero() -> None:
    found = separation(torch.arange(500.0), 1000 + torch.arange(500.0))
    assert found["fpr95_low"] == 0.0
    assert found["fpr95_high"] == pytest.approx(wilson(0.0, 500)[1])
    found = separation(*CASES["unequal variances"])
    low, high = wilson(found["fpr95_ood_positive"], 1000)
    assert found["fpr95_low"] < low < high < found["fpr95_high"]


def test_fifty_foreign_samples_cannot_bound_the_rate_from_above() -> None:
    # The chance that none of 50 lies below the threshold that 5 % lie below is 0.95**50 = 8 %.
    assert separation(*CASES["a tiny foreign set"])["fpr95_high"] == 1.0


def simulated(n_in: int, n_out: int, shift: float, scale: float, runs: int) -> Iterator[dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    s_in = torch.randn(runs, n_in, generator=generator, dtype=torch.float64)
    s_out = shift + scale * torch.randn(runs, n_out, generator=generator, dtype=torch.float64)
    return map(separation, s_in, s_out)


@pytest.mark.parametrize(
    ("n_in", "n_out", "shift", "scale"),
    [(1000, 1000, 1.0, 1.0), (200, 100, 2.0, 1.0), (300, 1000, 1.5, 0.3), (1000, 300, 3.0, 1.0)],
)
def test_intervals_hold_the_true_value_as_often_as_they_say(n_in: int, n_out: int, shift: float, scale: float) -> None:
    normal, runs = NormalDist(), 1000
    area = normal.cdf(shift / math.hypot(1, scale))
    rate = 1 - normal.cdf(shift + scale * normal.inv_cdf(0.05))
    found = list(simulated(n_in, n_out, shift, scale, runs))
    held = np.mean([f["auroc_low"] <= area <= f["auroc_high"] for f in found])
    assert held == pytest.approx(0.95, abs=0.025)
    held = np.mean([f["fpr95_low"] <= rate <= f["fpr95_high"] for f in found])
    assert held > 0.92  # on the wide side
    width = np.mean([f["fpr95_high"] - f["fpr95_low"] for f in found])
    spread = np.std([f["fpr95_ood_positive"] for f in found])
    assert 3.5 * spread < width < 8 * spread


def test_counts_at_levels_are_scores_with_ties() -> None:
    inside, outside = torch.tensor([3, 0, 5, 0, 1]), torch.tensor([1, 0, 2, 4, 0])
    levels = torch.arange(5.0)
    expected = separation(levels.repeat_interleave(inside), levels.repeat_interleave(outside))
    assert separation_of_counts(inside, outside) == expected


def test_counts_beyond_single_precision_and_a_billion_pairs_are_exact() -> None:
    few, many = torch.tensor([3, 2, 1]), torch.tensor([1, 2, 3])
    times = 10_000_001  # where float32 loses every other number
    small, large = separation_of_counts(few, many), separation_of_counts(few * times, many * times)
    assert [large[key] for key in PLAIN] == pytest.approx([small[key] for key in PLAIN], abs=1e-15)
    assert large["auroc_high"] - large["auroc_low"] < 1e-3


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        (torch.tensor([1, 2]), torch.tensor([1]), r"int64 counts \(L,\)"),
        (torch.tensor([1.0]), torch.tensor([1]), "float32"),
        (torch.tensor([0, 0]), torch.tensor([1, 0]), "at least one sample inside"),
        (torch.tensor([1, 0]), torch.tensor([2, -1]), "no count below 0"),
    ],
)
def test_what_counts_nothing_is_an_error(inside: Tensor, outside: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        separation_of_counts(inside, outside)


def test_zero_and_minus_zero_are_a_tie() -> None:
    assert separation(torch.tensor([0.0]), torch.tensor([-0.0]))["auroc"] == 0.5


def test_19_of_20_are_95_percent() -> None:
    # one of 20 foreign samples lies below everything; the threshold may let it go
    s_out = torch.cat([torch.tensor([-1.0]), torch.arange(1.0, 20.0)])
    assert separation(torch.zeros(10), s_out)["fpr95_ood_positive"] == 0.0
    assert separation(torch.zeros(10), s_out[:-1])["fpr95_ood_positive"] == 1.0  # 18 of 19 are not


def test_normal_scores_have_the_area_of_the_textbook() -> None:
    shift, n = 1.0, 200_000
    expected = 0.5 * (1 + math.erf(shift / 2))  # Phi(shift / sqrt 2)
    assert separation(*drawn(n, n, shift))["auroc"] == pytest.approx(expected, abs=4 * 0.6 / math.sqrt(n))


def test_scores_as_large_as_sigmoid_cannot_tell_apart_are_told_apart() -> None:
    s_in, s_out = (s.abs() for s in drawn(200, 200))
    assert separation(1000 + s_in, 1000 + s_out)["auroc"] == separation(s_in, s_out)["auroc"]


def test_order_means_nothing() -> None:
    s_in, s_out = CASES["many ties"]
    assert separation(s_in.flip(0), s_out.sort().values) == separation(s_in, s_out)


def test_saturated_predictions_are_still_told_apart_by_msp() -> None:
    gaps_in, gaps_out = 60 + 5 * drawn(200, 200)[0].abs(), 40 + 5 * drawn(200, 200)[0].abs()
    logits = [torch.stack([gaps, torch.zeros(200)], dim=1).float() for gaps in (gaps_in, gaps_out)]
    assert separation(*(1 - z.softmax(1).amax(1) for z in logits))["auroc"] == 0.5
    found = separation(*map(msp, logits))["auroc"]
    assert found == pytest.approx(
        roc_auc_score(np.repeat([0, 1], 200), -torch.cat([gaps_in, gaps_out]).numpy()), abs=1e-4
    )
    assert found > 0.99


def test_entropy_means_the_same_in_one_go_and_in_batches() -> None:
    logits = 3 * torch.randn(600, 10, generator=torch.Generator().manual_seed(0))
    whole = separation(entropy(logits[:300]), entropy(0.5 * logits[300:]))
    parts = [torch.cat([entropy(z) for z in part.split(8)]) for part in (logits[:300], 0.5 * logits[300:])]
    assert separation(*parts) == whole


@pytest.mark.parametrize(("bad", "n"), [([math.nan], 1), ([math.inf, -math.inf, 0.0], 2)])
def test_values_that_are_not_finite_are_counted_and_placed(bad: list[float], n: int) -> None:
    good, wrong = torch.zeros(4), torch.tensor(bad)
    with pytest.raises(ValueError, match=f"{n} NaN or infinite ones of {len(bad)} in s_in"):
        separation(wrong, good)
    with pytest.raises(ValueError, match=f"{n} NaN or infinite ones of {len(bad)} in s_out"):
        separation(good, wrong)


@pytest.mark.parametrize("shape", [(0,), (3, 2), ()])
def test_an_empty_side_or_another_shape_is_an_error_that_says_which(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="s_in"):
        separation(torch.zeros(shape), torch.zeros(4))
    with pytest.raises(ValueError, match="s_out"):
        separation(torch.zeros(4), torch.zeros(shape))
