"""Modules written as strangers write them, each with its loss written out once more by hand.

Every module classifies images ``(N, 1, 8, 8)``. ``batch(n)`` makes the batch it wants, ``image(batch)`` says where the
image is, and ``by_hand(batch, x)`` computes, without the probe, the logits and targets that its loss gets when the
image is ``x``, and the per-sample losses whose sum an attack has to climb.
"""

from __future__ import annotations

import random
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

Pair = namedtuple("Pair", "image label")


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def labels(n: int, classes: int = 10) -> Tensor:
    return torch.arange(n) % classes


def network(outputs: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(6 * 64, outputs),
    )


class Shape(pl.LightningModule):
    """What all of them share: an optimizer, and the plain case of everything else."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.net = network(outputs)

    @staticmethod
    def batch(n: int) -> Any:
        return [images(n), labels(n)]

    @staticmethod
    def image(batch: Any) -> Tensor:
        return batch[0]

    def by_hand(self, batch: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.net(x)
        return logits, batch[1], F.cross_entropy(logits, batch[1], reduction="none")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class ListBatch(Shape):
    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))


class TupleBatchCallsNet(Shape):
    @staticmethod
    def batch(n):
        return images(n), labels(n)

    def training_step(self, batch, batch_idx):
        loss = nn.CrossEntropyLoss()(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss


class DictBatchWithExtras(Shape):
    @staticmethod
    def batch(n):
        return {"image": images(n), "label": labels(n), "weight": torch.rand(n), "name": ["x"] * n, "mask": None}

    @staticmethod
    def image(batch):
        return batch["image"]

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        logits = self.forward(batch["image"])
        losses = F.cross_entropy(logits, batch["label"], reduction="none")
        return (losses * batch["weight"]).mean()

    def by_hand(self, batch, x):
        logits = self.net(x)
        return logits, batch["label"], F.cross_entropy(logits, batch["label"], reduction="none")


class NamedTupleBatch(Shape):
    @staticmethod
    def batch(n):
        return Pair(images(n), labels(n))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net.forward(batch.image), batch.label)


@dataclass
class Sample:
    pixels: Tensor
    truth: Tensor
    source: str = "here"


class DataclassBatch(Shape):
    @staticmethod
    def batch(n):
        return Sample(images(n), labels(n))

    @staticmethod
    def image(batch):
        return batch.pixels

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch.pixels), batch.truth)

    def by_hand(self, batch, x):
        logits = self.net(x)
        return logits, batch.truth, F.cross_entropy(logits, batch.truth, reduction="none")


class NestedBatch(Shape):
    @staticmethod
    def batch(n):
        return (images(n), {"id": torch.arange(n)}), labels(n)

    @staticmethod
    def image(batch):
        return batch[0][0]

    def training_step(self, batch, batch_idx):
        (x, _meta), y = batch
        return F.cross_entropy(self.net(x), y)


class NoForward(Shape):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = self.net[:-1], self.net[-1]

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(self.encoder(x)), y)


class LogSoftmaxNLL(Shape):
    def forward(self, x):
        return F.log_softmax(self.net(x), dim=1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.nll_loss(self(x), y)

    def by_hand(self, batch, x):
        log_p = self.net(x).log_softmax(1)
        return log_p, batch[1], -log_p.gather(1, batch[1][:, None]).squeeze(1)


class SigmoidMultiLabel(Shape):
    def __init__(self):
        super().__init__(outputs=4)

    @staticmethod
    def batch(n):
        return [images(n), (torch.arange(4 * n).view(n, 4) % 3 == 0).float()]

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.binary_cross_entropy(torch.sigmoid(self.net(x)), y)

    def by_hand(self, batch, x):
        p, y = torch.sigmoid(self.net(x)), batch[1]
        return p, y, -(y * p.log() + (1 - y) * (1 - p).log()).sum(1)


class OneLogitBinary(Shape):
    def __init__(self):
        super().__init__(outputs=1)

    @staticmethod
    def batch(n):
        return [images(n), labels(n, 2)]

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.binary_cross_entropy_with_logits(self.net(x), y.float().unsqueeze(1))

    def by_hand(self, batch, x):
        z, y = self.net(x), batch[1].float().unsqueeze(1)
        return z, y, (F.softplus(z) - y * z).squeeze(1)


class ForwardReturnsTuple(Shape):
    def forward(self, x):
        features = self.net[:-1](x)
        return self.net[-1](features), features

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits, _features = self(x)
        return F.cross_entropy(logits, y)


class ForwardReturnsDict(Shape):
    def forward(self, x):
        return {"logits": self.net(x), "input": x}

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x)["logits"], y)


class ForwardReturnsLoss(Shape):
    def forward(self, x, y):
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self(*batch)


class StepReturnsDict(Shape):
    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, y), "predictions": logits.detach().argmax(1)}


class NoBatchIdx(Shape):
    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class SharedStepWithMetrics(Shape):
    def __init__(self):
        super().__init__()
        self.before = torchmetrics.MeanMetric()
        self.after = torchmetrics.Accuracy(task="multiclass", num_classes=10)
        self.unregistered = [torchmetrics.MeanMetric()]

    def _step(self, batch, stage):
        x, y = batch
        self.before.update(x.mean())
        self.unregistered[0].update(x.std())
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.after(logits, y)
        self.log(f"{stage}/loss", loss)
        self.log(f"{stage}/accuracy", self.after)
        return loss

    def training_step(self, batch, batch_idx):
        return self._step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self._step(batch, "val")


class NumpyMixup(Shape):
    def mixed(self, x, y):
        lam = np.random.beta(0.4, 0.4)
        order = np.random.permutation(len(x))
        if random.random() < 0.5:
            lam = 1 - lam
        soft = F.one_hot(y, 10).float()
        return lam * x + (1 - lam) * x[order], lam * soft + (1 - lam) * soft[order]

    def training_step(self, batch, batch_idx):
        x, y = self.mixed(*batch)
        return F.cross_entropy(self.net(x), y)

    def by_hand(self, batch, x):
        mixed, soft = self.mixed(x, batch[1])
        logits = self.net(mixed)
        return logits, soft, -(soft * logits.log_softmax(1)).sum(1)


class WeightsAndSmoothing(Shape):
    def __init__(self):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(weight=torch.linspace(0.1, 2, 10), label_smoothing=0.1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self.net(x), y)

    def by_hand(self, batch, x):
        logits, y = self.net(x), batch[1]
        weight = torch.linspace(0.1, 2, 10)
        log_p = logits.log_softmax(1)
        hard = -log_p.gather(1, y[:, None]).squeeze(1) * weight[y]
        return logits, y, 0.9 * hard + 0.1 * -(log_p * weight).mean(1)


class BareImport(Shape):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self.net(x), y)


class NormalisesInModel(Shape):
    def forward(self, x):
        return self.net((x - 0.3) / 0.2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def by_hand(self, batch, x):
        logits = self.net((x - 0.3) / 0.2)
        return logits, batch[1], F.cross_entropy(logits, batch[1], reduction="none")


class WritesIntoItsBatch(Shape):
    @staticmethod
    def batch(n):
        return [images(n), labels(n) + 1]

    def training_step(self, batch, batch_idx):
        x, y = batch
        x.sub_(0.5).mul_(2)
        y.sub_(1)  # labels that start at 1
        return F.cross_entropy(self.net(x), y)

    def by_hand(self, batch, x):
        logits, y = self.net((x - 0.5) * 2), batch[1] - 1
        return logits, y, F.cross_entropy(logits, y, reduction="none")


class ManualOptimisation(Shape):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self.net(x), y)
        self.manual_backward(loss)
        optimizer.step()
        self.log("loss", loss)


class SideEffects(Shape):
    def __init__(self):
        super().__init__()
        self.seen: list[float] = []
        self.table: dict[str, int] = {"calls": 0}
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(float(x.mean()) + x.numpy().mean())
        self.table["calls"] += 1
        self.steps += 1
        self.last_input = x
        x = x + 0.01 * torch.rand_like(x) * random.random() * np.random.rand()
        logits = self.net(x)
        self.log_dict({"a": x.mean(), "b": logits.mean()})
        return F.cross_entropy(logits, y)

    def by_hand(self, batch, x):
        x = x + 0.01 * torch.rand_like(x) * random.random() * np.random.rand()
        logits = self.net(x)
        return logits, batch[1], F.cross_entropy(logits, batch[1], reduction="none")


ZOO: list[type[Shape]] = [
    ListBatch,
    TupleBatchCallsNet,
    DictBatchWithExtras,
    NamedTupleBatch,
    DataclassBatch,
    NestedBatch,
    NoForward,
    LogSoftmaxNLL,
    SigmoidMultiLabel,
    OneLogitBinary,
    ForwardReturnsTuple,
    ForwardReturnsDict,
    ForwardReturnsLoss,
    StepReturnsDict,
    NoBatchIdx,
    SharedStepWithMetrics,
    NumpyMixup,
    WeightsAndSmoothing,
    BareImport,
    NormalisesInModel,
    WritesIntoItsBatch,
    ManualOptimisation,
    SideEffects,
]


class Batches(torch.utils.data.Dataset):
    """A few ready-made batches of one shape."""

    def __init__(self, shape: type[Shape], sizes: tuple[int, ...] = (16, 16)) -> None:
        self.shape, self.sizes = shape, sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Any:
        return self.shape.batch(self.sizes[index])


def loader(shape: type[Shape], sizes: tuple[int, ...] = (16, 16)) -> torch.utils.data.DataLoader:
    # Without a collate function lists would come out where tuples went in.
    return torch.utils.data.DataLoader(Batches(shape, sizes), batch_size=None, collate_fn=lambda batch: batch)


def trainer(**settings: Any) -> pl.Trainer:
    """A Trainer that writes nothing and says nothing."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    return pl.Trainer(**{**quiet, **settings})


recent = pytest.mark.skipif(
    tuple(map(int, pl.__version__.split(".")[:2])) < (2, 6), reason="older Lightnings save and resume at other moments"
)
averaging = pytest.mark.skipif(
    not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="this Lightning averages no weights (EMAWeightAveraging)"
)


def built(shape: type[Shape], seed: int = 0) -> Shape:
    """The module with weights, and a run, that depend on the seed alone."""
    pl.seed_everything(seed, verbose=False)
    return shape()


def standalone(shape: type[Shape]) -> Shape:
    """The module without a Trainer around it; manual optimisation asks for optimizers all the same."""
    module = built(shape)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    vars(module)["optimizers"] = lambda: optimizer
    return module
