"""The fine grid: ties stay together, order means nothing, areas are those of all orders on average."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_robust.calibration import ConfidenceGrid
from lightning_robust.randomness import seeded


def predictions(confidence: Tensor, right: Tensor, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a given top confidence, the rest spread evenly, with labels that make them right or not."""
    rest = ((1 - confidence) / (classes - 1))[:, None].expand(-1, classes - 1)
    return torch.cat([confidence[:, None], rest], dim=1).log(), (~right).long()


def over_confident(n: int) -> tuple[Tensor, Tensor]:
    z = 2 * torch.randn(n, 10, generator=seeded(0))
    labels = torch.multinomial(z.softmax(1), 1, generator=seeded(0, 1))[:, 0]
    return (1.5 * z.double()).log_softmax(1), labels


LOG_P, LABELS = over_confident(4000)
GRID = ConfidenceGrid.of(LOG_P, LABELS)


def same(a: ConfidenceGrid, b: ConfidenceGrid) -> bool:
    return torch.equal(a.counts, b.counts) and torch.allclose(a.state(), b.state(), rtol=1e-14, atol=0)


# -- what is counted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_batches_and_their_order_mean_nothing(size: int) -> None:
    order = torch.randperm(1000, generator=seeded(3))
    parts = [ConfidenceGrid.of(LOG_P[i], LABELS[i]) for i in order.split(size)]
    assert same(sum(parts, ConfidenceGrid.zero()), ConfidenceGrid.of(LOG_P[:1000], LABELS[:1000]))


def test_two_halves_are_the_whole_also_through_their_states() -> None:
    first, second = ConfidenceGrid.of(LOG_P[:700], LABELS[:700]), ConfidenceGrid.of(LOG_P[700:], LABELS[700:])
    assert same(first + second, GRID)
    assert same(ConfidenceGrid.load(first.state() + second.state()), GRID)


def test_the_state_has_a_fixed_size_of_doubles() -> None:
    assert GRID.state().shape == ConfidenceGrid.zero().state().shape == (3 * 4096 + 1,)
    assert GRID.state().dtype == torch.float64
    assert GRID.n == 4000
    assert int(GRID.correct.sum()) == int((LOG_P.argmax(1) == LABELS).sum())


def test_cells_are_narrow() -> None:
    p = torch.linspace(0.11, 0.999, 50_000, dtype=torch.float64)
    grid = ConfidenceGrid.of(*predictions(p, torch.ones(50_000, dtype=torch.bool)))
    means = (grid.confidence / grid.counts)[grid.counts > 0]
    assert float(means.diff().max()) < 0.003


def test_confidences_that_are_one_in_float32_keep_their_order() -> None:
    z = torch.tensor([[20.0, 0.0], [30.0, 0.0], [40.0, 0.0], [100.0, 0.0]])
    assert (z.softmax(1)[:, 0] == 1).all()
    grid = ConfidenceGrid.of(z.log_softmax(1), torch.tensor([1, 0, 0, 0]))
    assert (grid.counts > 0).sum() == 4
    assert grid.excess_aurc == pytest.approx(0, abs=1e-15)
    assert grid.coverage_at(0.0) == 0.75


def test_certain_and_single_classes_are_the_surest_of_all() -> None:
    certain = torch.tensor([[0.0, -math.inf], [math.log(0.5), math.log(0.5)]])
    grid = ConfidenceGrid.of(certain, torch.tensor([0, 1]))
    assert (grid.n, grid.invalid, grid.coverage_at(0.0)) == (2, 0, 0.5)
    assert ConfidenceGrid.of(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)).n == 3


def test_rows_without_a_finite_confidence_are_counted_apart() -> None:
    strange = LOG_P[:3].clone()
    strange[0, 3], strange[1, 2] = math.nan, math.inf
    strange[2] = -math.inf
    grid = ConfidenceGrid.of(torch.cat([strange, LOG_P]), torch.cat([LABELS[:3], LABELS]))
    assert (grid.n, grid.invalid) == (4000, 3)
    assert torch.equal(grid.counts, GRID.counts)


def test_half_precision_is_raised() -> None:
    half = LOG_P.bfloat16()
    assert same(ConfidenceGrid.of(half, LABELS), ConfidenceGrid.of(half.float(), LABELS))


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match=r"labels in \[0, 10\), got \[-100\]"):
        ConfidenceGrid.of(LOG_P[:2], torch.tensor([1, -100]))
    with pytest.raises(ValueError, match="log_softmax first"):
        ConfidenceGrid.of(torch.randn(50, 10, generator=seeded(0)), LABELS[:50])
    with pytest.raises(ValueError, match=r"got \(3, 10\) and \(2,\)"):
        ConfidenceGrid.of(LOG_P[:3], LABELS[:2])
    with pytest.raises(ValueError, match="a state of 12289 numbers"):
        ConfidenceGrid.load(torch.zeros(49))
    with pytest.raises(ValueError, match="bins=0"):
        GRID.adaptive(0)
    with pytest.raises(ValueError, match=r"coverage in \(0, 1\]"):
        GRID.accuracy_at(0.0)
    with pytest.raises(ValueError, match=r"risk in \[0, 1\]"):
        GRID.coverage_at(1.5)


def test_nothing_counted_is_no_number() -> None:
    nothing = ConfidenceGrid.of(torch.empty(0, 10), torch.empty(0, dtype=torch.long))
    values = (nothing.adaptive(), nothing.aurc, nothing.excess_aurc, nothing.accuracy_at(0.5), nothing.coverage_at(0.1))
    assert all(map(math.isnan, values))
    assert [len(curve) for curve in nothing.risk_coverage()] == [0, 0]


# -- calibration error over bins of equal mass -----------------------------------------------------------------------


def equal_mass(confidence: np.ndarray, right: np.ndarray, bins: int) -> float:
    """Bins that are closed behind the value which fills them to the next m / bins of all."""
    order = np.argsort(confidence, kind="stable")
    confidence, right = confidence[order], right[order]
    ends = {len(confidence)}
    for m in range(1, bins):
        value = confidence[math.ceil(m * len(confidence) / bins) - 1]
        ends.add(int(np.searchsorted(confidence, value, side="right")))
    edges = [0, *sorted(ends)]
    gaps = [abs(confidence[a:b].sum() - right[a:b].sum()) for a, b in itertools.pairwise(edges)]
    return float(sum(gaps) / len(confidence))


@pytest.mark.parametrize("bins", [1, 5, 15, 50])
def test_distinct_confidences_give_bins_of_equal_mass(bins: int) -> None:
    confidence, predicted = (v.numpy() for v in LOG_P.exp().max(1))
    expected = equal_mass(confidence, predicted == LABELS.numpy(), bins)
    assert GRID.adaptive(bins) == pytest.approx(expected, abs=5e-4)  # cells move edges by less than 0.003


def test_the_error_is_that_of_netcal_where_there_are_no_ties() -> None:
    # netcal 1.4.0, ECE(15, equal_intervals=False).measure(p, y) of these float64 probabilities.
    assert GRID.adaptive(15) == pytest.approx(0.12804672044867238, abs=5e-4)


def votes() -> tuple[Tensor, Tensor]:
    """Ten votes a sample, 1000 samples at each share from 6 to 10 tenths: each off by 0.005, up or down."""
    tenths = torch.arange(6, 11).repeat_interleave(1000)
    hits = torch.tensor([605, 695, 805, 895, 995])
    right = torch.cat([torch.arange(1000) < hit for hit in hits])
    return predictions(tenths.double() / 10, right, classes=12)


@pytest.mark.parametrize("order", ["errors first", "errors last", "shuffled"])
def test_the_order_of_tied_votes_means_nothing(order: str) -> None:
    log_p, labels = votes()
    by = {
        "errors first": labels.argsort(descending=True),
        "errors last": labels.argsort(),
        "shuffled": torch.randperm(5000, generator=seeded(0)),
    }[order]
    assert ConfidenceGrid.of(log_p[by], labels[by]).adaptive(15) == pytest.approx(0.0050, abs=1e-12)
    # Bins that split ties by the order of a sort give another number for every order.
    confidence, right = log_p[by].exp().amax(1).numpy(), (labels[by] == 0).numpy()
    sorted_ = np.argsort(confidence, kind="stable")
    parts = zip(np.array_split(confidence[sorted_], 15), np.array_split(right[sorted_], 15), strict=True)
    split = sum(abs(c.sum() - r.sum()) for c, r in parts) / 5000
    assert (split > 0.1) == (order != "shuffled")
    assert split > 0.0051


def test_ties_that_only_nearly_agree_stay_together() -> None:
    log_p, labels = votes()
    rows = torch.cat([log_p, log_p.float().log_softmax(1).double()])
    assert ConfidenceGrid.of(rows, labels.repeat(2)).adaptive(15) == pytest.approx(0.0050, abs=1e-6)


def test_fewer_predictions_than_bins_are_bins_of_their_own() -> None:
    grid = ConfidenceGrid.of(*predictions(torch.tensor([0.9, 0.8, 0.6]).double(), torch.tensor([True, True, False])))
    assert grid.adaptive(15) == pytest.approx((0.1 + 0.2 + 0.6) / 3)


def test_one_prediction_is_enough() -> None:
    grid = ConfidenceGrid.of(*predictions(torch.tensor([0.9]).double(), torch.tensor([False])))
    assert (grid.adaptive(), grid.aurc, grid.accuracy_at(1.0)) == (pytest.approx(0.9), 1.0, 0.0)
    assert (grid.coverage_at(0.5), grid.coverage_at(1.0)) == (0.0, 1.0)


def test_all_equally_sure_is_one_bin() -> None:
    right = torch.arange(100) % 4 > 0
    grid = ConfidenceGrid.of(*predictions(torch.full((100,), 0.7).double(), right))
    assert grid.adaptive() == pytest.approx(0.05)
    assert grid.aurc == pytest.approx(0.25)  # a random order
    assert grid.accuracy_at(0.1) == pytest.approx(0.75)
    assert (grid.coverage_at(0.2), grid.coverage_at(0.25)) == (0.0, 1.0)


# -- risk and coverage -----------------------------------------------------------------------------------------------


def mean_risk(right: np.ndarray) -> float:
    """Of the first 1, 2, ... n."""
    return float(((~right).cumsum() / np.arange(1, len(right) + 1)).mean())


def test_the_area_is_the_mean_risk_of_the_surest() -> None:
    confidence = torch.linspace(0.3, 0.99, 200, dtype=torch.float64)
    right = torch.rand(200, generator=seeded(0)) < confidence
    grid = ConfidenceGrid.of(*predictions(confidence, right))
    assert (grid.counts > 0).sum() == 200
    assert grid.aurc == pytest.approx(mean_risk(right.numpy()[::-1]), rel=1e-12)
    best = mean_risk(np.sort(right.numpy())[::-1])
    assert grid.excess_aurc == pytest.approx(grid.aurc - best, rel=1e-9)


def test_with_ties_it_is_the_mean_over_all_orders() -> None:
    confidence = torch.tensor([0.9, 0.9, 0.8, 0.8, 0.8, 0.8, 0.6, 0.6]).double()
    right = torch.tensor([True, False, True, False, True, True, False, False])
    groups = [right.numpy()[a:b] for a, b in ((0, 2), (2, 6), (6, 8))]
    orders = itertools.product(*(itertools.permutations(group) for group in groups))
    brute = np.mean([mean_risk(np.array(sum(order, ()))) for order in orders])
    grid = ConfidenceGrid.of(*predictions(confidence, right))
    assert grid.aurc == pytest.approx(brute, rel=1e-12)


def test_a_large_group_costs_no_precision() -> None:
    grid = ConfidenceGrid.of(*predictions(torch.tensor([0.9, 0.6]).double(), torch.tensor([True, False])))
    n = 10**7
    large = ConfidenceGrid.load(n * grid.state())
    exact = 0.5 - 0.5 * math.log(2)  # of endless data: the second half has a risk of 1 - n / k
    assert large.aurc == pytest.approx(exact, abs=1e-7)
    assert large.excess_aurc == pytest.approx(0, abs=1e-12)


def test_the_curve_goes_from_the_surest_group_to_all() -> None:
    confidence = torch.tensor([0.9, 0.9, 0.8, 0.8, 0.8, 0.6]).double()
    right = torch.tensor([True, False, True, True, True, False])
    coverage, risk = ConfidenceGrid.of(*predictions(confidence, right)).risk_coverage()
    assert coverage.tolist() == pytest.approx([2 / 6, 5 / 6, 1])
    assert risk.tolist() == pytest.approx([1 / 2, 1 / 5, 1 / 3])


def test_accuracy_at_a_coverage_is_linear_inside_a_group() -> None:
    confidence = torch.tensor([0.9] * 4 + [0.6] * 4).double()
    right = torch.tensor([True] * 4 + [True, False, False, False])
    grid = ConfidenceGrid.of(*predictions(confidence, right))
    assert grid.accuracy_at(0.5) == 1
    assert grid.accuracy_at(0.75) == pytest.approx((4 + 0.5) / 6)
    assert grid.accuracy_at(1.0) == pytest.approx(5 / 8)
    assert grid.accuracy_at(0.01) == 1


@pytest.mark.parametrize("risk", [0.01, 0.1, 0.2, 0.3])
def test_coverage_and_risk_are_inverse_to_each_other(risk: float) -> None:
    coverage = GRID.coverage_at(risk)
    assert 0 < coverage < 1
    assert 1 - GRID.accuracy_at(coverage) == pytest.approx(risk, rel=1e-9)
    assert 1 - GRID.accuracy_at(min(1.0, coverage + 0.002)) > risk


def test_coverage_is_the_largest_where_the_risk_falls_again() -> None:
    confidence = torch.tensor([0.95] * 2 + [0.9] * 18 + [0.5] * 20).double()
    right = torch.tensor([False] * 2 + [True] * 18 + [False] * 20)
    grid = ConfidenceGrid.of(*predictions(confidence, right))
    assert grid.coverage_at(0.1) == pytest.approx(0.5)
    assert grid.coverage_at(0.2) == pytest.approx(22.5 / 40)  # (2 + j) / (20 + j) = 0.2
