"""Small nets of the kinds that people train, all with seeded weights, and inputs for them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.randomness import seeded

SIDE, CLASSES = 8, 5
TARGET = torch.tensor([0, 4, 2, 2])
ROWS = 4


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=seeded(*shape))


PICTURES, TABLE, SIGNALS = rand(ROWS, 3, SIDE, SIDE), rand(ROWS, 6), rand(ROWS, 2, 12)


def with_seeded_weights(net: nn.Module) -> nn.Module:
    """Large enough that non-linearities and biases count."""
    generator = seeded(7)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return net.eval()


def cnn(
    classes: int = CLASSES, activation: type[nn.Module] = nn.ReLU, *, inplace: bool = False, bias: bool = True
) -> nn.Module:
    """Activations are modules 1 and 4, the last feature map is module 4."""
    make = {"inplace": True} if inplace else {}
    layers = [
        *(nn.Conv2d(3, 4, 3, padding=1, bias=bias), activation(**make), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1, bias=bias), activation(**make), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(6, classes, bias=bias)),
    ]
    return with_seeded_weights(nn.Sequential(*layers))


class FunctionalCnn(nn.Module):
    """The same net as :func:`cnn`, its activations and pooling as functions."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        return self.head(F.relu(self.second(x)).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention as timm writes it: one projection, torch's function, another projection."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer on patches of 2x2, 16 tokens for 8x8 pixels, with ``extra`` class and register tokens."""

    def __init__(
        self,
        classes: int = CLASSES,
        *,
        extra: int = 1,
        kind: Literal["torch", "torch, tokens first", "own"] = "torch",
        layers: int = 2,
        width: int = 8,
    ) -> None:
        super().__init__()
        self.cut, self.extra, self.tokens_first = nn.Conv2d(3, width, 2, stride=2), extra, kind == "torch, tokens first"
        self.front = nn.Parameter(torch.zeros(1, max(extra, 1), width))
        self.place = nn.Parameter(torch.zeros(1, SIDE * SIDE // 4, width))
        if kind == "own":
            self.encoder: nn.Module = nn.Sequential(*(Block(width) for _ in range(layers)))
        else:
            layer = nn.TransformerEncoderLayer(
                width, 2, 2 * width, dropout=0.1, batch_first=not self.tokens_first, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.cut(x).flatten(2).transpose(1, 2) + self.place
        if self.extra:
            tokens = torch.cat([self.front.expand(len(x), -1, -1), tokens], 1)
        tokens = self.encoder(tokens.transpose(0, 1)).transpose(0, 1) if self.tokens_first else self.encoder(tokens)
        return self.head(tokens[:, 0] if self.extra else tokens.mean(1))


class FeatureTokens(nn.Module):
    """A transformer on tables: a token for each feature, and a class token in front, or behind as rtdl had it."""

    def __init__(
        self, features: int = 6, classes: int = CLASSES, token: Literal["first", "last", "none"] = "first"
    ) -> None:
        super().__init__()
        width = 8
        self.weight, self.bias = nn.Parameter(torch.zeros(features, width)), nn.Parameter(torch.zeros(features, width))
        self.token, self.where = nn.Parameter(torch.zeros(1, 1, width)), token
        self.blocks, self.head = nn.Sequential(Block(width), Block(width)), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens, own = x[..., None] * self.weight + self.bias, self.token.expand(len(x), -1, -1)
        if self.where == "none":
            return self.head(self.blocks(tokens).mean(1))
        tokens = self.blocks(torch.cat([own, tokens] if self.where == "first" else [tokens, own], 1))
        return self.head(tokens[:, 0 if self.where == "first" else -1])


def mlp(classes: int = CLASSES, activation: type[nn.Module] = nn.ReLU, *, bias: bool = True) -> nn.Module:
    layers = [nn.Linear(6, 16, bias=bias), activation(), nn.Linear(16, 16, bias=bias), activation()]
    return with_seeded_weights(nn.Sequential(*layers, nn.Linear(16, classes, bias=bias)))
