from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import (
    APGD,
    FGSM,
    NFGSM,
    PGD,
    Square,
    ThreatModel,
    UniformNoise,
    cross_entropy,
    margin,
)
from lightning_robust.attacks.heads import DivergenceFrom, OnHead
from lightning_robust.attacks.search import noise_of, searching, worst_of
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded


def test_the_gradient_of_a_linear_model_is_known_in_pixels() -> None:
    """Logits W (p - m) / s: the gradient of cross-entropy in p is W^T (softmax - onehot) / s, in any batch."""
    space, weight = PixelSpace(mean=(0.5, 0.4), std=(0.25, 0.5)), torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]])
    pixels, y = torch.rand(5, 2), torch.tensor([0, 2, 1, 1, 0])
    x, std = space.to_model(pixels), torch.tensor([0.25, 0.5])
    logits = x @ weight.T
    expected = (logits.softmax(1) - F.one_hot(y, 3)) @ weight / std
    with searching(ThreatModel("linf", 0.1, space), lambda z: z @ weight.T, x, y, None) as search:
        gradient, value, seen = search.climb(search.clean)
        torch.testing.assert_close(gradient, expected)
        torch.testing.assert_close(value, F.cross_entropy(logits, y, reduction="none"))
        torch.testing.assert_close(seen, logits)
        alone, _, _ = search.at(torch.tensor([3])).climb(search.clean[3:4])
        torch.testing.assert_close(alone, expected[3:4])


def test_confident_samples_keep_their_gradients_in_half_precision() -> None:
    """Logits 40 * mean over 256 places: a gradient of p * 40 / 256, below what float16 holds from a gap of 15.4 on."""
    gaps = torch.tensor([2.0, 8.0, 12.0, 15.0, 15.5, 16.0])
    x, y = torch.zeros(6, 5, 256), torch.zeros(6, dtype=torch.long)
    x[:, 0] = gaps.unsqueeze(1) / 40

    def pooled(z: Tensor) -> Tensor:
        return 40 * z.mean(2)

    threat = ThreatModel("linf", 0.1, PixelSpace(bounds=None))
    with (
        searching(threat, pooled, x, y, None) as full,
        searching(threat, lambda z: pooled(z.half()), x, y, None) as low,
    ):
        exact, _, _ = full.climb(x)
        found, _, logits = low.climb(x)
    assert logits.dtype == torch.float16
    assert bool((exact != 0).all())
    assert torch.equal(found.sign(), exact.sign())
    torch.testing.assert_close(found[:4], exact[:4], rtol=0.02, atol=0)


def test_a_zero_gradient_leads_in_a_random_direction_and_others_up() -> None:
    x, y = torch.full((2, 3), 0.5), torch.tensor([0, 0])
    with searching(ThreatModel("l2", 0.1), lambda z: z, x, y, None, seeded(0)) as search:
        step = search.uphill(torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]]))
    torch.testing.assert_close(step.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(step[1], torch.tensor([0.6, 0.0, 0.8]))


def test_a_sample_without_gradient_draws_for_itself_alone() -> None:
    """With a generator a sample nobody's second start may depend on who else stands still in the batch."""
    x, y, weight = torch.full((2, 3), 0.5), torch.tensor([0, 0]), torch.randn(3, 4, generator=seeded(1))

    def logits_fn(z: Tensor) -> Tensor:
        return z @ weight * torch.tensor([[0.0], [1.0]])[-len(z) :]  # the first sample of two is flat

    attack = PGD(ThreatModel("l2", 0.4), steps=1, step_size=0.8, restarts=2)
    both = attack(logits_fn, x, y, generator=[seeded(0), seeded(7)])
    alone = attack(logits_fn, x[1:], y[1:], generator=[seeded(7)])
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-6)


def test_of_several_runs_the_worst_counts_sample_by_sample_and_what_is_fooled_is_left_alone() -> None:
    x, y = torch.tensor([[0.6, 0.5], [0.9, 0.1], [0.55, 0.5]]), torch.zeros(3, dtype=torch.long)
    threat = ThreatModel("linf", 0.2)
    sizes: list[int] = []
    with searching(threat, lambda z: z, x, y, None) as search:
        moves = iter([0.0, -0.06, -0.2])

        def run(part: object) -> tuple[torch.Tensor, None]:
            clean = part.clean  # type: ignore[attr-defined]
            sizes.append(len(clean))
            return clean + torch.tensor([next(moves), 0.0]), None

        best = worst_of([search] * 3, run, early_exit=True)
    assert sizes == [3, 3, 2]  # the second run fooled the last sample
    torch.testing.assert_close(best[:, 0], torch.tensor([0.4, 0.7, 0.49]))


@pytest.mark.parametrize("scale", [1.0, 10.0, 40.0])
def test_half_precision_climbs_where_full_precision_does(scale: float) -> None:
    net = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 5))
    net[2].weight.data *= scale
    x, half = torch.randn(200, 20, generator=seeded(1)), deepcopy(net).half()
    y, threat = net(x).argmax(1), ThreatModel("linf", 0.1, PixelSpace(bounds=None))
    with searching(threat, net, x, y, None) as full, searching(threat, lambda z: half(z.half()), x, y, None) as low:
        exact, _, sure = full.climb(x)
        found, _, logits = low.climb(x)
    assert (logits.dtype, found.dtype) == (torch.float16, torch.float32)
    near = 1 - sure.softmax(1).amax(1) > 1e-6  # beyond that float32 itself has but a digit or two
    assert int(near.sum()) > 100
    assert float(F.cosine_similarity(found, exact)[near].min()) > 0.99
    assert float((found.sign() == exact.sign())[near].float().mean()) > 0.99


def test_an_overflow_in_half_precision_is_no_nan() -> None:
    x, y = torch.tensor([[0.5, 0.25]]), torch.tensor([0])
    weight = torch.tensor([[-200.0, 200.0], [100.0, -100.0]]).half()
    with searching(ThreatModel("linf", 0.1), lambda z: z.half() @ weight, x, y, margin) as search:
        gradient, _, _ = search.climb(x)
    assert gradient.sign().tolist() == [[1, -1]]
    assert not bool(gradient.isnan().any())


def test_margin_and_objective_are_looked_at_without_a_graph() -> None:
    x, y, weight = torch.rand(4, 3), torch.tensor([0, 1, 2, 0]), torch.randn(3, 3, requires_grad=True)
    with searching(ThreatModel("linf", 0.1), lambda z: z @ weight, x, y, None) as search:
        value, score = search.look(x)
        torch.testing.assert_close(value, cross_entropy(x @ weight, y))
        torch.testing.assert_close(score, margin(x @ weight, y))
        assert not value.requires_grad
        assert not search.margin(x @ weight).requires_grad
        assert all(not t.requires_grad for t in search.climb(x))


class InDoubles:
    """An objective of one logit; its margin has the type of the logits."""

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        return self.margin(logits, y)

    def margin(self, logits: Tensor, y: Tensor) -> Tensor:
        return logits.squeeze(1) * (1 - 2 * y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("early_exit", [True, False])
def test_a_margin_may_have_any_floating_type(dtype: torch.dtype, early_exit: bool) -> None:
    x, y, weight = torch.rand(6, 4).to(dtype), torch.arange(6) % 2, torch.randn(4, 1).to(dtype)
    attack = PGD(ThreatModel("linf", 0.2), steps=3, restarts=2, objective=InDoubles(), keep="best")
    found = replace(attack, early_exit=early_exit)(lambda z: z @ weight, x, y, generator=seeded(0))
    assert found.dtype == dtype


def test_rows_of_a_search_take_everything_that_belongs_to_them() -> None:
    x, y, rows = torch.rand(4, 3) + 0.2, torch.tensor([0, 1, 2, 0]), torch.tensor([3, 1])
    generators = [seeded(i) for i in range(4)]
    threat: Any = ThreatModel("linf", 0.1, PixelSpace(outside="widen")).within(eps=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    objective = OnHead(DivergenceFrom(torch.randn(4, 3).log_softmax(1)))
    with searching(threat, lambda z: z, x, y, objective, generators) as search:
        part: Any = search.at(rows)
    assert torch.equal(part.clean, x[rows])
    assert part.y.tolist() == [0, 1]
    assert part.noise == [generators[3], generators[1]]
    assert part.threat.radii.tolist() == pytest.approx([0.4, 0.2])
    assert torch.equal(part.objective.function.log_p, objective.function.log_p[rows])
    assert torch.equal(part.box[1], x[rows].clamp(min=1))
    one = seeded(0)
    assert noise_of(one, rows) is one
    assert noise_of(None, rows) is None


class Whole:
    """Logits whose rows refer to each other, e.g. to an adjacency matrix of the batch."""

    divisible = False

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return 3 * x + x.mean(0)


def test_a_batch_that_cannot_be_taken_apart_is_searched_whole() -> None:
    x, y, logits_fn = torch.tensor([[0.9, 0.1], [0.51, 0.5]]), torch.tensor([0, 0]), Whole()
    PGD(ThreatModel("linf", 0.1), steps=4, restarts=2, early_exit=True)(logits_fn, x, y, generator=seeded(0))
    assert set(logits_fn.sizes) == {2}


def test_of_no_search_there_is_no_worst() -> None:
    with pytest.raises(ValueError, match="one search or more, got none"):
        worst_of([], lambda search: (search.clean, None), early_exit=False)


def test_runs_begin_from_what_is_known() -> None:
    x, y = torch.tensor([[0.4, 0.6], [0.9, 0.1]]), torch.tensor([0, 0])
    seen: list[int] = []

    def run(search: Any) -> tuple[Tensor, None]:
        seen.append(len(search.clean))
        return search.clean + 0.01, None

    with searching(ThreatModel("linf", 0.1), lambda z: z, x, y, None) as search:
        best = worst_of([search], run, early_exit=True, known=search.clean)
    assert seen == [1]  # the first sample is wrong as it is
    assert torch.equal(best, x)  # a move that changes no margin is no gain


L2, LINF = ThreatModel("l2", 0.4), ThreatModel("linf", 0.1)
ATTACKS = [
    FGSM(LINF),
    FGSM(LINF, start="uniform"),
    FGSM(L2, start="uniform", objective="dlr"),
    NFGSM(LINF),
    *(PGD(t, steps=2, start=s) for t in (LINF, L2) for s in ("uniform", "zero", "gaussian")),
    PGD(LINF, steps=3, early_exit=True, restarts=2),
    PGD(L2, steps=2, targeted="random", keep="best"),
    PGD(LINF, steps=2, objective="kl"),
    PGD(LINF.within(mask=torch.ones(1, 1, 4, 4), eps=torch.full((6,), 0.1)), steps=3, early_exit=True),  # type: ignore[arg-type]  # as callbacks do
    UniformNoise(LINF, draws=2),
    UniformNoise(L2, draws=2),
    *(APGD(t, steps=6) for t in (LINF, L2)),
    APGD(LINF, steps=3, targets=2),
    *(Square(t, queries=4) for t in (LINF, L2)),
]


@pytest.mark.parametrize("mean", [0.0, (0.4, 0.5, 0.6)], ids=["pixels", "normalised"])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_images_reach_the_model_in_the_memory_format_of_the_user(attack: Any, mean: Any) -> None:
    """channels_last is a quarter faster; an attack that loses it on the way makes training slower than it need be."""
    space = PixelSpace(mean=mean)
    x = space.to_model(torch.rand(6, 3, 4, 4, generator=seeded(2))).contiguous(memory_format=torch.channels_last)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 4))
    kept: list[bool] = []

    def logits_fn(z: Tensor) -> Tensor:
        kept.append(z.is_contiguous(memory_format=torch.channels_last))
        return net(z)  # type: ignore[no-any-return]  # modules have no types

    inner = attack.threat.threat if hasattr(attack.threat, "radii") else attack.threat
    threat = replace(inner, pixels=space)
    threat = replace(attack.threat, threat=threat) if hasattr(attack.threat, "radii") else threat
    found = replace(attack, threat=threat)(logits_fn, x, torch.arange(6) % 4, generator=seeded(0))
    assert kept
    assert all(kept)
    assert found.is_contiguous(memory_format=torch.channels_last)
