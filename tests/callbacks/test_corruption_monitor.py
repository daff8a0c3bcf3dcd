"""Accuracy, calibration and detectability under corruptions: the numbers by plain loops, in every kind of run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from callbacks import shift_by_hand as hand
from callbacks.shift_by_hand import N, data, pictures, trained
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import CalibrationMonitor, CorruptionMonitor, TemperatureScaling, read_entry
from lightning_robust.calibration import fit_temperature

NAMES, SEVERITIES = ["gaussian_noise", "fog", "contrast"], [1, 5]
CELLS = [(name, severity) for name in NAMES for severity in SEVERITIES]


def monitor(**settings: Any) -> CorruptionMonitor:
    return CorruptionMonitor(**{"corruptions": NAMES, "severities": SEVERITIES, **settings})


def cells_of(callback: CorruptionMonitor) -> dict[str, dict[str, float]]:
    return dict(callback.section()["shift"]["cells"])


def validated(module: Any, callback: Any, loader: Any = None, **settings: Any) -> dict[str, float]:
    trainer = zoo.trainer(callbacks=[callback], **settings)
    trainer.validate(module, loader or data(), verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("shift")}


def test_every_cell_is_that_of_a_plain_loop_over_the_same_samples() -> None:
    module, callback, n = trained(), monitor(max_samples=37), 37
    metrics = validated(module, callback)
    x, y = pictures()
    temperature = hand.temperature_of(hand.logits_of(module.net, x), y)  # of all validation data, not of 37
    expected = {
        f"{name}_{severity}": hand.by_hand(module.net, name, severity, n, temperature) for name, severity in CELLS
    }
    found = cells_of(callback)
    for cell, values in expected.items():
        assert found[cell] == pytest.approx(values, abs=1e-5), cell
    clean = hand.measured(module.net, x[:n], y[:n], hand.logits_of(module.net, x[:n]), temperature)
    assert found["clean"] == pytest.approx(clean, abs=1e-5)
    assert len({values["accuracy"] for values in expected.values()}) > 2  # a case where an error would show
    assert len(found) == 1 + len(CELLS)
    entry = callback.section()["shift"]
    for metric in ("accuracy", "nll", "ece", "ece_floor", "confidence", "ece_scaled", "nll_scaled", "msp_auroc"):
        mean = sum(values[metric] for values in expected.values()) / len(expected)
        assert entry[f"mean_{metric}"] == pytest.approx(mean, abs=1e-5)
        beside = metric in ("confidence", "nll_scaled")  # into the loggers alone
        assert metrics.get(f"shift/val/mean_{metric}", mean if beside else -1) == pytest.approx(mean, abs=1e-5)
    accuracies = [values["accuracy"] for values in expected.values()]
    assert metrics["shift/val/clean_accuracy"] == pytest.approx(clean["accuracy"])
    assert metrics["shift/val/worst_accuracy"] == pytest.approx(min(accuracies))
    assert metrics["shift/val/retention"] == pytest.approx(sum(accuracies) / len(accuracies) / clean["accuracy"])


def test_neither_the_batch_size_nor_the_order_of_severities_moves_a_number() -> None:
    module, found = trained(), []
    for size, order in ((N, [1, 5]), (8, [5, 1]), (7, [1, 5])):
        callback = monitor(max_samples=37, severities=order)
        validated(module, callback, data(batch_size=size))
        found.append(cells_of(callback))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for cell, values in other.items():
            assert values == pytest.approx(found[0][cell], abs=1e-6), cell
            assert values["accuracy"] == found[0][cell]["accuracy"]


def test_another_seed_draws_other_noise_and_the_same_one_the_same() -> None:
    module, noises = trained(), []
    for seed in (0, 1, 0):
        callback = monitor(corruptions=["gaussian_noise"], severities=[5], seed=seed)
        validated(module, callback)
        noises.append(cells_of(callback)["gaussian_noise_5"])
    assert noises[0] == noises[2]
    assert noises[0]["nll"] != noises[1]["nll"]
    temperature = hand.temperature_of(hand.logits_of(module.net, pictures()[0]), pictures()[1])
    assert noises[1] == pytest.approx(hand.by_hand(module.net, "gaussian_noise", 5, N, temperature, seed=1), abs=1e-5)


def test_the_temperature_is_that_of_clean_validation_and_the_same_as_temperature_scaling_fits() -> None:
    module, callback, scaling = trained(), monitor(max_samples=10), TemperatureScaling()
    zoo.trainer(callbacks=[callback, scaling]).validate(module, data(), verbose=False)
    x, y = pictures()
    expected = fit_temperature(torch.from_numpy(hand.logits_of(module.net, x)), y).temperature
    assert callback.section()["shift"]["temperature"] == pytest.approx(expected, rel=1e-5)
    assert callback.section()["shift"]["temperature"] == pytest.approx(scaling.temperature)
    assert abs(expected - 1) > 0.05


class Weights(pl.Callback):
    """The weights of each validation."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.states.append({key: value.clone() for key, value in pl_module.state_dict().items()})
            self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("shift")})


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 3}], ids=["epochs", "in mid-epoch"])
def test_the_same_few_cells_in_every_validation_and_all_of_them_in_the_last(settings: dict[str, Any]) -> None:
    callback, kept = monitor(per_epoch=2, max_samples=30), Weights()
    module = zoo.built(hand.Module)
    zoo.trainer(callbacks=[callback, kept], max_epochs=2, **settings).fit(module, data(), data())
    assert len(kept.logged) == (4 if settings else 2)
    twice = [(f"{c.name}", c.severity) for c in callback._sampled(callback.cells)]
    assert len(twice) == 2
    assert {severity for _, severity in twice} == {5}  # 3 is not there, 5 comes next
    for state, logged in zip(kept.states, kept.logged, strict=True):
        module.load_state_dict(state)
        expected = [hand.by_hand(module.net, *cell, 30, None)["accuracy"] for cell in twice]
        assert logged["shift/val/sampled_accuracy"] == pytest.approx(sum(expected) / 2)
    whole = [hand.by_hand(module.net, *cell, 30, None)["accuracy"] for cell in CELLS]
    assert all("shift/val/mean_accuracy" not in logged for logged in kept.logged[:-1])
    assert kept.logged[-1]["shift/val/mean_accuracy"] == pytest.approx(sum(whole) / len(whole))


def test_severity_three_comes_first_over_all_corruptions_and_none_means_none() -> None:
    first = CorruptionMonitor(per_epoch=17)
    assert {cell.severity for cell in first._sampled(first.cells)} == {3}
    callback, kept = monitor(per_epoch=0), Weights()
    zoo.trainer(callbacks=[callback, kept], max_epochs=2).fit(trained(), data(), data())
    assert set(kept.logged[0]) == {"shift/val/clean_accuracy"}
    assert "shift/val/mean_accuracy" in kept.logged[1]
    assert "shift/val/sampled_accuracy" not in kept.logged[1]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_test_takes_the_temperature_of_the_checkpoint_and_measures_all_cells(tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "last")
    module, callback = trained(), monitor(per_epoch=1)
    trainer = zoo.trainer(callbacks=[callback, saving], enable_checkpointing=True)
    trainer.fit(module, data(), data())
    temperature = read_entry(saving.best_model_path)["shift"]["temperature"]
    x, y = pictures(29)
    loader = DataLoader(TensorDataset(x, (y + 1) % 4), 6)  # data that would have another temperature
    again = monitor()
    trainer = zoo.trainer(callbacks=[again])
    trainer.test(module, loader, ckpt_path=saving.best_model_path, verbose=False)
    clean = hand.logits_of(module.net, x)
    expected = []
    for name, severity in CELLS:
        made = hand.corrupt(x, name, severity, index=range(29))
        expected.append(hand.measured(module.net, made, (y + 1) % 4, clean, temperature))
    for metric in ("accuracy", "ece_scaled", "msp_auroc"):
        mean = sum(values[metric] for values in expected) / len(CELLS)
        assert float(trainer.callback_metrics[f"shift/test/mean_{metric}"]) == pytest.approx(mean, abs=1e-5)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_test_takes_the_temperature_of_temperature_scaling_where_the_fit_had_only_that(tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "last")
    module, scaling = trained(), TemperatureScaling()
    zoo.trainer(callbacks=[scaling, saving], enable_checkpointing=True).fit(module, data(), data())
    seen = monitor(corruptions=["fog"], severities=[5])
    trainer = zoo.trainer(callbacks=[seen])
    trainer.test(module, data(), ckpt_path=saving.best_model_path, verbose=False)
    expected = hand.by_hand(module.net, "fog", 5, N, scaling.temperature)
    assert float(trainer.callback_metrics["shift/test/mean_ece_scaled"]) == pytest.approx(
        expected["ece_scaled"], abs=1e-5
    )
    zoo.trainer(callbacks=[seen]).fit(module, data(), data())
    trainer = zoo.trainer(callbacks=[seen])
    bare = tmp_path / "bare.ckpt"
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": pl.__version__}, bare)
    trainer.test(module, data(), ckpt_path=bare, verbose=False)  # weights of nobody's temperature
    assert "shift/test/mean_ece" in trainer.callback_metrics
    assert "shift/test/mean_ece_scaled" not in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_test_takes_the_newer_temperature_of_a_checkpoint_and_says_if_it_is_of_other_weights(tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "last")
    module = trained()
    zoo.trainer(callbacks=[monitor(), saving], enable_checkpointing=True).fit(module, data(), data())
    file = torch.load(saving.best_model_path, weights_only=True)
    entry = file["lightning_robust"]
    entry["calibration"] = {"temperature": 3.0, "fit_step": entry["global_step"] + 1}
    torch.save(file, tmp_path / "again.ckpt")
    trainer = zoo.trainer(callbacks=[monitor(corruptions=["fog"], severities=[5])])
    with pytest.warns(UserWarning, match="fitted at step 8, its weights are from step 7") as said:
        trainer.test(module, data(), ckpt_path=tmp_path / "again.ckpt", verbose=False)
    assert len([w for w in said if "its weights are from" in str(w.message)]) == 1
    expected = hand.by_hand(module.net, "fog", 5, N, 3.0)["ece_scaled"]
    assert float(trainer.callback_metrics["shift/test/mean_ece_scaled"]) == pytest.approx(expected, abs=1e-5)


def test_the_lower_bound_of_a_temperature_counts_as_one() -> None:
    x, _ = pictures(8)
    module = trained()
    right = torch.from_numpy(hand.logits_of(module.net, x).argmax(1))
    callback = monitor(corruptions=["fog"], severities=[5])
    validated(module, callback, DataLoader(TensorDataset(x, right), 8))  # no error at all
    assert callback.section()["shift"]["temperature"] == 1.0
    found = callback.section()["shift"]["cells"]["fog_5"]
    assert found["nll_scaled"] == pytest.approx(found["nll"])


def test_the_checkpoint_says_which_cells_and_when(tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    zoo.trainer(callbacks=[monitor(per_epoch=1), saving], enable_checkpointing=True, max_epochs=2).fit(
        trained(), data(), data()
    )
    first, last = (read_entry(tmp_path / f"epoch={epoch}.ckpt")["shift"] for epoch in (0, 1))
    assert (first["complete"], last["complete"]) == (False, True)
    assert (len(first["cells"]), len(last["cells"])) == (2, 7)
    assert (first["measured_step"], last["measured_step"]) == (7, 14)
    assert last["n"] == N


def test_the_model_checkpoint_can_watch_from_the_first_epoch_on(tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(
        tmp_path, monitor="shift/val/sampled_accuracy", mode="max", auto_insert_metric_name=False
    )
    kept = Weights()
    trainer = zoo.trainer(callbacks=[saving, monitor(per_epoch=2), kept], enable_checkpointing=True, max_epochs=3)
    trainer.fit(zoo.built(hand.Module), data(), data())
    best = max(logged["shift/val/sampled_accuracy"] for logged in kept.logged)
    assert float(saving.best_model_score or -1) == pytest.approx(best)


def test_training_is_the_same_to_the_last_bit_and_random_streams_are_not_touched() -> None:
    results = []
    for callbacks in ([], [monitor(per_epoch=2)], [CalibrationMonitor(), monitor(per_epoch=None)]):
        module = zoo.built(hand.Module)
        trainer = zoo.trainer(callbacks=callbacks, max_epochs=2)
        trainer.fit(module, data(shuffle=True), data())
        flat = torch.cat([value.flatten().double() for value in module.state_dict().values()])
        results.append((flat, torch.get_rng_state(), float(trainer.callback_metrics["val_loss"])))
    for other in results[1:]:
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_a_loader_that_shuffles_is_said_once() -> None:
    with pytest.warns(UserWarning, match="loader 0 shuffles, so that each epoch corrupts other samples") as said:
        zoo.trainer(callbacks=[monitor()], max_epochs=2).fit(trained(), data(), data(shuffle=True))
    assert len([w for w in said if "corrupts other samples" in str(w.message)]) == 1


def test_a_monitor_starts_afresh_in_each_evaluation() -> None:
    module, callback = trained(), monitor()
    first = validated(module, callback)
    assert validated(module, callback) == first
    assert callback._counted is None
    assert callback._fitted_on is None
