from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD, ThreatModel, UniformNoise, YesNo, guard, margin
from lightning_robust.attacks.search import searching
from lightning_robust.attacks.targets import check_targets, likeliest_wrong, towards
from lightning_robust.randomness import seeded

THREAT = ThreatModel("linf", 0.1)
LOGITS = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 3.0, 2.0]])
Y = torch.tensor([0, 1, 3, 2])


def chosen(targeted: Any, logits: Tensor, y: Tensor, noise: Any = None, objective: Any = None) -> Tensor:
    """The classes that an attack on these clean predictions would go for."""
    x = torch.full((len(logits), 2), 0.5)
    with searching(THREAT, lambda z: logits + 0 * z.sum(), x, y, objective, noise) as search:
        return towards(targeted, search).target


def test_the_runner_up_is_the_likeliest_wrong_class_and_the_least_likely_the_last_one() -> None:
    assert chosen("runner-up", LOGITS, Y).tolist() == [1, 0, 2, 0]
    assert chosen("least-likely", LOGITS, Y).tolist() == [3, 3, 0, 1]
    sure = LOGITS.clone()
    sure[0, 0] = -9  # the right class is the least likely one: it is no target
    assert chosen("least-likely", sure, Y)[0] == 3


def test_given_targets_are_those_of_the_user() -> None:
    assert chosen("given", LOGITS, torch.tensor([3, 3, 0, 1])).tolist() == [3, 3, 0, 1]
    with pytest.raises(ValueError, match=r"targeted='given' takes classes \(N, \.\.\.\) as y, got \(4, 4\) for logits"):
        chosen("given", LOGITS, F.one_hot(Y, 4).float())


def test_soft_labels_count_by_their_largest_entry() -> None:
    soft = 0.9 * F.one_hot(Y, 4) + 0.025
    for targeted in ("runner-up", "least-likely"):
        assert torch.equal(chosen(targeted, LOGITS, soft), chosen(targeted, LOGITS, Y))


@pytest.mark.parametrize("per_sample", [False, True])
def test_random_targets_are_uniform_over_the_wrong_classes(per_sample: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    n, classes = 4000, 5
    logits, y = torch.randn(n, classes), torch.arange(n) % classes
    noise = [seeded(3, i) for i in range(n)] if per_sample else seeded(3)
    found = chosen("random", logits, y, noise)
    assert not bool((found == y).any())
    for right in range(classes):
        counts = torch.bincount(found[y == right], minlength=classes).tolist()
        assert counts.pop(right) == 0
        assert stats.chisquare(counts).pvalue > 0.001
    # Nor do they favour what the model finds likely.
    rank = logits.scatter(1, y.unsqueeze(1), -torch.inf).argsort(1, descending=True).argsort(1)
    counts = torch.bincount(rank.gather(1, found.unsqueeze(1)).squeeze(1)).tolist()
    assert len(counts) == classes - 1
    assert stats.chisquare(counts).pvalue > 0.001


def test_random_targets_are_a_function_of_the_seed() -> None:
    logits, y = torch.randn(100, 10), torch.arange(100) % 10
    first = chosen("random", logits, y, seeded(1))
    assert torch.equal(chosen("random", logits, y, seeded(1)), first)
    assert not torch.equal(chosen("random", logits, y, seeded(2)), first)
    generators = [seeded(1, i) for i in range(100)]
    whole, part = (
        chosen("random", logits, y, generators),
        chosen("random", logits[40:], y[40:], [seeded(1, i) for i in range(40, 100)]),
    )
    assert torch.equal(whole[40:], part)


@pytest.mark.parametrize("targeted", ["random", "least-likely", "runner-up"])
def test_of_two_classes_the_target_is_the_other_one(targeted: Any) -> None:
    y = torch.arange(50) % 2
    assert torch.equal(chosen(targeted, torch.randn(50, 2), y, seeded(0)), 1 - y)


@pytest.mark.parametrize("targeted", ["random", "least-likely", "runner-up"])
def test_pixels_have_a_target_each(targeted: Any) -> None:
    logits, y = torch.randn(3, 4, 5, 6), torch.randint(4, (3, 5, 6))
    y[0, 0, 0] = -100  # an ignored pixel
    found = chosen(targeted, logits, y, seeded(0))
    assert found.shape == y.shape
    assert not bool((found == y).any())
    if targeted == "random":
        assert len(set(found[1][y[1] == 0].tolist())) > 1  # drawn for each pixel, not for each picture
        return
    flat = chosen(targeted, logits.movedim(1, 3).reshape(-1, 4), y.clamp_min(0).flatten())
    assert torch.equal(found.flatten(), flat)


def test_the_likeliest_wrong_classes_come_in_order() -> None:
    assert likeliest_wrong(LOGITS, Y, 3).tolist() == [[1, 2, 3], [0, 2, 3], [2, 1, 0], [0, 3, 1]]
    assert likeliest_wrong(LOGITS, F.one_hot(Y, 4), 1).squeeze(1).tolist() == [1, 0, 2, 0]
    dense = LOGITS.unsqueeze(2).expand(4, 4, 2)
    assert likeliest_wrong(dense, Y.unsqueeze(1).expand(4, 2), 2).shape == (4, 2, 2)


@pytest.mark.parametrize("targeted", ["nearest", 3, True])
def test_an_unknown_choice_is_refused(targeted: Any) -> None:
    with pytest.raises(
        ValueError, match=r"targeted= must be one of given, random, least-likely, runner-up or None, got"
    ):
        check_targets(targeted)
    with pytest.raises(ValueError, match="targeted= must be"):
        PGD(THREAT, targeted=targeted)


@pytest.mark.parametrize("targeted", ["given", "random", "least-likely", "runner-up"])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_linear_model_is_led_to_the_corner_of_its_target(targeted: Any, keep: Any) -> None:
    """Two classes: the gradient towards the target is (1 - p) (w_t - w_y), whose sign is that corner anywhere."""
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, -1.0, 2.0]])
    x, y = torch.full((6, 4), 0.5), torch.arange(6) % 2
    corner = x + 0.1 * (weight[1 - y] - weight[y]).sign()
    attack = PGD(THREAT, steps=3, targeted=targeted, keep=keep)
    found = attack(lambda z: z @ weight.T, x, 1 - y if targeted == "given" else y, generator=seeded(0))
    torch.testing.assert_close(found, corner, rtol=0, atol=1e-7)


def test_the_target_is_reached_where_it_can_be_and_other_wrong_classes_do_not_count() -> None:
    """Identity logits: within 0.3 any class can be made the largest of values between 0.3 and 0.7."""
    x = 0.3 + 0.4 * torch.rand(40, 5, generator=seeded(1))
    y = x.argmax(1)
    for targeted in ("runner-up", "least-likely", "random"):
        attack = PGD(ThreatModel("linf", 0.3), steps=20, targeted=targeted, keep="best")
        found = guard(attack)(lambda z: 5 * z, x, y, generator=seeded(2))
        aims = chosen(targeted, 5 * x, y, seeded(2))
        assert float((found.argmax(1) == aims).float().mean()) == 1.0


def test_several_starts_are_compared_by_how_near_the_target_is() -> None:
    net, x, y = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5)), torch.rand(20, 6), torch.arange(20) % 5
    attack = PGD(ThreatModel("linf", 0.3), steps=2, targeted="given")
    generator = seeded(4)
    starts = torch.stack([attack(net, x, y, generator=generator) for _ in range(3)])
    nearest = torch.stack([-margin(net(start), y) for start in starts]).argmax(0)
    found = replace(attack, restarts=3)(net, x, y, generator=seeded(4))
    assert torch.equal(found, starts[nearest, torch.arange(20)])
    assert len(set(nearest.tolist())) > 1


def test_dense_outputs_are_led_to_given_maps() -> None:
    """A logit a pixel and class: towards class 1 where the map says 1, towards class 0 elsewhere."""
    x = torch.full((2, 2, 3, 3), 0.5)
    y = torch.randint(2, (2, 3, 3), generator=seeded(0))
    found = PGD(THREAT, steps=2, targeted="given")(lambda z: z, x, y, generator=seeded(0))
    up = F.one_hot(y, 2).movedim(3, 1) * 2 - 1
    torch.testing.assert_close(found, x + 0.1 * up, rtol=0, atol=1e-7)


def test_an_objective_with_a_head_of_its_own_chooses_on_that_head() -> None:
    x, y, weight = torch.full((4, 3), 0.5), torch.tensor([0, 1, 1, 0]), torch.tensor([1.0, -2.0, 3.0])
    for targeted in ("random", "runner-up", "least-likely"):
        attack = PGD(THREAT, steps=2, targeted=targeted, objective=YesNo())
        found = attack(lambda z: z @ weight, x, y, generator=seeded(0))
        torch.testing.assert_close(found, x + 0.1 * weight.sign() * (1 - 2 * y).unsqueeze(1), rtol=0, atol=1e-7)


def test_a_targeted_attack_is_told_apart_by_its_name() -> None:
    assert PGD(THREAT, targeted="runner-up").name == "pgd10_runner-up_linf_0.1"
    assert UniformNoise(THREAT).name == "noise10_linf_0.1"
