"""Adversarial weight perturbation: the gradient at the worst weights by hand, and the real ones back after any end."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from steps_by_hand import climbed, penalty, projected
from torch import Tensor, nn
from torch.nn import functional as F
from trainer_runs import ATTACK, THREAT, Net, flat, weights

from lightning_robust import PGD, AdversarialTraining, InputGradientPenalty, SaliencyRegularization
from lightning_robust.attacks.weights import moved, perturbable, worst_direction
from lightning_robust.randomness import seeded

GAMMA = 0.05
X, Y = zoo.ListBatch.batch(16)


def by_hand(module: Any, loss_of: Any, gamma: float = GAMMA, added: Any = None) -> tuple[list[Tensor], nn.Module]:
    """The gradient of ``loss_of(net)`` (and of what is added) where the loss is largest; the network there."""
    there = copy.deepcopy(module)
    gradient = torch.autograd.grad(loss_of(there.net), list(there.parameters()))
    there = copy.deepcopy(module)  # whose running statistics have seen nothing yet
    with torch.no_grad():
        for weight, g in zip(there.parameters(), gradient, strict=True):
            if weight.ndim > 1:
                weight += gamma * weight.norm() * g / g.norm()
    loss = loss_of(there.net)
    loss = loss if added is None else loss + added(there.net)
    return list(torch.autograd.grad(loss, list(there.parameters()))), there.net


def found(net: nn.Module, method: str) -> Tensor:
    """What each method's attack finds at the real weights, in eval mode, with two steps."""
    net.eval()
    x, objective = X, lambda z: F.cross_entropy(net(z), Y, reduction="none")
    if method == "trades":
        x = (X + 0.001 * torch.randn(X.shape, generator=seeded(0, 0, 0, 0))).clamp(0, 1)
        p = net(X).softmax(1).detach()
        objective = lambda z: (p * (p.log() - net(z).log_softmax(1))).sum(1)  # noqa: E731  # one of two objectives
    for _ in range(2):
        x = projected(x + 2.5 * THREAT.eps / 2 * climbed(objective, x), X)
    net.train()
    return x


def loss_at(method: str, x: Tensor) -> Any:
    """Each method's loss, with its published beta, as a function of the network."""

    def loss(net: nn.Module) -> Tensor:
        if method == "madry":
            return F.cross_entropy(net(x), Y)
        first, second = (x, X) if method == "mart" else (X, x)  # the step's own forward comes first
        one, other = net(first).softmax(1), net(second).softmax(1)
        p, q = (other, one) if method == "mart" else (one, other)
        divergence = (p * (p.log() - q.log())).sum(1)
        if method == "trades":
            return F.nll_loss(p.log(), Y) + 6 * divergence.mean()
        right = Y[:, None]
        boosted = -q.gather(1, right).squeeze(1).log() - (1 - q.scatter(1, right, 0.0).amax(1)).log()
        return (boosted + 5 * divergence * (1 - p.gather(1, right).squeeze(1))).mean()

    return loss


def defence(method: str, **settings: Any) -> AdversarialTraining:
    attack = PGD(THREAT, steps=2) if method == "trades" else ATTACK
    return AdversarialTraining(attack, method, **{"awp": GAMMA, **settings})


def assert_step(before: nn.Module, after: nn.Module, expected: list[Tensor]) -> None:
    for old, new, gradient in zip(before.parameters(), after.parameters(), expected, strict=True):
        # A bias before BatchNorm has no gradient but round-off.
        torch.testing.assert_close(old - new, gradient, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("method", ["madry", "trades", "mart"])
def test_the_step_is_the_gradient_at_the_worst_weights_taken_from_the_real_ones(method: str) -> None:
    module = zoo.built(Net)
    before = copy.deepcopy(module)
    zoo.trainer(max_steps=1, callbacks=[defence(method)]).fit(module, zoo.loader(Net))
    loss = loss_at(method, found(before.net, method))
    expected, there = by_hand(before, loss)
    assert_step(before, module, expected)
    plain = torch.autograd.grad(loss(before.net), list(before.parameters()))
    assert float((expected[-2] - plain[-2]).norm() / plain[-2].norm()) > 0.01  # that of the real weights would show
    # BatchNorm sees the step's own forwards, and none of those that look for the worst weights.
    assert int(module.net[1].num_batches_tracked) == (1 if method == "madry" else 2)
    torch.testing.assert_close(module.net[1].running_mean, there[1].running_mean)
    torch.testing.assert_close(module.net[1].running_var, there[1].running_var)


def test_a_penalty_beside_it_is_taken_at_the_worst_weights_too() -> None:
    module = zoo.built(Net)
    before = copy.deepcopy(module)
    callbacks = [defence("madry"), SaliencyRegularization(InputGradientPenalty(), weight=0.05)]
    zoo.trainer(max_steps=1, callbacks=callbacks).fit(module, zoo.loader(Net))
    x = found(before.net, "madry")
    expected, _ = by_hand(before, loss_at("madry", x), added=lambda net: 0.05 * penalty(net, x, Y))
    assert_step(before, module, expected)


def test_accumulated_gradients_are_each_taken_at_worst_weights_of_their_own() -> None:
    module = zoo.built(Net)
    before = copy.deepcopy(module)
    callback = defence("madry")
    zoo.trainer(max_steps=1, accumulate_grad_batches=2, callbacks=[callback]).fit(module, zoo.loader(Net))
    now, total = copy.deepcopy(before), [torch.zeros_like(p) for p in before.parameters()]
    for _ in range(2):  # both batches hold the same samples; running statistics move in between
        gradients, there = by_hand(now, loss_at("madry", found(now.net, "madry")))
        total = [sum_ + part / 2 for sum_, part in zip(total, gradients, strict=True)]
        now.net[1].load_state_dict({**now.net[1].state_dict(), **_buffers(there[1])})
    assert_step(before, module, total)


def _buffers(norm: nn.Module) -> dict[str, Tensor]:
    return dict(norm.named_buffers())


class WithLBFGS(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def test_lbfgs_looks_for_worst_weights_in_every_closure_call() -> None:
    module = zoo.built(WithLBFGS)
    own = copy.deepcopy(module)
    zoo.trainer(max_steps=1, callbacks=[defence("madry")]).fit(module, zoo.loader(WithLBFGS))
    x = found(own.net, "madry")

    def closure() -> Tensor:
        gradients, there = by_hand(own, loss_at("madry", x))
        for parameter, gradient in zip(own.parameters(), gradients, strict=True):
            parameter.grad = gradient
        return F.cross_entropy(there(x), Y)

    torch.optim.LBFGS(own.parameters(), lr=0.1, max_iter=3).step(closure)
    torch.testing.assert_close(
        torch.cat([p.flatten() for p in module.parameters()]),
        torch.cat([p.flatten() for p in own.parameters()]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_before_its_first_epoch_training_is_as_without_to_the_last_bit() -> None:
    def trained(epochs: int, **settings: Any) -> str:
        module = zoo.built(zoo.SideEffects)
        callback = AdversarialTraining(ATTACK, "mart", **settings)
        zoo.trainer(max_epochs=epochs, callbacks=[callback]).fit(module, zoo.loader(zoo.SideEffects))
        return weights(module)

    assert trained(1, awp=GAMMA, awp_start_epoch=1) == trained(1)
    assert trained(2, awp=GAMMA, awp_start_epoch=1) != trained(2)
    assert trained(1, awp=GAMMA) != trained(1)


# -- the real weights come back --------------------------------------------------------------------------------------


class Still(zoo.ListBatch):
    """A learning rate of 0: whatever changes was not put back. It knows its weights inside of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[Tensor] = []
        self.raises: dict[str, BaseException] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.inside.append(torch.cat([p.detach().flatten() for p in self.parameters()]))
        if "step" in self.raises:
            raise self.raises["step"]
        if "backward" in self.raises:
            loss.register_hook(self._throw)
        return loss

    def _throw(self, _gradient: Tensor) -> None:
        raise self.raises["backward"]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def parameters(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


@pytest.mark.parametrize("method", ["madry", "trades", "mart"])
def test_a_step_runs_elsewhere_and_leaves_every_weight_what_it_was_to_the_last_bit(method: str) -> None:
    module = zoo.built(Still)
    before = parameters(module)
    seen: list[Tensor] = []

    class Watching(pl.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            seen.append(parameters(module))

    zoo.trainer(max_epochs=2, callbacks=[Watching(), defence(method)]).fit(module, zoo.loader(Still))
    assert len(module.inside) == len(seen) == 4
    assert all(torch.equal(now, before) for now in [*seen, parameters(module)])
    assert not any(torch.equal(inside, before) for inside in module.inside)


@pytest.fixture
def _interrupts() -> Iterator[None]:
    """Lightning ignores further interrupts for good."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


class Raising(pl.Callback):
    def __init__(self, hook: str, exception: BaseException) -> None:
        def throw(*_: Any) -> None:
            raise exception

        setattr(self, hook, throw)


@pytest.mark.usefixtures("_interrupts")
@pytest.mark.parametrize("exception", [ArithmeticError("a crash"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["step", "backward", "on_before_backward", "on_after_backward"])
def test_whatever_flies_the_real_weights_come_back(where: str, exception: BaseException) -> None:
    module = zoo.built(Still)
    before = parameters(module)
    callbacks: list[Any] = [defence("trades")]
    if where.startswith("on_"):
        callbacks.insert(0, Raising(where, exception))
    else:
        module.raises[where] = exception
    with pytest.raises((ArithmeticError, KeyboardInterrupt, SystemExit)):
        zoo.trainer(callbacks=callbacks).fit(module, zoo.loader(Still))
    assert module.inside
    assert torch.equal(parameters(module), before)
    assert not {"training_step", "_lightning_robust_seam"} & set(vars(module))


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_step_that_is_skipped_leaves_the_weights_at_once() -> None:
    class Skipping(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)

    module = zoo.built(Skipping)
    before = parameters(module)
    seen: list[Tensor] = []

    class Watching(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(parameters(module))

    zoo.trainer(callbacks=[defence("madry"), Watching()]).fit(module, zoo.loader(Skipping))
    assert len(seen) == 2
    assert all(torch.equal(now, before) for now in seen)


def test_manual_optimisation_trains_the_very_same_weights() -> None:
    hashes = []
    for shape in (zoo.ListBatch, zoo.ManualOptimisation):
        module = zoo.built(shape)
        zoo.trainer(callbacks=[defence("madry")]).fit(module, zoo.loader(shape))
        hashes.append(weights(module))
    assert hashes[0] == hashes[1]


def test_manual_optimisation_without_manual_backward_is_not_undone_in_silence() -> None:
    class OwnBackward(zoo.ManualOptimisation):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            optimizer = self.optimizers()
            optimizer.zero_grad()
            F.cross_entropy(self.net(x), y).backward()
            optimizer.step()

    expected, module = zoo.built(zoo.ManualOptimisation), zoo.built(OwnBackward)
    zoo.trainer(callbacks=[defence("madry")]).fit(expected, zoo.loader(zoo.ManualOptimisation))
    zoo.built(OwnBackward)
    try:
        zoo.trainer(callbacks=[defence("madry")]).fit(module, zoo.loader(OwnBackward))
    except RuntimeError as error:
        assert "manual_backward" in str(error)  # noqa: PT017  # either it says what is missing, or it trains all the same
    else:
        assert torch.equal(parameters(module), parameters(expected))


# -- the parts -------------------------------------------------------------------------------------------------------


def test_a_step_is_gamma_times_the_length_of_its_layer_up_the_gradient() -> None:
    layers, slopes = [torch.randn(3, 4), torch.randn(2, 1, 3, 3)], [torch.randn(3, 4), torch.randn(2, 1, 3, 3)]
    for weight, slope, step in zip(layers, slopes, worst_direction(layers, slopes, 0.01), strict=True):
        torch.testing.assert_close(step.norm(), 0.01 * weight.norm())
        torch.testing.assert_close(F.cosine_similarity(step.flatten(), slope.flatten(), 0), torch.tensor(1.0))


@pytest.mark.parametrize("gradient", [None, torch.zeros(2, 2)])
def test_a_layer_without_a_gradient_stays_where_it_is(gradient: Any) -> None:
    assert torch.equal(worst_direction([torch.ones(2, 2)], [gradient], 0.1)[0], torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_step_has_the_type_of_its_weight(dtype: torch.dtype) -> None:
    (step,) = worst_direction([torch.ones(2, 2, dtype=dtype)], [torch.full((2, 2), 0.5, dtype=dtype)], 0.5)
    assert step.dtype == dtype
    assert step.flatten().tolist() == [0.5] * 4  # 0.5 * 2 / 1 * 0.5


def test_frozen_weights_biases_and_normalisation_are_not_perturbed_and_tied_ones_once() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].weight.requires_grad_(False)
    net[3].weight = net[2].weight
    assert perturbable(net) == [net[2].weight]


def test_weights_come_back_as_the_same_tensors_where_something_flies() -> None:
    layer = nn.Linear(3, 2)
    memory, before = layer.weight.data_ptr(), flat(layer)
    inside: list[Tensor] = []

    def crash() -> None:
        with moved([layer.weight], [torch.full((2, 3), 1e8)]):
            inside.append(layer.weight.detach().clone())
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        crash()
    assert float(inside[0].min()) > 1e7
    assert torch.equal(flat(layer), before)
    assert layer.weight.data_ptr() == memory
