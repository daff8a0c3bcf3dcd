"""Forwards that repeat what was drawn, and the score that saliency explains on every head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.losses import LossCall
from lightning_robust.penalties import (
    AttributionPrior,
    InputGradientPenalty,
    JacobianPenalty,
    RightReasons,
    SaliencyConsistency,
    SaliencyGuided,
)
from lightning_robust.penalties.derivatives import drawn, forward, input_gradient, labelled, one_a_sample, right_answer
from lightning_robust.randomness import RandomState, seeded

Z = torch.tensor([[1.0, 2.0, -1.0], [0.5, -3.0, 4.0]])


def test_all_forwards_drop_the_same_units_and_the_stream_moves_on_as_after_one() -> None:
    net, x = nn.Dropout(0.5), torch.ones(4, 50)
    start = RandomState.capture()
    once = net(x)
    after = torch.get_rng_state()
    start.restore()
    run = forward(net, x)
    assert torch.equal(run.logits, once)
    assert torch.equal(run.again(x), once)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("reuse", [True, False])
def test_a_gradient_that_only_chooses_has_no_graph_and_leaves_that_of_the_logits(reuse: bool) -> None:
    net = nn.Linear(3, 2)
    run = forward(net, torch.rand(4, 3), differentiable=reuse)
    gradient = run.gradient(lambda z: z[:, 0], reuse=reuse)
    torch.testing.assert_close(gradient, net.weight[0].detach().expand(4, 3))
    assert not gradient.requires_grad
    run.logits.sum().backward()


def test_without_a_generator_one_is_seeded_from_the_global_stream_and_else_the_given_one_is_used() -> None:
    def draw() -> Tensor:
        return torch.rand(3, generator=drawn(None))  # type: ignore[arg-type]  # one generator

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    given, state = seeded(0), torch.get_rng_state()
    assert drawn(given) is given
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (LossCall("cross_entropy", Z, torch.tensor([1, 2])), [2.0, 4.0]),
        (LossCall("cross_entropy", Z, torch.tensor([-100, 0])), [0.0, 0.5]),
        (LossCall("cross_entropy", Z, torch.tensor([7, 0]), {"ignore_index": 7}), [0.0, 0.5]),
        (LossCall("cross_entropy", Z, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])), [1.5, 4.0]),
        (LossCall("nll_loss", Z.log_softmax(1), torch.tensor([1, 2])), Z.log_softmax(1)[[0, 1], [1, 2]].tolist()),
        (
            LossCall("binary_cross_entropy_with_logits", Z[:, :1], torch.tensor([[1.0], [0.0]])),
            [float(F.logsigmoid(torch.tensor(1.0))), float(F.logsigmoid(torch.tensor(-0.5)))],
        ),
        (
            LossCall("binary_cross_entropy_with_logits", Z, torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])),
            (-F.binary_cross_entropy_with_logits(
                Z, torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), reduction="none"
            ).sum(1)).tolist(),
        ),
        (LossCall("cross_entropy", Z.T.reshape(1, 3, 2), torch.tensor([[1, 2]])), [6.0]),
    ],
    ids=["classes", "none", "ignored", "soft", "log-probabilities", "yes-no", "labels", "pixels"],
)  # fmt: skip
def test_the_right_answer_has_a_score_on_every_head(call: LossCall, expected: list[float]) -> None:
    assert right_answer(call).tolist() == pytest.approx(expected)


def test_soft_targets_in_logarithms_weigh_alike() -> None:
    soft = torch.tensor([[0.5, 0.25, 0.25]])
    plain = right_answer(LossCall("kl_div", Z[:1].log_softmax(1), soft))
    logs = right_answer(LossCall("kl_div", Z[:1].log_softmax(1), soft.log(), {"log_target": True}))
    torch.testing.assert_close(plain, logs)


def test_a_class_that_is_switched_off_gives_no_nan() -> None:
    z = torch.tensor([[1.0, -torch.inf]], requires_grad=True)
    score = right_answer(LossCall("cross_entropy", z, torch.tensor([[1.0, 0.0]])))
    (gradient,) = torch.autograd.grad(score.sum(), z)
    assert (score.tolist(), gradient.tolist()) == ([1.0], [[1.0, 0.0]])


def test_what_cannot_be_differentiated_is_told() -> None:
    with pytest.raises(ValueError, match="floating-point inputs"):
        forward(nn.Identity(), torch.ones(2, 3).long())
    with pytest.raises(ValueError, match="x does not require grad"):
        forward(nn.Identity(), torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="do not depend on x"):
        input_gradient(torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match="one number for each of 2 samples"):
        one_a_sample(torch.ones(3), torch.ones(2, 4))


# -- all penalties ---------------------------------------------------------------------------------------------------

EXACT: list[Any] = [InputGradientPenalty("double_backward"), RightReasons(method="double_backward")]
ALL: list[Any] = [
    *(InputGradientPenalty(), RightReasons(), JacobianPenalty(), JacobianPenalty(method="double_backward")),
    *(SaliencyGuided(), AttributionPrior("sparsity"), SaliencyConsistency(), *EXACT),
]


def called(penalty: Any, net: Any, x: Tensor, y: Tensor, **more: Any) -> Tensor:
    """With the same random numbers, and everything marked."""
    draws = {} if isinstance(penalty, (InputGradientPenalty, RightReasons)) else {"generator": seeded(3)}
    marks = {"mask": torch.ones_like(x)} if isinstance(penalty, RightReasons) else {}
    found: Tensor = penalty(net, x, y, **draws, **marks, **more)
    return found


@pytest.mark.parametrize("penalty", ALL, ids=lambda p: f"{p.name}-{getattr(p, 'method', '')}")
def test_a_network_whose_first_operation_is_in_place_is_given_copies(penalty: Any) -> None:
    head, x, y = nn.Linear(6, 3), torch.randn(5, 6), torch.arange(5) % 3
    kept = x.clone()
    found = called(penalty, nn.Sequential(nn.ReLU(inplace=True), head), x, y)
    assert torch.equal(x, kept)
    torch.testing.assert_close(found, called(penalty, nn.Sequential(nn.ReLU(), head), x, y))


@pytest.mark.parametrize("penalty", ALL, ids=lambda p: f"{p.name}-{getattr(p, 'method', '')}")
def test_logits_flattened_to_rows_give_what_those_of_pixels_give(penalty: Any) -> None:
    net, x, y = nn.Conv2d(2, 3, 3, padding=1), torch.rand(4, 2, 4, 4), torch.randint(3, (4, 4, 4))
    if isinstance(penalty, JacobianPenalty):
        penalty = replace(penalty, projections=48)  # all: one direction means another one in another order
    rows = called(penalty, lambda x: net(x).movedim(1, -1).reshape(-1, 3), x, y.flatten())
    torch.testing.assert_close(rows, called(penalty, net, x, y), rtol=1e-4, atol=1e-7)


def test_rows_of_some_samples_only_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected targets of 4 samples, or as many rows for each, got \(6,\)"):
        labelled(LossCall("cross_entropy", torch.zeros(6, 3), torch.zeros(6).long()), 4)
    with pytest.raises(ValueError, match=r"outputs \(N, ...\) of 4 samples"):
        JacobianPenalty()(lambda x: x.repeat(2, 1)[:6], torch.rand(4, 3), torch.zeros(6).long())


@pytest.mark.parametrize("penalty", EXACT, ids=lambda p: p.name)
def test_under_fp16_small_gradients_are_not_lost(penalty: Any) -> None:
    """A sure network, whose squares of 1e-12 and 1e-10 are made of gradients that fp16 does not have."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    x, y = torch.rand(2, 3, 96, 96), torch.zeros(2).long()
    with torch.no_grad():
        net[-1].bias[0] += 6
    expected = called(penalty, net, x, y).detach()
    with torch.autocast("cpu", torch.float16):
        found = called(penalty, net, x, y).detach()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_a_scale_of_two_to_a_power_rounds_nothing() -> None:
    x = torch.rand(4, 3, dtype=torch.float16).requires_grad_()
    gradient = input_gradient((x.float() * 0.37).square().sum(1), x)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient.half(), torch.autograd.grad((x.float() * 0.37).square().sum(), x)[0])
