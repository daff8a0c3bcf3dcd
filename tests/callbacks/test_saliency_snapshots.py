"""Snapshots are what captum says of the weights at that moment; drift, films and pictures follow from them."""

from __future__ import annotations

import hashlib
import io
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
from captum.attr import IntegratedGradients, LayerGradCam
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PixelSpace, SaliencySnapshots
from lightning_robust.saliency import drift, filmstrip, quantised

METHODS = ("gradient", "integrated_gradients", "gradcam")


def data(n: int = 60, seed: int = 1, batch_size: int = 16, classes: int = 10) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n, seed), zoo.labels(n, classes)), batch_size)


class Net(zoo.ListBatch):
    """No dropout, and a learning rate at which maps move."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 10)
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))


class Moments(pl.Callback):
    """The weights that evaluation measures, and what was logged."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == dataloader_idx == 0 and not trainer.sanity_checking:
            self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.logged.append(saliency(trainer))


def saliency(trainer: Any) -> dict[str, float]:
    """What was logged; a part of it, to the same value, stands in ``callback_metrics``."""
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("saliency")}
    (measured,) = (c.measured for c in trainer.callbacks if isinstance(c, SaliencySnapshots))
    assert logged.keys() <= measured.keys() or not measured
    return {**measured, **logged}


def fit(module: Any, *callbacks: Any, validation: Any = None, training: Any = None, **settings: Any) -> pl.Trainer:
    path = settings.pop("ckpt_path", None)
    trainer = zoo.trainer(**{"max_epochs": 3, "callbacks": list(callbacks), **settings})
    trainer.fit(module, training or data(64, seed=0), validation or data(), ckpt_path=path)
    return trainer


def maps_by_hand(module: nn.Module, x: Tensor, target: Tensor, layer: str = "net.2", black: float = 0.0) -> Any:
    """The three kinds of maps of a module in eval mode, by captum and by hand."""
    module.eval()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(leaf).gather(1, target[:, None]).sum(), leaf)
    integrated = IntegratedGradients(module).attribute(
        x, torch.full_like(x, black), target, n_steps=16, method="riemann_middle"
    )
    cam = LayerGradCam(module, module.get_submodule(layer)).attribute(x, target, relu_attributions=True)
    cam = F.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False)
    found = {"gradient": gradient.abs(), "integrated_gradients": integrated, "gradcam": cam}
    return {method: maps.sum(1).detach() for method, maps in found.items()}


def loaded(shape: type[Any], state: dict[str, Tensor]) -> Any:
    module = zoo.built(shape)
    module.load_state_dict(state)
    return module


def assert_maps(found: Tensor, expected: Tensor) -> None:
    """Equal up to one step of 16 bits, and round-off."""
    assert found.shape == expected.shape
    step = expected.abs().flatten(1).amax(1) / 1000
    assert bool(((found - expected).abs().flatten(1).amax(1) <= 0.51 * step + 1e-7).all())


def last_maps(callback: SaliencySnapshots, method: str, stage: str = "val") -> Tensor:
    return callback.sets.of(stage)[""].films[method].shown()[-1][1]


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_maps_and_drift_are_those_of_the_weights_at_each_moment(precision: Any) -> None:
    callback, moments = SaliencySnapshots(METHODS, samples=7), Moments()
    taken: list[dict[str, Tensor]] = []

    class Photos(pl.Callback):
        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            if not trainer.sanity_checking:
                taken.append({method: last_maps(callback, method) for method in METHODS})

    fit(zoo.built(Net), callback, moments, Photos(), precision=precision)
    probes = callback.sets.first("val").probes
    x, y = data().dataset.tensors
    assert torch.equal(probes.x, x[probes.index])
    assert torch.equal(probes.label, y[probes.index])
    modules = [loaded(Net, state) for state in moments.states]
    expected = [maps_by_hand(module, probes.x, probes.label) for module in modules]
    with torch.no_grad():
        predictions = [module.eval()(probes.x).argmax(1) for module in modules]
    assert len(expected) == len(taken) == len(moments.logged) == 3
    for i, logged in enumerate(moments.logged):
        assert logged["saliency/val/flips"] == pytest.approx(float((predictions[i] != predictions[0]).float().mean()))
        for method in METHODS:
            assert_maps(taken[i][method], expected[i][method])
            for since, earlier in (("anchor", 0), ("previous", max(i - 1, 0))):
                moved = drift(quantised(expected[i][method]).maps(), quantised(expected[earlier][method]).maps())
                for name, values in moved.items():
                    key = f"saliency/val_{method}/{name}_to_{since}"
                    assert logged[key] == pytest.approx(
                        float(values.mean()), abs=0.02 if method == METHODS[1] else 1e-5
                    )
    assert moments.logged[-1]["saliency/val_gradient/iou10_to_anchor"] < 0.9  # something to see


def test_the_probe_set_is_stratified_and_a_function_of_the_seed_alone() -> None:
    def chosen(seed: int = 0, batch_size: int = 16, **settings: Any) -> Any:
        callback = SaliencySnapshots(["gradient"], samples=10, seed=seed)
        fit(zoo.built(Net), callback, validation=data(batch_size=batch_size), max_epochs=1, **settings)
        return callback.sets.first("val").probes

    first = chosen()
    assert first.label.tolist() == list(range(10))  # one of each class
    assert chosen(batch_size=7).hash == chosen(num_sanity_val_steps=0).hash == first.hash
    assert chosen(seed=1).index.tolist() != first.index.tolist()


def test_normalised_inputs_start_from_black_and_are_shown_as_pixels(tmp_path: Path) -> None:
    pixels = PixelSpace(mean=0.3, std=0.2)
    x, y = data().dataset.tensors
    normalised = DataLoader(TensorDataset((x - 0.3) / 0.2, y), 16)
    callback, moments = SaliencySnapshots(["integrated_gradients"], samples=5, pixels=pixels), Moments()
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    fit(zoo.built(Net), callback, moments, validation=normalised, max_epochs=1, logger=logger)
    probes = callback.sets.first("val").probes
    module = loaded(Net, moments.states[0])
    expected = maps_by_hand(module, probes.x, probes.label, black=-1.5)
    assert_maps(last_maps(callback, "integrated_gradients"), expected["integrated_gradients"])
    with torch.no_grad():
        sure, seen = module(probes.x).softmax(1).max(1)
    shown = callback.sets.first("val").films["integrated_gradients"].shown()
    picture = filmstrip(probes.x * 0.2 + 0.3, probes.label, seen, sure, shown, (0.0, 1.0))
    assert np.abs(images(logger, "saliency/val_integrated_gradients/filmstrip")[-1] - picture.numpy()).max() < 2 / 255


def images(logger: Any, tag: str) -> list[Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger.finalize("success")
    events = EventAccumulator(str(logger.log_dir), size_guidance={"images": 0})
    events.Reload()
    return [
        np.asarray(Image.open(io.BytesIO(event.encoded_image_string)), dtype=np.float32).transpose(2, 0, 1) / 255
        for event in events.Images(tag)
    ]


def test_one_filmstrip_a_method_is_logged_again_and_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = pl.loggers.TensorBoardLogger(tmp_path)
    callback = SaliencySnapshots(METHODS, samples=3, classes=[f"class {i}" for i in range(10)])
    fit(zoo.built(Net), callback, logger=logger, max_epochs=4)
    events = EventAccumulator(str(logger.log_dir), size_guidance={"images": 0})
    events.Reload()
    pictures = ("filmstrip", "overlays")
    assert set(events.Tags()["images"]) == {f"saliency/val_{method}/{name}" for method in METHODS for name in pictures}
    for method in METHODS:
        steps = [event.step for event in events.Images(f"saliency/val_{method}/filmstrip")]
        assert steps == [event.step for event in events.Scalars(f"saliency/val_{method}/gini")] == [3, 7, 11, 15]
    assert len(events.Scalars("saliency/val_gradcam/iou10_to_anchor")) == 4


@pytest.mark.parametrize(
    ("every", "epochs", "expected"), [(1, 3, [1, 2, 3]), (3, 7, [1, 3, 6, 7]), (4, 4, [1, 4]), (10, 3, [1, 3])]
)
def test_snapshots_are_taken_first_last_and_when_due(every: int, epochs: int, expected: list[int]) -> None:
    callback = SaliencySnapshots(["gradient"], every_n_epochs=every, samples=3)
    moments = Moments()
    fit(zoo.built(Net), callback, moments, max_epochs=epochs)
    assert [row["epoch"] for row in callback.sets.first("val").history] == expected
    assert [row["step"] for row in callback.sets.first("val").history] == [4 * epoch for epoch in expected]


class Ending(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.global_step == 10


@pytest.mark.parametrize("how", ["max_steps", "should_stop"])
def test_a_run_that_ends_early_is_photographed_at_its_end(how: str) -> None:
    callback = SaliencySnapshots(["gradient"], every_n_epochs=100, samples=3)
    others, settings = ([], {"max_steps": 12}) if how == "max_steps" else ([Ending()], {})
    trainer = fit(zoo.built(Net), callback, *others, max_epochs=50, **settings)
    assert trainer.current_epoch < 5
    assert [row["step"] for row in callback.sets.first("val").history] == [4, trainer.global_step]


def test_outside_of_a_fit_a_snapshot_is_called_by_its_step(tmp_path: Path) -> None:
    def captions(callback: SaliencySnapshots) -> list[str]:
        return [caption for caption, _ in callback.sets.first("val").films["gradient"].shown()]

    callback = SaliencySnapshots(["gradient"], samples=3)
    module = zoo.built(Net)
    trainer = fit(module, callback, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    trainer.validate(module, data(), verbose=False)
    assert captions(callback) == ["first: epoch 1", "previous: epoch 2", "now: step 8"]
    assert callback.sets.first("val").history[-1].keys() == {"step", "gradient"}
    fresh = SaliencySnapshots(["gradient"], samples=3)
    zoo.trainer(callbacks=[fresh]).validate(zoo.built(Net), data(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert captions(fresh)[-1] == "now: step 8"
    untrained = SaliencySnapshots(["gradient"], samples=3)
    zoo.trainer(callbacks=[untrained]).validate(zoo.built(Net), data(), verbose=False)
    assert captions(untrained) == ["first: validate"]


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_maps_and_drift_as_plain_tensors(tmp_path: Path) -> None:
    callback, moments = SaliencySnapshots(["gradient"], samples=4), Moments()
    trainer = fit(zoo.built(Net), callback, moments)
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    entry = torch.load(tmp_path / "full.ckpt", weights_only=True)["lightning_robust"]["saliency"]["val"]
    assert entry["hash"] == callback.sets.first("val").probes.hash
    assert entry["indices"] == callback.sets.first("val").probes.index.tolist()
    for row, logged in zip(entry["drift"], moments.logged, strict=True):
        for name, value in row["gradient"].items():
            assert logged[f"saliency/val_gradient/{name}"] == pytest.approx(value, rel=1e-6)
    anchor = entry["films"]["gradient"]["kept"][0]
    expected = maps_by_hand(
        loaded(Net, moments.states[0]), callback.sets.first("val").probes.x, callback.sets.first("val").probes.label
    )
    assert anchor["values"].dtype == torch.int16
    assert_maps(anchor["values"].double() * anchor["scale"].view(-1, 1, 1), expected["gradient"].double())


def keeping(folder: Path, **settings: Any) -> Any:
    return pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, **settings)


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_goes_on_with_the_same_anchor(tmp_path: Path, every: int) -> None:
    def run(epochs: int, path: Any = None) -> tuple[Any, Any]:
        callback = SaliencySnapshots(["gradient", "gradcam"], samples=4, every_n_epochs=every)
        checkpoints = keeping(tmp_path / str(epochs))
        trainer = fit(
            zoo.built(Net), callback, checkpoints, max_epochs=epochs, ckpt_path=path, enable_checkpointing=True
        )
        return callback, saliency(trainer)

    whole, metrics = run(5)
    resumed, same = run(5, tmp_path / "5" / "epoch=2.ckpt")
    assert resumed.sets.first("val").history == whole.sets.first("val").history
    assert same == metrics
    for method, film in whole.sets.first("val").films.items():
        assert [c for c, _ in film.shown()] == [c for c, _ in resumed.sets.first("val").films[method].shown()]
        for (_, maps), (_, other) in zip(film.shown(), resumed.sets.first("val").films[method].shown(), strict=True):
            assert torch.equal(maps, other)


def test_other_data_set_a_new_anchor_and_say_so(tmp_path: Path) -> None:
    trainer = fit(zoo.built(Net), SaliencySnapshots(["gradient"], samples=4), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    callback = SaliencySnapshots(["gradient"], samples=4)
    with pytest.warns(UserWarning, match="explain other samples.*a new anchor is set"):
        resumed = fit(zoo.built(Net), callback, max_epochs=3, ckpt_path=tmp_path / "x.ckpt", validation=data(seed=9))
    assert saliency(resumed)["saliency/val_gradient/iou10_to_anchor"] == 1
    assert [row["epoch"] for row in callback.sets.first("val").history] == [3]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_validate_measures_the_drift_to_the_anchor_of_the_checkpoint(tmp_path: Path) -> None:
    moments = Moments()
    fitting = SaliencySnapshots(METHODS, samples=4)
    weightless = keeping(tmp_path / "weights", save_weights_only=True, every_n_epochs=3)
    fit(zoo.built(Net), fitting, moments, weightless, keeping(tmp_path), enable_checkpointing=True)
    for path in (tmp_path / "epoch=2.ckpt", tmp_path / "weights" / "epoch=2.ckpt"):
        callback = SaliencySnapshots(METHODS, samples=4)
        trainer = zoo.trainer(callbacks=[callback])
        trainer.validate(zoo.built(Net), data(), ckpt_path=path, verbose=False)
        found, expected = saliency(trainer), moments.logged[-1]
        assert {k: v for k, v in found.items() if "anchor" in k or "flips" in k} == pytest.approx(
            {k: v for k, v in expected.items() if "anchor" in k or "flips" in k}, abs=1e-6
        )
        assert found["saliency/val_gradient/iou10_to_previous"] == 1  # the checkpoint's last snapshot is of its weights


def test_the_test_stage_has_a_probe_set_of_its_own() -> None:
    callback = SaliencySnapshots(["gradient"], samples=4, stages=["val", "test"], name="mine")
    module = zoo.built(Net)
    trainer = fit(module, callback)
    other = data(40, seed=5)
    trainer.test(module, other, verbose=False)
    assert saliency(trainer)["saliency.mine/test_gradient/iou10_to_anchor"] == 1
    probes = callback.sets.first("test").probes
    assert torch.equal(probes.x, other.dataset.tensors[0][probes.index])
    expected = maps_by_hand(module, probes.x, probes.label)["gradient"]
    assert_maps(last_maps(callback, "gradient", "test"), expected)
    assert set(callback.section()["saliency.mine"]) == {"val", "test"}


def test_a_checkpoint_before_the_next_validation_still_holds_the_films(tmp_path: Path) -> None:
    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / f"mid{trainer.current_epoch}.ckpt")

    def run(epochs: int, path: Any = None) -> SaliencySnapshots:
        callback = SaliencySnapshots(["gradient"], samples=4)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*resuming from a checkpoint that ended before")
            trainer = fit(zoo.built(Net), callback, Saving(), max_epochs=epochs, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        return callback

    def anchor(entry: Any) -> Tensor:
        values: Tensor = entry["val"]["films"]["gradient"]["kept"][0]["values"]
        return values

    first = run(1).section()["saliency"]
    run(2, tmp_path / "end.ckpt")
    stored = torch.load(tmp_path / "mid1.ckpt", weights_only=True)["lightning_robust"]["saliency"]
    assert [row["epoch"] for row in stored["val"]["drift"]] == [1]
    again = run(3, tmp_path / "mid1.ckpt")
    assert torch.equal(anchor(again.section()["saliency"]), anchor(first))
    assert [row["epoch"] for row in again.sets.first("val").history] == [1, 2, 3]


def test_another_run_on_other_data_has_probes_of_its_own() -> None:
    callback = SaliencySnapshots(["gradient"], samples=4)
    module = zoo.built(Net)
    fit(module, callback)
    chosen = callback.sets.first("val").probes.hash
    trainer = zoo.trainer(callbacks=[callback])
    trainer.validate(module, data(), verbose=False)  # the same data: no warning, the same anchor
    assert callback.sets.first("val").probes.hash == chosen
    assert len(callback.sets.first("val").history) == 4
    other, x = zoo.built(Net), data(seed=9)
    with pytest.warns(UserWarning, match="explain other samples.*a new anchor is set"):
        trainer.validate(other, x, verbose=False)
    assert saliency(trainer)["saliency/val_gradient/iou10_to_anchor"] == 1
    probes = callback.sets.first("val").probes
    assert torch.equal(probes.x, x.dataset.tensors[0][probes.index])
    assert_maps(last_maps(callback, "gradient"), maps_by_hand(other, probes.x, probes.label)["gradient"])


class Tokens(zoo.ListBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(30, 8), nn.Flatten(), nn.Linear(40, 10))


def test_token_ids_have_no_gradient_and_end_no_run() -> None:
    loader = DataLoader(TensorDataset(torch.arange(320).view(64, 5) % 30, zoo.labels(64)), 16)
    callback = SaliencySnapshots(["gradient"], samples=4)
    with pytest.warns(UserWarning, match="no floating-point input") as seen:
        trainer = fit(zoo.built(Tokens), callback, training=loader, validation=loader)
    assert sum("SaliencySnapshots" in str(w.message) for w in seen) == 1
    assert trainer.current_epoch == 3
    assert not saliency(trainer)
    assert callback.section() == {}


# -- strangers -------------------------------------------------------------------------------------------------------


class Tabular(zoo.ListBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def test_tables_have_no_pictures_and_no_grad_cam_but_drift(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    x, y = data().dataset.tensors
    table = DataLoader(TensorDataset(x.flatten(1), y), 16)
    callback, moments = SaliencySnapshots(METHODS, samples=4), Moments()
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"gradcam needs a feature map.*\(N, 64\)") as caught:
        fit(zoo.built(Tabular), callback, moments, training=table, validation=table, logger=logger)
    assert sum("gradcam" in str(w.message) for w in caught) == 1
    logged = moments.logged[-1]
    assert not any("gradcam" in key for key in logged)
    assert logged["saliency/val_gradient/iou10_to_anchor"] <= 1
    probes = callback.sets.first("val").probes
    leaf = probes.x.clone().requires_grad_()
    z = loaded(Tabular, moments.states[-1]).eval()(leaf)
    (gradient,) = torch.autograd.grad(z.gather(1, probes.label[:, None]).sum(), leaf)
    assert_maps(last_maps(callback, "gradient"), gradient.abs())
    logger.finalize("success")
    events = EventAccumulator(str(logger.log_dir))
    events.Reload()
    assert not events.Tags()["images"]


class VisionTransformer(zoo.ListBatch):
    """Patches of 2x2, a class token, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1)
        return self.head(self.encoder(tokens)[:, 0])


def test_a_vision_transformer_has_maps_by_gradients_by_activations_and_by_attention() -> None:
    methods = ["gradient", "integrated_gradients", "gradcam", "layercam", "attention_rollout"]
    callback = SaliencySnapshots(methods, samples=4, strict=True)
    trainer = fit(zoo.built(VisionTransformer), callback, max_epochs=2)
    films = callback.sets.first("val").films
    assert films.keys() == set(methods)
    for method in methods:
        maps = films[method].shown()[-1][1]
        assert maps.shape == (4, 8, 8)
        assert bool(maps.flatten(1).std(1).gt(0).any())
        assert f"saliency/val_{method}/iou10_to_anchor" in trainer.callback_metrics


class NoConvolution(zoo.ListBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_without_a_convolution_grad_cam_is_left_out_with_one_warning() -> None:
    with pytest.warns(UserWarning, match="no convolution") as caught:
        trainer = fit(zoo.built(NoConvolution), SaliencySnapshots(METHODS, samples=4))
    assert sum("SaliencySnapshots" in str(w.message) for w in caught) == 1
    assert {key.split("/")[1] for key in saliency(trainer)} == {"val", "val_gradient", "val_integrated_gradients"}


def test_a_layer_can_be_named_and_a_wrong_name_stops_before_training() -> None:
    callback, moments = SaliencySnapshots(["gradcam"], samples=4, layer="net.0"), Moments()
    fit(zoo.built(Net), callback, moments)
    probes = callback.sets.first("val").probes
    named, found = (
        maps_by_hand(loaded(Net, moments.states[-1]), probes.x, probes.label, layer)["gradcam"]
        for layer in ("net.0", "net.2")
    )
    assert_maps(last_maps(callback, "gradcam"), named)
    assert not torch.allclose(named, found)
    trainer = zoo.trainer(callbacks=[SaliencySnapshots(["gradcam"], layer="net.conv")])
    with pytest.raises(ValueError, match=r"layer='net\.conv'.*net\.0, net\.1"):
        trainer.fit(zoo.built(Net), data(), data())
    assert trainer.global_step == 0


class OneLogit(zoo.ListBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.binary_cross_entropy_with_logits(self(x), y.float().unsqueeze(1))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_a_yes_no_head_is_explained_for_the_answer_that_is_right() -> None:
    callback, moments = SaliencySnapshots(["integrated_gradients"], samples=6), Moments()
    fit(zoo.built(OneLogit), callback, moments, training=data(64, 0, classes=2), validation=data(classes=2))
    probes = callback.sets.first("val").probes
    assert probes.label.tolist() == [0, 0, 0, 1, 1, 1]
    module = loaded(OneLogit, moments.states[-1]).eval()
    maps = IntegratedGradients(module).attribute(probes.x, n_steps=16, method="riemann_middle").sum(1)
    sign = torch.where(probes.label == 1, 1.0, -1.0).view(-1, 1, 1)
    assert_maps(last_maps(callback, "integrated_gradients"), maps * sign)
    with torch.no_grad():
        before, after = (
            (loaded(OneLogit, s).eval()(probes.x) > 0).long() for s in (moments.states[0], moments.states[-1])
        )
    assert moments.logged[-1]["saliency/val/flips"] == pytest.approx(float((before != after).float().mean()))


class LogSoftmax(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).log_softmax(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.nll_loss(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_a_log_softmax_head_is_explained_as_it_is() -> None:
    callback, moments = SaliencySnapshots(METHODS, samples=4), Moments()
    fit(zoo.built(LogSoftmax), callback, moments)
    probes = callback.sets.first("val").probes
    expected = maps_by_hand(loaded(LogSoftmax, moments.states[-1]), probes.x, probes.label)
    for method in METHODS:
        assert_maps(last_maps(callback, method), expected[method])


class Segmentation(zoo.ListBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 3, 3, padding=1)


def test_segmentation_gets_one_warning_and_the_run_goes_on() -> None:
    x, _ = data().dataset.tensors
    loader = DataLoader(TensorDataset(x, (x[:, 0] * 2.99).long()), 16)
    with pytest.warns(UserWarning, match="one class a sample can be explained") as caught:
        trainer = fit(zoo.built(Segmentation), SaliencySnapshots(samples=4), training=loader, validation=loader)
    assert sum("one class a sample" in str(w.message) for w in caught) == 1
    assert trainer.current_epoch == 3
    assert not saliency(trainer)


def test_samples_without_a_label_are_no_probes() -> None:
    x, y = data().dataset.tensors
    y = torch.where(torch.arange(len(y)) % 2 == 0, -100, y)
    callback = SaliencySnapshots(METHODS, samples=30)
    fit(zoo.built(Net), callback, validation=DataLoader(TensorDataset(x, y), 16))
    assert sorted(callback.sets.first("val").probes.index.tolist()) == list(range(1, 60, 2))


class OddValidation(Net):
    """Another make of batch in validation, written into by the step, without a loss, from the second loader too."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        batch["x"].mul_(2).sub_(1)
        return self.net(batch["x"]).argmax(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["x"] * 2 - 1), batch["y"])


def test_a_step_that_writes_into_its_batch_and_has_no_loss_is_explained_all_the_same() -> None:
    def loader(seed: int) -> Any:
        x, y = data(seed=seed).dataset.tensors
        rows = [{"x": x[i], "y": y[i], "id": f"{i}"} for i in range(len(x))]
        return DataLoader(rows, 16)

    callback, moments = SaliencySnapshots(METHODS, samples=4), Moments()
    fit(zoo.built(OddValidation), callback, moments, training=loader(0), validation=[loader(1), loader(2)])
    probes = callback.sets.first("val").probes
    assert torch.equal(probes.x, data().dataset.tensors[0][probes.index])
    module = loaded(OddValidation, moments.states[-1]).eval()
    leaf = probes.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module.net(leaf * 2 - 1).gather(1, probes.label[:, None]).sum(), leaf)
    assert_maps(last_maps(callback, "gradient"), gradient.abs().sum(1))


@zoo.averaging
@pytest.mark.parametrize("last", [False, True])
def test_averaged_weights_are_explained_where_validation_measures_them(last: bool) -> None:
    callback, moments = SaliencySnapshots(METHODS, samples=4), Moments()
    average, trained = pl.callbacks.EMAWeightAveraging(decay=0.7), {}

    class Trained(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trained.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    callbacks = [average, callback, moments, Trained()]
    fit(zoo.built(Net), *(reversed(callbacks) if last else callbacks), max_epochs=2)
    probes = callback.sets.first("val").probes
    expected = maps_by_hand(loaded(Net, moments.states[1]), probes.x, probes.label)
    for method in METHODS:
        assert_maps(last_maps(callback, method), expected[method])
    others = maps_by_hand(loaded(Net, trained), probes.x, probes.label)
    assert float(drift(expected["gradient"], others["gradient"])["iou10"].mean()) < 0.99


# -- nothing changes -------------------------------------------------------------------------------------------------


def sha(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_training_run_does_not_change_by_a_bit(workers: int) -> None:
    def run(*callbacks: Any) -> tuple[str, Tensor]:
        module = zoo.built(zoo.SharedStepWithMetrics)  # dropout, BatchNorm, metrics
        dataset = data(64, 0).dataset
        training = DataLoader(dataset, 16, shuffle=True, num_workers=workers)
        validation = DataLoader(data().dataset, 16, num_workers=workers)
        fit(module, *callbacks, training=training, validation=validation)
        return sha(module), torch.rand(3)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
        expected, stream = run()
        found, same = run(SaliencySnapshots(METHODS, samples=4))
    assert found == expected
    assert torch.equal(stream, same)


def left(module: nn.Module) -> list[Any]:
    ours = ("training_step", "validation_step", "on_save_checkpoint", "log", "log_dict", "manual_backward")
    hooks = [hook for part in module.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]
    return hooks + [name for part in module.modules() for name in ours if name in vars(part)]


def test_nothing_is_left_on_the_module_after_a_run_or_a_crash() -> None:
    module = zoo.built(Net)
    callback = SaliencySnapshots(METHODS, samples=4)
    trainer = fit(module, callback)
    trainer.validate(module, data(), verbose=False)
    assert not left(module)
    assert all(p.requires_grad for p in module.parameters())

    class Crashing(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1 and self.trainer.current_epoch == 1:
                raise ZeroDivisionError
            super().validation_step(batch, batch_idx)

    module = zoo.built(Crashing)
    with pytest.raises(ZeroDivisionError):
        fit(module, SaliencySnapshots(METHODS, samples=4))
    assert not left(module)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SaliencySnapshots("gradient"), "a list of methods"),
        (lambda: SaliencySnapshots([]), "a list of methods"),
        (lambda: SaliencySnapshots(["grad-cam"]), "Did you mean 'gradcam'"),
        (lambda: SaliencySnapshots(every_n_epochs=0), "at least 1"),
        (lambda: SaliencySnapshots(samples=0), "at least 1"),
        (lambda: SaliencySnapshots(stages=["train"]), "'val', 'test'"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_a_probe_set_larger_than_a_batch_and_than_the_data_is_explained() -> None:
    callback, moments = SaliencySnapshots(["gradient"], samples=40), Moments()
    fit(zoo.built(Net), callback, moments, validation=data(30, batch_size=7))
    probes = callback.sets.first("val").probes
    assert len(probes) == 30
    expected = maps_by_hand(loaded(Net, moments.states[-1]), probes.x, probes.label)["gradient"]
    assert_maps(last_maps(callback, "gradient"), expected)


def test_one_callback_serves_a_second_run_from_its_own_anchor() -> None:
    callback, moments = SaliencySnapshots(["gradient"], samples=4), Moments()
    fit(zoo.built(Net), callback)
    fit(zoo.built(Net), callback, moments)
    assert moments.logged[0]["saliency/val_gradient/iou10_to_anchor"] == 1
    assert len(callback.sets.first("val").history) == 3


def test_two_processes_explain_the_samples_and_log_the_numbers_of_one(tmp_path: Path) -> None:
    script, result = Path(__file__).parent / "two_processes_saliency.py", tmp_path / "result.json"
    subprocess.run([sys.executable, script, "snapshots", result], check=True, timeout=240, capture_output=True)
    found = json.loads(result.read_text())
    assert len(found["1"]) == 1 + 2 * 13 + 6  # flips, two methods, the numbers of the probes
    assert found["2"] == pytest.approx(found["1"], abs=1e-6)
    assert found["1"]["saliency/val_gradient/iou10_to_anchor"] < 0.9
