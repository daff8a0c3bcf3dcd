"""Whether maps have anything to do with the weights, and how much of their drift is noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from lightning_robust.modes import frozen
from lightning_robust.randomness import normal, seeded
from lightning_robust.saliency.drift import drift
from lightning_robust.saliency.permutation import permuted

__all__ = ["Explain", "insensitive", "maps_of", "means", "noise_floor", "null_similarity", "skill", "with_noise"]

Explain = Callable[[Tensor], Tensor]
"""Inputs ``(N, ...)`` to maps ``(N, ...)``: any method, with model and targets closed over. It is always given all N
samples in their order."""

NARROW = 0.05
"""Between null and floor there has to be more than this, or nothing can be told from a similarity in between."""

CHANCE = {"iou10": 1 / 19, "cosine": 0.0}
"""What unrelated dense maps share: two random tenths have 1 % in common and cover 19 %."""

HALFWAY = 0.5
"""A method is insensitive if maps of a random net are nearer than this to those of the trained one, on the way from
chance to the noise floor."""


def null_similarity(
    module: nn.Module, explain: Explain, x: Tensor, *, seed: int = 0, only: str | Sequence[str] | None = None
) -> dict[str, float]:
    """How similar the maps of ``module`` are to maps of a net that knows nothing: its own weights, permuted.

    Similarities have zeros of their own, which depend on method and data: maps that are 0 wherever the input is share
    that much with any other. Drift that has come down to the null has nothing left in common with where it began. Two
    maps of zeros count as the same, here as in drift: Grad-CAM, which is empty for some samples, has a high null.

    Args:
        module: What ``explain`` explains. Nothing of it changes, buffers and random streams included; it is run in the
            mode that it is in.
        explain: ``x -> maps``, e.g. ``lambda x: gradient(module, x, target)``.
        x: Inputs ``(N, ...)``; 16 are enough.
        seed: Of the permutation.
        only: As in :func:`~lightning_robust.saliency.permutation.permuted`.

    Returns:
        The means over samples of everything that :func:`~lightning_robust.saliency.drift` measures.

    Raises:
        ValueError: As :func:`~lightning_robust.saliency.permutation.permuted`.
        RuntimeError: As :func:`~lightning_robust.saliency.permutation.permuted`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> x = torch.rand(4, 1, 8, 8)
        >>> sorted(null_similarity(net, lambda x: net(x)[:, :1, None] * x[:, 0], x))
        ['centre_shift', 'cosine', 'iou10', 'spearman', 'ssim']
        >>> null_similarity(net, lambda x: x[:, 0].abs(), x)["cosine"]  # does not look at the net at all
        1.0

    References:
        Adebayo et al., `Sanity Checks for Saliency Maps <https://arxiv.org/abs/1810.03292>`_, 2018, section 3.
    """
    maps = maps_of(module, explain, x)
    with permuted(module, seed, only=only):
        return means(drift(maps_of(module, explain, x), maps))


def noise_floor(
    module: nn.Module,
    explain: Explain,
    x: Tensor,
    *,
    noise: float = 0.02,
    spread: float | Tensor | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """How similar the maps of ``module`` are to its maps of the same inputs with a little noise.

    A method cannot be expected to hold still more than this: an overlap of .9 is as good as 1 if noise that nobody
    sees takes it to .9.

    Args:
        module: As for :func:`null_similarity`.
        explain: As for :func:`null_similarity`.
        x: As for :func:`null_similarity`.
        noise: As for :func:`with_noise`.
        spread: As for :func:`with_noise`.
        seed: As for :func:`with_noise`.

    Returns:
        As :func:`null_similarity`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> noise_floor(net, lambda x: x[:, 0], torch.rand(4, 1, 8, 8))["cosine"] > 0.99
        True
    """
    maps = maps_of(module, explain, x)
    noisy = with_noise(x, noise=noise, spread=spread, seed=seed)
    return means(drift(maps_of(module, explain, noisy), maps))


def with_noise(x: Tensor, *, noise: float = 0.02, spread: float | Tensor | None = None, seed: int = 0) -> Tensor:
    """Inputs plus normal noise of a small share of their range; not cut to it.

    Args:
        x: Inputs ``(N, ...)``.
        noise: The standard deviation, as a share of the range.
        spread: The range: a number, or a tensor that broadcasts against ``x``. ``None``: from the smallest to the
            largest value in ``x``; of a table ``(N, D)`` in each column, as each has its own unit.
        seed: Each sample has its own noise, a function of the seed and its row.

    Raises:
        ValueError: If the noise is not above 0.

    Example:
        >>> import torch
        >>> x = torch.linspace(-5, 5, 900).view(1, 1, 30, 30)
        >>> 0.19 < float((with_noise(x) - x).std()) < 0.21
        True
    """
    if not 0 < noise < math.inf:
        raise ValueError(f"with_noise(noise=) must be above 0, a share of the range such as 0.02; got {noise}.")
    x = x.detach()
    if spread is None:
        over = (0,) if x.ndim == 2 else tuple(range(x.ndim))
        spread = x.amax(over, keepdim=True) - x.amin(over, keepdim=True)
    return x + noise * spread * normal(x, [seeded(seed, i) for i in range(len(x))])


def skill(similarity: float, null: float, floor: float) -> float:
    r"""A similarity on a scale that methods and data share: 0 is nothing in common, 1 as near as noise allows.

    .. math:: \frac{s - s_{null}}{s_{floor} - s_{null}}

    Maps that are nearer than those of noisy inputs have a skill above 1 (identical ones always), maps that are less
    alike than chance a negative one.

    Args:
        similarity: E.g. the mean ``iou10`` of two snapshots; not a distance like ``centre_shift``.
        null: The same number from :func:`null_similarity`.
        floor: The same number from :func:`noise_floor`.

    Returns:
        The skill; NaN where the floor is not more than .05 above the null. The method is then insensitive to the
        weights, or so sensitive to noise that nothing can be told.

    Example:
        >>> round(skill(0.31, null=0.08, floor=0.89), 2), skill(0.97, null=0.97, floor=0.98)
        (0.28, nan)
    """
    span = floor - null
    return (similarity - null) / span if span > NARROW else math.nan


def insensitive(null: Mapping[str, float], floor: Mapping[str, float]) -> bool:
    """Whether maps of a net without its weights still resemble those of the net itself: they show the input alone.

    Both ``iou10`` and ``cosine`` are more than halfway from chance (1/19 and 0) to the floor. Both, as each has a blind
    spot: maps that are 0 wherever the input is share half of their largest tenth with any other, and maps without signs
    correlate.

    Two maps of zeros count as the same, which says nothing about a method: measure on samples whose maps are not, or
    Grad-CAM, which is 0 throughout for many, is blamed for them.

    Args:
        null: From :func:`null_similarity`, or any that has ``iou10`` and ``cosine``.
        floor: From :func:`noise_floor`, of the same method and samples.

    Returns:
        The verdict. False where it cannot be told: a number is NaN, or a floor is not more than .05 above chance.

    Example:
        >>> floor = {"iou10": 0.8, "cosine": 0.9}
        >>> insensitive({"iou10": 0.7, "cosine": 0.8}, floor), insensitive({"iou10": 0.7, "cosine": 0.1}, floor)
        (True, False)
    """
    skills = [skill(null[name], chance, floor[name]) for name, chance in CHANCE.items()]
    return all(value > HALFWAY for value in skills)  # no NaN is above


def maps_of(module: nn.Module, explain: Explain, x: Tensor) -> Tensor:
    """The maps of ``x`` by the module as it is, without a trace on it; detached."""
    # Every call starts from the same random state, so that a method that draws from it draws the same.
    with frozen(module, training=None):
        return explain(x.clone() if x.is_inference() else x.detach()).detach()


def means(similarity: Mapping[str, Tensor]) -> dict[str, float]:
    """One number for all samples, of each that :func:`~lightning_robust.saliency.drift` gives for one."""
    return {name: float(values.mean()) for name, values in similarity.items()}
