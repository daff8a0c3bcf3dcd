from __future__ import annotations

import itertools
import math
import warnings
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD, ThreatModel, cross_entropy, guard, margin
from lightning_robust.attacks.objectives import OBJECTIVES
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

Norm = Literal["linf", "l2"]
NORMS: list[Norm] = ["linf", "l2"]
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@pytest.fixture
def net() -> nn.Module:
    """A small convolutional net without any symmetry, in eval mode."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6, 4, 3, stride=2), nn.Flatten(), nn.LazyLinear(5)
    )
    net.train()(torch.randn(32, 3, 8, 8))
    return net.eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    return x, torch.arange(8) % 5


def peer(name: str) -> Any:
    """An outside implementation; what it warns about while it is imported is not about us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


WEIGHT = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, -1.0, 2.0]])


def linear(x: Tensor) -> Tensor:
    return x @ WEIGHT.T


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("start", ["uniform", "zero", "gaussian"])
def test_pgd_finds_the_corner_of_the_ball(start: Any, steps: int) -> None:
    """The worst case of a linear model; the default step reaches it even from the opposite corner."""
    x, y = torch.full((20, 4), 0.5), torch.arange(20) % 2
    uphill = (WEIGHT[1 - y] - WEIGHT[y]).sign()
    found = PGD(ThreatModel("linf", 0.1), steps=steps, start=start)(linear, x, y, generator=seeded(0))
    torch.testing.assert_close(found, x + 0.1 * uphill, rtol=0, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 7])
def test_pgd_finds_the_farthest_point_of_the_l2_ball(steps: int) -> None:
    x, y = torch.full((2, 4), 0.5), torch.tensor([0, 1])
    uphill = WEIGHT[1 - y] - WEIGHT[y]
    found = PGD(ThreatModel("l2", 0.3), steps=steps, start="zero")(linear, x, y)
    torch.testing.assert_close(found, x + 0.3 * uphill / uphill.norm(dim=1, keepdim=True), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("norm", NORMS)
def test_every_pixel_is_that_of_torchattacks(
    net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm, steps: int
) -> None:
    torchattacks, (eps, step) = peer("torchattacks"), (0.06, 0.02) if norm == "linf" else (0.8, 0.25)
    theirs = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
    expected = theirs(net, eps=eps, alpha=step, steps=steps, random_start=False)(*batch)
    found = ours(norm, eps, step, steps)(net, *batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("norm", NORMS)
def test_every_pixel_is_that_of_foolbox(net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm, steps: int) -> None:
    foolbox, (eps, step) = peer("foolbox"), (0.06, 0.02) if norm == "linf" else (0.8, 0.25)
    theirs = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    attack = theirs(abs_stepsize=step, steps=steps, random_start=False)
    expected = attack.run(foolbox.PyTorchModel(net, bounds=(0, 1)), *batch, epsilon=eps)
    found = ours(norm, eps, step, steps)(net, *batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def ours(norm: Norm, eps: float, step: float, steps: int) -> PGD:
    """With the step size of the peers, which says so where it is too short on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if steps * step < eps else "error")
        return PGD(ThreatModel(norm, eps), steps=steps, step_size=step, start="zero")


@pytest.mark.parametrize("start", ["uniform", "zero", "gaussian"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_pixels_are_the_same_wherever_the_normalisation_stands(
    net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm, start: Any
) -> None:
    net, pixels, y = net.double(), batch[0].double(), batch[1]
    space, eps = PixelSpace(mean=MEAN, std=STD), 0.05 if norm == "linf" else 0.5
    in_model = PGD(ThreatModel(norm, eps), steps=5, start=start)
    in_data = PGD(ThreatModel(norm, eps, space), steps=5, start=start)
    one = in_model(lambda p: net(space.to_model(p)), pixels, y, generator=seeded(1))
    other = in_data(net, space.to_model(pixels), y, generator=seeded(1))
    torch.testing.assert_close(space.to_pixels(other), one, rtol=0, atol=1e-12)
    assert float((one - pixels).abs().max()) > 0.04


SPACES = [
    PixelSpace(),
    PixelSpace(mean=MEAN, std=STD),
    PixelSpace(bounds=(0, 255)),
    PixelSpace(bounds=(0, 255), mean=(125.0, 123.0, 114.0), std=(63.0, 62.0, 67.0)),
    PixelSpace(bounds=(-1, 1), outside="widen"),
    PixelSpace(mean=MEAN, std=STD, outside="widen"),
    PixelSpace(bounds=None),
    PixelSpace(bounds=None, mean=MEAN, std=STD),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("space", SPACES, ids=lambda s: f"{s.bounds}-{s.outside}-{s.normalises}")
@pytest.mark.parametrize("norm", NORMS)
def test_results_stay_in_the_ball_and_in_the_box(norm: Norm, space: PixelSpace, dtype: torch.dtype) -> None:
    low, high = space.bounds or (-3.0, 3.0)
    pixels = low + (high - low) * torch.rand(6, 3, 4, 4, dtype=torch.float64)
    pixels[0, :, 0, 0], pixels[1, :, 0, 0] = low, high
    if space.outside == "widen":
        pixels[2, :, 0, 0] = high + 0.2
    x, y = space.to_model(pixels, dtype), torch.arange(6) % 4
    threat = ThreatModel(norm, 0.1 * (high - low), space)
    weight = torch.randn(48, 4, dtype=dtype)
    result = guard(PGD(threat, steps=4))(lambda v: v.flatten(1) @ weight, x, y, generator=seeded(0))

    assert (result.dtype, result.shape) == (dtype, x.shape)
    clean, found = space.to_pixels(x).double(), space.to_pixels(result).double()
    # Both are rounded to their type in model units; what that is worth in pixels, twice, is all that may be over.
    unit = torch.finfo(dtype).eps * float(result.abs().max()) * float(torch.tensor(space.std).max())
    over = 2 * max(unit, torch.finfo(dtype).eps * float(clean.abs().max()))
    assert float(threat.distance(found, clean).max()) <= threat.eps + over * (48**0.5 if norm == "l2" else 1)
    assert float(threat.distance(found, clean).min()) > 0
    if space.bounds is not None:
        assert bool((found >= clean.clamp(max=low) - over).all())
        assert bool((found <= clean.clamp(min=high) + over).all())


def test_restarts_keep_the_start_with_the_largest_margin_of_each_sample(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    generator, threat = seeded(4), ThreatModel("linf", 0.1)
    starts = torch.stack([PGD(threat, steps=2)(net, x, y, generator=generator) for _ in range(4)])
    margins = torch.stack([margin(net(s), y) for s in starts]).detach()
    best = PGD(threat, steps=2, restarts=4)(net, x, y, generator=seeded(4))
    assert torch.equal(best, starts[margins.argmax(0), torch.arange(8)])
    assert len(set(margins.argmax(0).tolist())) > 1


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("norm", NORMS)
def test_the_result_is_a_function_of_the_seed(
    net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm, restarts: int
) -> None:
    attack = PGD(ThreatModel(norm, 0.2), steps=2, restarts=restarts)
    first = attack(net, *batch, generator=seeded(1))
    assert torch.equal(attack(net, *batch, generator=seeded(1)), first)
    assert not torch.equal(attack(net, *batch, generator=seeded(2)), first)


@pytest.mark.parametrize("norm", NORMS)
def test_with_a_generator_a_sample_the_result_does_not_depend_on_the_batch(
    net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm
) -> None:
    x, y = batch[0].double(), batch[1]
    attack = PGD(ThreatModel(norm, 0.2), steps=3, restarts=2)
    whole = attack(net.double(), x, y, generator=[seeded(i) for i in range(8)])
    parts = [
        attack(net, x[part], y[part], generator=[seeded(i) for i in range(8)[part]])
        for part in (slice(0, 3), slice(3, 8))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)


def test_gradients_reach_the_input_only(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    net[0].weight.grad = kept = torch.ones_like(net[0].weight)
    x.requires_grad_()
    result = PGD(ThreatModel("linf", 0.1), steps=2, restarts=2)(net, x, y, generator=seeded(0))
    assert net[0].weight.grad is kept
    assert bool((kept == 1).all())
    assert all(p.grad is None for p in list(net.parameters())[1:])
    assert x.grad is None
    assert not result.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_inside_the_validation_loop(
    net: nn.Module, batch: tuple[Tensor, Tensor], mode: type[AbstractContextManager[None]]
) -> None:
    attack = PGD(ThreatModel("linf", 0.1), steps=2, restarts=2)
    expected = attack(net, *batch, generator=seeded(0))
    with mode():
        x, y = (t.clone() for t in batch)  # inference tensors under inference mode, as Lightning hands them over
        assert torch.equal(attack(net, x, y, generator=seeded(0)), expected)


@pytest.mark.parametrize(
    ("start", "steps", "step_size"), [("uniform", 10, 0.01), (None, 1, 0.1), ("zero", 9, 0.01), ("gaussian", 1, 0.05)]
)
def test_steps_that_cannot_reach_the_far_side_warn_with_the_remedy(start: Any, steps: int, step_size: float) -> None:
    remedy = f"far side of the ball is .* away.*step_size={0.25 / steps:.4g}"
    with pytest.warns(UserWarning, match=remedy):
        PGD(ThreatModel("linf", 0.1), steps=steps, step_size=step_size, start=start)


@pytest.mark.parametrize(("start", "steps", "step_size"), [("uniform", 20, 0.01), ("zero", 10, 0.01), (None, 1, None)])
def test_steps_that_just_reach_it_do_not_warn(start: Any, steps: int, step_size: float | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(ThreatModel("linf", 0.1), steps=steps, step_size=step_size, start=start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps=.*at least 1, got 0"),
        ({"restarts": 0}, "restarts=.*at least 1, got 0"),
        ({"step_size": 0.0}, "step_size=.*positive, got 0"),
        ({"step_size": -0.1}, "step_size=.*positive, got -0.1"),
        ({"step_size": math.nan}, "step_size=.*positive, got nan"),
        ({"start": "random"}, "start=.*got 'random'"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(ThreatModel("linf", 0.1), **arguments)


def test_names_tell_the_settings_that_matter_apart() -> None:
    linf, l2 = ThreatModel("linf", 0.2), ThreatModel("l2", 0.2)
    assert PGD(linf, steps=20, restarts=2).name == "pgd20x2_linf_0.2"
    names = {PGD(t, steps=s, restarts=r).name for t, s, r in itertools.product([linf, l2], [1, 11], [1, 2])}
    assert len(names) == 8
    assert PGD(ThreatModel("linf", 8 / 255)).name == "pgd10_linf_0.03137"


@pytest.mark.parametrize("norm", NORMS)
def test_where_the_gradient_is_zero_it_walks_at_random_inside_the_ball(norm: Norm) -> None:
    x, y, threat = torch.full((4, 4), 0.5), torch.zeros(4, dtype=torch.long), ThreatModel(norm, 0.1)
    attack = PGD(threat, start="zero")
    found = [attack(lambda v: v @ torch.zeros(4, 3), x, y, generator=seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert bool(found[0].isfinite().all())
    moved = threat.distance(found[0], x)
    assert bool((moved > 0).all())
    assert bool((moved <= 0.1 + 1e-6).all())


def test_a_gaussian_start_leaves_the_point_where_the_objective_is_flat() -> None:
    x, y = torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.long)

    def moved(logits: Tensor, _: Tensor) -> Tensor:
        return (logits - linear(x)).square().sum(1)

    threat = ThreatModel("linf", 0.1)
    (gradient,) = torch.autograd.grad(moved(linear(leaf := x.clone().requires_grad_()), y).sum(), leaf)
    assert torch.equal(gradient, torch.zeros_like(x))
    found = PGD(threat, start="gaussian", objective=moved)(linear, x, y, generator=seeded(0))
    torch.testing.assert_close((found - x).abs(), torch.full((3, 4), 0.1))


def test_an_explicit_objective_replaces_cross_entropy() -> None:
    x, y = torch.full((2, 4), 0.5), torch.tensor([0, 1])
    downhill = PGD(ThreatModel("linf", 0.1), objective=lambda z, t: -cross_entropy(z, t))(linear, x, y)
    uphill = PGD(ThreatModel("linf", 0.1))(linear, x, y)
    torch.testing.assert_close(downhill - x, x - uphill)


@pytest.mark.parametrize(
    "logits_fn",
    [
        lambda x: torch.zeros(len(x), 3),
        lambda x: x.detach() @ torch.ones(4, 3),
        lambda x: x.detach() @ torch.ones(4, 3, requires_grad=True),
    ],
    ids=["constant", "detached", "frozen backbone under a trained head"],
)
def test_logits_that_do_not_depend_on_the_input_are_an_error_one_can_read(logits_fn: Any) -> None:
    with pytest.raises(RuntimeError, match=r"logits do not depend on the input.*no_grad"):
        PGD(ThreatModel("linf", 0.1))(logits_fn, torch.rand(2, 4), torch.tensor([0, 1]))


def test_inputs_outside_the_pixel_space_are_an_error_and_widened_ones_are_not_moved_inwards() -> None:
    x, y = torch.tensor([[0.5, 0.5, 1.4, -0.3]]), torch.tensor([0])
    with pytest.raises(ValueError, match=r"within \[0, 1\], got \[-0\.3, 1\.4\]"):
        PGD(ThreatModel("linf", 0.1))(linear, x, y)
    found = PGD(ThreatModel("linf", 0.1, PixelSpace(outside="widen")))(linear, x, y)
    # Uphill is (-, +, -, -): the first three may be followed, the last already lies below the box.
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.6, 1.3, -0.3]]))


@pytest.mark.parametrize("norm", NORMS)
def test_towards_given_classes_every_pixel_is_that_of_torchattacks(
    net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm
) -> None:
    torchattacks, (eps, step) = peer("torchattacks"), (0.06, 0.02) if norm == "linf" else (0.8, 0.25)
    theirs = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
    attack, aims = theirs(net, eps=eps, alpha=step, steps=10, random_start=False), (batch[1] + 2) % 5
    attack.set_mode_targeted_by_label(quiet=True)
    expected = attack(batch[0], aims)
    found = replace(ours(norm, eps, step, 10), targeted="given")(net, batch[0], aims)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_the_best_iterate_is_that_of_a_loop_that_looks_at_every_one(
    net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm
) -> None:
    net, x, y, threat, steps = net.double(), batch[0].double(), batch[1], ThreatModel(norm, 0.3), 6
    pixels = threat.random_start(x, (0.0, 1.0), seeded(2))
    iterates = [pixels]
    for _ in range(steps):
        leaf = pixels.clone().requires_grad_()
        # In float32, as the library does: what is compared is the loop.
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(leaf).float(), y, reduction="sum"), leaf)
        pixels = threat.project(pixels + 0.3 * threat.steepest(gradient), x, (0.0, 1.0))
        iterates.append(pixels)
    margins = torch.stack([margin(net(p), y) for p in iterates]).detach()
    attack = PGD(threat, steps=steps, step_size=0.3, keep="best")
    found = attack(net, x, y, generator=seeded(2))
    torch.testing.assert_close(found, torch.stack(iterates)[margins.argmax(0), torch.arange(8)], rtol=0, atol=1e-12)
    assert len(set(margins.argmax(0).tolist())) > 1
    last = replace(attack, keep="last")(net, x, y, generator=seeded(2))
    torch.testing.assert_close(last, pixels, rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", ["cross_entropy", "margin", "dlr", "kl"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_best_iterate_is_never_weaker_than_the_last(
    net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm, objective: str
) -> None:
    x, y = batch
    attack = PGD(ThreatModel(norm, 0.3), steps=4, objective=objective)
    last, best = (
        margin(net(replace(attack, keep=keep)(net, x, y, generator=seeded(0))), y) for keep in ("last", "best")
    )
    assert bool((best >= last - 1e-6).all())


def test_the_last_iterate_is_a_candidate() -> None:
    """Every step of a linear model goes up: the last one is the best."""
    x, y = torch.full((2, 4), 0.5), torch.tensor([0, 1])
    attack = PGD(ThreatModel("linf", 0.1), steps=4, step_size=0.025, start="zero")
    found = replace(attack, keep="best")(linear, x, y)
    assert torch.equal(found, attack(linear, x, y))
    torch.testing.assert_close((found - x).abs(), torch.full((2, 4), 0.1))


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_leaving_fooled_samples_alone_changes_neither_robust_accuracy_nor_those_that_hold(
    net: nn.Module, norm: Norm, restarts: int
) -> None:
    x = torch.rand(40, 3, 8, 8, dtype=torch.float64, generator=seeded(8))
    net = net.double()
    y, sizes = net(x).argmax(1), []
    y[:5] = (y[:5] + 1) % 5  # some are wrong as they are

    def logits_fn(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return net(z)  # type: ignore[no-any-return]  # modules have no types

    eps = 0.1 if norm == "linf" else 1.0
    attack = PGD(ThreatModel(norm, eps), steps=5, keep="best", restarts=restarts)
    # One generator a sample: what a sample draws does not depend on who else is still searched.
    whole = attack(logits_fn, x, y, generator=[seeded(9, i) for i in range(40)])
    dear, sizes = sum(sizes), []
    early = replace(attack, early_exit=True)(logits_fn, x, y, generator=[seeded(9, i) for i in range(40)])
    holds = net(whole).argmax(1) == y
    assert 5 < int(holds.sum()) < 35
    assert torch.equal(net(early).argmax(1) == y, holds)
    torch.testing.assert_close(early[holds], whole[holds], rtol=0, atol=1e-12)
    assert sum(sizes) < dear
    assert sizes == sorted(sizes, reverse=True) or restarts > 1
    assert dear == 40 * 6 * restarts


def test_samples_that_are_wrong_from_the_start_cost_one_look() -> None:
    x, y, sizes = torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.tensor([1, 0]), []

    def logits_fn(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return z

    found = PGD(ThreatModel("linf", 0.1), steps=9, start="zero", early_exit=True)(logits_fn, x, y)
    assert sizes == [2]
    assert torch.equal(found, x)


def test_early_exit_keeps_the_best_and_not_the_last() -> None:
    assert PGD(ThreatModel("linf", 0.1), early_exit=True).keep == "best"
    with pytest.raises(ValueError, match=r"'best' with early_exit=True.*got keep='last', early_exit=True"):
        PGD(ThreatModel("linf", 0.1), keep="last", early_exit=True)
    with pytest.raises(ValueError, match=r"keep=.*got keep='first'"):
        PGD(ThreatModel("linf", 0.1), keep="first")  # type: ignore[arg-type]  # the mistake under test


@pytest.mark.parametrize("name", ["cross_entropy", "margin", "dlr"])
def test_a_named_objective_is_its_function(net: nn.Module, batch: tuple[Tensor, Tensor], name: str) -> None:
    attack = PGD(ThreatModel("linf", 0.1), steps=3)
    named, given = (replace(attack, objective=o)(net, *batch, generator=seeded(1)) for o in (name, OBJECTIVES[name]))
    assert torch.equal(named, given)


def test_objectives_differ_and_unknown_ones_are_refused(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    attack = PGD(ThreatModel("linf", 0.1), steps=3)
    names = ["cross_entropy", "margin", "dlr", "kl"]
    found = [replace(attack, objective=name)(net, *batch, generator=seeded(1)) for name in names]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))
    assert len({replace(attack, objective=name).name for name in names}) == 4
    with pytest.raises(ValueError, match=r"objective= must be one of .* got 'ce'"):
        PGD(ThreatModel("linf", 0.1), objective="ce")


@pytest.mark.parametrize("space", [PixelSpace(), PixelSpace(mean=MEAN, std=STD), PixelSpace(bounds=(0, 255))], ids=str)
def test_away_from_the_clean_prediction_it_is_the_inner_loop_of_trades(net: nn.Module, space: PixelSpace) -> None:
    """Zhang et al., 2019, algorithm 1: from 0.001 N(0, 1) uphill on KL(clean || perturbed), in pixels of [0, 1]."""
    high = (space.bounds or (0, 1))[1]
    net, clean = net.double(), high * torch.rand(8, 3, 8, 8, dtype=torch.float64, generator=seeded(3))

    def of(pixels: Tensor) -> Tensor:
        # In float32, as the library does: the gradient of KL is almost zero here, and its sign is what counts.
        return net(space.to_model(pixels)).float().log_softmax(1)  # type: ignore[no-any-return]  # modules have no types

    eps, step, fixed = 0.031 * high, 0.007 * high, of(clean).detach()

    def inside(pixels: Tensor) -> Tensor:
        return (clean + (pixels - clean).clamp(-eps, eps)).clamp(0, high)

    # Inside the box, which the published code leaves here.
    moved = inside(clean + 0.001 * high * torch.randn(clean.shape, dtype=torch.float64, generator=seeded(6)))
    for _ in range(10):
        leaf = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.kl_div(of(leaf), fixed, reduction="sum", log_target=True), leaf)
        moved = inside(leaf.detach() + step * gradient.sign())
    attack = PGD(ThreatModel("linf", eps, space), steps=10, step_size=step, start="gaussian", objective="kl")
    found = attack(net, space.to_model(clean), torch.zeros(8).long(), generator=seeded(6))
    torch.testing.assert_close(space.to_pixels(found), moved, rtol=0, atol=1e-6 * high)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("norm", NORMS)
def test_inputs_and_logits_in_half_precision_stay_in_the_ball(
    net: nn.Module, batch: tuple[Tensor, Tensor], norm: Norm, keep: Any, dtype: torch.dtype
) -> None:
    space, y = PixelSpace(mean=MEAN, std=STD), batch[1]
    x = space.to_model(batch[0]).to(dtype)
    attack = PGD(ThreatModel(norm, 0.2, space), steps=3, keep=keep, restarts=2)
    found = guard(attack)(net.to(dtype), x, y, generator=seeded(0))
    assert found.dtype == dtype
    moved = attack.threat.distance(space.to_pixels(found), space.to_pixels(x))
    over = torch.finfo(dtype).eps * (192**0.5 if norm == "l2" else 1)
    assert float(moved.max()) <= 0.2 + over
    assert float(moved.min()) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_it_goes_nearly_where_it_goes_in_full_precision(
    net: nn.Module, batch: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    def mixed(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return net(x)  # type: ignore[no-any-return]  # modules have no types

    attack = PGD(ThreatModel("linf", 0.05), steps=1, start="zero")
    found, exact = (attack(fn, *batch) for fn in (mixed, net))
    assert mixed(batch[0]).dtype == dtype
    assert found.dtype == torch.float32
    assert float((found == exact).float().mean()) > 0.97
