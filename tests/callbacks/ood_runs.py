"""What the tests of OODMonitor share: data, trained modules, and every number computed by a plain loop."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from scipy.special import logsumexp
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import OODMonitor
from lightning_robust.ood import detectors_named
from lightning_robust.randomness import seeded


def data(n: int = 90, batch_size: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n), zoo.labels(n)), batch_size)


def strange(n: int = 70, seed: int = 8) -> Tensor:
    """Darker pictures with a bright corner, sorted by how dark they are."""
    x = zoo.images(n, seed) * torch.linspace(0.05, 1, n).view(-1, 1, 1, 1)
    x[:, :, :2, :2] = 1.0
    return x


class Both(zoo.ListBatch):
    """Validates and tests."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))


def trained(shape: type[Any] = Both, loader: Any = None) -> Any:
    module = zoo.built(shape)
    zoo.trainer(max_epochs=4).fit(module, loader or data())
    return module


def logits(module: Any, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(module).eval().net(x).double().numpy()


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z - logsumexp(z, axis=1, keepdims=True))


SCORES = {
    "energy": lambda z: -logsumexp(z, axis=1),
    "max_logit": lambda z: -z.max(1),
    "msp": lambda z: np.log1p(-softmax(z).max(1)),
    "entropy": lambda z: -(softmax(z) * np.log(softmax(z))).sum(1),
}


def fpr95(positive: np.ndarray, negative: np.ndarray) -> float:
    """Negatives at or above the highest threshold that catches 95 % of the positives, tried one by one."""
    for threshold in sorted(positive, reverse=True):
        if 20 * (positive >= threshold).sum() >= 19 * len(positive):
            return float((negative >= threshold).mean())
    raise AssertionError("there is always the lowest threshold")


def by_hand(inside: np.ndarray, outside: np.ndarray, key: str) -> dict[str, float]:
    found = {}
    for name, score in SCORES.items():
        s_in, s_out = score(inside), score(outside)
        both, is_out = np.concatenate([s_in, s_out]), np.repeat([0, 1], [len(s_in), len(s_out)])
        found |= {
            f"{key}/{name}_auroc": roc_auc_score(is_out, both),
            f"{key}/{name}_aupr_out": average_precision_score(is_out, both),
            f"{key}/{name}_aupr_in": average_precision_score(1 - is_out, -both),
            f"{key}/{name}_fpr95": fpr95(s_out, s_in),
            f"{key}/{name}_fpr95_id_positive": fpr95(-s_in, -s_out),
        }
    return found


def measured(module: Any, callback: OODMonitor, kind: str = "validate", loaders: Any = None, **where: Any) -> Any:
    trainer = zoo.trainer(callbacks=[callback])
    loaders = {} if "datamodule" in where else {"dataloaders": loaders or data()}
    getattr(trainer, kind)(module, verbose=False, **loaders, **where)
    return logged(trainer)


def logged(trainer: Any, accepted: bool = False) -> dict[str, float]:
    """What is said about sets; or about the own data, which have tests of their own."""
    found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("ood")}
    return {k: v for k, v in found.items() if ("/accepted/" in k) is accepted}


def ours(seen: Any) -> list[str]:
    return [str(warning.message) for warning in seen if "OODMonitor" in str(warning.message)]


def near(expected: dict[str, float]) -> Any:
    return pytest.approx(expected, abs=1e-6)


# -- detectors -------------------------------------------------------------------------------------------------------


class Small(Both):
    """Twelve features, whose spread a few dozen samples show; no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))


def patterns(n: int, seed: int = 0) -> TensorDataset:
    """Noise on top of a pattern for each of ten classes."""
    labels = zoo.labels(n)
    return TensorDataset((zoo.images(n, seed) + zoo.images(10, 99)[labels]) / 2, labels)


def caught(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits by a plain forward."""
    with torch.no_grad():
        net = copy.deepcopy(net).eval()
        features = net[:-1](x)
        return features, net[-1](features)


def fitted(names: list[Any], net: Any, data: TensorDataset, samples: int, seed: int = 0) -> dict[str, Any]:
    """Detectors fitted on the samples that the monitor chooses."""
    chosen = sorted(torch.randperm(len(data), generator=seeded(seed)).tolist()[:samples])
    x, y = (column[chosen] for column in data.tensors)
    features, z = caught(net, x)
    detectors = detectors_named(names)
    for detector in detectors.values():
        detector.add(features, z, y, torch.arange(len(x)))
        detector.fit(net[-1])
    return detectors


def separated(s_in: Any, s_out: Any, key: str) -> dict[str, float]:
    """What the Trainer's metrics say of a detector."""
    s_in, s_out = (np.asarray(side, dtype=np.float64) for side in (s_in, s_out))
    is_out = np.repeat([0, 1], [len(s_in), len(s_out)])
    return {
        f"{key}_auroc": roc_auc_score(is_out, np.concatenate([s_in, s_out])),
        f"{key}_fpr95": fpr95(s_out, s_in),
    }


def detected(detectors: dict[str, Any], net: Any, inside: Tensor, outside: Tensor, key: str) -> dict[str, float]:
    sides = [caught(net, x) for x in (inside, outside)]
    return {
        k: v
        for name, detector in detectors.items()
        for k, v in separated(*(detector(*side) for side in sides), f"{key}/{name}").items()
    }
