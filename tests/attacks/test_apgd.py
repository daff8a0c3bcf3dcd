"""APGD: the algorithm of the paper, as strong as its authors' own implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import APGD, PGD, ThreatModel, cross_entropy, dlr, guard, margin
from lightning_robust.attacks.apgd import _checkpoints
from lightning_robust.attacks.objectives import targeted_dlr
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

Norm = Literal["linf", "l2"]
NORMS: list[Norm] = ["linf", "l2"]
RADII = {"linf": 0.12, "l2": 0.6}


@pytest.fixture
def net() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.Conv2d(6, 4, 3, stride=2), nn.Flatten(), nn.LazyLinear(5))
    net(torch.randn(2, 3, 8, 8))
    return net.eval()


@pytest.fixture
def batch(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Eight inputs with the class that the net gives them, and one with another."""
    x = torch.rand(9, 3, 8, 8, generator=seeded(3))
    y = net(x).argmax(1)
    return x, torch.cat([y[:8], (y[8:] + 1) % 5])


def right(net: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(1) == y  # type: ignore[no-any-return]  # modules have no types


# -- the algorithm --------------------------------------------------------------------------------------------------


def test_the_worst_case_of_a_linear_model_is_a_corner() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, -1.0, 2.0]])
    x, y = torch.full((20, 4), 0.5), torch.arange(20) % 2
    uphill = (weight[1 - y] - weight[y]).sign()
    found = APGD(ThreatModel("linf", 0.1), steps=20, early_exit=False)(lambda z: z @ weight.T, x, y)
    torch.testing.assert_close(found, x + 0.1 * uphill, rtol=0, atol=1e-6)


def test_the_worst_case_of_a_linear_model_in_l2_is_the_farthest_point() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, -1.0, 2.0]])
    x, y = torch.full((6, 4), 0.5), torch.arange(6) % 2
    uphill = F.normalize(weight[1 - y] - weight[y], dim=1)
    found = APGD(ThreatModel("l2", 0.3), steps=60, early_exit=False)(lambda z: z @ weight.T, x, y)
    torch.testing.assert_close(((found - x) * uphill).sum(1), torch.full((6,), 0.3), rtol=0, atol=1e-4)


def test_step_sizes_are_looked_at_on_the_published_schedule() -> None:
    assert sorted(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    for steps in range(1, 300):
        assert all(1 <= k <= steps for k in _checkpoints(steps))


def by_hand(net: Any, x: Tensor, y: Tensor, start: Tensor, threat: ThreatModel, steps: int) -> Tensor:
    """Algorithm 1 for one sample, line by line."""

    def f(p: Tensor) -> float:
        return float(cross_entropy(net(p), y).detach())

    def uphill(p: Tensor) -> Tensor:
        leaf = p.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(net(leaf), y).sum(), leaf)
        return gradient.sign() if threat.norm == "linf" else gradient / gradient.norm()

    def inside(p: Tensor) -> Tensor:
        delta = p - x
        if threat.norm == "linf":
            delta = delta.clamp(-threat.eps, threat.eps)
        elif delta.norm() > threat.eps:
            delta = delta * threat.eps / delta.norm()
        return (x + delta).clamp(0, 1)

    size, iterates, previous, current = 2 * threat.eps, [start], start, start
    highest, value, value_then, went_up, halved, since = start, f(start), f(start), 0, False, 0
    for k in range(1, steps + 1):
        ahead, weight = inside(current + size * uphill(current)), 1.0 if k == 1 else 0.75
        following = inside(current + weight * (ahead - current) + (1 - weight) * (current - previous))
        went_up += f(following) > f(current)
        previous, current = current, following
        iterates.append(current)
        if f(current) > value:
            highest, value = current, f(current)
        if k in _checkpoints(steps):
            halved = went_up <= 0.75 * (k - since) or (not halved and value == value_then)
            if halved:
                size, current = size / 2, highest
            value_then, went_up, since = value, 0, k
    margins = [float(margin(net(p), y).detach()) for p in iterates]
    return iterates[margins.index(max(margins))]


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_algorithm_1_of_the_paper(net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm) -> None:
    net, x, y = net.double(), batch[0][:4].double(), batch[1][:4]
    threat, steps = ThreatModel(norm, RADII[norm]), 25
    found = APGD(threat, steps=steps, early_exit=False)(net, x, y, generator=seeded(1))
    noise = threat.noise(x, seeded(1))
    length = noise.flatten(1).abs().amax(1) if norm == "linf" else noise.flatten(1).norm(dim=1)
    starts = (x + noise * (threat.eps / length).view(-1, 1, 1, 1)).clamp(0, 1)
    expected = [by_hand(net, x[i : i + 1], y[i : i + 1], starts[i : i + 1], threat, steps) for i in range(4)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_the_iterate_with_the_largest_margin_is_kept_and_clean_inputs_count(
    net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm
) -> None:
    x, y = batch
    seen: list[Tensor] = []

    def logits_fn(z: Tensor) -> Tensor:
        seen.append(margin(net(z), y).detach())
        return net(z)  # type: ignore[no-any-return]  # modules have no types

    found = APGD(ThreatModel(norm, RADII[norm]), steps=12, early_exit=False)(logits_fn, x, y, generator=seeded(0))
    torch.testing.assert_close(margin(net(found), y), torch.stack(seen).amax(0))


def test_more_restarts_are_never_weaker(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    attack = APGD(ThreatModel("linf", 0.05), steps=4, early_exit=False)
    one, three = (margin(net(replace(attack, restarts=n)(net, x, y, generator=seeded(0))), y) for n in (1, 3))
    assert bool((three >= one - 1e-6).all())
    assert bool((three > one + 1e-6).any())


def test_it_goes_towards_each_of_the_likeliest_wrong_classes(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """APGD-T with k targets is the worst of k runs, each climbing the targeted DLR of its own class."""
    x, y = batch
    threat, runs = ThreatModel("linf", 0.04), 3
    attack, generator = APGD(threat, steps=6, targets=runs, early_exit=False), seeded(5)
    found = attack(net, x, y, generator=seeded(5))
    wrong = net(x).detach().scatter(1, y.unsqueeze(1), -torch.inf).argsort(1, descending=True)
    best = x
    for k in range(runs):
        towards = replace(attack, targets=None, objective=lambda z, y, k=k: targeted_dlr(z, y, wrong[:, k]))
        tried = towards(net, x, y, generator=generator)
        better = margin(net(tried), y) > margin(net(best), y)
        best = torch.where(better.view(-1, 1, 1, 1), tried, best)
    torch.testing.assert_close(found, best)


@pytest.mark.parametrize(("targets", "classes"), [(9, 5), (4, 5), (9, 3), (9, 2)])
def test_there_are_no_more_targets_than_wrong_classes(targets: int, classes: int) -> None:
    x, y = torch.full((2, classes), 0.5) + 0.1 * torch.eye(classes)[:2], torch.tensor([0, 1])
    looks: list[int] = []

    def logits_fn(z: Tensor) -> Tensor:
        looks.append(len(z))
        return z

    APGD(ThreatModel("linf", 0.01), steps=3, targets=targets)(logits_fn, x, y)
    runs = min(targets, classes - 1)
    # The clean prediction twice (what is aimed at, what is known), then of each run start, steps and result.
    assert len(looks) == 2 + runs * (1 + 3)


# -- what is promised -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"objective": "dlr"}, {"targets": 2}, {"restarts": 2}], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_leaving_fooled_samples_alone_keeps_the_robust_accuracy_and_saves_forwards(
    net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm, extra: dict[str, Any]
) -> None:
    x, y = batch
    cost: dict[bool, int] = {}
    hold: dict[bool, Tensor] = {}
    for early in (False, True):
        looks: list[int] = []

        def logits_fn(z: Tensor, looks: list[int] = looks) -> Tensor:
            looks.append(len(z))
            return net(z)  # type: ignore[no-any-return]  # modules have no types

        attack = APGD(ThreatModel(norm, RADII[norm] / 8), steps=10, early_exit=early, **extra)
        found = attack(logits_fn, x, y, generator=[seeded(i) for i in range(len(x))])
        cost[early], hold[early] = sum(looks), right(net, found, y)
    if extra.get("restarts") is None and extra.get("targets") is None:
        assert torch.equal(hold[False], hold[True])
    else:  # later runs draw from where the generators stand: with luck they find one more
        assert abs(int(hold[False].sum()) - int(hold[True].sum())) <= 1
    assert 0 < int(hold[True].sum()) < 9
    assert cost[True] < cost[False]


def test_what_is_wrong_already_costs_one_look_and_comes_back_as_it_was(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch[0], (net(batch[0]).argmax(1) + 1) % 5
    looks: list[int] = []

    def logits_fn(z: Tensor) -> Tensor:
        looks.append(len(z))
        return net(z)  # type: ignore[no-any-return]  # modules have no types

    found = APGD(ThreatModel("linf", 0.1))(logits_fn, x, y)
    assert torch.equal(found, x)
    assert looks == [9]


@pytest.mark.parametrize("early_exit", [True, False])
@pytest.mark.parametrize("extra", [{}, {"targets": 2}], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_with_a_generator_a_sample_splits_of_the_batch_change_nothing(
    net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm, extra: dict[str, Any], early_exit: bool
) -> None:
    net, x, y = net.double(), batch[0].double(), batch[1]
    attack = APGD(ThreatModel(norm, RADII[norm] / 4), steps=8, early_exit=early_exit, **extra)

    def run(rows: Sequence[int]) -> Tensor:
        return attack(net, x[rows], y[rows], generator=[seeded(7, i) for i in rows])

    parts = torch.cat([run(range(4)), run([4]), run(range(5, 9))])
    torch.testing.assert_close(run(range(9)), parts, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_tables_and_masks(norm: Norm) -> None:
    x, y, weight = torch.rand(6, 10, generator=seeded(0)), torch.arange(6) % 3, torch.randn(10, 3, generator=seeded(1))
    mask = (torch.arange(10) < 4).float().unsqueeze(0)
    radii = torch.tensor([0.0, 0.05, 0.1, 0.2, 0.3, 0.4])
    threat: Any = ThreatModel(norm, 0.4, PixelSpace(bounds=None)).within(mask=mask, eps=radii)
    found = guard(APGD(threat, steps=20, early_exit=False))(lambda z: z @ weight, x, y, generator=seeded(2))
    moved = found - x
    assert float(moved[:, 4:].abs().max()) == 0
    length = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    assert bool((length <= radii + 1e-6).all())
    assert bool((length[1:] > 0.9 * radii[1:]).all())


def test_an_objective_of_ones_own_is_climbed(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    attack = APGD(ThreatModel("linf", 0.05), steps=6, early_exit=False)
    named, own = (replace(attack, objective=o)(net, x, y, generator=seeded(0)) for o in ("dlr", dlr))
    assert torch.equal(named, own)
    assert not torch.equal(named, attack(net, x, y, generator=seeded(0)))


def test_dense_predictions_are_attacked_whole() -> None:
    net = nn.Conv2d(3, 4, 3, padding=1)
    x, y = torch.rand(2, 3, 6, 6), torch.randint(4, (2, 6, 6))
    found = guard(APGD(ThreatModel("linf", 0.1), steps=10, early_exit=False))(net, x, y, generator=seeded(0))
    assert bool((margin(net(found), y) > margin(net(x), y)).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"APGD\(steps=\) must be at least 1, got 0"),
        ({"restarts": 0}, r"APGD\(restarts=\) must be at least 1, got 0"),
        ({"rho": 0.0}, r"share between 0 and 1, got 0"),
        ({"rho": 1.0}, r"share between 0 and 1, got 1"),
        ({"targets": 0}, r"number of classes from 1 on.*targets=0"),
        ({"targets": 3, "objective": "dlr"}, r"brings its own objective.*objective='dlr'"),
        ({"objective": "hinge"}, r"objective= must be one of.*'hinge'"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        APGD(ThreatModel("linf", 0.1), **arguments)


def test_names_tell_the_settings_apart() -> None:
    threat = ThreatModel("linf", 0.2)
    assert APGD(threat).name == "apgd100_linf_0.2"
    assert APGD(threat, objective="dlr", restarts=5).name == "apgd100x5_dlr_linf_0.2"
    assert APGD(threat, steps=50, targets=9).name == "apgd50_t9_linf_0.2"


# -- as strong as the authors' own ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    found = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(found.target), generator=seeded(0))
    return torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)[order] / 16, torch.tensor(found.target)[order]


@pytest.fixture(scope="module", params=NORMS)
def trained(request: pytest.FixtureRequest, digits: tuple[Tensor, Tensor]) -> tuple[Norm, nn.Module]:
    """A small net after a few epochs of PGD training."""
    torch.set_num_threads(1)  # fixtures of a module come before the one that says so
    x, y = digits[0][:1400], digits[1][:1400]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10))
    attack, optimizer = (
        PGD(ThreatModel(request.param, RADII[request.param]), steps=5),
        torch.optim.Adam(net.parameters(), 3e-3),
    )
    generator = seeded(0)
    for _ in range(10):
        for rows in torch.randperm(1400, generator=generator).split(100):
            attacked = attack(net, x[rows], y[rows], generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(net(attacked), y[rows]).backward()
            optimizer.step()
    return request.param, net.eval()


def robust(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * float(right(net, x, y).float().mean())


@pytest.mark.parametrize("objective", ["cross_entropy", "dlr"])
def test_it_is_as_strong_as_its_authors_own(
    trained: tuple[Norm, nn.Module], digits: tuple[Tensor, Tensor], objective: str
) -> None:
    base = pytest.importorskip("pyautoattack.autopgd_base")
    (norm, net), (x, y) = trained, (digits[0][1400:], digits[1][1400:])
    attack = APGD(ThreatModel(norm, RADII[norm]), steps=100, objective=objective)
    ours, theirs = 0.0, 0.0
    for seed in range(3):
        ours += robust(net, attack(net, x, y, generator=seeded(seed)), y) / 3
        peer = base.APGDAttack(
            net,
            n_iter=100,
            norm={"linf": "Linf", "l2": "L2"}[norm],
            eps=RADII[norm],
            loss={"cross_entropy": "ce", "dlr": "dlr"}[objective],
            seed=seed,
            device="cpu",
        )
        theirs += robust(net, peer.perturb(x, y), y) / 3
    print(norm, objective, ours, theirs)
    assert robust(net, x, y) - ours > 10
    assert ours == pytest.approx(theirs, abs=0.75)


def test_towards_nine_classes_it_is_as_strong_as_its_authors_own(
    trained: tuple[Norm, nn.Module], digits: tuple[Tensor, Tensor]
) -> None:
    base = pytest.importorskip("pyautoattack.autopgd_base")
    (norm, net), (x, y) = trained, (digits[0][1400:], digits[1][1400:])
    ours = robust(net, APGD(ThreatModel(norm, RADII[norm]), targets=9)(net, x, y, generator=seeded(0)), y)
    peer = base.APGDAttack_targeted(
        net,
        n_iter=100,
        norm={"linf": "Linf", "l2": "L2"}[norm],
        eps=RADII[norm],
        n_target_classes=9,
        seed=0,
        device="cpu",
    )
    theirs = robust(net, peer.perturb(x, y), y)
    print(norm, "t9", ours, theirs)
    assert ours == pytest.approx(theirs, abs=0.5)
