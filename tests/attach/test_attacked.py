"""One evaluation batch under attack: who is attacked, on which random numbers, and how far."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from lightning_robust.attach.attacked import AttackedBatch, at_radius
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.attacks import PGD, Square, ThreatModel, UniformNoise, WorstCase

THREAT = ThreatModel("linf", 0.1)


@pytest.fixture
def opened() -> Any:
    """A batch of 12, of which the first three are wrong; with the number of samples that each forward saw."""
    module = zoo.built(zoo.ListBatch).eval()
    x = zoo.images(12)
    y = module.net(x).argmax(1)
    y[:3] = (y[:3] + 1) % 10
    with Probe().reading(Step.of(module, "training_step", [x, y], 0)) as reading, torch.no_grad():
        _ = reading.divisible
        clean = reading.read(reading.x)
        sizes: list[int] = []
        hook = module.net.register_forward_hook(lambda net, args, out: sizes.append(len(out)))
        yield reading, clean, sizes
        hook.remove()


def test_only_those_that_hold_are_attacked_and_the_others_stay_where_they_are(opened: Any) -> None:
    reading, clean, sizes = opened
    batch = AttackedBatch(reading, clean, torch.arange(12), seed=0, to_the_end=False)
    perturbed, attacked = batch.run(PGD(THREAT, steps=2))
    assert max(sizes[:-1]) == 9
    assert torch.equal(perturbed[:3], reading.x[:3])
    assert attacked.correct()[:3].tolist() == [0, 0, 0]
    sizes.clear()
    replace(batch, to_the_end=True).run(PGD(THREAT, steps=2))
    assert set(sizes) == {12}
    sizes.clear()
    holds = torch.zeros(12, dtype=torch.bool)
    same, _ = batch.run(PGD(THREAT, steps=2), holds)
    assert sizes == [12]  # nobody is left to attack
    assert torch.equal(same, reading.x)


def test_a_sample_has_random_numbers_of_its_own(opened: Any) -> None:
    reading, clean, _ = opened
    index = torch.arange(12) + 100
    whole, _ = AttackedBatch(reading, clean, index, 0, False).run(UniformNoise(THREAT, draws=1))
    rows = torch.tensor([5, 9])
    part = reading.at(rows)
    alone, _ = AttackedBatch(part, part.read(part.x), index[rows], 0, False).run(UniformNoise(THREAT, draws=1))
    assert torch.equal(whole[rows], alone)


def test_radii_are_how_far_fooled_samples_were_moved(opened: Any) -> None:
    reading, clean, _ = opened
    batch = AttackedBatch(reading, clean, torch.arange(12), 0, False)
    perturbed, attacked = batch.run(PGD(THREAT, steps=3))
    radii = batch.radii(PGD(THREAT), perturbed, attacked)
    assert radii is not None
    moved: Tensor = (perturbed - reading.x).flatten(1).abs().amax(1).double()
    fooled = attacked.correct() == 0
    torch.testing.assert_close(radii[fooled], moved[fooled])
    assert bool((radii[~fooled] == torch.inf).all())
    assert batch.radii(lambda logits_fn, x, y: x, perturbed, attacked) is None


def test_another_radius_takes_the_step_along() -> None:
    assert at_radius(PGD(THREAT, steps=10, step_size=0.02), 0.05) == PGD(
        ThreatModel("linf", 0.05), steps=10, step_size=0.01
    )
    both = WorstCase([PGD(THREAT), Square(THREAT)])
    smaller = ThreatModel("linf", 0.05)
    assert at_radius(both, 0.05) == WorstCase([PGD(smaller), Square(smaller)])
