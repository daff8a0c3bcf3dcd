"""Watching loss calls, stopping at one, and being quiet meanwhile."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import LossWatcher, ProbeError, Stop, quiet, run_until_stop

X, Y = torch.randn(4, 10), torch.arange(4)


def test_watching_returns_what_would_have_been_returned_anyway() -> None:
    with LossWatcher() as watcher:
        watched = F.cross_entropy(X, Y)
    assert torch.equal(watched, F.cross_entropy(X, Y))
    assert watcher.call is not None
    assert watcher.call.logits is X


def test_loss_calls_are_counted_and_the_wanted_one_is_kept() -> None:
    with LossWatcher(index=1) as watcher:
        F.cross_entropy(X, Y)
        nn.NLLLoss()(X, Y)
        nn.BCEWithLogitsLoss()(X, X.sigmoid())
    assert watcher.count == 3
    assert watcher.call is not None
    assert watcher.call.kind == "nll_loss"


def test_stopping_is_not_caught_by_code_that_catches_exceptions() -> None:
    reached = []

    def step() -> None:
        try:
            F.cross_entropy(X, Y)
        except Exception:
            reached.append("handler")
        reached.append("after")

    with pytest.raises(Stop), LossWatcher(stop=True):
        step()
    assert reached == []


def test_a_step_that_turns_its_input_into_numbers_can_be_read() -> None:
    x = torch.ones(4, 10, requires_grad=True)
    with LossWatcher(stop=True):
        seen = [x.numpy().sum(), float(x.sum()), int(x.sum()), x.sum().item(), sum(map(sum, x.tolist()))]
    assert seen == [40] * 5


def test_the_last_softmax_is_the_hint_for_a_loss_written_by_hand() -> None:
    with LossWatcher() as watcher:
        torch.sigmoid(X[:, 0])
        -X.log_softmax(1).gather(1, Y[:, None]).mean()
    assert watcher.call is None
    assert watcher.hint is not None
    assert watcher.hint.startswith("log_softmax of a tensor (4, 10) in test_the_last_softmax")


def test_a_quiet_module_logs_nothing_and_trains_nothing() -> None:
    module = zoo.ListBatch()
    before = set(vars(module))
    with quiet(module, training=False, keep_buffers=False):
        module.log("loss", torch.zeros(()))  # without a Trainer this would raise
        module.log_dict({"a": 1})
        with pytest.raises(ProbeError, match="manual_backward"):
            module.manual_backward(torch.zeros(()))
        assert not module.training
    assert set(vars(module)) == before
    assert module.training


def test_a_step_ends_at_the_watched_loss() -> None:
    module, watcher = zoo.ListBatch().eval(), LossWatcher(stop=True)
    run_until_stop(Step.of(module, "training_step", zoo.ListBatch.batch(4), 0), watcher)
    assert watcher.call is not None
    assert watcher.call.logits.shape == (4, 10)
    assert torch.overrides._get_current_function_mode_stack() == []
