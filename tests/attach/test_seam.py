"""The seam: feed, add, run under; any order; and nothing left, however it ends."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch.nn import functional as F

from lightning_robust.attach.inputs import Inputs
from lightning_robust.attach.seam import install, leave_weights, perturbed, robust_loss
from lightning_robust.attach.step import Step


class Linear(zoo.Shape):
    """A loss whose gradient can be told by looking: the mean of w * x."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (
            F.cross_entropy(self.net.weight.expand(1, 1) * batch[0], torch.zeros(1).long()) * 0
            + (self.net(batch[0])).sum()
        )


def doubled(step: Step) -> Any:
    return [step.batch[0] * 2]


def ten_w(step: Step, call: Any, state: Any) -> dict[str, torch.Tensor]:
    return {"ten_w": 10 * step.module.net.weight.sum()}


@pytest.mark.parametrize("order", [("feed", "add"), ("add", "feed")])
def test_a_step_is_fed_and_added_to_in_any_order(order: tuple[str, str]) -> None:
    module = Linear()
    for kind in order:
        install(module, kind, **({"feed": doubled} if kind == "feed" else {"add": ten_w}))
    loss = module.training_step([torch.ones(1, 1)], 0)
    (gradient,) = torch.autograd.grad(loss, module.net.weight)
    assert float(gradient) == 2 * 1 + 10  # w * (2 x) + 10 w


def test_what_the_step_returns_keeps_its_type_and_its_own_objects() -> None:
    returned = {"loss": torch.ones((), requires_grad=True), "extra": [1]}

    class Returning(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return returned

    module = Returning()
    install(module, "test", add=ten_w)
    output = module.training_step([torch.ones(1, 1)], 0)
    assert output is not returned
    assert output["extra"] is returned["extra"]
    assert float(returned["loss"].detach()) == 1  # the user's own dict is untouched


def test_the_signature_stays_and_the_last_one_out_puts_the_module_back() -> None:
    module = zoo.NoBatchIdx()
    before = set(vars(module))
    first, second = install(module, "a", feed=lambda step: step.batch), install(module, "b", before=lambda step: None)
    assert list(inspect.signature(module.training_step).parameters) == ["batch"]
    first.detach()
    assert "training_step" in vars(module)
    second.detach()
    second.detach()
    assert set(vars(module)) == before


def test_an_instance_attribute_that_was_there_is_put_back() -> None:
    module = zoo.ListBatch()
    mine = vars(module)["training_step"] = torch.compile(module.training_step, backend="eager")
    handle = install(module, "test", feed=lambda step: step.batch)
    assert vars(module)["training_step"] is not mine
    handle.detach()
    assert vars(module)["training_step"] is mine


def test_a_deep_copy_runs_its_own_weights() -> None:
    module = Linear()
    install(module, "test", feed=doubled)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.net.weight.fill_(3.0)
    assert float(twin.training_step([torch.ones(1, 1)], 0).detach()) == 6.0


@contextmanager
def heavier(step: Step) -> Iterator[None]:
    """Other weights for one step: swap the data, put the very same storage back."""
    weight = step.module.net.weight
    kept = weight.data
    weight.data = kept + 5
    try:
        yield
    finally:
        weight.data = kept


def test_a_step_runs_under_other_weights_until_its_backward_pass_is_over() -> None:
    module = Linear()
    storage, before = module.net.weight.data_ptr(), module.net.weight.detach().clone()
    install(module, "test", under=heavier)
    loss = module.training_step([torch.ones(1, 1)], 0)
    assert float(loss.detach()) == pytest.approx(float(before) + 5)
    loss.backward()
    leave_weights(module)
    assert module.net.weight.data_ptr() == storage
    assert torch.equal(module.net.weight, before)


def test_other_weights_are_left_when_the_step_fails_or_is_skipped() -> None:
    class Failing(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx:
                raise ZeroDivisionError

    module = Failing()
    storage = module.net.weight.data_ptr()
    install(module, "test", under=heavier)
    assert module.training_step([torch.ones(1, 1)], 0) is None
    assert module.net.weight.data_ptr() == storage
    with pytest.raises(ZeroDivisionError):
        module.training_step([torch.ones(1, 1)], 1)
    assert module.net.weight.data_ptr() == storage


class Heavier(pl.Callback):
    """The life of a weight perturbation in a real run."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.handle = install(pl_module, "Heavier", under=heavier)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        leave_weights(pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.handle.detach()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_those_of_the_other_weights_and_the_optimizer_moves_the_real_ones(accumulate: int) -> None:
    class Square(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net.weight.square().sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Square()
    with torch.no_grad():
        module.net.weight.fill_(1.0)
    trainer = zoo.trainer(max_steps=1, accumulate_grad_batches=accumulate, callbacks=[Heavier()])
    trainer.fit(module, zoo.loader(zoo.ListBatch))
    assert float(module.net.weight.detach()) == pytest.approx(1.0 - 0.1 * 2 * (1.0 + 5.0))


# -- what is added may know the step's input -------------------------------------------------------------------------


FIRST = Inputs(((0,),))


def first(step: Step) -> Inputs:
    return FIRST


class Squares(zoo.Shape):
    """The loss of an input x is (w x)^2, by way of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.net.weight.fill_(2.0)
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(float(batch[0].sum()))
        return self.loss(batch[0])

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.net(x)
        F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))  # what is watched
        return logits.square().sum()


class Slope:
    """Adds half the squared gradient of the logits by the input, which is w^2 / 2, and keeps what it was given."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.given: list[tuple[Step, Any]] = []

    def __call__(self, step: Step, call: Any, state: Any) -> dict[str, torch.Tensor]:
        self.given.append((step, call))
        leaf = step.tracked.get(FIRST) if call is not None else None
        if leaf is None:
            leaf = step.batch[0].clone().requires_grad_()
        logits = step.module.net(leaf) if call is None else call.logits
        (gradient,) = torch.autograd.grad(logits.sum(), leaf, create_graph=True)
        return {"slope": self.factor * gradient.square().sum() / 2}


def test_a_tracked_input_is_the_leaf_of_the_loss_call_that_the_step_made() -> None:
    module, slope = Squares(), Slope()
    install(module, "slope", add=slope, track=first)
    batch = [torch.full((1, 1), 3.0)]
    loss = module.training_step(batch, 0)
    ((step, call),) = slope.given
    leaf = step.tracked[FIRST]
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert torch.equal(leaf, batch[0])
    assert torch.equal(call.logits, torch.full((1, 1), 6.0))
    assert step.batch is batch
    assert float(loss.detach()) == 6**2 + 2**2 / 2
    (gradient,) = torch.autograd.grad(loss, module.net.weight)
    assert float(gradient) == 2 * 6 * 3 + 2  # d/dw of (3 w)^2 + w^2 / 2
    assert not batch[0].requires_grad


def test_without_track_a_step_gets_inputs_without_a_graph() -> None:
    graphs: list[bool] = []

    class Looking(Squares):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            graphs.append(batch[0].requires_grad)
            return super().training_step(batch, batch_idx)

    for track in (None, first):
        module = Looking()
        install(module, "add", add=Slope(), track=track)
        if track is None:
            with pytest.raises(RuntimeError, match="appears to not have been used"):
                module.training_step([torch.ones(1, 1)], 0)
        else:
            module.training_step([torch.ones(1, 1)], 0)
    assert graphs == [False, True]


def test_at_clean_is_about_the_batch_before_it_was_fed_and_gets_no_loss_call() -> None:
    module, fed, clean = Squares(), Slope(), Slope()
    install(module, "fed", add=fed, track=first)
    install(module, "clean", add=clean, track=first, at="clean")
    install(module, "feed", feed=doubled)
    module.training_step([torch.ones(1, 1)], 0)
    ((fed_step, fed_call),), ((clean_step, clean_call),) = fed.given, clean.given
    assert (float(fed_step.batch[0]), float(clean_step.batch[0])) == (2, 1)
    assert float(fed_call.logits.detach()) == 4
    assert clean_call is None
    assert not clean_step.tracked
    assert module.seen == [2]


def test_at_clean_where_nothing_is_fed_is_the_step_itself() -> None:
    module, clean = Squares(), Slope()
    install(module, "clean", add=clean, track=first, at="clean")
    module.training_step([torch.ones(1, 1)], 0)
    ((step, call),) = clean.given
    assert float(call.logits.detach()) == 2
    assert FIRST in step.tracked


def test_the_order_of_those_who_add_and_feed_means_nothing() -> None:
    found = set()
    kinds = [
        {"add": Slope(1.0), "track": first},
        {"add": Slope(2.0), "track": first, "at": "clean"},
        {"add": Slope(4.0), "track": first},
        {"feed": doubled},
    ]
    for order in itertools.permutations(kinds):
        module = Squares()
        for i, kind in enumerate(order):
            install(module, f"number {i}", **kind)
        loss = module.training_step([torch.full((1, 1), 3.0)], 0)
        (gradient,) = torch.autograd.grad(loss, module.net.weight)
        found.add((float(loss.detach()), float(gradient)))
    assert found == {((2 * 6) ** 2 + 7 * 2**2 / 2, 2 * 12 * 6 + 7 * 2)}


def test_a_step_that_writes_into_its_batch_writes_into_a_copy() -> None:
    class Writing(Squares):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batch[0].mul_(10)
            batch.append("more")
            return super().training_step(batch, batch_idx)

    batch = [torch.full((1, 1), 3.0)]
    module, slope = Writing(), Slope()
    install(module, "slope", add=slope, track=first)
    loss = module.training_step(batch, 0)
    ((step, _),) = slope.given
    assert batch == [torch.full((1, 1), 3.0)]
    assert torch.equal(step.tracked[FIRST], batch[0])
    assert float(loss.detach()) == (2 * 30) ** 2 + (10 * 2) ** 2 / 2


# -- by hand ---------------------------------------------------------------------------------------------------------


class Asking(Squares):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x,) = perturbed(self, batch)
        self.seen.append(float(x.sum()))
        return robust_loss(self, self.loss(x))


def test_by_hand_a_step_gets_what_it_would_get_otherwise() -> None:
    results = []
    for shape, by_hand in ((Squares, False), (Asking, True)):
        module = shape()
        install(module, "feed", feed=doubled, by_hand=by_hand)
        for at in ("fed", "clean"):
            install(module, at, add=Slope(), track=first, at=at, by_hand=by_hand)
        loss = module.training_step([torch.full((1, 1), 3.0)], 0)
        results.append((float(loss.detach()), float(torch.autograd.grad(loss, module.net.weight)[0]), module.seen))
    assert results[0] == results[1] == (12**2 + 2 * 2, 2 * 12 * 6 + 2 * 2, [6.0])


def test_by_hand_and_by_itself_go_together() -> None:
    module = Asking()
    install(module, "feed", feed=doubled, by_hand=True)
    install(module, "penalty of the Trainer", add=Slope(), track=first)
    loss = module.training_step([torch.full((1, 1), 3.0)], 0)
    assert float(loss.detach()) == 12**2 + 2


def test_outside_of_a_step_perturbed_and_robust_loss_return_what_they_are_given() -> None:
    batch, loss = [torch.ones(1, 1)], torch.ones(())
    module = Asking()
    for attached in (False, True):
        if attached:
            install(module, "feed", feed=doubled, by_hand=True)
            install(module, "add", add=ten_w, by_hand=True)
        assert perturbed(module, batch) is batch
        assert robust_loss(module, loss) is loss


@pytest.mark.parametrize("kind", [{"feed": doubled}, {"add": ten_w}])
def test_who_is_to_be_called_by_hand_and_is_not_is_named(kind: dict[str, Any]) -> None:
    missing = "perturbed" if "feed" in kind else "robust_loss"
    for manual in (False, True):
        module = Squares()
        module.automatic_optimization = not manual
        install(module, "somebody", by_hand=True, **kind)
        with pytest.raises(RuntimeError, match=rf"^somebody: Squares .* did not call self\.{missing}"):
            module.training_step([torch.ones(1, 1)], 0)


def test_a_step_that_is_skipped_need_not_call_anything() -> None:
    class Skipping(Asking):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    module = Skipping()
    install(module, "feed", feed=doubled, by_hand=True)
    assert module.training_step([torch.ones(1, 1)], 0) is None


def test_a_failed_step_does_not_leave_itself_running() -> None:
    class Failing(Asking):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            perturbed(self, batch)
            raise ZeroDivisionError

    module = Failing()
    install(module, "feed", feed=doubled, by_hand=True)
    with pytest.raises(ZeroDivisionError):
        module.training_step([torch.ones(1, 1)], 0)
    batch = [torch.ones(1, 1)]
    assert perturbed(module, batch) is batch


def test_who_feeds_by_hand_and_adds_attacks_beside_the_step() -> None:
    module = Asking()
    install(module, "TRADES", feed=doubled, add=ten_w, by_hand=True)
    loss = module.training_step([torch.full((1, 1), 3.0)], 0)
    assert module.seen == [3.0]
    assert float(loss.detach()) == 6**2 + 10 * 2
