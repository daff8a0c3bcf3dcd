"""Separation against scikit-learn and against loops over all thresholds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from lightning_robust.ood import entropy, msp, separation

KEYS = ["auroc", "aupr_in", "aupr_out", "fpr95_ood_positive", "fpr95_id_positive"]


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


def test_perfect_scores_are_perfect_and_negated_ones_are_not() -> None:
    low, high = torch.arange(20.0), 20 + torch.arange(20.0)
    assert separation(low, high) == dict(zip(KEYS, [1.0, 1.0, 1.0, 0.0, 0.0], strict=True))
    assert separation(high, low)["auroc"] == 0.0
    assert separation(high, low)["fpr95_ood_positive"] == separation(high, low)["fpr95_id_positive"] == 1.0


@pytest.mark.parametrize("value", [0.0, -3.5, 40.0])
def test_a_constant_score_says_nothing(value: float) -> None:
    found = separation(torch.full((60,), value), torch.full((20,), value))
    assert found == {"auroc": 0.5, "aupr_in": 0.75, "aupr_out": 0.25, "fpr95_ood_positive": 1, "fpr95_id_positive": 1}


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
