"""How far a run has come: in epochs, and as a factor."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor

from lightning_robust.attach.schedule import Weight, epochs_done, piecewise, warm


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


@pytest.mark.parametrize("done", [0.0, 0.5, 1.0, 2.25, 4.0, 7.5, 10.0, 99.0])
def test_a_value_runs_straight_from_point_to_point_as_numpy_interpolates(done: float) -> None:
    points = {4: 0.5, 1: 0.1, 10: 0.2}
    expected = np.interp(done, sorted(points), [points[epoch] for epoch in sorted(points)])
    assert piecewise(done, points) == pytest.approx(expected)


def test_a_single_point_is_a_constant() -> None:
    assert [piecewise(done, {3: 0.7}) for done in (0, 3, 9)] == [0.7, 0.7, 0.7]


class Processes:
    """A Trainer whose other process measured something else."""

    def __init__(self, *theirs: float) -> None:
        self.strategy, self.theirs = self, theirs

    def reduce(self, pair: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "mean"
        return (pair + torch.tensor(self.theirs)) / 2 if self.theirs else pair


def test_a_number_is_itself_and_a_schedule_runs() -> None:
    assert Weight(0.3, "it").at(7.0) == 0.3
    assert Weight({0: 0.0, 4: 1.0}, "it").at(1.0) == 0.25
    assert not Weight(0.3, "it").open


def test_a_measured_weight_is_the_loss_over_the_penalty_of_all_processes_together() -> None:
    weight = Weight("auto", "it")
    assert (weight.open, weight.at(1.0)) == (True, 0.0)
    said = weight.measure(Processes(3.0, 0.3), torch.tensor(1.0), torch.tensor(0.1))
    assert weight.at(1.0) == pytest.approx(2.0 / 0.2)
    assert not weight.open
    assert "is 10 (loss 2 / penalty 0.2)" in said
    weight.forget()
    assert weight.open


@pytest.mark.parametrize("pair", [(1.0, 0.0), (1.0, 1e-9), (0.0, 1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_what_cannot_be_measured_leaves_the_weight_open_and_0(pair: tuple[float, float]) -> None:
    weight = Weight("auto", "it")
    assert "stays 0 for now" in weight.measure(Processes(), *map(torch.tensor, pair))
    assert (weight.open, weight.at(0.5)) == (True, 0.0)


def test_a_negative_penalty_cannot_be_made_as_large_as_the_loss() -> None:
    with pytest.raises(ValueError, match=r"^it\(weight='auto'\) needs a penalty that is not negative, got -0.5"):
        Weight("auto", "it").measure(Processes(), torch.tensor(1.0), torch.tensor(-0.5))


class Sum(Processes):
    """The other process gathered the same number of steps."""

    def reduce(self, pair: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "mean"
        return (pair + torch.tensor(self.theirs, dtype=pair.dtype)) / 2


def gathered(*steps: tuple[float, float, float]) -> Weight:
    weight = Weight("auto", "it", gradual=True)
    for step in steps:
        weight.gather(*map(torch.tensor, step))
        assert (weight.open, weight.at(0.5)) == (True, 0.0)
    return weight


def test_a_gradual_weight_is_the_mean_loss_over_the_mean_penalty_of_all_steps_and_processes() -> None:
    weight = gathered((2.0, 0.0, 2.3), (math.nan, 1.0, 2.3), (1.0, 0.1, 2.3), (1.0, math.inf, 2.3))
    said = weight.settle(Sum(1.0, 0.3, 4.6, 2.0))
    assert weight.at(1.0) == pytest.approx((2 + 1 + 1) / (0.1 + 0.3))
    assert said == "weight 'auto' is 10 (loss 1 / penalty 0.1)"
    assert weight.settle(Sum()) is None  # nothing more was gathered


def test_a_gradual_weight_in_the_thousands_waits_as_long_as_predictions_are_even() -> None:
    weight = gathered((2.2, 1e-4, 2.3))
    assert "predictions are next to even" in (weight.settle(Processes()) or "")
    assert (weight.open, weight.at(2.0)) == (True, 0.0)
    for pair in ((2.2, 1e-2, 2.3), (2.0, 1e-4, 2.3), (2.2, 1e-4, math.nan)):
        weight = gathered(pair)
        weight.settle(Processes())
        assert weight.open == math.isnan(pair[2])  # a step that overflows is no step


def test_a_gradual_weight_forgets_what_was_gathered_where_another_stretch_begins() -> None:
    weight = gathered((1.0, 1.0, 2.3))
    weight.start()
    assert weight.settle(Processes()) is None
    with pytest.raises(ValueError, match=r"not negative, got -0.5 in the first epoch"):
        gathered((1.0, -0.5, 2.3)).settle(Processes())


@pytest.mark.parametrize("given", ["automatic", {}, -0.1, math.nan, {0: -1.0}, {-1: 0.1}])
def test_a_weight_of_no_form_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"it\(weight=\) must"):
        Weight(given, "it")
