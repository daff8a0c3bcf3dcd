"""Beside callbacks that average weights: monitors measure the weights that validation measures, in any order."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from trainer_runs import Slow, data, defence, flat, monitors, offline, offline_shift, ours

pytestmark = zoo.averaging


class Measured(pl.Callback):
    """The weights of each validation, while it runs."""

    def __init__(self) -> None:
        self.expected: list[dict[str, float]] = []
        self.found: list[dict[str, float]] = []
        self.weights: list[torch.Tensor] = []
        self._copy: Any = None

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._copy = copy.deepcopy(pl_module.net)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.expected.append({**offline(self._copy, data()), **offline_shift(self._copy, data())})
            self.found.append(ours(trainer))
            self.weights.append(flat(self._copy))


def averages() -> dict[str, Any]:
    return {
        "ema": lambda: pl.callbacks.EMAWeightAveraging(decay=0.5),
        "mean": lambda: pl.callbacks.WeightAveraging(),
    }


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "behind ours"])
@pytest.mark.parametrize("kind", ["ema", "mean"])
def test_the_averaged_weights_are_measured_in_any_order(kind: str, first: bool) -> None:
    def fitted(callbacks: list[Any]) -> tuple[Slow, Measured]:
        averaging, measured, module = averages()[kind](), Measured(), zoo.built(Slow)
        order = [averaging, *callbacks, measured] if first else [*callbacks, measured, averaging]
        zoo.trainer(callbacks=order, max_epochs=3).fit(module, data(), data())
        return module, measured

    module, measured = fitted([*defence("madry"), *monitors()])
    assert len(measured.found) == 3
    for found, expected in zip(measured.found, measured.expected, strict=True):
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    alone, reference = fitted(defence("madry"))
    assert torch.equal(flat(module), flat(alone))
    assert all(map(torch.equal, measured.weights, reference.weights))
    plain = zoo.built(Slow)
    zoo.trainer(callbacks=defence("madry"), max_epochs=1).fit(plain, data())
    assert not torch.equal(measured.weights[0], flat(plain))  # an average, and no longer the weights of the step


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "behind ours"])
def test_stochastic_weight_averaging_trains_what_it_trains_without_monitors(first: bool) -> None:
    def fitted(callbacks: list[Any]) -> tuple[Slow, Measured]:
        swa = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2)
        measured, module = Measured(), zoo.built(Slow)
        order = [swa, *callbacks, measured] if first else [*callbacks, measured, swa]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*SWA.*|.*lr_scheduler.*")
            zoo.trainer(callbacks=order, max_epochs=4).fit(module, data(), data())
        return module, measured

    module, measured = fitted([*defence("madry"), *monitors()])
    assert len(measured.found) >= 4
    for found, expected in zip(measured.found, measured.expected, strict=True):
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    alone, _ = fitted(defence("madry"))
    assert torch.equal(flat(module), flat(alone))
    assert "training_step" not in vars(module)
