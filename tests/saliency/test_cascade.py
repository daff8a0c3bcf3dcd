"""Nets lose their weights from the output down, and methods that take no notice are called out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from saliency.known_nets import HONEST, bits, edges, in_pieces, methods, net_of, trained
from saliency.small_nets import rand
from torch import Tensor, nn

from lightning_robust.randomness import RandomState
from lightning_robust.saliency import gradient
from lightning_robust.saliency.cascade import cascading_randomisation
from lightning_robust.saliency.sanity import insensitive, noise_floor, null_similarity


@pytest.mark.parametrize("name", HONEST)
def test_methods_that_depend_on_the_weights_pass(name: str) -> None:
    net, x, _ = trained()
    found = cascading_randomisation(net, methods()[name], x)
    assert not found.insensitive
    assert found.steps[-1].similarity["iou10"] < 0.35 < found.floor["iou10"]


@pytest.mark.parametrize("name", ["edges", "edges of a net that runs"])
def test_methods_that_ignore_the_weights_are_called_out(name: str) -> None:
    net, x, _ = trained()
    found = cascading_randomisation(net, methods()[name], x)
    assert found.insensitive
    assert all(step.similarity["iou10"] == 1 for step in found.steps)


@pytest.mark.parametrize("name", ["gradient", "edges"])
def test_the_verdict_is_that_on_the_last_step_and_the_floor(name: str) -> None:
    net, x, _ = trained()
    found = cascading_randomisation(net, methods()[name], x)
    assert found.insensitive is insensitive(found.steps[-1].similarity, found.floor)


def test_empty_maps_of_both_nets_are_no_sign_of_insensitivity() -> None:
    net, x, _ = trained()
    maps = methods()["gradcam"](x)
    filled = int((maps.flatten(1).amax(1) > 0).sum())
    assert 0 < filled < len(x)
    found = cascading_randomisation(net, methods()["gradcam"], x)
    assert found.samples == filled
    nothing = cascading_randomisation(net, lambda x: torch.zeros_like(x[:, 0]), x)
    assert (nothing.samples, nothing.insensitive) == (0, False)
    assert math.isnan(nothing.floor["iou10"])
    assert str(nothing).endswith("unknown: the maps of the intact net are constant, for every sample.")


def test_the_cascade_goes_from_the_output_down_and_ends_at_the_null() -> None:
    net, x, _ = trained()
    explain = methods()["gradient"]
    found = cascading_randomisation(net, explain, x)
    assert [step.layers for step in found.steps] == [("7",), ("4",), ("3",), ("1",), ("0",)]
    assert found.samples == len(x)
    assert found.floor == noise_floor(net, explain, x)
    assert found.steps[0].similarity == null_similarity(net, explain, x, only="7")
    assert found.steps[1].similarity == null_similarity(net, explain, x, only=["7", "4"])
    assert found.steps[-1].similarity == null_similarity(net, explain, x)


def test_few_stages_take_several_layers_at_once() -> None:
    net, x, _ = trained()
    found = cascading_randomisation(net, methods()["gradient"], x, stages=2)
    assert [step.layers for step in found.steps] == [("7", "4"), ("3", "1", "0")]
    assert len(cascading_randomisation(net, methods()["gradient"], x, stages=99).steps) == 5


class OutOfOrder(nn.Module):
    """The head is registered first; attention uses a projection that it never calls; a token belongs to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.embed = nn.Linear(4, 8)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.view(len(x), -1, 4)) + self.token
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        out: Tensor = self.head(mixed.mean(1))
        return out


def test_layers_come_in_the_order_in_which_they_run_not_in_which_they_are_registered() -> None:
    net, x, y = OutOfOrder().eval(), rand(4, 16), torch.tensor([0, 1, 2, 0])
    found = cascading_randomisation(net, lambda x: gradient(net, x, y), x)
    layers = [step.layers[0] for step in found.steps]
    assert layers == ["head", "attention.out_proj", "attention", "unused", "embed", ""]


def test_layers_that_are_never_called_come_in_the_order_of_registration() -> None:
    net, x = net_of().eval(), rand(2, 1, 8, 8)
    found = cascading_randomisation(net, lambda x: x[:, 0] * net[0].weight.sum(), x)
    assert [step.layers[0] for step in found.steps] == ["7", "4", "3", "1", "0"]


def test_measuring_leaves_no_trace_on_the_module_and_on_random_streams() -> None:
    net, x = copy.deepcopy(trained()[0]).train(), trained()[1]
    net[7].weight.grad = torch.ones_like(net[7].weight)
    net[3].eval()
    before, modes = bits(net), [part.training for part in net.modules()]

    def explain(x: Tensor) -> Tensor:
        assert [part.training for part in net.modules()] == modes  # the caller's
        torch.rand(3)
        x = x.requires_grad_()
        (slopes,) = torch.autograd.grad(net(x).square().sum(), x)
        return slopes[:, 0]

    state = RandomState.capture()
    for measure in (null_similarity, noise_floor, cascading_randomisation):
        measure(net, explain, x)
        assert bits(net) == before
        assert state.is_current()
    assert [part.training for part in net.modules()] == modes
    assert torch.equal(net[7].weight.grad, torch.ones_like(net[7].weight))
    assert not any(part._forward_pre_hooks for part in net.modules())


def test_an_exception_in_a_method_leaves_no_trace() -> None:
    net, x, _ = trained()
    before, calls = bits(net), []

    def explain(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("in the second step")
        return x[:, 0]

    with pytest.raises(RuntimeError, match="in the second step"):
        cascading_randomisation(net, explain, x)
    assert bits(net) == before
    assert not any(part._forward_pre_hooks for part in net.modules())


def test_the_cascade_prints_as_a_markdown_table() -> None:
    net, x, _ = trained()
    lines = str(cascading_randomisation(net, edges, x)).splitlines()
    assert (
        lines[0] == "| permuted, from the output down (48 samples) | iou10 | cosine | spearman | ssim | centre_shift |"
    )
    assert lines[1] == "|---|---:|---:|---:|---:|---:|"
    assert lines[2] == "| 7 | 1.00 | 1.00 | 1.00 | 1.00 | 0.00 |"
    assert lines[3].startswith("| + 4 | 1.00 |")
    assert lines[7].startswith("| none (noise on the inputs) | 0.")
    assert lines[-1].startswith("**insensitive**: ")
    assert str(cascading_randomisation(net, methods()["gradient"], x)).endswith("fine: maps change with the weights.")


def test_what_cannot_be_taken_apart_is_refused() -> None:
    _, x, _ = trained()
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        cascading_randomisation(nn.ReLU(), edges, x)
    with pytest.raises(ValueError, match=r"stages=\) must be at least 1, or None for all layers; got 0"):
        cascading_randomisation(trained()[0], edges, x, stages=0)


def test_weights_in_pieces_are_refused_before_anything_is_touched() -> None:
    module = in_pieces()
    before = bits(module)
    with pytest.raises(RuntimeError, match=r"1.weight of Sequential lies in pieces"):
        cascading_randomisation(module, lambda x: x, rand(2, 3))
    assert bits(module) == before
