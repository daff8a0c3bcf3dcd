"""What each penalty costs over the same by hand: ``python -m tests.benchmarks.penalties [REPEATS [PENALTY ...]]``."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust import InputGradientPenalty, RightReasons, SaliencyRegularization
from lightning_robust.penalties import AttributionPrior, JacobianPenalty, SaliencyConsistency, SaliencyGuided
from tests.benchmarks.subjects import Plain, Subject, trainer
from tests.benchmarks.timing import Row, compared, interleaved, progress, table

BATCH = 64
STEP = 0.13  # of finite differences, as a share of the mean norm

Loss = tuple[Tensor, Tensor]
"""The loss of a step and its penalty."""


def input_gradient(scores: Tensor, x: Tensor, **settings: Any) -> Tensor:
    """By the sum over samples."""
    gradient: Tensor = torch.autograd.grad(scores.sum(), x, **settings)[0]
    return gradient


def right(logits: Tensor, y: Tensor) -> Tensor:
    """The logit of the right class."""
    return logits.gather(1, y[:, None]).squeeze(1)


def climbed(
    net: nn.Module, x: Tensor, scalar: Callable[[Tensor], Tensor], logits: Tensor, mask: Tensor | None
) -> Tensor:
    """The squared slope along the gradient, by one more forward."""
    here = scalar(logits)
    gradient = input_gradient(here, x, retain_graph=True)
    gradient = gradient if mask is None else gradient * mask
    h = STEP * x.detach().flatten(1).norm(dim=1).mean()
    there = scalar(net(x.detach() + h * F.normalize(gradient.flatten(1)).view_as(x)))
    return ((there - here) / h).square()


def jacobian_finite(net: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> Loss:
    """One projection; the gradient only tells the direction."""
    x = x.clone().requires_grad_()
    logits = net(x)
    v = F.normalize(torch.randn(logits.shape), dim=1)
    square = climbed(net, x, lambda z: (z * v).sum(1), logits, None)
    return F.cross_entropy(logits, y), 0.5 * logits.shape[1] * square.mean()


def jacobian_double(net: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> Loss:
    """One projection, differentiated twice."""
    x = x.clone().requires_grad_()
    logits = net(x)
    v = F.normalize(torch.randn(logits.shape), dim=1)
    gradient = input_gradient((logits * v).sum(1), x, create_graph=True)
    return F.cross_entropy(logits, y), 0.5 * logits.shape[1] * gradient.flatten(1).square().sum(1).mean()


def guided(net: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> Loss:
    """Half of the pixels replaced."""
    x = x.clone().requires_grad_()
    logits = net(x)
    size = input_gradient(right(logits, y), x, retain_graph=True).abs().sum(1).flatten(1)
    clean = x.detach()
    least = size.topk(size.shape[1] // 2, dim=1, largest=False, sorted=False).indices
    chosen = torch.zeros_like(size, dtype=torch.bool).scatter_(1, least, True).view(len(x), 1, *x.shape[2:])
    low, high = clean.amin((2, 3), keepdim=True), clean.amax((2, 3), keepdim=True)
    log_q = net(torch.where(chosen, low + (high - low) * torch.rand(x.shape), clean)).log_softmax(1)
    divergence = F.kl_div(log_q, logits.log_softmax(1), reduction="batchmean", log_target=True)
    return F.cross_entropy(logits, y), divergence


def prior(net: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> Loss:
    """Total variation of expected gradients, one background."""
    difference = x - x[torch.randperm(len(x))]
    point = (x - torch.rand(len(x), 1, 1, 1) * difference).requires_grad_()
    maps = (difference * input_gradient(right(net(point), y), point, create_graph=True)).sum(1)
    maps = maps / maps.abs().flatten(1).mean(1).clamp_min(1e-12).view(-1, 1, 1)
    variation = maps.diff(dim=1).abs().mean() + maps.diff(dim=2).abs().mean()
    return F.cross_entropy(net(x), y), variation


def consistency(net: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> Loss:
    """Beside a noisy input."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    noisy = (x + 0.1 * (high - low) * (2 * torch.rand(x.shape) - 1)).requires_grad_()
    x = x.clone().requires_grad_()
    logits = net(x)
    here = input_gradient(right(logits, y), x, create_graph=True).flatten(1)
    there = input_gradient(right(net(noisy), y), noisy, create_graph=True).flatten(1)
    return F.cross_entropy(logits, y), (1 - F.cosine_similarity(here, there, dim=1)).mean()


def reasons(net: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> Loss:
    """Finite differences along the masked gradient."""
    x, mask = x.clone().requires_grad_(), mask.expand_as(x)
    logits = net(x)
    square = climbed(net, x, lambda z: z.log_softmax(1).sum(1), logits, mask)
    return F.cross_entropy(logits, y), (square / mask.flatten(1).sum(1)).mean()


def flat_loss(net: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> Loss:
    """Finite differences along the gradient of the loss."""
    x = x.clone().requires_grad_()
    logits = net(x)
    square = climbed(net, x, lambda z: F.cross_entropy(z, y, reduction="none"), logits, None)
    return F.cross_entropy(logits, y), square.mean()


PENALTIES: dict[str, tuple[Any, Callable[[nn.Module, Tensor, Tensor, Tensor], Loss]]] = {
    "InputGradientPenalty": (InputGradientPenalty(), flat_loss),
    "RightReasons": (RightReasons(2), reasons),
    "JacobianPenalty": (JacobianPenalty(), jacobian_finite),
    "JacobianPenalty, double backward": (JacobianPenalty(method="double_backward"), jacobian_double),
    "SaliencyGuided": (SaliencyGuided(), guided),
    "AttributionPrior": (AttributionPrior(), prior),
    "SaliencyConsistency": (SaliencyConsistency(), consistency),
}


class Masked(Plain):
    """An ordinary classifier whose batches hold a mask too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[:2], batch_idx)


class ByHand(Plain):
    """The penalty in the module's own step."""

    def __init__(self, net: nn.Module, losses: Callable[[nn.Module, Tensor, Tensor, Tensor], Loss]) -> None:
        super().__init__(net)
        self.losses = losses

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, penalty = self.losses(self.net, *batch)
        penalty = 0.1 * penalty
        self.log_dict({"train/loss": loss, "train/penalty": penalty.detach()}, on_step=False, on_epoch=True)
        return loss + penalty


def in_a_plain_loop(subject: Subject, mask: Tensor, name: str, repeats: int) -> list[Row]:
    """Forward, penalty and backward of one batch, without a Trainer: the functions against the hand loop."""
    penalty, by_hand = PENALTIES[name]
    net, x, y = subject.net(), subject.x[:BATCH], subject.y[:BATCH]
    more = {"mask": mask} if name == "RightReasons" else {}

    def ours() -> None:
        leaf = x.clone().requires_grad_() if name != "AttributionPrior" else x
        logits = net(leaf)
        given = more if name == "AttributionPrior" else {"logits": logits, **more}
        (F.cross_entropy(logits, y) + 0.1 * penalty(net, leaf, y, **given)).backward()

    def hand() -> None:
        loss, term = by_hand(net, x, y, mask)
        (loss + 0.1 * term).backward()

    def plain() -> None:
        F.cross_entropy(net(x), y).backward()

    contenders = {"by hand": hand, "function": ours, "no penalty": plain}
    return compared("penalties", name, interleaved(contenders, repeats, warmup=2), "by hand", {"function": 1.05})


def in_a_fit(subject: Subject, mask: Tensor, name: str, repeats: int) -> list[Row]:
    """Whole fits of one epoch: the callback against the module that does it by hand."""
    penalty, by_hand = PENALTIES[name]
    dataset = torch.utils.data.TensorDataset(subject.x, subject.y, mask.expand(len(subject.x), *mask.shape[1:]))
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH)
    callback = SaliencyRegularization(penalty, weight=0.1)
    vars(callback)["_first_batch"] = lambda *_: None  # what happens once a run is not what a step costs

    def fit(module: Plain, *callbacks: Any) -> None:
        trainer(*callbacks, max_epochs=1).fit(module, loader)

    contenders = {
        "by hand": lambda: fit(ByHand(subject.net(), by_hand)),
        "callback": lambda: fit(Masked(subject.net()), callback),
        "no penalty": lambda: fit(Masked(subject.net())),
    }
    return compared("penalties", name, interleaved(contenders, repeats, warmup=1), "by hand", {"callback": 1.05})


def gradient_penalties(repeats: int = 9) -> list[Row]:
    """Forward, penalty and backward of one batch with each penalty, over the same by hand."""
    subject, mask = _subject()
    rows: list[Row] = []
    for name in PENALTIES:
        progress(f"gradient_penalties: {name}")
        rows += in_a_plain_loop(subject, mask, name, repeats)
    return rows


def _subject() -> tuple[Subject, Tensor]:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :8, :8] = 1
    return Subject("cnn", BATCH, batches=8), mask


def main() -> None:
    """Print one table of functions and one of callbacks."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    subject, mask = _subject()
    for title, measure in (("one step", in_a_plain_loop), ("a fit of 8 steps", in_a_fit)):
        rows: list[Row] = []
        for name in sys.argv[2:] or PENALTIES:
            progress(f"{title}: {name}")
            rows += measure(subject, mask, name, repeats)
        print(table(f"penalties, {title}, {subject.name}", rows), flush=True)


if __name__ == "__main__":
    main()
