"""A small net that was trained adversarially on scikit-learn's 8x8 digits, and digits that it has not seen."""

from __future__ import annotations

from functools import cache
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD, ThreatModel
from lightning_robust.randomness import seeded


@cache
def small_and_robust(norm: Literal["linf", "l2"], epochs: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    """The net in eval mode, and 397 pictures ``(N, 1, 8, 8)`` in [0, 1] with their classes."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(found.target), generator=seeded(0))
    x = (torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16)[order]
    y = torch.tensor(found.target)[order]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()),
            nn.Linear(512, 10),
        )
    attack = PGD(ThreatModel(norm, {"linf": 0.15, "l2": 0.6}[norm]), steps=5)
    optimizer, draw = torch.optim.Adam(net.parameters(), 3e-3), seeded(1)
    for _ in range(epochs):
        for rows in torch.randperm(1400, generator=draw).split(100):
            perturbed = attack(net.eval(), x[rows], y[rows], generator=draw)
            optimizer.zero_grad()
            F.cross_entropy(net.train()(perturbed), y[rows]).backward()
            optimizer.step()
    return net.eval(), x[1400:], y[1400:]
