"""Finding the layer for class activation maps in nets that are written in different ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saliency.small_nets import Attention, FeatureTokens, ViT
from torch import Tensor, nn

from lightning_robust.saliency import last_feature_map


def found(net: nn.Module, *shape: int) -> str | None:
    name = last_feature_map(net.eval(), lambda: net(torch.rand(2, *(shape or (3, 16, 16)))))
    assert not any(part._forward_hooks for part in net.modules())
    return name


class Residual(nn.Module):
    """Written as torchvision writes it: one ReLU, in place, used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Head(nn.Module):
    def __init__(self, features: nn.Module, width: int, tail: nn.Module | None = None) -> None:
        super().__init__()
        self.features, self.tail, self.fc = features, tail or nn.AdaptiveAvgPool2d(1), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.tail(self.features(x)).flatten(1))


def test_normalisation_and_activation_after_the_last_convolution_are_in() -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )
    assert found(net) == "5"


def test_pooling_after_the_last_convolution_is_out() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(196, 5))
    assert found(net) == "1"
    # The container ends with the pooled map, so it is not the one either.
    assert found(Head(net[:3], 4)) == "features.1"


def test_an_activation_that_is_used_twice_is_passed_over() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.relu(self.second(self.relu(self.first(x)))).mean((2, 3)))

    assert found(Twice()) == "second"


def test_a_residual_block_ends_after_its_sum() -> None:
    stem = nn.Conv2d(3, 4, 3)
    assert found(Head(nn.Sequential(stem, Residual(4)), 4)) == "features"
    # A further name in between: its last block and the container are the same map, the container is named.
    assert found(Head(nn.Sequential(stem, nn.Sequential(Residual(4), Residual(4)), nn.MaxPool2d(2)), 4)) == "features.1"


def test_squeeze_and_excitation_and_convolutional_heads_are_no_feature_maps() -> None:
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(self.pool(x)).sigmoid()

    assert found(Head(nn.Sequential(nn.Conv2d(3, 4, 3), Squeeze()), 4)) == "features"
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1))
    assert found(Head(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 4, head)) == "features"


def test_where_every_convolution_ends_in_one_pixel_there_is_no_map() -> None:
    assert found(nn.Sequential(nn.Conv2d(3, 4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5))) is None


@pytest.mark.parametrize("shape", [(12,), (3, 16)])
def test_without_a_convolution_in_two_dimensions_there_is_no_map(shape: tuple[int, ...]) -> None:
    layers: list[nn.Module] = [nn.Linear(12, 8), nn.ReLU()] if len(shape) == 1 else [nn.Conv1d(3, 8, 3)]
    assert found(nn.Sequential(*layers), *shape) is None


class Tokens(nn.Module):
    """A vision transformer: the convolution cuts patches, the rest is attention."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.cut, self.mixer, self.fc = nn.Conv2d(3, 8, 4, stride=4), mixer, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.cut(x).flatten(2).transpose(1, 2)
        mixed = self.mixer(tokens, tokens, tokens)[0] if isinstance(self.mixer, nn.MultiheadAttention) else None
        return self.fc((self.mixer(tokens) if mixed is None else mixed).mean(1))


class OwnAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2)).softmax(-1) @ x


@pytest.mark.parametrize(
    "mixer",
    [
        nn.MultiheadAttention(8, 2, batch_first=True),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
        OwnAttention(),
    ],
    ids=lambda mixer: type(mixer).__name__,
)
def test_of_a_single_attention_the_patches_in_front_are_looked_at(mixer: nn.Module) -> None:
    assert found(Tokens(mixer)) == "cut"
    # In evaluation without gradients torch may take a fast path of its own.
    with torch.no_grad():
        assert found(Tokens(mixer)) == "cut"


def test_attention_that_keeps_feature_maps_is_none() -> None:
    class SpatialAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Conv2d(4, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(x).sigmoid()

    assert found(Head(nn.Sequential(nn.Conv2d(3, 4, 3), SpatialAttention()), 4)) == "features"


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("torch", "encoder.layers.1.norm1"),
        ("torch, tokens first", "encoder.layers.1.norm1"),
        ("own", "encoder.1.norm1"),
    ],
)
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_of_a_transformer_the_norm_before_the_last_attention_is_looked_at(kind: Any, layer: str, extra: int) -> None:
    assert found(ViT(kind=kind, extra=extra), 3, 8, 8) == layer
    with torch.no_grad():
        assert found(ViT(kind=kind, extra=extra), 3, 8, 8) == layer


def test_without_a_norm_in_front_it_is_the_block_before() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # its norms come after
    assert found(Tokens(nn.TransformerEncoder(layer, 3))) == "mixer.layers.1"


def test_projections_inside_of_the_attention_are_passed_over() -> None:
    class SelfAttention(nn.Module):
        """As transformers writes it: three projections, in a module of their own."""

        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            q, k, v = (part(x)[:, None] for part in (self.query, self.key, self.value))
            return nn.functional.scaled_dot_product_attention(q, k, v)[:, 0], None

    class OuterAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.output = SelfAttention(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.attention(x)[0])

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layernorm_before, self.attention = nn.LayerNorm(8), OuterAttention()
            self.layernorm_after, self.dense = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            x = x + self.attention(self.layernorm_before(x))
            return (x + self.dense(self.layernorm_after(x)),)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ModuleList([Layer(), Layer()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layer:
                x = layer(x)[0]
            return x

    assert found(Tokens(Encoder())) == "mixer.layer.1.layernorm_before"


def test_projections_in_a_block_without_an_attention_module_are_passed_over() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q, self.k, self.v = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            z = self.norm(x)
            return x + nn.functional.scaled_dot_product_attention(self.q(z), self.k(z), self.v(z))

    assert found(Tokens(nn.Sequential(Flat(), Flat()))) == "mixer.1.norm"


def test_attention_in_windows_is_looked_at_before_the_windows() -> None:
    class WindowAttention(Attention):
        """Of maps with the channels last, in windows of 2x2, as timm's Swin."""

    class Swin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.attn = nn.LayerNorm(8), WindowAttention(8)

        def forward(self, x: Tensor) -> Tensor:
            n, side = x.shape[:2]
            cut = self.norm1(x).view(n, side // 2, 2, side // 2, 2, 8).transpose(2, 3).reshape(-1, 4, 8)
            back = self.attn(cut).view(n, side // 2, side // 2, 2, 2, 8).transpose(2, 3).reshape(x.shape)
            return x + back

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.blocks = nn.Conv2d(3, 8, 4, stride=4), nn.Sequential(Swin(), Swin())
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.cut(x).movedim(1, -1)).mean((1, 2)))

    assert found(Net()) == "blocks.1.norm1"


def test_tokens_of_a_table_have_a_layer_too() -> None:
    assert found(FeatureTokens(), 6) == "blocks.1.norm1"


def test_convolutions_after_the_last_attention_are_looked_at_as_in_any_such_net() -> None:
    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attn, self.last = nn.Conv2d(3, 8, 4, stride=4), Attention(8), nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = self.attn(x.flatten(2).transpose(1, 2)).transpose(1, 2).view(x.shape)
            return self.head(self.last(x).mean((2, 3)))

    assert found(Hybrid()) == "last"


def test_attention_without_anything_in_front_has_no_layer() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.head = nn.MultiheadAttention(12, 2, batch_first=True), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attn(x, x, x)[0].mean(1))

    assert found(Bare(), 7, 12) is None


def test_a_part_that_fails_and_is_caught_does_not_confuse_the_names() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError

    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.risky, self.conv = Fails(), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.risky(x)
            except RuntimeError:
                x = self.conv(x)
            return x

    assert found(Head(Careful(), 4)) == "features"


def test_hooks_are_gone_when_the_run_fails() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        last_feature_map(net, lambda: net(torch.rand(1, 3, 8, 8)))
    assert not any(part._forward_hooks for part in net.modules())
