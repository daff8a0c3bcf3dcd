"""Detectors in other people's runs: what they cost, what they leave behind, and what they do not change."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from callbacks.ood_runs import Both, Small, data, detected, fitted, logged, near, ours, patterns, strange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_robust import CalibrationMonitor, OODMonitor
from lightning_robust.randomness import RandomState

X = strange()
TRAIN, VAL = patterns(64), patterns(50, 1)
NAMES = ["mahalanobis", "knn", "vim"]


def monitor(**settings: Any) -> OODMonitor:
    return OODMonitor({"s": TensorDataset(X)}, **{"scores": ["msp"], "detectors": NAMES, "fit_samples": 40, **settings})


def loader(dataset: Any = VAL, **settings: Any) -> DataLoader[Any]:
    return DataLoader(dataset, **{"batch_size": 16, **settings})


# -- what it costs -----------------------------------------------------------------------------------------------------


def forwards(callbacks: list[Any], epochs: int) -> int:
    module, count = zoo.built(Small), []
    module.net.register_forward_hook(lambda _module, args, _output: count.append(len(args[0])))
    trainer = zoo.trainer(callbacks=callbacks, max_epochs=epochs, num_sanity_val_steps=0)
    trainer.fit(module, loader(TRAIN), loader())
    return sum(count)


def test_evaluation_data_are_forwarded_once_and_others_as_often_as_they_are_measured() -> None:
    per_epoch = forwards([monitor()], 3) - forwards([monitor()], 2)
    # Training and validation as ever; 40 samples of the training set, in batches of 16, and all foreign ones.
    assert per_epoch == 64 + 50 + 40 + 70
    # To find out where logits and features are, a few forwards of one batch, once a run.
    assert forwards([monitor()], 2) - 2 * per_epoch <= 4 * 16


# -- what it leaves ----------------------------------------------------------------------------------------------------


def hooks(module: nn.Module) -> dict[str, int]:
    return {
        f"{name}.{kind}": len(value)
        for name, part in module.named_modules()
        for kind, value in vars(part).items()
        if kind.endswith("_hooks") and len(value)
    }


class Crashing(Small):
    """Raises in its validation step, once the net has run."""

    what: BaseException | None = None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.what is not None and not self.trainer.sanity_checking:
            raise self.what


@pytest.mark.parametrize("layer", [None, "net.2"])
@pytest.mark.parametrize("what", [None, ArithmeticError("a crash"), KeyboardInterrupt()])
def test_no_hook_is_left_after_any_end(what: BaseException | None, layer: str | None) -> None:
    module: Any = zoo.built(Crashing)
    module.what = what
    trainer = zoo.trainer(callbacks=[monitor(feature_layer=layer)], max_epochs=1)
    if what is None:
        trainer.fit(module, loader(TRAIN), loader())
    else:
        with pytest.raises((type(what), SystemExit)):
            trainer.fit(module, loader(TRAIN), loader())
    assert hooks(module) == {}


def test_no_hook_is_left_where_something_else_fails_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    callback, module = monitor(), zoo.built(Small)

    def failing(*_: Any) -> None:
        raise ArithmeticError("the table is full")

    monkeypatch.setattr(callback, "_add", failing)
    trainer = zoo.trainer(callbacks=[callback], num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="the table is full"):
        trainer.fit(module, loader(TRAIN), loader())
    assert hooks(module) == {}

    class Deaf(OODMonitor):
        def hear(self, *_: Any) -> None:
            raise ArithmeticError("deaf")

    deaf = Deaf({"s": TensorDataset(X)}, detectors=["knn"])
    with pytest.warns(UserWarning, match="deaf"):
        zoo.trainer(callbacks=[deaf], num_sanity_val_steps=0).fit(module, loader(TRAIN), loader())
    assert hooks(module) == {}


# -- what it does not change -------------------------------------------------------------------------------------------


class Drawing(Dataset[Any]):
    """Draws from all global streams for every item, as augmentations do."""

    def __init__(self, n: int = 64) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        shift = random.random() * float(np.random.rand()) * torch.rand(1)
        x, y = TRAIN[index]
        return [(x + 0.2 * shift).clamp(0, 1), y]


class Recording(pl.Callback):
    """Every batch that was trained on, and the random state behind each validation."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.states: list[RandomState] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        self.batches.append(batch[0].clone())

    def on_validation_end(self, *_: Any) -> None:
        self.states.append(RandomState.capture())


class Metered(zoo.SharedStepWithMetrics):
    """Keeps metrics of its own, and draws random numbers in training."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 10))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_the_same_to_the_bit_also_with_persistent_workers_in_mid_epoch(workers: int) -> None:
    runs = []
    for callbacks in ([], [monitor(), OODMonitor(detectors=["knn"], name="synthetic")]):
        module, recording = zoo.built(Metered), Recording()
        train = DataLoader(Drawing(), 8, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        trainer = zoo.trainer(callbacks=[*callbacks, recording], max_epochs=2, val_check_interval=2)
        trainer.fit(module, train, loader())
        weights = torch.cat([p.detach().flatten() for p in module.state_dict().values()])
        logs = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("ood")}
        runs.append((weights, logs, recording))
    (weights, logs, recording), (other_weights, other_logs, other) = runs
    assert torch.equal(weights, other_weights)
    assert logs == other_logs
    assert len(recording.batches) == 16
    assert all(torch.equal(a, b) for a, b in zip(recording.batches, other.batches, strict=True))
    assert all(torch.equal(a.cpu, b.cpu) for a, b in zip(recording.states, other.states, strict=True))


# -- how strangers write -----------------------------------------------------------------------------------------------


def expected(net: Any, stage: str = "val") -> Any:
    detectors = fitted(NAMES, net, TRAIN, 40)
    return near(detected(detectors, net, VAL.tensors[0], X, f"ood/{stage}/s"))


def of_detectors(trainer: Any) -> dict[str, float]:
    return {k: v for k, v in logged(trainer).items() if "/msp_" not in k}


class Twice(Small):
    """The net runs on other inputs before and behind, as for a log, and once more on its own."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(1 - batch[0])
        F.cross_entropy(self.net(batch[0]), batch[1])
        self.net(batch[0][:3])


class NoValidationLoss(Small):
    """Validation computes no loss: another step, or what the head said in training, stands in."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


class Decorated(Small):
    """What validation says is read through the training step."""

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        F.cross_entropy(self(batch[0]), batch[1])


class ByHand(Small):
    """A loss that no probe can see."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self(batch[0])
        return (z.logsumexp(1) - z.gather(1, batch[1][:, None])[:, 0]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


SETTINGS: dict[Any, dict[str, Any]] = {
    ByHand: {"logits_fn": lambda module, batch: module(batch[0]), "target_key": 1},
    NoValidationLoss: {"target_key": 1},
}


@pytest.mark.parametrize("shape", [Small, Twice, NoValidationLoss, Decorated, ByHand])
def test_numbers_are_those_of_a_plain_loop_however_a_step_is_written(shape: Any) -> None:
    module = zoo.built(shape)
    # Others run forwards of their own around the same step.
    callbacks = [CalibrationMonitor(**SETTINGS.get(shape, {})), monitor(**SETTINGS.get(shape, {}))]
    trainer = zoo.trainer(callbacks=callbacks, max_epochs=1)
    trainer.fit(module, loader(TRAIN), loader())
    assert of_detectors(trainer) == expected(module.net)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_a_compiled_network_shows_its_features() -> None:
    class Compiled(Small):
        def __init__(self) -> None:
            super().__init__()
            self.net: Any = torch.compile(self.net, backend="eager")

    torch._dynamo.reset()
    module = zoo.built(Compiled)
    trainer = zoo.trainer(callbacks=[monitor()], max_epochs=1)
    trainer.fit(module, loader(TRAIN), loader())
    plain = zoo.built(Small)
    plain.load_state_dict({k.replace("_orig_mod.", ""): v for k, v in module.state_dict().items()})
    assert of_detectors(trainer) == expected(plain.net)


@pytest.mark.parametrize(("layer", "take"), [("net.0", lambda x: x.mean((2, 3))), ("net.4", lambda x: x)])
def test_a_layer_by_name_may_be_a_convolution_or_flat(layer: str, take: Any) -> None:
    module = zoo.built(Both)
    trainer = zoo.trainer(callbacks=[monitor(feature_layer=layer, detectors=["knn"], fit_samples=1000)], max_epochs=1)
    trainer.fit(module, data(64), data(50))
    known, inside, outside = (
        take(module.net.eval()[: int(layer[-1]) + 1](x).detach()) for x in (zoo.images(64), zoo.images(50), X)
    )
    unit = [F.normalize(rows.double()) for rows in (known, inside, outside)]
    s_in, s_out = (torch.cdist(rows, unit[0]).sort(1).values[:, 4] for rows in unit[1:])
    auroc = ((s_out[:, None] > s_in).double() + (s_out[:, None] == s_in).double() / 2).mean()
    assert of_detectors(trainer)["ood/val/s/knn_auroc"] == pytest.approx(float(auroc), abs=1e-6)


def test_a_layer_that_is_not_there_is_an_error_before_the_first_step() -> None:
    class Doubled(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * 2  # type: ignore[no-any-return]  # a tensor

    for layer, says in (("nett", "feature_layer='nett' is no submodule"), (None, "name the submodule")):
        trainer = zoo.trainer(callbacks=[monitor(feature_layer=layer)])
        with pytest.raises(ValueError, match=says):
            trainer.fit(zoo.built(Doubled if layer is None else Small), loader(TRAIN), loader())
        assert trainer.global_step == 0


# -- sharded models ----------------------------------------------------------------------------------------------------


class FSDPModule:
    """As torch's: mixed into the class of whatever is sharded."""


class ShardedLinear(FSDPModule, nn.Linear):
    pass


def test_of_a_sharded_model_detectors_are_refused_once_and_scores_of_logits_go_on() -> None:
    class Sharded(Small):
        def __init__(self) -> None:
            super().__init__()
            self.net[-1] = ShardedLinear(12, 10)

    trainer = zoo.trainer(callbacks=[monitor()], max_epochs=2)
    with pytest.warns(UserWarning, match=r"mahalanobis, knn, vim: .*sharded model \(FSDP\).*one device") as seen:
        trainer.fit(zoo.built(Sharded), loader(TRAIN), loader())
    assert len(ours(seen)) == 1
    found = logged(trainer)
    assert len(found) == 5
    assert all(np.isfinite(value) for value in found.values())
