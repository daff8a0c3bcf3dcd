"""What is counted of one kind of shift: sums, kept predictions, scores."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightning_robust.calibration import Reliability
from lightning_robust.callbacks.shifted import KEPT, LARGEST, Shifted, at_temperature, counted_rows, finite_rows
from lightning_robust.losses import LossCall


def logits(n: int, classes: int = 5, seed: int = 0, shape: tuple[int, ...] = ()) -> Tensor:
    return 3 * torch.randn(n, classes, *shape, generator=torch.Generator().manual_seed(seed))


def call(z: Tensor, y: Tensor) -> LossCall:
    return LossCall("cross_entropy", z, y)


def test_only_samples_that_count_are_counted_in_any_batches() -> None:
    z, y = logits(40), torch.arange(40) % 5
    keep = torch.arange(40) % 3 != 0
    whole, parts = (Shifted(["msp"], 40, 1, 0) for _ in range(2))
    whole.add(call(z, y), torch.arange(40), keep)
    for rows in torch.arange(40).split(7):
        parts.add(call(z[rows], y[rows]), rows, keep[rows])
    expected = Reliability.of(z[keep].log_softmax(1), y[keep])
    for one in (whole, parts):
        assert one.sums.state().tolist() == pytest.approx(expected.state().tolist())
        assert one.table is not None
        assert one.table.n == int(keep.sum())
    assert torch.equal(whole.kept.rows()[2].sort().values, torch.arange(40)[keep])


def test_rows_of_pixels_and_flattened_tokens_belong_to_their_samples() -> None:
    keep = torch.tensor([True, False, True])
    z, y = logits(3, 5, shape=(2, 2)), torch.zeros(3, 2, 2).long()
    for one in (call(z, y), call(z.movedim(1, -1).reshape(-1, 5), y.flatten())):
        log_p, labels, place = counted_rows(one, keep)
        assert place.tolist() == [0] * 4 + [2] * 4
        assert torch.allclose(log_p, z[keep].movedim(1, -1).reshape(-1, 5).log_softmax(1))
        assert len(labels) == 8


def test_what_is_right_is_told_with_the_place_of_its_sample_and_nan_is_no_answer() -> None:
    z, y = torch.eye(4), torch.tensor([0, 1, 0, 3])
    z[3] = torch.nan
    right, place = Shifted([], 4, 1, 0).add(call(z, y), torch.arange(4), torch.ones(4, dtype=torch.bool))
    assert right.tolist() == [True, True, False]
    assert place.tolist() == [0, 1, 2]


def test_a_right_class_that_was_ruled_out_counts_as_wrong() -> None:
    z, y = torch.eye(3), torch.tensor([0, 1, 0])
    z[2, 0] = -torch.inf
    one = Shifted([], 3, 1, 0)
    right, place = one.add(call(z, y), torch.arange(3), torch.ones(3, dtype=torch.bool))
    assert right.tolist() == [True, True, False]
    assert place.tolist() == [0, 1, 2]
    assert one.sums.accuracy == pytest.approx(2 / 3)
    assert at_temperature(2.0, one.everyones(None, 0, 1)).accuracy == pytest.approx(2 / 3)


def test_the_auroc_is_that_of_scikit_learn_and_scores_that_are_not_finite_are_left_out() -> None:
    inside, outside, y = logits(60), 0.4 * logits(50, seed=1), torch.zeros(60).long()
    outside[7] = torch.nan
    own, other = (Shifted(["msp", "entropy"], 60, 2, 0) for _ in range(2))
    own.add(call(inside, y), torch.arange(60), torch.ones(60, dtype=torch.bool))
    other.add(call(outside, y[:50]), torch.arange(50), torch.ones(50, dtype=torch.bool))
    good = outside[outside.isfinite().all(1)]
    p = torch.cat([inside, good]).double().log_softmax(1)
    far = torch.cat([torch.zeros(60), torch.ones(49)])
    found = other.measures(own, None)
    assert found["msp_auroc"] == pytest.approx(roc_auc_score(far, -p.amax(1)), abs=1e-6)
    assert found["entropy_auroc"] == pytest.approx(roc_auc_score(far, -(p.exp() * p).sum(1)), abs=1e-6)
    assert own.measures(own, None)["msp_auroc"] == 0.5


@pytest.mark.parametrize("kind", ["nll_loss", "kl_div"])
def test_log_probabilities_have_scores_but_no_energy(kind: str) -> None:
    z = logits(20).log_softmax(1)
    target = torch.zeros(20).long() if kind == "nll_loss" else torch.full((20, 5), 0.2)
    own = Shifted(["energy", "msp"], 20, 1, 0)
    own.add(LossCall(kind, z, target), torch.arange(20), torch.ones(20, dtype=torch.bool))  # type: ignore[arg-type]  # one of the kinds
    assert set(own.measures(own, None)) & {"energy_auroc", "msp_auroc"} == {"msp_auroc"}


def test_all_cells_together_keep_no_more_than_their_share_however_many_classes_there_are() -> None:
    few, many = Shifted([], 10, 85, 0), Shifted([], 10, 85, 0)
    few.kept.add(logits(10, 5).log_softmax(1), torch.zeros(10).long(), torch.arange(10))
    rows = LARGEST // 85 // 100_000
    assert rows == 5
    for start in range(0, 30, 10):
        many.kept.add(torch.zeros(10, 100_000), torch.zeros(10).long(), torch.arange(start, start + 10))
    assert len(few.kept.rows()[0]) == 10
    assert len(many.kept.rows()[0]) == rows
    assert few.kept.capacity == KEPT


def test_kept_rows_at_a_temperature_are_those_of_the_logits_at_it() -> None:
    z, y = logits(200), torch.arange(200) % 5
    found = at_temperature(2.5, (z.log_softmax(1), y))
    assert found.state().tolist() == pytest.approx(
        Reliability.of((z / 2.5).log_softmax(1), y).state().tolist(), rel=1e-5
    )
    assert at_temperature(2.5, (z[:0], y[:0])).n == 0


def test_rows_without_a_finite_loss_are_left_out_and_impossible_other_classes_are_not() -> None:
    log_p = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf], [torch.nan, torch.nan]])
    kept, labels = finite_rows((log_p, torch.tensor([0, 1, 0])))
    assert kept.tolist() == [[0.0, -math.inf]]
    assert labels.tolist() == [0]
