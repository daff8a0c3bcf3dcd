from __future__ import annotations

import random
from collections import deque
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.aggregation import CatMetric

from lightning_robust.modes import frozen, gradients


class Meddler(nn.Module):
    """Everything that a training step may touch, touched by `meddle`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.backbone = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.backbone.eval().requires_grad_(False)
        self.metric, self.in_a_list = MeanMetric(), [CatMetric()]
        self.ema = torch.zeros(2)
        self.count, self.outputs, self.recent = 0, [torch.ones(1)], deque([1, 2], maxlen=2)
        self.log, self.seen = {"steps": [1]}, {7}

    def meddle(self, x: Tensor) -> Tensor:
        loss: Tensor = self.net(self.backbone(x)).square().sum()
        self.metric.update(loss.detach())
        self.in_a_list[0].update(loss.detach())
        self.ema += 1
        self.ema_copy, self.count = self.ema.clone(), self.count + 1
        self.outputs.append(loss)
        self.recent.append(3)
        self.log["steps"].append(2)
        self.log["new"] = []
        self.seen |= {8}
        self.outputs, self.kept = [], self.outputs
        self.net[0].weight.requires_grad_(False)
        self.backbone.requires_grad_(True).train()
        np.random.rand(), random.random(), torch.rand(1)
        return loss


def everything(module: Meddler) -> dict[str, Any]:
    """What can be seen of a module and of the random streams, as plain values."""
    return {
        "flags": [m.training for m in module.modules()],
        "buffers": {k: v.tolist() for k, v in module.named_buffers()},
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in module.parameters()],
        "attributes": sorted(module.__dict__),
        "objects": [id(o) for o in (module.ema, module.outputs, module.recent, module.log, module.log["steps"])],
        "values": [module.count, module.ema.tolist(), [t.tolist() for t in module.outputs], list(module.recent)],
        "containers": [dict(module.log), list(module.log["steps"]), set(module.seen), module.recent.maxlen],
        "metrics": [module.metric.update_count, module.metric.mean_value.tolist(), module.in_a_list[0].update_count],
        "list state": list(module.in_a_list[0].value),
        "random": [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()],
    }


@pytest.fixture
def used() -> Meddler:
    """A module in train mode with a frozen backbone, with gradients from an earlier batch."""
    module = Meddler()
    module.train()
    module.backbone.eval()
    module.net(module.backbone(torch.randn(4, 3))).sum().backward()
    return module


@pytest.mark.parametrize("training", [False, True, None])
def test_nothing_that_a_step_touches_stays_touched(used: Meddler, training: bool | None) -> None:
    before = everything(used)
    with frozen(used, training=training):
        used.meddle(torch.randn(4, 3)).backward()
        assert everything(used) != before
    assert everything(used) == before


def test_nothing_stays_touched_when_an_exception_flies(used: Meddler) -> None:
    before = everything(used)
    with pytest.raises(ZeroDivisionError), frozen(used):
        _ = used.meddle(torch.randn(4, 3)) / (1 // 0)
    assert everything(used) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_under_the_validation_loop_and_nothing_stays_touched(
    used: Meddler, mode: type[AbstractContextManager[None]]
) -> None:
    before = everything(used)
    with mode():
        with frozen(used):
            x = torch.randn(4, 3, requires_grad=True)
            (gradient,) = torch.autograd.grad(used.meddle(x), x)
            assert float(gradient.abs().sum()) > 0
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert everything(used) == before


def test_inside_every_module_is_in_the_asked_mode(used: Meddler) -> None:
    with frozen(used):
        assert not any(m.training for m in used.modules())
    with frozen(used, training=True):
        assert all(m.training for m in used.modules())
    flags = [m.training for m in used.modules()]
    with frozen(used, training=None):
        assert [m.training for m in used.modules()] == flags


def test_a_frozen_batch_norm_in_a_training_net_stays_in_eval_mode_afterwards(used: Meddler) -> None:
    for training in (False, True, None):
        with frozen(used, training=training):
            pass
        assert used.net[1].training
        assert not used.backbone[1].training


def test_gradients_of_a_foreign_backward_never_reach_the_accumulated_ones(used: Meddler) -> None:
    tensors = [p.grad for p in used.parameters()]
    values = [None if g is None else g.clone() for g in tensors]
    with frozen(used):
        assert all(p.grad is None for p in used.parameters())
        for _ in range(3):
            used.net(torch.randn(4, 3)).sum().backward()
        used.zero_grad(set_to_none=False)
    for parameter, tensor, value in zip(used.parameters(), tensors, values, strict=True):
        assert parameter.grad is tensor
        if tensor is not None:
            assert torch.equal(tensor, value)


def test_buffers_may_be_kept_and_then_only_they_change(used: Meddler) -> None:
    twin, x = Meddler(), torch.randn(4, 3)
    twin.load_state_dict(used.state_dict())
    twin.train()
    twin.net(x)
    flags = [m.training for m in used.modules()]
    with frozen(used, training=True, keep_buffers=True):
        used.net(x)
    assert torch.equal(used.net[1].running_mean, twin.net[1].running_mean)
    assert torch.equal(used.net[1].running_var, twin.net[1].running_var)
    assert int(used.net[1].num_batches_tracked) == 2
    assert [m.training for m in used.modules()] == flags
    assert used.ema.tolist() == [0, 0]


def test_buffers_that_were_replaced_are_the_old_objects_again() -> None:
    net = nn.BatchNorm1d(2)
    mean = net.running_mean
    with frozen(net):
        net.running_mean = torch.ones(2)
        net.register_buffer("extra", torch.ones(1))
        net.register_forward_hook(lambda *_: None)
        net.add_module("child", nn.Linear(1, 1))
    assert net.running_mean is mean
    assert sorted(net.state_dict()) == ["bias", "num_batches_tracked", "running_mean", "running_var", "weight"]
    assert not net._forward_hooks
    assert not list(net.children())


def test_buffers_made_in_inference_mode_are_restored_too() -> None:
    with torch.inference_mode():
        buffer = torch.zeros(2)
    net = nn.Linear(2, 2)
    net.register_buffer("seen", buffer)
    with frozen(net), torch.inference_mode():
        net.seen.add_(1)
    assert net.seen.tolist() == [0, 0]


def test_a_parameter_made_in_inference_mode_raises_and_nothing_stays_touched() -> None:
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    with pytest.raises(RuntimeError, match=r"parameter of Sequential was created under torch\.inference_mode"):
        frozen(net).__enter__()
    assert all(m.training for m in net.modules())


def test_the_random_state_at_entry_can_be_replayed() -> None:
    net = nn.Dropout(0.5)
    with frozen(net, training=True) as state:
        first = net(torch.ones(100))
        state.restore()
        assert torch.equal(net(torch.ones(100)), first)
    assert torch.equal(net(torch.ones(100)), first)


@pytest.mark.parametrize("training", [False, True], ids=["ours in eval", "ours in train"])
@pytest.mark.parametrize("theirs", [False, True], ids=["theirs in eval", "theirs in train"])
def test_a_graph_built_before_can_be_backpropagated_after(theirs: bool, training: bool) -> None:
    """The step's own forward, our forwards, the step's backward: the gradients are those of the step alone."""
    net, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 3)
    net.train(theirs)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    loss = net(x).square().sum()
    with frozen(net, training=training):
        net(torch.randn(8, 3)).sum().backward()
    loss.backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)


def test_shared_and_cyclic_structures_are_no_trap() -> None:
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, shared)
    net[0].parent_in_a_list = [net]
    net.loop = [1]
    net.loop.append(net.loop)
    with frozen(net):
        net.loop.clear()
    assert net.loop[0] == 1
    assert net.loop[1] is net.loop


def test_inference_tensors_can_be_differentiated_inside_gradients() -> None:
    with torch.inference_mode():
        x, y = torch.arange(3.0), torch.tensor([2, 0, 1])
        with gradients(x, y) as (leaf, target):
            leaf.requires_grad_()
            loss = nn.functional.cross_entropy(leaf.repeat(3, 1), target, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient, 3 * torch.arange(3.0).softmax(0) - 1)
    assert x.is_inference()


def test_gradients_leaves_the_callers_tensor_out_of_the_graph() -> None:
    weight = torch.ones(2, requires_grad=True)
    x = weight * 2
    with torch.no_grad(), gradients(x) as (leaf,):
        leaf.requires_grad_().sum().backward()
    assert leaf.grad is not None
    assert weight.grad is None
    assert torch.equal(x, leaf)
