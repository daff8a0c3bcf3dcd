"""Prediction sets: thresholds, coverage and sizes by a plain loop over rows that they were not fitted on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from callbacks.calibration_runs import Said, YesNo, best_temperature, loader, logged, softmax, spoken, told

from lightning_robust import TemperatureScaling, read_entry
from lightning_robust.randomness import priorities


def threshold(scores: np.ndarray, alpha: float) -> float:
    """The ceil((n + 1) (1 - alpha))-th smallest."""
    return float(np.sort(scores)[int(np.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)) - 1])


def mass(row: np.ndarray, k: int, u: float) -> float:
    """Of all likelier classes, and u of the class itself."""
    return float(row[row > row[k]].sum() + u * row[k])


def scores(p: np.ndarray, method: str, u: np.ndarray) -> np.ndarray:
    """Of every class of every row."""
    if method == "lac":
        return -np.log(p)
    return np.array([[mass(row, k, own) for k in range(len(row))] for row, own in zip(p, u, strict=True)])


def by_hand(fit: tuple[Any, Any, Any], on: tuple[Any, Any, Any], method: str, alpha: float) -> tuple[float, ...]:
    """Threshold of some probabilities, labels and sample numbers; coverage, size, empty sets, worst class of others."""
    p, y, i = fit
    highest = threshold(scores(p, method, priorities(i, 2).numpy())[np.arange(len(y)), y], alpha)
    p, y, i = on
    sets = scores(p, method, priorities(i, 3).numpy()) <= highest
    covered = sets[np.arange(len(y)), y]
    worst = min(float(covered[y == k].mean()) for k in set(y.tolist()))
    return highest, float(covered.mean()), float(sets.sum(1).mean()), float((~sets.any(1)).mean()), worst


NAMES = ("coverage", "set_size", "empty", "worst_class_coverage")


@pytest.mark.parametrize("method", ["lac", "aps"])
@pytest.mark.parametrize("batch_size", [7, 301])
def test_sets_are_fitted_temperature_and_all_on_one_half_and_reported_on_the_other(
    method: str, batch_size: int
) -> None:
    z, y = spoken()
    scaling = TemperatureScaling(prediction_sets=0.1)
    trainer = zoo.trainer(callbacks=[scaling])
    trainer.validate(Said(), loader(z, y, batch_size=batch_size), verbose=False)
    found, i, labels = logged(trainer), torch.arange(301), y.numpy()
    first = priorities(i, 1) < 0.5
    p = softmax(z, best_temperature(z[first], y[first]))
    halves = [(p[half.numpy()], labels[half.numpy()], i[half]) for half in (first, ~first)]
    _, *expected = by_hand(halves[0], halves[1], method, 0.1)
    assert [found[f"{name}_{method}"] for name in NAMES] == pytest.approx(expected, rel=1e-5)
    # What is stored was fitted on all.
    p = softmax(z, best_temperature(z, y))
    stored = scaling.section()["calibration"]["prediction_sets"][method]
    assert stored["threshold"] == pytest.approx(by_hand((p, labels, i), (p, labels, i), method, 0.1)[0], rel=1e-3)
    assert (stored["alpha"], stored["samples"]) == (0.1, 301)


@pytest.mark.parametrize("method", ["lac", "aps"])
def test_sets_fitted_on_data_of_their_own_are_reported_on_all_of_the_validation(method: str) -> None:
    (z, y), (own, answers) = spoken(), spoken(400, seed=7)
    trainer = zoo.trainer(callbacks=[TemperatureScaling(prediction_sets=0.2, dataloader=loader(own, answers))])
    trainer.validate(Said(), loader(z, y), verbose=False)
    t = best_temperature(own, answers)
    fit, on = (
        (softmax(own, t), answers.numpy(), torch.arange(400)), (softmax(z, t), y.numpy(), torch.arange(301)),
    )  # fmt: skip
    _, *expected = by_hand(fit, on, method, 0.2)
    found = [logged(trainer)[f"{name}_{method}"] for name in NAMES]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_sets_hold_what_they_promise_on_data_drawn_alike(alpha: float) -> None:
    trainer = zoo.trainer(callbacks=[TemperatureScaling(prediction_sets=alpha)])
    trainer.validate(Said(), loader(*spoken(6000), batch_size=1000), verbose=False)
    found, sd = logged(trainer), (2 * alpha * (1 - alpha) / 3000) ** 0.5  # of 3000 rows, at a threshold of 3000
    assert found["coverage_lac"] == pytest.approx(1 - alpha, abs=3 * sd)
    assert found["coverage_aps"] == pytest.approx(1 - alpha, abs=3 * sd)
    assert 1 <= found["set_size_lac"] <= found["set_size_aps"] < 4


def test_a_yes_no_output_has_sets_of_two_classes() -> None:
    z, y = (column[:, 0] for column in told(400))
    trainer = zoo.trainer(callbacks=[TemperatureScaling(prediction_sets=0.1)])
    trainer.validate(YesNo(), loader(z, y), verbose=False)
    assert 0.5 < logged(trainer)["set_size_lac"] < 2


def test_too_few_samples_get_sets_that_hold_everything() -> None:
    trainer = zoo.trainer(callbacks=[scaling := TemperatureScaling(prediction_sets=0.01)])
    trainer.validate(Said(), loader(*spoken(60)), verbose=False)
    assert logged(trainer)["set_size_lac"] == 4
    assert scaling.section()["calibration"]["prediction_sets"]["lac"]["threshold"] is None


def test_a_fresh_trainer_tests_with_the_sets_of_the_checkpoint(tmp_path: Path) -> None:
    (z, y), (others, truth) = spoken(), spoken(200, seed=5)
    first = zoo.trainer(callbacks=[TemperatureScaling(prediction_sets=0.1)])
    first.fit(Said(), loader(z, y), loader(z, y))
    first.save_checkpoint(tmp_path / "x.ckpt")
    section = read_entry(tmp_path / "x.ckpt")["calibration"]
    trainer = zoo.trainer(callbacks=[TemperatureScaling(prediction_sets=0.1)])
    trainer.test(Said(), loader(others, truth, batch_size=33), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    found, p = logged(trainer, "calibration/test/"), softmax(others, section["temperature"])
    for method in ("lac", "aps"):
        highest = section["prediction_sets"][method]["threshold"]
        sets = scores(p, method, priorities(torch.arange(200), 3).numpy()) <= highest
        assert found[f"coverage_{method}"] == pytest.approx(float(sets[np.arange(200), truth.numpy()].mean()))
        assert found[f"set_size_{method}"] == pytest.approx(float(sets.sum(1).mean()))


def test_sets_with_another_promise_are_not_passed_off_as_those_asked_for(tmp_path: Path) -> None:
    z, y = spoken(100)
    first = zoo.trainer(callbacks=[TemperatureScaling(prediction_sets=0.1)])
    first.fit(Said(), loader(z, y), loader(z, y))
    first.save_checkpoint(tmp_path / "x.ckpt")
    trainer = zoo.trainer(callbacks=[TemperatureScaling(prediction_sets=0.05)])
    with pytest.warns(UserWarning, match="without prediction_sets=0.05, of which nothing was fitted"):
        trainer.test(Said(), loader(z, y), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert "coverage_lac" not in logged(trainer, "calibration/test/")
