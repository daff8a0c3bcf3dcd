"""Accumulated and clipped gradients of every training method, against autograd written out by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from steps_by_hand import assert_steps_equal, gradient_by_hand
from torch import Tensor
from trainer_runs import METHODS, Net, data, defence


def taken_away(method: str, batches: int, **settings: Any) -> tuple[Any, list[Tensor]]:
    """The module before, and what the first optimizer step took away from each parameter."""
    module = zoo.built(Net)
    before = copy.deepcopy(module)
    trainer = zoo.trainer(callbacks=defence(method), max_steps=1, **settings)
    trainer.fit(module, data(16 * batches))
    assert trainer.global_step == 1
    return before, [
        old.detach() - new.detach() for old, new in zip(before.parameters(), module.parameters(), strict=True)
    ]


@pytest.mark.parametrize("accumulate", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_takes_the_mean_of_the_gradients_of_its_batches(method: str, accumulate: int) -> None:
    before, found = taken_away(method, 4, accumulate_grad_batches=accumulate)
    batches = list(data(16 * 4))
    assert_steps_equal(found, gradient_by_hand(copy.deepcopy(before), method, batches[:accumulate], accumulate))


@pytest.mark.parametrize("method", METHODS)
def test_the_batches_left_at_the_end_of_an_epoch_are_a_step_of_their_own(method: str) -> None:
    before, found = taken_away(method, 2, accumulate_grad_batches=3)
    # Lightning divides by three here too.
    assert_steps_equal(found, gradient_by_hand(before, method, list(data(32)), 3))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_clipped_is_the_whole_accumulated_gradient(method: str, algorithm: str) -> None:
    limit = {"norm": 0.3, "value": 0.02}[algorithm]
    settings = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    before, found = taken_away(method, 2, accumulate_grad_batches=2, **settings)
    whole = gradient_by_hand(before, method, list(data(32)), 2)
    norm = float(torch.cat([g.flatten() for g in whole]).norm())
    largest = max(float(g.abs().max()) for g in whole)
    assert norm > limit if algorithm == "norm" else largest > limit
    expected = [g * limit / norm if algorithm == "norm" else g.clamp(-limit, limit) for g in whole]
    assert_steps_equal(found, expected)
