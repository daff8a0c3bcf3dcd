"""What all detectors have in common, and how they are called."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from ood.known_features import KNOWN, linear
from ood.processes_together import together
from torch import Tensor

from lightning_robust.ood import separation
from lightning_robust.ood.detectors import DETECTORS, Detector, detectors_named
from lightning_robust.ood.knn import KNN
from lightning_robust.ood.mahalanobis import RelativeMahalanobis
from lightning_robust.ood.vim import ViM

MADE: dict[str, Callable[[], Detector]] = {
    "mahalanobis": RelativeMahalanobis,
    "absolute": lambda: RelativeMahalanobis(relative=False),
    "knn": lambda: KNN(k=5, capacity=40),
    "vim": lambda: ViM(dim=3, capacity=40),
}
each_detector = pytest.mark.parametrize("made", MADE.values(), ids=MADE)


@each_detector
@pytest.mark.parametrize("size", [1, 7, 299])
def test_batches_mean_nothing(made: Callable[[], Detector], size: int) -> None:
    whole, parts = (KNOWN.scores(KNOWN.fitted(made(), s)) for s in (300, size))
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


@each_detector
def test_the_order_of_samples_means_nothing(made: Callable[[], Detector]) -> None:
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    shuffled = KNOWN.fed(made(), 64, order)
    shuffled.fit(KNOWN.head)
    torch.testing.assert_close(KNOWN.scores(shuffled), KNOWN.scores(KNOWN.fitted(made())), rtol=1e-9, atol=1e-9)


@each_detector
@pytest.mark.parametrize("shares", [(150, 150), (299, 1), (0, 300), (100, 0, 200)])
def test_every_one_of_several_processes_scores_as_one_does(made: Callable[[], Detector], shares: Sequence[int]) -> None:
    parts = [made() for _ in shares]
    for detector, rows in zip(parts, KNOWN.index.split(list(shares)), strict=True):
        if len(rows):
            KNOWN.fed(detector, 64, rows)
    together([detector.reduce for detector in parts])
    whole = KNOWN.scores(KNOWN.fitted(made()))
    for detector in parts:
        detector.fit(KNOWN.head)
        torch.testing.assert_close(KNOWN.scores(detector), whole, rtol=1e-9, atol=1e-9)
    assert len({tuple(KNOWN.scores(detector).tolist()) for detector in parts}) == 1


@each_detector
def test_without_samples_in_any_process_there_is_an_error_and_no_waiting(made: Callable[[], Detector]) -> None:
    parts = [made(), made()]
    together([detector.reduce for detector in parts])
    with pytest.raises(ValueError, match=r"call add\(\).* before fit\(\)"):
        parts[0].fit(KNOWN.head)


@each_detector
def test_a_checkpoint_brings_back_every_bit(made: Callable[[], Detector]) -> None:
    detector, file = KNOWN.fitted(made()), io.BytesIO()
    torch.save(detector.state(), file)
    file.seek(0)
    again = made()
    again.load(torch.load(file, weights_only=True))
    assert torch.equal(KNOWN.scores(again), KNOWN.scores(detector))


@each_detector
def test_a_detector_that_learned_nothing_has_nothing_to_save(made: Callable[[], Detector]) -> None:
    detector = KNOWN.fitted(made())
    empty = made()
    assert empty.state() == {}
    detector.load(empty.state())
    with pytest.raises(RuntimeError, match=r"not fitted: call add\(\) with training samples, then fit\(\)"):
        KNOWN.scores(detector)


@each_detector
def test_to_begin_is_to_forget(made: Callable[[], Detector]) -> None:
    detector = KNOWN.fitted(made())
    KNOWN.fed(detector)
    detector.begin()
    with pytest.raises(RuntimeError, match="not fitted"):
        KNOWN.scores(detector)
    assert torch.equal(KNOWN.scores(KNOWN.fitted(detector)), KNOWN.scores(KNOWN.fitted(made())))


@each_detector
def test_fitting_lets_go_of_the_training_samples(made: Callable[[], Detector]) -> None:
    detector = KNOWN.fitted(made())
    with pytest.raises(ValueError, match=r"call add\(\)"):
        detector.fit(KNOWN.head)


@each_detector
def test_features_that_are_no_numbers_neither_teach_nor_get_a_score(made: Callable[[], Detector]) -> None:
    dirty, detector = KNOWN.features.clone(), made()
    dirty[10], dirty[20, 3] = torch.nan, torch.inf
    with pytest.warns(UserWarning, match="2 of 300 training rows"):
        detector.add(dirty, KNOWN.logits, KNOWN.labels, KNOWN.index)
    detector.fit(KNOWN.head)
    clean = KNOWN.fed(made(), 300, torch.tensor([i for i in range(300) if i not in (10, 20)]))
    clean.fit(KNOWN.head)
    torch.testing.assert_close(KNOWN.scores(detector), KNOWN.scores(clean), rtol=1e-9, atol=1e-9)
    scores = detector(dirty[:30], KNOWN.logits[:30])
    assert scores.isnan().nonzero()[:, 0].tolist() == [10, 20]


@each_detector
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_precision_is_computed_in_double(made: Callable[[], Detector], dtype: torch.dtype) -> None:
    queries, logits = KNOWN.queries.to(dtype), KNOWN.head(KNOWN.queries).detach()
    detector = KNOWN.fitted(made())
    found = detector(queries, logits)
    assert found.dtype == torch.float64
    assert torch.equal(found, detector(queries.double(), logits))


@each_detector
def test_what_is_learned_in_inference_mode_serves_outside_of_it(made: Callable[[], Detector]) -> None:
    with torch.inference_mode():
        detector = KNOWN.fed(made(), 100, slice(0, 200))
    KNOWN.fed(detector, 100, slice(200, 300))
    with torch.inference_mode():
        detector.fit(KNOWN.head)
    torch.testing.assert_close(KNOWN.scores(detector), KNOWN.scores(KNOWN.fitted(made())), rtol=1e-9, atol=1e-9)
    assert not detector(KNOWN.queries.clone().requires_grad_(), KNOWN.head(KNOWN.queries)).requires_grad


@each_detector
def test_no_queries_have_no_scores(made: Callable[[], Detector]) -> None:
    assert KNOWN.fitted(made())(torch.zeros(0, 6), torch.zeros(0, 3)).shape == (0,)


@each_detector
def test_a_batch_without_rows_teaches_nothing(made: Callable[[], Detector]) -> None:
    detector = KNOWN.fed(made())
    KNOWN.fed(detector, 300, slice(0, 0))
    detector.fit(KNOWN.head)
    assert torch.equal(KNOWN.scores(detector), KNOWN.scores(KNOWN.fitted(made())))


@each_detector
def test_features_of_another_layer_are_an_error(made: Callable[[], Detector]) -> None:
    with pytest.raises(ValueError, match=r"expected features \(N, 6\) as learned from, got \(4, 5\)"):
        KNOWN.fitted(made())(torch.zeros(4, 5), torch.zeros(4, 3))


@each_detector
def test_the_global_stream_is_left_alone(made: Callable[[], Detector]) -> None:
    before = torch.get_rng_state()
    KNOWN.scores(KNOWN.fitted(made()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", DETECTORS)
def test_far_points_are_told_from_clusters(name: str) -> None:
    """Ten clusters with well-aligned logits, and points between them that no class has."""
    g = torch.Generator().manual_seed(0)
    centres = 6 * torch.linalg.qr(torch.randn(64, 64, generator=g)).Q[:10]
    labels = torch.arange(2000) % 10
    features = centres[labels] + 0.5 * torch.randn(2000, 64, generator=g)
    strangers = 6 * torch.nn.functional.normalize(torch.randn(500, 64, generator=g))
    head = linear(centres / 6, torch.zeros(10))
    detector = DETECTORS[name]()
    with torch.no_grad():
        detector.add(features[:1500], head(features[:1500]), labels[:1500], torch.arange(1500))
        detector.fit(head)
        inside, outside = (detector(x, head(x)) for x in (features[1500:], strangers))
    assert separation(inside, outside)["auroc"] > 0.99


# -- by name ---------------------------------------------------------------------------------------------------------


class OwnOODDetector:
    """Follows the protocol without a base class."""

    def begin(self) -> None: ...

    def add(self, features: Tensor, logits: Tensor, labels: Tensor, index: Tensor) -> None: ...

    def reduce(self, summed: Any) -> None: ...

    def fit(self, head: Any) -> None: ...

    def __call__(self, features: Tensor, logits: Tensor) -> Tensor:
        return features.norm(dim=1)

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None: ...


def test_detectors_come_by_name_in_the_order_asked_for_each_of_its_own() -> None:
    first, second = detectors_named(["vim", "knn"]), detectors_named(["vim", "knn"])
    assert [(name, type(made)) for name, made in first.items()] == [("vim", ViM), ("knn", KNN)]
    assert first["vim"] is not second["vim"]
    assert detectors_named([]) == {}


def test_objects_are_called_as_their_class_is() -> None:
    given: list[str | Detector] = [
        ViM(dim=3),
        KNN(k=3),
        RelativeMahalanobis(),
        RelativeMahalanobis(relative=False),
        OwnOODDetector(),
    ]
    names = ["vim", "knn", "mahalanobis", "mahalanobis_absolute", "own_ood_detector"]
    assert list(detectors_named(given).items()) == list(zip(names, given, strict=True))


def test_an_object_with_a_name_is_called_by_it() -> None:
    near, far = KNN(k=1), KNN(k=100)
    near.name = "knn1"  # type: ignore[attr-defined]  # as a user would
    assert list(detectors_named([near, far])) == ["knn1", "knn"]


def test_two_detectors_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="two detectors are called 'knn'; give one of them another `name`"):
        detectors_named(["knn", KNN(k=3)])


@pytest.mark.parametrize(("wrong", "right"), [("mahalonobis", "mahalanobis"), ("kn", "knn"), ("ViM", "vim")])
def test_an_unknown_detector_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"got '{wrong}'. Did you mean '{right}'"):
        detectors_named([wrong])


def test_a_detector_that_is_like_none_names_all() -> None:
    with pytest.raises(ValueError, match=r"mahalanobis, knn, vim; got 'zzz'\.$"):
        detectors_named(["zzz"])


def test_what_is_no_detector_is_an_error_that_names_what_it_lacks() -> None:
    with pytest.raises(TypeError, match="got dict without begin, add, reduce, fit, __call__, state, load"):
        detectors_named([{}])  # type: ignore[list-item]  # that is the point


def test_a_class_is_not_yet_a_detector() -> None:
    with pytest.raises(TypeError, match=r"got the class KNN; call it: KNN\(\)"):
        detectors_named([KNN])  # type: ignore[list-item]  # that is the point
