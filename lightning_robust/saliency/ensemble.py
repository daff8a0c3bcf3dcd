"""Several maps of the same inputs in one: where methods agree, and where they do not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.saliency.drift import centred_cosine, ranks, spearman

__all__ = ["NORMALISATIONS", "Ensemble", "ensemble"]

NORMALISATIONS = ("rank", "z")
"""How maps of different methods are brought to one scale."""


@dataclass(frozen=True, eq=False)
class Ensemble:
    """What several maps of the same inputs say together.

    Attributes:
        mean: The mean of the normalised magnitudes, ``(N, ...)`` in float32: a map like others, high where most methods
            look.
        disagreement: Their standard deviation at each input (dividing by the number of maps), ``(N, ...)`` in float32:
            high where some methods look and others do not. With two maps, half of their distance.
        agreement: One number per sample, ``(N,)`` in float64, in [-1, 1]: 1 if all maps rank the inputs alike, about 0
            if they are unrelated.
    """

    mean: Tensor
    disagreement: Tensor
    agreement: Tensor


def ensemble(maps: Sequence[Tensor] | Mapping[str, Tensor], normalise: str = "rank") -> Ensemble:
    """Bring the magnitudes of several maps to one scale, sample by sample, and take mean and spread.

    Each method shows one aspect of the model, in units of its own: gradients have logits per input, integrated
    gradients logits, Grad-CAM neither. Signs are dropped, as half of the methods have none. What the mean shows is
    what does not hang on the choice of a method, which is not the same as what is right: methods that share a weakness
    (all of them look at edges) agree in it.

    Args:
        maps: Two maps or more ``(N, ...)`` of one shape, of the same inputs and targets: by several methods, or by one
            method and several networks. A mapping gives them names for error messages.
        normalise: ``"rank"``: the ranks of the magnitudes, from 0 for the smallest to 1 for the largest, ties averaged
            (a constant map is .5 throughout); every map then has the same distribution, and none dominates by a few
            huge values. ``"z"``: magnitudes minus their mean, in standard deviations (a constant map is 0 throughout);
            keeps how much an input stands out.

    Returns:
        Mean, disagreement and agreement. The agreement is the mean over all pairs of maps of a correlation of
        magnitudes: Spearman's over the inputs that are not 0 in both for ``"rank"`` (else shared zeros would count as
        agreement), Pearson's for ``"z"``. A sample is NaN throughout where one of its maps holds NaN or infinity.
        All on the CPU.

    Raises:
        ValueError: If there are fewer than two maps, their shapes differ, or the normalisation is unknown.

    Example:
        >>> gradient = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
        >>> signed = torch.tensor([[0.0, -0.3, 0.1, 0.5]])
        >>> found = ensemble({"gradient": gradient, "integrated gradients": signed})
        >>> found.mean, found.disagreement, found.agreement
        (tensor([[0.0000, 0.5000, 0.5000, 1.0000]]), tensor([[0.0000, 0.1667, 0.1667, 0.0000]]), tensor([0.5000], ...))
    """
    if normalise not in NORMALISATIONS:
        raise ValueError(f"ensemble(normalise=) must be one of {', '.join(NORMALISATIONS)}; got {normalise!r}.")
    named = dict(maps) if isinstance(maps, Mapping) else {f"map {i}": m for i, m in enumerate(maps)}
    _check(named)
    shape = next(iter(named.values())).shape
    # In this order: MPS has no float64.
    magnitudes = [m.detach().cpu().double().flatten(1).abs() for m in named.values()]
    if normalise == "rank":
        largest = max(magnitudes[0].shape[1] - 1, 1)
        scaled = torch.stack([_within_one(ranks(m) - 1, largest) for m in magnitudes])
        correlation = spearman
    else:
        scaled = torch.stack([_standardised(m) for m in magnitudes])
        correlation = centred_cosine
    agreement = torch.stack([correlation(a, b) for a, b in itertools.combinations(magnitudes, 2)]).mean(0)
    finite = torch.stack([m.isfinite().all(1) for m in magnitudes]).all(0)
    mean, spread = (
        values.where(finite[:, None], torch.nan).float().view(shape)
        for values in (scaled.mean(0), scaled.std(0, correction=0))
    )
    return Ensemble(mean, spread, agreement.where(finite, torch.nan))


def _within_one(steps: Tensor, largest: int) -> Tensor:
    """Ranks from 0 in [0, 1]; a lone input is in the middle."""
    return steps / largest if steps.shape[1] > 1 else steps + 0.5


def _standardised(magnitudes: Tensor) -> Tensor:
    flat = (magnitudes.amax(1) == magnitudes.amin(1))[:, None]
    centred = magnitudes - magnitudes.mean(1, keepdim=True)
    return torch.where(flat, 0.0, centred / centred.pow(2).mean(1, keepdim=True).sqrt())


def _check(named: Mapping[str, Tensor]) -> None:
    if len(named) < 2:
        raise ValueError(f"an ensemble needs two maps or more, got {len(named)}; one has nothing to agree with.")
    (first, reference), *others = named.items()
    if reference.ndim < 2:
        raise ValueError(f"expected maps (N, ...), got {tuple(reference.shape)} for {first}.")
    for name, maps in others:
        if maps.shape != reference.shape:
            raise ValueError(
                f"expected maps of one shape; {first} is {tuple(reference.shape)}, {name} {tuple(maps.shape)}. Enlarge "
                f"the coarser one to the size of the input."
            )
