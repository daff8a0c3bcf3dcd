"""The last evaluation is known while it runs, in whatever way a fit ends."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_robust.attach.ending import is_last_evaluation


class Seen(pl.Callback):
    def __init__(self) -> None:
        self.said: list[bool] = []
        self.steps: list[int] = []

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.said.append(is_last_evaluation(trainer))
            self.steps.append(trainer.global_step)


def data(n: int = 64) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n), zoo.labels(n)), 16)


def fitted(loader: Any = None, **settings: Any) -> Seen:
    seen = Seen()
    trainer = zoo.trainer(**{"callbacks": [seen], **settings})
    trainer.fit(zoo.built(zoo.ListBatch), data() if loader is None else loader, data(16))
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 1},
        {"max_epochs": 3},
        {"max_epochs": 1, "val_check_interval": 0.25},
        {"max_epochs": 2, "val_check_interval": 0.5},
        {"max_epochs": 2, "val_check_interval": 3},
        {"max_epochs": 5, "check_val_every_n_epoch": 2},
        {"max_epochs": 4, "check_val_every_n_epoch": 2, "val_check_interval": 0.5},
        {"max_epochs": 4, "check_val_every_n_epoch": None, "val_check_interval": 3},
        {"max_epochs": -1, "max_steps": 8},
        {"max_epochs": -1, "max_steps": 6},
        {"max_epochs": 9, "max_steps": 7, "val_check_interval": 2},
        {"max_epochs": 4, "max_steps": 3, "accumulate_grad_batches": 2},
        {"fast_dev_run": True},
    ],
    ids=str,
)
def test_of_all_evaluations_the_last_one_says_so(settings: dict[str, Any]) -> None:
    said = fitted(**settings).said
    assert said
    assert said == [False] * (len(said) - 1) + [True]


def test_of_a_stream_each_epoch_ends_when_it_ends() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(list(zip(zoo.images(40), zoo.labels(40), strict=True)))

    assert fitted(DataLoader(Stream(), 16), max_epochs=3).said == [False, False, True]


def test_what_stops_early_says_so_where_it_is_known() -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.should_stop = trainer.global_step == 6

    seen = Seen()
    zoo.trainer(callbacks=[Stop(), seen], max_epochs=9).fit(zoo.built(zoo.ListBatch), data(), data(16))
    assert seen.said[-1]
    assert not any(seen.said[:-1])


def test_outside_of_a_fit_there_is_only_one() -> None:
    seen = Seen()
    torch.manual_seed(0)
    zoo.trainer(callbacks=[seen]).validate(zoo.built(zoo.ListBatch), data(16), verbose=False)
    assert seen.said == [True]
