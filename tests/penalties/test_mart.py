"""MART's two terms against the formula in plain probabilities, and where those have no logarithm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_robust.losses import LossCall
from lightning_robust.penalties.mart import misclassification_aware
from lightning_robust.penalties.robust_terms import mart


def by_hand(p: Tensor, q: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sample by sample, class by class."""
    margins, divergences = [], []
    for clean, attacked, label in zip(p, q, y.tolist(), strict=True):
        wrong = max(float(value) for k, value in enumerate(attacked) if k != label)
        margins.append(-torch.tensor(1 - wrong).log())
        kl = sum(a * (a / b).log() for a, b in zip(clean, attacked, strict=True))
        divergences.append(kl * (1 - clean[label]))
    return torch.stack(margins), torch.stack(divergences)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_both_terms_are_those_of_the_paper(classes: int) -> None:
    z, attacked, y = torch.randn(32, classes), torch.randn(32, classes), torch.randint(classes, (32,))
    found = misclassification_aware(z.log_softmax(1), attacked.log_softmax(1), y)
    for one, other in zip(found, by_hand(z.softmax(1), attacked.softmax(1), y), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_their_gradients_are_those_of_the_paper_through_both_predictions() -> None:
    z, attacked, y = torch.randn(8, 4, dtype=torch.double), torch.randn(8, 4, dtype=torch.double), torch.arange(8) % 4

    def total(a: Tensor, b: Tensor) -> Tensor:
        return sum(term.sum() for term in misclassification_aware(a.log_softmax(1), b.log_softmax(1), y))  # type: ignore[return-value]  # sum of tensors

    assert torch.autograd.gradcheck(total, (z.requires_grad_(), attacked.requires_grad_()))


@pytest.mark.parametrize("size", [30.0, 200.0, 1e4])
@pytest.mark.parametrize("right", [True, False])
def test_very_sure_predictions_have_finite_terms_and_gradients(size: float, right: bool) -> None:
    y = torch.tensor([0, 1, 2])
    logits = (size * torch.eye(3)[y if right else (y + 1) % 3]).requires_grad_()
    clean = (-logits).detach().requires_grad_()
    terms = misclassification_aware(clean.log_softmax(1), logits.log_softmax(1), y)
    gradients = torch.autograd.grad(sum(term.sum() for term in terms), [clean, logits])
    assert all(bool(value.isfinite().all()) for value in [*terms, *gradients])
    # Where it is wrong, the other two classes have exp(-size) together twice.
    expected = 0.0 if right else size - math.log(2)
    assert terms[0].min().item() == pytest.approx(expected, rel=1e-6, abs=1e-4)


def test_where_there_is_no_right_class_there_is_nothing() -> None:
    z, y = torch.randn(4, 5), torch.tensor([-100, 0, -1, 3])
    for term in misclassification_aware(z.log_softmax(1), z.flip(1).log_softmax(1), y):
        assert (term == 0).tolist() == [True, False, True, False]


def test_pixels_are_predictions_of_their_own() -> None:
    z, attacked, y = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    rows = [value.movedim(1, -1).reshape(-1, 5).log_softmax(1) for value in (z, attacked)]
    expected = misclassification_aware(*rows, y.flatten())
    found = misclassification_aware(z.log_softmax(1), attacked.log_softmax(1), y)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.flatten(), other)


def test_every_head_has_terms() -> None:
    soft = torch.randn(6, 4).softmax(1)
    heads = [
        LossCall("cross_entropy", torch.randn(6, 4), torch.arange(6) % 4),
        LossCall("cross_entropy", torch.randn(6, 4), soft),
        LossCall("nll_loss", torch.randn(6, 4).log_softmax(1), torch.arange(6) % 4),
        LossCall("cross_entropy", torch.randn(6, 4, 2, 2), torch.randint(4, (6, 2, 2))),
        LossCall("binary_cross_entropy_with_logits", torch.randn(6), torch.arange(6) % 2.0),
        LossCall("binary_cross_entropy_with_logits", torch.randn(6, 1), (torch.arange(6) % 2.0).view(6, 1)),
        LossCall("binary_cross_entropy", torch.rand(6, 3), torch.ones(6, 3)),
    ]
    for call in heads:
        other = call.again(call.logits.flip(0))
        terms = mart(call, other, beta=2.0)
        assert {name: value.shape for name, value in terms.items()} == {"margin": (), "kl": ()}
        assert all(bool(value.isfinite()) and float(value) > 0 for value in terms.values())
        assert float(mart(call, call, beta=2.0)["kl"]) == 0.0
        half = mart(call, other, beta=1.0)
        torch.testing.assert_close(terms["kl"], 2 * half["kl"])
        assert torch.equal(terms["margin"], half["margin"])


def test_soft_targets_count_as_their_likeliest_class() -> None:
    z, attacked, y = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 4
    soft = 0.7 * torch.nn.functional.one_hot(y, 4) + 0.3 * torch.full((6, 4), 0.25)
    hard, smooth = LossCall("cross_entropy", z, y), LossCall("cross_entropy", z, soft)
    for name, value in mart(hard, hard.again(attacked), 1.0).items():
        torch.testing.assert_close(mart(smooth, smooth.again(attacked), 1.0)[name], value)
