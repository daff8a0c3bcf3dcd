from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.attacks import FGSM, NFGSM, PGD, ThreatModel, UniformNoise, guard
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

ANYWHERE = (-math.inf, math.inf)
Norm = Literal["linf", "l2"]
NORMS: list[Norm] = ["linf", "l2"]
RADII = torch.tensor([0.0, 0.02, 0.1, 0.3, 0.5])

# What attacks are made of here; they take a local threat where a callback gives them one.
ATTACKS: dict[str, Any] = {
    "fgsm": FGSM,
    "fgsm-rs": lambda threat: FGSM(threat, start="uniform"),
    "n-fgsm": NFGSM,
    "pgd": lambda threat: PGD(threat, steps=4),
    "pgd, gaussian": lambda threat: PGD(threat, steps=3, start="gaussian"),
    "pgd, best": lambda threat: PGD(threat, steps=4, keep="best", restarts=2),
    "pgd, early exit": lambda threat: PGD(threat, steps=4, early_exit=True, restarts=2),
    "noise": lambda threat: UniformNoise(threat, draws=3),
}


def every(name: str) -> list[Norm]:
    return ["linf"] if name == "n-fgsm" else NORMS


CASES = [(name, norm) for name in ATTACKS for norm in every(name)]


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 16), nn.GELU(), nn.Linear(16, 3)).double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(5, 3, 4, 4, dtype=torch.float64, generator=seeded(3)), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_nothing_moves_outside_the_mask_and_something_does_inside(
    net: nn.Module, batch: tuple[Tensor, Tensor], name: str, norm: Norm
) -> None:
    x, y = batch
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1:3, :] = 0.5  # anything but zero is free
    found = guard(ATTACKS[name](ThreatModel(norm, 0.2).within(mask=mask)))(net, x, y, generator=seeded(0))
    moved = (found - x) != 0
    assert not bool((moved & (mask == 0)).any())
    assert bool(moved.flatten(1).any(1).all())


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_each_sample_may_have_its_own_mask(net: nn.Module, batch: tuple[Tensor, Tensor], name: str, norm: Norm) -> None:
    x, y = batch
    masks = (torch.rand(5, 3, 4, 4, generator=seeded(7)) < 0.5).float()
    masks[0] = 0.0
    found = guard(ATTACKS[name](ThreatModel(norm, 0.2).within(mask=masks)))(net, x, y, generator=seeded(0))
    assert torch.equal(found[0], x[0])
    assert not bool(((found != x) & (masks == 0)).any())


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_a_radius_a_sample_is_that_sample_under_its_own_threat_model(
    net: nn.Module, batch: tuple[Tensor, Tensor], name: str, norm: Norm
) -> None:
    x, y = batch
    local = ThreatModel(norm, 0.5).within(eps=RADII)
    noise = [seeded(1, i) for i in range(5)]
    found = guard(ATTACKS[name](local))(net, x, y, generator=noise)
    for i, radius in enumerate(RADII.tolist()):
        alone = ATTACKS[name](ThreatModel(norm, radius))(net, x[i : i + 1], y[i : i + 1], generator=[seeded(1, i)])
        torch.testing.assert_close(found[i : i + 1], alone, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_equal_radii_and_a_mask_of_ones_change_nothing(
    net: nn.Module, batch: tuple[Tensor, Tensor], name: str, norm: Norm
) -> None:
    threat = ThreatModel(norm, 0.2)
    local = threat.within(mask=torch.ones(1, 1, 1, 1), eps=torch.full((5,), 0.2))
    one, other = (ATTACKS[name](t)(net, *batch, generator=seeded(0)) for t in (threat, local))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_l2_starts_are_uniform_in_the_ball_of_the_free_dimensions() -> None:
    """With d free dimensions: r^d is uniform and E x x^T is the identity / (d + 2), and nothing is outside."""
    stats = pytest.importorskip("scipy.stats")
    n, free, radius = 4000, [0, 3, 4], 0.7
    mask = torch.zeros(1, 6)
    mask[:, free] = 1
    local = ThreatModel("l2", 2.0).within(mask=mask, eps=torch.full((n,), radius))
    clean = torch.zeros(n, 6, dtype=torch.float64)
    delta = local.random_start(clean, ANYWHERE, seeded(1)) / radius
    assert float(delta[:, [1, 2, 5]].abs().max()) == 0
    inside, d = delta[:, free], len(free)
    assert float(inside.norm(dim=1).max()) <= 1 + 1e-7  # radii are given in float32
    assert stats.kstest(inside.norm(dim=1).numpy() ** d, "uniform").pvalue > 0.01
    covariance = inside.T @ inside / n
    torch.testing.assert_close(covariance, torch.eye(d, dtype=torch.float64) / (d + 2), rtol=0, atol=5 / n**0.5)
    assert float(inside.mean(0).abs().max()) < 5 / (n * (d + 2)) ** 0.5


def test_each_sample_starts_in_the_ball_of_its_own_dimensions() -> None:
    """Of the unit ball in d dimensions, the part within radius 1/2 is 2^-d."""
    n, mask = 4000, torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    local = ThreatModel("l2", 1.0).within(mask=mask.repeat(n, 1))
    start = local.random_start(torch.zeros(2 * n, 4, dtype=torch.float64), ANYWHERE, seeded(2))
    near = (start.norm(dim=1) < 0.5).double().view(n, 2).mean(0)
    for share, d in zip(near.tolist(), (1, 4), strict=True):
        assert share == pytest.approx(2.0**-d, abs=5 * math.sqrt(2.0**-d / n))


def test_linf_starts_are_uniform_inside_the_mask() -> None:
    stats = pytest.importorskip("scipy.stats")
    local = ThreatModel("linf", 1.0).within(mask=torch.tensor([[1.0, 0.0]]), eps=torch.full((3000,), 0.2))
    delta = local.random_start(torch.zeros(3000, 2, dtype=torch.float64), ANYWHERE, seeded(2))
    assert float(delta[:, 1].abs().max()) == 0
    assert stats.kstest(((delta[:, 0] + 0.2) / 0.4).numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_point_of_the_ball_is_taken_among_the_free_pixels(norm: Norm) -> None:
    local = ThreatModel(norm, 1.0).within(mask=torch.tensor([[1, 1, 0]]), eps=torch.tensor([0.5, 0.0]))
    clean, moved = torch.ones(2, 3), torch.tensor([[4.0, -3.0, 9.0], [4.0, -3.0, 9.0]])
    nearest = [1.3, 0.6, 1.0] if norm == "l2" else [1.5, 0.5, 1.0]
    torch.testing.assert_close(local.project(moved, clean, ANYWHERE), torch.tensor([nearest, [1.0, 1.0, 1.0]]))


@pytest.mark.parametrize("norm", NORMS)
def test_the_steepest_step_ignores_slopes_outside_and_is_in_proportion_to_the_radius(norm: Norm) -> None:
    local = ThreatModel(norm, 0.5).within(mask=torch.tensor([[1, 1, 0]]), eps=torch.tensor([0.5, 0.25]))
    step = local.steepest(torch.tensor([[3.0, -4.0, 100.0], [3.0, -4.0, 100.0]]))
    unit = torch.tensor([1.0, -1.0, 0.0] if norm == "linf" else [0.6, -0.8, 0.0])
    torch.testing.assert_close(step, torch.stack([unit, unit / 2]))


@pytest.mark.parametrize("norm", NORMS)
def test_distances_are_in_proportion_to_each_radius_and_infinite_outside_a_region(norm: Norm) -> None:
    local = ThreatModel(norm, 0.5).within(mask=torch.tensor([[1, 0]]), eps=torch.tensor([0.5, 0.25, 0.0, 0.0, 0.5]))
    moved = torch.tensor([[0.1, 0.0], [0.1, 0.0], [0.0, 0.0], [0.1, 0.0], [0.0, 0.1]])
    *near, unmovable, outside = local.distance(moved, torch.zeros(5, 2)).tolist()
    assert near == pytest.approx([0.1, 0.2, 0.0])
    assert unmovable > 1e30
    assert outside == math.inf


def test_some_samples_keep_their_own_radius_and_mask() -> None:
    masks, radii, rows = torch.eye(3), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2, 0])
    part = ThreatModel("linf", 0.3).within(mask=masks, eps=radii).at(rows)
    assert part.mask is not None
    assert part.radii is not None
    assert torch.equal(part.mask, masks[rows])
    assert torch.equal(part.radii, radii[rows])
    shared = ThreatModel("linf", 0.3).within(mask=masks[:1]).at(rows)
    assert shared.mask is not None
    assert torch.equal(shared.mask, masks[:1])
    assert shared.radii is None


def test_it_scales_widens_and_is_named_as_its_threat_model() -> None:
    threat = ThreatModel("l2", 0.5, PixelSpace(mean=0.5))
    local = threat.within(mask=torch.ones(1, 2), eps=torch.tensor([0.5, 0.25]))
    half = local.scaled(0.5)
    assert half.radii is not None
    assert (half.eps, half.radii.tolist()) == (0.25, [0.25, 0.125])
    assert local.widened().pixels.outside == "widen"
    assert (local.norm, local.eps, local.pixels) == ("l2", 0.5, threat.pixels)
    assert str(local) == "l2_0.5_masked"
    assert str(threat.within(eps=torch.tensor([0.1]))) == "l2_0.5"


@pytest.mark.parametrize("radius", [-0.1, math.nan, math.inf])
def test_impossible_radii_are_refused(radius: float) -> None:
    with pytest.raises(ValueError, match=r"within\(eps=\) takes radii >= 0 in pixel units, got \["):
        ThreatModel("linf", 0.1).within(eps=torch.tensor([0.1, radius]))


def test_the_guard_sees_a_move_outside_the_mask_or_beyond_a_sample_s_radius() -> None:
    x, y = torch.full((2, 2), 0.5), torch.tensor([0, 1])
    local: Any = ThreatModel("linf", 0.2).within(mask=torch.tensor([[1, 0]]), eps=torch.tensor([0.2, 0.1]))
    for move, fine in (([[0.2, 0.0], [0.1, 0.0]], True), ([[0.2, 0.0], [0.2, 0.0]], False), ([[0.1, 0.01]], False)):
        fenced = guard(lambda logits_fn, x, y, move=move: x + torch.tensor(move), local)
        if fine:
            fenced(lambda z: z, x, y)
        else:
            with pytest.raises(RuntimeError, match="moved an input by"):
                fenced(lambda z: z, x, y)


@pytest.mark.parametrize("norm", NORMS)
def test_round_off_is_no_breach_where_a_radius_is_far_smaller_than_others(norm: Norm) -> None:
    """The last bit of a pixel near 1 is worth 6e-8, whatever the radius of the sample."""
    x, y, weight = torch.rand(64, 48, generator=seeded(0)), torch.zeros(64).long(), torch.randn(48, 3)
    local: Any = ThreatModel(norm, 0.1).within(eps=torch.full((64,), 1e-5))
    guard(PGD(local, steps=2))(lambda z: z @ weight, x, y, generator=seeded(0))


@pytest.mark.parametrize("part", ["mask", "eps"])
def test_what_must_not_move_survives_the_way_to_pixels_and_back(part: str) -> None:
    """Undoing and redoing a normalisation costs the last bit; that is no move."""
    space = PixelSpace(bounds=(0, 255), mean=31.251787841320038, std=227.44907677173615)
    x = space.to_model(torch.arange(0, 255, 0.125).view(1, 1, -1))
    weight, threat = torch.randn(x.numel(), 3), ThreatModel("linf", 8.0, space)
    mask = torch.zeros_like(x)
    mask[..., 0] = 1
    local: Any = threat.within(mask=mask) if part == "mask" else threat.within(eps=torch.zeros(1))
    found = guard(PGD(local, steps=2))(lambda z: z.flatten(1) @ weight, x, torch.tensor([0]), generator=seeded(0))
    torch.testing.assert_close(found[..., 1:], x[..., 1:])


def test_a_value_just_above_the_bound_stays_where_the_mask_says_so() -> None:
    """The pixel space forgives 1e-4 of the range (a mean with fewer digits); masked pixels are not clamped either."""
    x, y = torch.tensor([[0.5, 1.00005]]), torch.tensor([0])
    local: Any = ThreatModel("linf", 0.1).within(mask=torch.tensor([[1, 0]]))
    found = guard(PGD(local, steps=2))(lambda z: z, x, y, generator=seeded(0))
    assert float(found[0, 1]) == float(x[0, 1])


def test_where_only_masked_pixels_have_a_slope_it_walks_at_random_inside_the_mask() -> None:
    x, y, weight = torch.full((3, 4), 0.5), torch.tensor([0, 1, 0]), torch.zeros(4, 2)
    weight[3] = torch.tensor([1.0, -1.0])
    local: Any = ThreatModel("linf", 0.1).within(mask=torch.tensor([[1, 1, 1, 0]]))
    found = PGD(local, steps=3, start="zero")(lambda z: z @ weight, x, y, generator=seeded(0))
    assert bool(((found - x)[:, :3] != 0).flatten(1).any(1).all())


def test_a_mask_without_a_batch_dimension_is_refused() -> None:
    """Rows of the batch are not rows of such a mask: early exit would free the wrong features."""
    x, y, weight = torch.rand(6, 3, generator=seeded(0)), torch.arange(6) % 2, torch.randn(3, 2)
    local: Any = ThreatModel("linf", 0.1).within(mask=torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match=r"mask.*\(6, 3\).*got \(3,\)"):
        PGD(local, early_exit=True)(lambda z: z @ weight, x, y, generator=seeded(0))
