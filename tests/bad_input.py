"""Modules and loaders with something wrong with them, for the table of errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PGD, RobustTrainingMixin, ThreatModel

THREAT = ThreatModel("linf", 0.1)
ATTACK = PGD(THREAT, steps=1)
N, BATCH = 48, 16
X, Y = zoo.images(N), zoo.labels(N)


class Plain(zoo.ListBatch):
    """A module that nothing is wrong with."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)


def plain() -> Plain:
    return zoo.built(Plain)


# -- loaders ---------------------------------------------------------------------------------------------------------


def loader(x: Tensor = X, *others: Tensor, **settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, *(others or (Y,))), BATCH, **settings)


def normalised() -> DataLoader[Any]:
    return loader((X - 0.5) / 0.25)


def bytes_as_floats() -> DataLoader[Any]:
    x = (X * 255).round()
    x[:, 0, 0, :2] = torch.tensor([0.0, 255.0])
    return loader(x)


def bytes_() -> DataLoader[Any]:
    return loader((X * 255).to(torch.uint8))


def with_rows(first: int, value: float) -> DataLoader[Any]:
    x = X.clone()
    x[first] = value
    return loader(x)


def nan_inputs() -> DataLoader[Any]:
    return with_rows(3, torch.nan)


def infinite_inputs() -> DataLoader[Any]:
    return with_rows(3, torch.inf)


def nan_later() -> DataLoader[Any]:
    return with_rows(2 * BATCH, torch.nan)


def overshoots_later() -> DataLoader[Any]:
    return with_rows(2 * BATCH, 1.5)


def ready(batch: Any) -> DataLoader[Any]:
    """Three times a batch that is made already."""
    return DataLoader([batch] * 3, batch_size=None)


def fewer_labels() -> DataLoader[Any]:
    return ready([X[:BATCH], Y[: BATCH // 2]])


def labels_beyond() -> DataLoader[Any]:
    return loader(X, Y + 3)


def shuffled() -> DataLoader[Any]:
    return loader(shuffle=True)


def masks_of_another_shape() -> DataLoader[Any]:
    return loader(X, Y, torch.ones(N, 3))


def bits() -> DataLoader[Any]:
    return loader(X, (torch.arange(4 * N).view(N, 4) % 3 == 0).float())


def tokens() -> DataLoader[Any]:
    return ready({"ids": torch.ones(BATCH, 5).long(), "label": zoo.labels(BATCH)})


def towers() -> DataLoader[Any]:
    return ready({"left": X[:BATCH], "right": X[BATCH : 2 * BATCH], "few": X[:1], "label": zoo.labels(BATCH)})


def boxes() -> DataLoader[Any]:
    return ready({"image": X[:BATCH], "boxes": torch.rand(BATCH, 10)})


def table() -> DataLoader[Any]:
    return loader(X.flatten(1))


def pixels_labelled() -> DataLoader[Any]:
    return ready([X[:BATCH], torch.zeros(BATCH, 8).long()])


# -- modules ---------------------------------------------------------------------------------------------------------


def nan_weights() -> Plain:
    module = plain()
    nn.init.constant_(module.net[-1].weight, torch.nan)
    return module


def compiled() -> Plain:
    module = plain()
    module.net = torch.compile(module.net, backend="aot_eager")
    return module


class Tokens(zoo.Shape):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(40, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["ids"]), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)


class ScalesBytes(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float() / 255 if x.dtype == torch.uint8 else x)


class Frozen(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.net[:-1](x)
        return self.net[-1](features)


class Towers(zoo.Shape):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["left"] + batch["right"] + batch["few"]), batch["label"])


class HandWritten(zoo.Shape):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return -self.net(x).log_softmax(1).gather(1, y[:, None]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)


class Regression(zoo.Shape):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0])[:, 0], batch[1].float())

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)


class Detection(zoo.Shape):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.smooth_l1_loss(self.net(batch["image"]), batch["boxes"])


class Masked(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[:2], batch_idx)


class Rounds(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.round())


class TakesIterator(zoo.Shape):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
        batch, _, _ = next(dataloader_iter)
        return F.cross_entropy(self.net(batch[0]), batch[1])


class ReturnsText(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)
        return "done"


class LosesItsLoss(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) if batch_idx == 0 else None
        return self.net(batch[0]).pow(2).mean() if loss is None else loss


class BareBackward(zoo.ManualOptimisation):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        F.cross_entropy(self.net(batch[0]), batch[1]).backward()
        optimizer.step()


class Forgets(RobustTrainingMixin, zoo.ListBatch):
    by_hand = True

    def configure_robustness(self) -> list[Any]:
        return [ATTACK]


class AsksTwice(Forgets):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.perturbed(batch)
        return super().training_step(self.perturbed(batch), batch_idx)


class Softmaxed(zoo.Shape):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).softmax(1), batch[1])


class WithoutLogarithm(zoo.Shape):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(self.net(batch[0]).softmax(1), batch[1])


class LogProbabilities(zoo.LogSoftmaxNLL):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)


class MultiLabel(zoo.SigmoidMultiLabel):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)


class Table(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)


class Silent(Plain):
    """Validates without a loss."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).argmax(1)


class Pixelwise(zoo.Shape):
    """Several rows a sample, flattened into the batch."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows = batch[0].flatten(0, 2)
        return F.cross_entropy(F.pad(rows, (0, 2)), batch[1].flatten())


class _Square(torch.autograd.Function):
    """Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class OnceDifferentiable(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(_Square.apply(x))


class TooFar:
    threat = THREAT

    def __call__(self, logits_fn: Any, x: Tensor, y: Tensor) -> Tensor:
        return x + 0.2
