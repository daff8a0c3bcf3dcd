"""Does the shortcut finder find one that is there, and none that is not: ``python -m tests.benchmarks.shortcuts``.

The demo's small CNN on digits with decoys that tell the class, with decoys that tell nothing (the control: the same
squares, nothing to be learnt from them), and without decoys. The masks of the decoys judge; the finder never sees them.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import dataclass
from functools import partial

import pytorch_lightning as pl
import torch

from lightning_robust.callbacks.shortcut_finder import ShortcutFinder
from lightning_robust.demo import Classifier, DecoyDigits, Digits
from lightning_robust.saliency.hidden_tiles import hidden_tiles
from lightning_robust.saliency.shortcuts import Cluster
from tests.benchmarks.timing import progress

DATA = {"decoys": DecoyDigits, "control": partial(DecoyDigits, random_fill=True), "clean": Digits}
EPOCHS = 10


@dataclass(frozen=True)
class Found:
    """What the finder says of one net, and what the masks say of its first cluster.

    Attributes:
        clusters: All of them, the most suspicious first.
        on_decoys: Share of the first cluster's saliency mass on the decoys of its members; NaN without decoys.
        everywhere: The same of all samples.
    """

    clusters: list[Cluster]
    on_decoys: float
    everywhere: float

    @property
    def flagged(self) -> int:
        """How many clusters are flagged."""
        return sum(cluster.flagged for cluster in self.clusters)


def trained(name: str, seed: int, epochs: int = EPOCHS) -> tuple[Classifier, Digits, float, float]:
    """A net, its data, and its accuracy in validation and test, in per cent."""
    pl.seed_everything(seed, verbose=False)
    module, data = Classifier(), DATA[name]()
    trainer = _trainer(max_epochs=epochs)
    trainer.fit(module, data)
    validation = float(trainer.callback_metrics["val/accuracy"])
    (test,) = trainer.test(module, data, verbose=False)
    return module, data, 100 * validation, 100 * test["test/accuracy"]


def found(module: Classifier, data: Digits, tiles: int = 7) -> Found:
    """The finder's answer on the validation set, the border as wide as a tile or the default, whichever is more."""
    method = partial(hidden_tiles, tiles=tiles)
    finder = ShortcutFinder(method, border=max(1 / 7, 1 / tiles), strict=True)
    _trainer(callbacks=[finder]).validate(module, data, verbose=False)
    clusters = finder.found["val"]
    x, _labels, *masks = data.parts["val"].tensors
    if not masks:
        return Found(clusters, float("nan"), float("nan"))
    module.eval()
    with torch.no_grad():
        predictions = module(x).argmax(1)
    maps = method(module, x, predictions, chunk_size=64).clamp(min=0)
    on_decoys = (maps * masks[0][:, 0]).sum((1, 2)) / maps.sum((1, 2)).clamp(min=1e-30)
    return Found(clusters, float(on_decoys[clusters[0].members].mean()), float(on_decoys.mean()))


def _trainer(**settings: object) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return pl.Trainer(**{**quiet, "enable_model_summary": False, **settings})


def main() -> None:
    """One Markdown row for each net and number of tiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tiles", nargs="+", type=int, default=[7], help="tiles a side; the decoys are as large as 7")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(
        "| data | seed | val | test | tiles | clusters | flagged | first cluster | its mass on decoys | mass of all |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---|---:|---:|")
    for seed in arguments.seeds:
        for name in arguments.data:
            progress(f"shortcuts: {name}, seed {seed}")
            module, data, validation, test = trained(name, seed)
            for tiles in arguments.tiles:
                answer = found(module, data, tiles)
                first = answer.clusters[0]
                print(
                    f"| {name} | {seed} | {validation:.1f} | {test:.1f} | {tiles} | {len(answer.clusters)} | "
                    f"{answer.flagged} | {len(first)} samples, suspicion {first.suspicion:.2f}, {first.place} | "
                    f"{100 * answer.on_decoys:.0f} % | {100 * answer.everywhere:.0f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
