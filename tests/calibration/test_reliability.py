"""Sums by confidence: which bin, which error, and how much of it is chance."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

from lightning_robust.calibration import Reliability
from lightning_robust.calibration.reliability import ROUNDING, Norm
from lightning_robust.randomness import RandomState, seeded


def predictions(confidence: Tensor, right: Tensor, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a given top confidence, the rest spread evenly, with labels that make them right or not."""
    rest = ((1 - confidence) / (classes - 1))[:, None].expand(-1, classes - 1)
    return torch.cat([confidence[:, None], rest], dim=1).log(), (~right).long()


def over_confident(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    z = 2 * torch.randn(n, 10, generator=seeded(seed))
    labels = torch.multinomial(z.softmax(1), 1, generator=seeded(seed, 1))[:, 0]
    return (1.5 * z).log_softmax(1), labels


LOG_P, LABELS = over_confident(4000)


def same(a: Reliability, b: Reliability) -> bool:
    """Equal counts and sums; the last place of a row's Brier score, in float32, varies with its batch."""
    one, other = (replace(r, brier=0.0).state() for r in (a, b))
    return (
        torch.equal(a.counts, b.counts)
        and torch.allclose(one, other, rtol=1e-14, atol=0)
        and math.isclose(a.brier, b.brier, rel_tol=1e-8)
    )


def test_the_error_is_that_of_torchmetrics() -> None:
    theirs = MulticlassCalibrationError(num_classes=10, n_bins=15, norm="l1")
    assert Reliability.of(LOG_P, LABELS).ece == pytest.approx(float(theirs(LOG_P.exp(), LABELS)), abs=1e-6)


def test_four_predictions_can_be_checked_by_thinking() -> None:
    right = torch.tensor([True, True, False, True])
    reliability = Reliability.of(*predictions(torch.tensor([0.9, 0.9, 0.7, 0.7]), right), bins=5)
    assert reliability.counts.tolist() == [0, 0, 0, 2, 2]
    assert reliability.correct.tolist() == [0, 0, 0, 1, 2]
    assert reliability.ece == pytest.approx((2 * (0.7 - 0.5) + 2 * (1 - 0.9)) / 4, abs=1e-7)
    assert reliability.accuracy == 0.75
    assert reliability.mean_confidence == pytest.approx(0.8, abs=1e-7)


def test_loss_and_brier_score_are_those_of_scikit_learn() -> None:
    log_p = LOG_P.double().log_softmax(1)
    assert Reliability.of(log_p, LABELS).mean_nll == pytest.approx(log_loss(LABELS, log_p.exp()), rel=1e-12)
    errors = log_p.exp() - torch.eye(10, dtype=torch.float64)[LABELS]
    assert Reliability.of(log_p, LABELS).mean_brier == pytest.approx(float(errors.square().sum(1).mean()), rel=1e-12)

    two = LOG_P[:, :2].log_softmax(1)
    label = LABELS % 2
    theirs = brier_score_loss(label, two[:, 1].exp())
    assert Reliability.of(two, label).mean_brier == pytest.approx(2 * theirs, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("twice", [False, True], ids=["log", "log and log_softmax"])
def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it(dtype: torch.dtype, twice: bool) -> None:
    tenths = torch.arange(1, 11, dtype=dtype) / 10
    log_p, labels = predictions(tenths, torch.ones(10, dtype=torch.bool), classes=12)
    reliability = Reliability.of(log_p.log_softmax(1) if twice else log_p, labels, bins=10)
    assert reliability.counts.tolist() == [1] * 10


def test_a_certain_prediction_falls_into_the_last_bin() -> None:
    reliability = Reliability.of(torch.tensor([[100.0, -100.0], [0.0, 0.0]]).log_softmax(1), torch.tensor([0, 1]))
    assert float(reliability.confidence[-1]) == 1.0
    assert reliability.counts[-1] == reliability.correct[-1] == 1
    assert reliability.counts[7] == 1  # 1/2 lies within (7/15, 8/15]


def test_batches_and_their_order_mean_nothing() -> None:
    whole = Reliability.of(LOG_P, LABELS)
    order = torch.randperm(4000, generator=seeded(3))
    parts = [Reliability.of(LOG_P[i], LABELS[i]) for i in order.split(7)]
    assert same(sum(parts, Reliability.zero()), whole)
    assert same(Reliability.load(torch.stack([part.state() for part in parts]).sum(0)), whole)


def test_25_million_confident_predictions_are_counted_exactly() -> None:
    repeats, n = 25, 1_000_000
    drawn = torch.rand(n, generator=seeded(0), dtype=torch.float64)
    confidence = torch.where(torch.arange(n) % 10 > 0, 0.96 + 0.03 * drawn, 0.55 + 0.3 * drawn)  # 90 % in one bin
    right = torch.rand(n, generator=seeded(1), dtype=torch.float64) < confidence - 0.04
    log_p, labels = predictions(confidence, right, classes=2)
    many, theirs = Reliability.zero(), MulticlassCalibrationError(2, n_bins=15, validate_args=False)
    for _ in range(repeats):
        many = many + Reliability.of(log_p, labels)
        theirs.update(log_p.exp().float(), labels)

    where = np.ceil((confidence.numpy() - ROUNDING) * 15).astype(int) - 1
    counts, hits = np.bincount(where, minlength=15), np.bincount(where[right.numpy()], minlength=15)
    sums = [math.fsum(confidence.numpy()[where == m]) for m in range(15)]
    exact = sum(abs(repeats * total - repeats * int(hit)) for total, hit in zip(sums, hits, strict=True)) / many.n
    assert many.n == 25_000_000
    assert many.counts.tolist() == (repeats * counts).tolist()
    assert many.ece == pytest.approx(exact, rel=1e-9)
    assert many.ece == pytest.approx(0.04, abs=0.001)
    assert not 0.5 < float(theirs.compute()) / exact < 1.5  # their sums of ones, in float32, stop at 2**24


def test_no_number_of_additions_loses_a_prediction() -> None:
    right = torch.arange(1000) % 10 != 0
    doubled = Reliability.of(*predictions(torch.full((1000,), 0.98, dtype=torch.float64), right))
    for _ in range(15):  # 33 million
        doubled = doubled + doubled
    assert doubled.counts.tolist() == [0] * 14 + [1000 * 2**15]
    assert doubled.ece == pytest.approx(0.08, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_before_anything_is_computed(dtype: torch.dtype) -> None:
    half = LOG_P.to(dtype)
    assert same(Reliability.of(half, LABELS), Reliability.of(half.float(), LABELS))


def test_rows_without_a_finite_score_are_counted_apart() -> None:
    strange = LOG_P[:5].clone()
    strange[0, 3] = math.nan
    strange[1, 2] = math.inf
    strange[2] = -math.inf
    reliability = Reliability.of(torch.cat([strange[:3], LOG_P]), torch.cat([LABELS[:3], LABELS]))
    assert reliability.invalid == 3
    assert same(replace(reliability, invalid=0), Reliability.of(LOG_P, LABELS))


def test_a_right_class_that_was_ruled_out_is_an_error_like_others_with_an_infinite_loss() -> None:
    sure = torch.tensor([[0.0, -math.inf]]).expand(4, 2)
    reliability = Reliability.of(sure, torch.tensor([0, 0, 1, 1]))
    assert (reliability.n, reliability.invalid, reliability.accuracy, reliability.ece) == (4, 0, 0.5, 0.5)
    assert (reliability.mean_brier, reliability.mean_nll) == (1.0, math.inf)
    assert Reliability.load(reliability.state()).mean_nll == math.inf
    sure_yes = Reliability.of_events(torch.ones(4), torch.tensor([1, 1, 0, 0]))
    assert (sure_yes.n, sure_yes.ece) == (4, 0.5)


@pytest.mark.parametrize("strange", [2, -100])
def test_events_are_yes_or_no(strange: int) -> None:
    with pytest.raises(ValueError, match=rf"events of 0 and 1, got \[{strange}\]"):
        Reliability.of_events(torch.rand(3), torch.tensor([0, 1, strange]))


def test_a_class_that_is_switched_off_has_a_probability_of_zero() -> None:
    off = torch.tensor([[0.0, 0.0, -math.inf]]).log_softmax(1)
    reliability = Reliability.of(off, torch.tensor([0]))
    assert (reliability.n, reliability.invalid, reliability.mean_brier) == (1, 0, pytest.approx(0.5))


@pytest.mark.parametrize("log_p", [LOG_P, LOG_P.double().log_softmax(1)], ids=["float32", "float64"])
def test_squares_and_maximum_are_those_of_numpy(log_p: Tensor) -> None:
    reliability = Reliability.of(log_p, LABELS)
    confidence, predicted = (v.numpy() for v in log_p.double().exp().max(1))
    right = predicted == LABELS.numpy()
    where = np.ceil(confidence * 15).astype(int) - 1
    parts = [(int((where == m).sum()), confidence[where == m], right[where == m]) for m in sorted(set(where))]
    gaps = [(n, c.mean() - r.mean(), r.mean()) for n, c, r in parts]
    assert reliability.rms == pytest.approx(math.sqrt(sum(n * gap**2 for n, gap, _ in gaps) / 4000), rel=1e-6)
    assert reliability.maximum == pytest.approx(max(abs(gap) for _, gap, _ in gaps), rel=1e-6)
    debiased = sum(n * (gap**2 - a * (1 - a) / (n - 1)) for n, gap, a in gaps if n > 1) / 4000
    assert reliability.debiased == pytest.approx(debiased, rel=1e-6)
    assert reliability.murphy()["brier_top"] == pytest.approx(((confidence - right) ** 2).mean(), rel=1e-6)


def test_other_norms_are_those_of_torchmetrics() -> None:
    for norm, value in (("l2", Reliability.of(LOG_P, LABELS).rms), ("max", Reliability.of(LOG_P, LABELS).maximum)):
        theirs = MulticlassCalibrationError(num_classes=10, n_bins=15, norm=norm)(LOG_P.exp(), LABELS)
        assert value == pytest.approx(float(theirs), abs=1e-6)


def test_errors_are_those_of_netcal() -> None:
    # netcal 1.4.0, ECE(15) and MCE(15).measure(p, y) of these float64 probabilities.
    z = (1.5 * (2 * torch.randn(4000, 10, generator=seeded(0)))).double()
    reliability = Reliability.of(z.log_softmax(1), LABELS)
    assert reliability.ece == pytest.approx(0.12831869692393427, rel=1e-12)
    assert reliability.maximum == pytest.approx(0.19096369001397964, rel=1e-12)


def test_a_norm_is_known_by_name() -> None:
    r = Reliability.of(LOG_P, LABELS)
    assert [r.error(norm) for norm in get_args(Norm)] == [r.ece, r.rms, r.maximum, r.debiased]
    with pytest.raises(ValueError, match=r"one of l1, rms, max, debiased, got 'l2'"):
        r.error("l2")  # type: ignore[arg-type]  # on purpose


def test_the_debiased_error_of_a_perfect_model_is_around_zero() -> None:
    generator = np.random.default_rng(0)
    found, plain = [], []
    for _ in range(400):
        confidence = generator.beta(6, 1.5, 500).clip(0.11)
        right = generator.random(500) < confidence
        reliability = Reliability.of(*predictions(torch.from_numpy(confidence), torch.from_numpy(right)))
        found.append(reliability.debiased)
        plain.append(reliability.rms**2)
    assert abs(np.mean(found)) < 3 * np.std(found) / 20 < 0.1 * np.mean(plain)
    assert min(found) < 0


def test_one_prediction_alone_in_its_bin_adds_nothing_debiased() -> None:
    alone = Reliability.of(*predictions(torch.tensor([0.9]), torch.tensor([False])))
    assert (alone.debiased, alone.rms) == (0.0, pytest.approx(0.9))


def test_the_parts_of_the_brier_score_add_up() -> None:
    for seed in range(3):
        murphy = Reliability.of(*over_confident(1000, seed)).murphy()
        parts = murphy["reliability"] - murphy["resolution"] + murphy["uncertainty"] + murphy["within"]
        assert murphy["brier_top"] == pytest.approx(parts, abs=1e-15)
        assert murphy["reliability"] == pytest.approx(Reliability.of(*over_confident(1000, seed)).rms ** 2)


def test_without_differences_inside_bins_nothing_is_hidden() -> None:
    confidence = torch.tensor([0.55, 0.75, 0.95], dtype=torch.float64).repeat_interleave(40)
    right = torch.rand(120, generator=seeded(0)) < 0.7
    murphy = Reliability.of(*predictions(confidence, right), bins=5).murphy()
    assert murphy["within"] == pytest.approx(0, abs=1e-12)
    assert murphy["uncertainty"] == pytest.approx(float(right.double().var(correction=0)))


def test_the_likelier_of_two_answers_has_half_of_both_brier_scores() -> None:
    two = LOG_P[:, :2].log_softmax(1)
    r = Reliability.of(two, LABELS % 2)
    assert r.brier_top == pytest.approx(r.brier / 2, rel=1e-6)


def test_events_are_counted_by_the_probability_of_yes() -> None:
    p, yes = torch.rand(3000, generator=seeded(0)), torch.rand(3000, generator=seeded(1)) < 0.3
    r = Reliability.of_events(p, yes)
    theirs = BinaryCalibrationError(n_bins=15, norm="l1")(p, yes.long())
    assert r.ece == pytest.approx(float(theirs), abs=1e-6)
    assert r.mean_nll == pytest.approx(log_loss(yes, p.double()), rel=1e-6)
    assert r.mean_brier == pytest.approx(2 * brier_score_loss(yes, p), rel=1e-6)
    assert r.murphy()["brier_top"] == pytest.approx(brier_score_loss(yes, p), rel=1e-6)
    assert r.accuracy == pytest.approx(float(yes.double().mean()))


def test_a_sure_error_has_the_loss_that_its_maker_knows() -> None:
    logit = torch.tensor([40.0])
    p, no = logit.sigmoid(), torch.tensor([False])
    assert Reliability.of_events(p, no).mean_nll == math.inf  # log(1 - 1)
    known = Reliability.of_events(p, no, nll=-torch.nn.functional.logsigmoid(-logit))
    assert (known.invalid, known.mean_nll, known.ece) == (0, pytest.approx(40.0), 1.0)


def test_events_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5; for logits take a sigmoid"):
        Reliability.of_events(torch.tensor([0.5, 1.5]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"got \(2, 1\) and \(2,\)"):
        Reliability.of_events(torch.rand(2, 1), torch.tensor([0, 1]))
    assert Reliability.of_events(torch.tensor([0.5, math.nan]), torch.tensor([0, 1])).invalid == 1


def test_the_first_of_equally_likely_classes_is_the_prediction() -> None:
    equal = torch.zeros(4, 4).log_softmax(1)
    assert Reliability.of(equal, torch.arange(4)).correct.sum() == 1
    pairs = torch.tensor([[0.4, 0.1, 0.4, 0.1], [0.1, 0.4, 0.1, 0.4]]).log().repeat_interleave(4, 0)
    labels = torch.arange(4).repeat(2)
    assert Reliability.of(pairs, labels).correct.sum() == int((pairs.argmax(1) == labels).sum()) == 2


def test_memory_is_only_written_where_that_was_allowed() -> None:
    kept, given = LOG_P.clone(), LOG_P.clone()
    whole = Reliability.of(kept, LABELS)
    assert torch.equal(kept, LOG_P)
    assert torch.equal(Reliability.of(given, LABELS, overwrite=True).state(), whole.state())


def test_the_state_has_a_fixed_size() -> None:
    state = Reliability.of(LOG_P, LABELS).state()
    assert state.nbytes == 8 * (3 * 15 + 4) <= 400
    assert torch.equal(Reliability.load(state).state(), state)


def test_a_log_shows_the_old_names_first() -> None:
    assert list(Reliability.of(LOG_P, LABELS).measures()) == [
        *("ece", "ece_low", "ece_high", "ece_floor", "nll", "brier"),
        *("ece_rms", "ece_max", "ece_debiased", "brier_reliability", "brier_resolution", "brier_uncertainty"),
    ]


def test_nothing_counted_is_no_number() -> None:
    nothing = Reliability.of(torch.empty(0, 10), torch.empty(0, dtype=torch.long))
    assert same(nothing, Reliability.zero())
    assert nothing.n == 0
    assert all(math.isnan(value) for value in nothing.measures().values())
    assert math.isnan(nothing.accuracy)
    assert nothing.to_dict()["accuracy"] == [0.0] * 15


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match=r"labels in \[0, 10\), got \[-100, 12\]"):
        Reliability.of(LOG_P[:3], torch.tensor([12, -100, 3]))
    with pytest.raises(ValueError, match="log_softmax first"):
        Reliability.of(torch.randn(3, 10), LABELS[:3])
    with pytest.raises(ValueError, match=r"got \(3, 10\) and \(2,\)"):
        Reliability.of(LOG_P[:3], LABELS[:2])
    with pytest.raises(ValueError, match="bins=0"):
        Reliability.zero(0)
    with pytest.raises(ValueError, match="the same bins, got 15 and 10"):
        Reliability.zero() + Reliability.zero(10)
    with pytest.raises(ValueError, match="a state of 3 M"):
        Reliability.load(torch.zeros(15))


def test_the_bins_pass_through_a_checkpoint_of_plain_values() -> None:
    reliability = Reliability.of(LOG_P, LABELS)
    file = io.BytesIO()
    torch.save(reliability.to_dict(), file)
    file.seek(0)
    table = torch.load(file, weights_only=True)
    counts, confidence, accuracy = (torch.tensor(table[k]) for k in ("counts", "confidence", "accuracy"))
    assert float((counts * (confidence - accuracy).abs()).sum() / counts.sum()) == pytest.approx(reliability.ece, 1e-5)


@pytest.mark.parametrize(("n", "expected"), [(100, 0.0883), (500, 0.0414), (1000, 0.0286), (5000, 0.0131)])
def test_a_perfect_model_shows_an_error_by_chance(n: int, expected: float) -> None:
    # Expected: the mean error over 400 simulated perfect models with confidences from Beta(6, 1.5).
    generator = np.random.default_rng(0)
    errors, floors = [], []
    for _ in range(100):
        confidence = generator.beta(6, 1.5, n).clip(0.11)
        right = generator.random(n) < confidence
        reliability = Reliability.of(*predictions(torch.from_numpy(confidence), torch.from_numpy(right)))
        errors.append(reliability.ece)
        floors.append(reliability.floor(draws=200))
    error = float(np.std(errors))
    assert np.mean(errors) == pytest.approx(expected, abs=3 * error * math.sqrt(1 / 100 + 1 / 400))
    assert np.mean(floors) == pytest.approx(expected, abs=3 * error / math.sqrt(400))


def truth(kind: str, confidence: np.ndarray) -> np.ndarray:
    """How often a prediction of this confidence is really right."""
    if kind == "perfect":
        return confidence
    if kind == "over-confident":
        return confidence**2
    if kind == "a little under-confident":
        return confidence + 0.2 * confidence * (1 - confidence)
    return np.full_like(confidence, 0.995)  # nearly always right: most bins hold no error


@pytest.mark.parametrize("kind", ["perfect", "over-confident", "a little under-confident", "nearly always right"])
@pytest.mark.parametrize("n", [50, 500, 5000])
def test_the_interval_holds_the_true_error_as_often_as_it_says(kind: str, n: int) -> None:
    generator = np.random.default_rng(n)
    confidence = generator.beta(6, 1.5, n).clip(0.11)
    chance = truth(kind, confidence)
    where = np.ceil(confidence * 15).astype(int) - 1
    true = float(np.abs(np.bincount(where, confidence - chance, 15)).sum() / n)
    counted = Reliability.of(*predictions(torch.from_numpy(confidence), torch.ones(n, dtype=torch.bool)))
    assert counted.counts.tolist() == np.bincount(where, minlength=15).tolist()

    held, repeats = 0, 400
    for repeat in range(repeats):
        right = generator.random(n) < chance
        drawn = replace(counted, correct=torch.from_numpy(np.bincount(where[right], minlength=15)))
        low, high = drawn.interval(draws=500, seed=repeat)
        held += low <= true <= high
    assert held / repeats >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / repeats)


@pytest.mark.parametrize("accuracy", [0.999, 0.97, 0.93])
@pytest.mark.parametrize("n", [50, 1000])
def test_the_interval_holds_where_all_predictions_are_nearly_certain(accuracy: float, n: int) -> None:
    generator = np.random.default_rng(n)
    counted = Reliability.of(*predictions(torch.full((n,), 0.999), torch.ones(n, dtype=torch.bool)))
    held, repeats = 0, 400
    for repeat in range(repeats):
        right = torch.tensor([0] * 14 + [generator.binomial(n, accuracy)])
        low, high = replace(counted, correct=right).interval(draws=500, seed=repeat)
        held += low <= 0.999 - accuracy + 1e-6 and 0.999 - accuracy <= high
    assert held / repeats >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / repeats)


def test_the_interval_closes_in_on_the_true_error() -> None:
    def width(n: int) -> float:
        low, high = Reliability.of(*over_confident(n)).interval()
        return high - low

    assert width(40_000) < width(4000) < width(400)
    assert width(40_000) < 0.02


def test_a_bin_that_is_always_right_is_not_free_of_doubt() -> None:
    reliability = Reliability.of(*predictions(torch.full((20,), 0.9), torch.ones(20, dtype=torch.bool)))
    low, high = reliability.interval()
    assert low < reliability.ece < high


def test_more_certainty_asks_for_a_wider_interval() -> None:
    reliability = Reliability.of(LOG_P, LABELS)
    (low80, high80), (low99, high99) = reliability.interval(0.8), reliability.interval(0.99)
    assert low99 < low80 < reliability.ece < high80 < high99


def test_draws_are_repeatable_and_leave_the_global_streams_alone() -> None:
    reliability = Reliability.of(LOG_P, LABELS)
    state = RandomState.capture()
    assert reliability.measures() == reliability.measures()
    assert state.is_current()
    assert reliability.interval(seed=1) != reliability.interval(seed=2)


def test_counting_needs_no_gradient_and_changes_nothing() -> None:
    log_p = LOG_P.clone().requires_grad_()
    with torch.inference_mode():
        inside = Reliability.of(LOG_P.clone(), LABELS)
    assert same(Reliability.of(log_p, LABELS), inside)
    assert torch.equal(log_p, LOG_P)
