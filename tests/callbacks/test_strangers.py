"""Modules, batches and Trainers that once went wrong: each of these was a bug that a stranger would have met."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import NFGSM, PGD, AdversarialTraining, RobustAccuracy, ThreatModel

THREAT = ThreatModel("linf", 0.1)
ATTACK = PGD(THREAT, steps=2, start="zero")


def data(n: int = 32) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n), zoo.labels(n)), 16)


def validated(module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> dict[str, float]:
    trainer = zoo.trainer(callbacks=list(callbacks), **settings)
    trainer.validate(module, data(), verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_an_attack_that_draws_from_the_global_stream_draws_anew_after_each_query() -> None:
    draws: list[float] = []

    def random_search(logits_fn: Any, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(4):
            draws.append(torch.rand(()).item())
            logits_fn(x)
        return x

    validated(zoo.built(zoo.SharedStepWithMetrics), RobustAccuracy(random_search))
    assert len(set(draws[:4])) == 4
    assert draws[:4] != draws[4:8]  # the second batch


class Store(MutableMapping[str, Any]):
    """A mapping whose shallow copies share one store."""

    def __init__(self, content: Any) -> None:
        self.store = dict(content)

    def __getitem__(self, key: str) -> Any:
        return self.store[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.store[key] = value

    def __delitem__(self, key: str) -> None:
        del self.store[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.store)

    def __len__(self) -> int:
        return len(self.store)


class Kind(enum.Enum):
    TRAIN = 1


@dataclass(slots=True)
class Slots:
    image: Tensor
    label: Tensor
    kind: Kind = Kind.TRAIN


class MappingBatch(zoo.Shape):
    @staticmethod
    def batch(n: int) -> Any:
        return Store({"image": zoo.images(n), "label": zoo.labels(n)})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["image"]), batch["label"])


class SlotsBatch(zoo.Shape):
    @staticmethod
    def batch(n: int) -> Any:
        return Slots(zoo.images(n), zoo.labels(n))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch.image), batch.label)


@pytest.mark.parametrize("method", ["madry", "trades"])
@pytest.mark.parametrize("shape", [MappingBatch, SlotsBatch], ids=lambda s: s.__name__)
def test_a_batch_of_the_users_own_making_is_replaced_not_written_into(shape: type[zoo.Shape], method: str) -> None:
    batch = shape.batch(16)
    loader = DataLoader([batch], batch_size=None, collate_fn=lambda b: b)
    image = batch["image"] if shape is MappingBatch else batch.image
    before = image.clone()
    zoo.trainer(callbacks=[AdversarialTraining(PGD(THREAT, steps=1), method)]).fit(zoo.built(shape), loader)
    assert torch.equal(batch["image"] if shape is MappingBatch else batch.image, before)


def test_two_callbacks_that_would_write_one_key_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two RobustAccuracy callbacks would both write robust/.*name='strong'"):
        validated(zoo.built(zoo.ListBatch), RobustAccuracy(ATTACK), RobustAccuracy(PGD(THREAT, steps=3)))
    pair = [RobustAccuracy(ATTACK, stages=["val"]), RobustAccuracy(PGD(THREAT, steps=3), stages=["test"])]
    assert "robust/val/accuracy" in validated(zoo.built(zoo.ListBatch), *pair)


class OtherTest(zoo.ListBatch):
    """Tests on other batches, and another function, than it validates."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _index = batch
        logits = -self.net(x)
        self.log("test_accuracy", (logits.argmax(1) == y).float().mean())
        self.log("test_loss", F.cross_entropy(logits, y))


def test_a_test_measures_the_test_step_whatever_was_validated_before() -> None:
    module, callback = zoo.built(OtherTest), RobustAccuracy(ATTACK)
    trainer = zoo.trainer(callbacks=[callback])
    trainer.fit(module, data(), data())
    indexed = DataLoader(TensorDataset(zoo.images(32), zoo.labels(32), torch.arange(32)), 16)
    trainer.test(module, indexed, verbose=False)
    metrics = trainer.callback_metrics
    assert float(metrics["robust/test/clean_accuracy"]) == pytest.approx(float(metrics["test_accuracy"]))


class Merging(nn.Linear):
    """LoRA as loralib writes it: merged into the frozen weight in eval mode."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.delta = nn.Parameter(torch.full((outputs, inputs), 0.01))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += self.delta.data * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.merged else super().forward(x) + F.linear(x, self.delta)


def test_layers_that_merge_weights_in_eval_mode_come_out_as_they_went_in() -> None:
    class Lora(zoo.ListBatch):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), Merging(64, 10))

    module = zoo.built(Lora)
    before = module.net[1].weight.detach().clone()
    zoo.trainer(callbacks=[AdversarialTraining(ATTACK)]).fit(module, data())
    torch.testing.assert_close(module.net[1].weight, before, rtol=0, atol=1e-6)


# Dynamo's own, about the copy of the input that the step is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("method", ["madry", "trades"])
def test_a_network_compiled_ahead_of_time_trains_and_is_measured(method: str) -> None:
    module = zoo.built(zoo.ListBatch)
    module.net = torch.compile(module.net, backend="aot_eager")
    trainer = zoo.trainer(callbacks=[AdversarialTraining(PGD(THREAT, steps=2), method), RobustAccuracy(ATTACK)])
    trainer.fit(module, data(), data())
    assert "robust/val/accuracy" in trainer.callback_metrics


@pytest.mark.skipif(
    "weights_only" not in inspect.signature(pl.Trainer.validate).parameters,
    reason="this Lightning cannot be told to load objects",
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_that_only_lightning_can_load_is_no_obstacle(tmp_path: Any) -> None:
    class WithPartial(zoo.ListBatch):
        def __init__(self, optimizer: Any) -> None:
            super().__init__()
            self.save_hyperparameters(logger=False)

    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    pl.seed_everything(0, verbose=False)
    module = WithPartial(sgd)
    trainer = zoo.trainer(callbacks=[AdversarialTraining(ATTACK)])
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    fresh = zoo.trainer(callbacks=[RobustAccuracy(ATTACK)])
    fresh.validate(WithPartial(sgd), data(), ckpt_path=tmp_path / "x.ckpt", weights_only=False, verbose=False)
    assert "robust/val/accuracy" in fresh.callback_metrics


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_steps_that_make_tensors_of_their_own_are_measured_in_the_precision_of_the_run(precision: Any) -> None:
    class Making(zoo.ListBatch):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) @ torch.eye(10)

    assert 0 <= validated(zoo.built(Making), RobustAccuracy(ATTACK), precision=precision)["robust/val/accuracy"] <= 1


@pytest.mark.parametrize("as_buffer", [False, True])
def test_what_a_network_cached_in_inference_mode_is_no_obstacle(as_buffer: bool) -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = zoo.network()
            if as_buffer:
                self.register_buffer("table", None)
            else:
                self.table = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.linspace(0.5, 1, 8).cos()
            return self.net(x * self.table)

    class Cached(zoo.ListBatch):
        def __init__(self) -> None:
            super().__init__()
            self.net = Caching()

    assert "robust/val/accuracy" in validated(zoo.built(Cached), RobustAccuracy(ATTACK))


def test_a_validation_without_gradients_and_without_loss_falls_back_to_training_step() -> None:
    class Decorated(zoo.ListBatch):
        @torch.no_grad()
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).argmax(1)

    module, callback = zoo.built(Decorated), RobustAccuracy(ATTACK)
    trainer = zoo.trainer(callbacks=[AdversarialTraining(ATTACK), callback])
    trainer.fit(module, data(), data())
    assert "robust/val/accuracy" in trainer.callback_metrics


def test_the_same_callbacks_serve_another_make_of_batch_in_a_second_fit() -> None:
    class Either(zoo.ListBatch):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
            return F.cross_entropy(self.net(x), y)

    callback, module = AdversarialTraining(ATTACK), zoo.built(Either)
    zoo.trainer(callbacks=[callback]).fit(module, data())
    as_dicts = DataLoader([{"x": zoo.images(16), "y": zoo.labels(16)}], batch_size=None)
    zoo.trainer(callbacks=[callback]).fit(module, as_dicts)
    assert callback.probe.routes["training_step"].input == ("x",)


def test_results_collected_in_a_list_do_not_make_later_steps_dearer() -> None:
    from lightning_robust.modes import _Snapshot

    module = nn.Module()
    module.results = [torch.zeros(1000) for _ in range(50)]
    snapshot = _Snapshot(keep_buffers=False)
    snapshot.module(module)
    assert len(snapshot._undo) == 2  # the attributes, and what is in the list; no copies of the tensors


def test_a_training_attack_as_a_measure_is_warned_about_and_a_class_is_no_attack() -> None:
    with pytest.warns(UserWarning, match="three times as far"):
        RobustAccuracy(NFGSM(THREAT))
    with pytest.raises(TypeError, match="attack"):
        AdversarialTraining(PGD)
