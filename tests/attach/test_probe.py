"""Every shape of user code: what is read, what the attack makes of it, and that nothing is left behind."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust import PGD, AdversarialTraining, ThreatModel
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.route import Route
from lightning_robust.attach.seam import install
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.randomness import RandomState

EPS, STEPS, STEP_SIZE = 0.1, 3, 0.06
shapes = pytest.mark.parametrize("shape", zoo.ZOO, ids=lambda shape: shape.__name__)


def fingerprint(module: nn.Module) -> str:
    """A hash of what a step could change: tensors, flags, gradients, attributes, hooks and random streams."""
    digest = hashlib.sha256()

    def add(value: Any, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().double().numpy().tobytes() + str(value.requires_grad).encode())
            digest.update(b"-" if value.grad is None else value.grad.double().numpy().tobytes())
        elif isinstance(value, dict):
            for key, child in value.items():
                digest.update(str(key).encode())
                add(child, depth + 1)
        elif isinstance(value, (list, tuple, set)):
            for child in value:
                add(child, depth + 1)
        elif isinstance(value, nn.Module):
            add(vars(value), depth + 1)
        elif isinstance(value, (str, int, float, bool, type(None))):
            digest.update(repr(value).encode())
        else:
            digest.update(type(value).__qualname__.encode())

    add(vars(module))
    state = RandomState.capture()
    add(state.cpu)
    digest.update(repr((state.numpy[1].tolist(), state.numpy[2:], state.python)).encode())
    return digest.hexdigest()


@shapes
def test_what_is_read_is_what_the_loss_gets(shape: type[zoo.Shape]) -> None:
    module, batch = zoo.standalone(shape).eval(), shape.batch(16)
    x = shape.image(batch)
    state = RandomState.capture()
    logits, target, losses = copy.deepcopy(module).by_hand(copy.deepcopy(batch), x.clone())
    state.restore()
    with Probe().reading(Step.of(module, "training_step", batch, 0)) as reading:
        assert torch.equal(reading.x, x)
        call = reading.read(reading.x)
        torch.testing.assert_close(call.logits, logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(call.target, target, rtol=0, atol=1e-7)
        torch.testing.assert_close(call.per_sample(), losses, rtol=1e-5, atol=1e-6)


@shapes
def test_reading_and_crafting_leave_no_trace(shape: type[zoo.Shape]) -> None:
    module, batch = zoo.standalone(shape), shape.batch(16)
    module.net[1].eval()  # a frozen BatchNorm in a training net stays frozen
    module.net[0].weight.grad = torch.ones_like(module.net[0].weight)
    module.net[0].bias.requires_grad_(False)
    before, content = fingerprint(module), copy.deepcopy(batch)
    probe = Probe()
    for training in (False, None):
        with probe.reading(Step.of(module, "training_step", batch, 0), training=training) as reading:
            PGD(ThreatModel("linf", EPS), steps=2, objective=reading)(reading.logits, reading.x, reading.y)
    assert fingerprint(module) == before
    assert str(content) == str(batch)


class Spy(pl.Callback):
    """Keeps what the step was really fed, and the random state that it started from."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.states: list[RandomState] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.handle = install(pl_module, "Spy", before=self._before)

    def _before(self, step: Step) -> None:
        self.batches.append(copy.deepcopy(step.batch))
        self.states.append(RandomState.capture())

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.handle.detach()


def attacked_by_hand(module: zoo.Shape, batch: Any, state: RandomState) -> Tensor:
    module.eval()
    clean = module.image(batch).clone()
    x = clean.clone()
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        state.restore()
        losses = module.by_hand(copy.deepcopy(batch), x)[2]
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        x = x.detach() + STEP_SIZE * gradient.sign()
        x = (clean + (x - clean).clamp(-EPS, EPS)).clamp(0, 1)
    return x


@shapes
def test_the_step_is_fed_what_a_hand_written_attack_makes(shape: type[zoo.Shape]) -> None:
    module = zoo.built(shape)
    untouched = copy.deepcopy(module)
    spy = Spy()
    attack = PGD(ThreatModel("linf", EPS), steps=STEPS, step_size=STEP_SIZE, start="zero")
    # The spy comes first in the list: order means nothing.
    zoo.trainer(max_steps=1, callbacks=[spy, AdversarialTraining(attack)]).fit(module, zoo.loader(shape))
    (fed,) = spy.batches
    expected = attacked_by_hand(untouched, shape.batch(16), spy.states[0])
    torch.testing.assert_close(shape.image(fed), expected, rtol=0, atol=1e-6)
    assert type(fed) is type(shape.batch(16))
    assert not torch.equal(shape.image(fed), shape.image(shape.batch(16)))


@shapes
def test_training_with_a_radius_of_zero_is_bit_identical_to_training_without_us(shape: type[zoo.Shape]) -> None:
    prints, logged = [], []
    for callbacks in ([], [AdversarialTraining(PGD(ThreatModel("linf", 0.0), steps=2))]):
        module = zoo.built(shape)
        trainer = zoo.trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(module, zoo.loader(shape))
        vars(module)["_trainer"] = None
        prints.append(fingerprint(module))
        logged.append({k: v.item() for k, v in trainer.callback_metrics.items() if not k.startswith("robust/")})
    assert prints[0] == prints[1]
    assert logged[0] == logged[1]


def reading_error(module: Any, batch: Any, **settings: Any) -> str:
    with pytest.raises(ProbeError) as caught:
        Probe(**settings).discover(Step.of(module, "training_step", batch, 0))
    return str(caught.value)


class Tokens(zoo.Shape):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(torch.randn(4, 10, requires_grad=True), batch["label"])


class FrozenBackbone(zoo.Shape):
    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            features = self.net[:-1](x)
        return F.cross_entropy(self.net[-1](features), y)


class TwoInputs(zoo.Shape):
    @staticmethod
    def batch(n):
        return {"left": zoo.images(n), "right": zoo.images(n, 1), "label": zoo.labels(n)}

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["left"] + batch["right"]), batch["label"])


class HandWrittenLoss(zoo.Shape):
    def training_step(self, batch, batch_idx):
        x, y = batch
        log_p = self.net(x).log_softmax(1)
        return -log_p.gather(1, y[:, None]).mean()


class ManualWithTwoLosses(zoo.ManualOptimisation):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        return F.cross_entropy(self.net(batch[0]), batch[1])


LISTED = zoo.ListBatch.batch(4)
UNREADABLE: dict[str, tuple[Any, Any, dict[str, Any], list[str]]] = {
    "token ids": (Tokens, {"ids": torch.ones(4, 5).long()}, {}, ["no floating-point input", "ids", "Token"]),
    "a frozen backbone": (FrozenBackbone, LISTED, {}, ["no gradient reaches", "no_grad"]),
    "two inputs": (
        TwoInputs,
        TwoInputs.batch(4),
        {},
        ["batch['left'], batch['right']", "input_key='left'", "input_key=['left', 'right']"],
    ),
    "an iterator": (zoo.ListBatch, iter([1]), {}, ["iterator", "dataloader_iter"]),
    "a hand-written loss": (
        HandWrittenLoss,
        LISTED,
        {},
        ["logits_fn=", "log_softmax", "(4, 10)", "training_step (test_probe.py"],
    ),
    "loss_index too large": (zoo.ListBatch, LISTED, {"loss_index": 2}, ["loss_index=2", "only 1"]),
    "input_key of a label": (zoo.ListBatch, LISTED, {"input_key": 1}, ["do not depend on batch[1]", "batch[0]"]),
    "input_key of a mask": (
        zoo.ListBatch,
        [*LISTED, torch.ones(4) > 0],
        {"input_key": 2},
        ["batch[2]", "no tensor of"],
    ),
    "reading past a backward": (ManualWithTwoLosses, LISTED, {"loss_index": 1}, ["manual_backward", "logits_fn="]),
}


@pytest.mark.parametrize(("shape", "batch", "settings", "says"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_an_error_that_names_the_remedy(
    shape: Any, batch: Any, settings: Any, says: list[str]
) -> None:
    module = zoo.standalone(shape)
    before = fingerprint(module)
    message = reading_error(module, batch, **settings)
    for words in says:
        assert words in message
    assert fingerprint(module) == before


def test_a_wrong_key_lists_what_the_batch_has() -> None:
    with pytest.raises(KeyError, match=r"batch\['image'\].*batch\['left'\], batch\['right'\], batch\['label'\]"):
        Probe(input_key="image").discover(Step.of(zoo.standalone(TwoInputs), "training_step", TwoInputs.batch(4), 0))


def test_input_key_settles_several_inputs() -> None:
    route = Probe(input_key="right").discover(
        Step.of(zoo.standalone(TwoInputs), "training_step", TwoInputs.batch(4), 0)
    )
    assert route.input == ("right",)
    assert route.target == ("label",)


def test_logits_fn_and_target_key_serve_a_hand_written_loss() -> None:
    module, batch = zoo.standalone(HandWrittenLoss).eval(), zoo.ListBatch.batch(4)
    probe = Probe(logits_fn=lambda module, batch: module.net(batch[0]), target_key=1)
    with probe.reading(Step.of(module, "training_step", batch, 0)) as reading:
        call = reading.read(reading.x)
    torch.testing.assert_close(call.logits, module.net(batch[0]))
    assert torch.equal(call.target, batch[1])
    with pytest.raises(ValueError, match="target_key"):
        Probe(logits_fn=lambda module, batch: batch)


class TwoLosses(zoo.Shape):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y) + F.cross_entropy(self.net(1 - x), y)


def test_loss_index_reads_another_loss() -> None:
    module, batch = zoo.standalone(TwoLosses).eval(), zoo.ListBatch.batch(4)
    for index, x in enumerate((batch[0], 1 - batch[0])):
        with Probe(loss_index=index).reading(Step.of(module, "training_step", batch, 0)) as reading:
            torch.testing.assert_close(reading.read(reading.x).logits, module.net(x))


class SilentValidation(zoo.ListBatch):
    """Its validation computes no loss."""

    def validation_step(self, batch, batch_idx):
        x, _y = batch
        return self.net(x).argmax(1)


def test_a_validation_without_loss_is_read_at_the_module_that_gave_logits_in_training() -> None:
    module, batch = zoo.standalone(SilentValidation).eval(), zoo.ListBatch.batch(4)
    probe = Probe()
    assert probe.discover(Step.of(module, "training_step", batch, 0)).module == "net"
    step = probe.for_evaluation(module, ("validation_step",), batch, 0)
    assert step.name == "validation_step"
    with probe.reading(step) as reading:
        torch.testing.assert_close(reading.read(reading.x).logits, module.net(batch[0]))
        assert torch.equal(reading.y, batch[1])


def test_one_probe_serves_two_kinds_of_module_in_turn() -> None:
    probe = Probe()
    for shape, path in ((zoo.ListBatch, (0,)), (zoo.DictBatchWithExtras, ("image",)), (zoo.NestedBatch, (0, 0))):
        with probe.reading(Step.of(zoo.standalone(shape), "training_step", shape.batch(4), 0)) as reading:
            reading.read(reading.x)
        assert probe.routes["training_step"].input == path


def test_without_a_trained_route_training_step_stands_in_only_if_it_agrees_with_itself() -> None:
    module, batch, probe = zoo.standalone(SilentValidation), zoo.ListBatch.batch(4), Probe()
    assert probe.for_evaluation(module, ("validation_step",), batch, 0).name == "training_step"
    runs: list[int] = []
    module.net.register_forward_hook(lambda *_: runs.append(1))
    assert probe.for_evaluation(module, ("validation_step",), batch, 1).name == "training_step"
    assert runs == []  # found once

    class Random(zoo.NumpyMixup):
        def validation_step(self, batch, batch_idx):
            return None

    with pytest.raises(ProbeError, match="logits_fn="):
        Probe().for_evaluation(zoo.standalone(Random), ("validation_step",), batch, 0)


def test_a_route_survives_the_way_into_a_checkpoint_and_back() -> None:
    route = Probe().discover(Step.of(zoo.standalone(zoo.NestedBatch), "training_step", zoo.NestedBatch.batch(4), 0))
    assert route == Route("training_step", (0, 0), (1,), "cross_entropy", "net")
    assert Route.from_dict(route.to_dict()) == route


class Text(zoo.Shape):
    """Token ids in, classes out: nothing to differentiate."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(30, 8), nn.Flatten(), nn.Linear(40, 10))

    @staticmethod
    def batch(n):
        return {"ids": torch.arange(5 * n).view(n, 5) % 30, "label": zoo.labels(n)}

    def validation_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["ids"]), batch["label"])


class FrozenValidation(FrozenBackbone):
    def validation_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)


class Decorated(zoo.Shape):
    @torch.no_grad()
    def validation_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Detached(zoo.Shape):
    def validation_step(self, batch, batch_idx):
        with torch.inference_mode():
            return F.cross_entropy(self.net(batch[0]), batch[1])


class SoftTargetsOfTokens(Text):
    """The only float leaf is the label."""

    @staticmethod
    def batch(n):
        return {"ids": Text.batch(n)["ids"], "label": F.one_hot(zoo.labels(n), 10).float()}


WITHOUT_GRADIENTS: dict[type[zoo.Shape], tuple[tuple[Any, ...], tuple[Any, ...], str | None]] = {
    Text: (("ids",), ("label",), "net"),
    FrozenValidation: ((0,), (1,), "net.5"),
    Decorated: ((0,), (1,), "net"),
    Detached: ((0,), (1,), "net"),
    SoftTargetsOfTokens: (("ids",), ("label",), "net"),
}


def logits_by_hand(module: zoo.Shape, batch: Any) -> Tensor:
    with torch.no_grad():
        return module.net(batch["ids"] if isinstance(batch, dict) else batch[0])  # type: ignore[no-any-return]  # a net


@pytest.mark.parametrize("shape", WITHOUT_GRADIENTS, ids=lambda shape: shape.__name__)
def test_listening_asks_for_no_gradient_and_says_so_in_its_route(shape: type[zoo.Shape]) -> None:
    module, batch, probe = zoo.standalone(shape).eval(), shape.batch(4), Probe()
    before = fingerprint(module)
    step = probe.for_listening(module, ("validation_step",), batch, 0)
    route = probe.routes["validation_step"]
    assert (step.name, route.differentiable) == ("validation_step", False)
    assert (route.input, route.target, route.module) == WITHOUT_GRADIENTS[shape]
    assert Route.from_dict(route.to_dict()) == route
    with probe.reading(step, listening=True) as reading:
        call = reading.read(reading.x)
    torch.testing.assert_close(call.logits, logits_by_hand(module, batch))
    assert torch.equal(call.target, batch["label"] if isinstance(batch, dict) else batch[1])
    assert fingerprint(module) == before


@pytest.mark.parametrize("shape", WITHOUT_GRADIENTS, ids=lambda shape: shape.__name__)
def test_a_route_for_listening_is_not_taken_for_one_with_gradients(shape: type[zoo.Shape]) -> None:
    module, batch, probe = zoo.standalone(shape), shape.batch(4), Probe()
    step = probe.for_listening(module, ("validation_step",), batch, 0)
    with pytest.raises(ProbeError, match=r"no floating-point input|no gradient reaches"):
        probe.route(step)
    with pytest.raises(ProbeError, match=r"no floating-point input|no gradient reaches"):
        probe.discover(step)
    assert probe.for_listening(module, ("validation_step",), batch, 1).name == "validation_step"


def test_a_route_with_gradients_is_preferred_and_serves_both() -> None:
    module, batch, probe = zoo.standalone(zoo.ListBatch), zoo.ListBatch.batch(4), Probe()
    runs: list[int] = []
    module.net.register_forward_hook(lambda *_: runs.append(1))
    step = probe.for_listening(module, ("validation_step",), batch, 0)
    assert probe.routes["validation_step"].differentiable
    assert probe.for_evaluation(module, ("validation_step",), batch, 0) == step
    assert probe.route(step) is probe.route(step, listening=True)
    assert runs == [1]


def test_listening_to_a_test_prefers_test_step_and_falls_back_on_validation_step() -> None:
    class Both(zoo.ListBatch):
        def test_step(self, batch, batch_idx):
            return F.cross_entropy(-self.net(batch[0]), batch[1])

    class Silent(zoo.ListBatch):
        def test_step(self, batch, batch_idx):
            return self.net(batch[0]).argmax(1)

    batch = zoo.ListBatch.batch(4)
    for shape, name in ((Both, "test_step"), (Silent, "validation_step"), (zoo.ListBatch, "validation_step")):
        step = Probe().for_listening(zoo.standalone(shape), ("test_step", "validation_step"), batch, 0)
        assert step.name == name


def test_nothing_to_listen_to_is_an_error() -> None:
    class Nothing(zoo.Shape):
        def validation_step(self, batch, batch_idx):
            return None

    with pytest.raises(ProbeError, match=r"Nothing.validation_step calls none of the losses.*logits_fn="):
        Probe().for_listening(zoo.standalone(Nothing), ("validation_step",), zoo.ListBatch.batch(4), 0)
    with pytest.raises(ProbeError, match="defines none of test_step"):
        Probe().for_listening(zoo.standalone(Nothing), ("test_step",), zoo.ListBatch.batch(4), 0)


def test_a_target_named_by_hand_is_brought_into_the_shape_of_the_logits() -> None:
    module, batch = zoo.standalone(zoo.OneLogitBinary).eval(), zoo.OneLogitBinary.batch(6)
    step = Step.of(module, "training_step", batch, 0)
    read = []
    for probe in (Probe(), Probe(target_key=1)):
        with probe.reading(step) as reading:
            read.append(reading.read(reading.x))
    assert torch.equal(read[0].correct(), read[1].correct())
    assert torch.equal(read[0].per_sample(), read[1].per_sample())


def test_samples_are_counted_by_a_leaf_that_has_as_many_rows_as_the_loss() -> None:
    class Scaled(Text):
        @staticmethod
        def batch(n):
            return {"scale": torch.ones(1, dtype=torch.long), **Text.batch(n)}

    probe = Probe()
    probe.for_listening(zoo.standalone(Scaled), ("validation_step",), Scaled.batch(4), 0)
    assert probe.routes["validation_step"].input == ("ids",)
