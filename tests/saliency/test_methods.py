"""Attribution maps against hand-written gradients, closed forms and captum's own quadrature."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.randomness import RandomState, seeded
from lightning_robust.saliency import METHODS, gradcam, gradient, integrated_gradients, method_named


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=seeded(*shape))


def cnn(inplace: bool = False) -> nn.Sequential:
    layers = [
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=inplace), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=inplace), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(6, 5)),
    ]
    return seeded_weights(nn.Sequential(*layers))


def seeded_weights(net: nn.Sequential) -> nn.Sequential:
    generator = seeded(7)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return net


def smooth() -> nn.Sequential:
    return seeded_weights(nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)))


X, TARGET = rand(4, 3, 8, 8), torch.tensor([0, 4, 2, 2])


def maps_of(name: str, net: nn.Sequential, x: Tensor, target: Tensor) -> Tensor:
    return METHODS[name](net, x, target, *([net[4]] if name == "gradcam" else []))


def test_gradients_are_those_written_by_hand() -> None:
    net, x = cnn(), X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(net(x)[range(4), TARGET].sum(), x)
    assert torch.equal(gradient(net, X, TARGET), expected.abs().sum(1))


def test_gradcam_is_the_feature_map_weighted_by_its_mean_gradient_and_enlarged() -> None:
    net = cnn()
    features = net[:5](X)
    (slopes,) = torch.autograd.grad(net[5:](features)[range(4), TARGET].sum(), features)
    coarse = (slopes.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
    expected = F.interpolate(coarse, (8, 8), mode="bilinear", align_corners=False)[:, 0]
    maps = gradcam(net, X, TARGET, net[4])
    torch.testing.assert_close(maps, expected, rtol=0, atol=0)
    assert 0 < float((maps > 0).float().mean()) < 1


def test_gradcam_before_an_activation_in_place_sees_what_the_convolution_returned() -> None:
    plain, inplace = cnn(), cnn(inplace=True)
    assert torch.equal(gradcam(inplace, X, TARGET, inplace[3]), gradcam(plain, X, TARGET, plain[3]))


def test_integrated_gradients_of_a_linear_model_are_weight_times_distance_from_the_baseline() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0], [0.0, 5.0]])
    x, target = torch.tensor([[1.0, 0.5], [2.0, -1.0]]), torch.tensor([1, 0])
    rows = weight[:, target].T
    assert torch.equal(integrated_gradients(lambda x: F.pad(x, (0, 1)) @ weight, x, target), x * rows[:, :2])
    moved = integrated_gradients(lambda x: F.pad(x, (0, 1)) @ weight, x, target, baseline=torch.tensor([1.0, 0.25]))
    assert torch.equal(moved, (x - torch.tensor([1.0, 0.25])) * rows[:, :2])


def test_integrated_gradients_agree_with_captums_fifty_gauss_legendre_points_on_a_smooth_net() -> None:
    net, x, target = smooth(), rand(5, 12), torch.tensor([0, 1, 2, 0, 1])
    expected = IntegratedGradients(net).attribute(x, target=target)
    maps = integrated_gradients(net, x, target)
    torch.testing.assert_close(maps, expected.float(), rtol=0, atol=2e-3 * float(expected.abs().max()))
    default = integrated_gradients(net, x, target, steps=50, method="gausslegendre")
    torch.testing.assert_close(default, expected.float())


def test_integrated_gradients_are_complete_and_more_steps_make_them_more_so() -> None:
    net, x, target = smooth().double(), rand(5, 12).double(), torch.tensor([0, 1, 2, 0, 1])
    rise = (net(x) - net(torch.full_like(x, 0.5)))[range(5), target].detach()

    def error(steps: int) -> float:
        return float((integrated_gradients(net, x, target, steps=steps, baseline=0.5).sum(1) - rise).abs().max())

    assert error(16) < 1e-3 * float(rise.abs().max())
    # The midpoint rule is of second order: four times the steps, a sixteenth of the error.
    assert error(4) / error(16) == pytest.approx(16, rel=0.15)


@pytest.mark.parametrize("method", ["riemann_middle", "riemann_trapezoid", "gausslegendre"])
def test_integrated_gradients_never_run_more_than_one_batch_at_once(method: str) -> None:
    net, sizes = smooth(), []

    def logits_fn(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return net(x)

    integrated_gradients(logits_fn, rand(5, 12), torch.zeros(5, dtype=torch.long), method=method)
    assert sizes == [5] * 16


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

    over_channels = (lambda t: t) if len(shape) == 2 else (lambda t: t.sum(1))
    target = torch.tensor([1, 1])
    slope = 2 * weight.expand(shape)
    torch.testing.assert_close(gradient(logits_fn, x, target), over_channels(slope.abs()))
    torch.testing.assert_close(integrated_gradients(logits_fn, x, target), over_channels(slope * x))


def test_gradcam_of_a_signal_is_enlarged_along_it() -> None:
    net = seeded_weights(nn.Sequential(nn.Conv1d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(15, 2)))
    x, target = rand(3, 2, 11), torch.tensor([0, 1, 0])
    features = net[:1](x)
    (slopes,) = torch.autograd.grad(net[1:](features)[range(3), target].sum(), features)
    coarse = (slopes.mean(2, keepdim=True) * features).sum(1, keepdim=True).relu()
    assert torch.equal(gradcam(net, x, target, net[0]), F.interpolate(coarse, 11, mode="linear")[:, 0])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", METHODS)
def test_maps_are_the_same_where_gradients_are_off(name: str, context: Callable[[], torch.no_grad]) -> None:
    net = cnn()
    expected = maps_of(name, net, X, TARGET)
    with context():
        x, target = X.clone(), TARGET.clone()  # inference tensors, in inference mode
        maps = maps_of(name, net, x, target)
        assert torch.equal(x, X)
    assert torch.equal(maps, expected)
    assert not maps.is_inference()


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_left_behind(name: str) -> None:
    net, x = cnn(), X.clone().requires_grad_()
    random = RandomState.capture()
    maps = maps_of(name, net, x, TARGET)
    assert random.is_current()
    assert torch.equal(x, X)
    assert x.grad is None
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    assert (maps.dtype, maps.requires_grad, maps.shape) == (torch.float32, False, (4, 8, 8))


@pytest.mark.parametrize("name", METHODS)
def test_frozen_nets_and_double_precision_have_maps_too(name: str) -> None:
    net = cnn()
    expected = maps_of(name, net, X, TARGET)
    maps = maps_of(name, net.double().requires_grad_(False), X.double(), TARGET)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_sample_has_the_same_map_alone_and_in_a_batch(name: str) -> None:
    net = cnn()
    alone = torch.cat([maps_of(name, net, X[i : i + 1], TARGET[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, maps_of(name, net, X, TARGET))


@pytest.mark.parametrize("place", [0, 1])
def test_gradcam_refuses_tokens_and_flat_features(place: int) -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).transpose(1, 2)

    net = nn.Sequential(Tokens(), nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(ValueError, match=r"output is \(M, K, ...\) like the input \(4, 3, 8, 8\)"):
        gradcam(net, X, TARGET, net[place])


def test_what_cannot_be_explained_is_refused() -> None:
    net = cnn()
    with pytest.raises(ValueError, match=r"floating point inputs \(N, ...\), got torch.int64 \(4, 7\)"):
        gradient(net, torch.zeros(4, 7, dtype=torch.long), TARGET)
    with pytest.raises(ValueError, match=r"one target class per sample, \(4,\), got \(3,\)"):
        gradient(net, X, TARGET[:3])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        integrated_gradients(net, X, TARGET, steps=0)


def test_methods_have_names_and_a_wrong_one_gets_the_nearest() -> None:
    assert [method_named(name) for name in METHODS] == [gradient, integrated_gradients, gradcam]
    with pytest.raises(ValueError, match=r"got 'grad-cam'\. Did you mean 'gradcam'\?"):
        method_named("grad-cam")
