from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import NFGSM, ThreatModel, guard
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded


def by_hand(net: nn.Module, x: Tensor, y: Tensor, eps: float, noise: float, step: float) -> Tensor:
    """Algorithm 1 of de Jorge et al. for images in [0, 1]."""
    eta = torch.rand(x.shape, generator=seeded(3), dtype=x.dtype).mul(2).sub(1).mul(noise * eps)
    noisy = (x + eta).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(noisy), y, reduction="sum"), noisy)
    return (noisy + step * eps * gradient.sign()).clamp(0, 1).detach()


@pytest.mark.parametrize(("noise", "step"), [(2.0, 1.0), (0.0, 1.0), (1.0, 1.25)])
def test_it_is_the_formula_of_the_paper(noise: float, step: float) -> None:
    net, x, y = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), torch.rand(5, 6), torch.arange(5) % 3
    found = NFGSM(ThreatModel("linf", 0.1), noise=noise, step=step)(net, x, y, generator=seeded(3))
    torch.testing.assert_close(found, by_hand(net, x, y, 0.1, noise, step), rtol=0, atol=1e-7)


def test_it_is_the_same_formula_in_pixels_of_normalised_inputs() -> None:
    space = PixelSpace(mean=0.4, std=0.2)
    net, pixels, y = nn.Linear(6, 3).double(), torch.rand(5, 6, dtype=torch.float64), torch.arange(5) % 3
    found = NFGSM(ThreatModel("linf", 0.1, space))(net, space.to_model(pixels), y, generator=seeded(3))
    expected = by_hand(lambda p: net(space.to_model(p)), pixels, y, 0.1, 2.0, 1.0)  # type: ignore[arg-type]
    torch.testing.assert_close(space.to_pixels(found), expected, rtol=0, atol=1e-12)


def test_it_reaches_three_eps_and_the_guard_knows() -> None:
    threat = ThreatModel("linf", 0.1, PixelSpace(bounds=None))
    attack, x = NFGSM(threat), torch.zeros(1, 5000, dtype=torch.float64)
    assert attack.reach == pytest.approx(0.3)
    weight = torch.randn(5000, 2, dtype=torch.float64)
    found = guard(attack)(lambda v: v @ weight, x, torch.tensor([0]), generator=seeded(0))
    assert 0.299 < float(found.abs().max()) <= 0.3


def test_without_noise_it_is_fgsm() -> None:
    x, y, weight = torch.full((2, 2), 0.5), torch.tensor([0, 1]), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    found = NFGSM(ThreatModel("linf", 0.1), noise=0)(lambda v: v @ weight, x, y)
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.6], [0.6, 0.4]]))


def test_the_box_holds_and_inputs_outside_are_an_error() -> None:
    attack, weight = NFGSM(ThreatModel("linf", 0.4)), torch.randn(50, 3)
    found = attack(lambda v: v @ weight, torch.rand(20, 50), torch.arange(20) % 3, generator=seeded(0))
    assert float(found.min()) == 0
    assert float(found.max()) == 1
    with pytest.raises(ValueError, match=r"within \[0, 1\], got \[2, 2\]"):
        attack(lambda v: v @ weight, torch.full((1, 50), 2.0), torch.tensor([0]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_without_gradients_and_leaves_those_of_parameters_alone(mode: Any) -> None:
    net = nn.Linear(4, 3)
    with mode():
        found = NFGSM(ThreatModel("linf", 0.1))(net, torch.rand(2, 4), torch.tensor([0, 1]))
    assert not found.requires_grad
    assert net.weight.grad is None


@pytest.mark.parametrize(
    ("threat", "arguments", "message"),
    [
        (ThreatModel("l2", 0.5), {}, r"defined for norm 'linf', got 'l2'; use PGD\(threat, steps=2\)"),
        (ThreatModel("linf", 0.1), {"noise": -1.0}, "noise >= 0 and step > 0, got noise=-1.0"),
        (ThreatModel("linf", 0.1), {"step": 0.0}, "noise >= 0 and step > 0.*step=0.0"),
    ],
)
def test_impossible_settings_are_refused(threat: ThreatModel, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NFGSM(threat, **arguments)


def test_its_name_holds_the_threat() -> None:
    assert NFGSM(ThreatModel("linf", 0.2)).name == "nfgsm_linf_0.2"
