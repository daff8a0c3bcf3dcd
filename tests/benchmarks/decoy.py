"""Decoy-MNIST through our callbacks: ``python -m tests.benchmarks.decoy``, a Markdown table.

Each row is a shipped recipe, so that ``lightning-robust fit saliency/decoy-right-reasons vars.net=mlp seed=1`` repeats
a single run. Half a minute a seed and net. ``--sweep`` tries the weights that those of the recipes were chosen from,
and ``--strip`` draws the gradients before and after.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_robust.demo import DecoyDigits, Digits
from lightning_robust.modes import frozen
from lightning_robust.recipe import compose, instantiate
from lightning_robust.saliency import filmstrip, gradient

__all__ = ["bare_process", "per_seed", "recorded"]

ROWS = {
    "saliency/decoy-shortcut": "plain",
    "saliency/decoy-gradient-penalty": "gradient penalty, no mask",
    "saliency/decoy-right-reasons": "right reasons, finite differences",
    "saliency/decoy-right-reasons-exact": "right reasons, double backward",
    "saliency/decoy-random-fill": "control: random fill",
    "saliency/decoy-clean": "ceiling: no squares anywhere",
}
NETS = ("plain-cnn", "mlp")
PENALISED = [recipe for recipe in ROWS if "weight" in compose(recipe).resolved["vars"]]
WEIGHTS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
SWEEP_SEEDS = (10, 11, 12)  # none that the table reports
WITHOUT = ("saliency", "last")  # callbacks that would write files; neither changes the training run
QUIET = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")


@dataclass(frozen=True)
class Training:
    """One run of one recipe; ``weight`` is that of its penalty, if it has one."""

    recipe: str
    net: str
    seed: int
    weight: float | None


def main() -> None:
    """Print a table, or write a picture."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.decoy", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines, one a run; those in it are not repeated")
    parser.add_argument("--sweep", action="store_true", help="other weights, on validation digits with random squares")
    parser.add_argument("--strip", type=Path, metavar="PNG", help="draw what two trained nets look at, and stop")
    arguments = parser.parse_args()
    bare_process()
    if arguments.strip:
        save(strip(arguments.seeds[0]), arguments.strip)
    elif arguments.sweep:
        runs = [Training(r, net, seed, w) for net in NETS for r in PENALISED for w in WEIGHTS for seed in SWEEP_SEEDS]
        print(sweep_table(recorded(runs, selection, arguments.out)))
    else:
        runs = [Training(recipe, net, s, weight_of(recipe)) for net in NETS for recipe in ROWS for s in arguments.seeds]
        print(table(recorded(runs, measured, arguments.out)))


def weight_of(recipe: str) -> float | None:
    """What the recipe multiplies its penalty by."""
    weight: float | None = compose(recipe).resolved["vars"].get("weight")
    return weight


# -- one run ---------------------------------------------------------------------------------------------------------


def trained(run: Training) -> Any:
    """The module after the recipe's training: its last weights."""
    overrides = [f"vars.net={run.net}", f"seed={run.seed}", *(f"callbacks.{name}=null" for name in WITHOUT)]
    overrides += [f"trainer.{name}=false" for name in QUIET]
    if run.weight is not None:
        overrides.append(f"vars.weight={run.weight}")
    with tempfile.TemporaryDirectory() as folder:
        trainer, module, data = instantiate(compose(run.recipe, overrides), Path(folder), log=False)
        trainer.fit(module, datamodule=data)
    return module


def measured(run: Training) -> dict[str, float]:
    """Accuracies in per cent and, in per cent, the share of the gradient that falls on the square."""
    start = time.process_time()
    module = trained(run)
    seconds = time.process_time() - start
    bare = run.recipe == "saliency/decoy-clean"
    test = digits("test", "none" if bare else "random")
    return {
        "test": accuracy(module, test),
        "share": 100 * float(shares(module, test).mean()),
        "validation": accuracy(module, digits("val", "none" if bare else "telling")),
        "seconds": seconds,
    }


def selection(run: Training) -> dict[str, float]:
    """What weights are chosen by: accuracy in per cent on validation digits with random squares, never on the test."""
    return {"selection": accuracy(trained(run), digits("val", "random"))}


Labelled = tuple[Tensor, Tensor, Tensor]
"""Images ``(N, 1, 28, 28)``, labels ``(N,)``, and masks that are 1 on the square."""


@cache
def digits(part: str, squares: str) -> Labelled:
    """The same digits with squares that tell the label, with random ones, or with none; the masks are the same."""
    data = DecoyDigits(random_fill=squares == "random")
    data.setup("fit")
    images, labels, masks = data.parts[part].tensors
    if squares == "none":
        bare = Digits()
        bare.setup("fit")
        images = bare.parts[part].tensors[0]
    return images, labels, masks


def accuracy(module: Any, of: Labelled) -> float:
    """Share of right answers, in per cent."""
    images, labels, _ = of
    with frozen(module), torch.no_grad():
        return 100 * float((module(images).argmax(1) == labels).float().mean())


def shares(module: Any, of: Labelled) -> Tensor:
    """Of ``|d logit of the right class / d image|``, the share that falls on the square, ``(N,)``."""
    images, labels, masks = of
    with frozen(module):
        maps = gradient(module, images, labels)
    return (maps * masks[:, 0]).sum((1, 2)) / maps.sum((1, 2))


# -- many runs -------------------------------------------------------------------------------------------------------

R = TypeVar("R")


def bare_process() -> None:
    """One thread, so that numbers repeat; no chatter between the rows."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def recorded(
    runs: Sequence[R], measure: Callable[[R], dict[str, float]], out: Path | None
) -> list[tuple[R, dict[str, float]]]:
    """Measure each run (a dataclass), or read it from ``out`` if it is there; what is new is appended at once."""
    known: dict[str, dict[str, float]] = {}
    if out is not None and out.is_file():
        for line in map(json.loads, out.read_text().splitlines()):
            known[json.dumps([line["measure"], line["run"]])] = line["found"]
    found = []
    for run in tqdm(runs, unit="run"):
        described = asdict(run)
        key = json.dumps([measure.__name__, described])
        if key not in known:
            known[key] = measure(run)
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps({"measure": measure.__name__, "run": described, "found": known[key]}) + "\n")
        found.append((run, known[key]))
    return found


def per_seed(numbers: Iterable[float], digits: int = 1) -> str:
    """The mean, and the numbers that it is of."""
    every = list(numbers)
    return f"{mean(every):.{digits}f} ({' / '.join(f'{number:.{digits}f}' for number in every)})"


K = TypeVar("K", bound=Hashable)


def grouped(
    found: Sequence[tuple[Training, dict[str, float]]], key: Callable[[Training], K]
) -> dict[K, list[dict[str, float]]]:
    """What was found of all runs with one key, in the order of the runs."""
    groups: dict[K, list[dict[str, float]]] = {}
    for run, numbers in found:
        groups.setdefault(key(run), []).append(numbers)
    return groups


def table(found: Sequence[tuple[Training, dict[str, float]]]) -> str:
    """Per cent, mean over seeds and each of them."""
    lines = [
        "| net | training | weight | test: square is random | validation: square tells | gradient on the square |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (net, recipe, weight), seeds in grouped(found, lambda run: (run.net, run.recipe, run.weight)).items():
        cells = (per_seed(one[column] for one in seeds) for column in ("test", "validation", "share"))
        factor = "" if weight is None else f"{weight:g}"
        lines.append(f"| {net} | {ROWS[recipe]} | {factor} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sweep_table(found: Sequence[tuple[Training, dict[str, float]]]) -> str:
    """Accuracy on the validation digits with random squares in per cent, mean over seeds; the best a row is bold."""
    means = {
        key: mean(one["selection"] for one in seeds)
        for key, seeds in grouped(found, lambda run: (run.net, run.recipe, run.weight)).items()
    }
    lines = [
        f"| net | training | {' | '.join(f'{weight:g}' for weight in WEIGHTS)} |",
        f"|---|---|{'---:|' * len(WEIGHTS)}",
    ]
    for recipe in PENALISED:
        rows = {net: [means[net, recipe, weight] for weight in WEIGHTS] for net in NETS}
        rows["mean of both"] = [mean(both) for both in zip(*rows.values(), strict=True)]
        for net, row in rows.items():
            cells = (f"**{cell:.1f}**" if cell == max(row) else f"{cell:.1f}" for cell in row)
            lines.append(f"| {net} | {ROWS[recipe]} | {' | '.join(cells)} |")
    return "\n".join(lines)


# -- the picture -----------------------------------------------------------------------------------------------------


def strip(seed: int, rows: int = 6) -> Tensor:
    """Gradients without a penalty and with right reasons, on the first test digits; ``(3, H, W)``.

    What a digit is seen as is the answer of the net with right reasons.
    """
    images, labels = (tensor[:rows] for tensor in digits("test", "random")[:2])
    maps: list[tuple[str, Tensor]] = []
    for when, recipe in (("before", "saliency/decoy-shortcut"), ("after", "saliency/decoy-right-reasons")):
        module = trained(Training(recipe, NETS[0], seed, weight_of(recipe)))
        with frozen(module):
            maps.append((f"{when}: {ROWS[recipe].split(',')[0]}", gradient(module, images, labels)))
            with torch.no_grad():
                sure, seen = module(images).softmax(1).max(1)
    return filmstrip(images, labels, seen, sure, maps, (0.0, 1.0))


def save(picture: Tensor, path: Path) -> None:
    """Write a picture ``(3, H, W)`` in [0, 1]."""
    from PIL import Image  # comes with TensorBoard

    Image.fromarray((255 * picture).round().byte().movedim(0, 2).numpy()).save(path, optimize=True)


if __name__ == "__main__":
    main()
