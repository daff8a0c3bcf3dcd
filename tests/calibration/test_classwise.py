"""Class by class: brute force, missing classes, several labels a sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.calibration import Classwise, Reliability, classwise
from lightning_robust.randomness import seeded

Z = 2 * torch.randn(2000, 7, generator=seeded(0))
LABELS = torch.multinomial((Z / 1.5).softmax(1), 1, generator=seeded(1))[:, 0]
LOG_P = Z.log_softmax(1)
COUNTED = Classwise.of(LOG_P, LABELS)


def same(a: Classwise, b: Classwise) -> bool:
    return torch.equal(a.table[[0, 2]], b.table[[0, 2]]) and torch.allclose(a.state(), b.state(), rtol=1e-13, atol=0)


def one_against_the_rest(p: Tensor, y: Tensor, bins: int = 15) -> list[float]:
    """Calibration error of each column, ``y`` of 0/1."""
    errors = []
    for column, event in zip(p.double().numpy().T, y.double().numpy().T, strict=True):
        where = np.clip(np.ceil(column * bins).astype(int) - 1, 0, None)
        errors.append(sum(abs((column - event)[where == m].sum()) for m in range(bins)) / len(column))
    return errors


def test_errors_are_those_of_each_class_against_the_rest() -> None:
    expected = one_against_the_rest(LOG_P.exp(), F.one_hot(LABELS, 7))
    assert COUNTED.errors.tolist() == pytest.approx(expected, rel=1e-6)
    assert COUNTED.ece == pytest.approx(np.mean(expected), rel=1e-6)
    assert COUNTED.worst() == (int(np.argmax(expected)), pytest.approx(max(expected), rel=1e-6))


@pytest.mark.parametrize("k", [0, 6])
def test_the_bins_of_a_class_are_those_of_its_events(k: int) -> None:
    events = Reliability.of_events(LOG_P[:, k].exp(), k == LABELS)
    found = COUNTED.of_class(k)
    assert found.counts.tolist() == events.counts.tolist()
    assert found.correct.tolist() == events.correct.tolist()
    assert found.ece == pytest.approx(events.ece, rel=1e-12)
    assert math.isnan(found.mean_nll)


def test_accuracy_and_confidence_are_kept_by_right_class() -> None:
    confidence, predicted = LOG_P.exp().max(1)
    for k in range(7):
        rows = k == LABELS
        accuracy = float((predicted[rows] == k).double().mean())
        assert float(COUNTED.accuracy[k]) == pytest.approx(accuracy)
        assert float(COUNTED.gap[k]) == pytest.approx(float(confidence[rows].double().mean()) - accuracy, rel=1e-6)


def test_a_class_that_is_missing_is_no_number_and_left_out() -> None:
    kept = LABELS != 3
    counted = Classwise.of(LOG_P[kept], LABELS[kept])
    for values in (counted.errors, counted.accuracy, counted.gap):
        assert torch.nonzero(values.isnan()).flatten().tolist() == [3]
    rest = [e for k, e in enumerate(counted.errors.tolist()) if k != 3]
    assert counted.ece == pytest.approx(np.mean(rest))
    assert counted.worst()[1] == max(rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_probability_on_an_edge_belongs_to_the_bin_below_it(dtype: torch.dtype) -> None:
    tenths = torch.arange(1, 10, dtype=dtype) / 10
    two = torch.stack([tenths, 1 - tenths], dim=1)
    assert Classwise.of(two.log(), torch.zeros(9, dtype=torch.long), bins=10).table[0, 0].tolist() == [1.0] * 9 + [0.0]
    ends = torch.tensor([[0.0, 1.0]], dtype=dtype)
    assert Classwise.of_labels(ends, torch.tensor([[0, 1]]), bins=10).table[0].argmax(1).tolist() == [0, 9]


@pytest.mark.parametrize("size", [1, 7, 2000])
def test_batches_their_order_and_chunks_mean_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classwise, "CHUNK", 100)
    order = torch.randperm(2000, generator=seeded(3))
    parts = [Classwise.of(LOG_P[i], LABELS[i]) for i in order.split(size)]
    assert same(sum(parts, Classwise.zero(7)), COUNTED)
    assert same(Classwise.load(torch.stack([part.state() for part in parts]).sum(0), 7), COUNTED)


def test_the_state_has_a_fixed_size() -> None:
    assert COUNTED.state().shape == Classwise.zero(7).state().shape == (3 * 7 * 16 + 1,)
    assert same(Classwise.load(COUNTED.state(), 7), COUNTED)


def test_several_labels_a_sample_have_errors_of_their_own() -> None:
    p, y = Z.sigmoid(), torch.rand(2000, 7, generator=seeded(5)) < (Z / 2).sigmoid()
    counted = Classwise.of_labels(p, y)
    assert counted.errors.tolist() == pytest.approx(one_against_the_rest(p, y), rel=1e-6)
    assert counted.accuracy.isnan().all()


def test_rows_that_are_not_finite_are_counted_apart() -> None:
    strange = torch.cat([LOG_P[:2].clone(), LOG_P])
    strange[0, 3], strange[1, 2] = math.nan, math.inf
    counted = Classwise.of(strange, torch.cat([LABELS[:2], LABELS]))
    assert counted.invalid == 2
    assert torch.equal(counted.table, COUNTED.table)
    assert Classwise.of_labels(torch.tensor([[0.5, math.nan]]), torch.tensor([[1, 0]])).invalid == 1


def test_nothing_counted_is_no_number() -> None:
    nothing = Classwise.of(torch.empty(0, 3), torch.empty(0, dtype=torch.long))
    assert math.isnan(nothing.ece)
    assert nothing.worst() == (-1, pytest.approx(math.nan, nan_ok=True))
    assert nothing.errors.isnan().all()


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match=r"labels in \[0, 7\), got \[9\]"):
        Classwise.of(LOG_P[:2], torch.tensor([9, 0]))
    with pytest.raises(ValueError, match="log_softmax first"):
        Classwise.of(Z, LABELS)
    with pytest.raises(ValueError, match="sigmoid first"):
        Classwise.of_labels(Z, Z > 0)
    with pytest.raises(ValueError, match=r"got \(2000, 7\) and \(2000,\)"):
        Classwise.of_labels(Z.sigmoid(), LABELS)
    with pytest.raises(ValueError, match=r"the same classes and bins, got \(7, 15\) and \(7, 10\)"):
        Classwise.zero(7) + Classwise.zero(7, bins=10)
    with pytest.raises(ValueError, match="K=5"):
        Classwise.load(COUNTED.state(), 5)
    with pytest.raises(ValueError, match="classes=0"):
        Classwise.zero(0)
