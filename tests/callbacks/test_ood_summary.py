"""What is made of the scores: kinds of sets, what is accepted, pictures, and which metrics go where."""

from __future__ import annotations

import math
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
    Small,
    caught,
    data,
    fpr95,
    logged,
    logits,
    near,
    patterns,
    strange,
    trained,
)
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import OODMonitor
from lightning_robust.callbacks.ood_summary import OODSummary
from lightning_robust.metrics import ScoreTable
from lightning_robust.ood import score_histograms, separation

X, Y = strange(), strange(40, 5) * 0.3
SETS = {"one": TensorDataset(X), "two": TensorDataset(Y), "three": TensorDataset(1 - X)}


class Logged(pl.loggers.logger.DummyLogger):
    """A logger that remembers scalars and pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.scalars: dict[str, float] = {}
        self.images: dict[str, Tensor] = {}
        self._experiment = self  # type: ignore[assignment]  # what Lightning asks for

    @property
    def experiment(self) -> Any:
        return self

    def log_metrics(self, metrics: Any, step: Any = None, *_: Any, **__: Any) -> None:
        self.scalars |= {key: float(value) for key, value in metrics.items()}

    def add_image(self, tag: str, picture: Tensor, step: int) -> None:
        self.images[tag] = picture


def run(callback: OODMonitor, module: Any, loaders: Any = None, kind: str = "validate") -> tuple[Any, Logged]:
    logger = Logged()
    trainer = zoo.trainer(callbacks=[callback], logger=logger)
    getattr(trainer, kind)(module, loaders or data(), verbose=False)
    return trainer, logger


# -- near and far ------------------------------------------------------------------------------------------------------


def test_near_and_far_are_means_over_their_sets_and_not_pooled() -> None:
    trainer, logger = run(OODMonitor(SETS, near=["two"], far=["one", "three"]), trained())
    found = logged(trainer)
    for score in SCORES:
        for metric in ("auroc", "fpr95"):
            one, two, three = (found[f"ood/val/{name}/{score}_{metric}"] for name in SETS)
            assert found[f"ood/val/far/{score}_{metric}"] == pytest.approx((one + three) / 2, abs=1e-6)
            assert found[f"ood/val/near/{score}_{metric}"] == pytest.approx(two, abs=1e-6)
        for metric in ("aupr_in", "aupr_out", "fpr95_id_positive"):
            one, three = (found[f"ood/val/{name}/{score}_{metric}"] for name in ("one", "three"))
            assert f"ood/val/far/{score}_{metric}" not in found
            assert logger.scalars[f"ood/val/far/{score}_{metric}"] == pytest.approx((one + three) / 2, abs=1e-6)


@pytest.mark.parametrize("names", [["four"], "one", ["one", "four"]])
def test_kinds_of_sets_that_are_not_there_are_refused(names: Any) -> None:
    for kind in ("near", "far"):
        with pytest.raises(ValueError, match=rf"{kind}= takes a list of names of sets \(one, two, three\), got"):
            OODMonitor(SETS, **{kind: names})


@pytest.mark.parametrize(
    "name", ["near", "far", "accepted", "group", "thresholds", "detectors", "measured_step", "attacked"]
)
def test_names_that_mean_something_else_in_keys_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be called '{name}', which means something else"):
        OODMonitor({name: TensorDataset(X)})


# -- accepted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [90, 100, 7])
def test_of_the_own_validation_data_at_least_95_percent_are_accepted(n: int) -> None:
    module = trained()
    module.net[-1].weight.data *= 4
    trainer, _ = run(OODMonitor(SETS), module, data(n))
    found, z = logged(trainer, accepted=True), logits(module, zoo.images(n))
    right = z.argmax(1) == zoo.labels(n).numpy()
    expected = {}
    for name, score in SCORES.items():
        kept = np.argsort(score(z), kind="stable")[: -(-19 * n // 20)]
        expected[f"ood/val/accepted/{name}_coverage"] = len(kept) / n
        expected[f"ood/val/accepted/{name}_accuracy"] = right[kept].mean()
    assert found == near(expected)


def test_foreign_data_below_the_threshold_are_as_many_as_the_fpr_says() -> None:
    module, callback = trained(), OODMonitor(SETS)
    trainer, _ = run(callback, module)
    for name, score in SCORES.items():
        threshold = callback.section()["ood"]["thresholds"][name]
        accepted = (score(logits(module, X)) <= threshold + 1e-6 * abs(threshold)).mean()
        assert float(trainer.callback_metrics[f"ood/val/one/{name}_fpr95_id_positive"]) == pytest.approx(accepted)


def test_a_fresh_test_accepts_by_the_thresholds_of_the_checkpoint(tmp_path: Path) -> None:
    module = zoo.built(Both)
    trainer = zoo.trainer(max_epochs=3, callbacks=[OODMonitor(SETS)])
    trainer.fit(module, data(), data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    darker = DataLoader(TensorDataset(zoo.images(60, 4) * 0.7, zoo.labels(60)), 16)
    testing = zoo.trainer(callbacks=[OODMonitor(SETS)])
    testing.test(zoo.built(Both), darker, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    own, z = logits(module, zoo.images(90)), logits(module, zoo.images(60, 4) * 0.7)
    found = logged(testing, accepted=True)
    for name, score in SCORES.items():
        kept = score(z) <= np.sort(score(own))[85]
        assert found[f"ood/test/accepted/{name}_coverage"] == pytest.approx(kept.mean(), abs=1e-6)
        right = (z.argmax(1) == zoo.labels(60).numpy())[kept].mean()
        assert found[f"ood/test/accepted/{name}_accuracy"] == pytest.approx(right, abs=1e-6)
    assert len({found[f"ood/test/accepted/{name}_coverage"] for name in SCORES} | {0.95}) > 1


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_without_a_label_are_scored_and_not_judged(streaming: bool) -> None:
    class Some(Both):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            F.cross_entropy(self(batch[0]), batch[1])

    module, labels = trained(Some), zoo.labels(90)
    labels[1::3] = -100
    own = DataLoader(TensorDataset(zoo.images(90), labels), 16)
    trainer, _ = run(OODMonitor(SETS, scores=["msp"], streaming=streaming), module, own)
    z = logits(module, zoo.images(90))
    known, s = labels.numpy() >= 0, SCORES["msp"](z)
    kept = known & (s <= np.sort(s)[85])
    found = logged(trainer, accepted=True)
    assert found["ood/val/accepted/msp_coverage"] == pytest.approx(kept.sum() / 60, abs=1e-6)
    right = (z.argmax(1) == labels.numpy())[kept].mean()
    assert found["ood/val/accepted/msp_accuracy"] == pytest.approx(right, abs=1e-6)
    auroc = roc_auc_score(np.repeat([0, 1], [90, 70]), np.concatenate([s, SCORES["msp"](logits(module, X))]))
    assert logged(trainer)["ood/val/one/msp_auroc"] == pytest.approx(auroc, abs=1 / (90 * 70))  # of one level: a tie


# -- which metrics go where --------------------------------------------------------------------------------------------


def test_intervals_and_the_detection_error_go_to_loggers_alone() -> None:
    module = trained()
    trainer, logger = run(OODMonitor({"one": TensorDataset(X)}), module)
    beside = {"auroc_low", "auroc_high", "fpr95_low", "fpr95_high", "detection_error"}
    for name, score in SCORES.items():
        s_in, s_out = (torch.from_numpy(score(logits(module, x))) for x in (zoo.images(90), X))
        measured = separation(s_in, s_out)
        for metric in beside:
            assert f"ood/val/one/{name}_{metric}" not in trainer.callback_metrics
            assert logger.scalars[f"ood/val/one/{name}_{metric}"] == pytest.approx(measured[metric], abs=1e-5)
    assert len(trainer.callback_metrics) == 4 * (5 + 2) + 1  # val_loss


def test_of_detectors_two_metrics_are_the_trainers_and_the_rest_the_loggers() -> None:
    module = zoo.built(Small)
    callback = OODMonitor({"one": TensorDataset(X)}, scores=["msp"], detectors=["knn"], fit_data=patterns(100))
    trainer, logger = run(callback, module, DataLoader(patterns(90, 1), 16))
    keys = {key.removeprefix("ood/val/") for key in logged(trainer)}
    assert {key for key in keys if "knn" in key} == {"one/knn_auroc", "one/knn_fpr95"}
    assert {"aupr_in", "aupr_out", "fpr95_id_positive", "auroc_low", "detection_error"} <= {
        key.removeprefix("ood/val/one/knn_") for key in logger.scalars
    }
    features = [caught(module.net, part)[0] for part in (patterns(90, 1).tensors[0], X)]
    assert all(len(rows) for rows in features)


def test_histograms_arrive_and_show_what_was_counted() -> None:
    module = trained()
    _, logger = run(OODMonitor(SETS, scores=["energy", "msp"]), module)
    pictures = {tag: image for tag, image in logger.images.items() if tag.startswith("ood/")}
    assert set(pictures) == {"ood/val/energy_histogram", "ood/val/msp_histogram"}
    own, table = ScoreTable(["energy", "right", "group"], 90), ScoreTable(["energy"], 70)
    s_in, s_out = (torch.from_numpy(SCORES["energy"](logits(module, x))) for x in (zoo.images(90), X))
    own.add(torch.arange(90), {"energy": s_in, "right": s_in, "group": s_in})
    table.add(torch.arange(70), {"energy": s_out})
    summary = OODSummary(own, {"one": table}, ["energy"], ["energy"], lambda *_: None)
    ((name, alone),) = summary.pictures("val")
    assert name == "energy"
    ends = [np.sort(s.numpy())[[max(0, math.ceil(q * len(s)) - 1) for q in (0.005, 0.995)]] for s in (s_in, s_out)]
    low, high = min(e[0] for e in ends), max(e[1] for e in ends)
    edges = torch.linspace(low, high, 65, dtype=torch.float64)
    counts = [torch.histc(s.clamp(low, high), 64, low, high) for s in (s_in, s_out)]
    auroc = separation(s_in, s_out)["auroc"]
    threshold = float(s_in.sort().values[85])
    expected = score_histograms(counts[0], {"one": counts[1]}, edges, threshold, "val: energy", {"one": auroc})
    assert torch.equal(alone, expected)


def test_a_picture_says_in_which_epoch_of_a_fit_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []

    def drawn(*given: Any) -> Tensor:
        titles.append(given[4])
        return torch.zeros(3, 4, 4)

    monkeypatch.setattr("lightning_robust.callbacks.ood_summary.score_histograms", drawn)
    callback = OODMonitor(SETS, scores=["msp"])
    module, trainer = trained(), zoo.trainer(callbacks=[callback], logger=Logged(), max_epochs=2)
    trainer.fit(module, data(), data())
    run(callback, module, kind="test")
    assert titles == ["val, epoch 1: msp", "val, epoch 2: msp", "test: msp"]


def test_scores_that_hardly_differ_are_drawn_and_stored() -> None:
    values = 1000 + torch.tensor([0.0, 1e-13, 2e-13, 1e-13], dtype=torch.float64)
    own, table = ScoreTable(["s", "right", "group"], 4), ScoreTable(["s"], 4)
    own.add(torch.arange(4), {"s": values, "right": values, "group": values})
    table.add(torch.arange(4), {"s": values})
    summary = OODSummary(own, {"one": table}, ["s"], ["s"], lambda *_: None)
    assert sum(summary.entry()["one"]["s"]["histogram_in"]) == 4
    assert [picture.shape for _, picture in summary.pictures("val")] == [(3, 440, 560)]


def test_the_fpr_is_that_of_the_first_threshold_that_catches_enough() -> None:
    assert fpr95(np.array([3.0, 2.0, 1.0]), np.array([0.0, 1.0])) == 0.5
