"""Groups in the batch: which own data are rejected, and which are worst told from foreign ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zoo
from callbacks.ood_runs import SCORES, Both, logged, logits, strange
from callbacks.test_ood_summary import Logged
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import OODMonitor, read_entry

X = strange()
N = 90
SITES = np.array(["north", "south", "east"])[np.arange(N) * 7 % 3]
OWN = zoo.images(N) * (0.4 + 0.3 * (zoo.labels(N, 3) == 1)).view(-1, 1, 1, 1)


class Sited(Both):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["image"]), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        F.cross_entropy(self(batch["image"]), batch["label"])

    test_step = validation_step


def loader(key: str = "site", batch_size: int = 16) -> DataLoader[Any]:
    rows = [
        {"image": image, "label": i % 10, "site": str(SITES[i]), "number": i * 7 % 3} for i, image in enumerate(OWN)
    ]
    return DataLoader(rows, batch_size)


def groups_by_hand(module: Any, names: np.ndarray, threshold: Any = None) -> tuple[dict[str, float], dict[str, float]]:
    inside, outside = logits(module, OWN), logits(module, X)
    worst, rejected = {}, {}
    for score, of in SCORES.items():
        s_in, s_out = of(inside), of(outside)
        limit = np.sort(s_in)[85] if threshold is None else threshold[score]
        parts = {name: s_in[names == name] for name in np.unique(names)}
        aurocs = [
            roc_auc_score(np.repeat([0, 1], [len(s), len(s_out)]), np.concatenate([s, s_out])) for s in parts.values()
        ]
        worst[f"s/{score}_worst_group_auroc"] = min(aurocs)
        rejected |= {f"group/{name}/{score}_rejected": (s > limit + 1e-6).mean() for name, s in parts.items()}
    return worst, rejected


@pytest.mark.parametrize(("key", "names"), [("site", SITES), ("number", (np.arange(N) * 7 % 3).astype(str))])
def test_the_worst_group_and_the_share_of_each_that_is_rejected(key: str, names: np.ndarray) -> None:
    module = zoo.built(Sited)
    module.net[-1].weight.data *= 3
    logger = Logged()
    trainer = zoo.trainer(callbacks=[OODMonitor({"s": TensorDataset(X)}, group_key=key)], logger=logger)
    trainer.validate(module, loader(), verbose=False)
    worst, rejected = groups_by_hand(module, names)
    found = logged(trainer)
    assert {f"s/{k.removeprefix('ood/val/s/')}": v for k, v in found.items() if "worst" in k} == pytest.approx(
        worst, abs=1e-6
    )
    assert {k: v for k, v in logger.scalars.items() if "/group/" in k} == pytest.approx(
        {f"ood/val/{k}": v for k, v in rejected.items()}, abs=1e-6
    )
    assert not [k for k in found if "/group/" in k]
    assert len(set(rejected.values())) > 1
    for score in SCORES:
        assert worst[f"s/{score}_worst_group_auroc"] <= found[f"ood/val/s/{score}_auroc"] + 1e-6


def test_a_test_rejects_by_the_thresholds_of_the_checkpoint(tmp_path: Any) -> None:
    module = zoo.built(Sited)
    trainer = zoo.trainer(callbacks=[OODMonitor({"s": TensorDataset(X)})], max_epochs=2)
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    thresholds = read_entry(tmp_path / "x.ckpt")["ood"]["thresholds"]
    assert set(thresholds) == set(SCORES)
    logger = Logged()
    testing = zoo.trainer(callbacks=[OODMonitor({"s": TensorDataset(X)}, group_key="site")], logger=logger)
    testing.test(zoo.built(Sited), loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    _, rejected = groups_by_hand(module, SITES, thresholds)
    assert {k: v for k, v in logger.scalars.items() if "/group/" in k} == pytest.approx(
        {f"ood/test/{k}": v for k, v in rejected.items()}, abs=1e-6
    )


def test_a_key_that_leads_to_no_groups_is_an_error_in_the_sanity_check() -> None:
    for key, says in (("nowhere", "nowhere"), ("image", "whole number or a string for each of 16 samples")):
        trainer = zoo.trainer(callbacks=[OODMonitor({"s": TensorDataset(X)}, group_key=key)])
        with pytest.raises((ValueError, KeyError), match=says):
            trainer.fit(zoo.built(Sited), loader(), loader())
        assert trainer.global_step == 0


def test_counted_scores_know_no_groups() -> None:
    with pytest.raises(ValueError, match="streaming= keeps no single sample, so that group_key= has nothing"):
        OODMonitor({"s": TensorDataset(X)}, group_key="site", streaming=True)
