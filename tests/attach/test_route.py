"""Recognising where logits and targets are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.attach.route import Route, outputs_into, producer_of, target_of
from lightning_robust.attach.watcher import Followed, LossWatcher
from lightning_robust.losses import LossCall


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


def target(loss_kind: Any, target: Tensor, batch: Any, fed: Any, logits: Tensor | None = None) -> Any:
    followed = {id(target): (("y",), target)} if target.shape != (3,) else {}
    return target_of(LossCall(loss_kind, torch.zeros(3, 4) if logits is None else logits, target), batch, fed, followed)


def test_a_target_is_a_leaf_as_it_stands() -> None:
    batch = {"x": X, "y": torch.arange(3)}
    fed = {"x": X.clone(), "y": torch.arange(3)}
    assert target("cross_entropy", fed["y"], batch, fed) == (("y",), False)
    assert target("cross_entropy", fed["y"].view(3), batch, fed) == (("y",), False)
    assert target("cross_entropy", fed["y"].clone(), batch, fed) == (None, False)  # equal, perhaps by chance
    fed["y"].add_(1)  # a step that shifts its labels in place
    assert target("cross_entropy", fed["y"], batch, fed) == (None, False)


@pytest.mark.parametrize("cast", [lambda y: y.float().unsqueeze(1), lambda y: y[:, None].double()])
def test_a_target_may_be_a_leaf_in_another_shape_and_type(cast: Callable[[Tensor], Tensor]) -> None:
    batch = {"x": X, "y": torch.tensor([0, 1, 1])}
    kind = "binary_cross_entropy_with_logits"
    assert target(kind, cast(batch["y"]), batch, batch, torch.zeros(3, 1)) == (("y",), True)
    assert target(kind, 1 - cast(batch["y"]), batch, batch, torch.zeros(3, 1)) == (None, False)


def test_what_casts_and_views_make_of_a_leaf_is_followed() -> None:
    y = torch.tensor([0, 1, 1])
    followed: Followed = {id(y): (("y",), y)}
    with LossWatcher(stop=True, followed=followed):
        cast = y.to(torch.float32)[:, None].view(-1, 1).clone()
        other = (y > 0).float()[:, None]
    assert followed[id(cast)][0] == ("y",)
    assert id(other) not in followed


def test_a_module_whose_output_is_written_into_is_no_producer() -> None:
    net = nn.Sequential(nn.Linear(4, 3))

    def masked(net: nn.Module) -> Tensor:
        logits = net(X)
        logits[:, 1:] -= 5
        return logits

    assert producer(net, masked) is None


def test_a_transposed_view_is_not_the_modules_output() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    assert producer(net, lambda net: net(X).t()) is None  # 3 x 3: the shapes agree, the numbers do not
    assert producer(net, lambda net: net(X)[:, :, None]) == "0"


@pytest.mark.parametrize("target", [None, (1, "label")])
def test_a_route_is_plain_data_and_comes_back(target: tuple[int, str] | None) -> None:
    route = Route("training_step", (0, "image"), target, "nll_loss", "net.head", True, (3,), True)
    plain = route.to_dict()
    assert plain["input"] == [0, "image"]
    assert Route.from_dict(plain) == route
