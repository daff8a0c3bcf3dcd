"""Whether a robust accuracy can be believed: signs of gradient masking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attacks.fgsm import FGSM
from lightning_robust.attacks.heads import OnHead
from lightning_robust.attacks.local import LocalThreat
from lightning_robust.attacks.noise import UniformNoise
from lightning_robust.attacks.objectives import margin
from lightning_robust.attacks.search import Search, searching
from lightning_robust.attacks.square import Square
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise

__all__ = ["CHECKS", "Finding", "MaskingReport", "diagnose"]

# Plain networks (linear, MLP, two CNNs, one trained adversarially; three seeds, linf and l2, three radii) stay below
# each of these; see tests/attacks/test_masking.py.
ZERO_GRADIENTS = 0.1  # share of samples; plain ones show 0, logits times 100 show 0.9
BETTER = 0.05  # share of samples that a weaker attack fools beyond what the stronger one does
DISAGREE = 0.12  # the same for an attack on the margin; a linear one shows 0.06
AS_GOOD = 0.5  # what noise fools, as a share of what gradients fool
FLAT = 0.9  # what holds at 16 times the radius, as a share of what holds at the radius
UNBOUNDED = 0.05  # what holds when every pixel may take any value
RISING = 0.35  # of the whole ascent, in its last quarter; a converged one shows 0.1, half of the steps gone 0.25
ENOUGH = 10  # samples below which nothing is said

CHECKS = (
    *("zero_gradients", "one_step_beats_many", "black_box_beats_white_box", "noise_does_as_well", "flat_in_eps"),
    *("fewer_steps_do_better", "unbounded_survives", "losses_disagree", "still_rising"),
)
"""Names of all checks, in their order."""


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: Its name.
        value: What was measured.
        threshold: Above it the check is suspicious.
        suspicious: Whether it is.
        says: What that means, and what to do.
    """

    check: str
    value: float
    threshold: float
    suspicious: bool
    says: str


@dataclass(frozen=True)
class MaskingReport:
    """All checks, suspicious or not.

    Attributes:
        findings: One a check; none where there were fewer than ten samples that the model gets right.
        n: Samples that they are about.
    """

    findings: tuple[Finding, ...]
    n: int

    @property
    def suspicious(self) -> bool:
        """Whether any check is."""
        return any(finding.suspicious for finding in self.findings)

    def values(self) -> dict[str, float]:
        """What was measured, by check."""
        return {finding.check: finding.value for finding in self.findings}

    def __str__(self) -> str:
        rows = [f"| check ({self.n} samples) | value | suspicious above | |", "|---|---:|---:|---|"]
        for finding in self.findings:
            said = f"**suspicious**: {finding.says}" if finding.suspicious else "fine"
            rows.append(f"| {finding.check} | {finding.value:.3f} | {finding.threshold:.2f} | {said} |")
        return "\n".join(rows)


def diagnose(
    logits_fn: LogitsFn,
    x: Tensor,
    y: Tensor,
    threat: Any,
    *,
    steps: int = 20,
    objective: Any = None,
    generator: Noise = None,
) -> MaskingReport:
    """Look for signs that gradients mislead an attack, on samples that the model gets right.

    A network whose gradients vanish, shatter or saturate looks robust against attacks that follow them, and is not.
    None of these checks proves anything; one that is suspicious says that the number must not be reported before it is
    understood. They cost about as much as seven runs of PGD with ``steps`` steps.

    Args:
        logits_fn: Model inputs to logits.
        x: Model inputs, ``(N, ...)``; a few hundred are enough.
        y: Targets.
        threat: The threat model whose robust accuracy is in question.
        steps: Of the gradient attacks.
        objective: What they climb, as in :class:`~lightning_robust.attacks.PGD`.
        generator: Random numbers of the attacks.

    Raises:
        ValueError: If the radius is zero.

    Example:
        >>> from lightning_robust import ThreatModel
        >>> x, y = torch.rand(64, 20, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
        >>> x = 0.8 * x + 0.2 * y.unsqueeze(1)
        >>> blind = lambda x: torch.stack([(x < 0.5).float().sum(1), (x >= 0.5).float().sum(1)], 1) + 0 * x[:, :2]
        >>> report = diagnose(blind, x, y, ThreatModel("linf", eps=0.1))
        >>> [finding.check for finding in report.findings if finding.suspicious][:2]
        ['zero_gradients', 'black_box_beats_white_box']

    References:
        Athalye et al., `Obfuscated Gradients Give a False Sense of Security <https://arxiv.org/abs/1802.00420>`_, 2018.
        Carlini et al., `On Evaluating Adversarial Robustness <https://arxiv.org/abs/1902.06705>`_, 2019. Pintor et al.,
        `Indicators of Attack Failure <https://arxiv.org/abs/2106.09947>`_, 2022.
    """
    if not threat.eps > 0:
        raise ValueError(f"diagnose() needs a radius above 0, got {threat}.")
    with searching(threat, logits_fn, x, y, objective, generator) as search:
        right = search.look(search.clean)[1] <= 0
        if int(right.sum()) < ENOUGH:
            return MaskingReport((), int(right.sum()))
        if isinstance(threat, LocalThreat) and threat.radii is not None:
            right &= threat.radii.to(right.device) > 0  # what must not move says nothing
        if search.divisible:
            search, right = search.at(right.nonzero().squeeze(1)), right[right]
        return MaskingReport(tuple(_findings(search, right, steps)), int(right.sum()))


def _findings(search: Search, right: Tensor, steps: int) -> Iterator[Finding]:
    n = int(right.sum())
    white, values, still = _ascent(search, steps)
    share = float(still[right].double().mean())
    yield _finding(
        "zero_gradients",
        share,
        ZERO_GRADIENTS,
        f"{share:.0%} of the input gradients are exactly zero: the loss is saturated (logits in the hundreds, inputs "
        "of another range than in training) or an operation has no gradient. Attack the margin or DLR too, in fp32.",
    )
    threat: Any = search.threat
    attacks: dict[str, tuple[Any, str]] = {
        "one_step_beats_many": (FGSM(threat), f"one gradient step fools more samples than {steps}"),
        "black_box_beats_white_box": (Square(threat, queries=200), "a search without gradients fools more"),
    }
    for check, (attack, what) in attacks.items():
        more, least = _beyond(white, _margins(search, attack), right)
        yield _finding(
            check,
            more,
            least,
            f"{what}, by {more:.0%} of the samples: gradients do not lead to where the model is weak. Report the worst "
            "case of several attacks, Square among them.",
        )
    noise = _margins(search, UniformNoise(threat))
    fooled, by_noise = float((white > 0)[right].double().mean()), float((noise > 0)[right].double().mean())
    holds = 1 - fooled
    # At a radius where everything falls, to fall to noise is no sign of anything.
    ratio = by_noise / fooled if fooled > max(0.05, 5 / n) and holds > 0.2 else 0.0
    yield _finding(
        "noise_does_as_well",
        ratio,
        AS_GOOD,
        f"random noise fools {by_noise:.0%} and the gradient attack {fooled:.0%}: it does little more than chance.",
    )
    masked = isinstance(threat, LocalThreat) and threat.mask is not None
    if not masked:  # a model may well hold where most of a picture must not change
        farther, _, _ = _ascent(_at(search, 16), steps)
        flat = float((farther <= 0)[right].double().mean()) / holds if holds > 0.2 else 0.0
        yield _finding(
            "flat_in_eps",
            flat,
            FLAT,
            f"at 16 times the radius {flat:.0%} of what held still holds: the radius is in other units than the pixels "
            "(eps for 0..1 and pixels in 0..255?), or gradients lead nowhere.",
        )
    less, least = _beyond(white, _ascent(search, max(1, steps // 4))[0], right)
    yield _finding(
        "fewer_steps_do_better",
        less,
        least,
        f"a quarter of the steps fools more samples, by {less:.0%}: the ascent gets lost on a rough loss.",
    )
    if not masked:
        wide, _, _ = _ascent(_at(search, _everywhere(search)), steps)
        survive = float((wide <= 0)[right].double().mean())
        yield _finding(
            "unbounded_survives",
            survive,
            UNBOUNDED,
            f"{survive:.0%} survive an attack that may change every pixel to anything, as no model can: it fails.",
        )
    owner = search.objective if hasattr(search.objective, "head") else None
    by_margin, _, _ = _ascent(replace(search, objective=OnHead(margin, owner)), steps)
    disagree, least = _beyond(white, by_margin, right)
    yield _finding(
        "losses_disagree",
        disagree,
        max(DISAGREE, least),
        f"climbing the margin fools {disagree:.0%} more samples than climbing the loss: the loss is saturated. Report "
        "an attack on the margin or DLR.",
    )
    rising = _rising(values[:, right])
    yield _finding(
        "still_rising",
        rising,
        RISING,
        f"{rising:.0%} of the ascent was in its last quarter: it has not converged. Take more steps, or longer ones.",
    )


def _finding(check: str, value: float, threshold: float, says: str) -> Finding:
    return Finding(check, value, threshold, value > threshold, says)


def _ascent(search: Search, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest margin ``(N,)``, the objective before each step ``(steps, N)``, and where the first gradient was zero.

    The first gradient is that of the clean input, which counts as an iterate.
    """
    gradient, _, _ = search.climb(search.clean)
    still = gradient.flatten(1).abs().amax(1) == 0
    pixels, step, values = search.start(), 2.5 * search.threat.eps / steps, []
    worst = search.look(search.clean)[1]
    for _ in range(steps):
        gradient, value, logits = search.climb(pixels)
        worst = torch.maximum(worst, search.margin(logits))
        values.append(value)
        pixels = search.project(pixels + step * search.uphill(gradient))
    return torch.maximum(worst, search.look(pixels)[1]), torch.stack(values), still


def _margins(search: Search, attack: Any) -> Tensor:
    if hasattr(attack, "early_exit"):
        attack = replace(attack, early_exit=False)  # samples stay in their rows
    new = {"objective": search.objective} if hasattr(attack, "objective") else {}
    model_inputs = search.threat.pixels.to_model(search.clean, search.dtype)
    found = replace(attack, **new)(search.logits_fn, model_inputs, search.y, generator=search.noise)
    return torch.maximum(search.look(search.threat.pixels.to_pixels(found))[1], search.look(search.clean)[1])


def _beyond(strong: Tensor, weak: Tensor, right: Tensor) -> tuple[float, float]:
    """By how much the attack that should be weaker fools more, and from where on that is no chance (paired)."""
    only_weak = ((weak > 0) & (strong <= 0))[right]
    only_strong = ((strong > 0) & (weak <= 0))[right]
    n = int(right.sum())
    more = float(only_weak.sum() - only_strong.sum()) / n
    error = float(only_weak.sum() + only_strong.sum()) ** 0.5 / n
    return more, max(BETTER, 2 * error)


def _at(search: Search, factor: float) -> Search:
    return replace(search, threat=search.threat.scaled(factor))


def _everywhere(search: Search) -> float:
    """How many times the radius reaches every legal input; without bounds, far outside of the data."""
    bounds = search.threat.pixels.bounds
    widest = bounds[1] - bounds[0] if bounds is not None else 20 * float(search.clean.std()) + 1e-6
    if search.threat.norm == "l2":
        widest *= search.clean[0].numel() ** 0.5
    return max(16.0, widest / search.threat.eps)


def _rising(values: Tensor) -> float:
    """Share of the whole ascent that falls into its last quarter, mean over samples that went up."""
    first, last, late = values[0], values[-1], values[-1 - len(values) // 4]
    up = (values.amax(0) - first).clamp_min(0)
    moved = up > 1e-4 * (1 + first.abs())
    if not bool(moved.any()):
        return 0.0
    return float(((last - late)[moved] / up[moved]).clamp(-1, 1).double().mean())
