"""Robust accuracy: the numbers by hand, in every kind of run, and a training run that does not notice."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PGD, PixelSpace, RobustAccuracy, ThreatModel, read_entry
from lightning_robust.attach.checkpoint import unpack_bits
from lightning_robust.attach.watcher import ProbeError

THREAT = ThreatModel("linf", 0.05)


def data(n: int = 101, batch_size: int = 16, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n), zoo.labels(n)), batch_size, shuffle=shuffle)


class WithTestStep(zoo.ListBatch):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))


def trained(shape: type[zoo.Shape] = WithTestStep) -> zoo.Shape:
    """A net that knows its 101 images by heart, so that there is accuracy to lose."""
    module = zoo.built(shape)
    zoo.trainer(max_epochs=15).fit(module, data())
    return module


def by_hand(module: Any, attack: PGD, n: int = 101) -> tuple[Tensor, Tensor]:
    """Right without and right under a zero-start attack, sample by sample."""
    net, (x, y) = module.net.eval(), (zoo.images(n), zoo.labels(n))
    perturbed = attack(net, x, y)
    with torch.no_grad():
        return net(x).argmax(1) == y, (net(perturbed).argmax(1) == y) & (net(x).argmax(1) == y)


def test_both_accuracies_are_those_of_a_hand_written_loop_in_validate_and_test() -> None:
    module, attack = trained(), PGD(THREAT, steps=4, start="zero")
    clean, robust = by_hand(module, attack)
    assert 0.1 < float(robust.float().mean()) < float(clean.float().mean()) - 0.05  # a case where an error would show
    for stage in ("val", "test"):
        trainer = zoo.trainer(callbacks=[RobustAccuracy(attack)])
        run = trainer.validate if stage == "val" else trainer.test
        run(module, data(), verbose=False)
        metrics = trainer.callback_metrics
        assert float(metrics[f"robust/{stage}/clean_accuracy"]) == pytest.approx(float(clean.float().mean()), abs=1e-7)
        assert float(metrics[f"robust/{stage}/accuracy"]) == pytest.approx(float(robust.float().mean()), abs=1e-7)
        assert metrics[f"robust/{stage}/accuracy_pgd4_linf_0.05"] == metrics[f"robust/{stage}/accuracy"]


def test_the_worst_case_over_attacks_is_taken_sample_by_sample() -> None:
    module = trained()
    attacks = {"linf": PGD(THREAT, steps=3, start="zero"), "l2": PGD(ThreatModel("l2", 0.35), steps=3, start="zero")}
    alone = {name: by_hand(module, attack)[1] for name, attack in attacks.items()}
    both = alone["linf"] & alone["l2"]
    trainer = zoo.trainer(callbacks=[RobustAccuracy(attacks)])
    trainer.validate(module, data(), verbose=False)
    for name, right in alone.items():
        assert float(trainer.callback_metrics[f"robust/val/accuracy_{name}"]) == pytest.approx(
            float(right.float().mean())
        )
    assert float(trainer.callback_metrics["robust/val/accuracy"]) == pytest.approx(float(both.float().mean()))


def test_results_do_not_depend_on_the_batch_size() -> None:
    module, seen = trained(), []
    for batch_size in (101, 16, 7):
        callback = RobustAccuracy(PGD(THREAT, steps=3, restarts=2))
        zoo.trainer(callbacks=[callback]).validate(module, data(batch_size=batch_size), verbose=False)
        seen.append(callback._entry["attacks"]["pgd3x2_linf_0.05"]["correct"].tolist())
    assert seen[0] == seen[1] == seen[2]


def test_max_samples_takes_the_first_ones() -> None:
    module, attack = trained(), PGD(THREAT, steps=2, start="zero")
    clean, _robust = by_hand(module, attack)
    trainer = zoo.trainer(callbacks=[RobustAccuracy(attack, max_samples=37)])
    trainer.validate(module, data(), verbose=False)
    assert float(trainer.callback_metrics["robust/val/clean_accuracy"]) == pytest.approx(
        float(clean[:37].float().mean())
    )


class Noticing(pl.Callback):
    """Hashes every value that the user logs, step by step."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._add(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._add(trainer)

    def _add(self, trainer: Any) -> None:
        mine = {k: v.item() for k, v in trainer.callback_metrics.items() if not k.startswith("robust")}
        self.digest.update(repr(sorted(mine.items())).encode())


class Noisy(zoo.SharedStepWithMetrics):
    """Dropout, BatchNorm, numpy mixup, metrics, and a learning rate that follows the validation loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        lam = np.random.beta(1, 1)
        x = lam * x + (1 - lam) * x[torch.randperm(len(x))]
        return self._step((x, y), "train")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork.*:DeprecationWarning")
def test_a_monitor_changes_nothing() -> None:
    hashes = []
    for monitors in ([], [RobustAccuracy(PGD(THREAT, steps=2, restarts=2), max_samples=40)]):
        module, noticing = zoo.built(Noisy), Noticing()
        training = DataLoader(TensorDataset(zoo.images(64), zoo.labels(64)), 16, shuffle=True, num_workers=2)
        zoo.trainer(max_epochs=3, callbacks=[*monitors, noticing]).fit(module, training, data(50))
        weights = hashlib.sha256(b"".join(v.numpy().tobytes() for v in module.state_dict().values())).hexdigest()
        hashes.append((weights, noticing.digest.hexdigest(), torch.rand(1).item(), np.random.rand()))
    assert hashes[0] == hashes[1]


def test_the_checkpoint_holds_what_was_measured_on_its_own_weights(tmp_path: Any) -> None:
    for weights_only in (False, True):
        keep = pl.callbacks.ModelCheckpoint(
            tmp_path / str(weights_only),
            monitor="robust/val/accuracy",
            mode="max",
            save_weights_only=weights_only,
            save_top_k=-1,
        )
        attack = PGD(THREAT, steps=2, start="zero", keep="last")
        trainer = zoo.trainer(max_epochs=3, enable_checkpointing=True, callbacks=[keep, RobustAccuracy(attack)])
        module = zoo.built(WithTestStep)
        trainer.fit(module, data(), data())
        assert len(keep.best_k_models) == 3
        for path in keep.best_k_models:
            entry = read_entry(path)
            stored = WithTestStep()
            stored.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
            clean, robust = by_hand(stored, attack)
            kept = entry["robust"]["attacks"]["pgd2_linf_0.05"]
            assert entry["format"] == 1
            assert unpack_bits(kept["correct"], kept["n"]).tolist() == robust.tolist()
            assert unpack_bits(entry["robust"]["clean_correct"], 101).tolist() == clean.tolist()
            assert kept["accuracy"] == pytest.approx(float(robust.float().mean()))
            assert entry["route"]["validation_step"]["module"] == "net"


class SilentTest(zoo.Shape):
    """Trains with a loss, tests without one, validates not at all."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).argmax(1)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_fresh_trainer_tests_a_checkpoint_whose_test_step_has_no_loss(tmp_path: Any, weights_only: bool) -> None:
    from lightning_robust import AdversarialTraining

    module = zoo.built(SilentTest)
    keep = pl.callbacks.ModelCheckpoint(tmp_path, save_weights_only=weights_only)
    adversarial = AdversarialTraining(PGD(THREAT, steps=1))
    zoo.trainer(max_epochs=2, enable_checkpointing=True, callbacks=[keep, adversarial]).fit(module, data())
    attack = PGD(THREAT, steps=2, start="zero")
    fresh, trainer = SilentTest(), zoo.trainer(callbacks=[RobustAccuracy(attack)])
    trainer.test(fresh, data(), ckpt_path=keep.best_model_path, verbose=False)
    _clean, robust = by_hand(module, attack)
    assert float(trainer.callback_metrics["robust/test/accuracy"]) == pytest.approx(float(robust.float().mean()))


def test_several_loaders_keep_their_names_and_the_first_its_plain_keys() -> None:
    class Two(zoo.ListBatch):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    module, attack = zoo.built(Two), PGD(THREAT, steps=1, start="zero")
    trainer = zoo.trainer(callbacks=[RobustAccuracy(attack)])
    trainer.validate(module, [data(30), data(20)], verbose=False)
    assert {k for k in trainer.callback_metrics if k.startswith("robust")} == {
        f"robust/val/{metric}{suffix}"
        for metric in (
            *("clean_accuracy", "accuracy", "accuracy_pgd1_linf_0.05", "worst_class_accuracy"),
            *("interval_low", "interval_high", "samples"),
        )
        for suffix in ("", "/1")
    }


def test_a_named_callback_has_keys_and_a_checkpoint_section_of_its_own(tmp_path: Any) -> None:
    callbacks = [
        RobustAccuracy(PGD(THREAT, steps=1), max_samples=8),
        RobustAccuracy(PGD(THREAT, steps=2), max_samples=8, name="strong"),
        pl.callbacks.ModelCheckpoint(tmp_path, save_last=True),
    ]
    trainer = zoo.trainer(enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(zoo.built(WithTestStep), data(16), data(16))
    assert {"robust/val/accuracy", "robust.strong/val/accuracy"} <= set(trainer.callback_metrics)
    entry = read_entry(tmp_path / "last.ckpt")
    assert set(entry["robust"]["attacks"]) == {"pgd1_linf_0.05"}
    assert set(entry["robust.strong"]["attacks"]) == {"pgd2_linf_0.05"}


@pytest.mark.parametrize("shape", [zoo.SigmoidMultiLabel, zoo.OneLogitBinary], ids=lambda s: s.__name__)
def test_binary_and_multi_label_heads_have_an_accuracy_too(shape: type[zoo.Shape]) -> None:
    class Validating(shape):  # type: ignore[misc, valid-type]  # the class is a parameter
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

    module = zoo.built(Validating).eval()
    x, y = shape.batch(16)
    with torch.no_grad():
        right = ((module.net(x) > 0).float() == y.view(16, -1)).float().mean(1)
    trainer = zoo.trainer(callbacks=[RobustAccuracy(PGD(ThreatModel("linf", 0.3), steps=5))])
    trainer.validate(module, zoo.loader(Validating, (16,)), verbose=False)
    metrics = trainer.callback_metrics
    assert float(metrics["robust/val/clean_accuracy"]) == pytest.approx(float(right.mean()))
    assert float(metrics["robust/val/accuracy"]) < float(metrics["robust/val/clean_accuracy"])


def test_the_picture_shows_clean_change_and_attacked_input(tmp_path: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = pl.loggers.TensorBoardLogger(tmp_path)
    callback = RobustAccuracy(PGD(THREAT, steps=1), examples=3)
    zoo.trainer(logger=logger, callbacks=[callback], log_every_n_steps=1).fit(
        zoo.built(WithTestStep), data(16), data(16)
    )
    events = EventAccumulator(str(logger.log_dir), size_guidance={"images": 0})
    events.Reload()
    (image,) = events.Images("robust/val/examples")
    assert (image.width, image.height) == (3 * 112 + 2 * 6, 3 * (112 + 20) + 2 * 6)
    assert "robust/val/accuracy" in events.Tags()["scalars"]


def test_a_shuffling_loader_is_warned_about() -> None:
    trainer = zoo.trainer(callbacks=[RobustAccuracy(PGD(THREAT, steps=1))])
    lightnings_own = pytest.warns(UserWarning, match="sampler has shuffling enabled")
    with lightnings_own, pytest.warns(UserWarning, match="attacks other samples.*shuffle=False"):
        trainer.test(zoo.built(WithTestStep), data(32, shuffle=True), verbose=False)


def test_the_sanity_check_measures_nothing() -> None:
    callback = RobustAccuracy(PGD(THREAT, steps=1))
    seen: list[bool] = []

    class After(pl.Callback):
        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(any(k.startswith("robust") for k in trainer.callback_metrics))

    zoo.trainer(callbacks=[callback, After()]).fit(zoo.built(WithTestStep), data(16), data(16))
    assert seen == [False]


def test_normalised_inputs_are_attacked_in_pixels() -> None:
    class InData(WithTestStep):
        pass

    plain, pixels = trained(zoo.NormalisesInModel), PixelSpace(mean=0.3, std=0.2)
    other = InData()
    other.load_state_dict(plain.state_dict())
    plain_val, normalised = copy.deepcopy(plain), TensorDataset((zoo.images(101) - 0.3) / 0.2, zoo.labels(101))

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    type(plain_val).validation_step = validation_step  # type: ignore[assignment]  # a shape without validation of its own
    results = []
    try:
        for module, loader, space in ((plain_val, data(), PixelSpace()), (other, DataLoader(normalised, 16), pixels)):
            trainer = zoo.trainer(callbacks=[RobustAccuracy(PGD(ThreatModel("linf", 0.05, space), steps=5))])
            trainer.validate(module, loader, verbose=False)
            results.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("robust")})
    finally:
        del zoo.NormalisesInModel.validation_step
    assert results[0] == pytest.approx(results[1], abs=1.5 / 101)  # rounding may tip a sample on the edge


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([], {}, ValueError, "different names"),
    ([PGD(THREAT), PGD(THREAT)], {}, ValueError, "name them"),
    (["pgd"], {}, TypeError, "must be a callable"),
    (PGD(THREAT), {"max_samples": 0}, ValueError, "at least 1"),
    (PGD(THREAT), {"stages": ["train"]}, ValueError, "'val', 'test' or both"),
]


@pytest.mark.parametrize(("attacks", "settings", "error", "says"), BAD, ids=[row[3] for row in BAD])
def test_bad_settings_are_refused_at_once(
    attacks: Any, settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        RobustAccuracy(attacks, **settings)


class Tokens(zoo.Shape):
    """One label a row of the picture, flattened before the loss."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        F.cross_entropy(self.net(x).view(-1, 5), y.repeat_interleave(2) % 5)


def test_rows_that_belong_to_no_single_sample_are_an_error_that_says_so() -> None:
    trainer = zoo.trainer(callbacks=[RobustAccuracy(PGD(THREAT, steps=1))])
    with pytest.raises(ProbeError, match="gets 32 rows for a batch of 16 samples"):
        trainer.validate(zoo.built(Tokens), data(), verbose=False)
