"""The temperature of weights that something was done to after training: before and after, by plain loops."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from callbacks.calibration_runs import Said, accuracy, best_temperature, brier, ece, loader, nll, softmax, spoken
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import TemperatureScaling, calibrated, load_temperature, read_entry, refit_temperature
from lightning_robust.randomness import RandomState, priorities

NEVER: Any = object()  # a loader that nobody comes to read
TEACHER = torch.randn(64, 10, generator=torch.Generator().manual_seed(42))


class Small(zoo.Shape):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]  # a tensor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def samples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = zoo.images(n, seed)
    right = ((x.flatten(1) - 0.5) @ TEACHER).argmax(1)
    wrong = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.2
    return x, torch.where(wrong, (right + 1) % 10, right)


def data(n: int = 200, seed: int = 1) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples(n, seed)), 32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A module that learnt its training data by heart, and its checkpoint."""
    torch.set_num_threads(1)
    module = zoo.built(Small)
    trainer = zoo.trainer(max_epochs=30, callbacks=[TemperatureScaling(methods=["vector"], prediction_sets=0.1)])
    trainer.fit(module, data(400, 2), data())
    path = tmp_path_factory.mktemp("trained") / "x.ckpt"
    trainer.save_checkpoint(path)
    return module, path


def quantised(module: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another home for it
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), {nn.Linear}, dtype=torch.qint8)


def pruned(module: Any) -> Any:
    module = copy.deepcopy(module)
    for layer in (module.net[1], module.net[3]):
        prune.l1_unstructured(layer, "weight", amount=0.85)
    return module


def logits_of(module: Any) -> tuple[Tensor, Tensor]:
    x, y = samples(200, 1)
    with torch.no_grad():  # dynamic quantisation rounds by what else is in a batch
        return torch.cat([module.eval().net(part) for part in x.split(32)]), y


def by_hand(p: np.ndarray, y: Tensor) -> dict[str, float]:
    return {"accuracy": accuracy(p, y), "nll": nll(p, y), "brier": brier(p, y), "ece": ece(p, y)}


def check(found: Any, z: Tensor, y: Tensor, stored: float) -> None:
    first, p = (priorities(torch.arange(len(y)), 1) < 0.5).numpy(), np.zeros(z.shape)
    for half in (first, ~first):
        p[half] = softmax(z[half], best_temperature(z[~half], y[~half]))
    assert found.temperature == pytest.approx(best_temperature(z, y), rel=1e-4)
    assert (found.stored, found.samples, found.at_bound) == (pytest.approx(stored), len(y), False)
    for side, expected in ((found.before, by_hand(softmax(z, stored), y)), (found.after, by_hand(p, y))):
        assert {name: side[name] for name in expected} == pytest.approx(expected, rel=1e-3)
        assert set(side) == {*expected, "ece_floor"}
    assert found.before["accuracy"] == found.after["accuracy"]


@pytest.mark.parametrize("change", [quantised, pruned])
def test_before_and_after_are_those_of_a_plain_loop_over_the_changed_weights(change: Any, trained: Any) -> None:
    module, path = trained
    changed = change(module)
    z, y = logits_of(changed)
    assert not torch.allclose(z, logits_of(module)[0], atol=1e-3)
    stored = load_temperature(path)
    changed.train()
    state = RandomState.capture()
    found = refit_temperature(changed, data(), stored=path)
    assert state.is_current()
    assert changed.training
    check(found, z, y, stored)
    assert not [part for part in changed.modules() if part._forward_hooks]


def test_pruned_weights_want_another_temperature_and_a_file_of_them_gets_it(trained: Any, tmp_path: Path) -> None:
    module, path = trained
    changed = pruned(module)
    for layer in (changed.net[1], changed.net[3]):
        prune.remove(layer, "weight")
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "state_dict": changed.state_dict()}, tmp_path / "pruned.ckpt")
    found = refit_temperature(changed, data(), stored=path, write=tmp_path / "pruned.ckpt")
    z, y = logits_of(changed)
    check(found, z, y, load_temperature(path))
    assert found.after["nll"] < found.before["nll"]
    assert load_temperature(tmp_path / "pruned.ckpt", strict=True) == found.temperature != found.stored
    section = read_entry(tmp_path / "pruned.ckpt")["calibration"]
    assert (section["nll"], section["nll_scaled"]) == (pytest.approx(nll(softmax(z), y), rel=1e-4), found.after["nll"])
    assert (section["samples"], section["fit_step"]) == (200, saved["global_step"])
    module = calibrated(Small, tmp_path / "pruned.ckpt")
    with torch.no_grad():
        torch.testing.assert_close(module(samples(200, 1)[0]), z / found.temperature)
    # What was fitted beside it was fitted for the weights before.
    with pytest.raises(KeyError, match="no recalibrator 'vector', only temperature"):
        calibrated(Small, tmp_path / "pruned.ckpt", method="vector")
    assert load_temperature(path) == found.stored  # the other file is as it was


def test_a_file_of_a_run_without_this_package_gets_everything_that_is_needed(tmp_path: Path) -> None:
    module = zoo.built(Small)
    trainer = zoo.trainer(max_epochs=3)
    trainer.fit(module, data(400, 2))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    found = refit_temperature(module, data(), write=tmp_path / "x.ckpt")
    z, y = logits_of(module)
    check(found, z, y, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(calibrated(Small, tmp_path / "x.ckpt")(samples(200, 1)[0]), z / found.temperature)


def test_a_fit_that_is_running_goes_on_with_its_own_trainer() -> None:
    class Refitting(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            refit_temperature(pl_module, data())
            assert pl_module.trainer is trainer
            assert pl_module.training

    module = zoo.built(Small)
    trainer = zoo.trainer(max_epochs=2, callbacks=[Refitting()])
    trainer.fit(module, data(64, 2), data(32))
    assert trainer.current_epoch == 2
    assert module.trainer is trainer


def test_a_module_without_a_trainer_has_none_afterwards() -> None:
    module = zoo.built(Small)
    refit_temperature(module, data())
    assert module._trainer is None


def test_a_file_of_other_weights_is_refused_before_anything_runs(trained: Any, tmp_path: Path) -> None:
    module, path = trained
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.net[3].bias[0] += 0.5
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"holds other weights than the module: 'net\.3\.bias' differs"):
        refit_temperature(other, NEVER, write=path)
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "state_dict": {**saved["state_dict"], "more": torch.ones(1)}}, tmp_path / "more.ckpt")
    with pytest.raises(ValueError, match="'more' differs"):
        refit_temperature(module, NEVER, write=tmp_path / "more.ckpt")
    with pytest.raises(ValueError, match="other weights"):
        refit_temperature(quantised(module), NEVER, write=path)
    assert path.read_bytes() == before


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # by torch, of its own reading
def test_a_file_of_quantised_weights_is_theirs_alone(trained: Any, tmp_path: Path) -> None:
    module, path = trained
    changed, saved = quantised(module), torch.load(path, weights_only=True)
    torch.save({**saved, "state_dict": changed.state_dict()}, tmp_path / "int8.ckpt")
    found = refit_temperature(changed, data(), write=tmp_path / "int8.ckpt")
    assert load_temperature(tmp_path / "int8.ckpt") == found.temperature
    with torch.no_grad():
        module = copy.deepcopy(module)
        module.net[3].weight.mul_(2)
    with pytest.raises(ValueError, match=r"net\.3\._packed_params"):
        refit_temperature(quantised(module), NEVER, write=tmp_path / "int8.ckpt")


def test_what_is_no_checkpoint_is_refused_before_anything_runs(tmp_path: Path) -> None:
    module = zoo.built(Small)
    with pytest.raises(FileNotFoundError, match="no such file"):
        refit_temperature(module, NEVER, write=tmp_path / "x.ckpt")
    torch.save(module.state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="is no checkpoint: it has no 'state_dict'"):
        refit_temperature(module, NEVER, write=tmp_path / "x.pt")


def test_what_was_measured_of_the_weights_before_is_taken_out_of_the_file(trained: Any, tmp_path: Path) -> None:
    module, path = trained
    saved = torch.load(path, weights_only=True)
    entry = saved["lightning_robust"]
    entry["calibration"] |= {"ece": 0.1, "bins": {"counts": [1]}, "worst_class": 2.0, "measured_step": 3}
    old = {name: {"auroc": 0.9} for name in ("ood", "ood.far", "shift", "robust", "saliency", "calibration.other")}
    torch.save({**saved, "lightning_robust": {**entry, **old, "fill": {"kept": 1}}}, tmp_path / "x.ckpt")
    refit_temperature(module, data(), write=tmp_path / "x.ckpt")
    found = read_entry(tmp_path / "x.ckpt")
    assert not set(found) & set(old)
    assert (found["fill"], found["route"]) == ({"kept": 1}, entry["route"])
    assert set(found["calibration"]) == {"temperature", "at_bound", "fit_step", "samples", "nll", "nll_scaled"}


def test_what_is_no_module_of_lightning_and_no_loader_is_named() -> None:
    with pytest.raises(TypeError, match=r"expected a LightningModule.*got Linear"):
        refit_temperature(nn.Linear(2, 2), data())
    with pytest.raises(TypeError, match=r"expected a loader, got a data set \(TensorDataset\)"):
        refit_temperature(zoo.built(Small), data().dataset)


class Foreign(lightning.pytorch.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        with torch.no_grad():
            self.net.weight.copy_(torch.eye(4))
            self.net.bias.zero_()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        F.cross_entropy(self.net(batch[0]), batch[1])


def test_the_other_namespace_is_served_alike() -> None:
    z, y = spoken()
    found = refit_temperature(Foreign(), loader(z, y), stored=1.2)
    assert found == refit_temperature(Said(), loader(z, y), stored=1.2)
    check(found, z, y, 1.2)


def test_logits_fn_reads_what_shows_no_loss() -> None:
    class Silent(Said):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_right", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    z, y = spoken()
    found = refit_temperature(Silent(), loader(z, y), target_key=1, logits_fn=lambda m, batch: 2 * m.net(batch[0]))
    check(found, 2 * z, y, 1.0)


def test_of_several_loaders_the_first_is_fitted_on() -> None:
    z, y = spoken()
    found = refit_temperature(Said(), [loader(z, y), loader(*spoken(80, seed=4))])
    check(found, z, y, 1.0)


def test_no_more_than_max_samples_are_fitted_on() -> None:
    z, y = spoken()
    found = refit_temperature(Said(), loader(z, y), max_samples=90, seed=2)
    kept = priorities(torch.arange(301) << 24, 2).argsort()[:90]
    assert (found.samples, found.temperature) == (90, pytest.approx(best_temperature(z[kept], y[kept]), rel=1e-4))


def test_predictions_that_are_no_numbers_are_left_out_and_counted() -> None:
    z, y = spoken()
    z[5], z[7, 0] = torch.nan, torch.nan
    with pytest.warns(UserWarning, match="2 of 301 predictions are NaN or infinite; left out"):
        found = refit_temperature(Said(), loader(z, y))
    kept = z.isfinite().all(1)
    assert found.temperature == pytest.approx(best_temperature(z[kept], y[kept]), rel=1e-4)


def test_too_little_to_fit_on_and_nothing_stored_are_errors(tmp_path: Path) -> None:
    z, y = spoken(1)
    with pytest.raises(ValueError, match="at least two labelled samples with finite logits, got 1"):
        refit_temperature(Said(), loader(z, y))
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(KeyError, match="no 'lightning_robust' entry"):
        refit_temperature(Said(), loader(*spoken(20)), stored=tmp_path / "x.ckpt")
