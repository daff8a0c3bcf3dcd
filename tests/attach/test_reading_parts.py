"""Some samples of a batch read apart from the others: where that is possible, and that it says the same."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust import NFGSM, PGD, ThreatModel
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.attacks import FGSM
from lightning_robust.attacks.local import LocalThreat
from lightning_robust.attacks.noise import UniformNoise
from lightning_robust.attacks.worst_case import WorstCase
from lightning_robust.randomness import seeded

THREAT = ThreatModel("linf", 0.1)
DRAW = [zoo.NumpyMixup, zoo.SideEffects]


def step_of(shape: type[zoo.Shape], n: int = 8) -> Step:
    return Step.of(zoo.standalone(shape), "training_step", shape.batch(n), 0)


def divisible(shape: type[zoo.Shape], n: int = 8, **settings: Any) -> bool:
    with Probe().reading(step_of(shape, n), **settings) as reading:
        return reading.divisible


# -- which batches fall apart ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [shape for shape in zoo.ZOO if shape not in DRAW])
def test_plain_batches_of_any_make_fall_apart(shape: type[zoo.Shape]) -> None:
    assert divisible(shape)


@pytest.mark.parametrize("shape", DRAW)
def test_steps_that_draw_random_numbers_do_not(shape: type[zoo.Shape]) -> None:
    assert not divisible(shape)


class Bytes(zoo.ListBatch):
    @staticmethod
    def batch(n: int) -> Any:
        return [(zoo.images(n) * 255).to(torch.uint8), zoo.labels(n)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0] / 255), batch[1])


class Weighted(zoo.DictBatchWithExtras):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = batch["weight"] / batch["weight"].sum()  # which is about the whole batch, behind the loss call
        return (F.cross_entropy(self.net(batch["image"]), batch["label"], reduction="none") * weight).sum()


class Pixels(zoo.Shape):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 3, 3, padding=1)

    @staticmethod
    def batch(n: int) -> Any:
        return [zoo.images(n), (zoo.images(n, 1)[:, 0] * 3).long()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("shape", [Bytes, Weighted, Pixels])
def test_bytes_weights_and_pixels_fall_apart(shape: type[zoo.Shape]) -> None:
    assert divisible(shape)


class Centred(zoo.ListBatch):
    """Logits less their mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return z - z.mean(0)


class BatchStatistics(zoo.ListBatch):
    """A normalisation that keeps no running statistics: eval mode is about the batch too."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1] = nn.BatchNorm2d(6, track_running_stats=False)


class Prototype(zoo.ListBatch):
    """Everything is compared with the first sample."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.net(x[:1])


class Neighbours(zoo.ListBatch):
    """Rows 0 and 1, 2 and 3, ... are pairs: what is said of one depends on the other."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        other = z.view(-1, 2, 10).flip(1).reshape(-1, 10)
        return z + 0.5 * other


class Halves(zoo.ListBatch):
    """Two views of each picture, one half behind the other."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return z + 0.5 * z.roll(len(z) // 2, 0)


class Graph(zoo.Shape):
    """Nodes and edges; nodes have labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)

    @staticmethod
    def batch(n: int) -> Any:
        around = torch.arange(n)
        return {"x": zoo.images(n), "edges": torch.stack([around, (around + 1) % n]), "y": zoo.labels(n)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h, (source, target) = batch["x"].flatten(1), batch["edges"]
        gathered = torch.zeros_like(h).index_add(0, target, h[source])
        return F.cross_entropy(self.net(h + gathered), batch["y"])


class Contrastive(zoo.Shape):
    """The classes are the partners in the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self.net(batch[0])
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))


class OfTheBatch(zoo.Shape):
    """One prediction for a whole batch of pictures."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).mean(0, keepdim=True), batch[1][:1])


TIED = [Centred, BatchStatistics, Prototype, Neighbours, Halves, Graph, Contrastive, OfTheBatch]


@pytest.mark.parametrize("n", [6, 8])
@pytest.mark.parametrize("shape", TIED)
def test_batches_whose_rows_refer_to_each_other_do_not(shape: type[zoo.Shape], n: int) -> None:
    assert not divisible(shape, n)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # inside of torch.compile
def test_compiled_networks_are_not_compiled_anew_for_each_number_of_samples() -> None:
    seen: list[int] = []

    class Compiled(zoo.ListBatch):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return self.net(x)

    assert not divisible(Compiled)
    assert set(seen) == {8}


def test_a_batch_of_one_is_read_whole_and_says_nothing_about_others() -> None:
    probe, step = Probe(), step_of(zoo.ListBatch, 1)
    with probe.reading(step) as reading:
        assert not reading.divisible
    with probe.reading(step.with_batch(zoo.ListBatch.batch(8))) as reading:
        assert reading.divisible
    with probe.reading(step) as reading:
        assert reading.divisible  # known by now


def test_dropout_and_batch_statistics_tie_samples_in_train_mode() -> None:
    assert not divisible(zoo.ListBatch, training=None)

    class NoDropout(zoo.ListBatch):
        def __init__(self) -> None:
            super().__init__()
            self.net[3] = nn.Identity()

    assert not divisible(NoDropout, training=None)  # BatchNorm is left


def test_what_holds_in_eval_mode_is_not_taken_for_train_mode() -> None:
    probe, step = Probe(), step_of(zoo.ListBatch)
    with probe.reading(step) as reading:
        assert reading.divisible
    with probe.reading(step, training=None) as reading:
        assert not reading.divisible
    with probe.reading(step) as reading:
        assert reading.divisible


def test_trying_it_out_leaves_no_trace() -> None:
    step = step_of(zoo.SharedStepWithMetrics)
    torch.manual_seed(5)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    state = {name: value.clone() for name, value in step.module.state_dict().items()}
    tried: list[int] = []
    with Probe().reading(step) as reading:
        call = reading.read(reading.x)
        step.module.net.register_forward_hook(lambda *_: tried.append(1))
        assert [reading.divisible for _ in range(3)] == [True] * 3
        assert len(tried) in (2, 3)  # the whole and one or two parts, once for each step
        assert reading.call is call
    assert all(torch.equal(value, state[name]) for name, value in step.module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
    assert step.module.training


# -- what a part says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[3], [0, 5, 6], [7, 2, 4, 1]])
@pytest.mark.parametrize("shape", [shape for shape in [*zoo.ZOO, Bytes, Weighted, Pixels] if shape not in DRAW])
def test_a_part_says_of_its_samples_what_the_whole_says(shape: type[zoo.Shape], rows: list[int]) -> None:
    index = torch.tensor(rows)
    with Probe().reading(step_of(shape)) as reading, torch.no_grad():
        whole = reading.read(reading.x)
        part = reading.at(index)
        assert torch.equal(part.x, reading.x[index])
        some = part.read(part.x)
        torch.testing.assert_close(some.logits, whole.logits[index])
        assert torch.equal(some.target, whole.target[index])
        assert torch.equal(part.y, reading.y[index])
        values = [one(call.logits, call.target) for one, call in ((part, some), (reading, whole))]
        torch.testing.assert_close(values[0], values[1][index])
        margins = [one.margin(call.logits, call.target) for one, call in ((part, some), (reading, whole))]
        torch.testing.assert_close(margins[0], margins[1][index])
        assert reading.logits.at(index).reading is part  # the same object for the same rows
        assert reading.logits.divisible
        twice = part.at(torch.tensor([0]))
        torch.testing.assert_close(twice.read(twice.x).logits, whole.logits[index[:1]])


# -- attacks that are set to a batch ---------------------------------------------------------------------------------


class Local(zoo.ListBatch):
    @staticmethod
    def batch(n: int) -> Any:
        mask = torch.zeros(n, 8, 8)
        mask[:, :4] = 1
        return {"image": zoo.images(n), "label": zoo.labels(n), "mask": mask, "eps": 0.03 * (1 + torch.arange(n) % 4)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["image"]), batch["label"])


def test_an_attack_gets_the_users_loss_and_what_it_leaves_open() -> None:
    with Probe().reading(step_of(zoo.ListBatch)) as reading:
        fitted = reading.fitted(
            PGD(THREAT, step_size=0.05), lambda t: t.scaled(0.5), keep="best", step_size=9.0, other=1
        )
        assert fitted == PGD(ThreatModel("linf", 0.05), step_size=0.05, objective=reading, keep="best")
        named = reading.fitted(PGD(THREAT, objective="margin"))
        assert named.objective.owner is reading
        assert reading.fitted(NFGSM(THREAT)).objective is reading
        assert reading.fitted(UniformNoise(THREAT), lambda t: t.scaled(2)).threat.eps == 0.2  # climbs nothing
        kept = reading.fitted(PGD(THREAT, keep="last"), early_exit=True, keep="best")
        assert (kept.keep, kept.early_exit) == ("last", None)


def test_attacks_inside_of_an_attack_are_set_too() -> None:
    with Probe().reading(step_of(zoo.ListBatch)) as reading:
        foreign = len
        worst = reading.fitted(WorstCase([FGSM(THREAT), PGD(THREAT), foreign]), lambda t: t.scaled(0.5), keep="best")
        assert worst.objective is reading
        first, second, third = worst.attacks
        assert (first.threat.eps, second.threat.eps, second.keep) == (0.05, 0.05, "best")
        assert first.objective is second.objective is reading
        assert third is foreign


@dataclass(frozen=True)
class Foreign:
    """Somebody's own frozen settings, with a threat that is not one of ours."""

    threat: str = "linf"
    size: int = 3

    def __call__(self, logits_fn: Any, x: Tensor, y: Tensor) -> Tensor:
        return x


def test_what_is_not_ours_stays_as_it_is() -> None:
    with Probe().reading(step_of(zoo.ListBatch)) as reading:
        for attack in (len, Foreign(), PGD):
            assert reading.fitted(attack, lambda t: t.scaled(0.5)) == attack


def test_masks_and_radii_of_a_batch_travel_with_its_samples() -> None:
    probe = Probe(mask_key="mask", eps_key="eps")
    with probe.reading(step_of(Local)) as reading:
        threat = reading.fitted(PGD(THREAT)).threat
        assert isinstance(threat, LocalThreat)
        assert threat.mask.shape == (8, 1, 8, 8)
        assert threat.radii.tolist() == Local.batch(8)["eps"].tolist()
        rows = torch.tensor([5, 2])
        part = reading.at(rows).fitted(PGD(THREAT)).threat
        assert torch.equal(part.radii, threat.radii[rows])
        assert torch.equal(part.mask, threat.mask[rows])
    with Probe().reading(step_of(Local)) as reading:
        assert reading.fitted(PGD(THREAT)).threat == THREAT


@pytest.mark.parametrize("early_exit", [None, True])
def test_what_an_attack_does_to_a_sample_does_not_depend_on_the_others(early_exit: bool | None) -> None:
    attack = PGD(THREAT, steps=6, keep="best", early_exit=early_exit)
    probe, step = Probe(eps_key="eps"), step_of(Local)
    with torch.no_grad():
        step.batch["label"] = step.module.eval().net(step.batch["image"]).argmax(1)  # so that all hold at first
    with probe.reading(step) as reading:
        assert reading.divisible

        def found(part: Any, index: list[int]) -> Tensor:
            noise = [seeded(0, i) for i in index]
            return part.guarded(part.fitted(attack))(part.logits, part.x, part.y, generator=noise)

        whole = found(reading, list(range(8)))
        for i in range(8):
            alone = found(reading.at(torch.tensor([i])), [i])
            torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-6)


def test_a_part_of_a_fitted_attack_is_that_attack_for_the_part() -> None:
    attack = PGD(THREAT, steps=3, start="zero", keep="last")
    with Probe().reading(step_of(zoo.ListBatch)) as reading:
        whole = reading.guarded(reading.fitted(attack))(reading.logits, reading.x, reading.y)
        rows = torch.tensor([6, 1])
        part = reading.at(rows)
        assert part.fitted(attack).objective is part
        found = part.guarded(part.fitted(attack))(part.logits, part.x, part.y)
        torch.testing.assert_close(found, whole[rows])
        assert replace(attack, objective=part) == part.fitted(attack)
