from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.attacks.objectives import cross_entropy, input_gradient, margin, margin_of
from lightning_robust.pixels import PixelSpace


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


def test_an_objective_may_bring_its_own_margin() -> None:
    class OneLogit:
        def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
            return self.margin(logits, y)

        def margin(self, logits: Tensor, y: Tensor) -> Tensor:
            return logits * (1 - 2 * y)

    objective = OneLogit()
    assert margin_of(objective) == objective.margin
    assert margin_of(cross_entropy) is margin


def test_cross_entropy_is_per_sample_and_pixels_are_summed() -> None:
    logits, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 2])
    torch.testing.assert_close(cross_entropy(logits, y), F.cross_entropy(logits, y, reduction="none"))
    soft = torch.rand(4, 3).softmax(1)
    torch.testing.assert_close(cross_entropy(logits, soft), -(soft * logits.log_softmax(1)).sum(1))
    dense, classes = torch.randn(4, 3, 5), torch.randint(3, (4, 5))
    torch.testing.assert_close(cross_entropy(dense, classes), F.cross_entropy(dense, classes, reduction="none").sum(1))


def test_low_precision_logits_are_computed_in_float32() -> None:
    logits, y = torch.randn(4, 3).bfloat16(), torch.tensor([0, 2, 1, 2])
    for objective in (cross_entropy, margin):
        assert torch.equal(objective(logits, y), objective(logits.float(), y))
        assert objective(logits, y).dtype == torch.float32


def test_the_input_gradient_of_a_linear_model_is_known_in_pixels() -> None:
    """Logits W (p - m) / s: the gradient of cross-entropy in p is W^T (softmax - onehot) / s, in any batch."""
    space, weight = PixelSpace(mean=(0.5, 0.4), std=(0.25, 0.5)), torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]])
    pixels, y = torch.rand(5, 2), torch.tensor([0, 2, 1, 1, 0])
    std = torch.tensor([0.25, 0.5])
    logits = (pixels - torch.tensor([0.5, 0.4])) / std @ weight.T
    expected = (logits.softmax(1) - F.one_hot(y, 3)) @ weight / std

    gradient = input_gradient(cross_entropy, lambda x: x @ weight.T, space, pixels, y, like=pixels)
    torch.testing.assert_close(gradient, expected)
    alone = input_gradient(cross_entropy, lambda x: x @ weight.T, space, pixels[:1], y[:1], like=pixels)
    torch.testing.assert_close(alone, expected[:1])
