"""The same probes whatever the order, the batches and the processes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from lightning_robust.randomness import RandomState, seeded
from lightning_robust.saliency.probe_set import Candidates, Choice, Largest, Listed, ProbeSet, Stratified

N = 500
INDEX = torch.arange(N)
X = torch.rand(N, 2, 3, generator=seeded(0))


def labels(classes: int) -> Tensor:
    return torch.randint(classes, (N,), generator=seeded(1, classes))


def fed(rows: Tensor, label: Tensor, n: int = 12, batch: int = 50, seed: int = 0) -> Candidates:
    candidates = Candidates(Stratified(n, seed))
    for part in rows.split(batch):
        candidates.offer(INDEX[part], label[part], X[part])
        assert len(list(candidates.choice.held())) <= 2 * n
    return candidates


def merged(choice: Choice, *parts: Candidates) -> ProbeSet:
    """What several processes chose together, through tables of numbers."""
    everything, shapes = Candidates(choice), (X.shape[1:], torch.Size([0]))
    for part in parts:
        everything.read(part.table(*shapes), *shapes)
    return everything.chosen()


def same(a: ProbeSet, b: ProbeSet) -> bool:
    return a.hash == b.hash and all(torch.equal(*pair) for pair in ((a.index, b.index), (a.label, b.label), (a.x, b.x)))


@pytest.mark.parametrize("classes", [1, 2, 5, 10, 40])
@pytest.mark.parametrize("n", [1, 7, 12])
def test_batches_order_and_processes_mean_nothing(n: int, classes: int) -> None:
    label = labels(classes)
    expected = fed(INDEX, label, n).chosen()
    assert len(expected) == n
    for batch in (1, 7, 101):
        assert same(fed(INDEX, label, n, batch).chosen(), expected)
    shuffled = torch.randperm(N, generator=seeded(2))
    assert same(fed(shuffled, label, n).chosen(), expected)
    halves = [fed(INDEX[start::2], label, n, batch=13) for start in (0, 1)]
    for one, other in (halves, halves[::-1]):
        assert same(merged(Stratified(n, seed=0), one, other), expected)


@pytest.mark.parametrize(("n", "classes", "shares"), [(12, 4, [3] * 4), (12, 5, [2, 2, 2, 3, 3]), (8, 40, [1] * 8)])
def test_classes_have_equal_shares(n: int, classes: int, shares: list[int]) -> None:
    chosen = fed(INDEX, labels(classes), n).chosen()
    assert sorted(Counter(chosen.label.tolist()).values()) == shares


def test_probes_are_the_samples_themselves_sorted_by_class_and_index() -> None:
    label = labels(3)
    chosen = fed(INDEX, label).chosen()
    assert torch.equal(chosen.x, X[chosen.index])
    assert torch.equal(chosen.label, label[chosen.index])
    places = list(zip(chosen.label.tolist(), chosen.index.tolist(), strict=True))
    assert places == sorted(set(places))


def test_every_sample_has_the_same_chance() -> None:
    label, times = INDEX % 2, torch.zeros(N)
    for seed in range(200):
        times[fed(INDEX, label, n=50, batch=N, seed=seed).chosen().index] += 1
    # Each is chosen with probability .1: the variance over samples of a binomial of 200 is 18.
    assert float(times.sum()) == 200 * 50
    assert float(times.var()) == pytest.approx(18, rel=0.25)


def test_another_seed_picks_other_samples_and_other_classes() -> None:
    first, second = (fed(INDEX, labels(40), seed=seed).chosen() for seed in (0, 1))
    assert set(first.label.tolist()) != set(second.label.tolist())
    assert first.hash != second.hash


def test_of_fewer_samples_than_places_all_are_taken() -> None:
    label = torch.tensor([3, 1, 1, 3, 2])
    chosen = fed(INDEX[:5], label, n=12).chosen()
    assert chosen.index.tolist() == [1, 2, 4, 0, 3]


def test_a_rare_class_is_in_and_leaves_the_rest_of_its_share_empty() -> None:
    label = (INDEX == 250).long()
    chosen = fed(INDEX, label, n=8).chosen()
    assert chosen.label.tolist() == [0, 0, 0, 0, 1]
    assert int(chosen.index[-1]) == 250


def test_of_nothing_the_choice_is_nothing() -> None:
    empty, other = Candidates(Stratified(4, 0)), fed(INDEX, labels(3), n=4)
    assert len(empty.chosen()) == 0
    assert same(merged(Stratified(4, 0), empty, other), other.chosen())


def test_a_sample_that_comes_twice_counts_once() -> None:
    label = labels(2)
    assert same(fed(torch.cat([INDEX, INDEX[:40]]), label).chosen(), fed(INDEX, label).chosen())


def test_what_is_held_is_a_copy_that_survives_the_batch_and_can_be_differentiated() -> None:
    candidates = Candidates(Stratified(2, 0))
    with torch.inference_mode():
        x = torch.ones(2, 3)
        candidates.offer(torch.arange(2), torch.zeros(2), x)
        x.zero_()
        chosen = candidates.chosen()
    assert torch.equal(chosen.x, torch.ones(2, 3))
    assert not chosen.x.requires_grad_().pow(2).sum().is_inference()
    assert all(sample.x.untyped_storage().nbytes() == 3 * 4 for sample in candidates.choice.held())


def test_the_hash_tells_contents_places_and_names() -> None:
    index, label, x = torch.arange(3), torch.tensor([0, 0, 1]), X[:3]
    changed = x.clone()
    changed[1, 0, 0] += 1e-6
    sets = [ProbeSet(index, label, x), ProbeSet(index + 1, label, x), ProbeSet(index, 1 - label, x)]
    hashes = {probes.hash for probes in [*sets, ProbeSet(index, label, changed)]}
    assert len(hashes) == 4
    assert {len(text) for text in hashes} == {16}


def test_global_random_streams_are_left_alone() -> None:
    random = RandomState.capture()
    assert fed(INDEX, labels(3)).chosen().hash
    assert random.is_current()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample, got n=0"):
        Stratified(0, 0)
    with pytest.raises(ValueError, match="at least one sample, got n=0"):
        Listed([])
    with pytest.raises(ValueError, match=r"each of 3 samples, got \(3,\), \(2,\) and \(3,\)"):
        Candidates(Stratified(4, 0)).offer(INDEX[:3], INDEX[:2], X[:3])


SCORE = torch.randn(N, generator=seeded(3))


@pytest.mark.parametrize("batch", [1, 7, 101])
def test_the_largest_scores_are_those_of_a_sort_whatever_the_batches_and_processes(batch: int) -> None:
    parts = []
    for start in (0, 1):
        parts.append(Candidates(Largest(9)))
        for rows in INDEX[start::2].split(batch):
            parts[-1].offer(rows, labels(3)[rows], X[rows], SCORE[rows])
    expected = SCORE.argsort(descending=True)[:9]
    for pair in (parts, parts[::-1]):
        found = merged(Largest(9), *pair)
        assert torch.equal(found.index, expected)
        assert torch.equal(found.x, X[expected])


def test_a_score_that_is_not_finite_is_no_rank() -> None:
    score = torch.tensor([float("inf"), 1.0, float("nan"), -float("inf")])
    candidates = Candidates(Largest(4))
    candidates.offer(INDEX[:4], INDEX[:4], X[:4], score)
    assert candidates.chosen().index.tolist() == [1]


def test_listed_samples_come_in_the_order_of_the_list_and_missing_ones_are_left_out() -> None:
    candidates = Candidates(Listed([30, 4, 10_000, 4]))
    for rows in INDEX.flip(0).split(50):
        candidates.offer(rows, labels(3)[rows], X[rows])
    assert candidates.chosen().index.tolist() == [30, 4]


def test_masks_travel_with_their_samples() -> None:
    masks = (X[:, 0] > 0.5).float()
    parts = [Candidates(Stratified(6, 0)) for _ in range(2)]
    for start, part in enumerate(parts):
        rows = INDEX[start::2]
        part.offer(rows, labels(3)[rows], X[rows], region=masks[rows])
    everything, shapes = Candidates(Stratified(6, 0)), (X.shape[1:], masks.shape[1:])
    for part in parts:
        everything.read(part.table(*shapes), *shapes)
    found = everything.chosen()
    assert found.region is not None
    assert torch.equal(found.region, masks[found.index])
    assert fed(INDEX, labels(3)).chosen().region is None
