"""Mahalanobis distances, against numpy, scikit-learn and another package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ood.known_features import KNOWN
from sklearn.covariance import EmpiricalCovariance
from torch import Tensor

from lightning_robust.ood.mahalanobis import RelativeMahalanobis


def fitted(
    features: Tensor, labels: Tensor, classes: int = 3, *, shrinkage: float = 1e-6, relative: bool = True
) -> RelativeMahalanobis:
    detector = RelativeMahalanobis(shrinkage=shrinkage, relative=relative)
    detector.add(features, torch.zeros(len(features), classes), labels, torch.arange(len(features)))
    detector.fit()
    return detector


def by_hand(x: np.ndarray, y: np.ndarray, q: np.ndarray, shrinkage: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the nearest class and to the background."""
    means = np.stack([x[y == c].mean(axis=0) for c in np.unique(y)])
    residuals = np.concatenate([x[y == c] - x[y == c].mean(axis=0) for c in np.unique(y)])
    width = x.shape[1]

    def squared(d: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        ridge = shrinkage * np.trace(covariance) / width * np.eye(width)
        return np.einsum("...i,ij,...j->...", d, np.linalg.inv(covariance + ridge), d)

    nearest = squared(q[:, None] - means, residuals.T @ residuals / len(x)).min(axis=1)
    return nearest, squared(q - x.mean(axis=0), np.cov(x.T, bias=True))


X, Q = KNOWN.features.double().numpy(), KNOWN.queries.double().numpy()
Y = KNOWN.labels.numpy()


@pytest.mark.parametrize("shrinkage", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("relative", [True, False])
def test_distances_are_those_of_the_equations(shrinkage: float, relative: bool) -> None:
    nearest, background = by_hand(X, Y, Q, shrinkage)
    found = KNOWN.scores(KNOWN.fitted(RelativeMahalanobis(shrinkage=shrinkage, relative=relative), 64))
    np.testing.assert_allclose(found, nearest - background if relative else nearest, rtol=1e-9)


def test_the_background_is_that_of_scikit_learn() -> None:
    nearest, relative = (
        KNOWN.scores(KNOWN.fitted(RelativeMahalanobis(shrinkage=0, relative=relative))) for relative in (False, True)
    )
    np.testing.assert_allclose(nearest - relative, EmpiricalCovariance().fit(X).mahalanobis(Q), rtol=1e-8)


@pytest.mark.parametrize(
    ("relative", "times", "values"),
    [(False, 600, [10.33144, 0.1652263, 8.411034, 0.1751522]), (True, 300, [18.9846, 0.2830916, 15.34407, 0.3244055])],
)
def test_distances_are_those_of_pytorch_ood_in_other_units(relative: bool, times: int, values: list[float]) -> None:
    """Of pytorch-ood 0.4.0, ``Mahalanobis`` and ``RMD``, computed once on the features of ``known_features``.

    It does not divide covariances by the 300 samples, and halves the distance of ``Mahalanobis``: the order is the
    same. Its covariances are in single precision, which leaves four digits here.
    """
    found = KNOWN.scores(KNOWN.fitted(RelativeMahalanobis(shrinkage=0, relative=relative)))
    torch.testing.assert_close(found, times * torch.tensor(values, dtype=torch.float64), rtol=1e-4, atol=0)


def test_large_means_change_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    noise = (torch.randn(300, 6, generator=g) * 256).round() / 256  # so that sums with 10,000 stay exact in float32
    queries = (3 * torch.randn(20, 6, generator=g) * 256).round() / 256
    near, far = (fitted(noise + shift, KNOWN.labels)(queries + shift) for shift in (0.0, 1e4))
    torch.testing.assert_close(far, near, rtol=1e-7, atol=1e-7)


def test_features_that_never_vary_do_not_count() -> None:
    """Silent units, and features that repeat others, as with a pseudo-inverse."""
    wide = torch.cat([KNOWN.features, torch.zeros(300, 2), torch.full((300, 1), 3.5), KNOWN.features[:, :2]], 1)
    queries = torch.cat([KNOWN.queries, torch.rand(4, 3), KNOWN.queries[:, :2]], 1)
    # The covariance within classes by its pseudo-inverse, and that of all.
    residuals = torch.cat([wide[KNOWN.labels == c] - wide[KNOWN.labels == c].mean(0) for c in range(3)]).double()
    centred = (wide - wide.mean(0)).double()
    inverses = [np.linalg.pinv((r.T @ r / 300).numpy(), rcond=1e-10, hermitian=True) for r in (residuals, centred)]
    means = torch.stack([wide[KNOWN.labels == c].mean(0) for c in range(3)]).double()
    d, d0 = (queries.double()[:, None] - means).numpy(), (queries.double() - wide.mean(0)).numpy()
    expected = np.einsum("nci,ij,ncj->nc", d, inverses[0], d).min(axis=1) - np.einsum(
        "ni,ij,nj->n", d0, inverses[1], d0
    )
    np.testing.assert_allclose(fitted(wide, KNOWN.labels, shrinkage=0)(queries), expected, rtol=1e-4)


def test_a_direction_that_varies_between_classes_only_is_bounded_by_the_shrinkage() -> None:
    wide = torch.cat([KNOWN.features, KNOWN.labels[:, None].float()], 1)
    off = torch.cat([KNOWN.features[:1], torch.tensor([[0.5]])], 1)  # the first sample, between two classes
    on = wide[:1]
    scores = [fitted(wide, KNOWN.labels, shrinkage=s)(torch.cat([on, off])).diff() for s in (1e-6, 1e-4)]
    assert all(bool(s.isfinite().all()) and float(s) > 0 for s in scores)
    assert float(scores[0]) > 50 * float(scores[1])
    with pytest.raises(ValueError, match=r"do not vary within their 3 classes in some direction; raise shrinkage=0"):
        fitted(wide, KNOWN.labels, shrinkage=0)


def test_fewer_samples_than_features_have_finite_scores() -> None:
    g = torch.Generator().manual_seed(0)
    detector = fitted(torch.randn(12, 40, generator=g), torch.arange(12) % 3)
    near, far = detector(torch.zeros(1, 40)), detector(5 * torch.randn(1, 40, generator=g))
    assert torch.isfinite(torch.cat([near, far])).all()


def test_rows_without_a_label_do_not_count() -> None:
    labels = KNOWN.labels.clone()
    labels[200:] = -1
    masked, without = fitted(KNOWN.features, labels), fitted(KNOWN.features[:200], KNOWN.labels[:200])
    torch.testing.assert_close(KNOWN.scores(masked), KNOWN.scores(without))


def test_classes_without_samples_do_not_count() -> None:
    many = fitted(KNOWN.features, 5 * KNOWN.labels + 2, classes=20)
    torch.testing.assert_close(KNOWN.scores(many), KNOWN.scores(fitted(KNOWN.features, KNOWN.labels)))


def test_one_class_has_no_relative_distance_but_an_absolute_one() -> None:
    with pytest.raises(ValueError, match="needs training samples of two classes, got 300 of one; relative=False"):
        fitted(KNOWN.features, torch.zeros(300, dtype=torch.long))
    alone = fitted(KNOWN.features, torch.zeros(300, dtype=torch.long), shrinkage=0, relative=False)
    np.testing.assert_allclose(KNOWN.scores(alone), EmpiricalCovariance().fit(X).mahalanobis(Q), rtol=1e-8)


def test_features_that_are_all_the_same_are_an_error() -> None:
    with pytest.raises(ValueError, match="the features of 300 training samples are all the same"):
        fitted(torch.ones(300, 6), KNOWN.labels)


def test_samples_without_any_label_are_an_error() -> None:
    with pytest.raises(ValueError, match="need labelled training samples"):
        fitted(KNOWN.features, torch.full((300,), -1))


@pytest.mark.parametrize(
    ("labels", "came"),
    [
        (torch.full((300,), 3), r"torch.int64 \(300,\) up to 3"),
        (torch.zeros(300), r"torch.float32 \(300,\) up to 0"),
        (torch.zeros(300, 3, dtype=torch.long), r"torch.int64 \(300, 3\)"),
    ],
)
def test_what_is_no_class_is_an_error(labels: Tensor, came: str) -> None:
    with pytest.raises(ValueError, match=rf"whole numbers in \[0, 3\) or negative where there is none, got {came}"):
        fitted(KNOWN.features, labels)


@pytest.mark.parametrize("shrinkage", [-0.1, 1.0, float("nan")])
def test_a_shrinkage_that_is_no_share_is_refused(shrinkage: float) -> None:
    with pytest.raises(ValueError, match=r"expected a shrinkage in \[0, 1\)"):
        RelativeMahalanobis(shrinkage=shrinkage)
