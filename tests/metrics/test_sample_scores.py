"""Per-sample results: any order, any number of processes, and a hash of which samples they are about."""

from __future__ import annotations

import pytest
import torch

from lightning_robust.metrics import SampleScores

X = torch.rand(20, 3)
CLEAN = (torch.arange(20) % 4 != 0).float()
ATTACKED = {"a": (torch.arange(20) % 3 == 0).float(), "b": (torch.arange(20) % 2 == 0).float()}


def scores(rows: list[int], x: torch.Tensor = X) -> SampleScores:
    made = SampleScores(list(ATTACKED), capacity=32)
    for row in rows:  # one at a time: batches of one
        index = torch.tensor([row])
        made.add_clean(index, CLEAN[index], x[index])
        for name, right in ATTACKED.items():
            made.add_attack(name, index, right[index])
    return made


def test_robust_is_what_is_right_without_and_under_every_attack() -> None:
    accuracies = scores(list(range(20))).accuracies()
    both = {name: CLEAN * right for name, right in ATTACKED.items()}
    assert accuracies == {
        "clean_accuracy": pytest.approx(float(CLEAN.mean())),
        "accuracy": pytest.approx(float((both["a"] * both["b"]).mean())),
        "accuracy_a": pytest.approx(float(both["a"].mean())),
        "accuracy_b": pytest.approx(float(both["b"].mean())),
    }


def test_order_means_nothing_and_two_processes_are_one() -> None:
    one, backwards = scores(list(range(20))), scores(list(range(19, -1, -1)))
    summed = SampleScores(list(ATTACKED), capacity=32)
    even, odd = scores(list(range(0, 20, 2))), scores(list(range(1, 20, 2)))
    assert even.size != odd.size
    assert even.size + odd.size <= 64  # room for what came, not for all that may come
    summed.load(even.state(odd.size + even.size) + odd.state(odd.size + even.size))
    for other in (backwards, summed):
        assert other.accuracies() == one.accuracies()
        assert other.sample_ids == one.sample_ids
        assert torch.equal(other.correct("a"), one.correct("a"))
        assert other.n == 20


def test_the_hash_tells_other_samples_and_other_places() -> None:
    changed = X.clone()
    changed[3, 1] += 1e-6
    hashes = {
        scores(rows, x).sample_ids
        for rows, x in (([0, 1, 3], X), ([0, 1, 3], changed), ([0, 1], X), ([1, 3], X), ([0, 2, 3], X))
    }
    assert len(hashes) == 5


def test_samples_that_were_never_seen_do_not_count() -> None:
    made = scores([2, 5, 7])
    assert made.n == len(made.correct()) == 3
    assert made.correct().tolist() == CLEAN[[2, 5, 7]].tolist()
