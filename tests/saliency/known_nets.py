"""Nets of which much is known: one that has learnt digits, with methods that explain it, and a linear one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.randomness import seeded
from lightning_robust.saliency import gradcam, gradient, integrated_gradients

HONEST = ("gradient", "integrated_gradients", "gradcam")
WEIGHT = torch.tensor([4.0, -1.0, 2.0, 0.5, 3.0])
ONES = torch.ones(3, dtype=torch.long)


def linear(x: Tensor) -> Tensor:
    """Class 1 has the logit, class 0 has 0."""
    z = x.flatten(1)[:, : len(WEIGHT)] @ WEIGHT
    return torch.stack([torch.zeros_like(z), z], dim=1)


def net_of(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()),
            nn.Linear(512, 10),
        )


@cache
def trained() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A net in eval mode that knows scikit-learn's 8x8 digits, and 48 of them that it has not seen."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(found.target), generator=seeded(0))
    x = (torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16)[order]
    y = torch.tensor(found.target)[order]
    net, draw = net_of(), seeded(1)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(8):
        for rows in torch.randperm(1400, generator=draw).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net.train()(x[rows]), y[rows]).backward()
            optimizer.step()
    net.eval().zero_grad()
    assert float((net(x[1400:]).argmax(1) == y[1400:]).float().mean()) > 0.95
    return net, x[1400:1448], y[1400:1448]


def methods() -> dict[str, Callable[[Tensor], Tensor]]:
    net, _, y = trained()
    return {
        "gradient": lambda x: gradient(net, x, y),
        "integrated_gradients": lambda x: integrated_gradients(net, x, y),
        "gradcam": lambda x: gradcam(net, x, y, net[5]),
        "edges": edges,
        "edges of a net that runs": lambda x: edges(x) + 0 * net(x).sum(),
    }


def edges(x: Tensor) -> Tensor:
    """Looks like an explanation, and is none (Adebayo et al., 2018)."""
    return F.conv2d(x, torch.tensor([[[[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]]]]), padding=1)[:, 0].abs()


def in_pieces() -> nn.Sequential:
    """Two layers, the weight of the second as ``fully_shard`` would leave it."""

    class DTensor(nn.Parameter):
        pass

    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = DTensor(torch.randn(3, 3))
    return module


def bits(module: nn.Module) -> dict[str, bytes]:
    """Everything that the state holds, NaN and signs of zeros included."""
    return {
        name: value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, value in module.state_dict().items()
        if value.ndim
    }
