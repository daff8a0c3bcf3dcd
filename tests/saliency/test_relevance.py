"""DeepLIFT and LRP by hand on small nets, and refused wherever captum would be wrong without a word."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import DeepLift
from captum.attr._utils.lrp_rules import GammaRule
from saliency.small_nets import (
    PICTURES,
    TABLE,
    TARGET,
    FunctionalCnn,
    ViT,
    cnn,
    mlp,
    rand,
    with_seeded_weights,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.saliency.completeness import completeness
from lightning_robust.saliency.gradients import input_x_gradient
from lightning_robust.saliency.relevance import deep_lift, lrp

Method = Callable[..., Tensor]
both = pytest.mark.parametrize("method", [deep_lift, lrp])


def deep(activation: type[nn.Module] = nn.ReLU, pool: nn.Module | None = None) -> nn.Module:
    """Two activations, each with a pooling right behind it."""
    pool = pool or nn.MaxPool2d(2)
    layers = [
        *(nn.Conv2d(3, 4, 3, padding=1), activation(), copy.deepcopy(pool)),
        *(nn.Conv2d(4, 6, 3, padding=1), activation(), copy.deepcopy(pool)),
        *(nn.Flatten(), nn.Linear(24, 5)),
    ]
    return with_seeded_weights(nn.Sequential(*layers))


def test_deep_lift_is_the_rescale_rule_by_hand() -> None:
    net, base = mlp(), rand(4, 6) / 2
    first, _, second, _, head = net
    multipliers = head.weight[TARGET]
    for layer, before, low in ((second, first(TABLE).relu(), first(base).relu()), (first, TABLE, base)):
        z, z0 = layer(before), layer(low)
        multipliers = (multipliers * (z.relu() - z0.relu()) / (z - z0)) @ layer.weight
    expected = (multipliers * (TABLE - base)).detach()
    maps = deep_lift(net, TABLE, TARGET, module=net, baseline=base)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(deep_lift(net, TABLE, TARGET, module=net, baseline=base, chunk_size=3), expected)


@pytest.mark.filterwarnings("ignore")
def test_deep_lift_is_captums_where_that_is_complete() -> None:
    net = deep(pool=nn.AvgPool2d(2))
    expected = DeepLift(net).attribute(PICTURES, 0.2 * torch.ones_like(PICTURES), TARGET).sum(1).detach()
    torch.testing.assert_close(deep_lift(net, PICTURES, TARGET, module=net, baseline=0.2), expected)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.ELU, nn.Sigmoid, nn.LeakyReLU, nn.Softplus])
def test_deep_lift_adds_up_also_with_pooling_right_behind_activations(activation: type[nn.Module]) -> None:
    """captum alone misses by some ten per cent here: two of its hooks on one tensor run in the wrong order."""
    net = deep(activation)
    maps = deep_lift(net, PICTURES, TARGET, module=net)
    assert float(completeness(net, PICTURES, TARGET, maps).max()) < 1e-3


def test_lrp_is_the_epsilon_rule_by_hand() -> None:
    net, epsilon = mlp(), 0.1
    first, _, second, _, head = net
    hidden = [TABLE, first(TABLE).relu(), second(first(TABLE).relu())]
    hidden[2] = hidden[2].relu()
    relevance = F.one_hot(TARGET, 5) * head(hidden[2])
    for layer, given in zip((head, second, first), reversed(hidden), strict=True):
        z = layer(given)
        relevance = given * ((relevance / (z + epsilon * z.sign())) @ layer.weight)
    torch.testing.assert_close(lrp(net, TABLE, TARGET, module=net, epsilon=epsilon), relevance.detach())


@pytest.mark.parametrize(
    "net", [cnn(), cnn(bias=False), cnn(inplace=True), deep()], ids=["cnn", "no bias", "in place", "deep"]
)
def test_lrp_of_relu_nets_is_input_times_gradient(net: nn.Module) -> None:
    expected = input_x_gradient(net, PICTURES, TARGET)
    maps = lrp(net, PICTURES, TARGET, module=net)
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_lrp_sums_to_the_logit_without_biases_and_else_not() -> None:
    net = cnn(bias=False)
    total = lrp(net, PICTURES, TARGET, module=net).sum((1, 2))
    torch.testing.assert_close(total, net(PICTURES)[range(4), TARGET].detach(), rtol=1e-4, atol=1e-5)
    net = cnn()
    total = lrp(net, PICTURES, TARGET, module=net).sum((1, 2))
    assert not torch.allclose(total, net(PICTURES)[range(4), TARGET].detach(), rtol=0.1)


def test_normalisation_and_other_linear_layers_are_handed_through() -> None:
    layers = [
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.5), nn.AvgPool2d(2)),
        *(nn.Identity(), nn.Flatten(), nn.BatchNorm1d(36), nn.Unflatten(1, (4, 9)), nn.Conv1d(4, 2, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(14, 5)),
    ]
    net = with_seeded_weights(nn.Sequential(*layers))
    expected = input_x_gradient(net, PICTURES, TARGET)
    maps = lrp(net, PICTURES, TARGET, module=net)
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_rule_of_the_users_own_is_used_and_stays_and_weights_keep_their_place() -> None:
    net = cnn()
    rule = GammaRule(gamma=1.0)
    net[0].rule = rule
    weight, place = net[0].weight.clone(), net[0].weight.data_ptr()
    maps = lrp(net, PICTURES, TARGET, module=net)
    assert net[0].rule is rule
    assert torch.equal(net[0].weight, weight)
    assert net[0].weight.data_ptr() == place
    assert not torch.allclose(maps, input_x_gradient(net, PICTURES, TARGET), rtol=0.1)


@both
def test_what_runs_around_the_module_may_only_move_numbers_for_lrp_and_be_linear_for_deep_lift(method: Method) -> None:
    net = cnn()

    def moved(x: Tensor) -> Tensor:
        return net(x.clone().flatten(1).view(x.shape).contiguous())

    torch.testing.assert_close(
        method(moved, PICTURES, TARGET, module=net), method(net, PICTURES, TARGET, module=net), rtol=1e-4, atol=1e-6
    )

    def normalised(x: Tensor) -> Tensor:
        return net((x - 0.5) / 0.25)

    if method is lrp:
        with pytest.raises(ValueError, match=r"functions outside of modules \(sub, div\)"):
            lrp(normalised, PICTURES, TARGET, module=net)
    else:
        maps = deep_lift(normalised, PICTURES, TARGET, module=net)
        assert float(completeness(normalised, PICTURES, TARGET, maps).max()) < 1e-3


@both
def test_modules_that_do_not_run_do_not_count(method: Method) -> None:
    class Bigger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss, self.teacher = cnn(), nn.CrossEntropyLoss(), with_seeded_weights(ViT())

    module = Bigger()
    expected = method(module.net, PICTURES, TARGET, module=module.net)
    assert torch.equal(method(module.net, PICTURES, TARGET, module=module), expected)


class Reused(nn.Module):
    def __init__(self, twice: str) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.relu, self.other, self.twice = nn.ReLU(), nn.ReLU(), twice

    def forward(self, x: Tensor) -> Tensor:
        second = self.first if self.twice == "linear" else self.second
        return self.head((self.relu if self.twice == "relu" else self.other)(second(self.relu(self.first(x)))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.relu, self.head = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.relu(self.inner(x)))


def reused(twice: str) -> nn.Module:
    return with_seeded_weights(Reused(twice))


def test_a_residual_sum_is_complete_for_deep_lift_and_refused_by_lrp() -> None:
    net = with_seeded_weights(Residual())
    maps = deep_lift(net, TABLE, TARGET, module=net)
    assert float(completeness(net, TABLE, TARGET, maps).max()) < 1e-3
    with pytest.raises(ValueError, match=r"functions outside of modules \(add\)"):
        lrp(net, TABLE, TARGET, module=net)


def test_a_module_that_is_used_twice_is_refused_where_it_matters() -> None:
    net = reused("relu")
    with pytest.raises(ValueError, match=r"captum's DeepLift cannot follow Reused: .* more than once"):
        deep_lift(net, TABLE, TARGET, module=net)
    expected = input_x_gradient(net, TABLE, TARGET)
    torch.testing.assert_close(lrp(net, TABLE, TARGET, module=net), expected, rtol=1e-4, atol=1e-5)
    net = reused("linear")
    assert float(completeness(net, TABLE, TARGET, deep_lift(net, TABLE, TARGET, module=net)).max()) < 1e-3
    with pytest.raises(ValueError, match="LRP needs linear modules that run once; used more often: Linear"):
        lrp(net, TABLE, TARGET, module=net)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "functions": (
        lambda: with_seeded_weights(FunctionalCnn()),
        r"functions outside of modules \(relu, max_pool2d, mean\)",
    ),
    "gelu": (lambda: cnn(activation=nn.GELU), "modules GELU"),
    "silu": (lambda: deep(nn.SiLU), "modules SiLU"),
    "attention": (
        lambda: with_seeded_weights(ViT()),
        "modules LayerNorm, MultiheadAttention, ViT and functions outside",
    ),
}


@both
@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_rule_is_refused_by_name_and_leaves_nothing_behind(method: Method, kind: str) -> None:
    make, said = REFUSED[kind]
    net = with_seeded_weights(make())
    attributes = [{name: copy.copy(value) for name, value in vars(part).items()} for part in net.modules()]
    with pytest.raises(ValueError, match=said) as caught:
        method(net, PICTURES, TARGET, module=net)
    assert "Use 'integrated_gradients'" in str(caught.value)
    if method is deep_lift:
        assert "the sum of a map misses f(x) - f(baseline) by " in str(caught.value)
    assert [dict(vars(part)) for part in net.modules()] == attributes


def test_the_tolerance_is_the_callers() -> None:
    net = cnn(activation=nn.GELU)
    maps = deep_lift(net, PICTURES, TARGET, module=net, tolerance=10)
    assert float(completeness(net, PICTURES, TARGET, maps).quantile(0.5)) > 0.05


@both
def test_nothing_is_left_behind_when_the_model_fails(method: Method) -> None:
    net = cnn()
    attributes = [{name: copy.copy(value) for name, value in vars(part).items()} for part in net.modules()]
    calls: list[Any] = []

    def fails(x: Tensor) -> Tensor:
        calls.append(net(x))
        if len(calls) > (method is lrp):
            raise RuntimeError("out of luck")
        return calls[-1]

    with pytest.raises(ValueError, match="cannot follow Sequential: out of luck"):
        method(fails, PICTURES, TARGET, module=net)
    assert [dict(vars(part)) for part in net.modules()] == attributes


def test_what_did_not_run_through_modules_cannot_be_handed_back() -> None:
    with pytest.raises(ValueError, match="and none ran"):
        lrp(lambda x: x[:, :5] * 2, TABLE, TARGET, module=cnn())
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        lrp(mlp(), TABLE, TARGET, module=mlp(), epsilon=0)
