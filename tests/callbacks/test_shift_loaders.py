"""Other labelled data beside the corruptions, the user's own metrics, and groups."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from callbacks import shift_by_hand as hand
from callbacks.shift_by_hand import N, data, pictures, trained
from sklearn.metrics import f1_score
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassF1Score

from lightning_robust import CorruptionMonitor
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.corruptions import corrupt
from lightning_robust.randomness import seeded


def fitted(module: Any, *callbacks: Any, **settings: Any) -> pl.Trainer:
    trainer = zoo.trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, data(), data())
    return trainer


def validated(callback: Any, module: Any = None, loader: Any = None) -> dict[str, float]:
    trainer = zoo.trainer(callbacks=[callback])
    trainer.validate(module or trained(), loader or data(), verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("kind", ["data set", "loader", "list of batches"])
def test_other_labelled_data_are_measured_by_the_same_step(kind: str) -> None:
    module, (x, y) = trained(), pictures(31, seed=8)
    x = x.sqrt()
    source: Any = TensorDataset(x, y)
    if kind == "loader":
        source = DataLoader(source, 5, shuffle=False)
    elif kind == "list of batches":
        source = [[x[i : i + 10], y[i : i + 10]] for i in range(0, 31, 10)]
    callback = CorruptionMonitor(corruptions=[], shift_loaders={"bright": source})
    metrics = validated(callback, module)
    clean = hand.logits_of(module.net, pictures()[0])
    expected = hand.measured(module.net, x, y, clean, hand.temperature_of(clean, pictures()[1]))
    assert callback.section()["shift"]["cells"]["bright"] == pytest.approx(expected, abs=1e-5)
    accuracy = float((torch.from_numpy(clean).argmax(1) == pictures()[1]).double().mean())
    headlines = {key: expected[key] for key in ("accuracy", "nll", "ece", "ece_floor", "ece_scaled", "msp_auroc")}
    headlines["retention"] = expected["accuracy"] / accuracy
    found = {key.split("/")[-1]: value for key, value in metrics.items() if "/bright/" in key}
    assert found == pytest.approx(headlines, abs=1e-5)
    assert set(metrics) == {"val_loss", "shift/val/clean_accuracy", *(f"shift/val/bright/{key}" for key in headlines)}


def test_of_a_data_set_a_seeded_choice_is_taken_and_of_a_loader_the_first_samples() -> None:
    module, (x, y) = trained(), pictures(40, seed=8)
    chosen = sorted(torch.randperm(40, generator=seeded(5)).tolist()[:12])
    sources: dict[str, Any] = {"set": TensorDataset(x, y), "loader": DataLoader(TensorDataset(x, y), 7)}
    callback = CorruptionMonitor(corruptions=[], shift_loaders=sources, max_samples=12, seed=5)
    validated(callback, module)
    cells = callback.section()["shift"]["cells"]
    clean = hand.logits_of(module.net, pictures(N)[0][:12])
    for name, rows in (("set", chosen), ("loader", list(range(12)))):
        expected = hand.measured(module.net, x[rows], y[rows], clean, callback.section()["shift"]["temperature"])
        assert cells[name] == pytest.approx(expected, abs=1e-5), name


def test_they_are_measured_in_every_validation_and_beside_corruptions() -> None:
    other = TensorDataset(*pictures(9, seed=8))
    trainer = fitted(trained(), CorruptionMonitor(shift_loaders={"other": other}, per_epoch=0), max_epochs=1)
    metrics = trainer.callback_metrics
    assert {"shift/val/other/accuracy", "shift/val/mean_accuracy"} <= set(metrics)
    assert "shift/val/other/msp_auroc" in metrics


class Named(hand.Module):
    """Batches are dicts."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["x"]), batch["y"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch["x"]), batch["y"]), batch_size=8)


class Grouped(Dataset[dict[str, Any]]):
    def __init__(self, named: bool = True) -> None:
        self.x, self.y = pictures()
        self.named = named

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Any]:
        group = f"site {i % 3}" if self.named else i % 3
        return {"x": self.x[i], "y": self.y[i], "site": group}


def named() -> Named:
    module = zoo.built(Named)
    module.load_state_dict(trained().state_dict())
    assert isinstance(module, Named)
    return module


def test_data_of_another_make_or_of_other_labels_stop_the_fit_before_its_first_step() -> None:
    x, y = pictures(16)
    strange: dict[str, tuple[Any, type[Exception], str]] = {
        "dict": (Grouped(), ProbeError, r"shift_loaders\['dict'\].*batch\['site'\].*made alike"),
        "labels": (
            TensorDataset(x, y + 8),
            ValueError,
            r"shift_loaders\['labels'\]: .*labels from 0 to 9.*got labels",
        ),
        "empty": (TensorDataset(x[:0], y[:0]), ValueError, r"shift_loaders\['empty'\] gave no batch at all"),
    }
    for name, (source, error, says) in strange.items():
        module = trained()
        with pytest.raises(error, match=says):
            fitted(module, CorruptionMonitor(corruptions=["fog"], shift_loaders={name: source}))
        assert module.trainer.global_step == 0
        assert all(p.requires_grad for p in module.parameters())


def test_the_users_own_metrics_are_those_of_scikit_learn_under_each_shift() -> None:
    module, (x, y) = trained(), pictures()
    callback = CorruptionMonitor(
        corruptions=["fog", "contrast"], severities=[5], metrics={"f1": MulticlassF1Score(10)}, max_samples=50
    )
    metrics, values = validated(callback, module), []
    for name in ("fog", "contrast"):
        z = hand.logits_of(module.net, corrupt(x[:50], name, 5, index=range(50)))
        seen = sorted({*z.argmax(1).tolist(), *y[:50].tolist()})
        values.append(float(f1_score(y[:50], z.argmax(1), average="macro", labels=seen)))
        assert callback.section()["shift"]["cells"][f"{name}_5"]["f1"] == pytest.approx(values[-1], abs=1e-6)
    assert metrics["shift/val/mean_f1"] == pytest.approx(sum(values) / 2, abs=1e-6)
    assert 0 < values[0] != values[1]


def test_a_metric_of_the_users_own_that_fails_is_named() -> None:
    metrics = {"fine": MulticlassF1Score(10), "narrow": MulticlassF1Score(3)}
    with pytest.raises(ValueError, match=r"metrics\['narrow'\] failed on probabilities \(8, 10\) and labels \(8,\)"):
        fitted(trained(), CorruptionMonitor(corruptions=["fog"], metrics=metrics))


def test_a_metric_of_several_numbers_stops_the_fit_before_its_first_step() -> None:
    module = trained()
    callback = CorruptionMonitor(corruptions=["fog"], metrics={"confusion": MulticlassConfusionMatrix(10)})
    with pytest.raises(ValueError, match=r"metrics of one number each, but 'confusion' computes \(10, 10\)"):
        fitted(module, callback)


@pytest.mark.parametrize("texts", [True, False])
def test_the_worst_group_is_that_of_a_plain_loop(texts: bool) -> None:
    module, (x, y) = named(), pictures()
    right = {}
    cells = [(name, severity) for name in ("fog", "contrast") for severity in (3, 5)]
    for cell in cells:
        z = hand.logits_of(module.net, corrupt(x[:41], *cell, index=range(41)))
        right[cell] = torch.from_numpy(z.argmax(1)) == y[:41]
    group = torch.arange(41) % 3

    def worst(chosen: list[tuple[str, int]]) -> list[float]:
        return [float(torch.stack([right[c] for c in chosen])[:, group == g].double().mean()) for g in range(3)]

    callback = CorruptionMonitor(
        corruptions=["fog", "contrast"], severities=[3, 5], group_key="site", max_samples=41, per_epoch=2
    )
    metrics = validated(callback, module, DataLoader(Grouped(texts), 8))
    assert metrics["shift/val/worst_group_accuracy"] == pytest.approx(min(worst(cells)))
    sampled = [(name, 3) for name in ("fog", "contrast")]
    assert metrics["shift/val/sampled_worst_group_accuracy"] == pytest.approx(min(worst(sampled)))
    assert min(worst(cells)) < max(worst(cells))


def test_groups_that_are_not_in_the_batch_stop_the_fit() -> None:
    with pytest.raises(KeyError, match=r"nothing at batch\['site'\]"):
        fitted(trained(), CorruptionMonitor(corruptions=["fog"], group_key="site"))
