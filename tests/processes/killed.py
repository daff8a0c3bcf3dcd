"""A training that can be killed and resumed: ``python killed.py FOLDER NAME EPOCH BATCH DROPOUT [CHECKPOINT]``.

It stops at a batch of an epoch, says so in a file, and waits there to be killed; with EPOCH -1 it runs to its end.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from user_code import QUIET, THREAT, Diary, Module, labelled, monitors, sha256

from lightning_robust import PGD, AdversarialTraining, InputGradientPenalty, SaliencyRegularization

EPOCHS, BATCHES, BATCH = 4, 5, 8


class Order:
    """Another order in each epoch, a function of the epoch alone; Lightning calls ``set_epoch``."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def batches(self) -> list[list[int]]:
        order = torch.randperm(BATCHES * BATCH, generator=torch.Generator().manual_seed(self.epoch))
        return order.view(BATCHES, BATCH).tolist()


class Resumable:
    """A loader that knows where it was, as torchdata's ``StatefulDataLoader`` does."""

    def __init__(self) -> None:
        self.data, self.sampler, self.at = labelled(BATCHES * BATCH), Order(), 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[Tensor]]:
        for at in range(self.at % BATCHES, BATCHES):
            self.at = at + 1
            yield [column[self.sampler.batches()[at]] for column in self.data.tensors]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at % BATCHES}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Plain(Module):
    """Without a schedule that reacts to metrics: Lightning does not keep those."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def mislabelled(n: int) -> TensorDataset:
    """Validation data of which every fifth has a wrong label: without an error there is no temperature to compare."""
    x, y = labelled(n, 1).tensors
    wrong = torch.arange(n) % 5 == 0
    return TensorDataset(x, torch.where(wrong, (y + 1) % 4, y))


class Steps(pl.Callback):
    """What each step was fed, and where the run stops to be killed."""

    def __init__(self, folder: Path, name: str, stop: tuple[int, int]) -> None:
        self.file, self.marker, self.stop = folder / f"{name}.steps.jsonl", folder / f"{name}.waits", stop

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        attack = next(c for c in trainer.callbacks if isinstance(c, AdversarialTraining))
        noise = attack._perturbed() - batch[0]
        line = {"epoch": trainer.current_epoch, "batch": batch_idx, "clean": sha256({"x": batch[0]})}
        with self.file.open("a") as file:
            file.write(json.dumps({**line, "noise": sha256({"x": noise}), "loss": float(outputs["loss"]).hex()}) + "\n")
        if (trainer.current_epoch, batch_idx) == self.stop:
            self.marker.touch()
            time.sleep(600)


def train(folder: Path, name: str, stop: tuple[int, int], dropout: float, checkpoint: str | None) -> None:
    pl.seed_everything(0 if checkpoint is None else 99, verbose=False)  # what is resumed owes nothing to the seed
    epochs = pl.callbacks.ModelCheckpoint(
        folder / name, "epoch{epoch}", save_top_k=-1, save_on_train_epoch_end=True, auto_insert_metric_name=False
    )
    steps = pl.callbacks.ModelCheckpoint(folder / name, "{step}", save_top_k=-1, every_n_train_steps=3)
    callbacks = [
        AdversarialTraining(PGD(THREAT, steps=2)),
        SaliencyRegularization(InputGradientPenalty(), 0.1),
        *monitors(),
        Diary(folder, name),
        epochs,
        steps,
        Steps(folder, name, stop),
    ]
    settings = {**QUIET, "enable_checkpointing": True}
    trainer = pl.Trainer(max_epochs=EPOCHS, callbacks=callbacks, **settings)
    trainer.fit(Plain(dropout), Resumable(), DataLoader(mislabelled(40), 16), ckpt_path=checkpoint)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    where = (int(arguments[2]), int(arguments[3]))
    train(Path(arguments[0]), arguments[1], where, float(arguments[4]), (arguments[5:] or [None])[0])
