"""How far saliency maps have moved, and maps small enough to be kept in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["QuantisedMaps", "centred_cosine", "drift", "largest_tenth", "overlap", "quantised", "ranks", "spearman"]

_LEVELS = 32767  # of 16 bits with a sign: 8 would make ties of what peaked maps have between nothing and a little
# Of SSIM, as in scikit-image: the window, and what keeps the ratios finite where maps are flat.
_WINDOW, _SMALLEST_WINDOW = 7, 3
_C1, _C2 = 0.01**2, 0.03**2


def drift(maps: Tensor, earlier: Tensor) -> dict[str, Tensor]:
    r"""How similar maps are to earlier maps of the same inputs and targets: 1 is unmoved, of ``centre_shift`` 0.

    ``iou10`` is the number to watch: between a trained and a random net it falls to about .05, what chance gives, where
    other similarities of non-negative maps stop at .5. ``cosine`` is less harsh on small shifts, ``spearman`` sees the
    faint inputs as well as the strong ones, ``ssim`` sees what a viewer sees, ``centre_shift`` that a map has moved as
    a whole. None depends on the scale of a map, only on how it spreads over the inputs.

    Args:
        maps: Maps ``(N, ...)`` now.
        earlier: Maps of the same shape.

    Returns:
        One number per sample, ``(N,)`` in float64 on the CPU; NaN where a map itself holds NaN or infinity.

        - ``iou10``: intersection over union, in [0, 1], of the tenth of the inputs (rounded up) with the largest
          magnitude. Ties with the last of them are in, zeros never; two maps of zeros are the same.
        - ``cosine``: of the maps without their means (Pearson's correlation), in [-1, 1]. Two constant maps count 1,
          one constant map counts 0.
        - ``spearman``: the correlation of the ranks, in [-1, 1], ties averaged, over the inputs that are not 0 in both
          maps; constant maps as above. Over all inputs it would be blind: magnitudes of integrated gradients are 0
          wherever the input is, and those of a trained and a random net then agree to .97.
        - ``ssim``: structural similarity, in [-1, 1], of maps ``(N, H, W)`` of 3 x 3 or more: each divided by the 99th
          percentile of its magnitudes and cut to [-1, 1], as it would be drawn; means over windows of 7 x 7 (or the
          largest odd size that fits), data range 1, :math:`K_1 = 0.01`, :math:`K_2 = 0.03`. Absent for other shapes.
        - ``centre_shift``: of maps ``(N, H, W)``, the distance in pixels between the centres of mass of the
          magnitudes, from 0 to the diagonal. The centre of a map of zeros is the middle. Absent for other shapes:
          columns of a table have no places.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> now, before = torch.tensor([[0.0, 0.0, 3.0, 1.0]]), torch.tensor([[0.0, 1.0, 3.0, 0.0]])
        >>> {name: round(float(value), 3) for name, value in drift(now, before).items()}
        {'iou10': 1.0, 'cosine': 0.833, 'spearman': 0.5}
        >>> spot = torch.zeros(1, 9, 9)
        >>> spot[0, 4, 4] = 1
        >>> {name: round(float(value), 3) for name, value in drift(spot, spot.roll(2, dims=2)).items()}
        {'iou10': 0.0, 'cosine': -0.012, 'spearman': -1.0, 'ssim': 0.001, 'centre_shift': 2.0}

    References:
        Ghorbani et al., `Interpretation of Neural Networks is Fragile <https://arxiv.org/abs/1710.10547>`_, 2019
        (top-k intersection, shift of the centre); Adebayo et al., `Sanity Checks for Saliency Maps
        <https://arxiv.org/abs/1810.03292>`_, 2018 (similarity to the maps of a randomised net: rank correlation,
        SSIM); Wang et al., `Image Quality Assessment <https://doi.org/10.1109/TIP.2003.819861>`_, 2004, equation 13.
    """
    if maps.shape != earlier.shape or maps.ndim < 2:
        raise ValueError(
            f"expected two tensors of maps (N, ...) of one shape, got {tuple(maps.shape)} and {tuple(earlier.shape)}."
        )
    now, before = (m.detach().cpu().double() for m in (maps, earlier))  # in this order: MPS has no float64
    a, b = now.flatten(1), before.flatten(1)
    values = {
        "iou10": overlap(largest_tenth(a), largest_tenth(b)),
        "cosine": centred_cosine(a, b),
        "spearman": spearman(a, b),
    }
    if maps.ndim == 3:
        if min(maps.shape[1:]) >= _SMALLEST_WINDOW:
            values["ssim"] = _structural_similarity(_as_drawn(now), _as_drawn(before))
        values["centre_shift"] = (_centre(now) - _centre(before)).norm(dim=1)
    finite = (a.isfinite() & b.isfinite()).all(1)
    return {name: value.where(finite, torch.nan) for name, value in values.items()}


def largest_tenth(maps: Tensor) -> Tensor:
    """Where the tenth (rounded up) of the largest magnitudes of each map ``(N, D)`` is; ties are in, zeros never.

    Example:
        >>> largest_tenth(torch.tensor([[0.0, -5.0, 1.0, 5.0]]))
        tensor([[False,  True, False,  True]])
    """
    size = maps.abs()
    threshold = size.topk(-(-maps.shape[1] // 10), dim=1).values[:, -1:]
    return (size >= threshold) & (size > 0)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of sets ``(N, D)``, ``(N,)`` in [0, 1]; two empty sets are the same."""
    both, either = (a & b).sum(1).double(), (a | b).sum(1).double()
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def centred_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of maps ``(N, D)`` in float64, ``(N,)``. Two constant maps count 1, one counts 0."""
    flat_a, flat_b = (m.amax(1) == m.amin(1) for m in (a, b))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return _cosine(a, b, flat_a, flat_b)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of maps ``(N, D)`` in float64 over the inputs that are not 0 in both, ``(N,)``.

    Two maps that are constant there (or nowhere) count 1, one counts 0.

    Example:
        >>> a, b = torch.tensor([[0.0, 0, 1, 2, 3], [0, 0, 7, 6, 5]]).double().split(1)
        >>> spearman(a, b), centred_cosine(ranks(a), ranks(b))  # the shared zeros hide that the order is reversed
        (tensor([-1.], dtype=torch.float64), tensor([0.5789], dtype=torch.float64))
    """
    among = (a != 0) | (b != 0)
    middle = (among.sum(1, keepdim=True) + 1) / 2
    # What is left out comes last, behind everything that is ranked.
    a, b = ((ranks(m.where(among, torch.inf)) - middle).where(among, 0.0) for m in (a, b))
    flat_a, flat_b = ((m == 0).all(1) for m in (a, b))
    return _cosine(a, b, flat_a, flat_b)


def ranks(values: Tensor) -> Tensor:
    """Ranks within each row of ``(N, D)``, float64, from 1 for the smallest to D; ties share their mean rank.

    Example:
        >>> ranks(torch.tensor([[0.3, 0.1, 0.3, 9.0]]))
        tensor([[2.5000, 1.0000, 2.5000, 4.0000]], dtype=torch.float64)
    """
    ordered, order = values.sort(dim=1)
    place = torch.arange(values.shape[1], device=values.device).expand_as(order)
    step = ordered[:, 1:] != ordered[:, :-1]
    edge = step.new_ones(len(step), 1)
    first = place.where(torch.cat([edge, step], 1), 0).cummax(1).values
    last = place.where(torch.cat([step, edge], 1), values.shape[1]).flip(1).cummin(1).values.flip(1)
    shared = (first + last).double() / 2 + 1
    return torch.empty_like(shared).scatter_(1, order, shared)


def _cosine(a: Tensor, b: Tensor, flat_a: Tensor, flat_b: Tensor) -> Tensor:
    # One root of the product, not two roots: the cosine of a map with itself is then 1 to the last bit.
    norms = ((a * a).sum(1) * (b * b).sum(1)).sqrt()
    cosine = ((a * b).sum(1) / norms).clamp(-1, 1)
    return torch.where(flat_a | flat_b, (flat_a & flat_b).double(), cosine)


def _as_drawn(maps: Tensor) -> Tensor:
    """Maps on one scale: the hundredth of the inputs (rounded up) with the largest magnitudes is at full colour."""
    size = maps.abs().flatten(1)
    scale = size.topk(-(-size.shape[1] // 100), dim=1).values[:, -1]
    scale = scale.where(scale > 0, size.amax(1))  # a map that is not 0 on less than a hundredth
    return (maps / scale.where(scale > 0, 1.0)[:, None, None]).clamp(-1, 1)


def _structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """The mean over all windows that lie inside of ``(N, H, W)``."""
    window = min(_WINDOW, *(side - 1 + side % 2 for side in a.shape[1:]))
    stacked = torch.stack([a, b, a * a, b * b, a * b], dim=1)
    # Rows, then columns: the same mean for 2 x 7 instead of 7 x 7 operations.
    means = F.avg_pool2d(F.avg_pool2d(stacked, (window, 1), stride=1), (1, window), stride=1)
    mean_a, mean_b, aa, bb, ab = means.unbind(1)
    unbiased = window**2 / (window**2 - 1)
    var_a, var_b, cov = (
        unbiased * (product - p * q)
        for product, p, q in ((aa, mean_a, mean_a), (bb, mean_b, mean_b), (ab, mean_a, mean_b))
    )
    alike = (2 * mean_a * mean_b + _C1) * (2 * cov + _C2)
    return (alike / ((mean_a * mean_a + mean_b * mean_b + _C1) * (var_a + var_b + _C2))).mean((1, 2))


def _centre(maps: Tensor) -> Tensor:
    """Row and column of the centre of mass of ``(N, H, W)``, ``(N, 2)``."""
    size = maps.abs()
    size = size / size.amax((1, 2), keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)  # no overflow in the sums
    size = torch.where((size == 0).all(2).all(1)[:, None, None], 1.0, size)
    weights = size / size.sum((1, 2), keepdim=True)
    rows, columns = (torch.arange(side, dtype=size.dtype) for side in maps.shape[1:])
    return torch.stack([(weights.sum(2) * rows).sum(1), (weights.sum(1) * columns).sum(1)], dim=1)


@dataclass(frozen=True, eq=False)
class QuantisedMaps:
    """Maps in 16 bits, half of their size: what a checkpoint keeps of a snapshot.

    Attributes:
        values: int16 ``(N, ...)``, from -32767 to 32767 (older checkpoints: int8, to 127).
        scale: float64 ``(N,)``, what one step of each map is worth.
    """

    values: Tensor
    scale: Tensor

    def maps(self) -> Tensor:
        """The maps in float32, each off by at most half a step: 1/65534 of its largest magnitude."""
        return (self.values.cpu().double() * _beside(self.scale.cpu(), self.values)).float()

    def to_dict(self) -> dict[str, Any]:
        """Plain tensors, for a checkpoint that ``torch.load(weights_only=True)`` can read."""
        return {"values": self.values, "scale": self.scale}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> QuantisedMaps:
        """What :meth:`to_dict` gave."""
        return cls(state["values"], state["scale"])


def quantised(maps: Tensor) -> QuantisedMaps:
    """Maps ``(N, ...)`` in 16 bits on the CPU, each on its own scale.

    Compare like with like: the drift between two quantised snapshots of the same maps is exactly 1.

    Example:
        >>> snapshot = quantised(torch.tensor([[0.0, -32767.0, 40.2]]))
        >>> snapshot.values
        tensor([[     0, -32767,     40]], dtype=torch.int16)
        >>> snapshot.maps()
        tensor([[     0., -32767.,     40.]])
    """
    exact = maps.detach().cpu().double()
    scale = exact.abs().flatten(1).amax(1) / _LEVELS
    # A map of zeros has no scale, one with NaN has no values: it comes back as NaN, through its scale.
    steps = (exact / _beside(scale.where(scale != 0, 1.0), exact)).nan_to_num(0, 0, 0)
    return QuantisedMaps(steps.round().to(torch.int16), scale)


def _beside(scale: Tensor, maps: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (maps.ndim - 1))
