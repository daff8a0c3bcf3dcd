"""captum's own attributions under our signature: the same maps, and nothing of captum left behind."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from captum.attr import (
    LRP,
    Deconvolution,
    FeatureAblation,
    GradientShap,
    GuidedBackprop,
    GuidedGradCam,
    IntegratedGradients,
    KernelShap,
    LayerActivation,
    LayerGradCam,
    LayerGradientXActivation,
    NeuronGradient,
    NoiseTunnel,
    Occlusion,
    Saliency,
    ShapleyValueSampling,
)
from saliency.small_nets import (
    PICTURES,
    TABLE,
    TARGET,
    FunctionalCnn,
    ViT,
    cnn,
    mlp,
    with_seeded_weights,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.randomness import RandomState
from lightning_robust.saliency.foreign import from_captum, is_captum
from lightning_robust.saliency.gradients import gradient, integrated_gradients
from lightning_robust.saliency.occlusion import occlusion


def needs(method: Any) -> list[str]:
    return list(inspect.signature(method).parameters)[3:]


@pytest.mark.parametrize(
    ("attribution", "settings", "expected"),
    [
        (Saliency, {}, ["chunk_size", "seed"]),
        (IntegratedGradients, {}, ["chunk_size", "seed", "baseline"]),
        (IntegratedGradients, {"baselines": 0.5}, ["chunk_size", "seed"]),
        (GuidedBackprop, {}, ["chunk_size", "module", "seed"]),
        (LayerGradCam, {}, ["chunk_size", "layer", "seed"]),
        (GuidedGradCam, {}, ["chunk_size", "module", "layer", "seed"]),
        (GradientShap, {"baselines": PICTURES}, ["chunk_size", "seed"]),
        (NoiseTunnel(Saliency(cnn())), {}, ["chunk_size", "seed"]),
    ],
)
def test_a_method_asks_for_what_captum_needs(attribution: Any, settings: dict[str, Any], expected: list[str]) -> None:
    method = from_captum(attribution, **settings)
    assert needs(method) == expected
    required = {
        name for name, p in inspect.signature(method).parameters.items() if p.default is inspect.Parameter.empty
    }
    assert required == {"logits_fn", "x", "target"} | ({"module", "layer"} & set(expected))


def test_captums_methods_give_the_maps_of_ours() -> None:
    net = cnn()
    assert torch.equal(from_captum(Saliency)(net, PICTURES, TARGET), gradient(net, PICTURES, TARGET))
    paths = from_captum(IntegratedGradients, n_steps=16, method="riemann_middle")
    expected = integrated_gradients(net, PICTURES, TARGET, baseline=0.25)
    torch.testing.assert_close(paths(net, PICTURES, TARGET, baseline=0.25, chunk_size=3), expected)
    windows = from_captum(Occlusion, sliding_window_shapes=(3, 2, 2), strides=(3, 1, 1))
    torch.testing.assert_close(windows(net, PICTURES, TARGET) / 3, occlusion(net, PICTURES, TARGET))


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
@pytest.mark.parametrize("attribution", [GuidedBackprop, Deconvolution])
def test_methods_that_hook_modules_are_captums(attribution: Any) -> None:
    net = cnn()
    expected = attribution(net).attribute(PICTURES.clone().requires_grad_(), TARGET).sum(1).detach()
    method = from_captum(attribution)
    attributes = [{name: copy.copy(value) for name, value in vars(part).items()} for part in net.modules()]
    with torch.inference_mode():
        maps = method(lambda x: net(x), PICTURES, TARGET, module=net, chunk_size=2)
    torch.testing.assert_close(maps, expected)
    assert [dict(vars(part)) for part in net.modules()] == attributes


@pytest.mark.parametrize("attribution", [GuidedBackprop, GuidedGradCam])
def test_guided_methods_want_modules_to_guide_through(attribution: Any) -> None:
    net = with_seeded_weights(FunctionalCnn())
    layer = {"layer": net.second} if attribution is GuidedGradCam else {}
    with pytest.raises(ValueError, match=r"backward pass of nn.ReLU, and FunctionalCnn has none"):
        from_captum(attribution)(net, PICTURES, TARGET, module=net, **layer)


def test_maps_of_a_layer_are_enlarged_to_the_input() -> None:
    net = cnn()
    coarse = LayerGradientXActivation(net, net[4]).attribute(PICTURES, TARGET).sum(1, keepdim=True)
    expected = F.interpolate(coarse, (8, 8), mode="bilinear")[:, 0].detach()
    maps = from_captum(LayerGradientXActivation)(net, PICTURES, TARGET, layer=net[4])
    torch.testing.assert_close(maps, expected)
    assert from_captum(LayerActivation)(net, PICTURES, TARGET, layer=net[4]).shape == (4, 8, 8)


def test_tokens_of_a_layer_are_laid_out_and_averages_over_tokens_are_refused() -> None:
    net = with_seeded_weights(ViT())
    layer = net.encoder.layers[1].norm1
    assert from_captum(LayerGradientXActivation)(net, PICTURES, TARGET, layer=layer).shape == (4, 8, 8)
    with pytest.raises(ValueError, match=r"that of LayerNorm is \(4, 1, 8\)"):
        from_captum(LayerGradCam)(net, PICTURES, TARGET, layer=layer)


def test_a_yes_no_head_has_two_classes_for_captum_too() -> None:
    net = mlp(1)
    target = torch.tensor([0, 1, 0, 1])
    maps = from_captum(FeatureAblation)(net, TABLE, target)
    torch.testing.assert_close(maps, occlusion(net, TABLE, target))


@pytest.mark.parametrize(
    "method",
    [
        from_captum(ShapleyValueSampling, n_samples=2),
        from_captum(KernelShap, n_samples=4),
        from_captum(GradientShap, baselines=torch.zeros(2, 6), n_samples=2, stdevs=0.1),
        from_captum(NoiseTunnel(Saliency(mlp())), nt_samples=2),
    ],
    ids=["shapley", "kernel shap", "gradient shap", "noise tunnel"],
)
def test_random_numbers_are_seeded_and_nobody_elses(method: Any) -> None:
    net, random = mlp(), RandomState.capture()
    first, again, other = (method(net, TABLE, TARGET, seed=seed) for seed in (0, 0, 1))
    assert random.is_current()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_ready_instance_explains_what_it_was_built_around() -> None:
    net, other = mlp(), with_seeded_weights(mlp(activation=nn.Tanh))
    method = from_captum(Saliency(net), abs=False)
    expected = Saliency(net).attribute(TABLE.clone().requires_grad_(), TARGET, abs=False)
    assert torch.equal(method(other, TABLE, TARGET), expected)


def test_neurons_have_maps_over_the_input() -> None:
    net = mlp()
    maps = from_captum(NeuronGradient, neuron_selector=3)(net, TABLE, TARGET, layer=net[1])
    assert maps.shape == TABLE.shape


def test_names_are_those_of_the_classes() -> None:
    names = [from_captum(kind).name for kind in (Saliency, LayerGradCam, GuidedGradCam, KernelShap)]  # type: ignore[attr-defined]  # a method of an own class
    assert names == ["saliency", "layer_grad_cam", "guided_grad_cam", "kernel_shap"]


def test_what_is_not_of_captum_is_told_from_it() -> None:
    class Mine(Saliency):
        pass

    class Foreign:
        def attribute(self, x: Tensor) -> Tensor:
            return x

    assert is_captum(Mine)
    assert is_captum(Mine(abs))
    assert not is_captum(Foreign())
    assert not is_captum(gradient)
    with pytest.raises(ValueError, match="takes a class or an instance of captum"):
        from_captum(Foreign)


def test_what_cannot_work_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"NoiseTunnel is built from 'attribution_method', .* give an instance"):
        from_captum(NoiseTunnel)
    with pytest.raises(ValueError, match=r"missing a required argument: 'sliding_window_shapes'"):
        from_captum(Occlusion)
    with pytest.raises(ValueError, match="got an unexpected keyword argument 'steps'"):
        from_captum(IntegratedGradients, steps=3)
    with pytest.raises(ValueError, match="missing a required argument: 'baselines'"):
        from_captum(GradientShap)
    with pytest.raises(ValueError, match="returns maps alone"):
        from_captum(IntegratedGradients, return_convergence_delta=True)
    net = cnn()
    with pytest.raises(ValueError, match=r"captum's LRP cannot follow Sequential: .*Flatten'> has no rule"):
        from_captum(LRP)(net, PICTURES, TARGET, module=net)
    with pytest.raises(TypeError, match="missing a required argument: 'module'"):
        from_captum(GuidedBackprop)(cnn(), PICTURES, TARGET)
