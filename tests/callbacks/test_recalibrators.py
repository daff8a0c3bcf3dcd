"""Recalibrators beside the temperature, data of their own to fit on, and where what was fitted is found again."""

from __future__ import annotations

import hashlib
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from callbacks.calibration_runs import (
    Said,
    YesNo,
    accuracy,
    best_temperature,
    brier,
    ece,
    loader,
    logged,
    nll,
    softmax,
    spoken,
    told,
)
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import CalibrationMonitor, TemperatureScaling, load_temperature, read_entry
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.calibration import cross_fitted, fit_recalibrator, load_recalibrator
from lightning_robust.randomness import RandomState, priorities

METHODS = ["vector", "isotonic"]


def first_half(n: int, share: float = 0.5, seed: int = 0) -> Tensor:
    return priorities(torch.arange(n), seed + 1) < share


def numbers(name: str, log_p: Any, y: Any) -> dict[str, float]:
    """What is logged of a recalibrator, by plain loops."""
    p = np.exp(np.asarray(log_p, dtype=np.float64))
    return {f"nll_{name}": nll(p, y), f"ece_{name}": ece(p, y), f"accuracy_{name}": accuracy(p, y)}


@pytest.mark.parametrize("batch_size", [7, 301])
def test_cross_fitted_numbers_are_those_of_a_plain_loop(batch_size: int) -> None:
    z, y = spoken()
    trainer = zoo.trainer(callbacks=[TemperatureScaling(methods=METHODS, seed=3)])
    trainer.validate(Said(), loader(z, y, batch_size=batch_size), verbose=False)
    found = logged(trainer)
    for method in METHODS:
        expected = numbers(method, cross_fitted(method, z, y, first_half(301, seed=3)), y)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert found["nll_vector"] < found["nll_scaled"] < nll(softmax(z), y)  # these answers have a bias against class 0


def test_platt_scaling_of_yes_no_outputs_is_a_logistic_regression_on_the_other_half() -> None:
    z, y = (column[:, 0] for column in told())
    trainer = zoo.trainer(callbacks=[TemperatureScaling(methods=["platt"])])
    trainer.validate(YesNo(), loader(z, y), verbose=False)
    first, p = first_half(301).numpy(), np.zeros((301, 2))
    for half in (first, ~first):
        other = LogisticRegression(C=np.inf, tol=1e-10).fit(z[~half][:, None], y[~half])
        p[half] = other.predict_proba(z[half][:, None])
    expected = numbers("platt", np.log(p), y.long())
    assert {name: logged(trainer)[name] for name in expected} == pytest.approx(expected, rel=1e-3)


def test_a_method_that_does_not_fit_the_head_is_an_error_before_the_first_training_step() -> None:
    steps: list[int] = []

    class Counting(Said):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    data = loader(*spoken())
    for when in ("validation", "after_fit"):
        with pytest.raises(ValueError, match=r"'platt'.*yes/no outputs and two classes.*have 4; take 'vector'"):
            zoo.trainer(callbacks=[TemperatureScaling(methods=["platt"], when=when)]).fit(Counting(), data, data)
    with pytest.raises(ValueError, match="take 'vector'"):
        zoo.trainer(callbacks=[TemperatureScaling(methods=["platt"])]).validate(Said(), data, verbose=False)
    assert not steps


def test_accuracy_never_changes_with_temperature() -> None:
    z, y = spoken(n=2000, classes=20)
    seen: list[dict[str, float]] = []

    class Counting(TemperatureScaling):
        def _reported(self, *args: Any) -> Any:
            reported = super()._reported(*args)
            seen.append({name: sums.accuracy for name, sums in reported.by_method.items()})
            return reported

    for temperature in (0.02, 1.0, 50.0):  # fitted temperatures of about 60, 1.8 and 0.03
        zoo.trainer(callbacks=[Counting()]).validate(Said(), loader(z / temperature, y), verbose=False)
        assert seen[-1]["unscaled"] == seen[-1]["temperature"] == accuracy(z.numpy(), y)


# -- data to fit on --------------------------------------------------------------------------------------------------


def test_a_split_fits_on_a_share_and_reports_on_the_others() -> None:
    z, y = spoken()
    scaling = TemperatureScaling(split=0.4, methods=["vector"])
    trainer = zoo.trainer(callbacks=[scaling])
    trainer.validate(Said(), loader(z, y), verbose=False)
    chosen = first_half(301, 0.4)
    temperature = best_temperature(z[chosen], y[chosen])
    p, labels = softmax(z[~chosen], temperature), y[~chosen]
    log_p = fit_recalibrator("vector", z[chosen], y[chosen])(z[~chosen])
    expected = {
        "temperature": temperature, "nll_scaled": nll(p, labels), "brier_scaled": brier(p, labels),
        "ece_scaled": ece(p, labels), **numbers("vector", log_p, labels),
    }  # fmt: skip
    found = logged(trainer)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    entry = scaling.section()["calibration"]
    assert entry["samples"] == int(chosen.sum())
    assert entry["nll"] == pytest.approx(nll(softmax(z[~chosen]), labels), rel=1e-5)  # of what is reported on


def own_data(kind: str, z: Tensor, y: Tensor) -> Any:
    data = TensorDataset(z, y)
    return data if kind == "data set" else DataLoader(data, 33)


@pytest.mark.parametrize("kind", ["data set", "loader"])
def test_data_of_their_own_fit_and_validation_is_what_is_reported(kind: str) -> None:
    (z, y), (own, answers) = spoken(), spoken(400, seed=7, temperature=2.5)
    scaling = TemperatureScaling(dataloader=own_data(kind, own, answers), methods=["isotonic"], classwise=True)
    trainer = zoo.trainer(callbacks=[scaling, CalibrationMonitor()])
    trainer.fit(Said(), loader(z, y), loader(z, y))
    temperature = best_temperature(own, answers)
    p = softmax(z, temperature)
    log_p = fit_recalibrator("isotonic", own, answers)(z)
    expected = {
        "temperature": temperature, "nll_scaled": nll(p, y), "ece_scaled": ece(p, y), "ece": ece(softmax(z), y),
        **numbers("isotonic", log_p, y),
    }  # fmt: skip
    found = logged(trainer)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    entry = scaling.section()["calibration"]
    assert (entry["samples"], entry["nll"]) == (400, pytest.approx(nll(softmax(z), y), rel=1e-5))


def test_data_of_another_make_are_an_error_before_the_first_training_step() -> None:
    z, y = spoken()
    other = DataLoader([{"logits": row, "label": label} for row, label in zip(z, y, strict=True)], 8)  # type: ignore[arg-type]  # a list will do
    with pytest.raises(ProbeError, match=r"dataloader: batches with .*made alike"):
        zoo.trainer(callbacks=[TemperatureScaling(dataloader=other)]).fit(Said(), loader(z, y), loader(z, y))


class Learner(zoo.ListBatch):
    """BatchNorm and dropout."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)


def pictures(n: int, seed: int, **settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n, seed), zoo.labels(n)), 16, **settings)


@pytest.mark.parametrize("kind", ["data set", "loader"])
def test_reading_other_data_changes_nothing_of_the_training(kind: str) -> None:
    other = pictures(40, 5, shuffle=True)
    found = []
    for callbacks in ([], [TemperatureScaling(dataloader=other.dataset if kind == "data set" else other)]):
        module = zoo.built(Learner)
        module.net[1].momentum = 0.5
        trainer = zoo.trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(module, pictures(64, 1, shuffle=True), pictures(48, 2))
        weights = b"".join(v.numpy().tobytes() for v in module.state_dict().values())
        state = RandomState.capture()
        found.append((hashlib.sha256(weights).hexdigest(), float(trainer.callback_metrics["val_loss"]), state))
    assert found[0][:2] == found[1][:2]
    assert found[0][2].is_current()


REUSE = "choose the weights (val_loss), fit the temperature and report on both"


@pytest.mark.parametrize("settings", [{}, {"split": 0.5}, {"dataloader": "own"}, {"when": "after_fit"}])
@pytest.mark.parametrize("monitor", [None, "val_loss"])
def test_that_the_same_data_choose_fit_and_report_is_said_once(
    settings: dict[str, Any], monitor: str | None, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    data = loader(*spoken(60))
    given = {**settings, "dataloader": data} if "dataloader" in settings else settings
    keep = pl.callbacks.ModelCheckpoint(tmp_path, monitor=monitor)
    trainer = zoo.trainer(max_epochs=2, enable_checkpointing=True, callbacks=[TemperatureScaling(**given), keep])
    with caplog.at_level("INFO", "lightning_robust"):
        trainer.fit(Said(), data, data)
    assert caplog.text.count(REUSE) == int(monitor is not None and not settings)


# -- stored and found again ------------------------------------------------------------------------------------------

KEEPING: dict[str, dict[str, Any]] = {
    "full": {},
    "weights only": {"save_weights_only": True},
    "last": {"save_top_k": 0, "save_last": True},
    "step-based": {"every_n_train_steps": 5, "save_on_train_epoch_end": False, "monitor": "val_loss"},
}


class Learning(Said):
    rate = 0.3


@pytest.mark.parametrize("keep", [pytest.param(k, id=n, marks=zoo.recent) for n, k in KEEPING.items()])
def test_every_kind_of_checkpoint_carries_what_was_fitted_for_its_own_weights(
    tmp_path: Path, keep: dict[str, Any]
) -> None:
    z, y = spoken()
    settings = {"save_top_k": -1, "auto_insert_metric_name": False, **keep}
    scaling = TemperatureScaling(methods=METHODS, prediction_sets=0.1)
    callbacks = [scaling, pl.callbacks.ModelCheckpoint(tmp_path, **settings)]
    trainer = zoo.trainer(max_epochs=2, enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(Learning(), loader(z, y), loader(z, y))
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == (1 if "save_last" in keep else 2)
    for path in paths:
        saved = torch.load(path, weights_only=True)
        section = saved["lightning_robust"]["calibration"]
        own = z * saved["state_dict"]["net.by"]
        for method in METHODS:
            expected = fit_recalibrator(method, own, y)(own)
            found = load_recalibrator(section["recalibrators"][method])(own)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert set(section["prediction_sets"]) == {"lac", "aps"}
        assert len(pickle.dumps(section)) < 50_000
        assert load_temperature(path, strict=True) == pytest.approx(best_temperature(own, y), rel=1e-4)


def test_after_the_fit_every_file_gets_the_recalibrators_of_its_weights(tmp_path: Path) -> None:
    z, y = spoken()
    keep = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1)
    scaling = TemperatureScaling(when="after_fit", methods=["vector"], prediction_sets=0.2)
    trainer = zoo.trainer(max_epochs=2, enable_checkpointing=True, callbacks=[scaling, keep])
    trainer.fit(Learning(), loader(z, y), loader(z, y))
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    for path in tmp_path.glob("*.ckpt"):
        own = z * torch.load(path, weights_only=True)["state_dict"]["net.by"]
        section = read_entry(path)["calibration"]
        found = load_recalibrator(section["recalibrators"]["vector"])(own)
        torch.testing.assert_close(found, fit_recalibrator("vector", own, y)(own), rtol=1e-4, atol=1e-4)
        assert section["prediction_sets"]["lac"]["alpha"] == 0.2
    assert not [key for key in trainer.callback_metrics if key.startswith("calibration")]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    z, y = spoken()
    trainer = zoo.trainer(max_epochs=1, callbacks=[TemperatureScaling(methods=METHODS, prediction_sets=0.1)])
    trainer.fit(Learning(), loader(z, y), loader(z, y))
    path = tmp_path_factory.mktemp("kept") / "x.ckpt"
    trainer.save_checkpoint(path)
    return path


def test_a_fresh_trainer_tests_with_what_the_checkpoint_stores(kept: Path) -> None:
    others, truth = spoken(250, seed=9)
    trainer = zoo.trainer(callbacks=[TemperatureScaling(methods=["isotonic", "vector"])])
    trainer.test(Learning(), loader(others, truth, batch_size=40), ckpt_path=kept, verbose=False)
    saved = torch.load(kept, weights_only=True)
    own = others * saved["state_dict"]["net.by"]
    section = saved["lightning_robust"]["calibration"]
    p = softmax(own, section["temperature"])
    expected = {"temperature": section["temperature"], "nll_scaled": nll(p, truth), "ece_scaled": ece(p, truth)}
    for method in METHODS:
        expected |= numbers(method, load_recalibrator(section["recalibrators"][method])(own), truth)
    found = logged(trainer, "calibration/test/")
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_what_a_test_asks_for_and_nobody_fitted_is_said_to_be_missing() -> None:
    z, y = spoken(60)
    trainer = zoo.trainer(callbacks=[scaling := TemperatureScaling()])
    trainer.validate(module := Said(), loader(z, y), verbose=False)
    scaling.methods, scaling.alpha = ("vector",), 0.1
    with pytest.warns(UserWarning, match=r"without methods=\['vector'\] and prediction_sets=0.1, of which nothing"):
        trainer.test(module, loader(z, y), verbose=False)
    assert "nll_scaled" in logged(trainer, "calibration/test/")
    assert "nll_vector" not in logged(trainer, "calibration/test/")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"methods": "vector"}, "some of vector, platt, isotonic in a list, got 'vector'"),
    ({"methods": ["temperature"]}, "some of vector, platt, isotonic"),
    ({"methods": ["matrix"]}, r"got \['matrix'\]"),
    ({"split": 1.0}, "between 0 and 1.*got 1.0"),
    ({"split": 0.5, "when": "after_fit"}, "for when='validation'"),
    ({"split": 0.5, "dataloader": []}, "without dataloader="),
    ({"prediction_sets": 0.0}, "between 0 and 1, got 0.0"),
]


@pytest.mark.parametrize(("settings", "says"), BAD, ids=[row[1] for row in BAD])
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TemperatureScaling(**settings)


def test_isotonic_calibration_without_scikit_learn_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r"\['isotonic'\] needs scikit-learn: pip install"):
        TemperatureScaling(methods=["isotonic"])


@pytest.mark.parametrize(("when", "pictures"), [("validation", 3), ("after_fit", 1)])
def test_both_sides_are_drawn_once_for_each_evaluation(when: str, pictures: int, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data, logger = loader(*spoken(60)), pl.loggers.TensorBoardLogger(tmp_path)
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "kept", save_top_k=-1)  # three files that after_fit rewrites
    callbacks = [TemperatureScaling(when=when), keep]
    trainer = zoo.trainer(max_epochs=3, logger=logger, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module := Learning(), data, data)
    trainer.test(module, data, verbose=False)
    events = EventAccumulator(str(logger.log_dir), size_guidance={"images": 0})
    events.Reload()
    assert len(events.Images("calibration/val/reliability_scaled")) == pictures
    assert len(events.Images("calibration/test/reliability_scaled")) == 1
    assert events.Images("calibration/test/reliability_scaled")[0].width == 2 * 420


def test_predictions_of_a_test_that_are_no_numbers_are_left_out_with_a_warning() -> None:
    z, y = spoken()
    trainer = zoo.trainer(callbacks=[TemperatureScaling(methods=METHODS, prediction_sets=0.1)])
    trainer.validate(module := Said(), loader(z, y), verbose=False)
    broken = z.clone()
    broken[::10] = torch.nan
    with pytest.warns(UserWarning, match=r"31 predictions of the test data are NaN.*calibration/test/nll_scaled"):
        trainer.test(module, loader(broken, y), verbose=False)
    kept = ~broken.isnan().any(1)
    p = softmax(z[kept], best_temperature(z, y))
    found = logged(trainer, "calibration/test/")
    assert found["nll_scaled"] == pytest.approx(nll(p, y[kept]), rel=1e-4)
    assert 0 < found["coverage_lac"] < 1


def test_a_module_is_left_as_it_was() -> None:
    z, y = spoken(60)
    module = Said()
    scaling = TemperatureScaling(methods=METHODS, dataloader=loader(z, y), prediction_sets=0.1)
    zoo.trainer(callbacks=[scaling]).validate(module, loader(z, y), verbose=False)
    hooks: list[nn.Module] = [part for part in module.modules() if part._forward_hooks or part._forward_pre_hooks]
    assert not hooks
    assert module.training
