"""Counted scores against those that are kept, and any number of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from callbacks.ood_runs import Small, data, fpr95, logged, patterns, strange, trained
from callbacks.test_ood_summary import Logged
from scipy.special import logsumexp
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_robust import OODMonitor
from lightning_robust.ood.streaming import LEVELS

X = strange()
SETS = {"s": TensorDataset(X)}


class Rows(Dataset[Any]):
    """Ready batches of many short rows, drawn anew for each index."""

    def __init__(self, batches: int, size: int = 4000, shift: float = 0.0, labels: bool = True) -> None:
        self.batches, self.size, self.shift, self.labels = batches, size, shift, labels

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Any:
        draws = torch.Generator().manual_seed(index + 1000 * int(self.shift * 10))
        x = torch.randn(self.size, 4, generator=draws) + self.shift
        return [x, x.argmax(1)] if self.labels else [x]


class Linear(zoo.Shape):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        F.cross_entropy(self.net(batch[0]), batch[1])

    test_step = validation_step


def all_rows(rows: Rows) -> Tensor:
    return torch.cat([rows[i][0] for i in range(len(rows))])


def test_more_samples_than_are_kept_all_count() -> None:
    own, foreign = Rows(16), Rows(15, shift=0.7, labels=False)
    module = zoo.built(Linear)
    module.net.weight.data *= 3
    callback = OODMonitor(
        {"away": [foreign[i] for i in range(15)]}, scores=["energy", "msp"], streaming=True, max_samples=60_000
    )
    trainer = zoo.trainer(callbacks=[callback])
    trainer.validate(module, DataLoader(own, batch_size=None), verbose=False)
    with torch.no_grad():
        inside, outside = (module.net(all_rows(rows)).double().numpy() for rows in (own, foreign))
    assert (len(inside), len(outside)) == (64_000, 60_000)
    s_in, s_out = (-logsumexp(z, axis=1) for z in (inside, outside))
    is_out, both = np.repeat([0, 1], [64_000, 60_000]), np.concatenate([s_in, s_out])
    found = {k.removeprefix("ood/val/"): float(v) for k, v in trainer.callback_metrics.items()}
    assert found["away/energy_auroc"] == pytest.approx(roc_auc_score(is_out, both), abs=1e-5)
    assert found["away/energy_aupr_out"] == pytest.approx(average_precision_score(is_out, both), abs=1e-4)
    assert found["away/energy_aupr_in"] == pytest.approx(average_precision_score(1 - is_out, -both), abs=1e-4)
    ordered = np.sort(s_out)[::-1]
    assert found["away/energy_fpr95"] == pytest.approx((s_in >= ordered[57_000 - 1]).mean(), abs=2e-3)
    threshold = np.sort(s_in)[60_800 - 1]
    kept = s_in <= threshold
    right = inside.argmax(1) == all_rows(own).argmax(1).numpy()
    assert found["accepted/energy_coverage"] == pytest.approx(0.95, abs=2e-3)
    assert found["accepted/energy_accuracy"] == pytest.approx(right[kept].mean(), abs=2e-3)
    stored = callback.section()["ood"]["away"]["energy"]
    assert sum(stored["histogram_in"]) == pytest.approx(64_000)
    assert sum(stored["histogram_out"]) == pytest.approx(60_000)
    # Without counting, the first 50,000 are kept.
    kept_only = OODMonitor({"away": [foreign[0]]}, scores=["energy"])
    zoo.trainer(callbacks=[kept_only]).validate(module, DataLoader(own, batch_size=None), verbose=False)
    assert sum(kept_only.section()["ood"]["away"]["energy"]["histogram_in"]) == 50_000


def test_counted_and_kept_scores_say_the_same_up_to_ties() -> None:
    module = trained()
    found = []
    for streaming in (False, True):
        trainer = zoo.trainer(callbacks=[OODMonitor(SETS, streaming=streaming)])
        trainer.validate(module, data(), verbose=False)
        found.append(logged(trainer) | logged(trainer, accepted=True))
    assert found[0].keys() == found[1].keys()
    assert found[1] == pytest.approx(found[0], abs=0.03)  # one sample is 0.014 of a set
    aurocs = [{k: v for k, v in each.items() if k.endswith("auroc")} for each in found]
    assert aurocs[1] == pytest.approx(aurocs[0], abs=5 / (90 * 70))


def test_a_fresh_test_takes_the_thresholds_of_a_counted_validation(tmp_path: Path) -> None:
    module = zoo.built(Small)
    settings: dict[str, Any] = {"scores": ["energy"], "detectors": ["mahalanobis"], "streaming": True}
    own = DataLoader(patterns(90, 1), 16)
    trainer = zoo.trainer(callbacks=[OODMonitor(SETS, **settings)])
    trainer.fit(module, DataLoader(patterns(80), 16), own)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    testing = zoo.trainer(callbacks=[OODMonitor(SETS, **settings)])
    testing.test(zoo.built(Small), own, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    fitted = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("ood")}
    tested = {k.replace("/test/", "/val/"): float(v) for k, v in testing.callback_metrics.items() if "ood" in k}
    assert tested == pytest.approx(fitted, abs=1e-6)


def test_counted_scores_are_drawn() -> None:
    logger = Logged()
    trainer = zoo.trainer(callbacks=[OODMonitor(SETS, streaming=True, scores=["energy"])], logger=logger)
    trainer.validate(trained(), data(), verbose=False)
    assert logger.images["ood/val/energy_histogram"].shape == (3, 440, 560)
    assert float(logger.images["ood/val/energy_histogram"].min()) < 0.5


def test_what_is_kept_of_counted_scores_is_of_fixed_size() -> None:
    sizes = []

    class Weighed(OODMonitor):
        def finish(self, *where: Any) -> None:
            sizes.append(self._own.state().nbytes)
            super().finish(*where)

    for batches in (1, 3):
        callback = Weighed({"away": [Rows(1, labels=False)[0]]}, scores=["energy", "msp"], streaming=True)
        zoo.trainer(callbacks=[callback]).validate(
            zoo.built(Linear), DataLoader(Rows(batches), batch_size=None), verbose=False
        )
    assert sizes == [6 * 8 * (LEVELS + 1)] * 2  # each score of all, of the right and of the wrong


def test_large_thresholds_judge_too() -> None:
    class Large(Linear):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            F.cross_entropy(1e20 * self.net(batch[0]), batch[1])

    callback = OODMonitor({"away": [Rows(1, 50, 0.7, labels=False)[0]]}, scores=["energy"], streaming=True)
    trainer = zoo.trainer(callbacks=[callback])
    trainer.validate(zoo.built(Large), DataLoader(Rows(1, 100), batch_size=None), verbose=False)
    found = logged(trainer, accepted=True)
    assert found["ood/val/accepted/energy_coverage"] == pytest.approx(0.95, abs=0.02)


def test_the_reference_counts_whole_tie_groups() -> None:
    assert fpr95(np.array([1.0, 1.0]), np.array([1.0, 0.0])) == 0.5
