"""The diagnosis of gradient masking: silent on plain networks, loud on networks that only look robust."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD, ThreatModel
from lightning_robust.attacks.masking import CHECKS, MaskingReport, diagnose
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.5)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 8x8 digits in [0, 1], in a seeded order."""
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    return images[order], torch.tensor(found.target)[order]


def cnn(activation: type[nn.Module], norm: bool) -> nn.Module:
    first, second = ([nn.BatchNorm2d(n)] if norm else [] for n in (16, 32))
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), *first, activation()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), *second, activation(), nn.Flatten(), nn.Linear(512, 10)),
    )


PLAIN: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 20, 0.0),
    "MLP": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), 15, 0.0),
    "CNN, BatchNorm": (lambda: cnn(nn.ReLU, norm=True), 5, 0.0),
    "CNN, GELU": (lambda: cnn(nn.GELU, norm=False), 8, 0.0),
    "CNN, adversarially trained": (lambda: cnn(nn.ReLU, norm=True), 6, 0.15),
}


def trained(build: Callable[[], nn.Module], epochs: int, eps: float, data: tuple[Tensor, Tensor]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build()
    order, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam(net.parameters(), 3e-3)
    attack = PGD(ThreatModel("linf", eps), steps=7) if eps else None
    for _ in range(epochs):
        for rows in torch.randperm(1400, generator=order).split(100):
            x, y = data[0][rows], data[1][rows]
            if attack is not None:
                net.eval()
                x = attack(net, x, y, generator=order)
                net.train()
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def nets(digits: tuple[Tensor, Tensor]) -> dict[str, nn.Module]:
    return {name: trained(build, epochs, eps, digits) for name, (build, epochs, eps) in PLAIN.items()}


def report(logits_fn: Any, digits: tuple[Tensor, Tensor], threat: ThreatModel = LINF, **settings: Any) -> MaskingReport:
    x, y = digits[0][1400:1650], digits[1][1400:1650]
    return diagnose(logits_fn, settings.pop("inputs", x), y, threat, generator=seeded(0), **settings)


def suspicions(found: MaskingReport) -> set[str]:
    return {finding.check for finding in found.findings if finding.suspicious}


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_networks_raise_no_alarm(
    name: str, threat: ThreatModel, nets: dict[str, nn.Module], digits: tuple[Tensor, Tensor]
) -> None:
    found = report(nets[name], digits, threat)
    assert suspicions(found) == set(), str(found)
    assert found.n > 220  # what the model gets right


MASKED: dict[str, tuple[Callable[[nn.Module], Callable[[Tensor], Tensor]], set[str]]] = {
    "logits times 100": (lambda net: lambda x: 100 * net(x), {"zero_gradients", "losses_disagree"}),
    "fed 0..255 instead of 0..1": (lambda net: lambda x: net(255 * x), {"zero_gradients", "losses_disagree"}),
    "rounded pixels": (lambda net: lambda x: net((8 * x).round() / 8), {"zero_gradients", "black_box_beats_white_box"}),
}


@pytest.mark.parametrize("net", ["MLP", "CNN, BatchNorm"])
@pytest.mark.parametrize("name", MASKED)
def test_masked_networks_do(name: str, net: str, nets: dict[str, nn.Module], digits: tuple[Tensor, Tensor]) -> None:
    mask, expected = MASKED[name]
    found = report(mask(nets[net]), digits)
    assert expected <= suspicions(found), str(found)


def test_a_radius_in_other_units_than_the_pixels_is_noticed(
    nets: dict[str, nn.Module], digits: tuple[Tensor, Tensor]
) -> None:
    net, bytes_ = nets["CNN, BatchNorm"], PixelSpace(bounds=(0, 255))
    wrong = report(lambda x: net(x / 255), digits, ThreatModel("linf", 0.1, bytes_), inputs=255 * digits[0][1400:1650])
    assert suspicions(wrong) == {"flat_in_eps"}
    right = report(lambda x: net(x / 255), digits, ThreatModel("linf", 25.5, bytes_), inputs=255 * digits[0][1400:1650])
    assert suspicions(right) == set()


def test_it_says_what_was_seen_and_what_to_do(nets: dict[str, nn.Module], digits: tuple[Tensor, Tensor]) -> None:
    net = nets["MLP"]
    found = report(lambda x: 100 * net(x), digits)
    by_name = {finding.check: finding for finding in found.findings}
    assert found.suspicious
    assert "exactly zero" in by_name["zero_gradients"].says
    assert "Report an attack on the margin or DLR" in by_name["losses_disagree"].says
    assert tuple(found.values()) == tuple(by_name) == CHECKS
    table = str(found).splitlines()
    assert len(table) == 2 + len(by_name) == 11
    assert "**suspicious**" in str(found)
    assert table[0].startswith(f"| check ({found.n} samples)")


def test_climbing_the_margin_is_not_fooled_by_large_logits(
    nets: dict[str, nn.Module], digits: tuple[Tensor, Tensor]
) -> None:
    net = nets["MLP"]
    found = report(lambda x: 100 * net(x), digits, objective="dlr")
    assert not {"zero_gradients", "losses_disagree"} & suspicions(found), str(found)


def test_of_too_few_samples_nothing_is_said() -> None:
    always_wrong = diagnose(
        lambda x: torch.stack([x.sum(1), x.sum(1) + 1], 1), torch.rand(30, 4), torch.zeros(30).long(), LINF
    )
    assert (always_wrong.findings, always_wrong.n, always_wrong.suspicious) == ((), 0, False)


def test_a_radius_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a radius above 0, got linf_0"):
        diagnose(lambda x: x, torch.rand(3, 2), torch.zeros(3).long(), ThreatModel("linf", 0.0))
