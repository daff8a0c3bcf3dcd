"""Square: random search inside the ball, as strong as its authors' own implementation, and blind to gradients."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from robust_digits import small_and_robust
from torch import Tensor

from lightning_robust.attacks import Square, ThreatModel, guard
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

Norm = Literal["linf", "l2"]
NORMS: list[Norm] = ["linf", "l2"]
EPS = {"linf": 0.15, "l2": 0.6}


def right(net: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(1) == y  # type: ignore[no-any-return]  # modules have no types


def darker(x: Tensor) -> Tensor:
    """Class 0 while a picture is brighter than 0.4 on average."""
    return torch.stack([x.flatten(1).mean(1) - 0.4, 0.4 - x.flatten(1).mean(1)], 1)


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 5, 4), (12,), (4, 3)], ids=str)
def test_it_finds_the_worst_point_of_a_linear_model(shape: tuple[int, ...]) -> None:
    x, y = torch.full((4, *shape), 0.5), torch.zeros(4, dtype=torch.long)
    attack = Square(ThreatModel("linf", 0.05), queries=600, early_exit=False)
    found = guard(attack)(darker, x, y, generator=[seeded(i) for i in range(4)])
    assert float((found - (x - 0.05)).abs().mean()) < 0.01


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (12,)], ids=str)
def test_in_l2_it_walks_the_right_way_inside_the_ball(shape: tuple[int, ...]) -> None:
    x, y = torch.full((3, *shape), 0.5), torch.zeros(3, dtype=torch.long)
    space = PixelSpace(bounds=None)
    found = guard(Square(ThreatModel("l2", 0.2, space), queries=800, early_exit=False))(
        darker, x, y, generator=seeded(0)
    )
    delta = (found - x).flatten(1)
    assert float(delta.norm(dim=1).max()) <= 0.2 + 1e-5
    best = -0.2 * x[0].numel() ** 0.5  # straight down
    assert bool((delta.sum(1) < 0.4 * best).all())


def test_it_needs_no_gradient_and_asks_as_often_as_it_says() -> None:
    asked: list[int] = []

    def blind(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        asked.append(len(x))
        return darker(x)

    x, y = torch.full((2, 1, 4, 4), 0.9), torch.zeros(2, dtype=torch.long)
    Square(ThreatModel("linf", 0.01), queries=30)(blind, x, y, generator=seeded(0))
    assert asked == [2] * 31  # once the clean inputs, and 30 queries


def test_fooled_samples_are_left_alone_and_batches_do_not_matter() -> None:
    x = torch.stack([torch.full((1, 5, 5), shade) for shade in (0.41, 0.43, 0.9, 0.3)])
    y, attack = torch.zeros(4, dtype=torch.long), Square(ThreatModel("linf", 0.06), queries=100)
    found = attack(darker, x, y, generator=[seeded(i) for i in range(4)])
    assert right(darker, found, y).tolist() == [False, False, True, False]
    assert torch.equal(found[3], x[3])  # wrong as it is
    alone = [attack(darker, x[i : i + 1], y[i : i + 1], generator=[seeded(i)]) for i in range(4)]
    torch.testing.assert_close(found, torch.cat(alone))


def test_nothing_moves_outside_of_a_mask() -> None:
    x, y = torch.full((3, 1, 6, 6), 0.6), torch.zeros(3, dtype=torch.long)
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., :3] = 1
    for norm in NORMS:
        threat = ThreatModel(norm, EPS[norm]).within(mask=mask)
        found = guard(Square(threat, queries=40, early_exit=False))(darker, x, y, generator=seeded(0))  # type: ignore[arg-type]  # as callbacks make it
        assert torch.equal(found[..., 3:], x[..., 3:])
        assert not torch.equal(found[..., :3], x[..., :3])


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_not_weaker_than_the_authors_own(norm: Norm) -> None:
    """Theirs never places a square in the last row or column, which counts on 8x8 pictures: ours may be stronger."""
    theirs = pytest.importorskip("pyautoattack.square")
    net, x, y = small_and_robust(norm)
    x, y = x[:200], y[:200]
    found = Square(ThreatModel(norm, EPS[norm]), queries=200)(net, x, y, generator=seeded(0))
    other = theirs.SquareAttack(
        net, n_queries=200, norm={"linf": "Linf", "l2": "L2"}[norm], eps=EPS[norm], n_restarts=1, seed=0, device="cpu",
        verbose=False, resc_schedule=True,
    )  # fmt: skip
    ours, reference = (float(right(net, z, y).float().mean()) for z in (found, other.perturb(x, y)))
    clean = float(right(net, x, y).float().mean())
    assert ours < clean - 0.03
    assert ours <= reference + 0.005


@pytest.mark.parametrize("settings", [{"queries": 0}, {"p_init": 0.0}, {"p_init": 1.1}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Square needs queries >= 1 and p_init in \(0, 1\]"):
        Square(ThreatModel("linf", 0.1), **settings)
