from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.attacks.objectives import (
    cross_entropy,
    dlr,
    margin,
    targeted_dlr,
)


@pytest.mark.parametrize(
    ("logits", "y", "gap"),
    [
        ([[3.0, 1.0, 2.0]], [0], [-1.0]),
        ([[3.0, 1.0, 2.0]], [1], [2.0]),
        ([[3.0, 1.0, 2.0]], [2], [1.0]),
        ([[2.0, 2.0]], [0], [0.0]),
        ([[-1e30, 1e30]], [0], [2e30]),
        ([[3.0, 1.0, 2.0]], [[0.1, 0.2, 0.7]], [1.0]),
        ([[3.0, 1.0], [3.0, 1.0]], [-100, 1], [0.0, 2.0]),
        ([[3.0, 1.0], [3.0, 1.0]], [-1, 0], [0.0, -2.0]),
        ([[[3.0, 0.0], [1.0, 4.0]]], [[0, 0]], [(-2 + 4) / 2]),
    ],
    ids=["right", "wrong", "second", "tie", "huge", "soft labels", "ignored", "ignored by -1", "pixels are averaged"],
)
def test_the_margin_is_the_best_wrong_class_less_the_right_one(
    logits: list[list[float]], y: list[int], gap: list[float]
) -> None:
    assert margin(torch.tensor(logits), torch.tensor(y)).tolist() == pytest.approx(gap)


def test_the_margin_is_above_zero_exactly_where_the_prediction_is_wrong() -> None:
    logits, y = torch.randn(500, 10), torch.randint(10, (500,))
    assert torch.equal(margin(logits, y) > 0, logits.argmax(1) != y)


@pytest.mark.parametrize(
    ("logits", "y"), [((4, 1), (4,)), ((4,), (4,)), ((4, 3), (5,)), ((4, 3), (4, 1)), ((4, 3, 2), (4,))]
)
def test_shapes_without_a_margin_are_refused_with_both_shapes(logits: tuple[int, ...], y: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"margin expects logits \(N, K, \.\.\.\).*got \(4.*brings its own"):
        margin(torch.zeros(logits), torch.zeros(y, dtype=torch.long))


def test_cross_entropy_is_per_sample_and_pixels_are_summed() -> None:
    logits, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 2])
    torch.testing.assert_close(cross_entropy(logits, y), F.cross_entropy(logits, y, reduction="none"))
    soft = torch.rand(4, 3).softmax(1)
    torch.testing.assert_close(cross_entropy(logits, soft), -(soft * logits.log_softmax(1)).sum(1))
    dense, classes = torch.randn(4, 3, 5), torch.randint(3, (4, 5))
    torch.testing.assert_close(cross_entropy(dense, classes), F.cross_entropy(dense, classes, reduction="none").sum(1))


def test_low_precision_logits_are_computed_in_float32() -> None:
    logits, y = torch.randn(4, 3).bfloat16(), torch.tensor([0, 2, 1, 2])
    for objective in (cross_entropy, margin, dlr):
        assert torch.equal(objective(logits, y), objective(logits.float(), y))
        assert objective(logits, y).dtype == torch.float32


def peer(name: str) -> Any:
    """An outside implementation; what it warns about while it is imported is not about us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.mark.parametrize(
    ("logits", "y", "value"),
    [
        ([[5.0, 3.0, 1.0]], [0], [-2 / 4]),
        ([[5.0, 3.0, 1.0]], [1], [2 / 4]),
        ([[5.0, 3.0, 1.0]], [2], [4 / 4]),
        ([[7.0, 1.0, 4.0, 0.0, 3.0]], [0], [-3 / 4]),
        ([[5.0, 3.0]], [0], [-2.0]),
        ([[5.0, 3.0]], [1], [2.0]),
        ([[5.0, 3.0, 1.0]], [[0.1, 0.7, 0.2]], [2 / 4]),
        ([[5.0, 3.0, 1.0], [5.0, 3.0, 1.0]], [-100, 0], [0.0, -0.5]),
        ([[[5.0, 0.0], [3.0, 0.0], [1.0, 2.0]]], [[0, 0]], [(-0.5 + 1.0) / 2]),
        ([[2.0, 2.0, 2.0]], [0], [0.0]),
    ],
    ids=["right", "wrong", "last", "five", "two", "two, wrong", "soft labels", "ignored", "pixels", "all equal"],
)
def test_dlr_is_the_margin_over_the_distance_of_the_first_from_the_third(logits: Any, y: Any, value: Any) -> None:
    assert dlr(torch.tensor(logits), torch.tensor(y)).tolist() == pytest.approx(value)


@pytest.mark.parametrize(
    ("logits", "y", "target", "value"),
    [
        ([6.0, 4.0, 3.0, 1.0], 0, 1, (4 - 6) / (6 - 2)),
        ([6.0, 4.0, 3.0, 1.0], 3, 0, (6 - 1) / (6 - 2)),
        ([0.0, 6.0, 1.0, 3.0, 5.0], 1, 0, (0 - 6) / (6 - 2)),
        ([6.0, 4.0, 3.0], 0, 2, -3.0),
        ([6.0, 4.0], 1, 0, 2.0),
    ],
)
def test_targeted_dlr_is_the_way_to_a_class_over_the_spread(logits: Any, y: int, target: int, value: float) -> None:
    found = targeted_dlr(torch.tensor([logits]), torch.tensor([y]), torch.tensor([target]))
    assert found.tolist() == pytest.approx([value])


@pytest.mark.parametrize("classes", [3, 4, 10])
def test_dlr_is_that_of_pyautoattack_in_value_and_gradient(classes: int) -> None:
    theirs = peer("pyautoattack.autopgd_base").APGDAttack.dlr_loss
    logits, y = 3 * torch.randn(200, classes, dtype=torch.float64), torch.randint(classes, (200,))
    compare(lambda z: dlr(z, y), lambda z: theirs(None, z, y), logits)


@pytest.mark.parametrize("classes", [4, 10])
def test_targeted_dlr_is_that_of_pyautoattack_in_value_and_gradient(classes: int) -> None:
    theirs = peer("pyautoattack.autopgd_base").APGDAttack_targeted.dlr_loss_targeted
    logits, y = 3 * torch.randn(200, classes, dtype=torch.float64), torch.randint(classes, (200,))
    target = (y + torch.randint(1, classes, (200,))) % classes
    compare(lambda z: targeted_dlr(z, y, target), lambda z: theirs(SimpleNamespace(y_target=target), z, y), logits)


def compare(ours: Any, theirs: Any, logits: Tensor) -> None:
    one, other = logits.float().requires_grad_(), logits.float().requires_grad_()
    value, expected = ours(one), theirs(other)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(v.sum(), z)[0] for v, z in ((value, one), (expected, other))), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("classes", [3, 4, 10])
def test_neither_a_factor_nor_a_shift_of_the_logits_moves_dlr(classes: int) -> None:
    logits, y = torch.randn(100, classes), torch.randint(classes, (100,))
    towards = (y + 1) % classes
    for change in (lambda z: 1000 * z, lambda z: z / 1000, lambda z: z + 7, lambda z: 64 * z - 3):
        torch.testing.assert_close(dlr(change(logits), y), dlr(logits, y), rtol=1e-4, atol=1e-4)
        if classes > 3:
            moved, expected = targeted_dlr(change(logits), y, towards), targeted_dlr(logits, y, towards)
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


def test_with_two_classes_a_shift_moves_nothing_and_dlr_is_the_margin() -> None:
    logits, y = torch.randn(100, 2), torch.randint(2, (100,))
    assert torch.equal(dlr(logits, y), margin(logits, y))
    assert torch.equal(targeted_dlr(logits, y, 1 - y), margin(logits, y))
    torch.testing.assert_close(dlr(logits + 5, y), dlr(logits, y), rtol=0, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_sign_of_dlr_says_whether_the_prediction_is_wrong(classes: int) -> None:
    logits, y = torch.randn(500, classes), torch.randint(classes, (500,))
    assert torch.equal(dlr(logits, y) > 0, logits.argmax(1) != y)


def test_logits_that_are_all_equal_make_no_nan() -> None:
    for classes in (2, 3, 4):
        logits, y = torch.zeros(2, classes, requires_grad=True), torch.tensor([0, 1])
        for value in (dlr(logits, y), targeted_dlr(logits, y, 1 - y)):
            (gradient,) = torch.autograd.grad(value.sum(), logits)
            assert bool(value.isfinite().all())
            assert bool(gradient.isfinite().all())
