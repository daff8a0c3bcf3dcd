"""Attribution priors: expected gradients beside captum, three measures of a map beside their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from penalties.hands import Counted, InDouble, X, Y, network, smooth, weights
from torch import Tensor, nn

from lightning_robust.losses import LossCall
from lightning_robust.penalties import AttributionPrior
from lightning_robust.penalties.attribution_prior import density, evenness, total_variation
from lightning_robust.randomness import seeded

PRIORS: tuple[Any, ...] = ("total_variation", "gini", "sparsity")


def classes(n: int) -> Tensor:
    return torch.arange(n) % 3


def test_many_samples_are_the_mean_of_integrated_gradients_over_all_other_inputs() -> None:
    net, x = network(6), torch.randn(5, 6)
    y = classes(5)
    expected = torch.stack(
        [
            torch.cat(
                [
                    IntegratedGradients(net).attribute(x[i : i + 1], x[j : j + 1], target=int(y[i]))
                    for j in range(5)
                    if j != i
                ]
            ).mean(0)
            for i in range(5)
        ]
    )
    found = AttributionPrior("sparsity", samples=3000)(net, x, y, generator=seeded(0))
    assert found.item() == pytest.approx(density(expected.float()).item(), rel=0.01)


def test_one_sample_of_a_linear_model_is_the_difference_times_the_weights() -> None:
    """Of two inputs each is the background of the other, whatever is drawn."""
    w, x, y = torch.randn(3, 4), torch.randn(2, 4), torch.tensor([2, 0])
    maps = (x - x.flip(0)) * w[y]
    maps = maps / maps.abs().mean(1, keepdim=True)
    for prior, measure in zip(PRIORS, (total_variation, evenness, density), strict=True):
        torch.testing.assert_close(AttributionPrior(prior)(lambda x: x @ w.T, x, y), measure(maps))


def test_no_sample_is_its_own_background() -> None:
    net = Counted(network(4))
    for seed in range(20):
        found = AttributionPrior("sparsity")(net, torch.eye(4), classes(4), generator=seeded(seed))
        assert found.item() > 0.5  # each map has two entries at least: 1/2 is that of a single one


@pytest.mark.parametrize("prior", PRIORS)
def test_the_scale_of_a_model_does_not_count(prior: Any) -> None:
    net, x = network(4 * 9), torch.rand(6, 4, 3, 3)
    small = AttributionPrior(prior)(net, x, classes(6), generator=seeded(1))
    large = AttributionPrior(prior)(lambda x: 1000 * net(x), x, classes(6), generator=seeded(1))
    torch.testing.assert_close(small, large)


def test_total_variation_is_the_mean_absolute_step_in_each_dimension() -> None:
    maps = torch.randn(3, 5, 7)
    steps = [np.abs(np.diff(maps.numpy(), axis=axis)).mean() for axis in (1, 2)]
    assert total_variation(maps).item() == pytest.approx(sum(steps), rel=1e-5)


def test_total_variation_of_a_signal_runs_along_it() -> None:
    maps = torch.tensor([[0.0, 1.0, 3.0, 3.0]])
    assert total_variation(maps).item() == pytest.approx(1.0)


def test_evenness_is_one_minus_half_the_relative_mean_difference() -> None:
    maps = torch.randn(8, 6)
    size = maps.abs().mean(0).double()
    gini = (size[:, None] - size[None]).abs().mean() / (2 * size.mean())
    assert evenness(maps).item() == pytest.approx(1 - gini.item(), rel=1e-5)


def test_density_is_one_minus_the_rescaled_sparseness_of_hoyer() -> None:
    maps, root = torch.randn(8, 25), 5
    hoyer = (root - maps.abs().sum(1) / maps.norm(dim=1)) / (root - 1)
    torch.testing.assert_close(density(maps), ((root - hoyer * (root - 1)) / root).mean())


@pytest.mark.parametrize("prior", PRIORS)
def test_parameter_gradients_pass_gradcheck(prior: Any) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)

    def penalty(v: Tensor, w: Tensor) -> Tensor:
        call = lambda z: InDouble(z, classes(4))  # noqa: E731
        return AttributionPrior(prior, samples=2)(smooth(v, w), x, classes(4), call=call, generator=seeded(2))

    assert torch.autograd.gradcheck(penalty, weights(6))


@pytest.mark.parametrize("prior", PRIORS)
def test_every_weight_that_an_attribution_depends_on_gets_a_gradient(prior: Any) -> None:
    net = network(2 * 16)
    penalty = AttributionPrior(prior)(net, torch.rand(6, 2, 4, 4), classes(6))
    gradients = torch.autograd.grad(penalty, list(net.parameters()), allow_unused=True)
    assert [g is not None and bool(g.any()) for g in gradients] == [
        True,
        True,
        True,
        False,
    ]  # a bias moves no logit's slope


@pytest.mark.parametrize("prior", PRIORS)
def test_training_it_makes_maps_smoother_or_sparser_where_no_loss_says_otherwise(prior: Any) -> None:
    net, x, y = network(64), torch.rand(32, 1, 8, 8), classes(32)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    values = []
    for step in range(60):
        value = AttributionPrior(prior)(net, x, y, generator=seeded(step))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert np.mean(values[-5:]) < 0.85 * np.mean(values[:5])


@pytest.mark.parametrize("prior", PRIORS)
def test_the_expected_value_does_not_depend_on_the_number_of_samples(prior: Any) -> None:
    """Of all backgrounds; a batch repeated has the same ones, itself included now and then."""
    net, x, y = network(16), torch.rand(40, 1, 4, 4), classes(40)
    many = AttributionPrior(prior, samples=100)
    small, large = (
        many(net, x, y, generator=seeded(3)),
        many(net, x.repeat(8, 1, 1, 1), y.repeat(8), generator=seeded(3)),
    )
    torch.testing.assert_close(small, large, rtol=0.03, atol=0)


@pytest.mark.parametrize("prior", PRIORS)
def test_one_sample_alone_has_no_background_and_no_penalty(prior: Any) -> None:
    net = network(16)
    value = AttributionPrior(prior)(net, torch.rand(1, 1, 4, 4), classes(1))
    assert value.item() == (1.0 if prior == "gini" else 0.0)
    for gradient in torch.autograd.grad(value, list(net.parameters()), materialize_grads=True):
        assert not gradient.any()


def test_colours_of_a_pixel_are_summed() -> None:
    """The second colour has the opposite weight everywhere, and the same values: nothing is left of any pixel."""
    x = torch.rand(4, 1, 3, 3).expand(4, 2, 3, 3)
    w = torch.randn(2, 9)
    net = lambda x: x.flatten(1) @ torch.cat([w, -w], 1).T  # noqa: E731
    y = torch.arange(4) % 2
    assert AttributionPrior("sparsity")(net, x, y).item() == pytest.approx(0, abs=1e-3)
    assert AttributionPrior("sparsity", channel_dim=None)(net, x, y).item() > 0.3


def test_all_its_forwards_see_the_same_dropout_and_each_sample_costs_one() -> None:
    net = Counted(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)))
    torch.manual_seed(3)
    net.net(X)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    AttributionPrior("sparsity", samples=3)(net, X, Y, generator=seeded(0))
    assert net.seen == 3
    assert torch.equal(torch.get_rng_state(), after)


def test_a_yes_no_head_is_explained_by_its_log_probability() -> None:
    w, x, y = torch.randn(4), torch.randn(2, 4), torch.tensor([1.0, 0.0])
    found = AttributionPrior("sparsity")(lambda x: x @ w, x, y, call=lambda z: LossCall.for_head(z, y))
    # The slope of the log-probability is a number times w, and the scale does not count.
    torch.testing.assert_close(found, density((x - x.flip(0)) * w))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"AttributionPrior\(prior=\) must be one of 'total_variation', 'gini'"):
        AttributionPrior("smooth")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match=r"AttributionPrior\(samples=\) must be at least 1"):
        AttributionPrior(samples=0)
    with pytest.raises(ValueError, match="floating-point"):
        AttributionPrior()(nn.Identity(), torch.ones(2, 3).long(), Y)
    with pytest.raises(ValueError, match=r"compares neighbours, but maps \(2, 1\) have none"):
        AttributionPrior()(lambda x: torch.cat([x, -x], 1), torch.rand(2, 1), torch.tensor([0, 1]))
