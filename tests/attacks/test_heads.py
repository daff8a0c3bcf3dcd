"""Attacks in plain loops on every head: what is climbed, what counts as fooled, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import (
    APGD,
    FGSM,
    PGD,
    Square,
    ThreatModel,
    UniformNoise,
    WorstCase,
    YesNo,
    cross_entropy,
    dlr,
    targeted_dlr,
)
from lightning_robust.attacks.guard import guard
from lightning_robust.attacks.heads import (
    DivergenceFrom,
    OnHead,
    Towards,
    check_objective,
    margin_of,
    narrowed,
    objective_named,
)
from lightning_robust.attacks.objectives import OBJECTIVES, margin, sample_margin
from lightning_robust.divergence import kl_divergence
from lightning_robust.penalties.mart import misclassification_aware
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

THREAT = ThreatModel("linf", 0.1, PixelSpace(bounds=None))
WEIGHT = torch.randn(6, 3, generator=seeded(1))
X = torch.rand(8, 6, generator=seeded(2))


def worst_corner(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """What the strongest linf attack on one yes/no output ``x @ weight`` makes of its inputs."""
    return x - 0.1 * (2 * y.reshape(-1, 1) - 1) * weight.sign()


@pytest.mark.parametrize("shape", [(8,), (8, 1)])
@pytest.mark.parametrize("attack", [FGSM(THREAT), PGD(THREAT, steps=5), APGD(THREAT, steps=5, early_exit=False)])
@pytest.mark.parametrize("whole", [True, False])
def test_a_single_yes_no_output_is_known_by_its_shape(shape: tuple[int, ...], attack: Any, whole: bool) -> None:
    y = (torch.arange(8) % 2).reshape(shape)
    found = attack(lambda x: (x @ WEIGHT[:, 0]).reshape(shape), X, y if whole else y.float(), generator=seeded(0))
    torch.testing.assert_close(found, worst_corner(X, WEIGHT[:, 0], y))


def test_several_labels_are_told_apart_from_probabilities_and_climbed_label_by_label() -> None:
    y = (torch.rand(8, 3, generator=seeded(3)) > 0.5).float()
    with pytest.raises(ValueError, match=r"do not sum to 1.*objective=attacks.YesNo\(\)"):
        PGD(THREAT)(lambda x: x @ WEIGHT, X, y)
    found = PGD(THREAT, steps=10, objective=YesNo())(lambda x: x @ WEIGHT, X, y, generator=seeded(0))
    leaf = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(leaf @ WEIGHT, y, reduction="sum"), leaf)
    clean, attacked = (F.binary_cross_entropy_with_logits(x @ WEIGHT, y) for x in (X, found))
    assert float(attacked - clean) > 0.05 * float(gradient.abs().sum() / y.numel())  # half of the first-order ascent
    torch.testing.assert_close(YesNo()(X @ WEIGHT, y).sum() / y.numel(), clean)


@pytest.mark.parametrize("attack", [Square(THREAT, queries=200), UniformNoise(THREAT, draws=200)])
def test_attacks_without_gradients_lower_the_margin_of_any_head(attack: Any) -> None:
    y = (torch.arange(8) % 2).float()
    margins = {}
    for name, x in (("clean", X), ("found", attack(lambda x: x @ WEIGHT[:, 0], X, y, generator=seeded(0)))):
        margins[name] = (1 - 2 * y) * (x @ WEIGHT[:, 0])
    best = 0.1 * WEIGHT[:, 0].abs().sum()
    grown = (margins["found"] - margins["clean"])[margins["clean"] <= 0]
    assert len(grown) > 2
    assert float(grown.min()) > 0.25 * float(best)
    assert float(grown.max()) <= float(best) + 1e-5


def test_of_several_predictions_all_must_be_wrong_and_more_wrong_ones_are_worse() -> None:
    gap = torch.tensor([[9.0, -1, -1], [0.1, 0.1, -9], [0.1, 0.1, 0.1], [-1, -1, -1]])
    found = sample_margin(gap)
    assert found.argsort(descending=True).tolist() == [2, 1, 0, 3]
    assert (found > 0).tolist() == [False, False, True, False]
    many = torch.ones(1, 50_000)
    many[0, 0] = -1
    assert float(sample_margin(many)) < 0 < float(sample_margin(many.abs()))
    counted = torch.tensor([[True, False, False], [True, True, False], [True, True, True], [False] * 3])
    assert (sample_margin(gap, counted) > 0).tolist() == [True, True, True, False]
    assert sample_margin(torch.tensor([torch.nan, -1.0])).tolist() == [torch.inf, -1]


def test_targets_of_a_targeted_attack_count_only_where_there_is_a_label() -> None:
    logits = torch.tensor([[[2.0, 0, 0, 0], [0, 9, 9, 9]]], requires_grad=True)  # one sample of two classes, 4 pixels
    y, target = torch.tensor([[0, -100, -100, -100]]), torch.ones(1, 4, dtype=torch.long)
    objective = Towards(target)
    assert float(objective.margin(logits.detach(), y)) < 0  # the counted pixel is not class 1
    (gradient,) = torch.autograd.grad(objective(logits, y).sum(), logits)
    assert bool((gradient[:, :, 1:] == 0).all())
    assert bool((gradient[:, :, 0] != 0).all())


def test_the_targeted_dlr_takes_pixels_and_leaves_out_those_without_a_label() -> None:
    logits = torch.randn(3, 5, 4, generator=seeded(4))
    y, target = torch.randint(0, 5, (3, 4), generator=seeded(5)), torch.randint(0, 5, (3, 4), generator=seeded(6))
    each = [targeted_dlr(logits[:, :, k], y[:, k], target[:, k]) for k in range(4)]
    torch.testing.assert_close(targeted_dlr(logits, y, target), torch.stack(each).mean(0))
    y[:, 0] = -100
    each[0] = torch.zeros(3)
    torch.testing.assert_close(targeted_dlr(logits, y, target), torch.stack(each).mean(0))


@pytest.mark.parametrize(
    "attack", [PGD(THREAT, steps=3, keep="best"), APGD(THREAT, steps=5), Square(THREAT, queries=9)]
)
def test_an_answer_that_is_nan_counts_as_fooled(attack: Any) -> None:
    x, y = torch.full((4, 6), 0.5), torch.zeros(4, dtype=torch.long)

    def fragile(z: Tensor) -> Tensor:  # sure of class 0, and silent beside the clean input
        z = torch.stack([5 + z.mean(1), z.mean(1)], 1)
        return torch.where(z[:, 1:] == 0.5, z, z * torch.nan)

    found = guard(attack)(fragile, x, y, generator=seeded(0)) if isinstance(attack, Square) else None
    if found is None:
        with pytest.warns(UserWarning, match="loss of some samples is NaN or infinite"):
            found = guard(attack)(fragile, x, y, generator=seeded(0))
    assert bool(fragile(found).isnan().all())


def test_classes_that_are_switched_off_leave_every_objective_finite() -> None:
    logits = torch.tensor([[2.0, 1.0, -torch.inf, -torch.inf], [1.0, 3.0, 0.0, -torch.inf]])
    y = torch.tensor([0, 1])
    assert dlr(logits, y).tolist() == pytest.approx([-1.0, -2 / 3])  # the margin; the margin over the spread of 3
    assert targeted_dlr(logits, y, torch.tensor([1, 0])).tolist() == [-1.0, -2.0]
    log_p = logits.log_softmax(1).requires_grad_()
    divergence = kl_divergence(log_p, log_p.detach())
    assert divergence.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(divergence.sum(), log_p)
    assert bool(gradient.isfinite().all())
    assert all(bool(term.isfinite().all()) for term in misclassification_aware(log_p, log_p, y))


def test_a_worst_case_of_worst_cases_over_other_threats_runs() -> None:
    l2 = ThreatModel("l2", 0.2, PixelSpace(bounds=None))
    inner = WorstCase([PGD(THREAT, steps=2), PGD(l2, steps=2)])
    y = torch.randint(0, 3, (8,), generator=seeded(7))
    found = WorstCase([inner, PGD(THREAT, steps=2)])(lambda x: x @ WEIGHT, X, y, generator=seeded(0))
    assert float(cross_entropy(found @ WEIGHT, y).sum()) > float(cross_entropy(X @ WEIGHT, y).sum())


def test_without_early_exit_every_attack_of_a_worst_case_gets_all_samples() -> None:
    sizes: list[int] = []

    def noting(logits_fn: Any, x: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        return x

    y = torch.randint(0, 3, (8,), generator=seeded(7))  # some of them wrong as they are
    for early_exit in (None, False):
        WorstCase([noting, noting], early_exit=early_exit)(lambda x: x @ WEIGHT, X, y)
    assert sizes[2:] == [8, 8]
    assert sizes[0] < 8


@pytest.mark.parametrize("attack", [PGD(THREAT), APGD(THREAT), Square(THREAT), UniformNoise(THREAT), FGSM(THREAT)])
def test_what_is_given_wrongly_is_refused(attack: Any) -> None:
    whole = (X * 255).to(torch.uint8)
    with pytest.raises(TypeError, match=r"got torch.uint8. Give x.float\(\)"):
        attack(lambda x: x.float() @ WEIGHT, whole, torch.zeros(8, dtype=torch.long))
    assert guard(attack)(nn.Linear(6, 3), X[:0], torch.zeros(0, dtype=torch.long)).shape == (0, 6)


def test_radii_must_fit_the_batch_and_the_threat_model() -> None:
    net, y = nn.Linear(6, 3), torch.zeros(8, dtype=torch.long)
    with pytest.raises(ValueError, match="a radius for each of 8 samples, got 3"):
        PGD(THREAT.within(eps=torch.full((3,), 0.1)))(net, X, y)  # type: ignore[arg-type]  # a local threat is one, too
    with pytest.raises(ValueError, match=r"radii \(N,\).*got \(\)"):
        THREAT.within(eps=torch.tensor(0.1))
    with pytest.raises(ValueError, match="in which steps are measured"):
        ThreatModel("linf", 0.0).within(eps=torch.full((8,), 0.1))


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_an_objective_that_would_not_be_used_is_refused(kind: Any) -> None:
    settings = {"targeted": "random"} if kind is PGD else {"targets": 1}
    with pytest.raises(ValueError, match="objective="):
        kind(THREAT, objective=lambda logits, y: logits[:, 0], **settings)


def test_values_outside_by_round_off_are_not_moved_into_the_box() -> None:
    x = torch.tensor([[1.00005, 0.5]])
    attack = guard(PGD(ThreatModel("linf", 0.0), steps=1))
    assert torch.equal(attack(nn.Linear(2, 2), x, torch.tensor([0])), x)


def test_an_objective_may_bring_its_own_margin() -> None:
    class OneLogit:
        def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
            return self.margin(logits, y)

        def margin(self, logits: Tensor, y: Tensor) -> Tensor:
            return logits * (1 - 2 * y)

    objective = OneLogit()
    assert margin_of(objective) == objective.margin
    logits, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    assert torch.equal(margin_of(cross_entropy)(logits, y), margin(logits, y))


def test_an_objective_of_class_logits_works_on_another_head() -> None:
    owner, logits, y = YesNo(), torch.tensor([2.0, -1.0]), torch.tensor([1, 1])
    found = OnHead(dlr, owner)
    assert found(logits, y).tolist() == [-2, 1]
    assert found.margin(logits, y).tolist() == [-2, 1]
    assert OnHead(cross_entropy, owner)(logits, y).tolist() == pytest.approx(owner(logits, y).tolist())
    plain, classes = OnHead(dlr), torch.tensor([[5.0, 3.0, 1.0]])
    assert plain(classes, torch.tensor([0])).tolist() == [-0.5]
    assert plain.margin(classes, torch.tensor([0])).tolist() == [-2]


def test_the_divergence_from_itself_is_zero_and_otherwise_kl() -> None:
    clean, now, y = torch.randn(5, 4), torch.randn(5, 4), torch.zeros(5, dtype=torch.long)
    objective = DivergenceFrom(clean.log_softmax(1))
    torch.testing.assert_close(objective(clean, y), torch.zeros(5), rtol=0, atol=1e-6)
    expected = (clean.softmax(1) * (clean.log_softmax(1) - now.log_softmax(1))).sum(1)
    torch.testing.assert_close(objective(now, y), expected)
    rows = torch.tensor([3, 0])
    torch.testing.assert_close(objective.at(rows)(now[rows], y[rows]), expected[rows])


def test_towards_falls_with_the_loss_of_the_target_and_its_margin_says_when_it_is_reached() -> None:
    logits, target, y = torch.randn(200, 5), torch.randint(5, (200,)), torch.randint(5, (200,))
    objective = Towards(target)
    torch.testing.assert_close(objective(logits, y), -F.cross_entropy(logits, target, reduction="none"))
    assert torch.equal(objective.margin(logits, y) > 0, logits.argmax(1) == target)
    rows = torch.tensor([5, 17])
    torch.testing.assert_close(objective.at(rows)(logits[rows], y[rows]), objective(logits, y)[rows])


def test_towards_on_another_head_reaches_the_other_answer() -> None:
    logits, target = torch.tensor([2.0, -1.0]), torch.tensor([0, 0])
    objective = Towards(target, YesNo())
    assert objective.margin(logits, 1 - target).tolist() == [-2, 1]
    expected = -F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    torch.testing.assert_close(objective(logits, 1 - target), expected)


def test_rows_of_an_objective_are_passed_down_to_its_parts() -> None:
    log_p, rows = torch.randn(4, 3).log_softmax(1), torch.tensor([2])
    part = OnHead(DivergenceFrom(log_p), YesNo()).at(rows)
    assert torch.equal(part.function.log_p, log_p[rows])
    assert narrowed(dlr, rows) is dlr


def test_a_name_stands_for_a_function_on_the_head_of_the_model() -> None:
    asked: list[int] = []
    clean, y = torch.randn(3, 4), torch.tensor([0, 1, 2])

    def logits() -> Tensor:
        asked.append(1)
        return clean

    own = YesNo()
    assert torch.equal(objective_named(None, None, logits, y)(clean, y), cross_entropy(clean, y))
    assert objective_named(None, own, logits, y) is own
    assert objective_named(own, None, logits, y) is own
    assert objective_named("dlr", own, logits, y) == OnHead(dlr, own)
    assert objective_named(margin, own, logits, y) == OnHead(margin, own)
    assert objective_named(margin, None, logits, y) is margin
    assert not asked  # the clean prediction costs a forward pass
    kl = objective_named("kl", None, logits, y)
    assert asked == [1]
    assert torch.equal(kl.function.log_p, clean.log_softmax(1))
    torch.testing.assert_close(kl(clean, y), torch.zeros(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("given", ["ce", "DLR", 3, ["dlr"]])
def test_an_unknown_objective_is_refused_with_the_known_ones(given: Any) -> None:
    with pytest.raises(ValueError, match=r"'cross_entropy', 'margin', 'dlr', 'kl' or a callable, got"):
        check_objective(given)


@pytest.mark.parametrize("given", [None, "kl", *OBJECTIVES, margin])
def test_known_objectives_are_accepted(given: Any) -> None:
    check_objective(given)
