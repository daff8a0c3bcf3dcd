"""Calibration in every kind of run, against scikit-learn and torchmetrics on logits that a plain loop computed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
import zoo
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_robust import CalibrationMonitor, read_entry
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.randomness import RandomState

SIZES = (16, 16, 5)
MEASURES = {"ece", "ece_low", "ece_high", "ece_floor", "nll", "brier", "ece_rms", "ece_max", "ece_adaptive", "aurc"}
MEASURES |= {"accuracy", "accuracy_at_95", "accuracy_at_90", "accuracy_at_80"}
BESIDE = {"ece_debiased", "brier_reliability", "brier_resolution", "brier_uncertainty"}  # into the loggers alone
shapes = pytest.mark.parametrize("shape", zoo.ZOO, ids=lambda shape: shape.__name__)


def data(n: int = 101, batch_size: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n), zoo.labels(n)), batch_size)


class Classifier(zoo.ListBatch):
    """Sure of itself, so that there is something to measure."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(4 * x)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))


def measured(trainer: pl.Trainer, area: str = "calibration/val/", suffix: str = "") -> dict[str, float]:
    found = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(area)}
    names = {key: key.removeprefix(area) for key in found}
    return {
        names[key].removesuffix(suffix): value
        for key, value in found.items()
        if key.endswith(suffix) and ("/" in names[key]) == bool(suffix)
    }


def reference(p: Tensor, labels: Tensor) -> dict[str, float]:
    """What others make of probabilities ``(R, K)`` and labels ``(R,)``."""
    classes = list(range(p.shape[1]))
    error = torchmetrics.functional.classification.multiclass_calibration_error
    ece, rms, largest = (float(error(p.float(), labels, len(classes), 15, norm)) for norm in ("l1", "l2", "max"))
    p64 = p.double().numpy()
    p64 = p64 / p64.sum(1, keepdims=True)
    return {
        "ece": ece,
        "ece_rms": rms,
        "ece_max": largest,
        "accuracy": float((p.argmax(1) == labels).float().mean()),
        "nll": log_loss(labels, p64, labels=classes),
        "brier": brier_score_loss(labels, p64, labels=classes, scale_by_half=False),
    }


def offline(module: nn.Module, loader: Any, forward: Callable[[Any], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities and labels by a plain loop."""
    training = module.training
    module.eval()
    with torch.no_grad():
        batches = [((forward or module)(x).softmax(1), y) for x, y in loader]
    module.train(training)
    return torch.cat([p for p, _ in batches]), torch.cat([y for _, y in batches])


def by_hand(module: zoo.Shape, batches: list[Any], states: list[RandomState]) -> tuple[Tensor, Tensor]:
    """Probabilities and labels of every single prediction, from what the zoo computes without the probe."""
    module = copy.deepcopy(module).eval()
    p, labels = [], []
    for batch, state in zip(batches, states, strict=True):
        state.restore()
        with torch.no_grad():
            logits, target, _losses = module.by_hand(batch, module.image(batch).clone())
        if isinstance(module, (zoo.SigmoidMultiLabel, zoo.OneLogitBinary)):
            yes = (logits if isinstance(module, zoo.SigmoidMultiLabel) else logits.sigmoid()).flatten()
            p.append(torch.stack([1 - yes, yes], 1))
            labels.append(target.flatten().long())
        else:
            p.append(logits.softmax(1))
            labels.append(target.argmax(1) if target.ndim == 2 else target)
    return torch.cat(p), torch.cat(labels)


def evaluating(shape: type[zoo.Shape], returns: str = "loss") -> type[zoo.Shape]:
    """The shape with evaluation steps that call its own loss code, or only its network."""

    class Evaluating(shape):  # type: ignore[misc, valid-type]  # the class is a parameter
        def __init__(self) -> None:
            super().__init__()
            self.states: list[RandomState] = []  # what the random streams were when a step began

        def _evaluate(self, batch: Any) -> Any:
            self.states.append(RandomState.capture())
            if returns == "nothing":  # and computes no loss
                x = self.image(batch)
                logits = self(x) if shape in (zoo.ListBatch, zoo.NormalisesInModel, zoo.LogSoftmaxNLL) else self.net(x)
                return logits.argmax(1)
            if shape is zoo.ManualOptimisation:
                loss = F.cross_entropy(self.net(batch[0]), batch[1])
            elif shape is zoo.NoBatchIdx:
                loss = self.training_step(batch)
            else:
                loss = self.training_step(batch, 0)
            loss = loss["loss"] if isinstance(loss, dict) else loss
            self.log("evaluated", loss, batch_size=len(self.image(batch)))
            return {"loss": loss, "dict": {"val_loss": loss, "more": [1]}, "none": None}[returns]

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return self._evaluate(batch)

        def test_step(self, batch: Any, batch_idx: int) -> Any:
            return self._evaluate(batch)

    Evaluating.__name__ = shape.__name__
    return Evaluating


class Last(pl.Callback):
    """Forgets the states of all evaluations but the last, and keeps its weights."""

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.states.clear()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights = copy.deepcopy(pl_module.state_dict())

    on_test_epoch_end = on_validation_epoch_end


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
@shapes
def test_the_numbers_of_every_shape_are_those_of_others_offline(shape: type[zoo.Shape], run: str) -> None:
    evaluated = evaluating(shape, {"fit": "none", "validate": "dict", "test": "loss"}[run])
    module, last, monitor = zoo.built(evaluated), Last(), CalibrationMonitor()
    trainer = zoo.trainer(callbacks=[monitor, last], max_epochs=2)
    if run == "fit":
        trainer.fit(module, zoo.loader(shape), zoo.loader(shape, SIZES))
    else:
        getattr(trainer, run)(module, zoo.loader(shape, SIZES), verbose=False)
    stored = zoo.built(evaluated)
    stored.load_state_dict(last.weights)
    # One state a batch: the copy that the way was found on is taken back.
    p, labels = by_hand(stored, [shape.batch(n) for n in SIZES], module.states)
    found = measured(trainer, f"calibration/{'test' if run == 'test' else 'val'}/")
    assert set(found) == MEASURES
    expected = reference(p, labels)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5, abs=1e-6)
    assert 0 <= found["ece_low"] <= found["ece"] <= found["ece_high"] <= 1
    if run != "test":
        bins = monitor.section()["calibration"]["bins"]
        right = np.dot(bins["counts"], bins["accuracy"])
        assert (sum(bins["counts"]), right) == pytest.approx((len(p), int((p.argmax(1) == labels).sum())))


# Their training steps draw random numbers before the loss, or need optimizers, which exist in `fit` only.
ALONE = (zoo.NumpyMixup, zoo.SideEffects, zoo.ManualOptimisation)
DIRECT = [shape for shape in zoo.ZOO if shape not in (*ALONE, zoo.WritesIntoItsBatch)]


@pytest.mark.parametrize("shape", DIRECT, ids=lambda shape: shape.__name__)
def test_a_validation_without_any_loss_is_measured_through_training_step(shape: type[zoo.Shape]) -> None:
    evaluated = evaluating(shape, "nothing")
    module, trainer = zoo.built(evaluated), zoo.trainer(callbacks=[CalibrationMonitor()])
    trainer.validate(module, zoo.loader(shape, SIZES), verbose=False)
    p, labels = by_hand(module, [shape.batch(n) for n in SIZES], [RandomState.capture()] * 3)
    expected = reference(p, labels)
    found = measured(trainer)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("shape", ALONE, ids=lambda shape: shape.__name__)
def test_a_training_step_that_cannot_stand_in_is_an_error_that_names_the_remedy(shape: type[zoo.Shape]) -> None:
    module, trainer = zoo.built(evaluating(shape, "nothing")), zoo.trainer(callbacks=[CalibrationMonitor()])
    with pytest.raises(ProbeError, match=r"validation_step calls none of the losses.*logits_fn=.*target_key="):
        trainer.validate(module, zoo.loader(shape), verbose=False)


def test_a_batch_written_into_by_a_validation_without_loss_is_read_as_it_came() -> None:
    class Normalising(zoo.WritesIntoItsBatch):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            y.zero_()
            return self.net(x.sub_(0.5).mul_(2)).argmax(1)

    module, trainer = zoo.built(Normalising), zoo.trainer(callbacks=[CalibrationMonitor()])
    trainer.validate(module, zoo.loader(Normalising, SIZES), verbose=False)
    p, labels = by_hand(module, [Normalising.batch(n) for n in SIZES], [RandomState.capture()] * 3)
    expected = reference(p, labels)
    assert {name: measured(trainer)[name] for name in expected} == pytest.approx(expected, rel=2e-5, abs=1e-6)


class SilentTest(zoo.Shape):
    """No loss in its test step, and no validation."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        log_p = self.net(batch[0]).log_softmax(1)
        return -log_p.gather(1, batch[1][:, None]).mean()  # by hand

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).argmax(1)


def test_a_test_step_without_loss_is_an_error_and_logits_fn_the_remedy() -> None:
    module = zoo.built(SilentTest)
    with pytest.raises(ProbeError, match=r"SilentTest.test_step calls none of the losses.*logits_fn=.*target_key="):
        zoo.trainer(callbacks=[CalibrationMonitor()]).test(module, data(), verbose=False)
    for logits_fn in (lambda m, batch: m.net(batch[0]), lambda m, batch: 2 * m.net(batch[0])):
        trainer = zoo.trainer(callbacks=[CalibrationMonitor(logits_fn=logits_fn, target_key=1)])
        trainer.test(module, data(), verbose=False)
        with torch.no_grad():
            p, labels = offline(module, data(), lambda x, fn=logits_fn: fn(module, (x,)))  # type: ignore[misc]  # bound now
        expected = reference(p, labels)
        found = measured(trainer, "calibration/test/")
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5)


def test_each_loader_has_numbers_of_its_own_and_heads_may_differ() -> None:
    class Heads(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(10, 10) for _ in range(3))

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            every = [head(self(batch[0])) for head in self.heads]
            self.log("val_loss", F.cross_entropy(every[dataloader_idx], batch[1]))

    module = zoo.built(Heads)
    loaders = {"near": data(40), "far": data(23), "last": data(31)}
    trainer = zoo.trainer(callbacks=[CalibrationMonitor()])
    trainer.validate(module, loaders, verbose=False)
    for head, (name, loader) in zip(module.heads, loaders.items(), strict=True):
        expected = reference(*offline(module, loader, lambda x, head=head: head(module(x))))  # type: ignore[misc]  # bound now
        found = measured(trainer, suffix="" if name == "near" else f"/{name}")
        assert set(found) == MEASURES
        assert {k: found[k] for k in expected} == pytest.approx(expected, rel=2e-5)


@zoo.averaging
def test_averaged_weights_are_measured_where_validation_uses_them() -> None:
    ema = pl.callbacks.EMAWeightAveraging(decay=0.5)
    kept: list[Any] = []

    class Keep(pl.Callback):
        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.state = copy.deepcopy(pl_module.state_dict())

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            kept.append((self.state, copy.deepcopy(pl_module.state_dict()), measured(trainer)))

    module = zoo.built(Classifier)
    trainer = zoo.trainer(max_epochs=3, num_sanity_val_steps=0, callbacks=[ema, CalibrationMonitor(), Keep()])
    trainer.fit(module, data(), data())
    for averaged, trained, found in kept:
        expected, others = [], []
        for state, into in ((averaged, expected), (trained, others)):
            stored = zoo.built(Classifier)
            stored.load_state_dict(state)
            into.append(reference(*offline(stored, data()))["nll"])
        assert found["nll"] == pytest.approx(expected[0], rel=2e-5)
        assert abs(found["nll"] - others[0]) > 1e-4


def test_the_sanity_check_measures_nothing_and_finds_out_where_the_logits_are() -> None:
    forwards: list[bool] = []

    class After(pl.Callback):
        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            assert not measured(trainer)
            assert len(forwards) == 2 + 1  # the user's own, and one a run

    module = zoo.built(Classifier)
    module.net.register_forward_hook(lambda *_: forwards.append(True))
    zoo.trainer(callbacks=[CalibrationMonitor(), After()]).fit(module, data(), data())
    assert len(forwards) == 2 + 7 + 1 + 7


def test_mixed_precision_is_measured_as_it_ran() -> None:
    class Remembering(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            logits = self(batch[0])
            self.seen.append(logits.float().softmax(1))
            F.cross_entropy(logits, batch[1])

    for precision in ("bf16-mixed", "bf16-true", "64-true"):
        module, trainer = zoo.built(Remembering), zoo.trainer(precision=precision, callbacks=[CalibrationMonitor()])
        trainer.validate(module, data(), verbose=False)
        expected = reference(torch.cat(module.seen), zoo.labels(101))
        assert {k: measured(trainer)[k] for k in expected} == pytest.approx(expected, rel=2e-5)


def test_part_of_the_data_part_of_an_epoch_and_loaders_without_length() -> None:
    module, trainer = zoo.built(Classifier), zoo.trainer(limit_val_batches=3, callbacks=[CalibrationMonitor()])
    trainer.validate(module, data(), verbose=False)
    p, labels = offline(module, data())
    assert measured(trainer)["nll"] == pytest.approx(reference(p[:48], labels[:48])["nll"], rel=2e-5)

    runs: list[float] = []

    class Counting(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            stored = zoo.built(Classifier)
            stored.load_state_dict(pl_module.state_dict())
            assert measured(trainer)["nll"] == pytest.approx(reference(*offline(stored, data()))["nll"], rel=2e-5)
            runs.append(measured(trainer)["nll"])

    often = zoo.trainer(val_check_interval=0.5, num_sanity_val_steps=0, callbacks=[CalibrationMonitor(), Counting()])
    often.fit(module, data(64), data())
    assert len(set(runs)) == 2

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(TensorDataset(zoo.images(101), zoo.labels(101)))

    trainer = zoo.trainer(callbacks=[CalibrationMonitor()])
    trainer.validate(module, DataLoader(Stream(), 16), verbose=False)
    assert measured(trainer)["nll"] == pytest.approx(reference(*offline(module, data()))["nll"], rel=2e-5)


class ForeignModule(lightning.pytorch.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = zoo.network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_other_namespace_is_served_alike() -> None:
    module = ForeignModule()
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    trainer: Any = lightning.pytorch.Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        callbacks=CalibrationMonitor(),  # type: ignore[arg-type]  # of both namespaces at once
        **settings,  # type: ignore[arg-type]  # plain settings
    )
    for run in (trainer.fit, trainer.validate):
        run(module, data(), data()) if run == trainer.fit else run(module, data(), verbose=False)
        expected = reference(*offline(module, data(), module.net))
        assert {k: measured(trainer)[k] for k in expected} == pytest.approx(expected, rel=2e-5)


def test_the_diagram_arrives_in_tensorboard_and_the_bins_in_the_checkpoint(tmp_path: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = pl.loggers.TensorBoardLogger(tmp_path)
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "kept", save_last=True)
    weights = pl.callbacks.ModelCheckpoint(
        tmp_path, "{epoch}", "calibration/val/nll", save_weights_only=True, save_top_k=-1, auto_insert_metric_name=False
    )
    callbacks = [CalibrationMonitor(bins=10), CalibrationMonitor(bins=4, diagram=False, name="coarse"), keep, weights]
    module = zoo.built(Classifier)
    trainer = zoo.trainer(
        logger=logger, enable_checkpointing=True, callbacks=callbacks, log_every_n_steps=1, max_epochs=2
    )
    trainer.fit(module, data(), data())
    events = EventAccumulator(str(logger.log_dir), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"calibration/val/reliability", "calibration/val/risk_coverage"}
    assert len(events.Images("calibration/val/risk_coverage")) == 2
    for name in BESIDE:
        assert [scalar.step for scalar in events.Scalars(f"calibration/val/{name}")] == [6, 13]
        assert f"calibration/val/{name}" not in trainer.callback_metrics
    steps = [image.step for image in events.Images("calibration/val/reliability")]
    assert steps == [scalar.step for scalar in events.Scalars("calibration/val/ece")] == [6, 13]
    assert {"calibration/val/ece", "calibration.coarse/val/ece"} <= set(events.Tags()["scalars"])
    p, labels = offline(module, data())
    expected = reference(p, labels)
    for path in (tmp_path / "kept" / "last.ckpt", tmp_path / "1.ckpt"):
        plain = torch.load(path, weights_only=True)["lightning_robust"]
        assert plain["calibration"] == read_entry(path)["calibration"]
        section = plain["calibration"]
        assert (section["n"], sum(section["bins"]["counts"]), len(section["bins"]["counts"])) == (101, 101, 10)
        counts = np.histogram(p.max(1).values, bins=10, range=(0, 1))[0]  # no confidence is on an edge
        assert section["bins"]["counts"] == counts.tolist()
        gaps = np.array(section["bins"]["confidence"]) - np.array(section["bins"]["accuracy"])
        assert section["ece"] == pytest.approx(float(np.abs(gaps) @ counts) / 101)
        assert section["bins"]["nll"] == pytest.approx(expected["nll"], rel=2e-5)
        assert section["measured_step"] == plain["global_step"]
        assert len(pickle.dumps(section)) < 5_000
        assert len(plain["calibration.coarse"]["bins"]["counts"]) == 4


def test_predictions_that_are_no_numbers_are_left_out_with_a_warning() -> None:
    class Broken(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(x[:, :1, 0, 0] > 0.9, float("nan"))

    module, trainer = zoo.built(Broken), zoo.trainer(callbacks=[CalibrationMonitor()])
    lost = zoo.images(101)[:, 0, 0, 0] > 0.9
    with pytest.warns(
        UserWarning, match=rf"{int(lost.sum())} predictions of the val data are NaN.*calibration/val/ece"
    ):
        trainer.validate(module, data(), verbose=False)
    p, labels = offline(module, data())
    assert measured(trainer)["nll"] == pytest.approx(reference(p[~lost], labels[~lost])["nll"], rel=2e-5)


def test_bad_settings_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        CalibrationMonitor(bins=0)
    with pytest.raises(ValueError, match="'val', 'test' or both, got 'val'"):
        CalibrationMonitor(stages="val")
    with pytest.raises(ValueError, match="two CalibrationMonitor callbacks would both write calibration/"):
        zoo.trainer(callbacks=[CalibrationMonitor(), CalibrationMonitor(bins=3)]).validate(
            zoo.built(Classifier), data()
        )


def test_a_fit_of_another_module_forgets_what_was_measured(tmp_path: Any) -> None:
    monitor = CalibrationMonitor()
    zoo.trainer(callbacks=[monitor]).fit(zoo.built(Classifier), data(), data())
    assert "bins" in monitor.section()["calibration"]
    trainer = zoo.trainer(callbacks=[monitor])
    with pytest.warns(UserWarning, match=r"CalibrationMonitor: this fit has no validation.*limit_val_batches"):
        trainer.fit(zoo.built(Classifier, 1), data())
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    assert "calibration" not in read_entry(tmp_path / "other.ckpt")


def test_a_resumed_run_keeps_what_was_measured_until_it_measures_again(tmp_path: Any) -> None:
    first = zoo.trainer(callbacks=[CalibrationMonitor()])
    first.fit(zoo.built(Classifier), data(), data())
    first.save_checkpoint(tmp_path / "first.ckpt")
    before = read_entry(tmp_path / "first.ckpt")["calibration"]
    keep = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    again = zoo.trainer(callbacks=[CalibrationMonitor(), keep], max_epochs=2, enable_checkpointing=True)
    again.fit(zoo.built(Classifier, 1), data(), data(), ckpt_path=tmp_path / "first.ckpt")
    early = read_entry(tmp_path / "step=8.ckpt")
    assert early["calibration"] == before
    assert early["calibration"]["measured_step"] == 7 < early["global_step"]


def test_a_mode_that_is_mistyped_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"got 'toplabel'. Did you mean 'top_label'\?"):
        CalibrationMonitor(mode="toplabel")
