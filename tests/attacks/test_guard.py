from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD, AttackError, ThreatModel, guard
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import RandomState, seeded

THREAT = ThreatModel("linf", 0.1)
X, Y = torch.full((2, 3), 0.5), torch.tensor([0, 1])


def run(attack: Any, x: Tensor = X, threat: ThreatModel = THREAT, **options: Any) -> Tensor:
    return guard(attack, threat, **options)(lambda v: v, x.clone(), Y, generator=seeded(0))


def with_nan(_: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(torch.arange(3) < 2, torch.nan, x)


def in_place(_: Any, x: Tensor, y: Tensor) -> Tensor:
    return x.add_(0.25)


@pytest.mark.parametrize(
    ("attack", "x", "message"),
    [
        (lambda f, x, y: x[:1], X, r"must return a tensor of shape \(2, 3\), got \(1, 3\)"),
        (lambda f, x, y: (x, y), X, r"must return a tensor of shape \(2, 3\), got tuple"),
        (with_nan, X, "returned 4 NaN or infinite values"),
        (lambda f, x, y: x + 0.25, X, r"moved an input by 0\.25 \(linf, pixels\), but promised at most 0\.1"),
        (lambda f, x, y: x + 0.05, X + 0.5, r"left the pixel bounds \(0\.0, 1\.0\) by 0\.05"),
        (lambda f, x, y: x - 0.05, X - 0.5, r"left the pixel bounds \(0\.0, 1\.0\) by 0\.05"),
        (in_place, X, r"moved an input by 0\.25 \(linf, pixels\), but promised at most 0\.1"),
    ],
    ids=["shape", "type", "NaN", "ball", "box above", "box below", "ball, in place"],
)
def test_a_broken_promise_is_an_error_with_numbers(attack: Any, x: Tensor, message: str) -> None:
    with pytest.raises(AttackError, match=message):
        run(attack, x)


def test_an_attack_that_works_in_place_does_not_touch_the_clean_batch() -> None:
    x = X.clone()
    found = guard(lambda f, v, y: v.add_(0.05), THREAT)(lambda v: v, x, Y)
    assert torch.equal(x, X)
    torch.testing.assert_close(found, X + 0.05)


def test_distances_are_in_pixels_and_in_the_norm_of_the_threat() -> None:
    def move(_: Any, x: Tensor, y: Tensor) -> Tensor:
        return x + 0.8  # 0.2 pixels, 0.2 * sqrt(3) in l2

    space = PixelSpace(std=0.25)
    run(move, X, ThreatModel("linf", 0.2, space))
    run(move, X, ThreatModel("l2", 0.2 * 3**0.5, space))
    with pytest.raises(AttackError, match=r"by 0\.2 \(linf, pixels\)"):
        run(move, X, ThreatModel("linf", 0.199, space))
    with pytest.raises(AttackError, match=r"by 0\.34641 \(l2, pixels\)"):
        run(move, X, ThreatModel("l2", 0.346, space))


def test_going_farther_is_allowed_to_who_says_so() -> None:
    class Far:
        threat, reach = THREAT, 0.3

        def __call__(self, _: Any, x: Tensor, y: Tensor) -> Tensor:
            return x + 0.3

    torch.testing.assert_close(guard(Far())(lambda v: v, X, Y), X + 0.3)
    torch.testing.assert_close(run(lambda f, x, y: x + 0.3, reach=0.3), X + 0.3)
    with pytest.raises(AttackError, match=r"Far moved an input by 0\.3 .* at most 0\.2"):
        guard(Far(), reach=0.2)(lambda v: v, X, Y)


def test_without_a_threat_only_shape_and_numbers_are_checked() -> None:
    torch.testing.assert_close(guard(lambda f, x, y: x + 9)(lambda v: v, X, Y), X + 9)
    with pytest.raises(AttackError, match="NaN"):
        guard(with_nan)(lambda v: v, X, Y)


def test_the_message_names_the_attack() -> None:
    class Broken(PGD):
        def __call__(self, *_: Any, **__: Any) -> Tensor:
            return X + 0.2

    with pytest.raises(AttackError, match=r"^pgd10_linf_0\.1 moved"):
        guard(Broken(THREAT))(lambda v: v, X, Y)


def test_the_generator_goes_only_to_who_takes_it() -> None:
    def ours(_: Any, x: Tensor, y: Tensor, *, generator: Any = None) -> Tensor:
        return x + 0.1 * torch.rand(x.shape, generator=generator)

    def theirs(_: Any, x: Tensor, y: Tensor) -> Tensor:
        return x + 0.1 * torch.rand(x.shape)

    assert torch.equal(run(ours), X + 0.1 * torch.rand(X.shape, generator=seeded(0)))
    assert run(theirs).shape == X.shape


def noisy(_: Any, x: Tensor, y: Tensor) -> Tensor:
    numbers = [torch.rand(1).item(), float(np.random.rand()), random.random()]
    return x + 0.1 * torch.tensor(numbers)


@pytest.mark.parametrize("noise", [seeded, lambda seed: [seeded(seed, i) for i in range(2)]], ids=["batch", "samples"])
def test_a_foreign_attack_on_global_streams_is_a_function_of_our_seed(noise: Callable[[int], Any]) -> None:
    fenced = guard(noisy, THREAT)
    first = fenced(lambda v: v, X, Y, generator=noise(1))
    torch.rand(3), np.random.rand(), random.random()
    assert torch.equal(fenced(lambda v: v, X, Y, generator=noise(1)), first)
    assert not torch.equal(fenced(lambda v: v, X, Y, generator=noise(2)), first)
    assert first[0].unique().numel() == 3


def noisy_and_broken(_: Any, x: Tensor, y: Tensor) -> Tensor:
    return noisy(_, x, y) / (1 // 0)


@pytest.mark.parametrize("attack", [noisy, noisy_and_broken], ids=["returns", "raises"])
def test_the_global_streams_go_on_as_if_nothing_had_happened(attack: Any) -> None:
    before = RandomState.capture()
    with suppress(ZeroDivisionError):
        run(attack)
    after = RandomState.capture()
    assert torch.equal(after.cpu, before.cpu)
    assert after.numpy[1].tolist() == before.numpy[1].tolist()
    assert after.python == before.python


def fgsm(logits_fn: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    x = x.requires_grad_()
    F.cross_entropy(logits_fn(x), y).backward()
    return x + 0.1 * x.grad.sign()  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_attack_that_calls_backward_runs_inside_the_validation_loop(mode: Any) -> None:
    with mode():
        x, y = X.clone(), Y.clone()
        found = guard(fgsm, THREAT)(lambda v: v, x, y)
        assert not x.requires_grad
    torch.testing.assert_close(found, X + torch.tensor([[-0.1, 0.1, 0.1], [0.1, -0.1, 0.1]]))
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_result_has_the_type_of_the_input(dtype: torch.dtype) -> None:
    assert run(lambda f, x, y: x.float() + 0.05, X.to(dtype)).dtype == dtype


def test_a_guard_is_not_guarded_again_and_a_non_callable_is_refused() -> None:
    fenced = guard(PGD(THREAT))
    assert guard(fenced) is fenced
    assert fenced.threat is THREAT
    with pytest.raises(TypeError, match=r"callable \(logits_fn, x, y\) -> x_adv, got str"):
        guard("pgd")


def test_an_attack_of_torchattacks_works_and_is_reproducible() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchattacks = pytest.importorskip("torchattacks")
    net, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), torch.rand(2, 3, 2, 2)
    attack = torchattacks.PGD(net, eps=0.1, alpha=0.05, steps=2, random_start=True)
    fenced = guard(lambda logits_fn, x, y: attack(x, y), THREAT)
    with torch.inference_mode():
        first = fenced(net, images, Y, generator=seeded(1))
    assert torch.equal(fenced(net, images, Y, generator=seeded(1)), first)
    assert not torch.equal(fenced(net, images, Y, generator=seeded(2)), first)
    # Two classes have one uphill direction; two steps of eps / 2 outweigh any start.
    clean, attacked = (F.cross_entropy(net(v), Y, reduction="none") for v in (images, first))
    assert bool((attacked > clean).all())
