"""Detectors in a run: fitted by hand on the same training samples they say the same."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from callbacks.ood_runs import (
    Both,
    Small,
    caught,
    detected,
    fitted,
    logged,
    measured,
    near,
    ours,
    patterns,
    separated,
    strange,
)
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import OODMonitor, TemperatureScaling, read_entry
from lightning_robust.ood import KNN, RelativeMahalanobis, ViM
from lightning_robust.randomness import seeded

X = strange()
TRAIN, VAL = patterns(130), patterns(90, 1)
NAMES = ["mahalanobis", "knn", "vim"]
FOREIGN = {"strange": TensorDataset(X)}


def loader(dataset: Any = VAL, batch_size: int = 16, **settings: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size, **settings)


def monitor(**settings: Any) -> OODMonitor:
    given: dict[str, Any] = {"scores": ["energy"], "detectors": NAMES, "fit_samples": 80, "seed": 3}
    return OODMonitor(FOREIGN, **{**given, **settings})


def fit(callbacks: Any, module: Any = None, train: Any = None, epochs: int = 2, **settings: Any) -> pl.Trainer:
    module = zoo.built(Small) if module is None else module
    trainer = zoo.trainer(max_epochs=epochs, callbacks=callbacks, **settings)
    trainer.fit(module, loader(TRAIN, shuffle=True) if train is None else train, loader())
    return trainer


def by_detectors(found: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in found.items() if "/energy_" not in key}


def expected(net: Any, stage: str = "val", samples: int = 80, names: Any = NAMES, data: Any = TRAIN) -> Any:
    detectors = fitted(names, net, data, samples, seed=3)
    return near(detected(detectors, net, VAL.tensors[0], X, f"ood/{stage}/strange"))


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_a_fit_says_what_detectors_fitted_by_hand_on_its_weights_say() -> None:
    module = zoo.built(Small)
    found = logged(fit([monitor()], module))
    assert by_detectors(found) == expected(module.net)
    assert len(by_detectors(found)) == 6
    assert 0.02 < found["ood/val/strange/knn_auroc"] < 0.98  # a case where a difference would show


def test_knn_is_that_of_scikit_learn() -> None:
    module = zoo.built(Small)
    found = logged(fit([monitor(detectors=[KNN(k=3)], fit_samples=1000)], module))
    unit = [F.normalize(caught(module.net, x)[0].double()).numpy() for x in (TRAIN.tensors[0], VAL.tensors[0], X)]
    neighbours = NearestNeighbors(n_neighbors=3).fit(unit[0])
    inside, outside = (neighbours.kneighbors(rows)[0][:, 2] for rows in unit[1:])
    assert by_detectors(found) == near(separated(inside, outside, "ood/val/strange/knn"))


@pytest.mark.parametrize("kind", ["validate", "test"])
def test_fit_data_take_the_place_of_training_samples(kind: str) -> None:
    module, other = zoo.built(Small), patterns(100, 7)
    stage = {"validate": "val", "test": "test"}[kind]
    found = measured(module, monitor(fit_data=other), kind, loader())
    assert by_detectors(found) == expected(module.net, stage, data=other)
    x, y = other.tensors
    first = TensorDataset(x[:80], y[:80])  # of a loader the first samples, also in the middle of a batch
    found = measured(module, monitor(fit_data=loader(other, 32)), kind, loader())
    assert by_detectors(found) == expected(module.net, stage, data=first)


class Ready(TensorDataset):
    """A data set of ready batches."""

    def __getitem__(self, index: int) -> Any:
        return [column[index : index + 10] for column in self.tensors]

    def __len__(self) -> int:
        return len(self.tensors[0]) - 10


def test_a_training_set_of_ready_batches_is_read_batch_by_batch() -> None:
    module = zoo.built(Small)
    train = DataLoader(Ready(*TRAIN.tensors), batch_size=None)
    found = logged(fit([monitor(detectors=["mahalanobis"])], module, train))
    order = torch.randperm(120, generator=seeded(3)).tolist()[:8]
    read = [torch.cat([column[i : i + 10] for i in order]) for column in TRAIN.tensors]
    x, z = (caught(module.net, part) for part in (read[0], VAL.tensors[0]))
    detector = RelativeMahalanobis()
    detector.add(*x, read[1], torch.arange(80))
    detector.fit(None)
    outside = detector(*caught(module.net, X))
    assert by_detectors(found) == near(separated(detector(*z), outside, "ood/val/strange/mahalanobis"))


def test_log_probabilities_get_vim_from_the_last_layer_and_no_energy() -> None:
    class LogProbabilities(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).log_softmax(1)  # type: ignore[no-any-return]  # a tensor

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.nll_loss(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            F.nll_loss(self(batch[0]), batch[1])

    module = zoo.built(LogProbabilities)
    with pytest.warns(UserWarning, match="no energy") as seen:
        found = logged(fit([monitor(scores=["energy", "msp"])], module))
    assert len(ours(seen)) == 1
    assert {k for k in found if "energy" in k} == set()
    assert {k: v for k, v in found.items() if "/msp_" not in k} == expected(module.net)


def test_vim_without_a_head_is_left_out_and_the_others_go_on() -> None:
    class Squashed(Small):
        """No linear layer's output is what the loss gets."""

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).tanh() * 3  # type: ignore[no-any-return]  # a tensor

    module = zoo.built(Squashed)
    says = r"the detector 'vim' is left out, others go on: ViM needs the last layer"
    with pytest.warns(UserWarning, match=says) as seen:
        found = logged(fit([monitor(feature_layer="net.2")], module))
    assert len(ours(seen)) == 1
    assert by_detectors(found) == expected(module.net, names=NAMES[:2])


def test_a_temperature_that_is_applied_changes_no_features(tmp_path: Path) -> None:
    module = zoo.built(Small)
    trainer = fit([monitor(), TemperatureScaling()], module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    scaling = TemperatureScaling(apply=True)
    testing = zoo.trainer(callbacks=[scaling, monitor(fit_data=TRAIN)])
    testing.test(zoo.built(Small), loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert by_detectors(logged(testing)) == expected(module.net, "test")


# -- some fail ---------------------------------------------------------------------------------------------------------


class Moody(KNN):
    """Fails in one of its methods, from some evaluation on."""

    name = "moody"

    def __init__(self, method: str, sound: int = 0) -> None:
        self.method, self.sound, self.begun = method, sound, -2
        super().__init__(k=3)

    def _meet(self, method: str) -> None:
        if method == self.method and self.begun >= self.sound:
            raise ArithmeticError("not today")

    def begin(self) -> None:
        self.begun += 1
        super().begin()
        self._meet("begin")

    def add(self, *rows: Any, **more: Any) -> None:
        self._meet("add")
        super().add(*rows, **more)

    def fit(self, head: Any = None) -> None:
        self._meet("fit")
        super().fit(head)

    def __call__(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        self._meet("__call__")
        return super().__call__(features, logits)


@pytest.mark.parametrize("method", ["begin", "add", "fit", "__call__"])
def test_a_detector_that_fails_is_said_once_and_loses_neither_the_others_nor_the_run(method: str) -> None:
    module = zoo.built(Small)
    callback = monitor(detectors=["mahalanobis", Moody(method, sound=0)])
    with pytest.warns(UserWarning, match="the detector 'moody' .*: not today") as seen:
        trainer = fit([callback], module)
    assert len([w for w in ours(seen) if "not today" in w]) == 1
    assert trainer.current_epoch == 2
    assert by_detectors(logged(trainer)) == expected(module.net, names=["mahalanobis"])


def test_metrics_of_a_detector_that_fails_later_are_not_numbers_any_more() -> None:
    module = zoo.built(Small)
    callback = monitor(detectors=["mahalanobis", Moody("fit", sound=1)])
    with pytest.warns(UserWarning, match="not today"):
        found = logged(fit([callback], module, epochs=2))
    lost = {key for key, value in found.items() if math.isnan(value)}
    assert lost == {"ood/val/strange/moody_auroc", "ood/val/strange/moody_fpr95"}
    assert {k: v for k, v in by_detectors(found).items() if k not in lost} == expected(module.net, names=NAMES[:1])


def test_strict_raises_what_a_detector_raises() -> None:
    with pytest.raises(ArithmeticError, match="not today"):
        fit([monitor(detectors=[Moody("__call__")], strict=True)])


# -- what detectors are fitted on --------------------------------------------------------------------------------------


class Steps(pl.Callback):
    count = 0

    def on_train_batch_start(self, *_: Any) -> None:
        Steps.count += 1


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(TRAIN)


class TwoViews(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = batch["first"] if isinstance(batch, dict) and "first" in batch else batch
        return F.cross_entropy(self(batch[0]), batch[-1])


OTHERS = {
    "several loaders": {"first": loader(TRAIN), "second": loader(TRAIN)},
    "a stream": DataLoader(Endless(), 16),
    "another make": loader(TensorDataset(TRAIN.tensors[0], TRAIN.tensors[0], TRAIN.tensors[1])),
}


@pytest.mark.parametrize("train", OTHERS.values(), ids=OTHERS.keys())
def test_a_training_loader_of_another_make_is_an_error_before_the_first_step(train: Any) -> None:
    Steps.count = 0
    with pytest.raises(ValueError, match=r"mahalanobis, knn, vim: .*the training loader.*give fit_data="):
        fit([monitor(), Steps()], zoo.built(TwoViews), train)
    assert Steps.count == 0
    found = logged(fit([monitor(fit_data=TRAIN), Steps()], zoo.built(TwoViews), train))
    assert len(by_detectors(found)) == 6


def mixed(samples: list[Any]) -> Any:
    """MixUp: shares of two classes for every sample."""
    x, y = torch.utils.data.default_collate(samples)
    y = F.one_hot(y, 10).float()
    return [(x + x.flip(0)) / 2, (y + y.flip(0)) / 2]


@pytest.mark.parametrize("sanity", [True, False])
def test_training_samples_that_are_mixed_are_none_to_fit_on(sanity: bool) -> None:
    Steps.count = 0
    train = loader(TRAIN, collate_fn=mixed)
    says = r"the training loader.* at batch\[1\] evaluation has classes, .*MixUp, CutMix.*"
    if sanity:
        with pytest.raises(ValueError, match=says + "give fit_data="):
            fit([monitor(), Steps()], train=train)
        assert Steps.count == 0
    else:
        with pytest.warns(UserWarning, match=r"detectors are left out, .*give fit_data=.*MixUp"):
            assert by_detectors(logged(fit([monitor()], train=train, num_sanity_val_steps=0))) == {}
    assert len(by_detectors(logged(fit([monitor(fit_data=TRAIN)], train=train)))) == 6


def test_samples_of_a_shared_data_set_that_the_training_sampler_leaves_out_are_not_learned() -> None:
    both = TensorDataset(*(torch.cat(columns) for columns in zip(TRAIN.tensors, VAL.tensors, strict=True)))
    module = zoo.built(Small)
    train = loader(both, sampler=torch.utils.data.SubsetRandomSampler(list(range(130))))
    assert by_detectors(logged(fit([monitor()], module, train))) == expected(module.net)


def test_without_a_sanity_check_that_is_said_and_scores_of_logits_go_on() -> None:
    with pytest.warns(UserWarning, match=r"detectors are left out, .*the training loader.*give fit_data=") as seen:
        found = logged(fit([monitor()], zoo.built(TwoViews), OTHERS["another make"], num_sanity_val_steps=0))
    assert len(ours(seen)) == 1
    assert len(found) == 5
    assert by_detectors(found) == {}


def test_fit_data_of_another_make_are_an_error_before_the_first_step() -> None:
    Steps.count = 0
    says = r"fit_data: batches with .* those of the evaluation loader have .*made alike"
    with pytest.raises(ValueError, match=says):
        fit([monitor(fit_data=TensorDataset(TRAIN.tensors[0])), Steps()])
    assert Steps.count == 0
    with pytest.raises(ValueError, match=says):
        measured(zoo.built(Small), monitor(fit_data=TensorDataset(TRAIN.tensors[0])), "test", loader())


def test_a_run_that_never_validates_needs_nothing_to_fit_on() -> None:
    trainer = zoo.trainer(callbacks=[monitor(stages=["test"])])
    trainer.fit(zoo.built(TwoViews), OTHERS["a stream"])
    assert trainer.current_epoch == 1


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_fresh_test_scores_with_the_detectors_and_thresholds_of_the_checkpoint(tmp_path: Path) -> None:
    module, path = zoo.built(Small), tmp_path / "x.ckpt"
    trainer = fit([monitor()], module)
    trainer.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)["lightning_robust"]["ood"]
    assert set(stored["detectors"]) == set(NAMES)
    testing = zoo.trainer(callbacks=[monitor()])
    testing.test(zoo.built(Small), loader(), ckpt_path=path, verbose=False)
    assert by_detectors(logged(testing)) == expected(module.net, "test")
    # The thresholds of the validation data, on others.
    others = patterns(60, 5)
    testing = zoo.trainer(callbacks=[monitor()])
    testing.test(zoo.built(Small), loader(others), ckpt_path=path, verbose=False)
    detectors = fitted(NAMES, module.net, TRAIN, 80, seed=3)
    (own, z), (x, z_other) = (caught(module.net, part.tensors[0]) for part in (VAL, others))
    for name, detector in detectors.items():
        threshold = np.sort(detector(own, z).numpy())[85]  # 86 of 90 are 95 %
        assert stored["thresholds"][name] == pytest.approx(threshold, rel=1e-6)
        kept = detector(x, z_other).numpy() <= threshold
        right = (z_other.argmax(1) == others.tensors[1]).numpy()
        said = logged(testing, accepted=True)
        assert said[f"ood/test/accepted/{name}_coverage"] == pytest.approx(kept.mean(), abs=1e-6)
        assert said[f"ood/test/accepted/{name}_accuracy"] == pytest.approx(right[kept].mean(), abs=1e-6)


def test_without_training_data_and_checkpoint_that_is_said_and_scores_of_logits_go_on() -> None:
    with pytest.warns(UserWarning, match=r"no training data here to fit it on, .*ckpt_path=.*fit_data=") as seen:
        found = measured(zoo.built(Small), monitor(), "test", loader())
    assert [name for name in NAMES for said in ours(seen) if f"the detector {name!r} is left out" in said] == NAMES
    assert len(found) == 5
    assert by_detectors(found) == {}


def test_detectors_that_the_checkpoint_has_are_used_and_others_are_said(tmp_path: Path) -> None:
    module = zoo.built(Small)
    fit([monitor(detectors=["knn"])], module).save_checkpoint(tmp_path / "x.ckpt")
    testing = zoo.trainer(callbacks=[monitor(detectors=["knn", "vim"])])
    with pytest.warns(UserWarning, match="the detector 'vim' is left out, .*there is no training data here"):
        testing.test(zoo.built(Small), loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert by_detectors(logged(testing)) == expected(module.net, "test", names=["knn"])


def test_detectors_that_are_too_large_are_left_out_of_checkpoints_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_robust.callbacks.ood_monitor.LARGEST_STATE", 80 * 12 * 4 - 1)
    with pytest.warns(UserWarning, match=r"take 0 MiB, more than .*fit_data=") as seen:
        trainer = fit([monitor(detectors=["knn"])])
    assert len(ours(seen)) == 1
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert "detectors" not in read_entry(tmp_path / "x.ckpt")["ood"]
    assert "knn" in read_entry(tmp_path / "x.ckpt")["ood"]["strange"]
    monkeypatch.setattr("lightning_robust.callbacks.ood_monitor.LARGEST_STATE", 80 * 12 * 4 + 100)  # and its k
    trainer = fit([monitor(detectors=["knn"])])
    trainer.save_checkpoint(tmp_path / "y.ckpt")
    kept = read_entry(tmp_path / "y.ckpt")["ood"]["detectors"]["knn"]["features"]
    assert kept.nbytes == 80 * 12 * 4


def test_a_test_after_the_fit_fits_anew_on_the_same_training_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_robust.callbacks.ood_monitor.LARGEST_STATE", 0)
    module, callback = zoo.built(Small), monitor()
    with pytest.warns(UserWarning, match="more than the 0 that go into every checkpoint"):
        trainer = fit([callback], module)
    trainer.test(module, loader(), verbose=False)
    assert by_detectors(logged(trainer)) == expected(module.net, "test")
    with torch.no_grad():
        module.net[1].weight *= 0.7  # other weights, another Trainer: not what was fitted before
    assert by_detectors(measured(module, callback, "test", loader())) == expected(module.net, "test")
    assert by_detectors(measured(module, callback, "validate", loader())) == expected(module.net)


@zoo.recent  # Lightning 2.4 takes no weights_only=
@pytest.mark.parametrize("limit", [0, 2**20])
def test_a_test_of_the_best_checkpoint_after_the_fit_has_detectors_whatever_their_size(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("lightning_robust.callbacks.ood_monitor.LARGEST_STATE", limit)
    warnings.simplefilter("default")
    module = zoo.built(Small)
    keep = pl.callbacks.ModelCheckpoint(tmp_path, monitor="ood/val/strange/knn_auroc", mode="max")
    trainer = fit([monitor(), keep], module, enable_checkpointing=True)
    trainer.test(module, loader(), ckpt_path="best", weights_only=False, verbose=False)
    assert by_detectors(logged(trainer)) == expected(module.net, "test")
    assert len(ours(recwarn)) == (limit == 0)


def test_with_fit_data_nothing_is_said_about_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_robust.callbacks.ood_monitor.LARGEST_STATE", 0)
    assert len(by_detectors(logged(fit([monitor(fit_data=TRAIN)])))) == 6  # and a warning is an error here


def test_a_run_that_never_validated_is_tested_on_its_training_samples_too() -> None:
    module, callback = zoo.built(Small), monitor(stages=["test"])
    trainer = zoo.trainer(callbacks=[callback])
    trainer.fit(module, loader(TRAIN))
    trainer.test(module, loader(), verbose=False)
    assert by_detectors(logged(trainer)) == expected(module.net, "test")


def test_training_samples_of_another_make_lose_no_test_after_the_fit() -> None:
    module, callback = zoo.built(TwoViews), monitor(stages=["test"])
    trainer = zoo.trainer(callbacks=[callback])
    trainer.fit(module, OTHERS["another make"])
    with pytest.warns(UserWarning, match=r"detectors are left out, .*the training loader.*give fit_data="):
        trainer.test(module, loader(), verbose=False)
    assert len(logged(trainer)) == 5


def test_thresholds_of_another_step_are_said_once_in_a_test(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    fit([monitor()]).save_checkpoint(path)
    stored = torch.load(path, weights_only=True)
    assert stored["lightning_robust"]["ood"]["measured_step"] == stored["global_step"]
    stored["lightning_robust"]["ood"]["measured_step"] = 9
    torch.save(stored, path)
    says = rf"thresholds and detectors .* at step 9, its weights are from step {stored['global_step']}: .*other weights"
    testing = zoo.trainer(callbacks=[monitor()])
    with pytest.warns(UserWarning, match=says) as seen:
        testing.test(zoo.built(Small), loader(), ckpt_path=path, verbose=False)
    assert len(ours(seen)) == 1


def test_a_checkpoint_that_is_validated_is_measured_at_the_step_of_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    fit([monitor()]).save_checkpoint(path)
    trainer = zoo.trainer(callbacks=[callback := monitor()])
    trainer.validate(zoo.built(Small), loader(), ckpt_path=path, verbose=False)
    assert callback.section()["ood"]["measured_step"] == torch.load(path, weights_only=True)["global_step"] == 18


class Remembering(KNN):
    """Remembers more than a plain KNN does."""

    name = "remembering"

    def __init__(self, more: Any) -> None:
        super().__init__(k=3)
        self.more = more

    def state(self) -> dict[str, Any]:
        return {**super().state(), "more": self.more}


def test_numpy_arrays_of_a_users_detector_stand_in_checkpoints_as_tensors(tmp_path: Path) -> None:
    more = [np.arange(3.0), {"shape": (np.int64(2), None), "kind": np.str_("plain")}]
    fit([monitor(detectors=[Remembering(more)])]).save_checkpoint(tmp_path / "x.ckpt")
    entry = torch.load(tmp_path / "x.ckpt", weights_only=True)["lightning_robust"]["ood"]
    array, rest = entry["detectors"]["remembering"]["more"]
    assert array.tolist() == [0.0, 1.0, 2.0]
    assert rest == {"shape": (2, None), "kind": "plain"}


def test_a_state_that_no_checkpoint_takes_is_left_out_and_said_once(tmp_path: Path) -> None:
    says = r"the detector 'remembering' is left out of checkpoints: its state\(\)\['more'\]\[0\] is of type object"
    with pytest.warns(UserWarning, match=says) as seen:
        trainer = fit([monitor(detectors=["knn", Remembering([object()])])])
    assert len(ours(seen)) == 1
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    entry = torch.load(tmp_path / "x.ckpt", weights_only=True)["lightning_robust"]["ood"]
    assert set(entry["detectors"]) == {"knn"}
    assert "remembering" in entry["strange"]


def test_lists_of_a_state_count_in_its_size() -> None:
    with pytest.warns(UserWarning, match=r"take 23 MiB, more than the 16 that go into every checkpoint"):
        fit([monitor(detectors=[Remembering([0.5] * 3_000_000)])], epochs=1)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_of_detectors_without_detectors_are_refused() -> None:
    for settings in ({"feature_layer": "net"}, {"fit_data": TRAIN}):
        with pytest.raises(ValueError, match=r"belong to detectors=, e\.g\. detectors=\['knn'\]"):
            OODMonitor(FOREIGN, **settings)  # type: ignore[arg-type]  # of two kinds
    with pytest.raises(ValueError, match="fit_samples= at least 2"):
        monitor(fit_samples=1)
    with pytest.raises(ValueError, match="Did you mean 'knn'"):
        monitor(detectors=["kn"])


class Labels(Both):
    """A yes/no for each of ten labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]), F.one_hot(batch[1], 10).float())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


class Pixels(Labels):
    """A class for each pixel, by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 10, 3, padding=1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y[:, None, None].expand(-1, 8, 8))


@pytest.mark.parametrize("kind", ["fit", "validate", "test"])
@pytest.mark.parametrize("shape", [Labels, Pixels])
@pytest.mark.parametrize("data", [None, TRAIN])
def test_of_several_answers_a_sample_nothing_is_measured_and_that_is_said_once(
    shape: Any, kind: str, data: Any
) -> None:
    module, callback = zoo.built(shape), monitor(fit_data=data)
    says = "scores are about one prediction a sample; .* Nothing is measured"
    trainer = zoo.trainer(callbacks=[callback], max_epochs=2)
    given = [OTHERS["a stream"], loader()] if kind == "fit" else [loader()]
    with pytest.warns(UserWarning, match=says) as seen:
        getattr(trainer, kind)(module, *given)
    assert len(ours(seen)) == 1
    assert logged(trainer) == {}


def test_a_users_own_vim_keeps_its_name_and_settings() -> None:
    module = zoo.built(Small)
    found = logged(fit([monitor(detectors=[ViM(dim=3)])], module))
    assert by_detectors(found) == expected(module.net, names=[ViM(dim=3)])
