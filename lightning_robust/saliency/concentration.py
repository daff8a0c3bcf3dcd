"""How narrowly a map looks, and how much of it lies in a region.

Similarity to earlier maps does not tell whether a model looks at the right thing; the share of a region does.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["REGIONS", "concentration", "mass", "region_named"]

REGIONS = {"border": 1 / 8, "corners": 1 / 4, "center": 1 / 2}
"""The regions by name, and the share of each side that they take by default."""

_LARGEST_SHARE = {"border": 0.5, "corners": 0.5, "center": 1.0}


def concentration(maps: Tensor) -> dict[str, Tensor]:
    r"""How narrowly each map looks: on all inputs alike, or on a few.

    .. math:: \mathrm{gini} = \frac{\sum_i (2 i - D - 1)\, |S|_{(i)}}{D \sum_i |S|_{(i)}}, \qquad
        \mathrm{entropy} = - \frac{1}{\log D} \sum_i p_i \log p_i, \quad p_i = \frac{|S_i|}{\sum_j |S_j|}

    where :math:`|S|_{(i)}` is the i-th smallest of the D magnitudes. Neither depends on the scale of a map, nor on
    where its large inputs are.

    Args:
        maps: Maps ``(N, ...)``; their magnitudes count.

    Returns:
        One number per sample, ``(N,)`` in float64 on the CPU; NaN where a map holds NaN or infinity. A map of zeros
        counts as even.

        - ``gini``: 0 for an even map, ``1 - 1 / D`` if one input has everything.
        - ``entropy``: 1 for an even map, 0 if one input has everything. ``D ** entropy`` is the number of inputs that
          an even map of that entropy would look at.

    Raises:
        ValueError: If there is no input to look at.

    Example:
        >>> found = concentration(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, -2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 3.0]]))
        >>> found["gini"].tolist(), found["entropy"].tolist()
        ([0.0, 0.75, 0.5], [1.0, 0.0, 0.5])

    References:
        Chalasani et al., `Concise Explanations of Neural Networks using Adversarial Training
        <https://arxiv.org/abs/1810.06583>`_, 2020 (Gini index of maps, "sparseness"); Bhatt et al., `Evaluating and
        Aggregating Feature-based Model Explanations <https://arxiv.org/abs/2005.00631>`_, 2020 (entropy,
        "complexity").
    """
    shares = _shares(maps)
    n = shares.shape[1]
    weights = 2 * torch.arange(1, n + 1, dtype=shares.dtype) - n - 1
    gini = (shares.sort(dim=1).values * weights).sum(1) / n
    bits = torch.special.entr(shares).sum(1)
    entropy = bits / math.log(n) if n > 1 else torch.ones_like(bits)
    finite = shares.isfinite().all(1)
    return {name: value.clamp(0, 1).where(finite, torch.nan) for name, value in (("gini", gini), ("entropy", entropy))}


def mass(maps: Tensor, region: Tensor) -> Tensor:
    r"""The share of each map that lies inside a region: :math:`\sum_i r_i |S_i| / \sum_i |S_i|`.

    Compare it with the share of the inputs that the region holds (``region.mean()``): that much lies there by chance.

    Args:
        maps: Maps ``(N, ...)``; their magnitudes count.
        region: 1 inside, 0 outside, in [0, 1]: one for all maps, ``(H, W)`` for maps ``(N, H, W)``; one for each,
            ``(N, H, W)``; or a mask of images, ``(N, 1, H, W)``. Booleans or numbers.

    Returns:
        ``(N,)`` in [0, 1], float64 on the CPU; NaN where a map holds NaN or infinity. A map of zeros counts as even.

    Raises:
        ValueError: If the region does not fit the maps, or has values outside of [0, 1].

    Example:
        >>> region = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
        >>> mass(torch.tensor([[[3.0, -3.0], [2.0, 0.0]]]), region)
        tensor([0.7500], dtype=torch.float64)

    References:
        Kohlbrenner et al., `Towards Best Practice in Explaining Neural Network Decisions with LRP
        <https://arxiv.org/abs/1910.09840>`_, 2020 (relevance mass, there of positive relevance alone).
    """
    shares = _shares(maps)
    one, each = tuple(maps.shape[1:]), tuple(maps.shape)
    if tuple(region.shape) not in (one, each, (len(maps), 1, *one)):
        raise ValueError(
            f"expected a region {one} for all maps {each}, or one for each of them, {each} or {(len(maps), 1, *one)}; "
            f"got {tuple(region.shape)}."
        )
    inside = region.detach().cpu().double()
    if not bool(((inside >= 0) & (inside <= 1)).all()):
        raise ValueError(
            f"a region is 1 inside and 0 outside, with values in [0, 1]; got values from {float(inside.min()):g} to "
            f"{float(inside.max()):g}. Divide a mask of bytes by 255."
        )
    inside = inside.reshape(1 if tuple(region.shape) == one else len(maps), -1)
    return (shares * inside).sum(1).clamp(0, 1)  # keeps NaN


def region_named(name: str, shape: Sequence[int], share: float | None = None) -> Tensor:
    """A region of pictures, by name.

    With ``h`` and ``w`` the share of height and width, rounded to whole pixels, but at least one:

    - ``"border"``: the frame of the ``h`` first and last rows and the ``w`` first and last columns (1/8).
    - ``"corners"``: the four rectangles of ``h x w`` pixels in the corners (1/4).
    - ``"center"``: the rectangle of about ``h x w`` pixels that has as many pixels to its left as to its right, and as
      many above as below (1/2).

    Args:
        name: One of the three.
        shape: Height and width of the maps; dimensions before them are ignored, so that a map's shape will do.
        share: Of each side, above 0, and at most 0.5 (1 for ``"center"``); by default the number in brackets above.

    Returns:
        Booleans ``(H, W)``, true inside.

    Raises:
        ValueError: If there is no region of this name, or the share is out of range.

    Example:
        >>> region_named("corners", (4, 8)).int()
        tensor([[1, 1, 0, 0, 0, 0, 1, 1],
                [0, 0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    if name not in REGIONS:
        near = difflib.get_close_matches(name, REGIONS, 1, cutoff=0.3)
        raise ValueError(
            f"a region must be one of {', '.join(REGIONS)}, or a mask; got {name!r}."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    share = REGIONS[name] if share is None else share
    if not 0 < share <= _LARGEST_SHARE[name]:
        raise ValueError(
            f"the {name} takes a share of each side above 0 and at most {_LARGEST_SHARE[name]}, got {share}."
        )
    if len(shape) < 2 or min(shape[-2:]) < 1:
        raise ValueError(f"a region named {name!r} needs height and width, got {tuple(shape)}. Give a mask instead.")
    if name == "center":
        rows, columns = (_middle(side, share) for side in shape[-2:])
    else:
        rows, columns = (_ends(side, share) for side in shape[-2:])
    return rows[:, None] | columns if name == "border" else rows[:, None] & columns


def _ends(side: int, share: float) -> Tensor:
    """The first and the last pixels of a side."""
    width, place = max(1, round(share * side)), torch.arange(side)
    return (place < width) | (place >= side - width)


def _middle(side: int, share: float) -> Tensor:
    margin = min(round((1 - share) * side / 2), (side - 1) // 2)
    place = torch.arange(side)
    return (place >= margin) & (place < side - margin)


def _shares(maps: Tensor) -> Tensor:
    """Magnitudes ``(N, D)`` that sum to 1; NaN throughout where a map is broken."""
    if maps.ndim < 2 or 0 in maps.shape[1:]:
        raise ValueError(f"expected maps (N, ...) of one input or more, got {tuple(maps.shape)}.")
    size = maps.detach().cpu().double().flatten(1).abs()  # in this order: MPS has no float64
    largest = size.amax(1, keepdim=True)
    size = torch.where(largest > 0, size / largest, 1.0)  # also of tiny maps, whose sums would be 0
    return (size / size.sum(1, keepdim=True)).where(largest.isfinite(), torch.nan)
