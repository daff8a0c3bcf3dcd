"""Square attack: random search on the margin alone, no gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attacks.joint import Threat
from lightning_robust.attacks.search import Search, searching, worst_of
from lightning_robust.attacks.threat import per_sample
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise, normal, uniform

__all__ = ["Square"]

# After how many of 10,000 queries the share of pixels that is changed is halved once more.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True)
class Square:
    """A score-based attack: squares at random places, kept where the margin grows.

    It sees no gradient, so that it finds what gradient masking hides. Where it beats a gradient attack, that attack (or
    its gradients) does not work.

    In pictures ``(N, C, H, W)`` a square is a square; in other inputs (tables, sequences, several inputs side by side)
    it is a random subset of the features.

    Args:
        threat: The ball and the pixel space.
        queries: Forward passes a sample, beside one for the clean input.
        p_init: Share of the pixels that the first squares cover; it is halved on the published schedule.
        early_exit: Leave samples alone once they are fooled: the same robust accuracy for less work. ``None``: yes,
            unless a callback measures more than accuracy.
        objective: Only its margin counts: what tells how far a sample is fooled. Callbacks fill it in.

    Raises:
        ValueError: If queries is below 1 or p_init is not in (0, 1].

    Example:
        >>> from lightning_robust import ThreatModel
        >>> attack = Square(ThreatModel("linf", eps=0.1), queries=300, early_exit=False)
        >>> x, y = torch.full((1, 3, 4, 4), 0.5), torch.tensor([0])
        >>> brightness = lambda x: torch.stack([x.sum((1, 2, 3)), 0 * x.sum((1, 2, 3))], 1)
        >>> found = attack(brightness, x, y, generator=torch.Generator().manual_seed(0))
        >>> round(float((found - x).sum()), 2)  # all pixels down
        -4.8

    References:
        Andriushchenko et al., `Square Attack: a query-efficient black-box adversarial attack via random search
        <https://arxiv.org/abs/1912.00049>`_, 2020, algorithms 1 to 3.
    """

    threat: Threat
    queries: int = 5000
    p_init: float = 0.8
    early_exit: bool | None = None
    objective: str | Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.queries < 1 or not 0 < self.p_init <= 1:
            raise ValueError(
                f"Square needs queries >= 1 and p_init in (0, 1], got queries={self.queries}, p_init={self.p_init}."
            )

    @property
    def name(self) -> str:
        """Short name for log keys: ``square5000_linf_0.2``."""
        return f"square{self.queries}_{self.threat}"

    def __call__(self, logits_fn: LogitsFn, x: Tensor, y: Tensor, *, generator: Noise = None) -> Tensor:
        """Perturb ``x`` (model inputs, ``(N, ...)``) against targets ``y``; the result has the type of ``x``."""
        with searching(self.threat, logits_fn, x, y, self.objective, generator) as search:
            best = worst_of([search], self._run, self.early_exit is not False, known=search.clean)
            return search.threat.pixels.to_model(best, x.dtype)

    def _run(self, search: Search) -> tuple[Tensor, Tensor]:
        change = _change_linf if search.threat.norm == "linf" else _change_l2
        x = _start(search)
        score = search.look(x)[1]
        best, worst, rows = x.clone(), score.clone(), torch.arange(len(x), device=x.device)
        for query in range(1, self.queries):
            if self.early_exit is not False and search.divisible and bool((score > 0).any()):
                holds = (score <= 0).nonzero().squeeze(1)
                if not len(holds):
                    break
                rows, search, x, score = rows[holds], search.at(holds), x[holds], score[holds]
            tried = search.project(change(search, x, self._share(query)))
            found = search.look(tried)[1]
            better = found > score
            x = torch.where(per_sample(better, x), tried, x)
            score = torch.where(better, found, score)
            best[rows], worst[rows] = x, score
        return best, worst

    def _share(self, query: int) -> float:
        scaled = query / self.queries * 10_000
        return float(self.p_init / 2 ** sum(scaled > at for at in _HALVINGS))


def _start(search: Search) -> Tensor:
    """linf: vertical stripes of full strength; l2: random smooth patches of it. Without rows and columns: noise."""
    clean, eps = search.clean, search.threat.eps
    if search.threat.norm == "linf":
        stripes = clean if clean.ndim != 4 else clean[:, :, :1, :]
        return search.project(clean + eps * _signs(search, stripes))
    delta = normal(clean, search.noise)
    if clean.ndim == 4:
        height, width = clean.shape[2:]
        side = max(1, min(height, width) // 5)
        tile = _bump(side, clean)
        across = tile.repeat(1, 1, math.ceil(height / side), math.ceil(width / side))[:, :, :height, :width]
        signs = torch.sign(normal(clean[:, :, : math.ceil(height / side), : math.ceil(width / side)], search.noise))
        signs = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width]
        delta = across * signs
    return search.project(clean + eps * search.threat.steepest(delta))


def _change_linf(search: Search, x: Tensor, share: float) -> Tensor:
    """A square of one colour of full strength, at a random place of each sample."""
    inside, _ = _windows(search, x, share, 1)[0]
    colours = x if x.ndim != 4 else x[:, :, :1, :1]
    return torch.where(inside, search.clean + search.threat.eps * _signs(search, colours), x)


def _change_l2(search: Search, x: Tensor, share: float) -> Tensor:
    """The budget of one window goes to another one, as a smooth bump of it."""
    clean, eps = search.clean, search.threat.eps
    (first, bump), (second, _) = _windows(search, x, share, 2)
    delta = x - clean
    channels = x.shape[1] if x.ndim == 4 else 1
    over = (2, 3) if x.ndim == 4 else tuple(range(1, x.ndim))
    unused = (eps**2 - delta.flatten(1).square().sum(1)).clamp_min(0)
    there = torch.where(first, delta, 0)
    budget = (
        torch.where(first | second, delta, 0).square().sum(over, keepdim=True) + per_sample(unused, x) / channels
    ).sqrt()
    signs = _signs(search, budget)
    new = signs * bump / _length(bump, over) + there / _length(there, over)
    new = new / _length(new, over) * budget
    return clean + torch.where(first, new, torch.where(second, 0, delta))


def _windows(search: Search, x: Tensor, share: float, count: int) -> list[tuple[Tensor, Tensor]]:
    """Random windows of each sample: where they are, and a bump over each."""
    if x.ndim != 4:
        size = max(1, round(share * x[0].numel()))
        found = []
        for _ in range(count):
            order = uniform(x.flatten(1), search.noise).argsort(1)
            inside = (order.argsort(1) < size).view_as(x)
            found.append((inside, torch.where(inside, normal(x, search.noise), 0)))
        return found
    height, width = x.shape[2:]
    side = max(1, min(round(math.sqrt(share * height * width)), max(1, min(height, width) - 1)))
    side = max(side, 3) if count == 2 and min(height, width) > 3 else side  # a bump has a middle
    drawn = uniform(
        x.flatten(1)[:, : 2 * count + 1] if x[0].numel() > 2 * count else x.new_zeros(len(x), 2 * count + 1),
        search.noise,
    )
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    found = []
    for k in range(count):
        down = (drawn[:, 2 * k] * (height - side + 1)).floor().view(-1, 1)
        across = (drawn[:, 2 * k + 1] * (width - side + 1)).floor().view(-1, 1)
        r, c = rows - down, columns - across  # inside the window, from 0 to side - 1
        inside = ((r >= 0) & (r < side)).unsqueeze(2) & ((c >= 0) & (c < side)).unsqueeze(1)
        pattern = _two_bumps(side, x)
        r, c = r.clamp(0, side - 1).long(), c.clamp(0, side - 1).long()
        upright = pattern[r.unsqueeze(2), c.unsqueeze(1)]
        lying = pattern.T[r.unsqueeze(2), c.unsqueeze(1)]
        bump = torch.where((drawn[:, -1] < 0.5).view(-1, 1, 1), upright, lying) * inside
        found.append((inside.unsqueeze(1), bump.unsqueeze(1)))
    return found


def _two_bumps(side: int, like: Tensor) -> Tensor:
    """One bump up and one down, side by side, ``(side, side)``; of equal strength together, so that edges appear."""
    left = _bump((side, side // 2), like)[0, 0]
    right = _bump((side, side - side // 2), like)[0, 0]
    left, right = (part / part.norm().clamp_min(1e-12) for part in (left, right))
    return torch.cat([left, -right], 1)


def _bump(size: int | tuple[int, int], like: Tensor) -> Tensor:
    """A pyramid that falls off with the square of the distance from its edge, ``(1, 1, H, W)`` (equation 2)."""
    height, width = size if isinstance(size, tuple) else (size, size)
    middle = height // 2
    rows = (torch.arange(height, device=like.device) - middle).abs()
    columns = (torch.arange(width, device=like.device) - width // 2).abs()
    scale = torch.maximum(rows.view(-1, 1) * width, columns.view(1, -1) * height).to(like) / max(width, 1)
    depth = (middle - scale).clamp_min(0)
    bump = torch.zeros(height, width, dtype=like.dtype, device=like.device)
    for k in range(middle + 1):
        bump += torch.where(depth >= k, 1 / (middle + 1 - k) ** 2, 0.0)
    return bump.view(1, 1, height, width)


def _signs(search: Search, like: Tensor) -> Tensor:
    return torch.where(uniform(like, search.noise) < 0.5, -1.0, 1.0).to(like)


def _length(values: Tensor, over: tuple[int, ...]) -> Tensor:
    return values.square().sum(over, keepdim=True).sqrt().clamp_min(1e-12)
