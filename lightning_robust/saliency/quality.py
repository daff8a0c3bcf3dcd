"""How good maps are: whether what they mark is what the prediction hangs on, and whether they hold still."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_robust.modes import gradients
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import seeded, uniform, untouched_random_state
from lightning_robust.saliency.concentration import mass
from lightning_robust.saliency.curves import area, check_maps, deletion_curve, insertion_curve
from lightning_robust.saliency.drift import centred_cosine, largest_tenth, overlap
from lightning_robust.saliency.explaining import without_channels
from lightning_robust.saliency.sanity import Explain

__all__ = ["attack_overlap", "quality", "sensitivity"]


def sensitivity(
    explain: Explain, x: Tensor, *, radius: float | Tensor = 0.02, samples: int = 10, seed: int = 0
) -> Tensor:
    r"""How far maps move at most when their inputs move a little.

    .. math:: \max_{\|d\|_\infty \le r} \frac{\|S(x + d) - S(x)\|_2}{\|S(x)\|_2}

    The maximum is over a few uniform draws, by captum's ``sensitivity_max``.

    Args:
        explain: ``x -> maps``, always given all samples in their order, so that targets can be closed over.
        x: Inputs ``(N, ...)``.
        radius: Of the perturbations, in the units of ``x``: a number, or a tensor that broadcasts against ``x``.
        samples: Draws. Each sample has its own ones, a function of the seed and its row.
        seed: Of the draws.

    Returns:
        ``(N,)``, at least 0, float64 on the CPU; 1 is as far as the map is long. A map of zeros counts as of length 1.

    Raises:
        ValueError: If there are no inputs, or a number is out of range.

    Example:
        >>> x = torch.ones(1, 4)
        >>> sensitivity(lambda x: torch.ones_like(x), x), bool(sensitivity(lambda x: x, x) < 0.02)
        (tensor([0.], dtype=torch.float64), True)

    References:
        Yeh et al., `On the (In)fidelity and Sensitivity of Explanations <https://arxiv.org/abs/1901.09392>`_, 2019,
        definition 3.1.
    """
    from captum.metrics import sensitivity_max  # type: ignore[import-untyped]  # captum ships no types

    reach = torch.as_tensor(radius, dtype=x.dtype, device=x.device)
    if not (len(x) and float(reach.min()) >= 0 and float(reach.max()) > 0 and samples >= 1):
        raise ValueError(
            f"sensitivity() needs inputs, a radius above 0 in their units and one draw or more; got {tuple(x.shape)}, "
            f"radius={radius}, samples={samples}."
        )
    generators = [seeded(seed, i) for i in range(len(x))]

    def perturbed(inputs: Tensor, _: float) -> Tensor:
        return inputs + reach * (2 * uniform(inputs, generators) - 1)

    def explained(inputs: Any) -> tuple[Tensor]:
        (inputs,) = inputs if isinstance(inputs, tuple) else (inputs,)
        # A method that draws from the global streams gets the same draws each time; it would never hold still else.
        with untouched_random_state(), gradients(inputs) as (inputs,):
            return (explain(inputs).detach().cpu().double(),)

    # Chunks of N: every call is one draw for all samples, in their order.
    found: Tensor = sensitivity_max(
        explained, x.detach(), perturbed, radius, n_perturb_samples=samples, max_examples_per_batch=len(x)
    )
    return found


def attack_overlap(maps: Tensor, x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
    """Whether an attack changes what a map marks.

    Args:
        maps: Maps ``(N, ...)`` of the clean inputs; magnitudes count.
        x: The clean inputs ``(N, C, ...)`` or ``(N, D)``.
        x_adv: The perturbed ones.

    Returns:
        One number per sample, ``(N,)`` in float64 on the CPU, of the map and the perturbation ``|x_adv - x|``, summed
        over channels; NaN where one of them holds NaN or infinity.

        - ``iou10``: overlap of the tenths with the largest magnitudes, as in
          :func:`~lightning_robust.saliency.drift`; 0.05 by chance.
        - ``cosine``: their correlation; 0 by chance.
        - ``mass``: the share of the perturbation that lies on the tenth of the inputs that the map marks most; 0.1 by
          chance. An input that was not perturbed counts as perturbed evenly.

        Attacks in the max-norm mostly move every pixel by the whole radius: then all three are at chance, and say
        nothing. Attacks in the 2-norm choose where.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> x, maps = torch.zeros(1, 20), torch.linspace(0, 1, 20)[None]
        >>> x_adv = x.clone()
        >>> x_adv[0, [18, 0]] = torch.tensor([0.3, -0.1])
        >>> {name: round(float(value), 2) for name, value in attack_overlap(maps, x, x_adv).items()}
        {'iou10': 0.33, 'cosine': 0.2, 'mass': 0.75}
    """
    if x.shape != x_adv.shape:
        raise ValueError(f"expected inputs and perturbed inputs of one shape, got {(*x.shape,)} and {(*x_adv.shape,)}.")
    check_maps(x, maps)
    moved = without_channels((x_adv.detach().cpu().double() - x.detach().cpu().double()).abs()).flatten(1)
    size = maps.detach().cpu().double().flatten(1).abs()
    top = largest_tenth(size)
    values = {
        "iou10": overlap(top, largest_tenth(moved)),
        "cosine": centred_cosine(size, moved),
        "mass": mass(moved, top),
    }
    finite = (size.isfinite() & moved.isfinite()).all(1)
    return {name: value.where(finite, torch.nan) for name, value in values.items()}


def quality(
    explain: Explain,
    logits_fn: LogitsFn,
    x: Tensor,
    target: Tensor,
    *,
    x_adv: Tensor | None = None,
    steps: int = 16,
    baseline: float | Tensor = 0.0,
    radius: float | Tensor = 0.02,
    samples: int = 10,
    chunk_size: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Curves, sensitivity and overlap with an attack, for one method on one batch.

    It costs ``4 (steps + 1)`` forwards and ``samples + 2`` explanations. Modes are the caller's
    (:func:`~lightning_robust.frozen`); random streams are left as they are.

    Args:
        explain: As for :func:`sensitivity`, e.g. ``lambda x: gradient(model, x, target)``.
        logits_fn: As for :func:`~lightning_robust.saliency.curves.deletion_curve`.
        x: As for :func:`~lightning_robust.saliency.curves.deletion_curve`.
        target: As for :func:`~lightning_robust.saliency.curves.deletion_curve`.
        x_adv: Perturbed inputs, for :func:`attack_overlap`.
        steps: Of the curves.
        baseline: What inputs are replaced by in the deletion; insertion starts from its own default.
        radius: Of the sensitivity, in the units of ``x``.
        samples: Of the sensitivity.
        chunk_size: Of the curves.
        seed: Of all draws.

    Returns:
        One number per sample, ``(N,)`` in float64 on the CPU; their means can be logged.

        - ``deletion``: the area under the deletion curve, lower is better, and ``deletion_random``, that of a random
          order.
        - ``insertion``: the area under the insertion curve, higher is better, and ``insertion_random``.
        - ``sensitivity``: lower is calmer.
        - ``attack_iou10``, ``attack_cosine``, ``attack_mass``: of :func:`attack_overlap`, if there is ``x_adv``.

        NaN, all but the random ones, where a map holds NaN or infinity.

    Raises:
        ValueError: As for the functions above.

    Example:
        >>> from lightning_robust.saliency import gradient
        >>> weight, x = torch.tensor([[-1.0, 1.0], [0.0, 0.0], [-2.0, 2.0]]), torch.rand(4, 3)
        >>> target = torch.ones(4, dtype=torch.long)
        >>> found = quality(lambda x: x * gradient(lambda x: x @ weight, x, target), lambda x: x @ weight, x, target)
        >>> sorted(found)
        ['deletion', 'deletion_random', 'insertion', 'insertion_random', 'sensitivity']
        >>> bool((found["deletion"] <= found["deletion_random"]).all())
        True
    """
    with untouched_random_state(), gradients(x) as (inputs,):
        maps = explain(inputs).detach()
    check_maps(x, maps, target)
    chance = torch.stack([torch.rand(maps.shape[1:], generator=seeded(seed, i, 1)) for i in range(len(x))])
    shared: dict[str, Any] = {"steps": steps, "chunk_size": chunk_size, "seed": seed}
    found: dict[str, Tensor] = {}
    for suffix, order in (("", maps), ("_random", chance)):
        found[f"deletion{suffix}"] = area(*deletion_curve(logits_fn, x, target, order, baseline=baseline, **shared))
        found[f"insertion{suffix}"] = area(*insertion_curve(logits_fn, x, target, order, **shared))
    found["sensitivity"] = sensitivity(explain, x, radius=radius, samples=samples, seed=seed)
    if x_adv is not None:
        found |= {f"attack_{name}": values for name, values in attack_overlap(maps, x, x_adv).items()}
    finite = maps.cpu().flatten(1).isfinite().all(1)
    return {
        name: values if name.endswith("_random") else values.where(finite, torch.nan) for name, values in found.items()
    }
