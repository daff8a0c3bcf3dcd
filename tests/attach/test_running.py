"""The running step: inputs that penalties differentiate by, and what a step asks for by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import zoo
from small_steps import doubled, ten_w
from torch.nn import functional as F

from lightning_robust.attach.inputs import Inputs
from lightning_robust.attach.seam import install, perturbed, robust_loss
from lightning_robust.attach.step import Step

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


def test_who_feeds_by_hand_and_adds_by_hand_does_both() -> None:
    module = Asking()
    install(module, "MART", feed=doubled, add=ten_w, by_hand=True)
    loss = module.training_step([torch.full((1, 1), 3.0)], 0)
    assert module.seen == [6.0]
    assert float(loss.detach()) == 12**2 + 10 * 2


def test_who_feeds_and_adds_by_hand_misses_either_call() -> None:
    class OnlyFed(Asking):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(perturbed(self, batch)[0])

    module = OnlyFed()
    install(module, "MART", feed=doubled, add=ten_w, by_hand=True)
    with pytest.raises(RuntimeError, match=r"MART: OnlyFed says .*did not call self.robust_loss\(loss\)"):
        module.training_step([torch.ones(1, 1)], 0)


def test_two_penalties_by_inputs_that_overlap_without_being_the_same_are_refused() -> None:
    module = Squares()
    install(module, "one", add=Slope(), track=first)
    install(module, "both", add=Slope(), track=lambda step: Inputs(((0,), (1,))))
    with pytest.raises(RuntimeError, match=r"different inputs that overlap .*give them the same input_key="):
        module.training_step([torch.ones(2, 1), torch.ones(2, 1)], 0)


def test_who_differentiates_by_nothing_this_time_gets_a_step_without_a_graph() -> None:
    module, slope = Squares(), Slope()
    install(module, "slope", add=slope, track=lambda step: FIRST if len(slope.given) else None)
    for tracked in (False, True):
        if tracked:
            module.training_step([torch.ones(1, 1)], 0)
        else:
            with pytest.raises(RuntimeError, match="appears to not have been used"):
                module.training_step([torch.ones(1, 1)], 0)
        assert bool(slope.given[-1][0].tracked) == tracked


# -- manual optimisation, without a loss call ------------------------------------------------------------------------


class Manual(Squares):
    """Backward passes of any values, with the gradients of ``net`` and ``other`` behind each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Linear(1, 1, bias=False)
        self.gradients: list[tuple[float, float]] = []
        self.losses = [lambda: 0 * self.other.weight.sum(), lambda: 0 * self.net.weight.sum()]

    def manual_backward(self, loss: torch.Tensor) -> None:
        self.zero_grad()
        loss.backward()
        weights = (self.net.weight, self.other.weight)
        self.gradients.append(tuple(0.0 if w.grad is None else float(w.grad) for w in weights))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for loss in self.losses:
            self.manual_backward(loss())


def test_a_term_without_a_loss_call_waits_for_a_loss_that_shares_a_parameter_and_is_computed_once() -> None:
    module, calls = Manual(), []

    def add(step: Step, call: Any, state: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        return ten_w(step, call, state)

    install(module, "ten_w", add=add, watched=False)
    module.training_step([torch.ones(1, 1)], 0)
    assert (module.gradients, len(calls)) == ([(0.0, 0.0), (10.0, 0.0)], 1)
    module.losses.append(module.losses[1])  # once is enough
    module.gradients.clear()
    module.training_step([torch.ones(1, 1)], 0)
    assert module.gradients == [(0.0, 0.0), (10.0, 0.0), (0.0, 0.0)]


def test_a_term_that_meets_no_loss_of_its_parameters_is_an_error_until_it_met_one() -> None:
    module = Manual()
    install(module, "ten_w", add=ten_w, watched=False)
    both, module.losses = module.losses, module.losses[:1]
    with pytest.raises(RuntimeError, match=r"^ten_w adds a term .*no loss that Manual.training_step"):
        module.training_step([torch.ones(1, 1)], 0)
    module.losses = both
    module.training_step([torch.ones(1, 1)], 0)
    module.losses = both[:1]
    module.training_step([torch.ones(1, 1)], 0)  # a step that leaves this network alone


def test_who_adds_nothing_this_time_need_meet_no_loss() -> None:
    module = Manual()
    install(module, "nothing", add=lambda *_: {}, watched=False)
    module.losses = module.losses[:1]
    module.training_step([torch.ones(1, 1)], 0)
