"""Ensembles of maps against numpy and scipy, and in closed form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, rankdata, spearmanr, zscore
from torch import Tensor

from lightning_robust.randomness import seeded
from lightning_robust.saliency.ensemble import NORMALISATIONS, ensemble


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


MAPS = [noise(4, 5, 6), (3 * noise(4, 5, 6, seed=1)).round(), noise(4, 5, 6, seed=2).exp() + noise(4, 5, 6)]


def by_hand(normalise: str) -> np.ndarray:
    """The normalised magnitudes ``(maps, N, D)``."""
    sizes = [np.abs(m.double().flatten(1).numpy()) for m in MAPS]
    if normalise == "rank":
        return np.stack([(rankdata(size, axis=1) - 1) / 29 for size in sizes])
    return np.stack([zscore(size, axis=1) for size in sizes])


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_mean_and_disagreement_are_those_of_the_normalised_magnitudes(normalise: str) -> None:
    found, expected = ensemble(MAPS, normalise), by_hand(normalise)
    np.testing.assert_allclose(found.mean.flatten(1).numpy(), expected.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.disagreement.flatten(1).numpy(), expected.std(0), atol=1e-6)
    assert found.mean.shape == found.disagreement.shape == MAPS[0].shape


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_agreement_is_the_mean_correlation_of_pairs(normalise: str) -> None:
    found = ensemble(MAPS, normalise).agreement.tolist()
    for i, value in enumerate(found):
        pairs = []
        for a, b in itertools.combinations([m[i].double().abs().flatten().numpy() for m in MAPS], 2):
            among = (a != 0) | (b != 0)
            pairs.append(spearmanr(a[among], b[among])[0] if normalise == "rank" else pearsonr(a, b)[0])
        assert value == pytest.approx(float(np.mean(pairs)), abs=1e-12)


def test_maps_of_one_ranking_agree_whatever_their_units_and_signs() -> None:
    size = noise(3, 40).abs()
    found = ensemble({"a": size, "squared": 1e6 * size**2, "signed": size * noise(3, 40).sign()})
    assert found.agreement.tolist() == [1.0] * 3
    assert float(found.disagreement.abs().max()) == 0
    assert found.mean.amin(1).tolist() == [0.0] * 3
    assert found.mean.amax(1).tolist() == [1.0] * 3


def test_scores_keep_how_much_an_input_stands_out_and_do_not_depend_on_scale() -> None:
    size = noise(3, 40).abs()
    assert ensemble([size, 1000 * size], "z").agreement.tolist() == pytest.approx([1.0] * 3)
    assert float(ensemble([size, size**4], "z").agreement.max()) < 0.95


def test_unrelated_maps_do_not_agree() -> None:
    unrelated = [noise(200, 100, seed=seed) for seed in range(4)]
    for normalise in NORMALISATIONS:
        assert float(ensemble(unrelated, normalise).agreement.mean()) == pytest.approx(0, abs=0.02)


def test_zeros_that_all_maps_share_are_no_agreement() -> None:
    inside = torch.zeros(50, 100)
    inside[:, :20] = 1
    maps = [noise(50, 100, seed=seed) * inside for seed in range(3)]
    plain = [spearmanr(a.abs().numpy(), b.abs().numpy()).statistic for a, b in zip(maps[0], maps[1], strict=True)]
    assert float(np.mean(plain)) > 0.9
    assert float(ensemble(maps).agreement.mean()) == pytest.approx(0, abs=0.1)


def test_two_maps_disagree_by_half_of_their_distance_where_one_looks_and_the_other_does_not() -> None:
    found = ensemble([torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])])
    assert found.disagreement.tolist() == [[0.5, 0.0, 0.5]]
    assert found.agreement.tolist() == [-1.0]


def test_constant_maps_are_in_the_middle_and_agree_with_constant_ones_only() -> None:
    flat, rough = torch.full((1, 5), 3.0), torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    for normalise, middle in zip(NORMALISATIONS, (0.5, 0.0), strict=True):
        assert ensemble([flat, torch.zeros(1, 5)], normalise).mean.tolist() == [[middle] * 5]
        assert ensemble([flat, flat], normalise).agreement.tolist() == [1.0]
        assert ensemble([flat, rough], normalise).agreement.tolist() == [0.0]


def test_a_lone_input_is_in_the_middle() -> None:
    for normalise, middle in zip(NORMALISATIONS, (0.5, 0.0), strict=True):
        assert ensemble([torch.ones(2, 1), torch.zeros(2, 1)], normalise).mean.tolist() == [[middle]] * 2


def test_one_broken_map_marks_its_sample_alone() -> None:
    broken = MAPS[0].clone()
    broken[1, 0, 0] = torch.nan
    for normalise in NORMALISATIONS:
        found, whole = ensemble([broken, *MAPS[1:]], normalise), ensemble(MAPS, normalise)
        for name in ("mean", "disagreement", "agreement"):
            values = getattr(found, name)
            assert bool(values[1].isnan().all())
            assert torch.equal(values[[0, 2, 3]], getattr(whole, name)[[0, 2, 3]])


def test_what_makes_no_ensemble_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="two maps or more, got 1"):
        ensemble([MAPS[0]])
    with pytest.raises(ValueError, match=r"gradient is \(4, 5, 6\), gradcam \(4, 2, 3\). Enlarge"):
        ensemble({"gradient": MAPS[0], "gradcam": torch.ones(4, 2, 3)})
    with pytest.raises(ValueError, match="one of rank, z; got 'max'"):
        ensemble(MAPS, "max")
    with pytest.raises(ValueError, match=r"expected maps \(N, ...\), got \(3,\) for map 0"):
        ensemble([torch.ones(3), torch.ones(3)])
