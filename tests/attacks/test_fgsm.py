from __future__ import annotations

import warnings
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import FGSM, PGD, ThreatModel, guard
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

Norm = Literal["linf", "l2"]


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.Flatten(), nn.LazyLinear(5)).eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(8, 3, 8, 8, generator=seeded(3)), torch.arange(8) % 5


def peer(name: str) -> Any:
    """An outside implementation; what it warns about while it is imported is not about us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def test_every_pixel_is_that_of_torchattacks(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    net(batch[0])
    expected = peer("torchattacks").FGSM(net, eps=0.06)(*batch)
    found = FGSM(ThreatModel("linf", 0.06))(net, *batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def by_hand(net: Any, x: Tensor, y: Tensor, eps: float, alpha: float) -> Tensor:
    """FGSM-RS of Wong et al., algorithm 3, for images in [0, 1]."""
    start = (x + eps * (2 * torch.rand(x.shape, generator=seeded(5), dtype=x.dtype) - 1)).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(start), y, reduction="sum"), start)
    delta = (start - x + alpha * gradient.sign()).clamp(-eps, eps)
    return (x + delta).clamp(0, 1).detach()


@pytest.mark.parametrize("step", [None, 1.0, 2.0])
def test_from_a_random_start_it_is_the_algorithm_of_wong(
    net: nn.Module, batch: tuple[Tensor, Tensor], step: float | None
) -> None:
    net(batch[0])
    net, (x, y) = net.double(), (batch[0].double(), batch[1])
    expected = by_hand(net, x, y, 0.06, 0.06 * (step or 1.25))
    found = guard(FGSM(ThreatModel("linf", 0.06), start="uniform", step=step))(net, x, y, generator=seeded(5))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_it_is_the_same_algorithm_in_pixels_of_normalised_inputs(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    net(batch[0])
    space = PixelSpace(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    net, (x, y) = net.double(), (batch[0].double(), batch[1])
    attack = FGSM(ThreatModel("linf", 0.06, space), start="uniform")
    found = attack(net, space.to_model(x), y, generator=seeded(5))
    expected = by_hand(lambda pixels: net(space.to_model(pixels)), x, y, 0.06, 0.075)
    torch.testing.assert_close(space.to_pixels(found), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_from_the_input_itself_it_is_one_step_of_pgd(net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm) -> None:
    threat = ThreatModel(norm, 0.3)
    expected = PGD(threat, steps=1, step_size=0.3, start="zero")(net, *batch)
    assert torch.equal(FGSM(threat)(net, *batch), expected)


def test_in_l2_it_goes_as_far_as_the_ball_in_the_direction_of_the_gradient() -> None:
    weight = torch.tensor([[3.0, 0.0], [-4.0, 0.0]])
    found = FGSM(ThreatModel("l2", 0.1))(lambda z: z @ weight, torch.full((1, 2), 0.5), torch.tensor([0]))
    torch.testing.assert_close(found, torch.tensor([[0.5 - 0.06, 0.5 + 0.08]]))


def test_a_shorter_step_stays_inside_and_a_longer_one_is_projected_back() -> None:
    x, y = torch.full((1, 2), 0.5), torch.tensor([0])
    for step, reached in ((0.5, 0.05), (3.0, 0.1)):
        found = FGSM(ThreatModel("linf", 0.1), step=step)(lambda z: z, x, y)
        torch.testing.assert_close(found, torch.tensor([[0.5 - reached, 0.5 + reached]]))


def test_the_objective_may_be_named() -> None:
    x, y, net = torch.rand(6, 4), torch.arange(6) % 3, nn.Linear(4, 3)
    start = torch.zeros(6, 4)
    for name in ("dlr", "margin"):
        found = FGSM(ThreatModel("linf", 0.1, PixelSpace(bounds=None)), objective=name)(net, x, y)
        top = net(x).scatter(1, y.unsqueeze(1), -torch.inf).argmax(1)
        if name == "margin":
            start = 0.1 * (net.weight[top] - net.weight[y]).sign()
            torch.testing.assert_close(found, x + start)
        assert bool(found.isfinite().all())
    with pytest.raises(ValueError, match="objective= must be one of"):
        FGSM(ThreatModel("linf", 0.1), objective="ce")


@pytest.mark.parametrize("start", ["zero", "uniform"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_costs_one_forward_pass(net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm, start: Any) -> None:
    calls: list[int] = []

    def logits_fn(x: Tensor) -> Tensor:
        calls.append(len(x))
        return net(x)  # type: ignore[no-any-return]  # modules have no types

    FGSM(ThreatModel(norm, 0.1), start=start)(logits_fn, *batch)
    assert calls == [8]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_without_gradients_and_leaves_those_of_parameters_alone(mode: Any) -> None:
    net = nn.Linear(4, 3)
    with mode():
        found = FGSM(ThreatModel("linf", 0.1))(net, torch.rand(2, 4), torch.tensor([0, 1]))
    assert not found.requires_grad
    assert net.weight.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": "gaussian"}, r"FGSM\(start=\) must be 'zero' or 'uniform', got 'gaussian'"),
        ({"step": 0.0}, r"FGSM\(step=\) is in multiples of eps and must be positive, got 0.0"),
        ({"step": -1.0}, r"must be positive, got -1.0"),
        ({"step": float("nan")}, r"must be positive, got nan"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FGSM(ThreatModel("linf", 0.1), **arguments)


def test_its_name_holds_the_start_and_the_threat() -> None:
    assert FGSM(ThreatModel("linf", 0.2)).name == "fgsm_linf_0.2"
    assert FGSM(ThreatModel("l2", 0.2), start="uniform").name == "fgsm-rs_l2_0.2"
