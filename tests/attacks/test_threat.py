from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from lightning_robust.attacks.threat import ThreatModel
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

ANYWHERE = (-math.inf, math.inf)
Norm = Literal["linf", "l2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("l1", 0.1), "'linf' or 'l2', got 'l1'"),
        (("linf", -0.1), "eps=.*>= 0 in pixel units.*got -0.1"),
        (("linf", math.nan), "eps=.*got nan"),
        (("linf", math.inf), "eps=.*got inf"),
        (("linf", "8/255"), "eps=.*got '8/255'"),
    ],
)
def test_impossible_threats_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThreatModel(*arguments)


def test_a_threat_is_a_value_with_a_short_name() -> None:
    threat = ThreatModel("linf", 8 / 255)
    assert threat == ThreatModel("linf", 8 / 255, PixelSpace())
    assert len({threat, ThreatModel("linf", 8 / 255), ThreatModel("l2", 8 / 255)}) == 2
    assert str(threat) == "linf_0.03137"
    half = ThreatModel("l2", 0.5, PixelSpace(mean=0.5)).scaled(0.5)
    assert half == ThreatModel("l2", 0.25, PixelSpace(mean=0.5))


def test_a_point_3_4_away_is_5_away_in_l2_and_4_in_linf() -> None:
    clean, moved = torch.zeros(2, 1, 2), torch.tensor([[[3.0, -4.0]], [[0.0, 1.0]]])
    assert ThreatModel("l2", 1).distance(moved, clean).tolist() == [5, 1]
    assert ThreatModel("linf", 1).distance(moved, clean).tolist() == [4, 1]


def test_the_nearest_point_of_the_ball_is_on_the_ray_or_on_the_cube() -> None:
    clean, moved = torch.ones(2, 2), torch.tensor([[4.0, -3.0], [1.1, 1.0]])
    l2 = ThreatModel("l2", 0.5).project(moved, clean, ANYWHERE)
    torch.testing.assert_close(l2, torch.tensor([[1 + 0.3, 1 - 0.4], [1.1, 1.0]]))
    linf = ThreatModel("linf", 0.5).project(moved, clean, ANYWHERE)
    torch.testing.assert_close(linf, torch.tensor([[1.5, 0.5], [1.1, 1.0]]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projecting_twice_is_projecting_once_and_clean_inputs_stay(norm: Norm) -> None:
    threat, clean = ThreatModel(norm, 0.3), torch.rand(8, 3, 4, 4, dtype=torch.float64)
    once = threat.project(clean + torch.randn_like(clean), clean, (0.0, 1.0))
    torch.testing.assert_close(threat.project(once, clean, (0.0, 1.0)), once, rtol=0, atol=1e-15)
    assert torch.equal(threat.project(clean, clean, (0.0, 1.0)), clean)
    assert float(threat.distance(once, clean).max()) <= 0.3 + 1e-12
    assert float(once.min()) >= 0
    assert float(once.max()) <= 1


def test_the_steepest_step_is_the_unit_step_with_the_largest_inner_product() -> None:
    """Dual norms: max of <g, d> over the unit ball is the l1 norm of g for linf and its l2 norm for l2."""
    gradient = torch.randn(6, 2, 5)
    for norm, order in (("linf", 1), ("l2", 2)):
        threat = ThreatModel(norm, 1)  # type: ignore[arg-type]
        step = threat.steepest(gradient)
        torch.testing.assert_close(threat.distance(step, torch.zeros_like(step)), torch.ones(6))
        torch.testing.assert_close((step * gradient).flatten(1).sum(1), gradient.flatten(1).norm(order, dim=1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("size", [1e-6, 1e-15, 1e-25])
def test_the_steepest_step_has_length_one_however_flat_the_objective(norm: Norm, size: float) -> None:
    """Confident models have gradients of 1e-15; an attack that stands still there measures confidence alone."""
    threat, gradient = ThreatModel(norm, 1), torch.tensor([[3.0, -4.0]])
    torch.testing.assert_close(threat.steepest(size * gradient), threat.steepest(gradient))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_gradient_is_no_step(norm: Norm) -> None:
    assert torch.equal(ThreatModel(norm, 1).steepest(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2, 3)])
def test_l2_starts_are_uniform_in_the_ball(shape: tuple[int, ...], per_sample: bool) -> None:
    """The ball of radius r holds the share r^d of the volume, and every direction is as likely as its opposite."""
    stats = pytest.importorskip("scipy.stats")
    n, d, eps = 3000, math.prod(shape), 0.7
    clean = torch.zeros(n, *shape, dtype=torch.float64)
    noise = [seeded(1, i) for i in range(n)] if per_sample else seeded(1)
    delta = ThreatModel("l2", eps).random_start(clean, ANYWHERE, noise).flatten(1)
    radius = delta.norm(dim=1) / eps
    assert float(radius.max()) <= 1 + 1e-12
    assert stats.kstest(radius.numpy() ** d, "uniform").pvalue > 0.01
    # E x x^T of a uniform unit ball is the identity / (d + 2); 5 standard errors, each entry at most 1 large.
    covariance = (delta / eps).T @ (delta / eps) / n
    torch.testing.assert_close(covariance, torch.eye(d, dtype=torch.float64) / (d + 2), rtol=0, atol=5 / n**0.5)
    assert float((delta / eps).mean(0).abs().max()) < 5 / (n * (d + 2)) ** 0.5


def test_linf_starts_are_uniform_in_the_cube() -> None:
    stats = pytest.importorskip("scipy.stats")
    clean = torch.full((500, 3, 4), 0.5, dtype=torch.float64)
    delta = ThreatModel("linf", 0.2).random_start(clean, ANYWHERE, seeded(2)) - clean
    assert float(delta.abs().max()) <= 0.2
    assert stats.kstest(((delta + 0.2) / 0.4).flatten().numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_are_moved_into_the_box(norm: Norm) -> None:
    start = ThreatModel(norm, 5.0).random_start(torch.rand(50, 3), (0.0, 1.0), seeded(0))
    assert float(start.min()) == 0
    assert float(start.max()) == 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_ball_of_radius_zero_is_a_point(norm: Norm) -> None:
    threat, clean = ThreatModel(norm, 0), torch.rand(3, 4)
    assert torch.equal(threat.random_start(clean, (0.0, 1.0), seeded(0)), clean)
    assert torch.equal(threat.project(clean + 1, clean, (0.0, 2.0)), clean)
