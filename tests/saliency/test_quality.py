"""Sensitivity in closed form and as captum has it, overlap with attacks, and all that makes up quality."""

from __future__ import annotations

import pytest
import torch
from captum.attr import IntegratedGradients
from captum.metrics import sensitivity_max
from saliency.known_nets import ONES, linear
from saliency.small_nets import rand
from torch import Tensor, nn

from lightning_robust.attacks import PGD, ThreatModel
from lightning_robust.randomness import RandomState, seeded
from lightning_robust.saliency import drift, gradient, integrated_gradients
from lightning_robust.saliency.curves import area, deletion_curve, insertion_curve
from lightning_robust.saliency.quality import attack_overlap, quality, sensitivity


def test_a_map_that_follows_its_input_is_as_sensitive_as_the_input_moves() -> None:
    x = torch.full((4, 3, 8, 8), 0.5)
    found = sensitivity(lambda x: x, x, radius=0.1)
    # Uniform noise has length r / sqrt(3) an input; the largest of ten draws of 192 lies a little above.
    assert found.tolist() == pytest.approx([0.1 / 3**0.5 / 0.5] * 4, rel=0.15)
    torch.testing.assert_close(sensitivity(lambda x: x, x, radius=0.2), 2 * found)
    assert sensitivity(lambda x: 0 * x, x).tolist() == [0.0] * 4


def test_sensitivity_is_captums_with_draws_of_ours() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, target = rand(4, 6), torch.tensor([0, 1, 2, 0])
    generators = [seeded(5, i) for i in range(4)]

    def perturbed(inputs: Tensor, radius: float) -> Tensor:
        return inputs + radius * (2 * torch.stack([torch.rand(6, generator=g) for g in generators]) - 1)

    attribute = IntegratedGradients(net).attribute
    expected = sensitivity_max(attribute, x, perturbed, 0.1, 7, max_examples_per_batch=4, target=target)
    found = sensitivity(lambda x: attribute(x, target=target), x, radius=0.1, samples=7, seed=5)
    torch.testing.assert_close(found.float(), expected)


def test_sensitivity_is_seeded_by_row_and_more_draws_find_no_less() -> None:
    x = rand(4, 6)

    def found(x: Tensor, samples: int = 5, seed: int = 0) -> Tensor:
        return sensitivity(lambda x: x.exp(), x, samples=samples, seed=seed)

    assert torch.equal(found(x), found(x))
    assert torch.equal(found(x[:2]), found(x)[:2])
    assert not torch.equal(found(x), found(x, seed=1))
    assert bool((found(x, 20) >= found(x)).all())


def test_every_explanation_sees_all_samples_with_gradients_on() -> None:
    sizes = []

    def explain(x: Tensor) -> Tensor:
        sizes.append(len(x))
        x = x.requires_grad_()
        return torch.autograd.grad(x.square().sum(), x)[0]

    with torch.inference_mode():
        sensitivity(explain, rand(3, 5), samples=4)
    assert sizes == [3] * 5


def test_a_perturbation_on_the_marked_tenth_overlaps_wholly_and_one_elsewhere_not_at_all() -> None:
    maps, x = torch.zeros(2, 10, 10), torch.zeros(2, 3, 10, 10)
    maps[:, 2] = -5
    x_adv = x.clone()
    x_adv[0, :, 2], x_adv[1, :, 7] = 0.1, -0.1
    found = attack_overlap(maps, x, x_adv)
    assert found["iou10"].tolist() == [1.0, 0.0]
    assert found["cosine"].tolist() == pytest.approx([1.0, -0.01 / 0.09])
    assert found["mass"].tolist() == [1.0, 0.0]


def test_the_perturbation_is_summed_over_channels_and_compared_as_drift_compares() -> None:
    maps, (x, x_adv) = rand(4, 8, 8) - 0.5, rand(2, 4, 3, 8, 8)
    found, expected = attack_overlap(maps, x, x_adv), drift(maps.abs(), (x_adv.double() - x.double()).abs().sum(1))
    for name in ("iou10", "cosine"):
        torch.testing.assert_close(found[name], expected[name])


def test_unrelated_and_even_perturbations_are_at_chance() -> None:
    (maps, x_adv), x = rand(2, 1000, 100), torch.zeros(1000, 100)
    found = attack_overlap(maps, x, x_adv)
    means = {name: float(values.mean()) for name, values in found.items()}
    assert means == {
        "iou10": pytest.approx(0.054, abs=0.004),
        "cosine": pytest.approx(0, abs=0.01),
        "mass": pytest.approx(0.1, abs=0.003),
    }
    for even in (x, x + 0.1):
        assert attack_overlap(maps, x, even)["mass"].tolist() == pytest.approx([0.1] * 1000)


def test_an_attack_in_the_two_norm_on_a_linear_model_moves_what_its_gradient_marks() -> None:
    weight = torch.randn(64, generator=seeded(3)) ** 3
    x, y = 0.3 + 0.4 * rand(5, 64), torch.zeros(5, dtype=torch.long)

    def logits_fn(x: Tensor) -> Tensor:
        return torch.stack([-x @ weight, x @ weight], 1)

    x_adv = PGD(ThreatModel("l2", 0.1), steps=5, start="zero")(logits_fn, x, y)
    found = attack_overlap(gradient(logits_fn, x, y), x, x_adv)
    assert float(found["iou10"].min()) == 1.0
    assert float(found["cosine"].min()) > 0.999


def test_quality_is_what_its_parts_say_one_number_a_sample() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.Tanh(), nn.Linear(16, 3))
    (x, x_adv), target = rand(2, 4, 1, 8, 9), torch.tensor([0, 1, 2, 0])

    def explain(x: Tensor) -> Tensor:
        return integrated_gradients(net, x, target)

    maps = explain(x)
    found = quality(explain, net, x, target, x_adv=x_adv, steps=4, radius=0.1, samples=3, seed=2)
    torch.testing.assert_close(found["deletion"], area(*deletion_curve(net, x, target, maps, steps=4, seed=2)))
    torch.testing.assert_close(found["insertion"], area(*insertion_curve(net, x, target, maps, steps=4, seed=2)))
    torch.testing.assert_close(found["sensitivity"], sensitivity(explain, x, radius=0.1, samples=3, seed=2))
    for name, values in attack_overlap(maps, x, x_adv).items():
        torch.testing.assert_close(found[f"attack_{name}"], values)
    assert all(values.shape == (4,) and values.dtype == torch.float64 for values in found.values())
    assert len(found) == 8


def test_a_good_map_is_on_the_right_side_of_a_random_order_and_its_negative_on_the_wrong_one() -> None:
    weight = torch.randn(256, generator=seeded(1)) ** 3 / 8
    x, target = rand(12, 1, 16, 16), torch.ones(12, dtype=torch.long)

    def logits_fn(x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ weight

    for sign in (1, -1):
        found = quality(lambda x: sign * (x[:, 0] - 0.5) * weight.view(16, 16), logits_fn, x, target, baseline=0.5)  # noqa: B023 called within the loop
        means = {name: float(values.mean()) for name, values in found.items()}
        assert sign * (means["deletion_random"] - means["deletion"]) > 0.1
        assert sign * (means["insertion"] - means["insertion_random"]) > 0.1


def test_a_broken_map_marks_its_sample_alone() -> None:
    def explain(x: Tensor) -> Tensor:
        maps = x.clone()
        maps[1, 0] = torch.nan
        return maps

    x, x_adv = rand(2, 3, 5)
    found = quality(explain, linear, x, ONES, x_adv=x_adv)
    for name, values in found.items():
        assert values.isnan().tolist() == [False, "random" not in name, False], name


def test_random_streams_and_inference_mode_are_no_matter() -> None:
    def logits_fn(x: Tensor) -> Tensor:
        return linear(x + 0 * torch.rand(1))

    def measured(x: Tensor) -> dict[str, Tensor]:
        return quality(lambda x: gradient(logits_fn, x, ONES) + torch.rand(1), logits_fn, x, ONES)

    x, state = rand(3, 5), RandomState.capture()
    found = measured(x)
    assert state.is_current()
    with torch.inference_mode():
        again = measured(x.clone())
    for name, values in found.items():
        assert torch.equal(values, again[name])


def test_what_does_not_fit_is_refused() -> None:
    x = rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"radius above 0 in their units.*radius=0"):
        sensitivity(lambda x: x, x, radius=0)
    with pytest.raises(ValueError, match=r"of one shape, got \(2, 3, 4, 4\) and \(1, 3, 4, 4\)"):
        attack_overlap(x[:, 0], x, x[:1])
