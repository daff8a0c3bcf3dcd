"""What cannot be trained is told before training, with what to do: real causes, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients, Saliency
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lightning_robust.penalties import (
    AttributionPrior,
    InputGradientPenalty,
    JacobianPenalty,
    RightReasons,
    SaliencyConsistency,
    SaliencyGuided,
)
from lightning_robust.penalties.preflight import preflight, way_around

X, Y = torch.randn(4, 6, 8), torch.arange(4) % 3
EXACT, FINITE = InputGradientPenalty(method="double_backward"), InputGradientPenalty()


class Net(nn.Module):
    """A body over six tokens and a linear head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).mean(1))
        return out


class Checkpointed(nn.Module):
    """A body whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


def transformer() -> Net:
    return Net(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)).train()


# Dynamo's own, about the copy of the input that a network is given.
DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
TWICE = [AttributionPrior(), SaliencyConsistency(), JacobianPenalty(method="double_backward")]
ONCE = [SaliencyGuided(), JacobianPenalty()]


def tried(penalty: Callable[..., Tensor], net: Any, **settings: Any) -> None:
    preflight(lambda: penalty(net, X, Y, **settings), net.parameters(), "input_gradient", way_around(penalty))


@pytest.fixture
def compiled() -> Any:
    torch._dynamo.reset()
    net = torch.compile(Net(nn.Sequential(nn.Linear(8, 8), nn.GELU())), backend="aot_eager")
    try:
        net(X)
    except Exception as error:  # whatever a platform without it says
        pytest.skip(f"torch.compile(backend='aot_eager') does not work here: {error}")
    return net


@pytest.mark.parametrize("penalty", [EXACT, FINITE])
def test_what_works_passes_and_leaves_no_gradient(penalty: InputGradientPenalty) -> None:
    net = Net(nn.Tanh())
    tried(penalty, net)
    assert [p.grad for p in net.parameters()] == [None, None]


def test_attention_on_a_cpu_has_no_second_derivative() -> None:
    with pytest.raises(
        RuntimeError, match=r"^input_gradient cannot.*sdpa_kernel\(SDPBackend.MATH\).*torch says: deriv"
    ):
        tried(EXACT, transformer())


def test_both_remedies_for_attention_work() -> None:
    tried(FINITE, transformer())
    with sdpa_kernel(SDPBackend.MATH):
        tried(EXACT, transformer())


@DYNAMO
def test_a_compiled_network_has_no_second_derivative(compiled: Any) -> None:
    with pytest.raises(RuntimeError, match=r"compiled network has no second derivative\. Use method='finite_differ"):
        tried(EXACT, compiled)
    tried(FINITE, compiled)


@DYNAMO
def test_a_compiled_network_that_gave_its_buffers_away_keeps_no_graph(compiled: Any) -> None:
    leaf = X.clone().requires_grad_()
    torch.autograd.grad(compiled(leaf).sum(), leaf)  # compiles the backward pass for one use
    with pytest.raises(RuntimeError, match=r"method='finite_differences' with reuse=False.*donated"):
        tried(FINITE, compiled)
    tried(FINITE, compiled, reuse=False)


@pytest.mark.parametrize("penalty", [EXACT, FINITE])
def test_reentrant_checkpoints_give_no_gradient_of_the_input(penalty: InputGradientPenalty) -> None:
    with pytest.raises(RuntimeError, match=r"Call torch.utils.checkpoint.checkpoint\(..., use_reentrant=False\)"):
        tried(penalty, Net(Checkpointed(reentrant=True)))
    tried(penalty, Net(Checkpointed(reentrant=False)))


@pytest.mark.parametrize("method", [Saliency, IntegratedGradients])
def test_attributions_from_captum_reach_no_parameter(method: Any) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x = X[:, 0].clone().requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"^captum reaches 0 of 6 trainable parameters.*captum are not differentiable"
    ):
        preflight(lambda: method(net).attribute(x, target=Y).square().mean(), net.parameters(), "captum")


@pytest.mark.parametrize("penalty", TWICE, ids=lambda p: p.name)
def test_attention_stops_what_needs_second_derivatives_and_the_remedy_is_one_that_penalty_has(penalty: Any) -> None:
    remedy = "method='finite_differences'" if penalty.name == "jacobian" else "another penalty .SaliencyGuided, or Jac"
    with pytest.raises(RuntimeError, match=rf"SDPBackend.MATH\), or use {remedy}"):
        tried(penalty, transformer())
    with sdpa_kernel(SDPBackend.MATH):
        tried(penalty, transformer())


@pytest.mark.parametrize("penalty", ONCE, ids=lambda p: p.name)
def test_attention_does_not_stop_what_needs_first_derivatives(penalty: Any) -> None:
    tried(penalty, transformer())


@DYNAMO
@pytest.mark.parametrize("penalty", TWICE, ids=lambda p: p.name)
def test_a_compiled_network_stops_what_needs_second_derivatives(penalty: Any, compiled: Any) -> None:
    with pytest.raises(RuntimeError, match=r"A compiled network has no second derivative\. Use "):
        tried(penalty, compiled)


@DYNAMO
@pytest.mark.parametrize("penalty", ONCE, ids=lambda p: p.name)
def test_a_compiled_network_trains_by_first_derivatives(penalty: Any, compiled: Any) -> None:
    leaf = X.clone().requires_grad_()
    torch.autograd.grad(compiled(leaf).sum(), leaf)
    tried(penalty, compiled, reuse=False)


@pytest.mark.parametrize("penalty", [*TWICE, *ONCE], ids=lambda p: p.name)
def test_reentrant_checkpoints_stop_every_penalty_with_the_way_out(penalty: Any) -> None:
    with pytest.raises(RuntimeError, match=r"Call torch.utils.checkpoint.checkpoint\(..., use_reentrant=False\)"):
        tried(penalty, Net(Checkpointed(reentrant=True)))
    tried(penalty, Net(Checkpointed(reentrant=False)))


def test_the_way_around_is_a_setting_where_the_penalty_has_it() -> None:
    assert {way_around(p) for p in (RightReasons(), EXACT, FINITE, JacobianPenalty(), len)} == {
        "method='finite_differences'"
    }
    assert "SaliencyGuided" in way_around(SaliencyConsistency())


def test_frozen_parameters_do_not_count() -> None:
    net = Net(nn.Linear(8, 8))
    net.body.requires_grad_(False)
    tried(EXACT, net)
    net.requires_grad_(False)
    with pytest.raises(RuntimeError, match="0 of 0 trainable parameters"):
        tried(EXACT, net)


def test_a_parameter_that_is_not_reached_is_no_fault() -> None:
    net = Net(nn.Identity())
    tried(EXACT, net)  # of a linear head the bias of a linear scalar has no part in the gradient
    preflight(lambda: net.head.weight.sum(), net.parameters(), "weights")


def test_what_is_not_finite_is_told_with_its_value() -> None:
    net = Net(nn.Identity())
    with torch.no_grad():
        net.head.weight[0, 0] = torch.inf
    with pytest.raises(RuntimeError, match=r"is nan, and \d of its \d gradients are not finite.*half precision"):
        tried(EXACT, net)


def test_an_infinite_gradient_of_a_finite_penalty_is_told_too() -> None:
    weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match="root is 0, and 1 of its 1 gradients are not finite"):
        preflight(lambda: weight.sqrt().sum(), [weight], "root")


class Prototypes(nn.Module):
    """Distances to learnt points, which torch differentiates once only."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.points, p=1.0)


def test_another_cause_keeps_its_message() -> None:
    net = Net(Prototypes())
    with pytest.raises(RuntimeError, match=r"use method='finite_differences'\. torch says: .*cdist_backw") as told:
        tried(EXACT, net)
    assert isinstance(told.value.__cause__, RuntimeError)
    tried(FINITE, net)


def test_where_every_gradient_is_0_it_warns_unless_that_may_be() -> None:
    weight = nn.Parameter(torch.ones(1))
    with pytest.warns(UserWarning, match="flat is 3 on the first batch, and every gradient of it is exactly 0"):
        preflight(lambda: 0 * weight.sum() + 3, [weight], "flat")
    preflight(lambda: 0 * weight.sum(), [weight], "flat", may_vanish=True)


def test_a_wrong_argument_is_left_as_it_is() -> None:
    with pytest.raises(ValueError, match="expected logits"):
        preflight(lambda: EXACT(nn.Linear(8, 3), X[:, 0], Y[:2]), nn.Linear(1, 1).parameters(), "input_gradient")
