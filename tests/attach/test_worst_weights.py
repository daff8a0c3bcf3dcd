"""Weights that move up the gradient by a share of their own length, and come back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_robust.attach.worst_weights import at_worst_weights, steepest_weights


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Linear(2, 2))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_gradient_is_that_of_the_loss_summed_over_processes(processes: int) -> None:
    module, x = net(), torch.randn(5, 4)
    loss = module[2](module[1](module[0](x))).square().mean()  # the last layer takes no part
    weights = [module[0].weight, module[2].weight, module[3].weight]
    expected = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    # The other process is taken to have the same batch.
    strategy = SimpleNamespace(reduce=lambda gradient, reduce_op: gradient * processes)
    found = steepest_weights(loss, module, SimpleNamespace(world_size=processes, strategy=strategy))
    for gradient, right in zip(found, expected, strict=True):
        whole = torch.zeros(2, 2) if right is None else right * processes
        torch.testing.assert_close(gradient / gradient.norm().clamp_min(1e-9), whole / whole.norm().clamp_min(1e-9))


def test_weights_move_by_their_share_and_come_back_to_the_last_bit() -> None:
    module = net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    gradients = [torch.randn_like(module[i].weight) for i in (0, 2, 3)]

    def fails() -> None:
        with at_worst_weights(module, gradients, 0.01):
            for i, gradient in zip((0, 2, 3), gradients, strict=True):
                delta = module[i].weight - before[f"{i}.weight"]
                torch.testing.assert_close(delta.norm(), 0.01 * before[f"{i}.weight"].norm(), rtol=1e-3, atol=0)
                torch.testing.assert_close(delta / delta.norm(), gradient / gradient.norm(), rtol=1e-3, atol=1e-4)
                assert torch.equal(module[i].bias, before[f"{i}.bias"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
