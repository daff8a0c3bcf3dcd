"""What monitors share: when they listen, what they keep, and that no training run notices them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import (
    PGD,
    AdversarialTraining,
    CalibrationMonitor,
    OODMonitor,
    RobustAccuracy,
    TemperatureScaling,
    ThreatModel,
)
from lightning_robust.attach.listener import Heard
from lightning_robust.attach.monitor import Monitor, suffixes
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step

THREAT = ThreatModel("linf", 0.05)
OURS = ("robust", "calibration", "ood")


def data(n: int = 50, shuffle: bool = False, workers: int = 0) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n), zoo.labels(n)), 16, shuffle=shuffle, num_workers=workers)


def monitors() -> list[Any]:
    foreign = TensorDataset(1 - zoo.images(30, seed=9), zoo.labels(30))
    return [
        RobustAccuracy(PGD(THREAT, steps=2, restarts=2), max_samples=40),
        CalibrationMonitor(),
        OODMonitor(max_samples=20),
        OODMonitor({"loader": DataLoader(foreign, 7, shuffle=True), "set": foreign}, max_samples=20, name="sets"),
        TemperatureScaling(),
    ]


class Noticing(pl.Callback):
    """Hashes every value that the user logs, step by step, and every random stream."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._add(trainer)

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        self._add(trainer)

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self._add(trainer)

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self._add(trainer)

    def _add(self, trainer: Any) -> None:
        values = {k: v.item() for k, v in trainer.callback_metrics.items() if not k.startswith(OURS)}
        assert trainer.sanity_checking or values
        streams = (torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes())  # type: ignore[index]  # a tuple
        self.digest.update(repr(sorted(values.items())).encode() + b"".join(streams))


class Noisy(zoo.SharedStepWithMetrics):
    """Dropout, BatchNorm, numpy mixup, metrics, and a learning rate that follows the validation loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        lam = np.random.beta(1, 1)
        return self._step((lam * x + (1 - lam) * x[torch.randperm(len(x))], y), "train")  # type: ignore[no-any-return]  # no types there

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}


class Watched(Noisy):
    """No module's output is its logits, and its validation draws random numbers."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = 2 * self.net(x + 0.1 * torch.rand_like(x))
        self.after(logits, y)
        self.log("val/loss", F.cross_entropy(logits, y))
        self.log("val/accuracy", self.after)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*MedianPruner.*|.*shuffles.*:UserWarning")
@pytest.mark.parametrize("shape", [Noisy, Watched], ids=lambda s: s.__name__)
@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 0.5}, {"precision": "bf16-mixed"}], ids=str)
def test_all_monitors_together_change_nothing(shape: type[Noisy], settings: dict[str, Any]) -> None:
    hashes = []
    for watching in ([], monitors()):
        module, noticing = zoo.built(shape), Noticing()
        trainer = zoo.trainer(max_epochs=3, callbacks=[*watching, noticing], **settings)
        trainer.fit(module, data(64, shuffle=True, workers=2), data(50))
        weights = hashlib.sha256(b"".join(v.numpy().tobytes() for v in module.state_dict().values())).hexdigest()
        hashes.append((weights, noticing.digest.hexdigest(), torch.rand(1).item(), np.random.rand()))
    assert {key.split("/")[0] for key in trainer.callback_metrics} >= {
        "robust",
        "calibration",
        "ood",
        "ood.sets",
        "val",
    }
    assert hashes[0] == hashes[1]


def test_adversarial_training_is_not_changed_either() -> None:
    hashes = []
    for watching in ([], monitors()):
        module, noticing = zoo.built(Noisy), Noticing()
        adversarial = AdversarialTraining(PGD(THREAT, steps=1))
        zoo.trainer(max_epochs=2, callbacks=[adversarial, *watching, noticing]).fit(module, data(64), data(50))
        weights = hashlib.sha256(b"".join(v.numpy().tobytes() for v in module.state_dict().values())).hexdigest()
        hashes.append(weights)
    assert hashes[0] == hashes[1]


class Noting(Monitor):
    """Writes down when it is asked what."""

    def __init__(self, stages: Any = ("val", "test"), **settings: Any) -> None:
        super().__init__("noting", settings.pop("name", None), Probe(**settings), stages)
        self.notes: list[str] = []

    def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.notes.append(f"begin {stage}")

    def before(self, trainer: Any, step: Step, batch_idx: int, loader: int, stage: str) -> None:
        self.notes.append(f"before {loader}.{batch_idx}")

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        self.notes.append(f"hear {len(heard.rows[0])}")

    def last(self, trainer: Any, template: Step, stage: str) -> None:
        self.notes.append(f"last {template.name} {tuple(template.batch[0].shape)}")

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.notes.append(f"finish {stage}")


class Plain(zoo.ListBatch):
    test_step = zoo.ListBatch.validation_step


def test_a_monitor_is_asked_in_order_and_its_last_word_comes_before_the_epoch_ends() -> None:
    noting = Noting()
    trainer = zoo.trainer(callbacks=[noting])
    trainer.validate(zoo.built(Plain), data(20), verbose=False)
    first = "last validation_step (16, 1, 8, 8)"
    assert noting.notes == ["begin val", "before 0.0", "hear 16", "before 0.1", "hear 4", first, "finish val"]


def test_the_last_word_is_about_the_first_loader() -> None:
    class Two(zoo.ListBatch):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            F.cross_entropy(self(batch[0]), batch[1])

    noting = Noting()
    zoo.trainer(callbacks=[noting]).validate(zoo.built(Two), [data(20), data(5)], verbose=False)
    assert noting.notes[-5:] == [
        "hear 4", "last validation_step (16, 1, 8, 8)", "before 1.0", "hear 5", "finish val",
    ]  # fmt: skip


def test_stages_and_the_sanity_check_are_left_out() -> None:
    val, test = Noting(["val"]), Noting(["test"])
    trainer, module = zoo.trainer(callbacks=[val, test]), zoo.built(Plain)
    trainer.fit(module, data(16), data(16))
    assert val.notes == ["begin val", "before 0.0", "hear 16", "last validation_step (16, 1, 8, 8)", "finish val"]
    assert test.notes == []
    trainer.test(module, data(16), verbose=False)
    assert len(val.notes) == len(test.notes) == 5


def test_who_reads_alike_listens_together_in_every_run() -> None:
    alike, other = (
        [CalibrationMonitor(), TemperatureScaling(), OODMonitor()],
        CalibrationMonitor(target_key=1, name="o"),
    )
    for callbacks in ([*alike, other], [other, *alike[::-1]], [AdversarialTraining(PGD(THREAT, steps=1)), *alike]):
        zoo.trainer(callbacks=callbacks).fit(zoo.built(Plain), data(16), data(16))
        assert len({id(monitor.listener) for monitor in alike}) == 1
        assert alike[0].listener.probe is alike[0].probe
        assert other.listener is not alike[0].listener


def test_the_same_monitors_serve_other_modules_and_batches_in_turn() -> None:
    callbacks = [CalibrationMonitor(), TemperatureScaling()]
    for shape in (zoo.ListBatch, zoo.DictBatchWithExtras, zoo.SigmoidMultiLabel, zoo.ListBatch):

        class Evaluated(shape):  # type: ignore[misc, valid-type]  # the class is a parameter
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.training_step(batch, batch_idx)

        alone, module = zoo.trainer(callbacks=[CalibrationMonitor()]), zoo.built(Evaluated)
        alone.validate(module, zoo.loader(shape), verbose=False)
        together = zoo.trainer(callbacks=callbacks)
        together.validate(module, zoo.loader(shape), verbose=False)
        keys = [key for key in alone.callback_metrics if key.startswith("calibration")]
        assert len(keys) == 14
        assert all(alone.callback_metrics[key] == together.callback_metrics[key] for key in keys)


@pytest.mark.parametrize("factor", [1, 2])  # logits that are the network's output, and others: heard, and watched
def test_a_batch_without_a_loss_is_left_out_with_one_warning(factor: int) -> None:
    class Sometimes(zoo.ListBatch):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx in (0, 3):
                logits = self(batch[0])
                F.cross_entropy(logits if factor == 1 else factor * logits, batch[1])

    noting = Noting()
    trainer = zoo.trainer(callbacks=[noting])
    with pytest.warns(UserWarning, match="Sometimes: a batch called no loss, though the first one did") as caught:
        trainer.validate(zoo.built(Sometimes), data(64), verbose=False)
    assert len([w for w in caught if "called no loss" in str(w.message)]) == 1
    assert [note for note in noting.notes if note.startswith("hear")] == ["hear 16", "hear 16"]


def test_hooks_of_other_callbacks_are_not_taken_for_the_step() -> None:
    class Curious(pl.Callback):
        """Runs the network by itself, before and after the step, on other inputs."""

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
            pl_module(1 - batch[0])

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            pl_module(batch[0] / 2)

    module, found = zoo.built(Plain), []
    for callbacks in ([], [Curious()]):
        for order in (1, -1):
            trainer = zoo.trainer(callbacks=[*callbacks, CalibrationMonitor()][::order])
            trainer.validate(module, data(), verbose=False)
            found.append(float(trainer.callback_metrics["calibration/val/nll"]))
    assert found == [found[0]] * 4


def test_names_of_loaders_follow_the_first() -> None:
    class Two(zoo.ListBatch):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            F.cross_entropy(self(batch[0]), batch[1])

    trainer = zoo.trainer()
    trainer.validate(zoo.built(Two), {"own": data(16), "far": [data(16), data(16)]}, verbose=False)
    assert suffixes(trainer) == ["", "/far/0", "/far/1"]


def test_wrong_stages_are_refused() -> None:
    for stages in ("val", [], ["train"]):
        with pytest.raises(ValueError, match="'val', 'test' or both"):
            Noting(stages)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_network_swapped_between_runs_is_followed() -> None:
    module, trainer = zoo.built(zoo.ListBatch), zoo.trainer(callbacks=[CalibrationMonitor()])
    for make in (zoo.network, Residual, zoo.network):
        module.net = make()
        trainer.validate(module, data(), verbose=False)
        with torch.no_grad():
            nll = F.cross_entropy(module.net.eval()(zoo.images(50)), zoo.labels(50))
        assert float(trainer.callback_metrics["calibration/val/nll"]) == pytest.approx(float(nll), rel=1e-5)


def test_discovery_does_without_a_graph_where_memory_is_short() -> None:
    class Short(zoo.ListBatch):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if torch.is_grad_enabled():
                raise torch.cuda.OutOfMemoryError("the graph of a large evaluation batch")
            F.cross_entropy(self(batch[0]), batch[1])

    noting = Noting()
    with pytest.warns(UserWarning, match="Noting measures nothing: the graph of a large"):  # of what needs gradients
        zoo.trainer(callbacks=[noting]).validate(zoo.built(Short), data(32), verbose=False)
    assert [note for note in noting.notes if note.startswith("hear")] == ["hear 16", "hear 16"]
