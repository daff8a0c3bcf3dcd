"""The same training in two gloo processes with and without monitors: ``python unchanged.py FOLDER``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from user_code import QUIET, Augmented, Diary, Module, monitors

SAMPLES = 101  # odd: one process gets a sample twice


class OneDraw(pl.Callback):
    """What a careless monitor does: one number of the global stream, in one validation."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0 and not trainer.sanity_checking:
            torch.rand(())


def train(which: str, folder: Path) -> None:
    pl.seed_everything(0, verbose=False)
    module = Module(dropout=0.3, mixup=True)
    added = {"none": [], "every": monitors(), "one_draw": [OneDraw()]}[which]
    trainer = pl.Trainer(
        devices=2, strategy="ddp_fork", max_epochs=3, callbacks=[*added, Diary(folder, which)], **QUIET
    )
    training = DataLoader(Augmented(SAMPLES), 16, shuffle=True, num_workers=2)
    trainer.fit(module, training, DataLoader(Augmented(SAMPLES), 16, num_workers=2))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for which in ("none", "every", "one_draw"):
        train(which, Path(sys.argv[1]))
