"""Listening: logits and targets as the user's own step had them, at the price of one forward a run."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import CalibrationMonitor, OODMonitor, RobustAccuracy, TemperatureScaling
from lightning_robust.attach.listener import Heard
from lightning_robust.attach.monitor import Monitor
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.losses import LossCall

N = 40


def data(n: int = N, batch_size: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n), zoo.labels(n)), batch_size)


class Hearing(Monitor):
    """Keeps all that it hears."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("hearing", None, Probe(**settings), ["val", "test"])
        self.rows: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        self.rows.append((loader, *heard.rows))

    def of(self, loader: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        rows = [row[1:] for row in self.rows if row[0] == loader]
        return tuple(torch.cat(column) for column in zip(*rows, strict=True))  # type: ignore[return-value]  # three


@pytest.mark.parametrize(
    ("samples", "rows", "known"),
    [(4, 4, True), (4, 12, True), (4, 3, False), (4, 6, False), (4, 0, False), (0, 0, True)],
)
def test_rows_are_of_known_samples_where_each_has_equally_many(samples: int, rows: int, known: bool) -> None:
    call = LossCall("cross_entropy", torch.zeros(rows, 3), torch.zeros(rows, dtype=torch.long))
    heard = Heard(call, torch.zeros(samples, 2), torch.arange(samples), torch.ones(samples, dtype=torch.bool))
    assert heard.by_sample is known


class Recording(zoo.ListBatch):
    """Notes the logits and labels that its loss gets."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Tensor, Tensor]] = []

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, y)
        self.noted.append((logits.detach().clone(), y.clone()))  # not reached where the step is stopped at its loss
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(self(batch[0]), batch[1]))


def check(
    shape: type[Recording], run: str = "validate", loader: Any = None, **settings: Any
) -> tuple[Recording, Hearing]:
    """What is heard is what the step itself noted, batch by batch."""
    module, hearing = zoo.built(shape), Hearing(**settings)
    getattr(zoo.trainer(callbacks=[hearing]), run)(module, loader or data(), verbose=False)
    assert len(hearing.rows) == len(module.noted)
    for (_, log_p, labels, _index), (logits, y) in zip(hearing.rows, module.noted, strict=True):
        assert torch.equal(log_p, logits.float().log_softmax(1))
        assert torch.equal(labels, y)
    return module, hearing


class CallsItsNet(Recording):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(self.net(batch[0]), batch[1])


class WritesAfterTheLoss(Recording):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.loss(logits, y)
        logits.zero_()
        y.zero_()
        x.zero_()


class WritesBeforeTheLoss(Recording):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        x.sub_(0.5)
        self.loss(self(x), y)
        y.zero_()


class MakesItsTarget(Recording):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(self(batch[0]), 9 - batch[1])


class NoModuleGivesItsLogits(Recording):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = 2 * self(batch[0])
        self.loss(logits, batch[1])
        logits.zero_()


class LossFirstThenPictures(Recording):
    """Runs the net once more on some batches, after the loss."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(self(batch[0]), batch[1])
        if batch_idx == 1:
            self(torch.zeros(1, 1, 8, 8))


class PicturesFirst(Recording):
    """Runs the net once more on some batches, before the loss: on other inputs, of the same number."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            self(1 - batch[0])
        self.loss(self(batch[0]), batch[1])


class Augmented(Recording):
    """Test-time augmentation: the mean of two calls."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss((self(batch[0]) + self(batch[0].flip(-1))) / 2, batch[1])


class ClonesItsLogits(Recording):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(self(batch[0]).clone(), batch[1])


class ReturnsTuplesLater(Recording):
    """Its net returns features as well, except at first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Twofold()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.net.twice = False
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net.twice = batch_idx > 0
        out = self.net(batch[0])
        self.loss(out[0] if isinstance(out, tuple) else out, batch[1])


class Twofold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.twice = zoo.network(), False

    def forward(self, x: Tensor) -> Any:
        return (self.net(x), x) if self.twice else self.net(x)


class OtherHeadInTest(Recording):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(self(batch[0]).flip(1), batch[1])


class TwoCallsOfTheLoss(Recording):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(self(batch[0]), batch[1])
        F.cross_entropy(self(1 - batch[0]), batch[1])


class DropoutStaysOn(Recording):
    """Monte Carlo dropout: what counts is what the step computed."""

    def on_validation_model_eval(self) -> None:
        self.eval()
        self.net[3].train()


class Lambda(Recording):
    """Answers through a property and a container that no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 10))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch[0].flatten(1) @ self.weight, batch[1])


class CatchesEverything(Recording):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        try:
            logits = self(batch[0])
            self.loss(logits, batch[1])
        except Exception:
            raise AssertionError("a user's handler saw something of ours") from None


class HooksItsNet(Recording):
    """Somebody else's hook scales the logits: ours comes before it, the loss after it."""

    def __init__(self) -> None:
        super().__init__()
        self.net.register_forward_hook(lambda _m, _a, output: output / 2)


class MasksItsLogits(Recording):
    """Continual learning: classes of other tasks are ruled out, in place."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        logits[:, 3:] -= 5
        self.loss(logits, batch[1])

    test_step = validation_step


class IgnoresAClass(Recording):
    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, y, ignore_index=3)
        self.noted.append((logits[y != 3].detach(), y[y != 3]))
        return loss


STRANGERS = [
    Recording,
    CallsItsNet,
    WritesAfterTheLoss,
    WritesBeforeTheLoss,
    MakesItsTarget,
    NoModuleGivesItsLogits,
    LossFirstThenPictures,
    PicturesFirst,
    Augmented,
    ClonesItsLogits,
    ReturnsTuplesLater,
    OtherHeadInTest,
    TwoCallsOfTheLoss,
    DropoutStaysOn,
    Lambda,
    CatchesEverything,
    HooksItsNet,
    MasksItsLogits,
    IgnoresAClass,
]


@pytest.mark.parametrize("run", ["validate", "test"])
@pytest.mark.parametrize("shape", STRANGERS, ids=lambda s: s.__name__)
def test_what_is_heard_is_what_the_loss_got(shape: type[Recording], run: str) -> None:
    check(shape, run)


@pytest.mark.parametrize("shape", STRANGERS, ids=lambda s: s.__name__)
def test_it_is_heard_in_fit_too(shape: type[Recording]) -> None:
    class Quiet(shape):  # type: ignore[misc, valid-type]  # the class is a parameter
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.noted.clear()  # of the sanity check; the rows of an epoch are those of its validation
            return super().training_step(batch, batch_idx)

    module, hearing = zoo.built(Quiet), Hearing()
    zoo.trainer(callbacks=[hearing]).fit(module, data(), data())
    assert len(hearing.rows) == len(module.noted) == 3
    for (_, log_p, labels, _index), (logits, y) in zip(hearing.rows, module.noted, strict=True):
        assert torch.equal(log_p, logits.log_softmax(1))
        assert torch.equal(labels, y)


class TrainsOnOtherTargets(Recording):
    """Its loss gets corrupted labels."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = 2 * self(batch[0])
        F.cross_entropy(logits, (batch[1] + 1) % 10)
        self.noted.append((logits.clone(), batch[1]))


def test_a_target_named_by_hand_is_the_one_that_counts() -> None:
    check(TrainsOnOtherTargets, target_key=1)
    check(NoModuleGivesItsLogits, target_key=1)
    check(Recording, target_key=1)


def test_logits_of_a_function_named_by_hand_are_read_for_each_batch() -> None:
    class ByHand(Recording):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            log_p = (3 * self.net(x)).log_softmax(1)
            self.noted.append((log_p.clone(), y.clone()))
            x.zero_()
            y.zero_()

    module, hearing = zoo.built(ByHand), Hearing(logits_fn=lambda m, b: 3 * m.net(b[0]), target_key=1)
    zoo.trainer(callbacks=[hearing]).validate(module, data(), verbose=False)
    torch.testing.assert_close(hearing.of()[0], torch.cat([log_p for log_p, _ in module.noted]))
    assert torch.equal(hearing.of()[1], zoo.labels(N))


@pytest.mark.filterwarnings("ignore:.*dataloader_iter.*:UserWarning")
def test_an_iterator_in_the_place_of_a_batch_is_an_error_that_says_so() -> None:
    class Fetching(Recording):
        def validation_step(self, dataloader_iter: Any) -> None:
            batch, _batch_idx, _dataloader_idx = next(dataloader_iter)
            self.loss(self(batch[0]), batch[1])

    with pytest.raises(ProbeError, match="takes an iterator instead of a batch"):
        check(Fetching)


def test_a_target_that_equals_a_leaf_by_chance_at_first_is_not_taken_for_it() -> None:
    class OneAgainstTheRest(Recording):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(self(batch[0]), (batch[1] > 3).long())

    by_class = TensorDataset(zoo.images(N), torch.arange(N) // 10 * 2)  # the first batch holds class 0 only
    check(OneAgainstTheRest, loader=DataLoader(by_class, 10))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_scripted_network_is_heard() -> None:
    class Scripted(Recording):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.jit.script(self.net)

    check(Scripted)


def test_samples_are_numbered_in_loader_order() -> None:
    _module, hearing = check(Recording)
    assert hearing.of()[2].tolist() == list(range(N))


def test_a_test_after_a_fit_hears_the_test_step() -> None:
    module, hearing = zoo.built(OtherHeadInTest), Hearing()
    trainer = zoo.trainer(callbacks=[hearing])
    trainer.fit(module, data(), data())
    hearing.rows.clear()
    module.noted.clear()
    trainer.test(module, data(), verbose=False)
    assert torch.equal(hearing.of()[0], torch.cat([logits for logits, _ in module.noted]).log_softmax(1))


class Tokens(zoo.Shape):
    """Labels every token of a text, and asks the loss about some of them only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 5)
        self.noted: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def batch(n: int) -> Any:
        ids = torch.arange(n * 7).view(n, 7) % 50
        return {"ids": ids, "mask": (ids % 3 > 0), "tags": ids % 5, "text": ["a"] * n}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits, mask = self.head(self.embedding(batch["ids"])), batch["mask"]
        kept, tags = logits[mask], batch["tags"][mask]
        F.cross_entropy(kept, tags)
        self.noted.append((kept.clone(), tags))


class FlatTokens(Tokens):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.head(self.embedding(batch["ids"])).view(-1, 5)
        F.cross_entropy(logits, batch["tags"].view(-1))
        self.noted.append((logits.clone(), batch["tags"].view(-1)))


class Permuted(Tokens):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.head(self.embedding(batch["ids"]))
        F.cross_entropy(logits.permute(0, 2, 1), batch["tags"])
        self.noted.append((logits.view(-1, 5).clone(), batch["tags"].view(-1)))


@pytest.mark.parametrize("shape", [Tokens, FlatTokens, Permuted], ids=lambda s: s.__name__)
def test_tokens_are_rows_of_their_own_and_belong_to_their_text(shape: type[Tokens]) -> None:
    module, hearing = zoo.built(shape), Hearing()
    zoo.trainer(callbacks=[hearing]).validate(module, zoo.loader(shape, (16, 3)), verbose=False)
    log_p, labels, index = hearing.of()
    torch.testing.assert_close(log_p, torch.cat([logits for logits, _ in module.noted]).log_softmax(1))
    assert torch.equal(labels, torch.cat([tags for _, tags in module.noted]))
    if shape is not Tokens:  # under a mask nobody can tell
        assert index.tolist() == torch.arange(19).repeat_interleave(7).tolist()
    assert index.min() == 0
    assert index.max() == 18


# Dynamo's own, about the copy of the input that the step is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize(("what", "backend"), [("net", "eager"), ("net", "aot_eager"), ("inner", "eager")])
def test_a_compiled_network_is_heard(what: str, backend: str) -> None:
    class Compiled(Recording):
        def __init__(self) -> None:
            super().__init__()
            if what == "net":
                self.net = torch.compile(self.net, backend=backend)
            else:
                self.net.compile(backend=backend)

    torch._dynamo.reset()
    module, hearing = zoo.built(Compiled), Hearing()
    zoo.trainer(callbacks=[hearing]).validate(module, data(), verbose=False)
    log_p, labels, _ = hearing.of()
    torch.testing.assert_close(log_p, torch.cat([logits for logits, _ in module.noted]).log_softmax(1))
    assert torch.equal(labels, zoo.labels(N))


# -- what it costs -------------------------------------------------------------------------------------------------


def forwards(shape: type[Recording], run: str, callbacks: list[Any], loader: Any = None) -> int:
    module = zoo.built(shape)
    counted: list[int] = []  # not in the module, which is put back after every read
    module.net.register_forward_hook(lambda *_: counted.append(1))
    trainer = zoo.trainer(callbacks=callbacks, max_epochs=3)
    if run == "fit":
        trainer.fit(module, data(), loader or data())
    else:
        getattr(trainer, run)(module, loader or data(), verbose=False)
    return len(counted)


class SilentRecording(Recording):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).argmax(1)

    test_step = validation_step


class NoGradRecording(Recording):
    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    "shape",
    [Recording, CallsItsNet, MakesItsTarget, NoModuleGivesItsLogits, WritesBeforeTheLoss],
    ids=lambda s: s.__name__,
)
def test_listening_costs_one_forward_a_run(shape: type[Recording], run: str) -> None:
    pair = [CalibrationMonitor(), TemperatureScaling()] if run != "test" else [CalibrationMonitor()]
    assert forwards(shape, run, pair) == forwards(shape, run, []) + 1


def test_listening_costs_one_forward_a_loader() -> None:
    class Two(Recording):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            F.cross_entropy(self(batch[0]), batch[1])

    loaders = [data(), data(20)]
    assert forwards(Two, "fit", [CalibrationMonitor()], loaders) == forwards(Two, "fit", [], loaders) + 2


def test_all_four_monitors_cost_that_forward_and_their_own_queries() -> None:
    monitors = [
        RobustAccuracy(lambda logits_fn, x, y: logits_fn(x).argmax(1)[:, None, None, None] * 0 + x, max_samples=20),
        CalibrationMonitor(),
        OODMonitor(max_samples=20),
        TemperatureScaling(),
    ]
    # On the first two batches (20 samples): clean, the attack's query, attacked; three synthetic sets. Once, with three
    # forwards, it is tried out whether batches can be taken apart; then a batch without a right answer is not attacked.
    least = forwards(Recording, "validate", []) + 1 + 2 * (2 + 3)
    assert least <= forwards(Recording, "validate", monitors) <= least + 2 + 3


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    "shape",
    [
        SilentRecording,
        NoGradRecording,
    ],
    ids=lambda s: s.__name__,
)
def test_the_price_does_not_grow_with_the_data(shape: type[Recording], run: str) -> None:
    price = [
        forwards(shape, run, [CalibrationMonitor()], data(n)) - forwards(shape, run, [], data(n)) for n in (32, 96)
    ]
    assert price[0] == price[1]


# -- how it ends ---------------------------------------------------------------------------------------------------


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


class Failing(Recording):
    error: BaseException = ValueError("the user's own")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 1 and not self.trainer.sanity_checking:
            raise self.error


class FailingWatched(Failing):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.net(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        F.cross_entropy(self(batch[0]) + 0, batch[1])
        if batch_idx == 1 and not self.trainer.sanity_checking:
            raise self.error


@pytest.mark.parametrize("run", ["fit", "validate"])
@pytest.mark.parametrize("error", [ValueError("the user's own"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("shape", [Failing, FailingWatched], ids=lambda s: s.__name__)
def test_an_end_in_the_middle_leaves_nothing_behind(shape: type[Failing], error: BaseException, run: str) -> None:
    module = zoo.built(shape)
    module.error = error
    before, attributes = hooks(module), set(vars(module))
    monitors = [
        RobustAccuracy(lambda logits_fn, x, y: x, max_samples=20),
        CalibrationMonitor(),
        OODMonitor(),
        TemperatureScaling(),
    ]
    trainer = zoo.trainer(callbacks=monitors)
    start = {
        "fit": lambda: trainer.fit(module, data(), data()),
        "validate": lambda: trainer.validate(module, data(), verbose=False),
    }
    with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
        start[run]()
    assert hooks(module) == before
    assert _get_current_function_mode_stack() == []
    assert set(vars(module)) <= attributes | {"_compiler_ctx", "_hparams"}
    assert not any("lightning_robust" in str(type(value).__module__) for value in vars(module).values())


@pytest.mark.parametrize("shape", [Recording, NoModuleGivesItsLogits], ids=lambda s: s.__name__)
def test_an_ordinary_end_leaves_nothing_behind(shape: type[Recording]) -> None:
    module = zoo.built(shape)
    before, attributes = hooks(module), set(vars(module))
    zoo.trainer(callbacks=[CalibrationMonitor(), TemperatureScaling()]).fit(module, data(), data())
    assert hooks(module) == before
    assert _get_current_function_mode_stack() == []
    assert set(vars(module)) <= attributes | {"_compiler_ctx", "_hparams"}


def test_no_batch_is_held_between_epochs() -> None:
    held: list[int] = []

    class Counting(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            held.append(sum(type(o) is Tensor and o.shape == (8, 1, 8, 8) for o in gc.get_objects()))

    sizes = (16, 8)
    for monitors in ([], [CalibrationMonitor(), OODMonitor(), TemperatureScaling()]):
        module = zoo.built(zoo.ListBatch)
        zoo.trainer(callbacks=[*monitors, Counting()]).validate(module, zoo.loader(zoo.ListBatch, sizes), verbose=False)
    assert held[0] == held[1]


# -- that nobody notices -------------------------------------------------------------------------------------------


class Attentive(zoo.Shape):
    """A TransformerEncoder, whose fast path a function mode switches off."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.net = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(64, 10))
        self.noted: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.squeeze(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.noted.append(torch.cat([logits.flatten(), loss[None]]).detach().clone())


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_the_fast_path_of_a_transformer_stays_on() -> None:
    noted = []
    monitors = [CalibrationMonitor(), TemperatureScaling(), OODMonitor(), RobustAccuracy(lambda f, x, y: x)]
    for callbacks in ([], monitors):
        module = zoo.built(Attentive)
        zoo.trainer(callbacks=callbacks).validate(module, data(), verbose=False)
        noted.append(torch.cat(module.noted))
    assert torch.equal(*noted)
