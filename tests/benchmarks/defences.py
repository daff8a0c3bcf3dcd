"""What a defence does to the numbers it was not made for: ``python -m tests.benchmarks.defences``, Markdown tables.

Each row is a shipped recipe, so that ``lightning-robust fit reliability/madry seed=1`` repeats a single run: half a
minute to two minutes each. All numbers are of 500 digits that nothing was trained, selected or fitted on.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from lightning_robust.corruptions import shift_heat_map
from lightning_robust.recipe import compose, instantiate
from tests.benchmarks.decoy import bare_process, per_seed, recorded, save

ROWS = {
    "undefended": "none",
    "input-gradient": "input-gradient penalty",
    "jacobian": "Jacobian penalty",
    "n-fgsm": "N-FGSM",
    "madry": "PGD (Madry)",
    "trades": "TRADES",
}
METHODS = ("temperature", "vector", "isotonic")
SCORES = ("energy", "max_logit", "msp", "entropy", "gen", "margin", "mahalanobis", "knn", "vim")
SETS = ("letters", "patches", "attacked")
GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur": ("gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "glass_blur"),
    "weather": ("snow", "fog", "brightness"),
    "digital": ("contrast", "pixelate", "elastic", "jpeg"),
}
WITHOUT = ("last",)
QUIET = ("enable_progress_bar", "enable_model_summary")


@dataclass(frozen=True)
class Training:
    """One run of one recipe."""

    recipe: str
    seed: int


Found = Sequence[tuple[Training, dict[str, float]]]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.defences", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines, one a run; those in it are not repeated")
    parser.add_argument(
        "--heat-map", type=Path, metavar="PNG", help="draw accuracy under corruptions, seed by seed mean"
    )
    arguments = parser.parse_args()
    bare_process()
    runs = [Training(recipe, seed) for recipe in arguments.recipes for seed in arguments.seeds]
    found = recorded(runs, measured, arguments.out)
    for title, table in {
        "What a defence does to the other numbers": overview(found),
        "Recalibrators: fitted on 500 validation digits, NLL on 500 test digits": recalibrators(found),
        "Foreign data: AUROC": foreign(found),
        "Shift: accuracy, mean of five severities": shift(found),
    }.items():
        print(f"### {title}\n\n{table}\n")
    if arguments.heat_map:
        save(heat_map(found), arguments.heat_map)


def measured(run: Training) -> dict[str, float]:
    """Everything that the recipe logs of its test, single corruptions included."""
    overrides = [f"seed={run.seed}", *(f"callbacks.{name}=null" for name in WITHOUT)]
    overrides += [f"trainer.{name}=false" for name in QUIET]
    with tempfile.TemporaryDirectory() as folder:
        trainer, module, data = instantiate(compose(f"reliability/{run.recipe}", overrides), Path(folder, "run", "0"))
        trainer.fit(module, datamodule=data)
        best = trainer.checkpoint_callback.best_model_path
        logged: dict[str, float] = {}
        # Values of single corruptions go to the loggers alone.
        original: Callable[..., None] = trainer.logger.log_metrics

        def note(metrics: dict[str, float], *args: object, **kwargs: object) -> None:
            logged.update({key: float(value) for key, value in metrics.items() if "/test/" in key})
            original(metrics, *args, **kwargs)

        trainer.logger.log_metrics = note
        trainer.test(module, datamodule=data, ckpt_path=best, verbose=False)
        return logged | {k: float(v) for k, v in trainer.callback_metrics.items() if "/test/" in k}


def by_recipe(found: Found) -> dict[str, list[dict[str, float]]]:
    """What was found of the seeds of each recipe."""
    groups: dict[str, list[dict[str, float]]] = {}
    for run, numbers in found:
        groups.setdefault(run.recipe, []).append(numbers)
    return groups


def overview(found: Found) -> str:
    """One column a defence, one row a number; means over seeds with the seeds in brackets."""
    columns = by_recipe(found)
    rows: dict[str, tuple[str, float, int]] = {
        "clean accuracy, %": ("robust/test/clean_accuracy", 100, 1),
        "accuracy under PGD-20 x 2, linf 0.2, %": ("robust/test/accuracy_pgd20x2_linf_0.2", 100, 1),
        "NLL": ("calibration/test/nll", 1, 3),
        "NLL after temperature": ("calibration/test/nll_scaled", 1, 3),
        "temperature": ("calibration/test/temperature", 1, 2),
        "ECE": ("calibration/test/ece", 1, 3),
        "floor of the ECE": ("calibration/test/ece_floor", 1, 3),
        "AURC x 1000": ("calibration/test/aurc", 1000, 1),
        "AUROC letters (near), energy": ("ood/test/letters/energy_auroc", 1, 3),
        "AUROC letters, KNN on features": ("ood/test/letters/knn_auroc", 1, 3),
        "AUROC patches (far), energy": ("ood/test/patches/energy_auroc", 1, 3),
        "AUROC own digits under PGD-10, energy": ("ood/test/attacked/energy_auroc", 1, 3),
        "accuracy under 16 corruptions, %": ("shift/test/mean_accuracy", 100, 1),
        "retention, %": ("shift/test/retention", 100, 1),
        "worst corruption and severity, %": ("shift/test/worst_accuracy", 100, 1),
        "ECE under corruptions, temperature of clean data": ("shift/test/mean_ece_scaled", 1, 3),
        "AUROC corrupted against clean, MSP": ("shift/test/mean_msp_auroc", 1, 3),
        "accuracy on UCI digits, %": ("shift/test/uci/accuracy", 100, 1),
    }
    lines = ["| | " + " | ".join(ROWS[name] for name in columns) + " |", "|---|" + "---:|" * len(columns)]
    for label, (key, factor, digits) in rows.items():
        cells = (per_seed((factor * seed[key] for seed in seeds), digits) for seeds in columns.values())
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recalibrators(found: Found) -> str:
    """NLL, ECE and accuracy, before and after each recalibrator; means over seeds."""
    names = {"temperature": "scaled", "vector": "vector", "isotonic": "isotonic"}
    lines = [
        "| defence | NLL as it is | temperature | vector | isotonic | ECE as it is (floor) | temperature | vector "
        "| isotonic | accuracy, % | vector | isotonic |",
        "|---|" + "---:|" * 11,
    ]
    for recipe, seeds in by_recipe(found).items():

        def value(key: str, seeds: list[dict[str, float]] = seeds) -> float:
            return mean(seed[f"calibration/test/{key}"] for seed in seeds)

        nll = [f"{value(f'nll{suffix}'):.3f}" for suffix in ("", *(f"_{n}" for n in names.values()))]
        ece = [f"{value('ece'):.3f} ({value('ece_floor'):.3f})", *(f"{value(f'ece_{n}'):.3f}" for n in names.values())]
        clean = mean(seed["robust/test/clean_accuracy"] for seed in seeds)
        right = [f"{100 * share:.1f}" for share in (clean, value("accuracy_vector"), value("accuracy_isotonic"))]
        lines.append(f"| {ROWS[recipe]} | {' | '.join([*nll, *ece, *right])} |")
    return "\n".join(lines)


def foreign(found: Found) -> str:
    """AUROC by score and set, means over seeds; the best score of each set and defence is bold."""
    lines = ["| defence | set | " + " | ".join(SCORES) + " |", "|---|---|" + "---:|" * len(SCORES)]
    for recipe, seeds in by_recipe(found).items():
        for name in SETS:
            means = [mean(seed[f"ood/test/{name}/{score}_auroc"] for seed in seeds) for score in SCORES]
            cells = (f"**{value:.3f}**" if value == max(means) else f"{value:.3f}" for value in means)
            lines.append(f"| {ROWS[recipe]} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shift(found: Found) -> str:
    """Accuracy in per cent by corruption, mean of the severities and seeds."""
    names = [name for group in GROUPS.values() for name in group]
    columns = by_recipe(found)
    lines = ["| corruption | " + " | ".join(ROWS[name] for name in columns) + " |", "|---|" + "---:|" * len(columns)]
    for name in names:
        cells = [
            100 * mean(seed[f"shift/test/{name}_{severity}/accuracy"] for seed in seeds for severity in range(1, 6))
            for seeds in columns.values()
        ]
        shown = (f"**{value:.1f}**" if value == max(cells) else f"{value:.1f}" for value in cells)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def heat_map(found: Found) -> Tensor:
    """Accuracy by corruption and severity of the first two defences in the table, side by side, ``(3, H, W)``."""
    pictures = []
    for recipe, seeds in list(by_recipe(found).items())[:2]:
        cells = {
            (name, severity): mean(seed[f"shift/test/{name}_{severity}/accuracy"] for seed in seeds)
            for group in GROUPS.values()
            for name in group
            for severity in range(1, 6)
        }
        clean = mean(seed["shift/test/clean_accuracy"] for seed in seeds)
        pictures.append(shift_heat_map(cells, f"accuracy, {ROWS[recipe]}", clean=clean))
    return torch.cat(pictures, 2)


if __name__ == "__main__":
    main()
