from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical
from torch.distributions.kl import kl_divergence as reference

from lightning_robust.divergence import kl_divergence


def test_it_is_the_divergence_of_two_categoricals() -> None:
    p, q = torch.randn(16, 7), 3 * torch.randn(16, 7)
    expected = reference(Categorical(logits=p), Categorical(logits=q))
    torch.testing.assert_close(kl_divergence(p.log_softmax(1), q.log_softmax(1)), expected)


def test_further_dimensions_of_a_sample_are_summed() -> None:
    p, q = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    of_pixels = reference(Categorical(logits=p.movedim(1, -1)), Categorical(logits=q.movedim(1, -1)))
    torch.testing.assert_close(kl_divergence(p.log_softmax(1), q.log_softmax(1)), of_pixels.sum((1, 2)))


def test_the_first_argument_weighs() -> None:
    """p = (1/2, 1/2), q = (3/4, 1/4): KL(p||q) = ln 2 - ln(3)/2, KL(q||p) = 3/4 ln 3 - ln 2."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    assert float(kl_divergence(p, q)) == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-5)
    assert float(kl_divergence(q, p)) == pytest.approx(0.75 * math.log(3) - math.log(2), rel=1e-5)


def test_equal_predictions_are_at_zero_and_so_is_the_gradient() -> None:
    logits = torch.randn(5, 4)
    other = logits.clone().requires_grad_()
    divergence = kl_divergence(logits.log_softmax(1), other.log_softmax(1))
    assert torch.equal(divergence, torch.zeros(5))
    (gradient,) = torch.autograd.grad(divergence.sum(), other)
    torch.testing.assert_close(gradient, torch.zeros(5, 4), rtol=0, atol=1e-6)


def test_the_gradient_of_the_attacked_logits_is_the_difference_of_probabilities() -> None:
    p, q = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(kl_divergence(p.log_softmax(1), q.log_softmax(1)).sum(), q)
    torch.testing.assert_close(gradient, (q.softmax(1) - p.softmax(1)).detach())


def test_value_and_gradients_stay_finite_where_probabilities_underflow() -> None:
    p = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]], requires_grad=True)
    q = (-p).detach().requires_grad_()
    divergence = kl_divergence(p.log_softmax(1), q.log_softmax(1))
    assert divergence.tolist() == pytest.approx([400.0, 400.0])  # p is sure of the class that q gives -200 - 200 nats
    gradients = torch.autograd.grad(divergence.sum(), (p, q))
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    torch.testing.assert_close(gradients[1], (q.softmax(1) - p.softmax(1)).detach())


def test_half_precision_is_computed_in_float32() -> None:
    p, q = (torch.randn(4, 3).log_softmax(1).bfloat16() for _ in range(2))
    divergence = kl_divergence(p, q)
    assert divergence.dtype == torch.float32
    torch.testing.assert_close(divergence, kl_divergence(p.float(), q.float()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("p", "q", "message"),
    [
        ((2, 3), (2, 4), r"\(2, 3\) and \(2, 4\)"),
        ((2, 3), (1, 3), r"\(2, 3\) and \(1, 3\)"),
        ((3,), (3,), r"\(3,\) and \(3,\)"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(p: tuple[int, ...], q: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kl_divergence(torch.zeros(p), torch.zeros(q))
