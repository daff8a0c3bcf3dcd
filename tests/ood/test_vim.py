"""Virtual logits, against numpy by hand and another package."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import torch
from ood.known_features import KNOWN, linear
from sklearn.covariance import EmpiricalCovariance
from torch import Tensor

from lightning_robust.ood.vim import ViM, dim_of
from lightning_robust.randomness import priorities


def by_hand(dim: int, bias: bool = True, kept: Tensor | slice = slice(None)) -> np.ndarray:
    """The paper's equations in numpy; alpha's norm over the samples that are kept."""
    x, q = KNOWN.features.double().numpy(), KNOWN.queries.double().numpy()
    w, b = (p.detach().double().numpy() for p in KNOWN.head.parameters())
    origin = -np.linalg.pinv(w) @ b if bias else np.zeros(6)
    covariance = EmpiricalCovariance(assume_centered=True).fit(x - origin).covariance_
    values, vectors = np.linalg.eig(covariance)
    residual = vectors[:, np.argsort(values)[::-1][dim:]]
    logits, alike = x @ w.T + b, np.linalg.norm((x - origin)[kept] @ residual, axis=1)
    alpha = logits.max(axis=1).mean() / alike.mean()
    return alpha * np.linalg.norm((q - origin) @ residual, axis=1) - scipy.special.logsumexp(q @ w.T + b, axis=1)


@pytest.mark.parametrize("dim", [1, 3, 5])
def test_scores_are_those_of_the_equations(dim: int) -> None:
    np.testing.assert_allclose(KNOWN.scores(KNOWN.fitted(ViM(dim))), by_hand(dim), rtol=1e-5)


def test_scores_are_those_of_pytorch_ood() -> None:
    """Of pytorch-ood 0.4.0, ``ViM(None, 3, w, b)``, computed once on the features of ``known_features``."""
    values = torch.tensor([7.732481, 4.996053, 9.054378, 1.231333], dtype=torch.float64)
    torch.testing.assert_close(KNOWN.scores(KNOWN.fitted(ViM(3))), values, rtol=1e-5, atol=0)


def test_without_a_bias_the_origin_is_zero() -> None:
    vim = ViM(3)
    KNOWN.fed(vim).fit(linear(KNOWN.head.weight.detach(), None))
    np.testing.assert_allclose(KNOWN.scores(vim), by_hand(3, bias=False), rtol=1e-5)


def test_the_norm_is_averaged_over_the_random_sample_that_priorities_choose() -> None:
    kept = priorities(KNOWN.index, 3).argsort()[:40]
    np.testing.assert_allclose(KNOWN.scores(KNOWN.fitted(ViM(3, capacity=40, seed=3), 64)), by_hand(3, kept=kept), 1e-5)


def test_half_of_few_features_are_principal() -> None:
    assert torch.equal(KNOWN.scores(KNOWN.fitted(ViM())), KNOWN.scores(KNOWN.fitted(ViM(3))))


@pytest.mark.parametrize(
    ("width", "dim"), [(2, 1), (5, 2), (767, 383), (768, 512), (2047, 512), (2048, 1000), (4096, 1000)]
)
def test_dimensions_are_those_of_the_paper_where_it_names_them(width: int, dim: int) -> None:
    assert dim_of(width, None) == dim


@pytest.mark.parametrize("dim", [6, 7, 512])
def test_a_subspace_that_leaves_nothing_over_is_refused_before_the_pass(dim: int) -> None:
    with pytest.raises(ValueError, match=f"1 <= dim < 6, the number of features, got dim={dim}"):
        KNOWN.fed(ViM(dim))


def test_one_feature_leaves_nothing_over() -> None:
    with pytest.raises(ValueError, match="1 <= dim < 1, the number of features, got dim=0"):
        dim_of(1, None)


def test_a_dim_below_1_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="at least one dimension, got dim=0"):
        ViM(0)


def test_features_that_lie_in_the_subspace_are_an_error_and_not_an_infinite_alpha() -> None:
    g = torch.Generator().manual_seed(0)
    flat = torch.randn(50, 2, generator=g) @ torch.randn(2, 6, generator=g)
    vim = ViM(3)
    vim.add(flat, KNOWN.logits[:50], KNOWN.labels[:50], KNOWN.index[:50])
    with pytest.raises(ValueError, match="lie in 3 of 6 dimensions"):
        vim.fit(linear(KNOWN.head.weight.detach(), None))


def test_log_probabilities_are_an_error_and_not_a_score_that_is_turned_about() -> None:
    vim = ViM(3)
    vim.add(KNOWN.features, KNOWN.logits.log_softmax(1), KNOWN.labels, KNOWN.index)
    with pytest.raises(ValueError, match="largest is positive on average, got -"):
        vim.fit(KNOWN.head)


def test_no_last_layer_is_an_error_that_says_what_to_name() -> None:
    with pytest.raises(
        ValueError, match=r"name the module whose output the logits are, or take 'mahalanobis' or 'knn'"
    ):
        KNOWN.fed(ViM(3)).fit(None)


def test_a_last_layer_of_other_features_is_an_error() -> None:
    with pytest.raises(ValueError, match="the 6 features that were learned from, got one that takes 5"):
        KNOWN.fed(ViM(3)).fit(linear(torch.ones(3, 5), None))


def test_a_last_layer_in_half_precision_serves() -> None:
    vim = ViM(3)
    KNOWN.fed(vim).fit(linear(KNOWN.head.weight.detach(), KNOWN.head.bias.detach()).to(torch.bfloat16))
    torch.testing.assert_close(KNOWN.scores(vim), KNOWN.scores(KNOWN.fitted(ViM(3))), rtol=0.02, atol=0.1)


def test_the_score_is_the_log_odds_of_the_virtual_class() -> None:
    vim = KNOWN.fitted(ViM(3))
    logits = KNOWN.head(KNOWN.queries).detach().double()
    score = KNOWN.scores(vim)
    virtual = score + logits.logsumexp(1)
    probability = torch.cat([logits, virtual[:, None]], 1).softmax(1)[:, -1]
    torch.testing.assert_close(probability.logit(), score, rtol=1e-5, atol=1e-6)


def test_of_few_training_samples_the_subspace_is_half_as_large_as_they_are_many() -> None:
    generator = torch.Generator().manual_seed(0)
    features, head = torch.randn(40, 64, generator=generator), torch.nn.Linear(64, 3)
    with torch.no_grad():
        logits = head(features) + 5
    by_default, named = ViM(), ViM(dim=20)
    for vim in (by_default, named):
        vim.add(features, logits, torch.arange(40) % 3, torch.arange(40))
        vim.fit(head)
    x = torch.randn(9, 64, generator=generator)
    assert torch.equal(by_default(x, head(x).detach()), named(x, head(x).detach()))
