"""The input gradient penalty: closed forms on linear models, torch.func on a network, any batch size, any head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from lightning_robust.losses import LossCall
from lightning_robust.penalties import InputGradientPenalty, RightReasons

METHODS = ("finite_differences", "double_backward")
W = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 1.0, 2.0]])
DIFFERENCE = W[1] - W[0]
X = torch.tensor([[0.5, 0.2, -0.1], [-0.3, 0.8, 0.4], [0.1, -0.6, 0.9], [1.2, 0.3, 0.7]])
Y = torch.tensor([0, 1, 0, 1])
OTHER = RightReasons()


def linear(x: Tensor) -> Tensor:
    return x @ W.T


def test_a_linear_model_of_two_classes_has_the_error_times_the_difference_of_weights() -> None:
    """d L / d x = (p - y)(w1 - w0), where p is the probability of class 1."""
    error = torch.sigmoid(X @ DIFFERENCE) - Y
    penalty = InputGradientPenalty(method="double_backward")(linear, X, Y)
    torch.testing.assert_close(penalty, (error.square() * DIFFERENCE.square().sum()).mean())


@pytest.mark.parametrize("step", [0.01, 0.13, 1.0])
def test_a_finite_step_moves_its_margin_by_the_step_times_the_norm(step: float) -> None:
    """L = log(1 + exp(m)), m = -+ (w1 - w0)'x; the loss climbs straight up m."""
    wrong = torch.where(Y == 1, -1.0, 1.0) * (X @ DIFFERENCE)
    h = step * X.norm(dim=1).mean()
    expected = ((F.softplus(wrong + h * DIFFERENCE.norm()) - F.softplus(wrong)) / h).square().mean()
    penalty = InputGradientPenalty(step=step)(linear, X, Y)
    torch.testing.assert_close(penalty, expected, rtol=1e-4, atol=0)


def test_gradients_of_the_parameters_equal_those_of_torch_func() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))
    x, y = torch.randn(6, 2, 5, 5), torch.arange(6) % 3
    parameters = dict(net.named_parameters())

    def loss(x: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(net, parameters, (x[None],)), y[None])

    def reference(parameters: dict[str, Tensor]) -> Tensor:
        gradients = vmap(grad(loss), in_dims=(0, 0, None))(x, y, parameters)
        return gradients.flatten(1).square().sum(1).mean()

    penalty = InputGradientPenalty(method="double_backward")(net, x, y)
    torch.testing.assert_close(penalty, reference(parameters))
    for found, (name, expected) in zip(
        torch.autograd.grad(penalty, list(net.parameters()), materialize_grads=True),
        grad(reference)(parameters).items(),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("method", METHODS)
def test_the_weight_does_not_depend_on_the_batch_size(method: str) -> None:
    """Of samples that all differ, cut into batches of every size."""
    net, penalty = nn.Linear(3, 2), InputGradientPenalty(method=method)
    x = F.normalize(torch.randn(24, 3))  # of one length, which the finite step is a share of
    y = torch.arange(24) % 2
    whole = penalty(net, x, y)
    for size in (1, 3, 8):
        parts = [penalty(net, *part) for part in zip(x.split(size), y.split(size), strict=True)]
        mean = torch.stack(parts).mean()
        torch.testing.assert_close(mean, whole, rtol=1e-4, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(mean, net.weight)[0],
            torch.autograd.grad(whole, net.weight, retain_graph=True)[0],
            rtol=1e-3,
            atol=1e-6,
        )


@pytest.mark.parametrize("method", METHODS)
def test_samples_without_a_label_do_not_count(method: str) -> None:
    x, penalty = F.normalize(X), InputGradientPenalty(method=method)
    some = torch.tensor([0, -100, -100, 1])
    torch.testing.assert_close(penalty(linear, x, some), penalty(linear, x[[0, 3]], Y[[0, 3]]), rtol=1e-4, atol=0)
    assert penalty(linear, x, torch.full((4,), -100)).item() == 0


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_users_own_loss_that_is_differentiated(method: str) -> None:
    """With class weights (1, 3), class 1 counts ninefold."""

    penalty, options = InputGradientPenalty(method=method), {"weight": torch.tensor([1.0, 3.0])}
    for x, y in zip(X.split(1), Y.split(1), strict=True):
        weighed = penalty(linear, x, y, call=lambda z, y=y: LossCall("cross_entropy", z, y, options))
        torch.testing.assert_close(weighed, penalty(linear, x, y) * (9 if y == 1 else 1), rtol=1e-4, atol=0)


def test_a_yes_no_head_has_the_error_times_its_weights() -> None:
    w = W[0]
    penalty = InputGradientPenalty(method="double_backward")(lambda x: (x @ w)[:, None], X, Y)
    error = torch.sigmoid(X @ w) - Y
    torch.testing.assert_close(penalty, (error.square() * w.square().sum()).mean())


def test_of_a_samples_pixels_the_mean_loss_is_meant() -> None:
    """Two pixels, each with a linear model of two classes on its own input: half of each gradient, so a quarter."""
    x, y = torch.stack([X, X.flip(0)], 1), torch.stack([Y, Y.flip(0)], 1)
    penalty = InputGradientPenalty(method="double_backward")
    of_pixels = penalty(lambda x: (x @ W.T).movedim(-1, 1), x, y)
    torch.testing.assert_close(of_pixels, 2 * penalty(linear, X, Y) / 4)


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_of_twice_the_side_has_the_gradient_of_its_mean_loss(method: str) -> None:
    """As ``F.cross_entropy`` has it: the loss is that of one picture, and so is the penalty."""
    net, penalty = nn.Conv2d(2, 3, 3, padding=1), InputGradientPenalty(method=method)
    x, y = torch.rand(1, 2, 6, 6), torch.randint(3, (1, 6, 6))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(leaf), y), leaf)
    expected = gradient.square().sum()
    torch.testing.assert_close(
        penalty(net, x, y).detach(), expected, rtol=1e-4 if method == METHODS[1] else 0.1, atol=0
    )


@pytest.mark.parametrize("method", METHODS)
def test_more_labels_a_sample_do_not_make_it_larger(method: str) -> None:
    """The same label five times: the mean loss is the same, and so is its gradient."""
    w, y = torch.randn(3), (Y > 0).float()
    one = InputGradientPenalty(method=method)(lambda x: (x @ w)[:, None], X, y[:, None])
    five = InputGradientPenalty(method=method)(lambda x: (x @ w)[:, None].expand(-1, 5), X, y[:, None].expand(-1, 5))
    torch.testing.assert_close(five, one, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("method", "forwards"), [("finite_differences", 1), ("double_backward", 0)])
def test_given_logits_save_a_forward_and_change_nothing(method: str, forwards: int) -> None:
    seen: list[Tensor] = []

    def logits_fn(x: Tensor) -> Tensor:
        seen.append(x)
        return linear(x)

    penalty, leaf = InputGradientPenalty(method=method), X.clone().requires_grad_()
    for reuse in (True, False):
        seen.clear()
        found = penalty(logits_fn, leaf, Y, logits=linear(leaf), reuse=reuse)
        torch.testing.assert_close(found, penalty(linear, X, Y))
        assert len(seen) == forwards + (method == "finite_differences" and not reuse)


def test_a_network_trained_with_it_stays_as_accurate_and_withstands_more() -> None:
    x = torch.randn(128, 8)
    y = (x[:, 0] > 0).long()
    right = {}
    for weight in (0.0, 0.3):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(100):
            optimizer.zero_grad()
            (F.cross_entropy(net(x), y) + weight * InputGradientPenalty()(net, x, y)).backward()
            optimizer.step()
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(leaf), y, reduction="sum"), leaf)
        right[weight] = [int((net(at).argmax(1) == y).sum()) for at in (x, x + 0.2 * gradient.sign())]  # FGSM
    (clean, attacked), (clean_with, attacked_with) = right.values()
    assert clean == clean_with == 128
    assert attacked_with >= attacked + 5


def test_it_is_made_of_plain_settings_that_yaml_can_hold(tmp_path: Path) -> None:
    def make(penalty: InputGradientPenalty | RightReasons = OTHER) -> InputGradientPenalty | RightReasons:
        return penalty

    (tmp_path / "run.yaml").write_text(
        "penalty:\n  class_path: lightning_robust.penalties.InputGradientPenalty\n"
        "  init_args: {method: double_backward, step: 0.2}\n"
    )
    made = auto_cli(make, args=[f"--config={tmp_path / 'run.yaml'}"], as_positional=False)
    assert made == InputGradientPenalty("double_backward", 0.2)
    assert made.name == InputGradientPenalty.name == "input_gradient"
    assert len({made, InputGradientPenalty("double_backward", 0.2)}) == 1


def test_unknown_methods_and_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"InputGradientPenalty\(method=\) must be one of"):
        InputGradientPenalty(method="exact")
    with pytest.raises(ValueError, match=r"InputGradientPenalty\(step=\) must be positive"):
        InputGradientPenalty(step=-1.0)
    with pytest.raises(ValueError, match=r"got logits \(4, 2\) for targets \(3,\)"):
        InputGradientPenalty()(linear, X, Y[:3])
