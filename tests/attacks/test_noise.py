from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.attacks import PGD, ThreatModel, UniformNoise, guard, margin
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

Norm = Literal["linf", "l2"]
NORMS: list[Norm] = ["linf", "l2"]


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 4)).double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(10, 3, 2, 2, dtype=torch.float64, generator=seeded(3)), torch.arange(10) % 4


@pytest.mark.parametrize("norm", NORMS)
def test_of_all_draws_the_one_with_the_largest_margin_is_kept_sample_by_sample(
    net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm
) -> None:
    (x, y), threat, generator = batch, ThreatModel(norm, 0.3), seeded(0)
    draws = torch.stack([threat.random_start(x, (0.0, 1.0), generator) for _ in range(6)])
    worst = torch.stack([margin(net(draw), y) for draw in draws]).argmax(0)
    found = guard(UniformNoise(threat, draws=6))(net, x, y, generator=seeded(0))
    assert torch.equal(found, draws[worst, torch.arange(10)])
    assert len(set(worst.tolist())) > 1


def test_a_single_draw_is_uniform_noise_and_asks_the_model_nothing() -> None:
    stats = pytest.importorskip("scipy.stats")
    x = torch.full((200, 5), 0.5, dtype=torch.float64)

    def never(_: Tensor) -> Tensor:
        raise AssertionError("a forward pass for nothing")

    found = UniformNoise(ThreatModel("linf", 0.2), draws=1)(never, x, torch.zeros(200).long(), generator=seeded(1))
    assert stats.kstest(((found - x + 0.2) / 0.4).flatten().numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("draws", [2, 7])
def test_it_costs_a_forward_pass_a_draw_and_no_gradient(batch: tuple[Tensor, Tensor], draws: int) -> None:
    calls: list[bool] = []

    def logits_fn(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return x.flatten(1)[:, :4]

    UniformNoise(ThreatModel("linf", 0.2), draws=draws)(logits_fn, *batch, generator=seeded(1))
    assert calls == [False] * draws


@pytest.mark.parametrize("norm", NORMS)
def test_more_draws_are_never_weaker_and_pgd_is_stronger_on_average(
    net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm
) -> None:
    (x, y), threat = batch, ThreatModel(norm, 0.3)
    few, many = (margin(net(UniformNoise(threat, draws=n)(net, x, y, generator=seeded(0))), y) for n in (2, 20))
    assert bool((many >= few).all())
    climbed = margin(net(PGD(threat, steps=20, objective="margin")(net, x, y, generator=seeded(0))), y)
    assert bool(climbed.mean() > many.mean())


@pytest.mark.parametrize("norm", NORMS)
def test_pixels_of_normalised_inputs_are_the_same(net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm) -> None:
    (x, y), space = batch, PixelSpace(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    one = UniformNoise(ThreatModel(norm, 0.3))(lambda p: net(space.to_model(p)), x, y, generator=seeded(1))
    other = UniformNoise(ThreatModel(norm, 0.3, space))(net, space.to_model(x), y, generator=seeded(1))
    torch.testing.assert_close(space.to_pixels(other), one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_a_function_of_the_seed_in_every_loop(net: nn.Module, mode: Any) -> None:
    attack = UniformNoise(ThreatModel("linf", 0.2), draws=3)
    x, y = torch.rand(4, 12, dtype=torch.float64), torch.arange(4)
    first = attack(net, x, y, generator=seeded(1))
    assert not torch.equal(attack(net, x, y, generator=seeded(2)), first)
    with mode():
        assert torch.equal(attack(net, x.clone(), y.clone(), generator=seeded(1)), first)


def test_a_generator_a_sample_makes_it_independent_of_the_batch(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    (x, y), attack = batch, UniformNoise(ThreatModel("l2", 0.3), draws=4)
    whole = attack(net, x, y, generator=[seeded(i) for i in range(10)])
    part = attack(net, x[6:], y[6:], generator=[seeded(i) for i in range(6, 10)])
    torch.testing.assert_close(whole[6:], part, rtol=0, atol=1e-12)


def test_settings_and_names() -> None:
    threat = ThreatModel("linf", 0.2)
    assert UniformNoise(threat).name == "noise10_linf_0.2"
    with pytest.raises(ValueError, match=r"UniformNoise\(draws=\) must be at least 1, got 0"):
        UniformNoise(threat, draws=0)
