"""Class activation maps against captum and hand-written ones, on feature maps and on tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam
from saliency.small_nets import PICTURES, SIGNALS, TARGET, ViT, cnn, rand, with_seeded_weights
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.saliency.cam import gradcam, layercam

Method = Callable[..., Tensor]
both = pytest.mark.parametrize("method", [gradcam, layercam])


def by_hand(method: Method, values: Tensor, slopes: Tensor) -> Tensor:
    """Of a feature map ``(N, K, h, w)`` and its gradient, at the size of the pictures."""
    weights = slopes.mean((2, 3), keepdim=True) if method is gradcam else slopes.relu()
    coarse = (weights * values).sum(1, keepdim=True).relu()
    return F.interpolate(coarse, (8, 8), mode="bilinear", align_corners=False)[:, 0].detach()


def test_gradcam_is_captums_enlarged() -> None:
    net = cnn()
    coarse = LayerGradCam(net, net[4]).attribute(PICTURES, TARGET, relu_attributions=True)
    expected = F.interpolate(coarse, (8, 8), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(gradcam(net, PICTURES, TARGET, net[4]), expected.detach())


@both
def test_a_feature_map_is_weighted_by_its_gradient_and_enlarged(method: Method) -> None:
    net = cnn()
    features = net[:5](PICTURES)
    (slopes,) = torch.autograd.grad(net[5:](features)[range(4), TARGET].sum(), features)
    maps = method(net, PICTURES, TARGET, net[4])
    torch.testing.assert_close(maps, by_hand(method, features, slopes))
    assert 0 < float((maps > 0).float().mean()) < 1


@both
def test_an_activation_in_place_does_not_change_what_the_convolution_returned(method: Method) -> None:
    plain, inplace = cnn(), cnn(inplace=True)
    assert torch.equal(method(inplace, PICTURES, TARGET, inplace[3]), method(plain, PICTURES, TARGET, plain[3]))


@both
@pytest.mark.parametrize("extra", [0, 1, 5])
@pytest.mark.parametrize("kind", ["torch", "torch, tokens first", "own"])
def test_tokens_are_laid_out_as_the_grid_of_patches(method: Method, kind: Any, extra: int) -> None:
    net = with_seeded_weights(ViT(kind=kind, extra=extra))
    layer = net.encoder[1].norm1 if kind == "own" else net.encoder.layers[1].norm1
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: kept.append(output))
    logits = net(PICTURES.clone().requires_grad_())
    handle.remove()
    (slopes,) = torch.autograd.grad(logits[range(4), TARGET].sum(), kept[0])
    values = kept[0]
    if kind == "torch, tokens first":
        values, slopes = values.transpose(0, 1), slopes.transpose(0, 1)
    values, slopes = (t[:, extra:].transpose(1, 2).reshape(4, 8, 4, 4) for t in (values, slopes))
    torch.testing.assert_close(method(net, PICTURES, TARGET, layer), by_hand(method, values, slopes))


@both
def test_as_many_tokens_as_samples_are_told_from_the_batch(method: Method) -> None:
    """17 tokens of 17 samples: shapes alone do not say which is which."""
    first, second = (with_seeded_weights(ViT(kind=kind)) for kind in ("torch", "torch, tokens first"))
    x, target = rand(17, 3, 8, 8), torch.arange(17) % 5
    expected = method(first, x, target, first.encoder.layers[1].norm1)
    torch.testing.assert_close(method(second, x, target, second.encoder.layers[1].norm1), expected)
    alone = method(first, x[3:5], target[3:5], first.encoder.layers[1].norm1)
    torch.testing.assert_close(expected[3:5], alone)


@both
def test_channels_may_be_last(method: Method) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.norm, self.head = nn.Conv2d(3, 6, 2, stride=2), nn.LayerNorm(6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.cut(x).movedim(1, -1)).pow(2).mean((1, 2)))

    net = with_seeded_weights(Last())
    values = net.norm(net.cut(PICTURES).movedim(1, -1))
    (slopes,) = torch.autograd.grad(net.head(values.pow(2).mean((1, 2)))[range(4), TARGET].sum(), values)
    expected = by_hand(method, values.movedim(-1, 1), slopes.movedim(-1, 1))
    torch.testing.assert_close(method(net, PICTURES, TARGET, net.norm), expected)


@both
def test_of_a_layer_that_returns_several_things_the_first_counts(method: Method) -> None:
    net = with_seeded_weights(ViT())
    plain = method(net, PICTURES, TARGET, net.encoder.layers[0])

    class Pair(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, **more: Any) -> tuple[Tensor, str]:
            return self.inner(x), "weights"

    class First(nn.Module):
        def __init__(self, pair: nn.Module) -> None:
            super().__init__()
            self.pair = pair

        def forward(self, x: Tensor, **more: Any) -> Tensor:
            return self.pair(x)[0]

    pair = Pair(net.encoder.layers[0])
    net.encoder.layers[0] = First(pair)
    net.encoder.layers[0].self_attn = pair.inner.self_attn  # nn.TransformerEncoder looks at it
    torch.testing.assert_close(method(net, PICTURES, TARGET, pair), plain)


@both
def test_a_layer_behind_which_only_the_class_token_is_read_has_nothing_to_map(method: Method) -> None:
    net = with_seeded_weights(ViT())
    with pytest.raises(ValueError, match="on TransformerEncoderLayer's class token alone, not on the patches"):
        method(net, PICTURES, TARGET, net.encoder.layers[1])
    mean = with_seeded_weights(ViT(extra=0))
    assert float(method(mean, PICTURES, TARGET, mean.encoder.layers[1]).amax()) > 0


@both
def test_maps_of_a_signal_are_enlarged_along_it(method: Method) -> None:
    net = with_seeded_weights(nn.Sequential(nn.Conv1d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(15, 5)))
    features = net[:1](SIGNALS)
    (slopes,) = torch.autograd.grad(net[1:](features)[range(4), TARGET].sum(), features)
    weights = slopes.mean(2, keepdim=True) if method is gradcam else slopes.relu()
    coarse = (weights * features).sum(1, keepdim=True).relu()
    expected = F.interpolate(coarse, 12, mode="linear")[:, 0].detach()
    torch.testing.assert_close(method(net, SIGNALS, TARGET, net[0]), expected)


@both
def test_a_layer_that_is_no_map_is_refused(method: Method) -> None:
    net = cnn()
    with pytest.raises(ValueError, match=r"output is \(M, K, ...\) like the input \(4, 3, 8, 8\).* Linear is \(4, 5\)"):
        method(net, PICTURES, TARGET, net[7])


@both
def test_a_layer_that_runs_twice_or_not_at_all_is_refused(method: Method) -> None:
    relu = nn.ReLU()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(ValueError, match="ReLU: it ran 2 times"):
        method(net, PICTURES, TARGET, relu)
    with pytest.raises(ValueError, match="Conv2d: it ran 0 times"):
        method(net, PICTURES, TARGET, nn.Conv2d(3, 4, 3))
    assert not relu._forward_hooks


@both
def test_a_layer_beside_the_way_to_the_logits_is_refused(method: Method) -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aside, self.head = nn.Conv2d(3, 4, 3), nn.Linear(192, 5)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return self.head(x.flatten(1))

    net = Aside()
    with pytest.raises(ValueError, match="the logits do not depend on what Conv2d returns"):
        method(net, PICTURES, TARGET, net.aside)
