"""A hash of which samples were measured."""

from __future__ import annotations

import torch

from lightning_robust.attach.sample_ids import fingerprint, joined, split

X = torch.rand(20, 3)


def total(rows: list[int], x: torch.Tensor = X) -> int:
    return sum(fingerprint(i, x[i]) for i in rows)


def test_the_sum_depends_on_content_and_index_but_not_on_order() -> None:
    assert total(list(range(20))) == total(list(range(19, -1, -1)))
    other = X.clone()
    other[3, 1] += 1e-6
    assert total(list(range(20)), other) != total(list(range(20)))
    assert fingerprint(0, X[0]) != fingerprint(1, X[0])


def test_sums_over_processes_are_exact() -> None:
    parts = split(total([0, 2, 4])) + split(total([1, 3]))  # what an all_reduce of doubles does
    assert joined(parts) == total([0, 1, 2, 3, 4])
