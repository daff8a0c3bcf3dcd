"""Deletion and insertion: how a prediction falls without what a map marks, and rises with it alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import seeded, untouched_random_state
from lightning_robust.saliency.explaining import broadcast

__all__ = ["area", "blurred", "check_maps", "deletion_curve", "insertion_curve"]

_BLUR = 1 / 8  # of the shorter side: a stroke of a digit is gone, a dark half and a bright half are not


def deletion_curve(
    logits_fn: LogitsFn,
    x: Tensor,
    target: Tensor,
    maps: Tensor,
    *,
    steps: int = 16,
    baseline: float | Tensor = 0.0,
    chunk_size: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The probability of the target while its inputs are removed, those with the largest values of the map first.

    A faithful map makes it fall early. Read it beside the same curve for a random order: a net may fall for anything
    that does not look like its training data.

    Args:
        logits_fn: Inputs ``(M, ...)`` of any batch size to logits ``(M, K)``. One yes/no logit per sample, ``(M,)`` or
            ``(M, 1)``, counts as two classes: class 1 has the logit, class 0 has 0.
        x: Inputs ``(N, C, ...)`` or ``(N, D)``.
        target: The classes that the maps explain, ``(N,)``.
        maps: Maps ``(N, ...)`` of the size of the inputs without channels: all channels of a pixel go together. With
            signs the most negative inputs go last, which hold back the target. Ties are broken by a random order, a
            function of the seed and the row: half of the inputs of a map may be exactly 0.
        steps: In how many steps, as even as can be; as many as there are inputs if those are fewer.
        baseline: What inputs are replaced by: a number or a tensor that broadcasts against ``x``, in its units (for
            normalised inputs black is ``-mean / std``).
        chunk_size: How many samples a forward takes; N by default.
        seed: Of the order within ties.

    Returns:
        The share of inputs removed, ``(steps + 1,)`` from 0 to 1, and the probabilities of the target at each,
        ``(N, steps + 1)`` in [0, 1]; float64 on the CPU. Beware of NaN in maps: they come first.

    Raises:
        ValueError: If shapes do not fit, there are no samples, or a number is below 1.

    Example:
        The input with the larger weight goes first.

        >>> def logits_fn(x):
        ...     return torch.stack([torch.zeros(len(x)), x @ torch.tensor([1.0, 3.0])], 1)
        >>> x = torch.ones(1, 2)
        >>> share, p = deletion_curve(logits_fn, x, torch.tensor([1]), torch.tensor([[0.0, 1.0]]))
        >>> share.tolist(), p.logit().round(decimals=3).tolist()
        ([0.0, 0.5, 1.0], [[4.0, 1.0, 0.0]])

    References:
        Petsiuk et al., `RISE: Randomized Input Sampling for Explanation of Black-box Models
        <https://arxiv.org/abs/1806.07421>`_, 2018, section 4.3; Samek et al., `Evaluating the Visualization of What a
        Deep Neural Network Has Learned <https://arxiv.org/abs/1509.06321>`_, 2015.
    """
    check_maps(x, maps, target)
    return _curve(logits_fn, x.detach(), broadcast(baseline, x), target, maps, steps, chunk_size or len(x), seed)


def insertion_curve(
    logits_fn: LogitsFn,
    x: Tensor,
    target: Tensor,
    maps: Tensor,
    *,
    steps: int = 16,
    baseline: float | Tensor | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The probability of the target while its inputs are put back, those with the largest values of the map first.

    A faithful map makes it rise early.

    Args:
        logits_fn: As for :func:`deletion_curve`.
        x: As for :func:`deletion_curve`.
        target: As for :func:`deletion_curve`.
        maps: As for :func:`deletion_curve`.
        steps: As for :func:`deletion_curve`.
        baseline: What it starts from; by default :func:`blurred` images where ``x`` is ``(N, C, H, W)`` (single pixels
            on a plain ground look like nothing a net has seen), and 0 elsewhere.
        chunk_size: As for :func:`deletion_curve`.
        seed: As for :func:`deletion_curve`.

    Returns:
        The share of inputs inserted, ``(steps + 1,)``, and the probabilities, ``(N, steps + 1)``.

    Raises:
        ValueError: As for :func:`deletion_curve`.

    Example:
        >>> def logits_fn(x):
        ...     return torch.stack([torch.zeros(len(x)), x @ torch.tensor([1.0, 3.0])], 1)
        >>> _, p = insertion_curve(logits_fn, torch.ones(1, 2), torch.tensor([1]), torch.tensor([[0.0, 1.0]]))
        >>> p.logit().round(decimals=3).tolist()
        [[0.0, 3.0, 4.0]]
    """
    check_maps(x, maps, target)
    x = x.detach()
    if baseline is None:
        baseline = blurred(x) if x.ndim == 4 else 0.0
    return _curve(logits_fn, broadcast(baseline, x), x, target, maps, steps, chunk_size or len(x), seed)


def area(share: Tensor, probability: Tensor) -> Tensor:
    """The area under curves, ``(N,)`` in [0, 1]: the mean probability on the way, by the trapezoid rule.

    Example:
        >>> area(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[1.0, 0.0, 0.0]]))
        tensor([0.2500])
    """
    return torch.trapezoid(probability, share, dim=1)


def blurred(images: Tensor, sigma: float | None = None) -> Tensor:
    """Images ``(N, C, H, W)`` without detail: a Gaussian blur, the edge pixels continued outwards.

    Args:
        images: In any units.
        sigma: In pixels; an eighth of the shorter side by default. The kernel ends at three of it.

    Raises:
        ValueError: If ``sigma`` is not above 0.

    Example:
        >>> checks = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(1, 1, 8, 8)
        >>> float((blurred(checks)[..., 6:10, 6:10] - 0.5).abs().max()) < 0.01
        True
    """
    sigma = min(images.shape[2:]) * _BLUR if sigma is None else sigma
    if not sigma > 0:
        raise ValueError(f"blurred(sigma=) must be above 0 pixels, got {sigma}.")
    radius = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float32) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(images.device)
    n, channels, height, width = images.shape
    planes = F.pad(images.float().reshape(n * channels, 1, height, width), [radius] * 4, mode="replicate")
    planes = F.conv2d(F.conv2d(planes, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return planes.view(images.shape).to(images.dtype)


def _curve(
    logits_fn: LogitsFn,
    start: Tensor,
    end: Tensor,
    target: Tensor,
    maps: Tensor,
    steps: int,
    chunk_size: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Probabilities of the target on the way from ``start`` to ``end``, input by input."""
    if steps < 1 or chunk_size < 1:
        raise ValueError(f"a curve needs steps= and chunk_size= of 1 or more, got {steps} and {chunk_size}.")
    n, size = len(maps), maps[0].numel()
    steps = min(steps, size)
    counts = torch.tensor([round(size * i / steps) for i in range(steps + 1)])
    place = _order(maps, seed).to(start.device)
    # Step by step, all samples in each: with chunks of N every forward sees the samples in their order.
    rows, found = torch.arange(n * (steps + 1)), []
    with untouched_random_state(), torch.no_grad():
        for chunk in torch.split(rows, chunk_size):
            sample, count = (chunk % n).to(start.device), counts[chunk // n].to(start.device)
            done = (place[sample] < count[:, None]).view(len(chunk), *maps.shape[1:])
            if start.ndim > done.ndim:
                done = done.unsqueeze(1)
            logits = logits_fn(torch.where(done, end[sample], start[sample]))
            found.append(_probability(logits, target.cpu()[chunk % n]))
    return counts.double() / size, torch.cat(found).view(steps + 1, n).T


def _order(maps: Tensor, seed: int) -> Tensor:
    """At which place each input ``(N, D)`` comes, 0 for the largest; ties in a random order."""
    values = maps.detach().cpu().flatten(1)
    shuffled = [torch.randperm(values.shape[1], generator=seeded(seed, i, 0)) for i in range(len(values))]
    mixed = torch.stack(shuffled)
    order = mixed.gather(1, values.gather(1, mixed).argsort(dim=1, descending=True, stable=True))
    places = torch.arange(values.shape[1]).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _probability(logits: Tensor, target: Tensor) -> Tensor:
    z = logits.detach().cpu().double()
    if z.ndim < 2 or z.shape[1] == 1:
        z = z.reshape(-1, 1)
        z = torch.cat([torch.zeros_like(z), z], dim=1)
    return z.softmax(1).gather(1, target.long()[:, None])[:, 0]


def check_maps(x: Tensor, maps: Tensor, target: Tensor | None = None) -> None:
    """Whether maps fit the inputs, and targets, where there are any.

    Raises:
        ValueError: If not, or if there are no samples.
    """
    size = (len(x), *x.shape[2:]) if x.ndim > 2 else tuple(x.shape)
    if x.ndim < 2 or tuple(maps.shape) != size or not maps.numel():
        raise ValueError(
            f"expected maps of the size of the inputs without channels, {size if x.ndim > 1 else '(N, ...)'} for "
            f"inputs {tuple(x.shape)}, and at least one sample; got {tuple(maps.shape)}."
        )
    if target is not None and target.shape != x.shape[:1]:
        raise ValueError(f"expected one target class per sample, ({len(x)},), got {tuple(target.shape)}.")
