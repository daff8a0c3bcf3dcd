"""How strong our attacks are beside their authors' own: ``python -m tests.benchmarks.strength``, a Markdown table.

On the small net that tests attack, trained adversarially on scikit-learn's 8x8 digits; 397 digits that it has not seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_robust.attacks import APGD, AutoAttack, Square, ThreatModel, WorstCase
from lightning_robust.randomness import seeded
from tests.benchmarks.timing import progress
from tests.robust_digits import small_and_robust

CASES: tuple[tuple[Literal["linf", "l2"], float], ...] = (("linf", 0.15), ("l2", 0.6))


def main() -> None:
    """Accuracy that each attack leaves, in per cent, mean over seeds."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    print("| attack | seeds | ours | pyautoattack |\n|---|---:|---:|---:|")
    for norm, eps in CASES:
        for name, seeds, ours, theirs in pairs(norm, ThreatModel(norm, eps)):
            progress(f"strength: {norm} {name}")
            numbers = (f"{100 * accuracy(norm, attack, seeds):.1f}" for attack in (ours, theirs))
            print(f"| {norm} {eps} {name} | {seeds} | {' | '.join(numbers)} |", flush=True)


Attack = Callable[[Any, Tensor, Tensor, int], Tensor]


def pairs(norm: Literal["linf", "l2"], threat: ThreatModel) -> Sequence[tuple[str, int, Attack, Attack]]:
    """The same attack twice, ours and that of its authors, and over how many seeds."""
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted  # only this script needs it
    from pyautoattack.square import SquareAttack

    shared = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": threat.eps, "n_restarts": 1, "device": "cpu"}

    def own(attack: Any) -> Attack:
        return lambda net, x, y, seed: attack(net, x, y, generator=seeded(seed))  # type: ignore[no-any-return]

    def their(kind: Any, **settings: Any) -> Attack:
        return lambda net, x, y, seed: kind(net, seed=seed, verbose=False, **shared, **settings).perturb(x, y)  # type: ignore[no-any-return]

    parts = [APGD(threat, objective="cross_entropy"), APGD(threat, targets=9), Square(threat)]
    return [
        ("APGD-CE", 8, own(parts[0]), their(APGDAttack, n_iter=100, loss="ce")),
        ("APGD-DLR", 8, own(APGD(threat, objective="dlr")), their(APGDAttack, n_iter=100, loss="dlr")),
        ("APGD-T, 9 targets", 3, own(parts[1]), their(APGDAttack_targeted, n_iter=100, n_target_classes=9)),
        (
            "Square, 1,000 queries",
            3,
            own(Square(threat, queries=1000)),
            their(SquareAttack, n_queries=1000, resc_schedule=True),
        ),
        (
            "worst case of APGD-CE, APGD-T, Square / AutoAttack standard",
            1,
            own(WorstCase(parts)),
            lambda net, x, y, seed: AutoAttack(threat, seed=seed)(net, x, y),
        ),
    ]


def accuracy(norm: Literal["linf", "l2"], attack: Attack, seeds: int) -> float:
    """Share of right answers, mean over seeds from 0 on."""
    net, x, y = small_and_robust(norm)
    right = torch.zeros(())
    for seed in range(seeds):
        perturbed = attack(net, x, y, seed)
        with torch.no_grad():
            right += (net(perturbed).argmax(1) == y).float().mean() / seeds
    return float(right)


if __name__ == "__main__":
    main()
