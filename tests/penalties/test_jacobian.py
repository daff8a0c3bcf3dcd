"""The penalty on the Jacobian: closed forms, unbiased estimates, and both ways to the square."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from penalties.hands import Counted, W, X, Y, linear, network, parameter_gradient, smooth, weights
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.losses import LossCall
from lightning_robust.penalties import JacobianPenalty
from lightning_robust.randomness import seeded

METHODS: tuple[Any, ...] = ("finite_differences", "double_backward")


def full(net: Any, x: Tensor) -> Tensor:
    """Half the mean squared Frobenius norm, from torch's own Jacobian of each sample."""
    jacobians = [torch.autograd.functional.jacobian(lambda one: net(one[None])[0], one) for one in x]
    return 0.5 * torch.stack([j.square().sum() for j in jacobians]).mean()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("projections", [3, 8])
def test_a_linear_model_has_half_the_sum_of_its_squared_weights(method: Any, projections: int) -> None:
    """As many orthogonal directions as outputs leave nothing to chance; more are not drawn."""
    found = JacobianPenalty(projections, method)(linear, X, Y)
    torch.testing.assert_close(found, W.square().sum() / 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("projections", [1, 2])
def test_fewer_projections_are_right_on_average(projections: int) -> None:
    x, y = X[:1].expand(20_000, 4), Y[:1].expand(20_000)
    found = JacobianPenalty(projections, "double_backward")(linear, x, y, generator=seeded(0))
    assert found.item() == pytest.approx(W.square().sum().item() / 2, rel=0.02)


def test_all_projections_give_the_jacobian_that_torch_computes() -> None:
    net = network()
    found = JacobianPenalty(3, "double_backward")(net, X, Y)
    torch.testing.assert_close(found, full(net, X), rtol=1e-4, atol=0)


def test_the_double_backward_form_passes_gradcheck() -> None:
    x = X.double()

    def penalty(v: Tensor, w: Tensor) -> Tensor:
        return JacobianPenalty(2, "double_backward")(smooth(v, w), x, Y, generator=seeded(1))

    assert torch.autograd.gradcheck(penalty, weights())


def test_a_small_finite_step_trains_as_double_backward_does() -> None:
    net, x = network(activation=nn.GELU).double(), X.double()
    finite, exact = (JacobianPenalty(2, method, step=1e-4)(net, x, Y, generator=seeded(2)) for method in METHODS)
    torch.testing.assert_close(finite, exact, rtol=1e-3, atol=0)
    one, other = parameter_gradient(finite, net), parameter_gradient(exact, net)
    assert float((one - other).norm() / other.norm()) < 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_the_weight_does_not_depend_on_the_batch_size(method: Any) -> None:
    net, penalty = network(), JacobianPenalty(3, method, step=1e-3)
    x, y = F.normalize(torch.randn(24, 4)), torch.arange(24) % 3
    whole = penalty(net, x, y)
    for size in (1, 3, 8):
        parts = [penalty(net, *part) for part in zip(x.split(size), y.split(size), strict=True)]
        # Of all outputs and to first order, whichever directions were drawn.
        torch.testing.assert_close(
            torch.stack(parts).mean(), whole, rtol=0.02 if method == METHODS[0] else 1e-4, atol=0
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("projections", [1, 2])
def test_given_logits_save_a_forward_and_change_nothing(projections: int, reuse: bool, method: Any) -> None:
    net, leaf = Counted(network()), X.clone().requires_grad_()
    penalty = JacobianPenalty(projections, method)
    alone = penalty(net, X, Y, generator=seeded(3))
    logits = net(leaf)
    net.seen = 0
    given = penalty(net, leaf, Y, logits=logits, reuse=reuse, generator=seeded(3))
    torch.testing.assert_close(given, alone)
    assert net.seen == (0 if method == "double_backward" else projections * (1 if reuse else 2))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 3)])
def test_outputs_of_every_shape_are_a_row_of_outputs(shape: tuple[int, ...]) -> None:
    count = int(torch.tensor(shape).prod()) if shape else 1
    w = torch.randn(count, 4)
    found = JacobianPenalty(count, "double_backward")(lambda x: (x @ w.T).reshape(len(x), *shape), X, Y)
    each = 9 if len(shape) > 1 else 1  # pixels, over which a loss averages
    torch.testing.assert_close(found, w.square().sum() / 2 / each, rtol=1e-4, atol=0)


def test_several_labels_are_averaged_as_their_loss_does() -> None:
    w, y = torch.randn(5, 4), torch.ones(3, 5)
    by_targets = JacobianPenalty(5, "double_backward")(lambda x: x @ w.T, X, y)
    by_call = JacobianPenalty(5, "double_backward")(
        lambda x: x @ w.T, X, Y, call=lambda z: LossCall("binary_cross_entropy_with_logits", z, y)
    )
    torch.testing.assert_close(by_targets, w.square().sum() / 2 / 5, rtol=1e-4, atol=0)
    torch.testing.assert_close(by_call, by_targets)


@pytest.mark.parametrize("method", METHODS)
def test_a_class_that_is_switched_off_adds_nothing(method: Any) -> None:
    w = W.clone().requires_grad_()
    off = torch.tensor([0.0, -torch.inf, 0.0])
    found = JacobianPenalty(3, method)(lambda x: x @ w.T + off, X, Y)
    torch.testing.assert_close(found, W[[0, 2]].square().sum() / 2, rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(found, w)
    assert bool(gradient.isfinite().all())
    assert not gradient[1].any()


def test_the_generator_decides_and_the_global_stream_is_left_alone() -> None:
    state = torch.get_rng_state()
    first, same, other = (JacobianPenalty()(linear, X, Y, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_every_weight_that_a_jacobian_depends_on_gets_a_gradient(method: Any) -> None:
    net = network()
    gradients = torch.autograd.grad(
        JacobianPenalty(method=method)(net, X, Y), list(net.parameters()), allow_unused=True
    )
    reached = [g is not None and bool(g.any()) for g in gradients]
    assert reached[:3] == [True, True, True]  # the last bias moves no derivative; finite steps see rounding at most


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"JacobianPenalty\(projections=\) must be at least 1, got 0"):
        JacobianPenalty(0)
    with pytest.raises(ValueError, match=r"JacobianPenalty\(method=\) must be one of"):
        JacobianPenalty(method="exact")  # type: ignore[arg-type]  # what is tested
