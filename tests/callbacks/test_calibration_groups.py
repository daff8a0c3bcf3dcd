"""By group and by class, before and after: against plain loops over the samples of each."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from callbacks.calibration_runs import (
    SITES,
    Memory,
    Said,
    SaidAtSites,
    Sites,
    YesNo,
    accuracy,
    best_temperature,
    ece,
    ece_of,
    loader,
    logged,
    softmax,
    spoken,
    told,
    worst_class,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import CalibrationMonitor, TemperatureScaling, read_entry
from lightning_robust.calibration import Reliability
from lightning_robust.randomness import priorities


def at(site: int, n: int = 301) -> np.ndarray:
    return np.array([Sites.site(i) == site for i in range(n)])


def sites(z: Tensor, y: Tensor, names: bool = True, batch_size: int = 50) -> DataLoader[Any]:
    return DataLoader(Sites(z, y, names), batch_size)


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("batch_size", [7, 301])
def test_every_group_has_the_numbers_of_its_own_samples(names: bool, batch_size: int, tmp_path: Any) -> None:
    z, y = spoken()
    memory, monitor = Memory(), CalibrationMonitor(group_key="site")
    trainer = zoo.trainer(callbacks=[monitor], logger=memory)
    trainer.fit(SaidAtSites(), sites(z, y, names), sites(z, y, names, batch_size))
    p, labels = softmax(z), y.numpy()
    table = {}
    for site in range(3):
        own = at(site)
        name = SITES[site] if names else str(site)
        table[name] = {
            "n": int(own.sum()), "accuracy": accuracy(p[own], labels[own]), "ece": ece(p[own], labels[own])
        }  # fmt: skip
    found = logged(trainer)
    assert found["worst_group_ece"] == pytest.approx(max(row["ece"] for row in table.values()), rel=1e-5)
    assert found["worst_group_accuracy"] == pytest.approx(min(row["accuracy"] for row in table.values()))
    assert not [key for key in found if "group/" in key]
    for name, row in table.items():
        for metric in ("ece", "accuracy"):
            assert memory.values[f"calibration/val/group/{name}/{metric}"] == pytest.approx(row[metric], rel=1e-5)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    section = read_entry(tmp_path / "x.ckpt")["calibration"]
    stored, worst = section["groups"], max(table, key=lambda name: table[name]["ece"])
    assert section["worst_group"] == worst
    own = torch.from_numpy(at(SITES.index(worst) if names else int(worst)))
    floor = Reliability.of(z.log_softmax(1)[own], y[own]).floor()
    assert found["worst_group_ece_floor"] == pytest.approx(floor, rel=1e-5)
    assert memory.values[f"calibration/val/group/{worst}/ece_floor"] == pytest.approx(floor, rel=1e-5)
    assert set(stored) == set(table)
    assert all(stored[name] == pytest.approx(table[name], rel=1e-5) for name in table)


def test_a_groups_accuracy_is_that_of_the_likelier_answer_in_every_mode() -> None:
    class AtSites(YesNo):
        def loss(self, batch: Any) -> Tensor:
            return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    z, y = (column[:, 0] for column in told())
    site = torch.arange(301) % 2
    memory = Memory()
    trainer = zoo.trainer(callbacks=[CalibrationMonitor(mode="positive", group_key=2)], logger=memory)
    trainer.validate(AtSites(), loader(z, y, site), verbose=False)
    p = 1 / (1 + np.exp(-z.double().numpy()))
    for group in (0, 1):
        own = (site == group).numpy()
        expected = {
            "accuracy": float(((p > 0.5) == y.numpy())[own].mean()), "ece": ece_of(p[own], y.numpy()[own])
        }  # fmt: skip
        found = {metric: memory.values[f"calibration/val/group/{group}/{metric}"] for metric in expected}
        assert found == pytest.approx(expected, rel=1e-4)


def test_the_rows_of_a_sample_are_all_of_its_group() -> None:
    class Dense(Said):
        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

    z, y = spoken(600)
    y[::5] = -100
    site = torch.arange(25) % 3
    trainer = zoo.trainer(callbacks=[CalibrationMonitor(group_key=2)])
    trainer.validate(
        Dense(), loader(z.view(25, 24, 4).movedim(2, 1), y.view(25, 24), site, batch_size=7), verbose=False
    )
    p, labels, of_rows = softmax(z), y.numpy(), site.repeat_interleave(24).numpy()
    counted = [(of_rows == k) & (labels != -100) for k in range(3)]
    errors = [ece(p[own], labels[own]) for own in counted]
    assert logged(trainer)["worst_group_ece"] == pytest.approx(max(errors), rel=1e-5)


class Dropping(SaidAtSites):
    """Computes the loss of some samples only."""

    def loss(self, batch: Any) -> Tensor:
        kept = torch.arange(len(batch["label"])) % 3 != 0
        return F.cross_entropy(self(batch["logits"])[kept], batch["label"][kept])


@pytest.mark.parametrize("kind", [CalibrationMonitor, TemperatureScaling])
def test_where_rows_are_dropped_before_the_loss_no_groups_are_reported_and_that_is_said_once(kind: Any) -> None:
    z, y = spoken()
    trainer = zoo.trainer(callbacks=[kind(group_key="site")])
    module = Dropping()
    with pytest.warns(UserWarning, match="which row is of which sample cannot be told") as said:
        trainer.validate(module, sites(z, y), verbose=False)
    assert len([w for w in said if "which sample" in str(w.message)]) == 1
    for run, area in ((trainer.validate, "calibration/val/"), (trainer.test, "calibration/test/")):
        run(module, sites(z, y), verbose=False)  # without a word more
        found = logged(trainer, area)
        assert "ece" in found or "ece_scaled" in found
        assert not [key for key in found if "group" in key]


def test_groups_named_by_numpy_are_in_files_that_plain_torch_reads(tmp_path: Any) -> None:
    z, y = spoken()

    class Named(Sites):
        def __getitem__(self, i: int) -> Any:
            return {**super().__getitem__(i), "site": np.array(SITES)[self.site(i)]}

    trainer = zoo.trainer(callbacks=[CalibrationMonitor(group_key="site")])
    trainer.fit(SaidAtSites(), sites(z, y), DataLoader(Named(z, y), 50, collate_fn=as_lists))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert set(read_entry(tmp_path / "x.ckpt")["calibration"]["groups"]) == set(SITES)


def as_lists(samples: list[Any]) -> Any:
    columns = {key: [sample[key] for sample in samples] for key in samples[0]}
    return {**columns, "logits": torch.stack(columns["logits"]), "label": torch.stack(columns["label"])}


def test_a_second_loader_without_groups_is_measured_without_and_said_to_be() -> None:
    z, y = spoken()
    plain = TensorDataset(z[:40], y[:40])

    class Mixed(SaidAtSites):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) if isinstance(batch, dict) else F.cross_entropy(self(batch[0]), batch[1])

    loaders = {"first": sites(z, y), "second": DataLoader(plain, 20)}
    trainer = zoo.trainer(callbacks=[CalibrationMonitor(group_key="site")])
    with pytest.warns(UserWarning, match="loader 1 is measured without groups") as said:
        trainer.validate(Mixed(), loaders, verbose=False)
    assert len([w for w in said if "without groups" in str(w.message)]) == 1
    found = logged(trainer)
    assert found["ece/second"] == pytest.approx(ece(softmax(z[:40]), y[:40]), rel=1e-5)
    assert "worst_group_ece" in found
    assert "worst_group_ece/second" not in found


def test_a_first_loader_without_groups_is_an_error_before_the_first_training_step() -> None:
    z, y = spoken()
    for callback in (CalibrationMonitor(group_key="place"), TemperatureScaling(group_key="place")):
        with pytest.raises((KeyError, ValueError), match="place"):
            zoo.trainer(callbacks=[callback]).fit(SaidAtSites(), sites(z, y), sites(z, y))


def test_a_group_without_any_number_is_no_worst_group() -> None:
    z, y = spoken()
    z[torch.from_numpy(at(2))] = torch.nan
    trainer = zoo.trainer(callbacks=[CalibrationMonitor(group_key="site")])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "75 predictions of the val data are NaN")
        trainer.validate(SaidAtSites(), sites(z, y), verbose=False)
    p, labels = softmax(z.nan_to_num()), y.numpy()
    errors = [ece(p[at(site)], labels[at(site)]) for site in (0, 1)]
    assert logged(trainer)["worst_group_ece"] == pytest.approx(max(errors), rel=1e-5)
    assert logged(trainer)["worst_group_accuracy"] > 0


# -- by class --------------------------------------------------------------------------------------------------------


def test_every_class_is_measured_against_the_rest(tmp_path: Any) -> None:
    z, y = spoken()
    monitor = CalibrationMonitor(classwise=True, bins=10)
    trainer = zoo.trainer(callbacks=[monitor])
    trainer.fit(Said(), loader(z, y), loader(z, y))
    p, labels = softmax(z), y.numpy()
    errors = [ece_of(p[:, k], labels == k, 10) for k in range(4)]
    found = logged(trainer)
    assert found["ece_classwise"] == pytest.approx(float(np.mean(errors)), rel=1e-5)
    assert found["worst_class_ece"] == pytest.approx(max(errors), rel=1e-5)
    assert found["worst_class"] == int(np.argmax(errors))
    right = [float((p.argmax(1) == labels)[labels == k].mean()) for k in range(4)]
    assert found["worst_class_accuracy"] == pytest.approx(min(right), rel=1e-6)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    stored = read_entry(tmp_path / "x.ckpt")["calibration"]["classes"]
    assert stored["ece"] == pytest.approx(errors, rel=1e-5)
    assert stored["accuracy"] == pytest.approx([float((p.argmax(1) == k)[labels == k].mean()) for k in range(4)])


# -- before and after recalibration ----------------------------------------------------------------------------------


def crossed(z: Tensor, y: Tensor, seed: int = 0) -> np.ndarray:
    """Probabilities of each half at the temperature of the other."""
    first = (priorities(torch.arange(len(y)), seed + 1) < 0.5).numpy()
    p = np.zeros(z.shape)
    for half in (first, ~first):
        p[half] = softmax(z[half], best_temperature(z[~half], y[~half]))
    return p


@pytest.mark.parametrize("batch_size", [7, 301])
def test_what_a_temperature_does_to_the_worst_group_and_the_worst_class(batch_size: int) -> None:
    z, y = spoken()
    trainer = zoo.trainer(callbacks=[TemperatureScaling(group_key="site", classwise=True)])
    trainer.validate(SaidAtSites(), sites(z, y, batch_size=batch_size), verbose=False)
    found, labels = logged(trainer), y.numpy()
    for name, p in {"unscaled": softmax(z), "scaled": crossed(z, y)}.items():
        errors = [ece(p[at(site)], labels[at(site)]) for site in range(3)]
        assert found[f"worst_group_ece_{name}"] == pytest.approx(max(errors), rel=1e-3)
        worst = at(int(np.argmax(errors)))
        floor = Reliability.of(torch.from_numpy(p[worst]).log(), y[torch.from_numpy(worst)]).floor()
        assert found[f"worst_group_ece_floor_{name}"] == pytest.approx(floor, rel=0.05)
        assert found[f"worst_class_ece_{name}"] == pytest.approx(worst_class(p, labels)[1], rel=1e-3)


def test_groups_and_classes_of_a_test_are_at_the_temperature_of_the_validation() -> None:
    z, y = spoken()
    others, truth = spoken(200, seed=1)
    scaling = TemperatureScaling(group_key="site", classwise=True)
    trainer = zoo.trainer(callbacks=[scaling])
    trainer.validate(module := SaidAtSites(), sites(z, y), verbose=False)
    trainer.test(module, sites(others, truth), verbose=False)
    found, labels = logged(trainer, "calibration/test/"), truth.numpy()
    for name, p in {"unscaled": softmax(others), "scaled": softmax(others, best_temperature(z, y))}.items():
        groups = max(ece(p[at(site, 200)], labels[at(site, 200)]) for site in range(3))
        assert found[f"worst_group_ece_{name}"] == pytest.approx(groups, rel=1e-3)
        assert found[f"worst_class_ece_{name}"] == pytest.approx(worst_class(p, labels)[1], rel=1e-3)


def test_groups_are_those_of_the_predictions_that_were_kept() -> None:
    z, y = spoken()
    trainer = zoo.trainer(callbacks=[TemperatureScaling(group_key="site", max_samples=90)])
    trainer.validate(SaidAtSites(), sites(z, y, batch_size=20), verbose=False)
    kept = np.zeros(301, dtype=bool)
    kept[priorities(torch.arange(301) << 24, 0).argsort()[:90].numpy()] = True
    p, labels = softmax(z), y.numpy()
    errors = [ece(p[at(site) & kept], labels[at(site) & kept]) for site in range(3)]
    assert logged(trainer)["worst_group_ece_unscaled"] == pytest.approx(max(errors), rel=1e-5)
