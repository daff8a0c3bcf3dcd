"""Scores against scipy, in the precision that they promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from lightning_robust import ood
from lightning_robust.ood import SCORES, scores_named, two_class

LOGITS = 5 * torch.randn(200, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PROBABILITIES = scipy.special.softmax(LOGITS.numpy(), axis=1)
REFERENCES = {
    "energy": -scipy.special.logsumexp(LOGITS.numpy(), axis=1),
    "max_logit": -LOGITS.numpy().max(axis=1),
    "msp": np.log(np.sort(PROBABILITIES, axis=1)[:, :-1].sum(axis=1)),
    "entropy": scipy.stats.entropy(PROBABILITIES, axis=1),
    "gen": ((PROBABILITIES * np.stack([np.delete(PROBABILITIES, k, 1).sum(1) for k in range(10)], 1)) ** 0.1).sum(
        axis=1
    ),
    "margin": -np.diff(np.sort(LOGITS.numpy(), axis=1))[:, -1],
}

each_score = pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_scores_are_those_of_scipy(name: str, dtype: torch.dtype, rtol: float) -> None:
    found = SCORES[name](LOGITS.to(dtype))
    assert found.dtype == dtype
    assert found.shape == (200,)
    np.testing.assert_allclose(found.numpy(), REFERENCES[name], rtol=rtol, atol=1e-6)


@each_score
def test_the_undecided_row_is_more_foreign_than_the_sure_one(score: Callable[[Tensor], Tensor]) -> None:
    sure, undecided = score(torch.tensor([[9.0, 0.0, 0.0], [0.1, 0.0, 0.0]]))
    assert undecided > sure


@each_score
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(score: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    half = LOGITS.to(dtype)
    assert torch.equal(score(half), score(half.float()))
    assert score(half).dtype == torch.float32


def test_msp_goes_on_ranking_where_the_largest_probability_is_1() -> None:
    gaps = torch.tensor([20.0, 40.0, 80.0, 160.0])
    logits = torch.stack([gaps, torch.zeros(4), torch.zeros(4)], dim=1)
    assert logits.softmax(1).amax(1).tolist() == [1.0] * 4
    # 1 - p_max = 2 / (e^gap + 2), which is 2 e^-gap to eight digits
    torch.testing.assert_close(ood.msp(logits), torch.log(torch.tensor(2.0)) - gaps)


def test_msp_of_equal_logits_is_that_of_the_other_classes_together() -> None:
    torch.testing.assert_close(ood.msp(torch.full((1, 4), 7.0)), torch.tensor([0.75]).log())


def test_msp_of_a_thousand_undecided_classes_keeps_its_small_difference_from_0() -> None:
    torch.testing.assert_close(
        ood.msp(torch.full((1, 1000), 30.0)), torch.tensor([math.log1p(-0.001)]), rtol=2e-6, atol=0
    )


def test_classes_that_are_ruled_out_count_as_if_they_were_not_there() -> None:
    three = LOGITS[:, :3]
    four = torch.cat([three, torch.full((200, 1), -torch.inf)], dim=1)
    for score in SCORES.values():
        torch.testing.assert_close(score(four), score(three))


def test_logits_between_0_and_1_are_logits_all_the_same() -> None:
    logits = torch.tensor([[0.2, 0.8]])
    assert float(ood.entropy(logits)) == pytest.approx(scipy.stats.entropy(scipy.special.softmax([0.2, 0.8])), abs=1e-6)


@each_score
def test_batches_of_8_and_of_1000_agree_bit_for_bit(score: Callable[[Tensor], Tensor]) -> None:
    logits = 5 * torch.randn(1000, 100, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat([score(z) for z in logits.split(8)]), score(logits))


@each_score
def test_rows_whose_largest_probability_is_1_are_still_ranked_by_the_gap(score: Callable[[Tensor], Tensor]) -> None:
    gaps = torch.arange(18.0, 100.0, 2.0)
    logits = torch.stack([gaps, torch.zeros(41), torch.zeros(41)], dim=1)
    assert logits.softmax(1).amax(1).tolist() == [1.0] * 41
    assert bool((score(logits).diff() < 0).all())


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "energy": [-4.965265274, -3.866508722, -7.092218399, -7.345125675, -6.182858943],
        "max_logit": [-4.861652374, -2.793373346, -6.769671440, -7.309191227, -5.729093552],
        "msp": [-0.901574135, -0.341934711, -0.724301994, -0.964703500, -0.635231793],
        "entropy": [0.464992762, 1.653223634, 0.789944351, 0.176053658, 1.194095016],
        "gen": [5.987030029, 7.091361046, 6.059927940, 4.881718159, 6.414420605],
    }.items(),
)
def test_scores_are_those_of_pytorch_ood(name: str, values: list[float]) -> None:
    # pytorch_ood 0.4.0 on the same logits: EnergyBased, MaxLogit, MaxSoftmax, Entropy, and ten times GEN, a mean there.
    z = 3 * torch.randn(5, 10, generator=torch.Generator().manual_seed(3))
    found = ood.msp(z).expm1() if name == "msp" else SCORES[name](z)  # minus the largest probability, as there
    np.testing.assert_allclose(found.numpy(), values, rtol=2e-6)


def test_gen_looks_at_the_hundred_likeliest_classes() -> None:
    logits = 3 * torch.randn(20, 300, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    p = np.sort(scipy.special.softmax(logits.numpy(), axis=1), axis=1)[:, -100:]
    np.testing.assert_allclose(ood.gen(logits).numpy(), ((p * (1 - p)) ** 0.1).sum(axis=1), rtol=1e-10)


def test_gen_of_a_saturated_row_in_single_precision_is_that_in_double() -> None:
    gaps = torch.tensor([20.0, 40.0, 80.0])
    logits = torch.stack([gaps, torch.zeros(3)], dim=1)
    # two classes: 2 (p (1 - p))^0.1, and p (1 - p) is e^-gap to eight digits
    torch.testing.assert_close(ood.gen(logits), 2 * (-0.1 * gaps).exp())


@each_score
def test_one_class_alone_is_as_familiar_as_can_be(score: Callable[[Tensor], Tensor]) -> None:
    alone, two = score(torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, -1.0, -torch.inf]]))
    assert not alone.isnan()
    assert alone <= two or score is ood.energy  # whose level counts, not only the shape


def test_tied_logits_have_no_margin() -> None:
    assert ood.margin(torch.tensor([[2.0, 2.0, 1.0]])).tolist() == [0.0]


def test_two_classes_say_what_the_sigmoid_says() -> None:
    z = torch.linspace(-8, 8, 33)
    torch.testing.assert_close(two_class(z).softmax(1), torch.stack([1 - z.sigmoid(), z.sigmoid()], dim=1))
    assert torch.equal(two_class(z.unsqueeze(1)), two_class(z))


@each_score
def test_a_sure_no_is_as_familiar_as_a_sure_yes(score: Callable[[Tensor], Tensor]) -> None:
    z = torch.linspace(0, 30, 31)
    torch.testing.assert_close(score(two_class(-z)), score(two_class(z)))
    assert bool((score(two_class(z)).diff() <= 0).all())


def test_the_energy_of_a_yes_no_head_in_closed_form() -> None:
    z = torch.tensor([0.0, 1.0, 6.0])
    torch.testing.assert_close(ood.energy(two_class(z)), -(2 * torch.cosh(z / 2)).log())


def test_scores_come_by_name_in_the_order_asked_for() -> None:
    assert list(scores_named(["msp", "energy"]).items()) == [("msp", ood.msp), ("energy", ood.energy)]
    assert scores_named([]) == {}


@pytest.mark.parametrize(("wrong", "right"), [("enrgy", "energy"), ("maxlogit", "max_logit"), ("entropie", "entropy")])
def test_an_unknown_score_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"got '{wrong}'. Did you mean '{right}'"):
        scores_named(["msp", wrong])


def test_a_score_that_is_like_none_names_all() -> None:
    with pytest.raises(ValueError, match=r"energy, max_logit, msp, entropy, gen, margin; got 'zzz'\.$"):
        scores_named(["zzz"])


@each_score
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2, 2)])
def test_what_is_not_a_row_of_classes_is_an_error(score: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two_class"):
        score(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(), (4, 2), (4, 1, 1)])
def test_what_is_not_one_logit_a_sample_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="yes/no head"):
        two_class(torch.zeros(shape))
