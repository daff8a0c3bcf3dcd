"""The benchmarks: each returns the rows of one table."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import (
    PGD,
    AdversarialTraining,
    InputGradientPenalty,
    RobustAccuracy,
    SaliencyRegularization,
    ThreatModel,
)
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.seam import install
from lightning_robust.attach.step import Step
from lightning_robust.modes import frozen
from lightning_robust.randomness import RandomState, seeded
from tests.benchmarks import subjects
from tests.benchmarks.accumulators import ece, separation, temperature
from tests.benchmarks.evaluations import corruptions, in_distribution, monitors
from tests.benchmarks.memory import METHODS
from tests.benchmarks.penalties import gradient_penalties
from tests.benchmarks.saliency import saliency
from tests.benchmarks.subjects import EPS, STEPS, Plain, Subject, trainer
from tests.benchmarks.timing import Row, compared, interleaved, progress

__all__ = ["BENCHMARKS"]

THREAT = ThreatModel("linf", eps=EPS)


class _Inside(pl.Callback):
    """Runs ``measure(module, batch)`` before the first step of a real fit, when everything is attached."""

    def __init__(self, measure: Callable[[Any, Any], dict[str, list[float]]]) -> None:
        self.measure = measure
        self.seconds: dict[str, list[float]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seconds = self.measure(pl_module, batch)


def crafting() -> list[Row]:
    """PGD-10 over 10 x (forward up to the loss and gradient of the input), eval mode."""
    rows: list[Row] = []
    for subject, repeats in ((Subject("cnn", 128), 9), (Subject("cnn", 8), 40), (Subject("mlp", 64), 300)):
        progress(f"crafting: {subject.name}")
        callback = AdversarialTraining(PGD(THREAT, steps=STEPS))
        inside = _Inside(partial(_crafted, callback, repeats))
        trainer(callback, inside, max_steps=1).fit(Plain(subject.net()), subject.loader)
        target = {"AdversarialTraining": 1.05} if subject.x.shape == (128, 3, 32, 32) else {}
        rows += compared("crafting", subject.name, inside.seconds, "floor", target)
    return rows


def _crafted(callback: AdversarialTraining, repeats: int, module: Any, batch: Any) -> dict[str, list[float]]:
    """Inside a real fit: the Trainer is real, the seam is in, and what is timed is what the seam calls for a batch."""
    import foolbox  # peers of the tests, not of the package: only this benchmark needs them
    import torchattacks  # type: ignore[import-untyped]  # ships no types
    from art.attacks.evasion import ProjectedGradientDescent  # type: ignore[import-untyped]  # ships no types
    from art.estimators.classification import PyTorchClassifier  # type: ignore[import-untyped]  # ships no types

    x, y = batch
    net = deepcopy(module.net).eval()
    step = Step.of(module, "training_step", batch, 0)
    fooled = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")  # type: ignore[attr-defined]  # re-exported silently
    foolbox_pgd = foolbox.attacks.LinfPGD(abs_stepsize=subjects.STEP_SIZE, steps=STEPS)
    torchattacks_pgd = torchattacks.PGD(net, eps=EPS, alpha=subjects.STEP_SIZE, steps=STEPS)

    classifier = PyTorchClassifier(net, nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0, 1), device_type="cpu")
    art_pgd = ProjectedGradientDescent(
        classifier, "inf", EPS, subjects.STEP_SIZE, max_iter=STEPS, num_random_init=1, batch_size=len(x), verbose=False
    )
    arrays = x.numpy(), y.numpy()

    def floor() -> None:
        for _ in range(STEPS):
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(net(leaf), y), leaf)

    def ours() -> None:
        callback.adversary.crafted = None
        callback._craft(step)

    def by_hand() -> torch.Tensor:
        return subjects.pgd(net, x, y, seeded(0, 0, 0, 0))

    ours()
    if not torch.equal(callback._perturbed(), by_hand()):
        raise RuntimeError("the callback and the hand loop do not do the same work; comparing them says nothing.")
    contenders = {
        "floor": floor,
        "AdversarialTraining": ours,
        "hand loop": by_hand,
        "torchattacks PGD": lambda: torchattacks_pgd(x, y),
        "foolbox LinfPGD": lambda: foolbox_pgd.run(fooled, x, y, epsilon=EPS),
        "ART ProjectedGradientDescent": lambda: art_pgd.generate(*arrays),
    }
    return interleaved(contenders, repeats)


def memory() -> list[Row]:
    """Peak memory of two steps of a fit (CNN 3x32x32, batch 256, PGD with 3 steps), in MB, over a plain one."""
    peaks: dict[str, float] = {}
    for method in METHODS:
        progress(f"memory: {method}")
        command = [sys.executable, "-m", "tests.benchmarks.memory", method]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[method] = float(answer.stdout.split()[-1]) / 1e6
    case = "CNN 3x32x32, batch 256 (MB instead of ms)"
    return [Row("memory", case, name, mb, ratio=mb / peaks["plain"]) for name, mb in peaks.items()]


def epoch() -> list[Row]:
    """A whole Trainer.fit of one epoch over the same training written into the module by hand."""
    # The quickstart's net and batches. What happens once a run (discovery; see `read`) is not in it: the callbacks
    # have seen a fit before.
    subject = Subject("cnn", 128, batches=6, size=28, channels=1)
    rows: list[Row] = []
    for method, attack, by_hand, repeats in (
        ("madry", PGD(THREAT, steps=STEPS), subjects.HandMadry, 4),
        ("trades", PGD(THREAT, steps=STEPS), subjects.HandTrades, 4),
        ("n-fgsm", THREAT, subjects.HandNFGSM, 9),
    ):
        progress(f"epoch: {method}")
        weights: dict[str, Any] = {}
        contenders = {
            "by hand": partial(_fit, subject, by_hand, weights),
            "callback": partial(_fit, subject, Plain, weights, AdversarialTraining(attack, method)),
        }
        seconds = interleaved(contenders, repeats, warmup=1)
        torch.testing.assert_close(weights["callback"], weights["by hand"])  # the same work
        case = f"{method}, {subject.name}"
        rows += compared("epoch", case, seconds, "by hand", {"callback": 1.05})
    return rows


def _fit(subject: Subject, build: Callable[[nn.Module], Plain], weights: dict[str, Any], *callbacks: Any) -> None:
    module = build(subject.net())
    trainer(*callbacks, max_epochs=1).fit(module, subject.loader)
    weights["callback" if callbacks else "by hand"] = module.state_dict()


class _EveryOther(pl.Callback):
    """Installs the seam for every other step of a fit and times them all."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"without": [], "with the seam": []}
        self._undo: Callable[[], None] | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2:
            self._undo = install(pl_module, "benchmark", feed=lambda step: step.batch).detach
        self._start = time.process_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        elapsed = time.process_time() - self._start
        if self._undo is not None:
            self._undo()
            self._undo = None
        self.seconds["with the seam" if batch_idx % 2 else "without"].append(elapsed)


def seam() -> list[Row]:
    """A step of a fit with the seam installed, feeding the batch unchanged, over the same step without it."""
    rows: list[Row] = []
    for subject in (Subject("cnn", 128, batches=40), Subject("mlp", 64, batches=3000)):
        progress(f"seam: {subject.name}")
        watch = _EveryOther()
        trainer(watch, max_epochs=1).fit(Plain(subject.net()), subject.loader)
        rows += compared("seam", subject.name, watch.seconds, "without")
    return rows


def read() -> list[Row]:
    """One read by the probe, stopped at the loss, over a direct forward; and what an open reading costs by itself."""
    rows: list[Row] = []
    for subject, repeats in ((Subject("cnn", 128), 40), (Subject("mlp", 64), 1000)):
        progress(f"read: {subject.name}")
        rows += _read(subject, repeats)
    return rows


def _read(subject: Subject, repeats: int) -> list[Row]:
    module, net, x = Plain(subject.net()), subject.net().eval(), subject.x
    probe, step = Probe(), Step.of(module, "training_step", (x, subject.y), 0)

    def opened() -> None:
        with probe.reading(step):
            pass

    def froze() -> None:
        with frozen(module):
            pass

    opened()  # discovery
    with probe.reading(step) as reading, torch.no_grad():
        seconds = interleaved({"direct forward": lambda: net(x), "read": lambda: reading.read(x)}, repeats, warmup=3)
    parts = {
        "open and close a Reading": opened,
        "of that: frozen": froze,
        "of that: random state": lambda: RandomState.capture().restore(),
    }
    alone = compared("read", subject.name, interleaved(parts, 1000, warmup=3), "open and close a Reading")
    once = interleaved({"discovery, once a run": lambda: Probe().discover(step)}, 10, warmup=1)
    alone += compared("read", subject.name, once, "discovery, once a run")
    return [
        *compared("read", subject.name, seconds, "direct forward"),
        *(Row(row.benchmark, row.case, row.what, row.milliseconds) for row in alone),
    ]


def evaluation() -> list[Row]:
    """A validation epoch with RobustAccuracy over one whose validation_step attacks by hand (PGD-10, 250 digits)."""
    subject = Subject("cnn", 250, size=28, channels=1)
    progress(f"evaluation: {subject.name}")
    attack = PGD(THREAT, steps=STEPS)
    known, plain, by_hand = trainer(RobustAccuracy(attack)), trainer(), trainer()
    module, hand = Plain(subject.net()), subjects.HandValidated(subject.net())

    def validate(run: pl.Trainer, what: pl.LightningModule) -> None:
        run.validate(what, subject.loader, verbose=False)

    seconds = interleaved(
        {
            "by hand": lambda: validate(by_hand, hand),
            "RobustAccuracy": lambda: validate(known, module),
            "RobustAccuracy, first epoch of a run": lambda: validate(trainer(RobustAccuracy(attack)), module),
            "no attack at all": lambda: validate(plain, module),
        },
        3,
    )
    return compared("evaluation", subject.name, seconds, "by hand")


def trades() -> list[Row]:
    """The inner loop of TRADES over its official formulation, which predicts the clean batch anew in each step."""
    subject = Subject("cnn", 128)
    progress(f"trades: {subject.name}")
    callback = AdversarialTraining(PGD(THREAT, steps=STEPS), "trades")
    inside = _Inside(partial(_diverged, callback))
    trainer(callback, inside, max_steps=1).fit(Plain(subject.net()), subject.loader)
    return compared("trades", subject.name, inside.seconds, "official formulation", {"AdversarialTraining": 0.8})


def _diverged(callback: AdversarialTraining, module: Any, batch: Any) -> dict[str, list[float]]:
    x, _ = batch
    net, step = deepcopy(module.net).eval(), Step.of(module, "training_step", batch, 0)

    def official() -> None:
        moved = x + 0.001 * torch.randn_like(x)
        for _ in range(STEPS):
            moved = moved.detach().requires_grad_()
            # The clean prediction stands in the graph, and is computed in each step.
            loss = F.kl_div(net(moved).log_softmax(1), net(x).softmax(1), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = (x + (moved.detach() + 0.007 * gradient.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)

    def ours() -> None:
        callback.adversary.crafted = None
        callback._craft(step)

    return interleaved({"official formulation": official, "AdversarialTraining": ours}, 5)


def survivors() -> list[Row]:
    """A validation epoch with PGD-10 that leaves fooled samples alone, over one that goes on with all of them."""
    subject = Subject("cnn", 250, size=28, channels=1)
    progress(f"survivors: {subject.name}")
    on_a_grid = DataLoader(TensorDataset((8 * subject.x).round() / 8, subject.y), len(subject.x))
    rows: list[Row] = []
    for share in (0.0, 0.5, 1.0):
        module = _Holding(subject.net(), share)
        contenders = {
            "all to the end": partial(_validated, module, on_a_grid, PGD(THREAT, steps=STEPS, keep="last")),
            "survivors only": partial(_validated, module, on_a_grid, PGD(THREAT, steps=STEPS)),
        }
        rows += compared("survivors", f"{share:.0%} hold", interleaved(contenders, 3, warmup=1), "all to the end")
    return rows


class _Holding(Plain):
    """A share of the samples holds whatever happens, the others fall to any noise; the work is that of the net."""

    def __init__(self, net: nn.Module, share: float) -> None:
        super().__init__(net)
        self.share = share

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        off = (8 * x - (8 * x).round()).square().mean((1, 2, 3))  # 0 for the pixels as they are
        sure = 1 - 1e4 * off * (y >= 10 * self.share)
        return F.cross_entropy(1e-6 * self.net(x) + F.one_hot(y, 10) * sure.unsqueeze(1), y)


def _validated(module: Any, batches: Any, attack: Any) -> None:
    trainer(RobustAccuracy(attack, examples=0)).validate(module, batches, verbose=False)


def penalties() -> list[Row]:
    """A whole Trainer.fit of one epoch with a penalty on input gradients over the same written into the module."""
    subject = Subject("cnn", 128, batches=6, size=28, channels=1)
    rows: list[Row] = []
    for method, by_hand in (
        ("finite_differences", subjects.HandFiniteDifferences),
        ("double_backward", subjects.HandDoubleBackward),
    ):
        progress(f"penalties: {method}")
        weights: dict[str, Any] = {}
        callback, checked = (SaliencyRegularization(InputGradientPenalty(method), weight=0.1) for _ in range(2))
        vars(callback)["_first_batch"] = lambda *_: None  # what happens once a run has a row of its own
        contenders = {
            "by hand": partial(_fit, subject, by_hand, weights),
            "callback": partial(_fit, subject, Plain, weights, callback),
            "callback, with the check before the first of 6 steps": partial(_fit, subject, Plain, weights, checked),
            "no penalty": lambda: trainer(max_epochs=1).fit(Plain(subject.net()), subject.loader),
        }
        seconds = interleaved(contenders, 9, warmup=1)
        parameters = {name for name, _ in subject.net().named_parameters(prefix="net")}
        # By hand, BatchNorm's statistics see the second forward as well.
        learned = {who: {n: v for n, v in state.items() if n in parameters} for who, state in weights.items()}
        torch.testing.assert_close(learned["callback"], learned["by hand"])  # the same work
        rows += compared("penalties", f"{method}, {subject.name}", seconds, "by hand", {"callback": 1.05})
    return rows


BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "crafting": crafting,
    "epoch": epoch,
    "seam": seam,
    "read": read,
    "trades": trades,
    "memory": memory,
    "evaluation": evaluation,
    "survivors": survivors,
    "penalties": penalties,
    "gradient_penalties": gradient_penalties,
    "monitors": monitors,
    "in_distribution": in_distribution,
    "corruptions": corruptions,
    "ece": ece,
    "temperature": temperature,
    "separation": separation,
    "saliency": saliency,
}
