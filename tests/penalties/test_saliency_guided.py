"""Saliency-guided training: which features are replaced, by what, and how far predictions may part."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from penalties.hands import Counted, InDouble, W, X, Y, network, smooth, weights
from scipy.stats import entropy
from torch import Tensor

from lightning_robust.losses import LossCall
from lightning_robust.penalties import SaliencyGuided
from lightning_robust.randomness import seeded, uniform


class Recorded(Counted):
    """Keeps its inputs."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach().clone())
        return super().forward(x)


def test_it_is_the_divergence_that_scipy_computes_at_the_features_that_numpy_would_choose() -> None:
    """Of a linear model the gradient of the right class is its row of weights."""
    w = W + torch.tensor([0.0, 0.1, 0.0, 0.0])  # no two alike in a row
    noise = X.amin(0) + (X.amax(0) - X.amin(0)) * uniform(X, seeded(4))
    replaced = X.clone()
    for row, y in enumerate(Y):
        for column in w[y].abs().argsort()[:2]:
            replaced[row, column] = noise[row, column]
    p, q = ((x @ w.T).double().softmax(1).numpy() for x in (X, replaced))
    found = SaliencyGuided(share=0.5)(lambda x: x @ w.T, X, Y, generator=seeded(4))
    assert found.item() == pytest.approx(entropy(p, q, axis=1).mean(), rel=1e-4)


def test_colours_of_a_pixel_are_replaced_together() -> None:
    net = Recorded(network(3 * 16))
    x = torch.rand(5, 3, 4, 4)
    SaliencyGuided(share=0.25)(net, x, torch.arange(5) % 3)
    changed = net.inputs[1] != x
    assert torch.equal(changed.all(1), changed.any(1))
    assert changed.any(1).flatten(1).sum(1).tolist() == [4] * 5


def test_each_number_is_a_feature_where_there_are_no_channels() -> None:
    net = Recorded(network(3 * 16))
    x = torch.rand(5, 3, 4, 4)
    SaliencyGuided(share=0.25, channel_dim=None)(net, x, torch.arange(5) % 3)
    changed = net.inputs[1] != x
    assert changed.flatten(1).sum(1).tolist() == [12] * 5
    assert not torch.equal(changed.all(1), changed.any(1))


def test_noise_stays_between_the_extremes_of_the_channel() -> None:
    net = Recorded(network(2 * 64))
    x = torch.rand(4, 2, 8, 8) * torch.tensor([1.0, 10.0]).view(1, 2, 1, 1) + 5
    SaliencyGuided(share=0.9)(net, x, torch.arange(4) % 3)
    replaced = net.inputs[1]
    assert bool((replaced <= x.amax((2, 3), keepdim=True)).all())
    assert bool((replaced >= x.amin((2, 3), keepdim=True)).all())
    assert float((replaced - x)[:, 1].abs().max()) > 2


def test_of_features_without_any_gradient_no_more_than_the_share_is_replaced() -> None:
    net = Recorded(lambda x: torch.stack([x[:, 0], -x[:, 0]], 1))
    x = torch.rand(6, 10)
    penalty = SaliencyGuided(share=0.3)(net, x, torch.arange(6) % 2)
    assert (net.inputs[1] != x).sum(1).tolist() == [3] * 6
    assert penalty.item() == pytest.approx(0, abs=1e-6)


def test_parameter_gradients_pass_gradcheck() -> None:
    """The choice of features jumps, but not near here."""
    x = X.double()

    def penalty(v: Tensor, w: Tensor) -> Tensor:
        return SaliencyGuided()(smooth(v, w), x, Y, call=InDouble, generator=seeded(5))

    assert torch.autograd.gradcheck(penalty, weights())


def test_both_predictions_are_trained_and_the_gradient_is_not() -> None:
    net = network()
    penalty = SaliencyGuided()(net, X, Y, generator=seeded(6))
    recorded = Recorded(net)
    SaliencyGuided()(recorded, X, Y, generator=seeded(6))
    log_p, log_q = (net(x).log_softmax(1) for x in recorded.inputs)
    by_hand = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    torch.testing.assert_close(penalty, by_hand)
    for one, other in zip(*(torch.autograd.grad(v, list(net.parameters())) for v in (penalty, by_hand)), strict=True):
        torch.testing.assert_close(one, other)
        assert one.any()


def test_the_mean_does_not_depend_on_the_number_of_samples() -> None:
    x, net = torch.rand(3, 2, 4, 4), network(32)
    generators = [seeded(i) for i in range(3)]
    one = SaliencyGuided()(net, x, Y, generator=generators)
    again = [seeded(i % 3) for i in range(12)]
    torch.testing.assert_close(SaliencyGuided()(net, x.repeat(4, 1, 1, 1), Y.repeat(4), generator=again), one)


@pytest.mark.parametrize("reuse", [True, False])
def test_given_logits_save_a_forward_and_change_nothing(reuse: bool) -> None:
    net, leaf = Counted(network()), X.clone().requires_grad_()
    alone = SaliencyGuided()(net, X, Y, generator=seeded(7))
    logits = net(leaf)
    net.seen = 0
    given = SaliencyGuided()(net, leaf, Y, logits=logits, reuse=reuse, generator=seeded(7))
    torch.testing.assert_close(given, alone)
    assert net.seen == (1 if reuse else 2)


def test_a_model_that_returns_log_probabilities_says_so_by_its_call() -> None:
    def call(z: Tensor) -> LossCall:
        return LossCall("nll_loss", z, Y)

    # Which features count least is up to the log-probability there; with one class ahead of all others it is the same.
    sure = lambda x: 3 * torch.stack([x.sum(1), -x.sum(1), x[:, 0] * 0], 1)  # noqa: E731
    found = SaliencyGuided()(lambda x: sure(x).log_softmax(1), X, Y, call=call, generator=seeded(8))
    assert math.isfinite(found.item())
    assert found.item() > 0


def test_a_yes_no_head_has_two_classes() -> None:
    w = torch.tensor([2.0, 0.1, 0.2, -1.0])
    one = SaliencyGuided()(lambda x: x @ w, X, Y.clamp(max=1), generator=seeded(9))
    two = SaliencyGuided()(lambda x: torch.stack([-x @ w / 2, x @ w / 2], 1), X, Y.clamp(max=1), generator=seeded(9))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, math.nan])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"SaliencyGuided\(share=\) .* above 0 and below 1"):
        SaliencyGuided(share)
