"""Small networks and loss calls in double precision, and parameter gradients in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.losses import LossCall

X = torch.tensor([[0.5, 0.2, -0.1, 1.0], [-0.3, 0.8, 0.4, 0.0], [0.1, -0.6, 0.9, -0.5]])
Y = torch.tensor([0, 1, 2])
W = torch.tensor([[1.0, -2.0, 0.5, 0.0], [-1.0, 1.0, 2.0, 0.5], [0.3, 0.0, -1.0, 1.5]])


def linear(x: Tensor) -> Tensor:
    return x @ W.T


class InDouble(LossCall):
    """The usual loss without its cast to float32."""

    def __init__(self, logits: Tensor, target: Tensor = Y) -> None:
        super().__init__("cross_entropy", logits, target)

    def log_probabilities(self) -> Tensor:
        return self.logits.log_softmax(1)

    def per_sample(self) -> Tensor:
        return F.cross_entropy(self.logits, self.target, reduction="none")


def smooth(v: Tensor, w: Tensor) -> Callable[[Tensor], Tensor]:
    """A network of two layers as a function of its weights, with a second derivative that is not 0."""
    return lambda x: torch.tanh(x.flatten(1) @ v) @ w


def weights(inputs: int = 4, outputs: int = 3) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(inputs, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(5, outputs, dtype=torch.float64, requires_grad=True),
    )


def network(inputs: int = 4, activation: Callable[[], nn.Module] = nn.Tanh, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), activation(), nn.Linear(16, outputs))


def parameter_gradient(value: Tensor, net: nn.Module) -> Tensor:
    found = torch.autograd.grad(value, list(net.parameters()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


class Counted(nn.Module):
    """Counts forwards."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net, self.seen = net, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        out: Tensor = self.net(x)
        return out
