"""APGD: the algorithm of the paper, as strong as its authors' own implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import APGD, PGD, ThreatModel, cross_entropy, dlr, guard, margin
from lightning_robust.attacks.apgd import _checkpoints
from lightning_robust.attacks.objectives import targeted_dlr
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

Norm = Literal["linf", "l2"]
NORMS: list[Norm] = ["linf", "l2"]
RADII = {"linf": 0.12, "l2": 0.6}


@pytest.fixture
def net() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.Conv2d(6, 4, 3, stride=2), nn.Flatten(), nn.LazyLinear(5))
    net(torch.randn(2, 3, 8, 8))
    return net.eval()


@pytest.fixture
def batch(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Eight inputs with the class that the net gives them, and one with another."""
    x = torch.rand(9, 3, 8, 8, generator=seeded(3))
    y = net(x).argmax(1)
    return x, torch.cat([y[:8], (y[8:] + 1) % 5])


def right(net: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(1) == y  # type: ignore[no-any-return]  # modules have no types


# -- the algorithm --------------------------------------------------------------------------------------------------


def test_the_worst_case_of_a_linear_model_is_a_corner() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, -1.0, 2.0]])
    x, y = torch.full((20, 4), 0.5), torch.arange(20) % 2
    uphill = (weight[1 - y] - weight[y]).sign()
    found = APGD(ThreatModel("linf", 0.1), steps=20, early_exit=False)(lambda z: z @ weight.T, x, y)
    torch.testing.assert_close(found, x + 0.1 * uphill, rtol=0, atol=1e-6)


def test_the_worst_case_of_a_linear_model_in_l2_is_the_farthest_point() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, -1.0, 2.0]])
    x, y = torch.full((6, 4), 0.5), torch.arange(6) % 2
    uphill = F.normalize(weight[1 - y] - weight[y], dim=1)
    found = APGD(ThreatModel("l2", 0.3), steps=60, early_exit=False)(lambda z: z @ weight.T, x, y)
    torch.testing.assert_close(((found - x) * uphill).sum(1), torch.full((6,), 0.3), rtol=0, atol=1e-4)


def test_step_sizes_are_looked_at_on_the_published_schedule() -> None:
    assert sorted(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    for steps in range(1, 300):
        assert all(1 <= k <= steps for k in _checkpoints(steps))


def by_hand(net: Any, x: Tensor, y: int, start: Tensor, threat: ThreatModel, steps: int, rho: float) -> Tensor:
    """Algorithm 1 for one sample, line by line, in lists."""

    def f(p: Tensor) -> float:
        return float(cross_entropy(net(p), torch.tensor([y])))

    def uphill(p: Tensor) -> Tensor:
        leaf = p.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(net(leaf), torch.tensor([y])).sum(), leaf)
        return gradient.sign() if threat.norm == "linf" else gradient / gradient.norm()

    def inside(p: Tensor) -> Tensor:
        delta = p - x
        if threat.norm == "linf":
            delta = delta.clamp(-threat.eps, threat.eps)
        elif delta.norm() > threat.eps:
            delta = delta * threat.eps / delta.norm()
        return (x + delta).clamp(0, 1)

    size, iterates = 2 * threat.eps, [start]
    best, went_up, halved = [start, f(start)], 0, False
    last_checkpoint, best_then = 0, f(start)
    candidates = [start]
    previous, current = start, start
    for k in range(1, steps + 1):
        ahead = inside(current + size * uphill(current))
        weight = 1.0 if k == 1 else 0.75
        following = inside(current + weight * (ahead - current) + (1 - weight) * (current - previous))
        went_up += f(following) > f(current)
        previous, current = current, following
        candidates.append(current)
        if f(current) > best[1]:  # type: ignore[operator]  # a point and its value
            best = [current, f(current)]
        if k in _checkpoints(steps):
            nothing_better = not halved and best[1] == best_then
            halved = went_up <= rho * (k - last_checkpoint) or nothing_better
            if halved:
                size, current = size / 2, best[0]  # type: ignore[assignment]
            last_checkpoint, best_then, went_up = k, best[1], 0  # type: ignore[assignment]
    scores = [float(margin(net(p), torch.tensor([y]))) for p in candidates]
    assert iterates
    return candidates[scores.index(max(scores))]


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_algorithm_1_of_the_paper(net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm) -> None:
    net, x, y = net.double(), batch[0][:4].double(), batch[1][:4]
    threat, steps = ThreatModel(norm, RADII[norm]), 25
    found = APGD(threat, steps=steps, early_exit=False)(net, x, y, generator=seeded(1))
    noise = threat.noise(x, seeded(1))
    length = noise.flatten(1).abs().amax(1) if norm == "linf" else noise.flatten(1).norm(dim=1)
    starts = (x + noise * (threat.eps / length).view(-1, 1, 1, 1)).clamp(0, 1)
    expected = [by_hand(net, x[i : i + 1], int(y[i]), starts[i : i + 1], threat, steps, 0.75) for i in range(4)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-7)
