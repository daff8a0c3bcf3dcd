"""Squares of input gradients: closed forms, agreement of the two methods, forwards counted, nothing left behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_robust.penalties.squared_gradient import Method, check_settings, squared_gradient
from lightning_robust.randomness import RandomState

METHODS: tuple[Method, ...] = ("finite_differences", "double_backward")
STEP = 0.13

# s(x) = x'Mx / 2 + b'x in four dimensions: g = Mx + b, and a step along d adds h g'd + h^2 d'Md / 2, no more.
M = torch.tensor([[2.0, 1.0, 0.0, 0.0], [1.0, 3.0, 0.0, 0.5], [0.0, 0.0, 1.0, 0.0], [0.0, 0.5, 0.0, 4.0]])
B = torch.tensor([1.0, -2.0, 0.5, 3.0])
X = torch.linspace(-1.0, 2.0, 20).view(5, 4)


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * ((x @ M) * x).sum(1) + x @ B


def itself(z: Tensor) -> Tensor:
    return z


def total(z: Tensor) -> Tensor:
    return z.square().flatten(1).sum(1)


class Counted(nn.Module):
    """A network that remembers what it was given."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        out: Tensor = self.layers(x)
        return out


def network(activation: Callable[[], nn.Module] = nn.Tanh) -> Counted:
    return Counted(nn.Linear(4, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 3))


def parameter_gradient(value: Tensor, net: nn.Module) -> Tensor:
    found = torch.autograd.grad(value, list(net.parameters()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("step", [0.01, 0.13, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_a_linear_scalar_has_the_square_of_its_weights_at_any_step(method: Method, step: float) -> None:
    square = squared_gradient(lambda z: z, lambda x: x @ B, X, method=method, step=step)
    torch.testing.assert_close(square, B.square().sum().expand(5), rtol=1e-4, atol=0)


def test_double_backward_of_a_quadratic_is_the_square_of_its_gradient() -> None:
    square = squared_gradient(itself, quadratic, X, method="double_backward")
    torch.testing.assert_close(square, (X @ M + B).square().sum(1))


def test_finite_differences_of_a_quadratic_add_half_the_step_times_the_curvature() -> None:
    gradient = X @ M + B
    d = gradient / gradient.norm(dim=1, keepdim=True)
    h = STEP * X.norm(dim=1).mean()
    expected = ((gradient * d).sum(1) + h / 2 * ((d @ M) * d).sum(1)).square()
    torch.testing.assert_close(squared_gradient(itself, quadratic, X, step=STEP), expected, rtol=1e-4, atol=0)


def test_inputs_of_zeros_are_stepped_from_by_the_step_itself() -> None:
    """At x = 0 the gradient is b; h = 0.13 * 0 would divide zero by zero."""
    d = B / B.norm()
    expected = (B.norm() + STEP / 2 * d @ M @ d).square().expand(5)
    square = squared_gradient(itself, quadratic, torch.zeros(5, 4), step=STEP)
    torch.testing.assert_close(square, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_where_the_gradient_vanishes_the_square_is_zero_and_so_is_what_follows_from_it(method: Method) -> None:
    weight = torch.ones(4, requires_grad=True)
    square = squared_gradient(itself, lambda x: (x * weight).square().sum(1), torch.zeros(3, 4), method=method)
    assert square.tolist() == [0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(square.sum(), weight)
    assert torch.equal(gradient, torch.zeros(4))


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_counts_only_its_share_of_the_gradient_fractions_included(method: Method) -> None:
    mask = torch.tensor([1.0, 0.5, 0.0, 0.25]).expand(5, 4)
    square = squared_gradient(itself, lambda x: x @ B, X, method=method, mask=mask)
    torch.testing.assert_close(square, (mask * B).square().sum(1), rtol=1e-4, atol=0)


def test_a_finite_step_stays_inside_the_mask() -> None:
    net, mask = network(), torch.tensor([[1.0, 0.0, 1.0, 0.0]]).expand(5, 4)
    squared_gradient(total, net, X, mask=mask)
    assert not net.seen[1].requires_grad  # nobody needs a gradient of the neighbour: a backward pass is spared
    move = net.seen[1] - X
    assert torch.equal(move * (1 - mask), torch.zeros(5, 4))
    torch.testing.assert_close(move.norm(dim=1), (STEP * X.norm(dim=1).mean()).expand(5))


def test_the_double_backward_form_passes_gradcheck() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    mask = torch.rand(3, 4, dtype=torch.float64)

    def penalty(v: Tensor, w: Tensor) -> Tensor:
        return squared_gradient(total, lambda x: torch.tanh(x @ v) @ w, x, method="double_backward", mask=mask)

    v, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 5), (5, 2)))
    assert penalty(v, w).dtype == torch.float64
    assert torch.autograd.gradcheck(penalty, (v, w))


def test_finite_differences_train_the_parameters_along_a_direction_that_counts_as_constant() -> None:
    net = network()
    reference = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(net(reference)).sum(), reference)
    move = STEP * X.norm(dim=1).mean() * gradient / gradient.norm(dim=1, keepdim=True)
    by_hand = ((total(net(X + move)) - total(net(X))) / (STEP * X.norm(dim=1).mean())).square()
    square = squared_gradient(total, net, X, step=STEP)
    torch.testing.assert_close(square, by_hand, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        parameter_gradient(square.mean(), net), parameter_gradient(by_hand.mean(), net), rtol=1e-3, atol=1e-6
    )


def test_on_a_smooth_network_both_methods_train_the_parameters_alike() -> None:
    net = network(nn.GELU).double()
    by_method = [
        parameter_gradient(squared_gradient(total, net, X.double(), method=m, step=1e-3).mean(), net) for m in METHODS
    ]
    assert float(torch.cosine_similarity(*by_method, dim=0)) > 0.999
    assert float(by_method[0].norm() / by_method[1].norm()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("method", "given", "reuse", "forwards"),
    [
        ("finite_differences", False, True, 2),
        ("finite_differences", True, True, 1),
        ("finite_differences", False, False, 3),
        ("finite_differences", True, False, 2),
        ("double_backward", False, True, 1),
        ("double_backward", True, True, 0),
        ("double_backward", True, False, 0),
    ],
)
def test_no_forward_is_repeated_and_all_ways_lead_to_the_same(
    method: Method, given: bool, reuse: bool, forwards: int
) -> None:
    net = network()
    expected = squared_gradient(total, net, X, method=method)
    leaf = X.clone().requires_grad_()
    logits = net(leaf) if given else None
    net.seen.clear()
    square = squared_gradient(total, net, leaf if given else X, method=method, logits=logits, reuse=reuse)
    assert len(net.seen) == forwards
    if method == "finite_differences":  # exactly one of them at another place
        assert sum(not torch.equal(x, X) for x in net.seen) == 1
    torch.testing.assert_close(square, expected)
    torch.testing.assert_close(parameter_gradient(square.mean(), net), parameter_gradient(expected.mean(), net))


@pytest.mark.parametrize("method", METHODS)
def test_the_graph_of_given_logits_still_serves_the_loss(method: Method) -> None:
    net, leaf = network(), X.clone().requires_grad_()
    logits = net(leaf)
    square = squared_gradient(total, net, leaf, method=method, logits=logits)
    both = parameter_gradient(total(logits).mean() + square.mean(), net)
    apart = parameter_gradient(total(net(X)).mean(), net) + parameter_gradient(
        squared_gradient(total, net, X, method=method).mean(), net
    )
    torch.testing.assert_close(both, apart)


def test_logits_whose_graph_is_not_reused_need_no_leaf() -> None:
    net = network()
    square = squared_gradient(total, net, X, logits=net(X), reuse=False)
    torch.testing.assert_close(square, squared_gradient(total, net, X))


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(method: Method, reuse: bool) -> None:
    net, x = network(), X.clone()
    before = RandomState.capture()
    squared_gradient(total, net, x, method=method, reuse=reuse).mean()
    assert before.is_current()
    assert not x.requires_grad
    assert x.grad is None
    assert [p.grad for p in net.parameters()] == [None] * 6
    assert torch.equal(x, X)


@pytest.mark.parametrize("reuse", [True, False])
def test_every_forward_drops_the_same_units(reuse: bool) -> None:
    """Masks as data: the same seed before each forward. Two different masks would be far off."""
    net = Counted(nn.Linear(4, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 3))

    def seeded_again(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        out: Tensor = net(x)
        return out

    expected = squared_gradient(total, seeded_again, X, reuse=reuse)
    after_one_forward = torch.get_rng_state()
    torch.manual_seed(3)
    torch.testing.assert_close(squared_gradient(total, net, X, reuse=reuse), expected)
    assert torch.equal(torch.get_rng_state(), after_one_forward)


def test_noise_of_numpy_and_python_is_repeated_too() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x @ B + 100 * float(np.random.rand()) + 100 * random.random()

    torch.testing.assert_close(squared_gradient(itself, noisy, X), B.square().sum().expand(5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_to_bfloat16_gives_float32_near_the_truth(method: Method, reuse: bool) -> None:
    net, x = network(), torch.randn(64, 4)
    expected = squared_gradient(total, net, x, method=method).mean()
    with torch.autocast("cpu", torch.bfloat16):
        square = squared_gradient(lambda z: total(z.float()), net, x, method=method, reuse=reuse).mean()
    assert net(x).dtype == torch.float32
    assert square.dtype == torch.float32
    torch.testing.assert_close(square, expected, rtol=0.03, atol=0)
    towards = parameter_gradient(square, net), parameter_gradient(expected, net)
    assert float(torch.cosine_similarity(*towards, dim=0)) > 0.99


@pytest.mark.parametrize("method", METHODS)
def test_a_network_in_bfloat16_is_squared_in_float32(method: Method) -> None:
    net = network().bfloat16()
    square = squared_gradient(lambda z: total(z.float()), net, X.bfloat16(), method=method)
    assert square.dtype == torch.float32
    assert bool(parameter_gradient(square.mean(), net).isfinite().all())


def no_graph(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x @ M


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("logits_fn", "x", "settings", "message"),
    [
        (quadratic, X.long(), {}, "expected floating-point inputs, got torch.int64"),
        (quadratic, X, {"logits": quadratic(X)}, "logits were given, but x does not require grad"),
        (quadratic, X.clone().requires_grad_(), {"logits": X @ B.clone().requires_grad_()}, "do not depend on x"),
        (lambda x: no_graph(x).sum(1), X, {}, "do not depend on x: no gradient .* torch.no_grad"),
        (lambda x: x @ M, X, {}, r"one number for each of 5 samples, got \(5, 4\)"),
        (lambda x: (x @ B).sum(), X, {}, r"one number for each of 5 samples, got \(\)"),
    ],
)
def test_what_has_no_gradient_by_sample_is_refused(
    method: Method, logits_fn: Callable[[Tensor], Tensor], x: Tensor, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        squared_gradient(itself, logits_fn, x, method=method, **settings)


@pytest.mark.parametrize(
    ("method", "step", "message"),
    [
        ("exact", 0.1, r"Owner\(method=\) must be one of 'finite_differences', 'double_backward', got 'exact'"),
        ("double_backward", 0.0, r"Owner\(step=\) must be positive and finite .* got 0.0"),
        ("double_backward", float("inf"), "got inf"),
        ("double_backward", float("nan"), "got nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(method: str, step: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings("Owner", method, step)
