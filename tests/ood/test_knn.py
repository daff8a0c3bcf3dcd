"""Distances to neighbours, against scikit-learn and another package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ood.known_features import KNOWN
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from torch import Tensor

from lightning_robust.ood.knn import KNN
from lightning_robust.randomness import priorities


@pytest.mark.parametrize("k", [1, 5, 50, 300])
@pytest.mark.parametrize("normalized", [True, False])
def test_distances_are_those_of_scikit_learn(k: int, normalized: bool) -> None:
    prepare = normalize if normalized else np.asarray
    points, queries = (prepare(x.double().numpy()) for x in (KNOWN.features, KNOWN.queries))
    reference = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(points).kneighbors(queries)[0][:, -1]
    found = KNOWN.scores(KNOWN.fitted(KNN(k, normalize=normalized)))
    np.testing.assert_allclose(found, reference, rtol=1e-10)


@pytest.mark.parametrize(
    ("normalized", "values"),
    [(True, [1.161456, 0.508996, 0.614718, 0.4702802]), (False, [13.28415, 7.374714, 9.446947, 5.195599])],
)
def test_distances_are_those_of_pytorch_ood(normalized: bool, values: list[float]) -> None:
    """Of pytorch-ood 0.4.0, ``KNN(None, k=5, normalize=...)``, computed once on the features of ``known_features``."""
    found = KNOWN.scores(KNOWN.fitted(KNN(5, normalize=normalized)))
    torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=0)


def test_distances_stay_exact_where_features_nearly_agree_and_lie_far_out() -> None:
    """In single precision products leave nothing of them."""
    features = 1e4 + torch.tensor([[0.0, 0.0], [0.25, 0.0], [0.0, 0.5]])
    knn = KNN(1, normalize=False)
    knn.add(features, torch.zeros(3, 2), torch.zeros(3), torch.arange(3))
    knn.fit()
    found = knn(features + torch.tensor([0.0, 0.125]))
    torch.testing.assert_close(found, torch.full((3,), 0.125, dtype=torch.float64), rtol=1e-5, atol=0)


def test_lengths_mean_nothing_unless_they_are_asked_for() -> None:
    logits = torch.zeros(4, 3)
    alike, other = (KNOWN.fitted(KNN(5, normalize=normalized)) for normalized in (True, False))
    torch.testing.assert_close(alike(7 * KNOWN.queries, logits), KNOWN.scores(alike))
    assert (other(7 * KNOWN.queries, logits) > KNOWN.scores(other)).all()


def test_neighbours_are_sought_in_the_random_sample_that_priorities_choose() -> None:
    kept = priorities(KNOWN.index, 3).argsort()[:40]
    points, queries = (normalize(x.double().numpy()) for x in (KNOWN.features[kept], KNOWN.queries))
    reference = NearestNeighbors(n_neighbors=5).fit(points).kneighbors(queries)[0][:, -1]
    np.testing.assert_allclose(KNOWN.scores(KNOWN.fitted(KNN(5, capacity=40, seed=3), 64)), reference, rtol=1e-10)


def test_many_queries_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    knn = KNOWN.fitted(KNN(5))
    whole = knn(KNOWN.features, KNOWN.logits)
    monkeypatch.setattr(f"{KNN.__module__}.CHUNK", 2000)
    torch.testing.assert_close(knn(KNOWN.features, KNOWN.logits), whole, rtol=1e-6, atol=1e-7)


def test_silent_features_have_no_direction_and_a_score_all_the_same() -> None:
    found = KNOWN.fitted(KNN(5))(torch.zeros(1, 6), torch.zeros(1, 3))
    assert found.tolist() == pytest.approx([1.0])  # from the origin to the unit sphere


def test_with_fewer_samples_than_k_the_farthest_counts_with_a_warning() -> None:
    few = KNN(50)
    KNOWN.fed(few, 300, slice(0, 7))
    with pytest.warns(UserWarning, match="k=50 is more than the 7 training features; k=7"):
        few.fit()
    reference = KNN(7)
    KNOWN.fed(reference, 300, slice(0, 7)).fit(None)
    assert torch.equal(KNOWN.scores(few), KNOWN.scores(reference))


@pytest.mark.parametrize(("k", "capacity"), [(0, 5000), (-1, 5000), (51, 50)])
def test_a_k_that_no_bank_can_serve_is_refused(k: int, capacity: int) -> None:
    with pytest.raises(ValueError, match=f"1 <= k <= capacity, got k={k} and capacity={capacity}"):
        KNN(k, capacity=capacity)


def test_labels_mean_nothing() -> None:
    def scored(labels: Tensor) -> Tensor:
        knn = KNN(5)
        knn.add(KNOWN.features, KNOWN.logits, labels, KNOWN.index)
        knn.fit()
        return KNOWN.scores(knn)

    assert torch.equal(scored(KNOWN.labels), scored(torch.full((300,), -1)))
