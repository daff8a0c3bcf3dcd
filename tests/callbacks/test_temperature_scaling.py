"""The temperature in a checkpoint is the one of its weights; what is applied, and what stays as it was."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from callbacks.calibration_runs import Said, logged
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import (
    PGD,
    CalibrationMonitor,
    OODMonitor,
    RobustAccuracy,
    TemperatureScaling,
    ThreatModel,
    load_temperature,
    read_entry,
)
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.randomness import priorities

BOUND = np.log(64)
TEACHER = torch.randn(64, 10, generator=torch.Generator().manual_seed(42))


def answers(x: Tensor, seed: int, wrong: float = 0.25) -> Tensor:
    """Labels that can be learnt, but for a share of them."""
    generator = torch.Generator().manual_seed(seed)
    right = ((x.flatten(1) - 0.5) @ TEACHER).argmax(1)
    return torch.where(torch.rand(len(x), generator=generator) < wrong, (right + 1) % 10, right)


def samples(n: int = 150, seed: int = 1) -> TensorDataset:
    x = zoo.images(n, seed)
    return TensorDataset(x, answers(x, seed))


def data(n: int = 150, seed: int = 1, batch_size: int = 32) -> DataLoader[Any]:
    return DataLoader(samples(n, seed), batch_size)


def training(n: int = 320) -> DataLoader[Any]:
    return data(n, seed=2)


class Both(zoo.ListBatch):
    """Validates and tests."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


def logits_of(module: Any, n: int = 150, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    x, y = samples(n, seed).tensors
    with torch.no_grad():
        return copy.deepcopy(module).eval().net(x).double().numpy(), y.numpy()


def nll(z: np.ndarray, y: np.ndarray, temperature: float = 1.0) -> float:
    return float(-log_softmax(z / temperature, axis=1)[np.arange(len(y)), y].mean())


def best_temperature(z: np.ndarray, y: np.ndarray) -> float:
    """By scipy, in double precision: nothing of what is tested."""
    found = minimize_scalar(
        lambda log_t: nll(z, y, np.exp(log_t)), bounds=(-BOUND, BOUND), method="bounded", options={"xatol": 1e-9}
    )
    return float(np.exp(found.x))


def cross_fitted_nll(z: np.ndarray, y: np.ndarray, seed: int) -> float:
    """Each half of the samples at the temperature of the other."""
    first = (priorities(torch.arange(len(y)), seed + 1) < 0.5).numpy()
    return sum(nll(z[h], y[h], best_temperature(z[~h], y[~h])) * h.mean() for h in (first, ~first))


def loaded(path: Any, shape: type[zoo.Shape] = Both) -> Any:
    module = shape()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return module


def fit(module: Any, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    trainer = zoo.trainer(**{"max_epochs": 2, "callbacks": list(callbacks), **settings})
    trainer.fit(module, training(), data())
    return trainer


def keeping(folder: Any, **settings: Any) -> pl.callbacks.ModelCheckpoint:
    return pl.callbacks.ModelCheckpoint(folder, **{"save_top_k": -1, "auto_insert_metric_name": False, **settings})


def clean(module: nn.Module) -> bool:
    """Whether nothing of ours is left on a module."""
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())
    return hooks == 0 and not any(callable(v) for k, v in vars(module).items() if k.endswith(("step", "checkpoint")))


# -- in the checkpoint -----------------------------------------------------------------------------------------------

KEEPING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "monitor": ({"monitor": "calibration/val/nll_scaled"}, {}),
    "monitor of the user": ({"monitor": "val_loss"}, {}),
    "weights only": ({"save_weights_only": True}, {}),
    "every_n_train_steps with a monitor": (
        {"every_n_train_steps": 10, "monitor": "val_loss", "save_on_train_epoch_end": False},
        {},
    ),
    "val_check_interval": ({"monitor": "val_loss"}, {"val_check_interval": 0.5}),
    "val_check_interval, weights only": ({"save_weights_only": True, "monitor": "val_loss"}, {"val_check_interval": 3}),
    "accumulated": ({}, {"accumulate_grad_batches": 4}),
}


@pytest.mark.filterwarnings("ignore:the temperature 64 is a bound")  # of a network after three steps
@pytest.mark.parametrize(
    ("keep", "settings"),
    # Older Lightnings save that one before the validation whose value it is named by.
    [pytest.param(*v, id=name, marks=zoo.recent if "every_n" in name else ()) for name, v in KEEPING.items()],
)
def test_a_checkpoint_has_the_temperature_of_its_own_weights(
    tmp_path: Path, keep: dict[str, Any], settings: dict[str, Any]
) -> None:
    fit(zoo.built(Both), keeping(tmp_path, **keep), TemperatureScaling(), enable_checkpointing=True, **settings)
    paths = sorted(tmp_path.glob("*.ckpt"))
    found = [load_temperature(path, strict=True) for path in paths]
    expected = [best_temperature(*logits_of(loaded(path))) for path in paths]
    assert found == pytest.approx(expected, rel=1e-4)
    assert len({round(t, 5) for t in expected}) == len(paths) >= 2


def test_a_checkpoint_saved_between_validations_is_stale(tmp_path: Path) -> None:
    keep = keeping(tmp_path, every_n_train_steps=4)
    fit(zoo.built(Both), keep, TemperatureScaling(), enable_checkpointing=True)  # 10 steps an epoch
    early, late = tmp_path / "0-4.ckpt", tmp_path / "1-12.ckpt"
    with pytest.raises(KeyError, match="before the first validation"):
        load_temperature(early)
    with pytest.warns(UserWarning, match="fitted at step 10, the weights are from step 12"):
        assert load_temperature(late) > 0
    with pytest.raises(ValueError, match="fitted at step 10, the weights are from step 12"):
        load_temperature(late, strict=True)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_fit_that_goes_on_from_there_fits_anew_and_is_not_warned(tmp_path: Path) -> None:
    fit(zoo.built(Both), keeping(tmp_path, every_n_train_steps=4), TemperatureScaling(), enable_checkpointing=True)
    trainer = zoo.trainer(callbacks=[TemperatureScaling()], max_epochs=3)
    trainer.fit(zoo.built(Both), training(), data(), ckpt_path=tmp_path / "1-12.ckpt")  # a warning would be an error
    assert float(trainer.callback_metrics["calibration/val/temperature"]) > 0


@pytest.mark.parametrize("when", ["validation", "after_fit"])
def test_the_entry_says_what_was_fitted_and_how_well_it_does_on_other_samples(tmp_path: Path, when: str) -> None:
    module = zoo.built(Both)
    trainer = fit(module, TemperatureScaling(when=when))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    section = torch.load(tmp_path / "last.ckpt", weights_only=True)["lightning_robust"]["calibration"]
    z, y = logits_of(module)
    temperature = best_temperature(z, y)
    expected = {
        "temperature": temperature,
        "nll": nll(z, y),
        "nll_scaled": cross_fitted_nll(z, y, seed=0),
        "fit_step": 20,
        "samples": 150,
    }
    assert {name: section[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert section["at_bound"] is False
    assert section["nll_scaled"] > nll(z, y, temperature) + 1e-6  # which saw the very samples it is measured on
    logged = trainer.callback_metrics.get("calibration/val/nll_scaled")
    assert logged is None if when == "after_fit" else float(logged) == pytest.approx(section["nll_scaled"], rel=1e-6)


def test_of_a_single_sample_the_entry_has_what_the_fit_has(caplog: pytest.LogCaptureFixture) -> None:
    module, callback = zoo.built(Both), TemperatureScaling()
    with caplog.at_level("INFO", logger="lightning_robust"):
        zoo.trainer(callbacks=[callback]).validate(module, data(1), verbose=False)
    assert "fitted on 1 predictions, and no others are left to report on" in caplog.text
    section = callback.section()["calibration"]
    z, y = logits_of(module, 1)
    assert section["nll_scaled"] == pytest.approx(nll(z, y, section["temperature"]), rel=1e-4)


@zoo.averaging
def test_averaged_weights_are_validated_saved_and_fitted_alike(tmp_path: Path) -> None:
    averaging = pl.callbacks.EMAWeightAveraging(decay=0.8)
    callbacks = [averaging, TemperatureScaling(), keeping(tmp_path)]
    fit(zoo.built(Both), *callbacks, enable_checkpointing=True)
    for path in tmp_path.glob("*.ckpt"):
        assert load_temperature(path, strict=True) == pytest.approx(
            best_temperature(*logits_of(loaded(path))), rel=1e-4
        )


# -- what is logged --------------------------------------------------------------------------------------------------


def ece(p: np.ndarray, y: np.ndarray, bins: int = 15) -> float:
    confidence, right = p.max(1), p.argmax(1) == y
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs((confidence[bin_of == b] - right[bin_of == b]).sum()) for b in range(bins)]
    return float(sum(gaps) / len(y))


@pytest.mark.parametrize("batch_size", [7, 32, 150])
def test_each_half_is_measured_at_the_temperature_of_the_other(batch_size: int) -> None:
    module, callback = zoo.built(Both), TemperatureScaling(seed=3)
    trainer = zoo.trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(module, training(), data(batch_size=batch_size))
    z, y = logits_of(module)
    first = (priorities(torch.arange(len(y)), 4) < 0.5).numpy()
    p = np.zeros_like(z)
    for half in (first, ~first):
        p[half] = np.exp(log_softmax(z[half] / best_temperature(z[~half], y[~half]), axis=1))
    found = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert found["calibration/val/temperature"] == pytest.approx(best_temperature(z, y), rel=1e-4)
    assert found["calibration/val/ece_scaled"] == pytest.approx(ece(p, y), abs=1e-5)
    assert found["calibration/val/nll_scaled"] == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean(), rel=1e-5)
    brier = ((p - np.eye(10)[y]) ** 2).sum(1).mean()
    assert found["calibration/val/brier_scaled"] == pytest.approx(brier, rel=1e-5)
    assert found["calibration/val/ece_scaled_low"] <= found["calibration/val/ece_scaled"]
    assert found["calibration/val/ece_scaled_high"] >= found["calibration/val/ece_scaled"]


def test_no_more_than_max_samples_are_fitted_on_whatever_the_batches() -> None:
    module = zoo.built(Both)
    fit(module)
    found = []
    for batch_size in (7, 150):
        callback = TemperatureScaling(max_samples=40, seed=1)
        zoo.trainer(callbacks=[callback]).validate(module, data(batch_size=batch_size), verbose=False)
        assert callback.section()["calibration"]["samples"] == 40
        found.append(callback.temperature)
    z, y = logits_of(module)
    kept = priorities(torch.arange(150) << 24, 1).argsort()[:40].numpy()
    assert found == pytest.approx([best_temperature(z[kept], y[kept])] * 2, rel=1e-4)


def test_only_the_first_validation_loader_is_fitted_on() -> None:
    class Two(Both):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    module, callback = zoo.built(Two), TemperatureScaling()
    zoo.trainer(max_epochs=2, callbacks=[callback]).fit(module, training(), [data(), data(seed=7)])
    assert callback.temperature == pytest.approx(best_temperature(*logits_of(module)), rel=1e-4)


class Rows(zoo.Shape):
    """A class a pixel, some pixels without a label."""

    ignored = -100

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))

    @classmethod
    def batch(cls, n: int) -> Any:
        x = zoo.images(n)
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) * 0.5
        y = ((x + noise) * 2).long().clamp(max=2).squeeze(1)
        y[:, 0] = cls.ignored
        return [x, y]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], ignore_index=self.ignored)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


class Cityscapes(Rows):
    """The same, with the number that many data sets use."""

    ignored = 255


@pytest.mark.parametrize("max_samples", [50_000, 500])
@pytest.mark.parametrize("shape", [Rows, Cityscapes])
def test_pixels_are_predictions_of_their_own_and_unlabelled_ones_are_left_out(
    shape: type[Rows], max_samples: int
) -> None:
    module, callback = zoo.built(shape), TemperatureScaling(max_samples=max_samples)
    trainer = zoo.trainer(max_epochs=20, callbacks=[callback])
    trainer.fit(module, zoo.loader(shape), zoo.loader(shape, (24,)))
    x, y = shape.batch(24)
    with torch.no_grad():
        z = module.eval().net(x).movedim(1, -1).reshape(-1, 3).double()
    counted = (y.flatten() != shape.ignored).nonzero()[:, 0]
    # Of each picture the labelled pixels are numbered in order.
    keys = torch.arange(24).repeat_interleave(56) * 2**24 + torch.arange(56).repeat(24)
    kept = counted[priorities(keys, 0).argsort()[:max_samples]]
    assert len(kept) == min(24 * 56, max_samples)
    assert callback.temperature == pytest.approx(best_temperature(z[kept].numpy(), y.flatten()[kept].numpy()), rel=1e-3)
    assert callback.section()["calibration"]["samples"] == len(kept)


class Perfect(zoo.ListBatch):
    """Right every time, or with nothing to say."""

    strength = 3.0

    def forward(self, x: Tensor) -> Tensor:
        truth = ((x.flatten(1) - 0.5) @ TEACHER).argmax(1)
        return self.net(x) * 0 + F.one_hot(truth, 10) * self.strength


@pytest.mark.parametrize(
    ("strength", "applied", "said"), [(3.0, 1.0, "1 is kept"), (-3.0, 64.0, "64 is a bound, not a finding")]
)
def test_a_temperature_at_its_bound_is_said_to_be_one(
    strength: float, applied: float, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    module, callback = zoo.built(Perfect), TemperatureScaling()
    module.strength = strength
    x = zoo.images(64)
    with caplog.at_level("INFO", "lightning_robust"):
        zoo.trainer(callbacks=[callback]).validate(
            module, DataLoader(TensorDataset(x, answers(x, 0, wrong=0)), 16), verbose=False
        )
    assert callback.temperature == pytest.approx(applied)
    assert callback.section()["calibration"]["at_bound"] is True
    assert "no best temperature exists for these 64 predictions" in caplog.text
    assert said in caplog.text


def test_one_error_in_two_hundred_predictions_costs_no_more_scaled_than_as_it_is() -> None:
    z = 8 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    y = z.argmax(1)
    y[3] = z[3].argsort()[-2]
    trainer = zoo.trainer(callbacks=[TemperatureScaling(methods=["vector"], prediction_sets=0.1)])
    trainer.validate(Said(), DataLoader(TensorDataset(z, y), 50), verbose=False)
    found = logged(trainer)
    plain = float(F.cross_entropy(z, y))
    assert plain < 0.2
    assert found["nll_scaled"] < plain + 0.02
    assert found["nll_vector"] < plain + 0.02


def test_a_bound_is_spoken_of_once_a_run(caplog: pytest.LogCaptureFixture) -> None:
    x = zoo.images(64)
    loader = DataLoader(TensorDataset(x, answers(x, 0, wrong=0)), 16)
    trainer = zoo.trainer(max_epochs=3, callbacks=[TemperatureScaling()])
    with caplog.at_level("INFO", "lightning_robust"):
        trainer.fit(module := zoo.built(Perfect), training(), loader)
        assert caplog.text.count("no best temperature exists") == 1
        trainer.validate(module, loader, verbose=False)
    assert caplog.text.count("no best temperature exists") == 2


def test_constant_logits_have_a_temperature_and_no_trouble() -> None:
    module, callback = zoo.built(Perfect), TemperatureScaling()
    module.strength = 0.0
    trainer = zoo.trainer(callbacks=[callback])
    trainer.validate(module, data(), verbose=False)
    assert float(trainer.callback_metrics["calibration/val/nll_scaled"]) == pytest.approx(np.log(10))
    assert callback.section()["calibration"]["at_bound"] is True


def test_a_loader_that_gives_no_batch_is_an_error_before_the_first_training_step() -> None:
    with pytest.raises(ValueError, match="dataloader= gave no batch to fit the temperature on"):
        fit(zoo.built(Both), TemperatureScaling(dataloader=[]), num_sanity_val_steps=1)


def test_where_no_label_counts_nothing_is_fitted_and_that_is_said_once() -> None:
    unlabelled = DataLoader(TensorDataset(zoo.images(32), torch.full((32,), -100)), 16)
    trainer = zoo.trainer(max_epochs=2, callbacks=[callback := TemperatureScaling()], num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="no temperature is fitted: of the validation data there is no pred") as said:
        trainer.fit(zoo.built(Both), training(64), unlabelled)
    assert len([w for w in said if "no temperature is fitted" in str(w.message)]) == 1
    assert callback.temperature is None


@pytest.mark.parametrize(
    ("split", "match"),
    [
        (0.001, r"no temperature is fitted: of split=0.001 of the validation data there is no prediction"),
        (0.9999, r"fitted on 32 predictions, and no others are left to report on; only .*another split="),
    ],
)
def test_a_split_that_leaves_one_side_empty_is_said_to(split: float, match: str) -> None:
    trainer = zoo.trainer(callbacks=[TemperatureScaling(split=split)])
    with pytest.warns(UserWarning, match=match):
        trainer.validate(zoo.built(Both), data(32), verbose=False)


def test_the_diagram_says_at_which_temperature_and_whether_it_had_seen_its_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, str, str]] = []

    def drawing(_sums: Any, title: str, _beside: Any, titles: tuple[str, str]) -> Tensor:
        drawn.append((title, *titles))
        return torch.zeros(3, 4, 4)

    monkeypatch.setattr("lightning_robust.callbacks.reported.reliability_diagram", drawing)
    callback = TemperatureScaling()
    trainer = zoo.trainer(max_epochs=1, callbacks=[callback], logger=pl.loggers.TensorBoardLogger(tmp_path))
    trainer.fit(module := zoo.built(Both), training(), data())
    at = f"at T {callback.temperature:.3g}"
    trainer.test(module, data(), verbose=False)
    assert drawn == [("val, epoch 1", "as it is", f"{at} (cross-fitted)"), ("test", "as it is", at)]


@pytest.mark.parametrize("settings", [{"methods": ["vektor"]}, {"methods": "vector"}])
def test_a_method_that_is_mistyped_is_answered_with_the_nearest(settings: Any) -> None:
    with pytest.raises(ValueError, match=r"Did you mean \['vector'\]\?"):
        TemperatureScaling(**settings)


def test_a_network_that_has_come_apart_does_not_end_the_run() -> None:
    class Broken(Both):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * torch.nan

    trainer = zoo.trainer(callbacks=[callback := TemperatureScaling()], num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="no finite"):
        trainer.fit(zoo.built(Broken), data(32), data(32))
    assert callback.temperature is None
    assert "calibration/val/temperature" not in trainer.callback_metrics


# -- test and predict ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Paths of two checkpoints with one set of weights: a full one, and one with weights only."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("kept")

    class Saving(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            for weights_only in (False, True):
                trainer.save_checkpoint(folder / f"{weights_only}.ckpt", weights_only=weights_only)

    fit(zoo.built(Both), TemperatureScaling(), Saving(), num_sanity_val_steps=0)
    return lambda weights_only: folder / f"{weights_only}.ckpt"


# Lightning's own advice about checkpoints that may have other callbacks in them.
own_advice = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@own_advice
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("apply", [False, True])
def test_a_fresh_trainer_tests_at_the_temperature_of_the_checkpoint(
    kept: Callable[[bool], Path], weights_only: bool, apply: bool
) -> None:
    callback = TemperatureScaling(apply=apply)
    trainer = zoo.trainer(callbacks=[callback])
    trainer.test(zoo.built(Both, 9), data(seed=5), ckpt_path=kept(weights_only), verbose=False)
    z, y = logits_of(loaded(kept(True)), seed=5)
    temperature = load_temperature(kept(weights_only), strict=True)
    assert temperature == pytest.approx(best_temperature(*logits_of(loaded(kept(True)))), rel=1e-4)
    found = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert found["calibration/test/temperature"] == pytest.approx(temperature)
    assert found["calibration/test/nll_scaled"] == pytest.approx(nll(z, y, temperature), rel=1e-5)
    p = np.exp(log_softmax(z / temperature, axis=1))
    assert found["calibration/test/ece_scaled"] == pytest.approx(ece(p, y), abs=1e-5)
    assert found["test_loss"] == pytest.approx(nll(z, y, temperature if apply else 1.0), rel=1e-5)


PROCESS = """
import sys, json, warnings
warnings.simplefilter("ignore")
sys.path[:0] = [{tests!r}, {here!r}]
import zoo
from test_temperature_scaling import Both, TemperatureScaling, data
trainer = zoo.trainer(callbacks=[TemperatureScaling()])
trainer.test(Both(), data(seed=5), ckpt_path={path!r}, verbose=False)
print(json.dumps({{k: float(v) for k, v in trainer.callback_metrics.items()}}))
"""


def test_another_process_tests_at_the_temperature_of_the_checkpoint(kept: Callable[[bool], Path]) -> None:
    here = Path(__file__).parent
    code = PROCESS.format(tests=str(here.parent), here=str(here), path=str(kept(True)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    z, y = logits_of(loaded(kept(True)), seed=5)
    temperature = load_temperature(kept(True))
    assert found["calibration/test/nll_scaled"] == pytest.approx(nll(z, y, temperature), rel=1e-5)


def test_a_test_without_a_temperature_says_so() -> None:
    trainer = zoo.trainer(callbacks=[TemperatureScaling()])
    with pytest.warns(UserWarning, match="no temperature for these weights"):
        trainer.test(zoo.built(Both), data(), verbose=False)
    assert not [key for key in trainer.callback_metrics if key.startswith("calibration")]


def test_applying_what_is_not_there_is_an_error_that_leaves_the_module_alone() -> None:
    module = zoo.built(Both)
    with pytest.raises(ProbeError, match="has no temperature, or knows no submodule"):
        zoo.trainer(callbacks=[TemperatureScaling(apply=True)]).test(module, data(), verbose=False)
    assert clean(module)


@own_advice
@pytest.mark.parametrize("known", ["foreign", "before the first validation"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_the_temperature_of_other_weights_is_forgotten(tmp_path: Path, known: str, weights_only: bool) -> None:
    callback = TemperatureScaling()
    fit(zoo.built(Both), callback)
    saving = zoo.trainer(callbacks=[] if known == "foreign" else [TemperatureScaling()])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TemperatureScaling fits in validation, and this fit has none")
        saving.fit(zoo.built(Both, 5), training())
    saving.save_checkpoint(tmp_path / "other.ckpt", weights_only=weights_only)
    assert callback.temperature is not None
    with pytest.warns(UserWarning, match="no temperature for these weights"):
        zoo.trainer(callbacks=[callback]).test(Both(), data(), ckpt_path=tmp_path / "other.ckpt", verbose=False)


@own_advice
@pytest.mark.parametrize("kind", ["test", "predict"])
def test_applied_logits_are_what_the_user_sees(kept: Callable[[bool], Path], kind: str) -> None:
    seen: list[Tensor] = []

    class Seeing(Both):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            logits = self(batch[0])
            F.cross_entropy(logits, batch[1])
            if not logits.requires_grad:  # the one read of the first batch is ours
                seen.append(logits)

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(self(batch[0]))
            return seen[-1]

    module = zoo.built(Seeing)
    trainer = zoo.trainer(callbacks=[TemperatureScaling(apply=True)])
    if kind == "test":
        trainer.test(module, data(), ckpt_path=kept(False), verbose=False)
    else:
        trainer.predict(module, data(), ckpt_path=kept(False))
    temperature = load_temperature(kept(False))
    z = torch.cat(seen).double().numpy() * temperature
    np.testing.assert_allclose(z, logits_of(module)[0], rtol=1e-5, atol=1e-5)
    assert clean(module)


class OwnTarget(Both):
    """Labels that start at 1, put right inside of the step: the target is no leaf of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1] + 1 - 1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))


class ShiftedTarget(OwnTarget):
    """The same, and no tensor of the batch has the target's values."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), (batch[1] + 1) % 10)


@pytest.mark.parametrize("shape", [Both, OwnTarget, ShiftedTarget])
def test_what_other_callbacks_measure_stays_raw(shape: type[Both]) -> None:
    attack = PGD(ThreatModel("linf", 0.02), steps=2, start="zero")
    module = zoo.built(shape)
    scaling = TemperatureScaling()
    fit(module, scaling)
    results = []
    for apply in (False, True):
        scaling.apply = apply
        others = [CalibrationMonitor(), RobustAccuracy(attack), OODMonitor(scores=["energy", "msp"])]
        trainer = zoo.trainer(callbacks=[*others[:1], scaling, *others[1:]])
        trainer.test(module, data(), verbose=False)
        results.append({k: float(v) for k, v in trainer.callback_metrics.items()})
    assert results[0].pop("test_loss") != results[1].pop("test_loss")
    assert results[0] == results[1]
    assert len(results[0]) > 30
    assert clean(module)


@pytest.mark.parametrize("kind", ["test", "predict"])
def test_an_exception_leaves_no_hook_behind(kind: str) -> None:
    class Failing(Both):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            super().test_step(batch, batch_idx)
            raise ZeroDivisionError

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise ZeroDivisionError

    module = zoo.built(Failing)
    fit(module, scaling := TemperatureScaling(apply=True))
    trainer = zoo.trainer(callbacks=[scaling])
    with pytest.raises(ZeroDivisionError):
        trainer.test(module, data(), verbose=False) if kind == "test" else trainer.predict(module, data())
    assert clean(module)


def test_the_module_that_the_evaluation_used_is_scaled_not_that_of_training() -> None:
    class Teacher(Both):
        """Trains one net and evaluates another, as with a slowly moving copy."""

        def __init__(self) -> None:
            super().__init__()
            self.slow = zoo.network()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.slow.load_state_dict(self.net.state_dict())
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def forward(self, x: Tensor) -> Tensor:
            return self.slow(x)

    module, scaling = zoo.built(Teacher), TemperatureScaling(apply=True)
    from lightning_robust import AdversarialTraining

    fit(module, AdversarialTraining(PGD(ThreatModel("linf", 0.01), steps=1)), scaling)
    expected = module.eval().slow(samples().tensors[0]) / scaling.temperature
    found = torch.cat(zoo.trainer(callbacks=[scaling]).predict(module, data()))
    torch.testing.assert_close(found, expected)


# -- several fits ----------------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_its_temperature_until_it_validates(tmp_path: Path) -> None:
    seen: list[float | None] = []

    class Seeing(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            seen.append(next(c for c in trainer.callbacks if isinstance(c, TemperatureScaling)).temperature)

    first = fit(zoo.built(Both), TemperatureScaling(), Seeing())
    first.save_checkpoint(tmp_path / "x.ckpt")
    of_first = float(first.callback_metrics["calibration/val/temperature"])
    assert seen[0] is None
    seen.clear()
    again = zoo.trainer(max_epochs=4, callbacks=[TemperatureScaling(), Seeing()])
    again.fit(Both(), training(), data(), ckpt_path=tmp_path / "x.ckpt")
    assert seen[:10] == pytest.approx([of_first] * 10)
    assert seen[10] != seen[9]


def test_a_second_fit_starts_without_a_temperature(tmp_path: Path) -> None:
    scaling = TemperatureScaling()
    fit(zoo.built(Both), scaling)
    keep = keeping(tmp_path, every_n_train_steps=1)
    fit(zoo.built(Both, 1), scaling, keep, max_epochs=1, enable_checkpointing=True)
    with pytest.raises(KeyError, match="no temperature"):
        load_temperature(tmp_path / "0-1.ckpt")


def test_a_temperature_of_earlier_weights_is_not_used_silently() -> None:
    module, scaling = zoo.built(Both), TemperatureScaling(apply=True)
    trainer = fit(module, scaling, max_epochs=3, check_val_every_n_epoch=2)  # validated at 20 of 30 steps
    earlier = scaling.temperature
    for run in (lambda t: t.test(module, data(), verbose=False), lambda t: t.predict(module, data())):
        for evaluating in (trainer, zoo.trainer(callbacks=[scaling])):
            with pytest.warns(UserWarning, match="fitted at step 20, the weights are from step 30"):
                run(evaluating)
    assert scaling.temperature == earlier
    zoo.trainer(callbacks=[scaling]).validate(module, data(), verbose=False)
    assert scaling.temperature != earlier
    trainer.test(module, data(), verbose=False)  # without a warning


@own_advice
def test_a_checkpoint_brings_a_temperature_that_is_not_earlier_than_its_weights(kept: Callable[[bool], Path]) -> None:
    module, scaling = zoo.built(Both), TemperatureScaling()
    trainer = fit(module, scaling, max_epochs=3, check_val_every_n_epoch=2)
    trainer.test(module, data(), ckpt_path=kept(True), verbose=False)
    assert scaling.temperature == load_temperature(kept(True))


def test_a_fit_that_was_interrupted_after_its_validation_says_so_in_the_test() -> None:
    class Interrupting(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 13:
                raise ZeroDivisionError

    module, scaling = zoo.built(Both), TemperatureScaling()
    with pytest.raises(ZeroDivisionError):
        fit(module, scaling, Interrupting())
    with pytest.warns(UserWarning, match="fitted at step 10, the weights are from step 13"):
        zoo.trainer(callbacks=[scaling]).test(module, data(), verbose=False)


def test_a_fit_without_validation_says_that_nothing_will_be_fitted() -> None:
    with pytest.warns(UserWarning, match="fits in validation, and this fit has none"):
        zoo.trainer(callbacks=[TemperatureScaling()]).fit(zoo.built(Both), training())


# -- after the fit ---------------------------------------------------------------------------------------------------


def digest(module: nn.Module) -> str:
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in module.state_dict().values())).hexdigest()


class Augmenting(pl.LightningDataModule):
    """Pictures are turned upside down in training, on the device, as Lightning's documentation has it."""

    def train_dataloader(self) -> DataLoader[Any]:
        return training()

    def val_dataloader(self) -> DataLoader[Any]:
        return data()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return [x.flip(-1) * 0.3 if self.trainer.training else x, y]


AFTER: dict[str, dict[str, Any]] = {
    "the best three": {"monitor": "val_loss", "save_top_k": 3, "save_last": True},
    "the last": {"save_top_k": 1, "save_last": "link"},
    "all": {"save_top_k": -1},
    "weights only": {"monitor": "val_loss", "save_top_k": -1, "save_weights_only": True},
}


@pytest.mark.parametrize("keep", AFTER.values(), ids=AFTER.keys())
@pytest.mark.parametrize("own", [False, True])
def test_after_the_fit_every_kept_file_gets_the_temperature_of_its_weights(
    tmp_path: Path, keep: dict[str, Any], own: bool
) -> None:
    plain, module = zoo.built(Both), zoo.built(Both)
    settings: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True}
    fit(zoo.built(Both), keeping(tmp_path / "plain", **keep), **settings)
    pl.seed_everything(0, verbose=False)
    fit(plain, **{**settings, "enable_checkpointing": False})
    pl.seed_everything(0, verbose=False)
    scaling = TemperatureScaling(when="after_fit", dataloader=data(seed=6) if own else None)
    trainer = fit(module, keeping(tmp_path / "fitted", **keep), scaling, **settings)
    assert digest(module) == digest(plain)
    seed = 6 if own else 1
    paths = sorted((tmp_path / "fitted").glob("*.ckpt"))
    assert [path.name for path in paths] == sorted(path.name for path in (tmp_path / "plain").glob("*.ckpt"))
    for path in paths:
        saved = torch.load(path, weights_only=True)
        expected = best_temperature(*logits_of(loaded(path), seed=seed))
        assert load_temperature(path, strict=True) == pytest.approx(expected, rel=1e-4)
        assert read_entry(saved)["calibration"]["samples"] == 150
    assert scaling.temperature == pytest.approx(best_temperature(*logits_of(module, seed=seed)), rel=1e-4)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert load_temperature(tmp_path / "after.ckpt", strict=True) == pytest.approx(scaling.temperature)


def test_after_the_fit_calibration_data_are_treated_as_in_validation() -> None:
    module, scaling = zoo.built(Both), TemperatureScaling(when="after_fit")
    seen: list[str] = []

    class Seeing(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(str(trainer.state.stage.value))

    zoo.trainer(max_epochs=2, callbacks=[scaling, Seeing()]).fit(module, datamodule=Augmenting())
    assert scaling.temperature == pytest.approx(best_temperature(*logits_of(module)), rel=1e-4)
    assert seen == ["train"]


def test_after_the_fit_steps_of_several_loaders_get_their_loaders_index() -> None:
    class Two(Both):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            self.log(f"val_loss_{dataloader_idx}", F.cross_entropy(self(batch[0]), batch[1]))

    module, scaling = zoo.built(Two), TemperatureScaling(when="after_fit")
    zoo.trainer(max_epochs=1, callbacks=[scaling]).fit(module, training(), [data(), data(seed=7)])
    assert scaling.temperature == pytest.approx(best_temperature(*logits_of(module)), rel=1e-4)


def test_after_the_fit_without_any_data_is_an_error_before_the_fit() -> None:
    steps: list[int] = []

    class Counting(Both):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    trainer = zoo.trainer(callbacks=[TemperatureScaling(when="after_fit")])
    with pytest.raises(ValueError, match="needs dataloader= where there is no validation"):
        trainer.fit(zoo.built(Counting), training())
    assert not steps


def test_after_the_fit_a_loader_that_was_never_validated_on_will_do() -> None:
    module, scaling = zoo.built(Both), TemperatureScaling(when="after_fit")
    zoo.trainer(callbacks=[scaling], num_sanity_val_steps=0, check_val_every_n_epoch=5).fit(module, training(), data())
    assert scaling.temperature == pytest.approx(best_temperature(*logits_of(module)), rel=1e-4)


def test_after_the_fit_a_file_that_cannot_be_rewritten_is_left_as_it_is(tmp_path: Path) -> None:
    class Foreign:
        """Not to be unpickled by strangers."""

    class Saving(Both):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["note"] = np.random.RandomState

    scaling = TemperatureScaling(when="after_fit")
    with pytest.warns(UserWarning, match=r"could not be given a temperature.*UnpicklingError"):
        fit(module := zoo.built(Saving), keeping(tmp_path), scaling, enable_checkpointing=True, max_epochs=1)
    assert scaling.temperature == pytest.approx(best_temperature(*logits_of(module)), rel=1e-4)


def test_after_the_fit_checkpoints_without_their_frozen_part_are_read_as_lightning_reads_them(tmp_path: Path) -> None:
    class Partly(Both):
        strict_loading = False

        def __init__(self) -> None:
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            for name in list(checkpoint["state_dict"]):
                if name.startswith("net.0."):
                    del checkpoint["state_dict"][name]

    scaling = TemperatureScaling(when="after_fit")
    fit(module := zoo.built(Partly), keeping(tmp_path), scaling, enable_checkpointing=True)
    for path in tmp_path.glob("*.ckpt"):
        there = copy.deepcopy(module)
        there.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=False)
        assert load_temperature(path, strict=True) == pytest.approx(best_temperature(*logits_of(there)), rel=1e-4)


def test_after_the_fit_a_missing_or_broken_file_is_warned_of_and_the_others_get_theirs(tmp_path: Path) -> None:
    class Losing(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            (tmp_path / "0-10.ckpt").write_bytes(b"PK")

    module = zoo.built(Both)
    files = [str(tmp_path / name) for name in ("missing.ckpt", "0-10.ckpt", "1-20.ckpt")]
    scaling = TemperatureScaling(when="after_fit", checkpoints=files)
    with pytest.warns(UserWarning, match="could not be given a temperature") as said:
        fit(module, keeping(tmp_path), Losing(), scaling, enable_checkpointing=True)
    messages = [str(w.message) for w in said if "could not be given a temperature" in str(w.message)]
    assert [Path(message.split()[0]).name for message in messages] == ["missing.ckpt", "0-10.ckpt"]
    assert load_temperature(files[2], strict=True) == pytest.approx(best_temperature(*logits_of(module)), rel=1e-4)


def test_after_the_fit_a_full_disk_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("lightning_robust.callbacks.after_fit.rewrite", full)
    module, scaling = zoo.built(Both), TemperatureScaling(when="after_fit")
    with pytest.warns(UserWarning, match=r"could not be rewritten.*no space left"):
        fit(module, keeping(tmp_path), scaling, enable_checkpointing=True, max_epochs=1)
    assert scaling.temperature == pytest.approx(best_temperature(*logits_of(module)), rel=1e-4)


def test_during_the_fit_after_fit_measures_nothing_and_validate_still_does() -> None:
    module, scaling = zoo.built(Both), TemperatureScaling(when="after_fit")
    trainer = fit(module, scaling)
    assert not [key for key in trainer.callback_metrics if key.startswith("calibration")]
    trainer.validate(module, data(seed=6), verbose=False)
    assert float(trainer.callback_metrics["calibration/val/temperature"]) == pytest.approx(
        best_temperature(*logits_of(module, seed=6)), rel=1e-4
    )


# -- settings --------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"when": "later"}, "'validation' or 'after_fit', got 'later'"),
    ({"checkpoints": []}, "checkpoints= belongs to when='after_fit'"),
    ({"when": "after_fit", "dataloader": samples(8)}, "takes a loader, got a data set"),
    ({"max_samples": 1}, "at least 2"),
    ({"bins": 0}, "at least 1"),
    ({"logits_fn": lambda module, batch: batch}, "target_key= must say"),
]


@pytest.mark.parametrize(("settings", "says"), BAD, ids=[row[1] for row in BAD])
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TemperatureScaling(**settings)


def test_two_need_names_and_then_have_keys_and_sections_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two TemperatureScaling callbacks"):
        fit(zoo.built(Both), TemperatureScaling(), TemperatureScaling())
    trainer = fit(module := zoo.built(Both), TemperatureScaling(), TemperatureScaling(name="few", max_samples=20))
    assert {"calibration/val/temperature", "calibration.few/val/temperature"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert load_temperature(tmp_path / "x.ckpt") == pytest.approx(best_temperature(*logits_of(module)), rel=1e-4)
    assert load_temperature(tmp_path / "x.ckpt", name="few") != load_temperature(tmp_path / "x.ckpt")
    with pytest.raises(KeyError, match="no temperature"):
        load_temperature(tmp_path / "x.ckpt", name="many")
