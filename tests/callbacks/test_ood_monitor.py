"""Scores of foreign inputs: every number beside scikit-learn's, however the foreign inputs come."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from callbacks.ood_runs import (
    SCORES,
    Both,
    by_hand,
    data,
    logged,
    logits,
    measured,
    near,
    ours,
    softmax,
    strange,
    trained,
)
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_robust import (
    PGD,
    CalibrationMonitor,
    OODMonitor,
    PixelSpace,
    TemperatureScaling,
    ThreatModel,
    read_entry,
)
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.demo import Letters
from lightning_robust.ood import SYNTHETIC
from lightning_robust.randomness import RandomState, seeded
from lightning_robust.recipe import compose, instantiate

# -- whatever the foreign inputs come in -----------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x)


class Dicts(Dataset[Any]):
    """Batches with names, as many as there are samples."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"name": f"sample {index}", "picture": self.x[index], "origin": [1.0, 2.0]}


X = strange()
SOURCES: dict[str, Any] = {
    "map-style": TensorDataset(X, torch.full((70,), -1)),
    "map-style, bare": TensorDataset(X),
    "dicts": Dicts(X),
    "loader": DataLoader(TensorDataset(X, torch.zeros(70)), 32),
    "loader of dicts": DataLoader(Dicts(X), 9),
    "two workers": DataLoader(TensorDataset(X), 9, num_workers=2),
    "iterable": Stream(X),
    "loader of an iterable": DataLoader(Stream(X), 32),
    "bare tensors": list(X.split(13)),
    "a subset": Subset(TensorDataset(torch.cat([X, X + 1])), range(70)),
}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["validate", "test"])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_every_number_is_that_of_scikit_learn(source: Any, kind: str) -> None:
    module = trained()
    found = measured(module, OODMonitor({"strange": source}), kind)
    stage = {"validate": "val", "test": "test"}[kind]
    assert found == near(by_hand(logits(module, zoo.images(90)), logits(module, X), f"ood/{stage}/strange"))
    assert len(found) == 20


def test_a_data_set_gives_a_seeded_choice_not_its_first_class() -> None:
    module = trained()
    chosen = sorted(torch.randperm(70, generator=seeded(5)).tolist()[:20])
    assert chosen != list(range(20))
    inside = logits(module, zoo.images(90))
    for batch_size in (7, 90):
        found = measured(
            module, OODMonitor({"s": TensorDataset(X)}, max_samples=20, seed=5), loaders=data(90, batch_size)
        )
        assert found == near(by_hand(inside, logits(module, X[chosen]), "ood/val/s"))


@pytest.mark.parametrize("source", [DataLoader(TensorDataset(X), 8), Stream(X), list(X.split(8))])
def test_of_a_loader_the_first_samples_are_taken(source: Any) -> None:
    module = trained()
    found = measured(module, OODMonitor({"s": source}, max_samples=20))
    assert found == near(by_hand(logits(module, zoo.images(90)), logits(module, X[:20]), "ood/val/s"))


def test_no_more_is_loaded_than_is_measured() -> None:
    asked: list[int] = []

    class Counting(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            asked.append(index)
            return super().__getitem__(index)

    measured(trained(), OODMonitor({"s": DataLoader(Counting(X), 8)}, max_samples=20))
    assert asked == list(range(24))


class Normalising(pl.LightningDataModule):
    """Normalises on the device, as Lightning's documentation has it; what it is given comes out in another make."""

    def __init__(self, to: str = "list") -> None:
        super().__init__()
        self.to = to

    def val_dataloader(self) -> DataLoader[Any]:
        return data()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = (batch[0] - 0.3) / 0.2, batch[1]
        return [x, y] if self.to == "list" else {"label": y, "image": x}


class TakesDicts(Both):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch if isinstance(batch, list) else (batch["image"], batch["label"])
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


@pytest.mark.parametrize("to", ["list", "dict"])
def test_batches_of_the_same_make_pass_the_same_transfer_hooks(to: str) -> None:
    module = trained(TakesDicts)
    found = measured(module, OODMonitor({"s": TensorDataset(X, torch.zeros(70))}), datamodule=Normalising(to))
    inside, outside = ((x - 0.3) / 0.2 for x in (zoo.images(90), X))
    assert found == near(by_hand(logits(module, inside), logits(module, outside), "ood/val/s"))


@pytest.mark.parametrize("source", [TensorDataset(X), list(X.split(2)), Stream(X)])
def test_batches_of_another_make_hold_inputs_as_the_model_sees_them(source: Any) -> None:
    module = trained()
    found = measured(module, OODMonitor({"s": source}), datamodule=Normalising())
    inside = logits(module, (zoo.images(90) - 0.3) / 0.2)
    assert found == near(by_hand(inside, logits(module, X), "ood/val/s"))


class Named(zoo.DictBatchWithExtras):
    """Batches with one name a sample: as many leaves as samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["image"]), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        F.cross_entropy(self(batch["image"]), batch["label"])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "image": batch["image"] * 2 - 1}


class NamedDigits(Dicts):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"label": index % 10, "name": str(index), "image": self.x[index]}


@pytest.mark.parametrize("batch_size", [7, 16, 70])
def test_names_in_a_batch_do_not_make_it_one_of_another_make(batch_size: int) -> None:
    own = DataLoader(NamedDigits(zoo.images(90)), 16)
    module = trained(Named, own)
    found = measured(module, OODMonitor({"s": DataLoader(NamedDigits(X), batch_size)}), loaders=own)
    expected = by_hand(logits(module, zoo.images(90) * 2 - 1), logits(module, X * 2 - 1), "ood/val/s")
    assert found == near(expected)


WRONG: dict[str, Any] = {
    "another size": TensorDataset(torch.rand(20, 1, 9, 9)),
    "another size, same make": TensorDataset(torch.rand(20, 3, 8, 8), torch.zeros(20)),
    "integers": TensorDataset(torch.zeros(20, 1, 8, 8, dtype=torch.uint8)),
    "two that fit": TensorDataset(torch.rand(20, 1, 8, 8), torch.rand(20, 1, 8, 8), torch.rand(20)),
}


@pytest.mark.parametrize("source", WRONG.values(), ids=WRONG.keys())
def test_inputs_that_do_not_fit_are_an_error_with_both_shapes(source: Any) -> None:
    says = r"OOD set 'wrong': expected inputs like those of the evaluation data, \(N, 1, 8, 8\), got a batch with .*20,"
    module = trained()
    with pytest.raises(ValueError, match=says):
        measured(module, OODMonitor({"wrong": DataLoader(source, 20)}))
    assert not any(part._forward_hooks for part in module.modules())


def test_what_can_be_iterated_once_only_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"'s'.*iterated once only.*list or a DataLoader"):
        OODMonitor({"s": iter([X])})  # type: ignore[dict-item]  # the mistake that is meant


@pytest.mark.parametrize("source", [None, X, X.numpy(), {"image": X}, "letters", 3])
def test_what_is_no_data_set_is_refused_at_once(source: Any) -> None:
    says = rf"OOD set 'o': expected a data set, a DataLoader or a list of batches, got a {type(source).__name__}\."
    with pytest.raises(TypeError, match=says):
        OODMonitor({"o": source})


# -- without a gradient ----------------------------------------------------------------------------------------------


class Frozen(Both):
    """Features of a backbone under ``no_grad``; a batch whose first leaf is the target."""

    def logits_of(self, batch: Any) -> Tensor:
        with torch.no_grad():
            features = self.net[:-1](batch["image"])
        return self.net[-1](features)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.logits_of(batch), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


def test_a_frozen_backbone_is_measured_on_given_and_on_synthetic_sets() -> None:
    rows = [{"label": i % 10, "image": image} for i, image in enumerate(zoo.images(90))]
    own = DataLoader(rows, 16)
    module = trained(Frozen, own)
    inside = logits(module, zoo.images(90))
    for source in (TensorDataset(X), DataLoader([{"label": -1, "image": x} for x in X], 9)):
        found = measured(module, OODMonitor({"s": source}), loaders=own)
        assert found == near(by_hand(inside, logits(module, X), "ood/val/s"))
    shuffled = SYNTHETIC["synthetic_shuffle"](zoo.images(90), [seeded(0, 1, i) for i in range(90)], PixelSpace())
    expected = by_hand(inside, logits(module, shuffled), "ood/val/synthetic_shuffle")
    found = measured(module, OODMonitor(), loaders=own)
    assert {key: found[key] for key in expected} == near(expected)


class Texts(Both):
    """Token ids of any length, with a mask, as tokenizers give them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 10))

    def mean(self, batch: Any) -> Tensor:
        z, mask = self.net(batch["ids"]), batch["mask"][..., None]
        return (z * mask).sum(1) / mask.sum(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.mean(batch), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


def texts(n: int, length: int, seed: int, label: int | None = None) -> list[dict[str, Any]]:
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (n, length), generator=draws)
    mask = torch.arange(length) < torch.randint(1, length + 1, (n, 1), generator=draws)
    labels = [i % 10 if label is None else label for i in range(n)]
    return [{"label": y, "ids": x, "mask": m.long()} for y, x, m in zip(labels, ids, mask, strict=True)]


@pytest.mark.parametrize("length", [12, 7])
@pytest.mark.parametrize("input_key", [None, "ids"])
def test_token_ids_are_measured_with_the_masks_of_their_own_batch(length: int, input_key: Any) -> None:
    own, other = texts(90, 12, 0), texts(70, length, 1, label=-1)
    module = trained(Texts, DataLoader(own, 16))
    callback = OODMonitor({"s": DataLoader(other, 9)}, input_key=input_key)
    found = measured(module, callback, loaders=DataLoader(own, 16))
    with torch.no_grad():
        z = [module.eval().mean(next(iter(DataLoader(rows, 90)))).double().numpy() for rows in (own, other)]
    assert found == near(by_hand(*z, "ood/val/s"))


class Tokens(Both):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(96, 10))


def test_token_ids_alone_take_the_place_of_those_of_the_evaluation() -> None:
    x, foreign = (torch.stack([row["ids"] for row in texts(n, 12, n)]) for n in (90, 70))
    own = DataLoader(TensorDataset(x, zoo.labels(90)), 16)
    module = trained(Tokens, own)
    found = measured(module, OODMonitor({"s": TensorDataset(foreign)}), loaders=own)
    assert found == near(by_hand(logits(module, x), logits(module, foreign), "ood/val/s"))
    with pytest.raises(ValueError, match=r"expected inputs like those .* \(N, 12\), got a batch with .*float32"):
        measured(module, OODMonitor({"s": TensorDataset(torch.rand(20, 12))}), loaders=own)


def test_synthetic_sets_of_token_ids_are_not_made_and_that_is_said_once() -> None:
    own = DataLoader(texts(64, 12, 0), 16)
    trainer = zoo.trainer(callbacks=[OODMonitor()], max_epochs=2)
    with pytest.warns(UserWarning, match=r"synthetic sets are made of pictures .* int64 \(16, 12\)") as seen:
        trainer.fit(zoo.built(Texts), own, own)
    assert len(ours(seen)) == 1
    assert trainer.current_epoch == 2
    assert not [key for key in trainer.callback_metrics if key.startswith("ood")]


@pytest.mark.parametrize("sets", [None, {"s": TensorDataset(X)}])
def test_what_cannot_be_read_is_said_once_and_ends_no_run(sets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: Any, **__: Any) -> Any:
        raise ProbeError("this step is a riddle.")

    callback = OODMonitor(sets)
    trainer = zoo.trainer(callbacks=[callback], max_epochs=2)
    monkeypatch.setattr(Reading, "read", unreadable)
    with pytest.warns(UserWarning, match="nothing is measured: this step is a riddle") as seen:
        trainer.fit(zoo.built(Both), data(), data())
    assert len(ours(seen)) == 1
    assert trainer.current_epoch == 2
    assert not [key for key in trainer.callback_metrics if key.startswith("ood")]


# -- several processes -----------------------------------------------------------------------------------------------


class Beside:
    """A trainer as the process of one rank sees it."""

    def __init__(self, trainer: Any, rank: int) -> None:
        self.trainer, self.world_size, self.global_rank = trainer, 3, rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trainer, name)


def test_samples_that_a_distributed_sampler_deals_twice_count_once() -> None:
    seen: list[int] = []

    class OfRank(OODMonitor):
        rank = 0

        def before(self, trainer: Any, *where: Any) -> None:
            super().before(Beside(trainer, self.rank), *where)

        def finish(self, *where: Any) -> None:
            seen.append(self._tables["s"].n)
            super().finish(*where)

    module, own = trained(), TensorDataset(X)  # 70 samples: two are dealt twice
    for rank in range(3):
        sampler = torch.utils.data.DistributedSampler(own, 3, rank, shuffle=False)
        assert len(sampler) == 24
        callback = OfRank({"s": DataLoader(own, 7, sampler=sampler)})
        callback.rank = rank
        measured(module, callback)
    assert seen == [24, 23, 23]


# -- synthetic sets --------------------------------------------------------------------------------------------------


def test_synthetic_sets_do_not_depend_on_batches_or_epochs() -> None:
    module = trained()
    x = zoo.images(90)
    inside = logits(module, x)
    expected: dict[str, float] = {}
    for number, (name, make) in enumerate(SYNTHETIC.items()):
        foreign = make(x[:40], [seeded(3, number, i) for i in range(40)], PixelSpace())
        expected |= by_hand(inside, logits(module, foreign), f"ood/val/{name}")
    for batch_size in (7, 32, 90):
        callback = OODMonitor(max_samples=40, seed=3)
        for _epoch in range(2):
            assert measured(module, callback, loaders=data(90, batch_size)) == near(expected)


def test_noise_fills_the_pixel_space_of_the_model() -> None:
    module, pixels = trained(), PixelSpace(mean=0.3, std=0.2)
    x = (zoo.images(30) - 0.3) / 0.2
    found = measured(module, OODMonitor(pixels=pixels), loaders=DataLoader(TensorDataset(x, zoo.labels(30)), 8))
    noise = (torch.stack([torch.rand(1, 8, 8, generator=seeded(0, 0, i)) for i in range(30)]) - 0.3) / 0.2
    expected = by_hand(logits(module, x), logits(module, noise), "ood/val/synthetic_noise")
    assert {key: found[key] for key in expected} == near(expected)


class Flat(zoo.Shape):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("shape", [(12,), (3, 2, 2), (3, 4)])
def test_inputs_that_are_no_pictures_need_sets_of_their_own(shape: tuple[int, ...]) -> None:
    loader = DataLoader(TensorDataset(torch.rand(32, *shape), zoo.labels(32)), 8)
    with pytest.warns(UserWarning, match="synthetic sets are made of pictures") as seen:
        assert measured(zoo.built(Flat), OODMonitor(), loaders=loader) == {}
    assert len(ours(seen)) == 1
    found = measured(zoo.built(Flat), OODMonitor({"s": TensorDataset(torch.rand(32, *shape))}), loaders=loader)
    assert len(found) == 20


# -- nothing else changes --------------------------------------------------------------------------------------------


class Shuffling(Dataset[Any]):
    """Draws from all global streams for every item."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(1, 8, 8) * random.random() * float(np.random.rand())


def test_sets_are_iterated_without_touching_the_global_streams() -> None:
    states: list[RandomState] = []

    class Seeing(pl.Callback):
        def on_validation_batch_start(self, *_: Any) -> None:
            states.append(RandomState.capture())

        def on_validation_batch_end(self, *_: Any) -> None:
            assert states[-1].is_current()

    module = trained()
    sets = {"drawn": Shuffling(), "shuffled": DataLoader(TensorDataset(X), 8, shuffle=True)}
    before, after = Seeing(), Seeing()
    trainer = zoo.trainer(callbacks=[before, OODMonitor(sets), after])
    trainer.validate(module, data(), verbose=False)
    assert len(states) == 2 * 6
    assert all(np.array_equal(a.cpu.numpy(), states[0].cpu.numpy()) for a in states)


def test_training_with_and_without_is_the_same_to_the_bit() -> None:
    weights = []
    for callbacks in ([], [OODMonitor(), OODMonitor({"drawn": Shuffling()}, name="own")]):
        module = zoo.built(zoo.SharedStepWithMetrics)
        zoo.trainer(max_epochs=3, callbacks=callbacks).fit(module, data(), data())
        weights.append(torch.cat([p.detach().flatten() for p in module.state_dict().values()]))
    assert torch.equal(*weights)


def test_a_fit_measures_every_validation_and_keeps_the_last_in_the_checkpoint(tmp_path: Path) -> None:
    seen: list[float] = []

    class Seeing(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                seen.append(float(trainer.callback_metrics["ood/val/strange/energy_auroc"]))

    module = zoo.built(Both)
    trainer = zoo.trainer(max_epochs=3, callbacks=[OODMonitor({"strange": TensorDataset(X)}), Seeing()])
    trainer.fit(module, data(), data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    section = torch.load(tmp_path / "x.ckpt", weights_only=True)["lightning_robust"]["ood"]["strange"]
    inside, outside = logits(module, zoo.images(90)), logits(module, X)
    expected = by_hand(inside, outside, "k")
    assert len(set(seen)) == 3
    for name, score in SCORES.items():
        assert section[name]["auroc"] == pytest.approx(expected[f"k/{name}_auroc"], abs=1e-6)
        assert sum(section[name]["histogram_in"]) == 90
        assert sum(section[name]["histogram_out"]) == 70
        assert section[name]["threshold95"] == pytest.approx(np.sort(score(inside))[85], rel=1e-4)  # 86 of 90
        both = np.concatenate([score(inside), score(outside)])
        counts, _ = np.histogram(score(outside), 64, section[name]["range"])
        assert section[name]["range"] == pytest.approx([both.min(), both.max()], rel=1e-4)
        assert np.abs(counts - section[name]["histogram_out"]).sum() <= 4  # one on an edge may fall either way
    assert read_entry(tmp_path / "x.ckpt")["ood"]["strange"]["energy"]["auroc"] == pytest.approx(seen[-1], abs=1e-6)


def test_of_several_loaders_the_first_is_not_foreign() -> None:
    class Two(Both):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            F.cross_entropy(self(batch[0]), batch[1])

    module = trained(Two)
    other = DataLoader(TensorDataset(zoo.images(50, 77), zoo.labels(50)), 16)
    found = measured(module, OODMonitor({"s": TensorDataset(X)}), loaders=[data(), other])
    assert found == near(by_hand(logits(module, zoo.images(90)), logits(module, X), "ood/val/s"))


@zoo.averaging
def test_averaged_weights_score_both_sides() -> None:
    """They are swapped in for validation, and out again before the epoch's end hooks of callbacks behind."""
    seen: list[Any] = []

    class Keeping(Both):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            seen.append(copy.deepcopy(self.net))

    averaging = pl.callbacks.EMAWeightAveraging(decay=0.5)
    monitor = OODMonitor({"s": TensorDataset(X)})
    trainer = zoo.trainer(max_epochs=2, callbacks=[averaging, monitor], num_sanity_val_steps=0)
    trainer.fit(zoo.built(Keeping), data(), data())
    with torch.no_grad():
        inside, outside = (seen[-1].eval()(x).double().numpy() for x in (zoo.images(90), X))
    assert logged(trainer) == near(by_hand(inside, outside, "ood/val/s"))


# -- heads -----------------------------------------------------------------------------------------------------------


class Binary(zoo.OneLogitBinary):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        F.binary_cross_entropy_with_logits(self.net(batch[0]).squeeze(1), batch[1].float())


def test_a_yes_or_no_head_has_two_classes() -> None:
    module = zoo.built(Binary)
    module.net[-1].weight.data *= 30  # near 0 scores of float32 tie
    loader = DataLoader(TensorDataset(zoo.images(90), zoo.labels(90, 2)), 16)
    found = measured(module, OODMonitor({"s": TensorDataset(X)}), loaders=loader)
    z = [logits(module, x) for x in (zoo.images(90), X)]
    inside, outside = (np.concatenate([-each / 2, each / 2], axis=1) for each in z)
    assert found == near(by_hand(inside, outside, "ood/val/s"))


class LogProbabilities(zoo.LogSoftmaxNLL):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        F.nll_loss(self(batch[0]), batch[1])


def test_log_probabilities_have_no_energy_and_that_is_said_once() -> None:
    module = trained(LogProbabilities)
    callback = OODMonitor({"s": TensorDataset(X)})
    with pytest.warns(UserWarning, match="log-probabilities.*no energy") as seen:
        found = measured(module, callback)
    assert len(ours(seen)) == 1
    z = [np.log(softmax(logits(module, x))) for x in (zoo.images(90), X)]
    expected = {k: v for k, v in by_hand(*z, "ood/val/s").items() if "/energy_" not in k}
    assert found == near(expected)
    assert measured(module, callback) == near(expected)
    measured(module, OODMonitor({"s": TensorDataset(X)}, scores=["msp"]))  # no warning


class Pixels(zoo.Shape):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 3, 3, padding=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), (batch[0][:, 0] * 2.9).long())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


class Labels(zoo.SigmoidMultiLabel):
    @staticmethod
    def batch(n: int) -> Any:
        return zoo.SigmoidMultiLabel.batch(n)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        y = F.one_hot(batch[1] % 4, 4).float()
        F.binary_cross_entropy(torch.sigmoid(self.net(batch[0])), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = F.one_hot(batch[1] % 4, 4).float()
        return F.binary_cross_entropy(torch.sigmoid(self.net(batch[0])), y)


@pytest.mark.parametrize("sets", [None, {"s": TensorDataset(X)}])
@pytest.mark.parametrize("shape", [Pixels, Labels])
def test_heads_with_several_answers_a_sample_get_one_sentence_and_no_numbers(shape: type[Any], sets: Any) -> None:
    trainer = zoo.trainer(callbacks=[OODMonitor(sets)], max_epochs=2)
    with pytest.warns(UserWarning, match="scores are about one prediction a sample") as seen:
        trainer.fit(zoo.built(shape), data(32), data(32))
    assert len(ours(seen)) == 1
    assert trainer.current_epoch == 2
    assert not [key for key in trainer.callback_metrics if key.startswith("ood")]


@pytest.mark.parametrize("some", [False, True])
def test_logits_that_are_no_numbers_are_left_out_and_end_no_run(some: bool) -> None:
    class Broken(Both):
        def forward(self, x: Tensor) -> Tensor:
            z = self.net(x)
            broken = x[:, 0, 0, :1] < (0.3 if some else 2.0)
            return z.masked_fill(broken, torch.nan)

    module = trained(Both)
    broken = Broken()
    broken.load_state_dict(module.state_dict())
    sets = {"s": TensorDataset(zoo.images(70, 4))}
    with pytest.warns(UserWarning, match="NaN or infinite are left out") as seen:
        found = measured(broken, OODMonitor(sets))
    assert len(ours(seen)) == len(set(ours(seen))) == 8  # four scores, of the set and of the own data
    if not some:
        assert found == {}
        return
    kept = [x[x[:, 0, 0, 0] >= 0.3] for x in (zoo.images(90), zoo.images(70, 4))]
    assert found == near(by_hand(*(logits(module, x) for x in kept), "ood/val/s"))


def test_constant_logits_are_a_coin_toss() -> None:
    class Constant(Both):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * 0

    callback = OODMonitor()
    found = measured(zoo.built(Constant), callback)
    assert {v for k, v in found.items() if k.endswith("auroc")} == {0.5}
    assert {v for k, v in found.items() if "fpr95" in k} == {1.0}
    assert sum(callback.section()["ood"]["synthetic_noise"]["energy"]["histogram_in"]) == 90


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_every_precision_is_measured(precision: Any) -> None:
    trainer = zoo.trainer(
        callbacks=[OODMonitor(), OODMonitor({"s": TensorDataset(X)}, name="own")], precision=precision
    )
    trainer.validate(zoo.built(Both), data(), verbose=False)
    assert 0 <= float(trainer.callback_metrics["ood.own/val/s/msp_auroc"]) <= 1
    assert 0 <= float(trainer.callback_metrics["ood/val/synthetic_noise/msp_auroc"]) <= 1


def test_a_validation_without_gradients_is_read_through_the_training_step() -> None:
    class Decorated(Both):
        @torch.no_grad()
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            F.cross_entropy(self(batch[0]), batch[1])

    module = trained(Decorated)
    found = measured(module, OODMonitor({"s": TensorDataset(X)}))
    assert found == near(by_hand(logits(module, zoo.images(90)), logits(module, X), "ood/val/s"))


def test_logits_fn_is_taken_at_its_word() -> None:
    class ByHand(Both):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            z = self(batch[0])
            (z.logsumexp(1) - z.gather(1, batch[1][:, None])[:, 0]).mean()

    module = trained(ByHand)
    callback = OODMonitor({"s": TensorDataset(X)}, logits_fn=lambda m, batch: m(batch[0]), target_key=1)
    found = measured(module, callback)
    assert found == near(by_hand(logits(module, zoo.images(90)), logits(module, X), "ood/val/s"))


# -- settings --------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"sets": {}}, "at least one set"),
    ({"scores": ["enrgy"]}, "Did you mean 'energy'"),
    ({"scores": "energy"}, r"scores= takes a list of scores, e\.g\. \['energy', 'msp'\], got 'energy'"),
    ({"scores": []}, r"scores= takes a list .* got \[\]"),
    ({"max_samples": 0}, "at least 1"),
    ({"stages": ["train"]}, "'val', 'test' or both"),
    ({"stages": "val"}, "takes a list"),
]


@pytest.mark.parametrize(("settings", "says"), BAD, ids=[row[1] for row in BAD])
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        OODMonitor(**settings)


@pytest.mark.parametrize("sets", [data(), [data()], TensorDataset(X), (X, X)])
def test_sets_without_names_are_refused_at_once(sets: Any) -> None:
    with pytest.raises(TypeError, match=rf"takes names and data sets, OODMonitor.*got a {type(sets).__name__}"):
        OODMonitor(sets)


@pytest.mark.parametrize("stages", [["val"], ["test"]])
def test_only_the_stages_that_are_asked_for_are_measured(stages: list[str]) -> None:
    module, callback = trained(), OODMonitor({"s": TensorDataset(X)}, stages=stages)
    assert bool(measured(module, callback, "validate")) is (stages == ["val"])
    assert bool(measured(module, callback, "test")) is (stages == ["test"])


THREAT = {"norm": "linf", "eps": 0.1}


def test_a_recipe_builds_all_three(tmp_path: Path) -> None:
    letters = {"class_path": "lightning_robust.demo.Letters", "init_args": {"size": 8}}
    callbacks = {
        "ood": {
            "class_path": "lightning_robust.OODMonitor",
            "init_args": {"sets": {"letters": letters}, "scores": ["msp"], "max_samples": 50},
        },
        "scaling": {
            "class_path": "lightning_robust.TemperatureScaling",
            "init_args": {"when": "after_fit", "bins": 10},
        },
        "calibration": {
            "class_path": "lightning_robust.CalibrationMonitor",
            "init_args": {"bins": 5, "stages": ["val"]},
        },
        "plain": {"class_path": "lightning_robust.OODMonitor", "init_args": {"name": "plain"}},
        "detecting": {
            "class_path": "lightning_robust.OODMonitor",
            "init_args": {
                "detectors": ["vim", {"class_path": "lightning_robust.ood.KNN", "init_args": {"k": 3}}],
                "fit_data": letters,
                "attacked": {"class_path": "lightning_robust.PGD", "init_args": {"threat": THREAT, "steps": 2}},
                "name": "detecting",
            },
        },
    }
    recipe = {"model": {"class_path": "pytorch_lightning.demos.boring_classes.BoringModel"}, "callbacks": callbacks}
    path = tmp_path / "all.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(recipe)))
    trainer, _, _ = instantiate(compose(path), tmp_path / "name" / "version_0", log=False)
    monitors = [c for c in trainer.callbacks if isinstance(c, OODMonitor)]
    assert isinstance(monitors[0].sets["letters"], Letters)
    assert monitors[0].sets["letters"].size == 8
    assert (list(monitors[0].scores), monitors[0].max_samples) == (["msp"], 50)
    assert list(monitors[1].sets) == list(SYNTHETIC)
    detecting = monitors[2].detecting
    assert detecting is not None
    assert (list(detecting.detectors), detecting.detectors["knn"].k) == (["vim", "knn"], 3)
    assert isinstance(detecting.source, Letters)
    assert monitors[2].attacked == PGD(ThreatModel("linf", 0.1), steps=2)
    scaling = next(c for c in trainer.callbacks if isinstance(c, TemperatureScaling))
    assert (scaling.when, scaling.bins) == ("after_fit", 10)
    calibration = next(c for c in trainer.callbacks if isinstance(c, CalibrationMonitor))
    assert (calibration.bins, calibration.stages) == (5, ("val",))
    found = measured(zoo.built(Both), monitors[0])
    assert next(iter(found)).startswith("ood/val/letters/msp_")
