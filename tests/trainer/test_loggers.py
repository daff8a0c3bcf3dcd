"""Loggers: none, one that takes scalars only, several, and one of somebody's own."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import zoo
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer_runs import Slow, data, defence, flat, monitors, ours


class Own(Logger):
    """Takes numbers, has no ``experiment``."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, float] = {}

    @property
    def name(self) -> str:
        return "own"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen |= metrics


def fitted(logger: Any, **settings: Any) -> tuple[Slow, pl.Trainer]:
    module = zoo.built(Slow)
    callbacks = [*defence("trades and penalty"), *monitors()]
    trainer = zoo.trainer(callbacks=callbacks, logger=logger, log_every_n_steps=1, **settings)
    trainer.fit(module, data(), data())
    return module, trainer


def scalars_of_csv(logger: CSVLogger) -> dict[str, float]:
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}


def test_tensorboard_gets_pictures_and_text_and_both_get_the_same_numbers(tmp_path: Path) -> None:
    board, table = TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "table")
    module, trainer = fitted([board, table])
    events = EventAccumulator(board.log_dir).Reload()
    tags = events.Tags()
    assert {"robust/val/examples", "calibration/val/reliability", "saliency/val_gradient/filmstrip"} <= set(
        tags["images"]
    )
    assert any(tag.startswith("robust/settings/AdversarialTraining") for tag in tags["tensors"])
    numbers = scalars_of_csv(table)
    expected = ours(trainer)
    assert "robust/train/kl" in expected
    for key, value in expected.items():
        assert numbers[key] == pytest.approx(value, rel=1e-5)
        assert events.Scalars(key)[-1].value == pytest.approx(value, rel=1e-5)
    assert (flat(module) == flat(fitted(False)[0])).all()


def test_a_logger_that_takes_only_scalars_is_enough(tmp_path: Path) -> None:
    table = CSVLogger(tmp_path)
    _, trainer = fitted(table)
    assert ours(trainer).keys() <= scalars_of_csv(table).keys()


def test_a_logger_without_an_experiment_is_enough() -> None:
    own = Own()
    _, trainer = fitted(own)
    assert ours(trainer).keys() <= own.seen.keys()


def test_without_a_logger_everything_is_measured() -> None:
    _, trainer = fitted(False)
    assert {"robust/val/accuracy", "robust/train/kl", "robust/train/input_gradient"} <= ours(trainer).keys()
