"""How far a run has come: in epochs, and as a factor."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import zoo

from lightning_robust.attach.schedule import epochs_done, warm


@pytest.mark.parametrize(
    ("epoch", "batches", "batch_idx", "done"),
    [(0, 4, 0, 0.25), (0, 4, 3, 1.0), (2, 4, 1, 2.5), (3, float("inf"), 17, 3.0), (0, 1, 0, 1.0)],
)
def test_the_present_batch_counts_and_of_endless_epochs_whole_ones(
    epoch: int, batches: float, batch_idx: int, done: float
) -> None:
    assert epochs_done(SimpleNamespace(current_epoch=epoch, num_training_batches=batches), batch_idx) == done


def test_in_a_fit_it_grows_by_one_batch_at_a_time_to_the_number_of_epochs() -> None:
    seen: list[float] = []

    class Watching(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: object, batch: object, batch_idx: int) -> None:
            seen.append(epochs_done(trainer, batch_idx))

    data = zoo.loader(zoo.ListBatch, (4, 4, 4))
    trainer = zoo.trainer(max_epochs=3, limit_train_batches=2, callbacks=[Watching()])
    trainer.fit(zoo.built(zoo.ListBatch), data)
    assert seen == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


@pytest.mark.parametrize(
    ("done", "over", "start", "factor"),
    [
        (0.0, 0, 0, 1.0),
        (0.0, 0, 5, 1.0),
        (0.0, 2, 0, 0.0),
        (0.5, 2, 0, 0.25),
        (2.0, 2, 0, 1.0),
        (9.0, 2, 0, 1.0),
        (0.9, 2, 1, 0.0),
        (1.5, 0.5, 1, 1.0),
        (1.25, 0.5, 1, 0.5),
    ],
)
def test_a_factor_grows_from_nothing_at_the_start_to_one_and_stays(
    done: float, over: float, start: float, factor: float
) -> None:
    assert warm(done, over, start) == factor
