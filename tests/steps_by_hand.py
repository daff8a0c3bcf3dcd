"""The gradient of one optimizer step of every training method, by autograd alone: what the callbacks must come to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trainer_runs import THREAT

from lightning_robust.randomness import seeded


def projected(x: Tensor, clean: Tensor) -> Tensor:
    return (clean + (x - clean).clamp(-THREAT.eps, THREAT.eps)).clamp(0, 1)


def climbed(objective: Any, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(leaf).sum(), leaf)
    return gradient.sign()


def attacked(net: nn.Module, x: Tensor, y: Tensor, method: str, batch_idx: int) -> Tensor:
    """What each method's attack finds in eval mode; its noise depends on (seed, rank, optimizer step, batch)."""
    net.eval()
    draws = seeded(0, 0, 0, batch_idx)
    if method == "n-fgsm":
        noise = (2 * torch.rand(x.shape, generator=draws) - 1) * 2 * THREAT.eps
        noisy = (x + noise).clamp(0, 1)
        found = noisy + THREAT.eps * climbed(lambda z: F.cross_entropy(net(z), y, reduction="none"), noisy)
        net.train()
        return found.clamp(0, 1)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(net(z), y, reduction="none")

    with torch.no_grad():
        log_p = net(x).log_softmax(1)

    def divergence(z: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - net(z).log_softmax(1))).sum(1)

    trades = method.startswith("trades")
    found = (x + 0.001 * torch.randn(x.shape, generator=draws)).clamp(0, 1) if trades else x
    for _ in range(2):
        found = projected(found + 2.5 * THREAT.eps / 2 * climbed(divergence if trades else loss, found), x)
    net.train()
    return found


def penalty(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The squared slope along the gradient's direction, by finite differences; running statistics see none of it."""
    silent = copy.deepcopy(net)
    for mine, its in zip(silent.modules(), net.modules(), strict=True):
        mine._parameters = its._parameters

    def losses(z: Tensor) -> Tensor:
        return F.cross_entropy(silent(z), y, reduction="none")

    leaf = x.clone().requires_grad_()
    there = losses(leaf)
    (gradient,) = torch.autograd.grad(there.sum(), leaf, retain_graph=True)
    direction = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    h = 0.13 * x.flatten(1).norm(dim=1).mean()
    return ((losses(x + h * direction) - there) / h).square().mean()


def loss_by_hand(
    net: nn.Module, x: Tensor, y: Tensor, method: str, batch_idx: int = 0, found: Tensor | None = None
) -> Tensor:
    """The loss of one batch; ``found`` in the place of what the attack finds."""
    extra = 0.05 * penalty(net, x, y) if "penalty" in method else 0.0
    if method == "penalty":
        return F.cross_entropy(net(x), y) + extra
    found = attacked(net, x, y, method, batch_idx) if found is None else found
    if method in ("madry", "n-fgsm"):
        return F.cross_entropy(net(found), y)
    log_p, log_q = net(x).log_softmax(1), net(found).log_softmax(1)
    return F.nll_loss(log_p, y) + 6 * (log_p.exp() * (log_p - log_q)).sum(1).mean() + extra


def gradient_by_hand(module: Any, method: str, batches: list[Any], divisor: int = 1) -> list[Tensor]:
    """Of the sum over batches; each moves the running statistics with which the next one is attacked."""
    total = [torch.zeros_like(p) for p in module.parameters()]
    for batch_idx, (x, y) in enumerate(batches):
        loss = loss_by_hand(module.net, x, y, method, batch_idx) / divisor
        for sum_, part in zip(total, torch.autograd.grad(loss, list(module.parameters())), strict=True):
            sum_ += part
    return total


def assert_steps_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)
