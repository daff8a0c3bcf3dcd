"""Saliency consistency: how far gradients turn, against what, and what a model learns from it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from penalties.hands import Counted, InDouble, X, Y, linear, network, smooth, weights
from sklearn.metrics.pairwise import paired_cosine_distances
from torch import Tensor, nn

from lightning_robust.attacks import PGD, ThreatModel
from lightning_robust.penalties import SaliencyConsistency
from lightning_robust.randomness import seeded

ATTACK = PGD(ThreatModel("linf", 0.1), steps=3)
M = torch.tensor([[2.0, 0.5, 0.0, 0.1], [0.5, 1.0, 0.3, 0.0], [0.0, 0.3, -1.0, 0.2], [0.1, 0.0, 0.2, 0.5]])


def quadratic(x: Tensor) -> Tensor:
    """Two classes, the first with the gradient M x."""
    value = 0.5 * ((x @ M) * x).sum(1)
    return torch.stack([value, x.sum(1)], 1)


def test_of_a_quadratic_it_is_the_angle_between_two_products_that_sklearn_computes() -> None:
    other = X + 0.3
    found = SaliencyConsistency()(quadratic, X, torch.zeros(3).long(), clean=other)
    expected = paired_cosine_distances((X @ M).numpy(), (other @ M).numpy()).mean()
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_a_linear_model_never_turns() -> None:
    assert SaliencyConsistency()(linear, X, Y, attacked=X + 5).item() == pytest.approx(0, abs=1e-6)


def test_it_is_the_same_seen_from_either_side() -> None:
    net, other = network(), X + 0.2
    penalty = SaliencyConsistency()
    torch.testing.assert_close(penalty(net, X, Y, clean=other), penalty(net, other, Y, attacked=X))


def test_the_clean_input_comes_before_what_was_crafted_and_before_noise() -> None:
    net = Counted(network())
    penalty = SaliencyConsistency(ATTACK)
    clean = penalty(net, X, Y, clean=X + 0.1, attacked=X + 3)
    torch.testing.assert_close(clean, penalty(net, X, Y, attacked=X + 0.1))
    assert net.seen == 4  # two each: nothing was crafted


def test_noise_is_a_share_of_the_range_and_seeded() -> None:
    seen: list[Tensor] = []

    def net(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return quadratic(x.flatten(1)[:, :4])

    x = torch.rand(200, 1, 4, 4) * 10
    y = torch.zeros(200).long()
    penalty = SaliencyConsistency(noise=0.2)
    first, same = (penalty(net, x, y, generator=seeded(0)) for _ in range(2))
    assert torch.equal(first, same)
    span = x.flatten(1).amax(1) - x.flatten(1).amin(1)
    moved = (seen[1] - x).abs().flatten(1).amax(1) / span
    assert 0.1 < float(moved.min()) <= float(moved.max()) <= 0.2001


def test_an_own_attack_finds_what_the_attack_finds() -> None:
    net = network().eval()
    x = X.sigmoid()
    found = SaliencyConsistency(ATTACK)(net, x, Y, generator=seeded(3))
    attacked = ATTACK(net, x, Y, generator=seeded(3))
    torch.testing.assert_close(found, SaliencyConsistency()(net, x, Y, attacked=attacked))


def test_crafting_leaves_no_trace_in_a_module() -> None:
    """Two training forwards of our own move running statistics; ten steps of crafting in evaluation mode do not."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    x, twin = X.sigmoid(), copy.deepcopy(net)
    attacked = ATTACK(twin.eval(), x, Y, generator=seeded(4))
    twin.train()
    torch.manual_seed(0)
    found = SaliencyConsistency(ATTACK)(net, x, Y, generator=seeded(4))
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.testing.assert_close(found, SaliencyConsistency()(twin, x, Y, attacked=attacked))
    assert torch.equal(torch.get_rng_state(), after)
    assert all(part.training for part in net.modules())
    assert all(p.grad is None for p in net.parameters())
    for one, other in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_parameter_gradients_pass_gradcheck() -> None:
    x, other = X.double(), X.double() + 0.4

    def penalty(v: Tensor, w: Tensor) -> Tensor:
        return SaliencyConsistency()(smooth(v, w), x, Y, call=InDouble, clean=other)

    assert torch.autograd.gradcheck(penalty, weights())


def test_both_gradients_are_trained() -> None:
    net = network()
    leaves = [point.clone().requires_grad_() for point in (X, X + 0.5)]
    grads = [torch.autograd.grad(net(leaf).gather(1, Y[:, None]).sum(), leaf, create_graph=True)[0] for leaf in leaves]
    by_hand = (1 - nn.functional.cosine_similarity(*grads, dim=1)).mean()
    found = SaliencyConsistency()(net, X, Y, clean=X + 0.5)
    torch.testing.assert_close(found, by_hand)
    parameters = list(net.parameters())[:3]
    for one, other in zip(*(torch.autograd.grad(value, parameters) for value in (found, by_hand)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert one.any()


def test_a_sample_without_a_gradient_counts_nothing_and_gives_no_nan() -> None:
    weight = torch.ones(4, requires_grad=True)
    x = torch.stack([torch.zeros(4), torch.ones(4)])
    other = torch.stack([torch.ones(4), torch.tensor([1.0, 2.0, 3.0, 4.0])])
    net = lambda x: torch.stack([(weight * x.square()).sum(1), x.sum(1) * 0], 1)  # noqa: E731
    found = SaliencyConsistency()(net, x, torch.zeros(2).long(), clean=other)
    expected = paired_cosine_distances(x[1:].numpy(), other[1:].numpy())[0] / 2
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert bool(torch.autograd.grad(found, weight)[0].isfinite().all())


def test_tiny_gradients_turn_as_large_ones_do() -> None:
    net, penalty = network(), SaliencyConsistency()
    tiny = penalty(lambda x: 1e-10 * net(x), X, Y, clean=X + 0.5)
    torch.testing.assert_close(tiny, penalty(net, X, Y, clean=X + 0.5), rtol=1e-3, atol=0)


def test_a_batch_repeated_has_the_penalty_of_the_batch() -> None:
    net, penalty = network(), SaliencyConsistency()
    twice = penalty(net, X.repeat(4, 1), Y.repeat(4), clean=(X + 0.5).repeat(4, 1))
    torch.testing.assert_close(twice, penalty(net, X, Y, clean=X + 0.5))


def test_given_logits_save_a_forward() -> None:
    net, leaf = Counted(network()), X.clone().requires_grad_()
    logits = net(leaf)
    net.seen = 0
    given = SaliencyConsistency()(net, leaf, Y, logits=logits, clean=X + 0.5)
    assert net.seen == 1
    torch.testing.assert_close(given, SaliencyConsistency()(net, X, Y, clean=X + 0.5))


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"noise": 0}, ValueError, r"noise=\) must be positive"),
        ({"noise": float("inf")}, ValueError, "finite"),
        ({"attack": 3}, TypeError, "an attack is a callable"),
        ({"attack": PGD}, TypeError, "the class PGD"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        SaliencyConsistency(**settings)


def test_inputs_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(3, 4\) and \(2, 4\)"):
        SaliencyConsistency()(linear, X, Y, clean=X[:2])
