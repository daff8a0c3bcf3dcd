"""Accuracy, NLL, calibration and detectability under corruptions, by plain loops over numbers."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
import zoo
from scipy.optimize import minimize_scalar
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.calibration import Reliability
from lightning_robust.corruptions import corrupt

N = 53


class Module(zoo.ListBatch):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))


def pictures(n: int = N, channels: int = 1, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Something to learn, of which corruptions take some away: the class is a bright spot, at one of four places."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    x = 0.55 * torch.rand(n, channels, 8, 8, generator=generator)
    for i, label in enumerate(y.tolist()):
        x[i, :, 4 * (label // 2) + 1 : 4 * (label // 2) + 3, 4 * (label % 2) + 1 : 4 * (label % 2) + 3] += 0.3
    wrong = torch.rand(n, generator=generator) < 0.1
    return x, torch.where(wrong, (y + 1) % 4, y)


def data(n: int = N, batch_size: int = 8, channels: int = 1, **settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*pictures(n, channels)), batch_size, **settings)


@cache
def _state() -> dict[str, Tensor]:
    """Of a net that did not see the pictures that it is measured on: they have a best temperature."""
    module = zoo.built(Module)
    zoo.trainer(max_epochs=8).fit(module, DataLoader(TensorDataset(*pictures(seed=4)), 8))
    return {key: value.clone() for key, value in module.state_dict().items()}


def trained() -> Module:
    """A net that is often right, and less often under corruptions."""
    module = zoo.built(Module)
    module.load_state_dict(_state())
    assert isinstance(module, Module)
    return module


def logits_of(net: nn.Module, x: Tensor) -> np.ndarray[Any, Any]:
    was = net.training
    with torch.no_grad():
        z: np.ndarray[Any, Any] = net.eval()(x).double().numpy()
    net.train(was)
    return z


def log_softmax(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def nll(z: np.ndarray[Any, Any], y: Tensor, temperature: float = 1.0) -> float:
    return float(np.mean([-row[label] for row, label in zip(log_softmax(z / temperature), y.tolist(), strict=True)]))


def ece(z: np.ndarray[Any, Any], y: Tensor, temperature: float = 1.0, bins: int = 15) -> float:
    p = np.exp(log_softmax(z / temperature))
    sums = np.zeros(bins)
    for row, label in zip(p, y.tolist(), strict=True):
        sums[min(bins - 1, math.ceil(row.max() * bins) - 1)] += row.max() - float(row.argmax() == label)
    return float(np.abs(sums).sum() / len(y))


def temperature_of(z: np.ndarray[Any, Any], y: Tensor) -> float:
    found = minimize_scalar(lambda b: nll(z, y, 1 / b), bounds=(0.02, 50), method="bounded", options={"xatol": 1e-10})
    return float(1 / found.x)


def measured(
    net: nn.Module, x: Tensor, y: Tensor, clean: np.ndarray[Any, Any], temperature: float | None
) -> dict[str, float]:
    """What is said of one cell, compared with logits of the same samples without corruption."""
    z = logits_of(net, x)
    p = np.exp(log_softmax(z))
    own, other = (log_softmax(v).max(1) for v in (clean, z))
    far = np.concatenate([np.zeros(len(own)), np.ones(len(other))])
    values = {
        "accuracy": float(np.mean(z.argmax(1) == y.numpy())),
        "nll": nll(z, y),
        "ece": ece(z, y),
        "ece_floor": Reliability.of(torch.from_numpy(z).float().log_softmax(1), y).floor(),
        "confidence": float(p.max(1).mean()),
        "msp_auroc": float(roc_auc_score(far, -np.concatenate([own, other]))),
    }
    if temperature is not None:
        values |= {"ece_scaled": ece(z, y, temperature), "nll_scaled": nll(z, y, temperature)}
    return values


def by_hand(
    net: nn.Module, name: str, severity: int, n: int, temperature: float | None, *, seed: int = 0
) -> dict[str, float]:
    """One cell, of the first ``n`` samples."""
    x, y = (column[:n] for column in pictures())
    return measured(net, corrupt(x, name, severity, index=range(n), seed=seed), y, logits_of(net, x), temperature)
