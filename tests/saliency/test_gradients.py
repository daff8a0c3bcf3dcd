"""Gradient methods against hand-written gradients, closed forms and captum's own quadrature."""

from __future__ import annotations

import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients
from saliency.small_nets import PICTURES, TARGET, cnn, mlp, rand
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.randomness import normal, seeded
from lightning_robust.saliency.completeness import completeness
from lightning_robust.saliency.gradients import gradient, input_x_gradient, integrated_gradients, smoothgrad


def smooth() -> nn.Module:
    return mlp(3, nn.Tanh)


def slopes(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(net(x)[range(len(x)), target].sum(), x)
    return found


TABLE, CLASS = rand(5, 6), torch.tensor([0, 1, 2, 0, 1])


def test_gradients_are_those_written_by_hand() -> None:
    net = cnn()
    assert torch.equal(gradient(net, PICTURES, TARGET), slopes(net, PICTURES, TARGET).abs().sum(1))


def test_input_times_gradient_is_that_product_by_hand_and_by_captum() -> None:
    net = cnn()
    maps = input_x_gradient(net, PICTURES, TARGET)
    assert torch.equal(maps, (slopes(net, PICTURES, TARGET) * PICTURES).sum(1))
    expected = InputXGradient(net).attribute(PICTURES.clone().requires_grad_(), TARGET)
    assert torch.equal(maps, expected.detach().sum(1))


def test_smoothgrad_is_a_loop_over_noisy_copies() -> None:
    net, total = cnn(), torch.zeros_like(PICTURES)
    for i in range(7):
        for row, x in enumerate(PICTURES):
            noise = 0.2 * (x.max() - x.min()) * normal(x, seeded(3, i))
            total[row] += slopes(net, (x + noise)[None], TARGET[row : row + 1])[0]
    maps = smoothgrad(net, PICTURES, TARGET, samples=7, noise=0.2, seed=3)
    torch.testing.assert_close(maps, (total / 7).abs().sum(1))


def test_smoothgrad_without_noise_is_the_gradient_and_another_seed_gives_another_map() -> None:
    net = cnn()
    torch.testing.assert_close(smoothgrad(net, PICTURES, TARGET, noise=0), gradient(net, PICTURES, TARGET))
    first, again, other = (smoothgrad(net, PICTURES, TARGET, samples=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_smoothgrad_cancels_what_changes_its_sign() -> None:
    def folded(x: Tensor) -> Tensor:  # slopes +1 or -1, as the noise has it
        return x.abs().cumsum(1)

    x, target = torch.tensor([[0.0, 0.0, 100.0]]), torch.tensor([2])
    left, middle, right = smoothgrad(folded, x, target, samples=400)[0].tolist()
    assert right == 1
    # The mean of 400 signs spreads by 1/20.
    assert left < 0.2
    assert middle < 0.2


@pytest.mark.parametrize(("samples", "noise"), [(0, 0.1), (5, -0.1), (5, float("nan"))])
def test_smoothgrad_refuses_settings_without_meaning(samples: int, noise: float) -> None:
    with pytest.raises(ValueError, match="must be at least 1 and 0"):
        smoothgrad(cnn(), PICTURES, TARGET, samples=samples, noise=noise)


def test_integrated_gradients_of_a_linear_model_are_weight_times_distance_from_the_baseline() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0], [0.0, 5.0]])
    x, target = torch.tensor([[1.0, 0.5], [2.0, -1.0]]), torch.tensor([1, 0])
    rows = weight[:, target].T
    assert torch.equal(integrated_gradients(lambda x: F.pad(x, (0, 1)) @ weight, x, target), x * rows[:, :2])
    moved = integrated_gradients(lambda x: F.pad(x, (0, 1)) @ weight, x, target, baseline=torch.tensor([1.0, 0.25]))
    assert torch.equal(moved, (x - torch.tensor([1.0, 0.25])) * rows[:, :2])


def test_integrated_gradients_agree_with_captums_fifty_gauss_legendre_points_on_a_smooth_net() -> None:
    net = smooth()
    expected = IntegratedGradients(net).attribute(TABLE, target=CLASS)
    maps = integrated_gradients(net, TABLE, CLASS)
    torch.testing.assert_close(maps, expected.float(), rtol=0, atol=2e-3 * float(expected.abs().max()))
    default = integrated_gradients(net, TABLE, CLASS, steps=50, method="gausslegendre")
    torch.testing.assert_close(default, expected.float())


def test_integrated_gradients_are_complete_and_more_steps_make_them_more_so() -> None:
    net = smooth().double()
    x = TABLE.double()

    def error(steps: int) -> float:
        maps = integrated_gradients(net, x, CLASS, steps=steps, baseline=0.5)
        return float(completeness(net, x, CLASS, maps, 0.5).quantile(0.5))

    assert error(16) < 1e-3
    # The midpoint rule is of second order: four times the steps, a sixteenth of the error.
    assert error(2) / error(8) == pytest.approx(16, rel=0.25)


def test_sixteen_midpoints_are_complete_to_a_few_per_cent_on_a_net_with_kinks() -> None:
    net = cnn()
    maps = integrated_gradients(net, PICTURES, TARGET)
    assert float(completeness(net, PICTURES, TARGET, maps).quantile(0.5)) < 0.03


@pytest.mark.parametrize("method", ["riemann_middle", "riemann_trapezoid", "gausslegendre"])
def test_integrated_gradients_never_run_more_than_one_chunk_at_once(method: str) -> None:
    net, sizes = smooth(), []

    def logits_fn(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return net(x)

    integrated_gradients(logits_fn, TABLE, CLASS, method=method)
    assert sizes == [5] * 16
    sizes.clear()
    integrated_gradients(logits_fn, TABLE, CLASS, method=method, steps=4, chunk_size=3)
    assert sizes == [3] * 4 + [2] * 4


def test_a_baseline_for_each_sample_goes_with_its_chunk() -> None:
    net, baseline = smooth(), rand(5, 6) / 2
    whole = integrated_gradients(net, TABLE, CLASS, baseline=baseline)
    torch.testing.assert_close(integrated_gradients(net, TABLE, CLASS, baseline=baseline, chunk_size=2), whole)


def test_integrated_gradients_need_a_step() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        integrated_gradients(smooth(), TABLE, CLASS, steps=0)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_yes_or_no_logit_is_class_one_and_its_negative_class_zero(shape: tuple[int, ...]) -> None:
    weight = torch.tensor([1.0, -2.0, 4.0])
    x = torch.ones(2, 3)
    signed = integrated_gradients(lambda x: (x @ weight).view(-1, *shape), x, torch.tensor([1, 0]))
    assert torch.equal(signed, torch.stack([weight, -weight]))
    assert torch.equal(gradient(lambda x: (x @ weight).view(-1, *shape), x, torch.tensor([1, 0])), weight.abs() * x)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 5, 7), (2, 3, 9), (2, 6)])
def test_channels_are_summed_and_other_dimensions_stay(shape: tuple[int, ...]) -> None:
    x, weight = rand(*shape), torch.randn(shape[1:], generator=seeded(1))

    def logits_fn(x: Tensor) -> Tensor:
        z = (x * weight).flatten(1).sum(1)
        return torch.stack([z, 2 * z], 1)

    def over_channels(t: Tensor) -> Tensor:
        return t if t.ndim == 2 else t.sum(1)

    target = torch.tensor([1, 1])
    slope = 2 * weight.expand(shape)
    for method in (gradient, smoothgrad):
        torch.testing.assert_close(method(logits_fn, x, target), over_channels(slope.abs()))
    for method in (input_x_gradient, integrated_gradients):
        torch.testing.assert_close(method(logits_fn, x, target), over_channels(slope * x))
