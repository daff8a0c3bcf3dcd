"""What all saliency methods keep to, on nets of all kinds, and what counts as a method."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import LRP, DeepLift, GuidedBackprop, NoiseTunnel, Saliency
from saliency.small_nets import (
    PICTURES,
    SIGNALS,
    TABLE,
    TARGET,
    FeatureTokens,
    FunctionalCnn,
    ViT,
    cnn,
    mlp,
    with_seeded_weights,
)
from torch import Tensor, nn

from lightning_robust.randomness import RandomState
from lightning_robust.saliency import last_feature_map
from lightning_robust.saliency.methods import METHODS, as_method, gradient, method_named, smoothgrad


def signals() -> nn.Module:
    layers = [nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(3), nn.Flatten(), nn.Linear(12, 5)]
    return with_seeded_weights(nn.Sequential(*layers))


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "cnn": (cnn, PICTURES),
    "cnn in place": (lambda: cnn(inplace=True), PICTURES),
    "cnn of functions": (lambda: with_seeded_weights(FunctionalCnn()), PICTURES),
    "cnn of gelu": (lambda: cnn(activation=nn.GELU), PICTURES),
    "yes/no cnn": (lambda: cnn(1), PICTURES),
    "vit, class token": (lambda: with_seeded_weights(ViT()), PICTURES),
    "vit, tokens first": (lambda: with_seeded_weights(ViT(kind="torch, tokens first")), PICTURES),
    "vit, own attention": (lambda: with_seeded_weights(ViT(kind="own")), PICTURES),
    "vit, mean": (lambda: with_seeded_weights(ViT(extra=0)), PICTURES),
    "signals": (signals, SIGNALS),
    "mlp": (mlp, TABLE),
    "yes/no mlp": (lambda: mlp(1), TABLE),
    "table of tokens": (lambda: with_seeded_weights(FeatureTokens()), TABLE),
}
ANYWHERE = ("gradient", "input_x_gradient", "integrated_gradients", "smoothgrad", "occlusion")
CNNS = ("cnn", "cnn in place", "cnn of functions", "cnn of gelu", "yes/no cnn")
VITS = ("vit, class token", "vit, tokens first", "vit, own attention", "vit, mean")
RULES = ("cnn", "cnn in place", "yes/no cnn", "signals", "mlp", "yes/no mlp")
FITTING = {
    **dict.fromkeys(ANYWHERE, tuple(NETS)),
    **dict.fromkeys(("gradcam", "layercam"), (*CNNS, *VITS)),
    "hidden_tiles": (*CNNS, *VITS),
    "attention_rollout": (*VITS, "table of tokens"),
    **dict.fromkeys(("deep_lift", "lrp"), RULES),
}
PAIRS = [(method, net) for method, nets in FITTING.items() for net in nets]
each = pytest.mark.parametrize(("method", "kind"), PAIRS, ids=lambda text: text.replace(" ", "_"))
# One net for each method, where the net does not matter.
ONE = [(method, nets[0]) for method, nets in FITTING.items()]
one = pytest.mark.parametrize(("method", "kind"), ONE)


def case(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    make, x = NETS[kind]
    return make(), x, TARGET.clamp(max=1) if kind.startswith("yes/no") else TARGET


def maps_of(method: str, net: nn.Module, x: Tensor, target: Tensor, **more: Any) -> Tensor:
    function = METHODS[method]
    takes = inspect.signature(function).parameters
    if "layer" in takes:
        name = last_feature_map(net, lambda: net(x))
        assert name is not None
        more["layer"] = net.get_submodule(name)
    if "module" in takes:
        more["module"] = net
    if "samples" in takes:
        more["samples"] = 4  # enough for what is asked here
    return function(net, x, target, **more)


def close(maps: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


def test_every_method_is_tried() -> None:
    assert sorted(FITTING) == sorted(METHODS)


@each
def test_maps_are_over_the_input_and_do_not_depend_on_chunks(method: str, kind: str) -> None:
    net, x, target = case(kind)
    maps = maps_of(method, net, x, target)
    assert (maps.dtype, maps.requires_grad) == (torch.float32, False)
    assert maps.shape == (x.shape if x.ndim == 2 else (len(x), *x.shape[2:]))
    assert bool(maps.isfinite().all())
    for size in (1, 3):
        close(maps_of(method, net, x, target, chunk_size=size), maps)


@one
def test_a_sample_has_the_same_map_alone_and_at_another_place(method: str, kind: str) -> None:
    net, x, target = case(kind)
    maps = maps_of(method, net, x, target)
    close(maps_of(method, net, x[2:3], target[2:3]), maps[2:3])
    close(maps_of(method, net, x.flip(0), target.flip(0)).flip(0), maps)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@one
def test_maps_are_the_same_where_gradients_are_off(method: str, kind: str, context: Callable[[], Any]) -> None:
    net, x, target = case(kind)
    expected = maps_of(method, net, x, target)
    with context():
        inside, wanted = x.clone(), target.clone()  # inference tensors, in inference mode
        maps = maps_of(method, net, inside, wanted)
        assert torch.equal(inside, x)
    close(maps, expected)
    assert not maps.is_inference()


@each
def test_nothing_is_left_behind(method: str, kind: str) -> None:
    net, x, target = case(kind)
    x = x.clone().requires_grad_()
    attributes = [{name: copy.copy(value) for name, value in vars(part).items()} for part in net.modules()]
    storage = [(p.data_ptr(), p._version, p.clone()) for p in net.parameters()]
    random = RandomState.capture()
    maps_of(method, net, x, target)
    assert random.is_current()
    assert x.grad is None
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [dict(vars(part)) for part in net.modules()] == attributes
    for parameter, (place, version, value) in zip(net.parameters(), storage, strict=True):
        assert (parameter.data_ptr(), parameter._version) == (place, version)
        assert torch.equal(parameter, value)


@one
def test_frozen_nets_and_double_precision_have_maps_too(method: str, kind: str) -> None:
    net, x, target = case(kind)
    expected = maps_of(method, net, x, target)
    maps = maps_of(method, net.double().requires_grad_(False), x.double(), target)
    assert maps.dtype == torch.float32
    close(maps, expected)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"attention_rollout", "gradcam", "hidden_tiles", "layercam"}))
def test_no_is_the_negative_of_yes(method: str) -> None:
    net, x, _ = case("yes/no cnn")
    yes, no = (maps_of(method, net, x, torch.full((4,), label)) for label in (1, 0))
    close(no, yes if method in ("gradient", "smoothgrad") else -yes)


@one
def test_what_cannot_be_explained_is_refused(method: str, kind: str) -> None:
    net, x, target = case(kind)
    layer = {"layer": net} if "layer" in inspect.signature(METHODS[method]).parameters else {}
    layer |= {"module": net} if "module" in inspect.signature(METHODS[method]).parameters else {}
    run = functools.partial(METHODS[method], **layer)
    with pytest.raises(ValueError, match=r"floating point inputs \(N, ...\), got torch.int64 \(4, 7\)"):
        run(net, torch.zeros(4, 7, dtype=torch.long), target)
    with pytest.raises(ValueError, match=r"one target class per sample, \(4,\), got \(3,\)"):
        run(net, x, target[:3])
    with pytest.raises(ValueError, match="at least one input to explain"):
        run(net, x[:0], target[:0])
    with pytest.raises(ValueError, match="chunk_size= is the number of samples a forward, at least 1"):
        run(net, x, target, chunk_size=0)


def test_methods_have_names_and_a_wrong_one_gets_the_nearest() -> None:
    assert [method_named(name) for name in METHODS] == list(METHODS.values())
    with pytest.raises(ValueError, match=r"got 'grad-cam'\. Did you mean 'gradcam'\?"):
        method_named("grad-cam")
    with pytest.raises(ValueError, match=r"got 'grad-cam'\. Did you mean 'gradcam'\?"):
        as_method("grad-cam")


def own(logits_fn: Any, x: Tensor, target: Tensor, *, seed: int, scale: float = 2.0) -> Tensor:
    return scale * x + seed


def test_a_method_is_a_name_a_function_or_an_attribution_of_captum() -> None:
    assert as_method("gradcam") == ("gradcam", METHODS["gradcam"])
    assert as_method(own) == ("own", own)
    more = functools.partial(smoothgrad, samples=3)
    assert as_method(more) == ("smoothgrad", more)
    assert as_method(GuidedBackprop)[0] == "guided_backprop"
    assert as_method(NoiseTunnel(Saliency(cnn())))[0] == "noise_tunnel"
    # Of these two there are checked versions.
    assert as_method(DeepLift) == ("deep_lift", METHODS["deep_lift"])
    assert as_method(LRP) == ("lrp", METHODS["lrp"])


def test_an_object_is_called_by_its_own_name() -> None:
    class Named:
        name = "mine"

        def __call__(self, logits_fn: Any, x: Tensor, target: Tensor) -> Tensor:
            return x

    method = Named()
    assert as_method(method) == ("mine", method)
    del Named.name
    assert as_method(method)[0] == "Named"


def test_what_is_no_method_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"must be one of gradient, .* or an attribution of captum; got 3"):
        as_method(3)
    with pytest.raises(ValueError, match="or an attribution of captum; got <class 'dict'>"):
        as_method(dict)
    with pytest.raises(ValueError, match="'<lambda>' is none: write a function with `def`"):
        as_method(lambda logits_fn, x, target: x)

    def needy(logits_fn: Any, x: Tensor, target: Tensor, *, mask: Tensor) -> Tensor:
        return x * mask

    with pytest.raises(ValueError, match=r"needy\(.*missing a required argument: 'mask'"):
        as_method(needy)
    assert as_method(functools.partial(needy, mask=torch.ones(1)))[0] == "needy"

    def short(x: Tensor) -> Tensor:
        return x

    with pytest.raises(ValueError, match="too many positional arguments"):
        as_method(short)


def test_maps_of_a_graph_inside_the_users_own_stay_out_of_it() -> None:
    net, x, target = case("cnn")
    loss = net(x).sum()
    for method in ("gradient", "deep_lift", "lrp"):
        maps_of(method, net, x, target)
    loss.backward()  # no weight was touched
    assert gradient(net, x, target).requires_grad is False
