"""Runs with penalties, modules for them, and penalties written out by hand."""

from __future__ import annotations

import copy
import inspect
import zlib
from pathlib import Path
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import InputGradientPenalty, SaliencyRegularization, ThreatModel
from lightning_robust.penalties import AttributionPrior, JacobianPenalty, SaliencyConsistency, SaliencyGuided
from lightning_robust.randomness import RandomState, seeded
from lightning_robust.recipe import compose, instantiate

THREAT = ThreatModel("linf", 0.1)
WEIGHT = 0.5
METHODS = ["finite_differences", "double_backward"]
OTHERS: dict[str, Any] = {
    "jacobian": JacobianPenalty(),
    "jacobian, two, exact": JacobianPenalty(2, "double_backward"),
    "guided": SaliencyGuided(),
    "variation": AttributionPrior(),
    "gini": AttributionPrior("gini"),
    "sparsity": AttributionPrior("sparsity", samples=2),
    "consistency": SaliencyConsistency(),
}


def drawing(penalty: Any, *keys: int, seed: int = 0) -> torch.Generator:
    """The random numbers of a penalty in a callback without a name."""
    who = zlib.crc32(f"SaliencyRegularization({penalty.name}) None".encode())
    return seeded(seed, 0, *keys, who)


def data(n: int = 48, *more: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n), zoo.labels(n), *more), 16)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([value.detach().double().flatten() for value in module.state_dict().values()])


def fitted(shape: type[Any], *callbacks: Any, loader: Any = None, **settings: Any) -> Any:
    module = zoo.built(shape)
    trainer = zoo.trainer(**{"callbacks": list(callbacks), **settings})
    trainer.fit(module, loader or zoo.loader(shape, (16, 16, 16)))
    return module


def penalised(method: Any = "finite_differences", **settings: Any) -> SaliencyRegularization:
    return SaliencyRegularization(InputGradientPenalty(method), WEIGHT, **settings)


def built_from_recipe(folder: Path, kind: str, arguments: str, weight: str) -> Any:
    (folder / "it.yaml").write_text(
        "model: {class_path: pytorch_lightning.demos.boring_classes.BoringModel}\n"
        "callbacks: {it: {class_path: lightning_robust.SaliencyRegularization, init_args: "
        f"{{penalty: {{class_path: {kind}, init_args: {arguments}}}, weight: {weight}}}}}}}\n"
    )
    trainer, _, _ = instantiate(compose(folder / "it.yaml"), folder / "name" / "version_0", log=False)
    return next(c for c in trainer.callbacks if isinstance(c, SaliencyRegularization))


# -- modules ---------------------------------------------------------------------------------------------------------


class NoDropout(zoo.ListBatch):
    """A BatchNorm net, with the gradient as what an optimizer step takes away."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 10))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Smooth(NoDropout):
    """Nothing that a forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 10))
        with torch.no_grad():
            self.net[0].weight.mul_(5)  # so far from linear that gradients turn


class Triple(zoo.ListBatch):
    @staticmethod
    def batch(n: int) -> Any:
        mask = torch.zeros(n, 8, 8)
        mask[1:, :3] = 1  # the first sample has no marks
        return [zoo.images(n), zoo.labels(n), mask]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _mask = batch
        return F.cross_entropy(self.net(x), y)

    def by_hand(self, batch: Any, x: Tensor) -> Any:
        logits, mask = self.net(x), batch[2][:, None]
        return logits, batch[1], logits.log_softmax(1).sum(1), mask


class Attention(zoo.ListBatch):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.squeeze(1)).mean(1))

    def by_hand(self, batch: Any, x: Tensor) -> Any:
        return None, batch[1], F.cross_entropy(self(x), batch[1], reduction="none")


class TwoBackwards(zoo.ManualOptimisation):
    """A backward pass for the loss that the penalty is about, and another one behind it."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y))
        self.manual_backward(0.02 * sum(p.pow(2).sum() for p in self.parameters()))
        optimizer.step()


class OneBackward(zoo.ManualOptimisation):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y) + 0.02 * sum(p.pow(2).sum() for p in self.parameters()))
        optimizer.step()


class CompiledFunction(NoDropout):
    """Nothing about its modules says that they are compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled = torch.compile(self.net.forward, backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.compiled(x)


def compiled(how: str) -> zoo.ListBatch:
    if how == "function":
        return zoo.built(CompiledFunction)
    module = zoo.built(NoDropout)
    if how == "in place":
        module.net.compile(backend="aot_eager")
    else:
        module.net = torch.compile(module.net, backend="aot_eager")
    return module


# -- penalties by hand -----------------------------------------------------------------------------------------------


def squares(losses: Any, x: Tensor, method: str, mask: Tensor | None = None) -> Tensor:
    """``||A * gradient||^2`` of each sample, from its definition."""
    leaf = x.detach().clone().requires_grad_()
    mask = torch.ones_like(x) if mask is None else mask
    value = losses(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=method == "double_backward", retain_graph=True)
    if method == "double_backward":
        return (gradient * mask).square().flatten(1).sum(1)
    length = (gradient * mask).flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, *[1] * (x.ndim - 1))
    h = 0.13 * x.flatten(1).norm(dim=1).mean()
    return ((losses(x + h * mask * (gradient * mask) / length) - value) / h).square()


def written_by_hand(shape: type[zoo.Shape], method: str, weight: float = WEIGHT) -> type[Any]:
    """The module of a stranger with the penalty in its training_step, on forwards of their own."""

    labels = 4 if issubclass(shape, zoo.SigmoidMultiLabel) else 1  # their mean is meant, and their sum is by hand

    class Written(shape):
        def training_step(self, *args: Any) -> Any:
            batch, state = copy.deepcopy(args[0]), RandomState.capture()
            output = super().training_step(*args)
            end, buffers = RandomState.capture(), [b.clone() for b in self.buffers()]

            def losses(x: Tensor) -> Tensor:
                state.restore()
                return self.by_hand(copy.deepcopy(batch), x)[2] / labels

            term = weight * squares(losses, self.image(batch), method).mean()
            end.restore()
            for buffer, before in zip(self.buffers(), buffers, strict=True):
                buffer.data.copy_(before)
            return {**output, "loss": output["loss"] + term} if isinstance(output, dict) else output + term

    Written.training_step.__signature__ = inspect.signature(shape.training_step)
    return Written


class SameOperations(zoo.ListBatch):
    """The penalty by finite differences, operation by operation as the callback does it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        start = torch.get_rng_state()
        leaf = x.clone().requires_grad_()
        logits = self(leaf.clone())
        loss = F.cross_entropy(logits, y)
        end, buffers = torch.get_rng_state(), [b.clone() for b in self.buffers()]
        losses = F.cross_entropy(logits.float(), y, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=True)
        h = 0.13 * x.flatten(1).norm(dim=1).mean()
        torch.set_rng_state(start)
        neighbour = (x + h * F.normalize(gradient.flatten(1)).view_as(x)).to(x.dtype)
        there = F.cross_entropy(self(neighbour).float(), y, reduction="none")
        torch.set_rng_state(end)
        for buffer, before in zip(self.buffers(), buffers, strict=True):
            buffer.data.copy_(before)
        return loss + WEIGHT * ((there - losses) / h).square().mean()
