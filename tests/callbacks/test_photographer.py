"""What a snapshot measures of the maps, when it is taken, and where it goes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PGD, PixelSpace, SaliencySnapshots, ThreatModel
from lightning_robust.saliency.concentration import concentration, mass, region_named
from lightning_robust.saliency.drift import quantised
from lightning_robust.saliency.ensemble import ensemble
from lightning_robust.saliency.methods import METHODS
from lightning_robust.saliency.quality import quality
from lightning_robust.saliency.sanity import noise_floor, null_similarity


def data(n: int = 60, seed: int = 1) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n, seed), zoo.labels(n)), 16)


class Net(zoo.ListBatch):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def fit(*callbacks: Any, **settings: Any) -> tuple[Any, pl.Trainer]:
    module = zoo.built(Net)
    trainer = zoo.trainer(**{"max_epochs": 1, "callbacks": list(callbacks), **settings})
    trainer.fit(module, data(64, 0), data())
    return module, trainer


def values(trainer: pl.Trainer, where: str) -> dict[str, float]:
    """What was logged, by metric; what stands in ``callback_metrics`` is the same."""
    (callback,) = (c for c in trainer.callbacks if isinstance(c, SaliencySnapshots))
    for key, value in trainer.callback_metrics.items():
        if key.startswith("saliency"):
            assert float(value) == pytest.approx(callback.measured[key], rel=1e-5, nan_ok=True)
    start = f"saliency/{where}/"
    return {k.removeprefix(start): v for k, v in callback.measured.items() if k.startswith(start)}


def test_null_and_floor_are_those_of_the_function_for_plain_loops() -> None:
    callback = SaliencySnapshots(["gradient"], samples=6, seed=3)
    module, trainer = fit(callback)
    probes, found = callback.sets.first("val").probes, values(trainer, "val_gradient")
    module.eval()

    def explain(x: Tensor) -> Tensor:
        return quantised(METHODS["gradient"](module, x, probes.label)).maps()

    null = null_similarity(module, explain, probes.x, seed=3)
    floor = noise_floor(module, explain, probes.x, spread=1.0, seed=3)
    for name in ("iou10", "cosine", "spearman", "ssim"):
        assert found[f"{name}_null"] == pytest.approx(null[name], abs=1e-5)
        assert found[f"{name}_floor"] == pytest.approx(floor[name], abs=1e-5)
        assert found[f"{name}_to_anchor"] == 1
    assert found["iou10_skill_to_anchor"] > 1  # equal maps are nearer than those of noisy inputs


def test_where_maps_look_is_measured_as_the_functions_do() -> None:
    callback = SaliencySnapshots(["gradient"], samples=6)
    module, trainer = fit(callback)
    probes, found = callback.sets.first("val").probes, values(trainer, "val_gradient")
    maps = METHODS["gradient"](module.eval(), probes.x, probes.label)
    for name, expected in concentration(maps).items():
        assert found[name] == pytest.approx(float(expected.mean()), rel=1e-5)
    for name in ("border", "corners"):
        expected = mass(maps, region_named(name, maps.shape)).mean()
        assert found[f"mass_on_{name}"] == pytest.approx(float(expected), rel=1e-5)


def test_an_ensemble_is_the_mean_of_all_and_says_how_far_they_agree() -> None:
    callback = SaliencySnapshots(["gradient", "integrated_gradients"], samples=5, ensemble=True)
    module, trainer = fit(callback)
    probes = callback.sets.first("val").probes
    module.eval()
    together = ensemble([METHODS[name](module, probes.x, probes.label) for name in callback.methods])
    film = callback.sets.first("val").films["ensemble"]
    step = together.mean.abs().flatten(1).amax(1) / 127
    gap = (film.shown()[-1][1] - together.mean).abs().flatten(1).amax(1)
    assert bool((gap <= 0.51 * step + 1e-6).all())
    assert values(trainer, "val")["agreement"] == pytest.approx(float(together.agreement.mean()), abs=1e-5)
    assert "iou10_to_anchor" in values(trainer, "val_ensemble")


def test_quality_is_that_of_the_function() -> None:
    callback = SaliencySnapshots(["gradient"], samples=4, quality=True)
    module, trainer = fit(callback)
    probes, found = callback.sets.first("val").probes, values(trainer, "val_gradient")
    module.eval()
    expected = quality(
        lambda x: METHODS["gradient"](module, x, probes.label), module, probes.x, probes.label, radius=0.02
    )
    assert expected.keys() <= found.keys()
    for name, per_sample in expected.items():
        assert found[name] == pytest.approx(float(per_sample.mean()), rel=1e-3, abs=1e-4)


class Large(zoo.ListBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 5, stride=5), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.net.append(nn.Linear(32, 10))


def test_large_pictures_are_kept_and_shown_small(tmp_path: Path) -> None:
    x = torch.rand(12, 1, 230, 300, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, zoo.labels(12)), 6)
    callback = SaliencySnapshots(["gradient"], samples=2, strict=True)
    trainer = zoo.trainer(callbacks=[callback], default_root_dir=tmp_path)
    trainer.fit(zoo.built(Large), loader, loader)
    assert callback.sets.first("val").films["gradient"].shown()[0][1].shape == (2, 115, 150)
    with Image.open(tmp_path / "saliency" / "val_gradient" / "filmstrip.png") as picture:
        assert 2 * 115 < picture.height < 2 * 230


def edges(logits_fn: Any, x: Tensor, target: Tensor) -> Tensor:
    """Looks at the input alone."""
    maps: Tensor = (x - x.roll(1, -1)).abs().sum(1)
    return maps


def test_a_method_that_ignores_the_weights_is_called_out_and_a_user_s_function_is_a_method() -> None:
    with pytest.warns(UserWarning, match="edges hardly looks at the weights"):
        _, trainer = fit(SaliencySnapshots([edges, "gradient"], samples=6))
    assert math.isnan(values(trainer, "val_edges")["iou10_skill_to_anchor"])
    assert math.isfinite(values(trainer, "val_gradient")["iou10_skill_to_anchor"])


def test_at_the_end_the_weights_are_taken_away_layer_by_layer_and_put_back(tmp_path: Path) -> None:
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    callback = SaliencySnapshots(["gradient"], samples=4, cascade=True)
    module, _ = fit(callback, logger=logger, max_epochs=2)
    plain, _ = fit(max_epochs=2)
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    logger.finalize("success")
    events = EventAccumulator(str(logger.log_dir), size_guidance={"tensors": 0})
    events.Reload()
    (text,) = events.Tensors("saliency/val_gradient/cascade/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert "| permuted, from the output down (4 samples) |" in table
    assert "fine: maps change with the weights" in table


def test_without_sanity_there_is_no_skill() -> None:
    _, trainer = fit(SaliencySnapshots(["gradient"], samples=4, sanity=False))
    assert not any("skill" in name or "null" in name for name in values(trainer, "val_gradient"))


def test_a_method_that_does_not_fit_the_module_is_left_out_with_its_reason() -> None:
    def picky(logits_fn: Any, x: Tensor, target: Tensor) -> Tensor:
        raise ValueError("needs pictures of 9x9")

    with pytest.warns(UserWarning, match="picky is left out: needs pictures of 9x9") as caught:
        _, trainer = fit(SaliencySnapshots([picky, "gradient"], samples=4), max_epochs=2)
    assert sum("picky" in str(w.message) for w in caught) == 1
    assert values(trainer, "val_gradient")
    assert not values(trainer, "val_picky")


def with_channels(logits_fn: Any, x: Tensor, target: Tensor) -> Tensor:
    """What a user writes first: a gradient shaped like its input."""
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(logits_fn(leaf).gather(1, target[:, None]).sum(), leaf)
    return gradient


def test_channels_that_a_user_s_method_leaves_are_summed() -> None:
    _, trainer = fit(SaliencySnapshots([with_channels], samples=4, strict=True))
    assert "iou10_to_anchor" in values(trainer, "val_with_channels")


def test_a_method_that_fails_in_mid_run_leaves_the_others_alone() -> None:
    calls = [0]

    def sometimes(logits_fn: Any, x: Tensor, target: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > 1:  # not in the rehearsal
            raise RuntimeError("out of luck")
        return x[:, 0]

    with pytest.warns(UserWarning, match="sometimes failed and is left out: RuntimeError: out of luck"):
        _, trainer = fit(SaliencySnapshots(["gradient", sometimes], samples=4))
    assert "gini" in values(trainer, "val_gradient")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"region_key": 7}, "7"),
        ({"region_key": 1}, "expected a region"),
        ({"extra": {"other": [torch.zeros(4, 1, 5, 5)]}}, r"probe set 'other': expected inputs like"),
        (
            {"attack": PGD(ThreatModel("linf", 0.1, PixelSpace(bounds=(3.0, 4.0))), steps=1)},
            r"expected pixels within \[3, 4\]",
        ),
        ({"pixels": PixelSpace(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))}, "channels"),
    ],
    ids=str,
)
def test_wrong_settings_end_the_run_while_nothing_is_lost(settings: dict[str, Any], says: str) -> None:
    trainer = zoo.trainer(callbacks=[SaliencySnapshots(["gradient"], samples=4, **settings)])
    with pytest.raises((KeyError, IndexError, ValueError), match=says):
        trainer.fit(zoo.built(Net), data(64, 0), data())
    assert trainer.global_step == 0


def test_inputs_outside_of_the_pixel_space_are_said_once() -> None:
    x, y = data().dataset.tensors
    loader = DataLoader(TensorDataset((x - 0.5) / 0.2, y), 16)
    trainer = zoo.trainer(callbacks=[SaliencySnapshots(["gradient"], samples=4)], max_epochs=2)
    with pytest.warns(UserWarning, match=r"inputs lie in \[-2.*\], outside of the pixel space \[0, 1\]") as caught:
        trainer.fit(zoo.built(Net), loader, loader)
    assert sum("pixel space" in str(w.message) for w in caught) == 1


class ProbabilityOfYes(zoo.ListBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))

    def shared(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.binary_cross_entropy(self.net(x).sigmoid(), y.float().unsqueeze(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.shared(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.shared(batch))


def test_probabilities_that_a_loss_gets_are_explained_by_their_logit() -> None:
    loader = DataLoader(TensorDataset(zoo.images(40), zoo.labels(40, 2)), 16)
    callback = SaliencySnapshots(["gradient"], samples=4)
    module = zoo.built(ProbabilityOfYes)
    zoo.trainer(callbacks=[callback]).fit(module, loader, loader)
    weight = module.net[1].weight.detach().abs().view(8, 8)
    found = callback.sets.first("val").films["gradient"].shown()[-1][1]
    torch.testing.assert_close(found, weight.expand(4, -1, -1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("logger", ["none", "csv"])
def test_without_a_logger_of_pictures_they_are_files_of_the_run(tmp_path: Path, logger: str) -> None:
    settings: dict[str, Any] = {"default_root_dir": tmp_path}
    if logger == "csv":
        settings["logger"] = pl.loggers.CSVLogger(tmp_path, version=0)
    _, trainer = fit(SaliencySnapshots(["gradient"], samples=4, cascade=True), **settings)
    folder = tmp_path if logger == "none" else Path(trainer.logger.log_dir)
    for name in ("filmstrip", "overlays"):
        with Image.open(folder / "saliency" / "val_gradient" / f"{name}.png") as file:
            picture = np.asarray(file)
        assert picture.ndim == 3
        assert picture.std() > 10
    assert "permuted" in (folder / "saliency" / "val_gradient" / "cascade.md").read_text()


class Rows(pl.Callback):
    """When snapshots were there, in optimizer steps."""

    def __init__(self, snapshots: SaliencySnapshots) -> None:
        self.snapshots = snapshots

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.snapshots.sets.first("val").history]


@zoo.recent
def test_every_so_many_validations_is_counted_over_epochs_and_resumes(tmp_path: Path) -> None:
    def run(epochs: int, path: Any = None) -> SaliencySnapshots:
        callback = SaliencySnapshots(["gradient"], samples=3, every_n_validations=3)
        keeping = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        module = zoo.built(Net)
        trainer = zoo.trainer(
            max_epochs=epochs, callbacks=[callback, keeping], val_check_interval=0.5, enable_checkpointing=True
        )
        trainer.fit(module, data(64, 0), data(), ckpt_path=path)
        return callback

    whole = run(5)
    # Four steps an epoch, a validation every two: the first, every third, and the two of the last epoch.
    assert Rows(whole).steps == [2, 6, 12, 18, 20]
    resumed = run(5, tmp_path / "epoch=1.ckpt")
    assert Rows(resumed).steps == Rows(whole).steps


def test_every_so_many_steps_lies_between_validations_and_is_logged_at_once(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    callback = SaliencySnapshots(["gradient"], samples=3, every_n_steps=3)
    _, trainer = fit(callback, max_epochs=4, logger=logger, log_every_n_steps=1000)
    # The probes are known from the first validation on, after step 4.
    assert Rows(callback).steps == [4, 6, 9, 12, 15, 16]
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    place, when = (lines[0].split(",").index(name) for name in ("saliency/val_gradient/iou10_to_previous", "step"))
    logged = [int(line.split(",")[when]) for line in lines[1:] if line.split(",")[place]]
    assert {5, 8, 11, 14} <= set(logged)  # as Lightning counts: the first step is 0
    assert "saliency/val_gradient/iou10_to_anchor" in trainer.callback_metrics


def test_training_goes_on_as_if_no_snapshot_had_been_taken_between_its_steps() -> None:
    def run(*callbacks: Any) -> Tensor:
        module = zoo.built(zoo.SharedStepWithMetrics)  # dropout, BatchNorm, metrics
        trainer = zoo.trainer(callbacks=list(callbacks), max_epochs=3)
        trainer.fit(module, DataLoader(data(64, 0).dataset, 16, shuffle=True), data())
        return torch.cat([value.double().flatten() for value in module.state_dict().values()] + [torch.rand(2)])

    snapshots = SaliencySnapshots(
        ["gradient", "smoothgrad"], samples=3, every_n_steps=1, ensemble=True, quality=True, budget=None
    )
    assert torch.equal(run(snapshots), run())
    assert len(Rows(snapshots).steps) > 6


def test_snapshots_over_budget_are_skipped_and_counted_but_not_the_first_and_the_last() -> None:
    callback = SaliencySnapshots(["gradient"], samples=3)
    now = [0.0]
    callback._budget._clock = lambda: now[0]

    class Slow(pl.Callback):
        """Snapshots take a minute, epochs ten seconds."""

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            now[0] += 10

    spent = callback._photographer.take

    def take(*args: Any, **kwargs: Any) -> Any:
        now[0] += 60
        return spent(*args, **kwargs)

    object.__setattr__(callback._photographer, "take", take)
    with pytest.warns(UserWarning, match="one more snapshot would take more than 5% of the training time"):
        _, trainer = fit(callback, Slow(), max_epochs=6)
    # The anchor is free, and no measure of the next one.
    assert Rows(callback).steps == [4, 8, 24]
    assert values(trainer, "val")["skipped"] == 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"every_n_steps": 0}, "at least 1"),
        ({"every_n_steps": 2, "every_n_validations": 2}, "one of every_n_epochs"),
        ({"every_n_steps": 2, "every_n_epochs": 2}, "one of every_n_epochs"),
        ({"budget": 0.0}, r"in \(0, 1\]"),
        ({"alarm": 1.5}, r"in \(0, 1\]"),
        ({"methods": ["gradient", "gradient"]}, "different names"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SaliencySnapshots(**settings)
