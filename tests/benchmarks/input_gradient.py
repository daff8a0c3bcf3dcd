"""The penalty on input gradients under attack: ``python -m tests.benchmarks.input_gradient``, a Markdown table.

Small nets with ReLU and with GELU on scikit-learn's 8x8 digits, 15 epochs; 397 digits that they have not seen, attacked
within linf 0.1 by FGSM, by PGD with 20 steps and 2 restarts, and by the worst of three others. Nothing is selected:
weights and steps are given, and the last weights are tested. Ten seconds a run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import (
    APGD,
    FGSM,
    PGD,
    InputGradientPenalty,
    RobustAccuracy,
    SaliencyRegularization,
    Square,
    ThreatModel,
    WorstCase,
)
from lightning_robust.demo import Classifier
from lightning_robust.demo.nets import Net
from lightning_robust.penalties.squared_gradient import Method
from lightning_robust.randomness import seeded
from tests.benchmarks.decoy import bare_process, per_seed, recorded

NETS: dict[Net, str] = {"plain-cnn": "ReLU", "gelu-cnn": "GELU"}
THREAT = ThreatModel("linf", eps=0.1)
ATTACKS: dict[str, Any] = {
    "fgsm": FGSM(THREAT),
    "pgd": PGD(THREAT, steps=20, restarts=2),
    # A penalty on gradients might hide them instead of flattening the loss; Square needs none.
    "worst": WorstCase(
        [APGD(THREAT, objective="cross_entropy"), APGD(THREAT, targets=9), Square(THREAT, queries=1000)]
    ),
}
EPOCHS = 15


@dataclass(frozen=True)
class Training:
    """One run; a weight of 0 is no penalty, and ``step`` says nothing under double backward."""

    net: Net
    seed: int
    method: Method = "double_backward"
    weight: float = 0.0
    step: float = 0.13


ROWS: dict[str, tuple[Method, float, float]] = {
    "none": ("double_backward", 0.0, 0.13),
    "double backward, weight 0.1": ("double_backward", 0.1, 0.13),
    "double backward, weight 1": ("double_backward", 1.0, 0.13),
    "finite differences, step 0.013, weight 0.1": ("finite_differences", 0.1, 0.013),
    "finite differences, step 0.13, weight 0.1": ("finite_differences", 0.1, 0.13),
    "finite differences, step 0.13, weight 0.3": ("finite_differences", 0.3, 0.13),
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.input_gradient", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines, one a run; those in it are not repeated")
    arguments = parser.parse_args()
    bare_process()
    runs = [Training(net, seed, *row) for net in NETS for row in ROWS.values() for seed in arguments.seeds]
    print(table(recorded(runs, measured, arguments.out)))


def measured(run: Training) -> dict[str, float]:
    """Accuracies in per cent, on digits as they are and under each attack."""
    pl.seed_everything(run.seed)
    penalty = SaliencyRegularization(InputGradientPenalty(run.method, run.step), run.weight)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        callbacks=[RobustAccuracy(ATTACKS, stages=["test"]), *([penalty] if run.weight else [])],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier(size=8, width=16, net=run.net)
    train, test = digits()
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True, drop_last=True))
    trainer.test(module, DataLoader(test, batch_size=250), verbose=False)
    keys = {"clean": "clean_accuracy", **{name: f"accuracy_{name}" for name in ATTACKS}}
    return {name: 100 * float(trainer.callback_metrics[f"robust/test/{key}"]) for name, key in keys.items()}


@cache
def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,400 digits to train and 397 to test, ``(N, 1, 8, 8)`` in [0, 1]; the same for every seed."""
    from sklearn.datasets import load_digits  # of the demo's extra

    found = load_digits()
    images, labels = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=seeded(0))
    train, test = order[:1400], order[1400:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def table(found: Sequence[tuple[Training, dict[str, float]]]) -> str:
    """Per cent, mean over seeds and each of them."""
    lines = ["| net | penalty | clean | FGSM | PGD-20 x 2 | worst case |", "|---|---|---:|---:|---:|---:|"]
    for net, activation in NETS.items():
        for name, row in ROWS.items():
            seeds = [numbers for run, numbers in found if (run.net, run.method, run.weight, run.step) == (net, *row)]
            cells = (per_seed(one[column] for one in seeds) for column in ("clean", *ATTACKS))
            lines.append(f"| {activation} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
