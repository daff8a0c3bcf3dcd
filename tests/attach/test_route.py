"""Recognising where logits and targets are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.attach.route import Route, outputs_into, producer_of, target_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def producer(net: nn.Module, run: object) -> str | None:
    outputs: dict[str, list[Tensor]] = {}
    with outputs_into(outputs, net):
        logits = run(net)  # type: ignore[operator]  # a small function of the test
    return producer_of(logits, outputs)


X = torch.rand(3, 4)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda net: net(X), "head"),  # the outermost submodule; the module itself comes last
        (lambda net: net.head[0](net.body(X)), "head.0"),
        (lambda net: net(X).view(3, 2, 3), "head"),  # a view of the same memory
        (lambda net: net(X) * 2, None),
        (lambda net: (net(X), net(X))[1], None),  # ran twice: which of the two?
    ],
)
def test_the_module_whose_output_is_the_logits_is_found(run: object, name: str | None) -> None:
    net = Net()
    assert producer(net, run) == name
    assert not any(part._forward_hooks for part in net.modules())


def test_a_flat_network_is_its_own_producer() -> None:
    assert producer(nn.Linear(4, 2), lambda net: net(X)) == ""


def test_a_target_is_a_leaf_only_as_it_stands() -> None:
    batch = {"x": X, "y": torch.arange(3)}
    fed = {"x": X.clone(), "y": torch.arange(3)}
    assert target_of(fed["y"], batch, fed) == ("y",)
    assert target_of(fed["y"].view(3), batch, fed) == ("y",)
    assert target_of(fed["y"].float(), batch, fed) is None
    assert target_of(fed["y"] + 0, batch, fed) is None
    fed["y"].add_(1)  # a step that shifts its labels in place
    assert target_of(fed["y"], batch, fed) is None


@pytest.mark.parametrize("target", [None, (1, "label")])
def test_a_route_is_plain_data_and_comes_back(target: tuple[int, str] | None) -> None:
    route = Route("training_step", (0, "image"), target, "nll_loss", "net.head", stop_at_module=True)
    plain = route.to_dict()
    assert plain["input"] == [0, "image"]
    assert Route.from_dict(plain) == route
