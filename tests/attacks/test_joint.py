"""Several inputs, each in its own ball and box, moved by one attack."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_robust.attacks import NFGSM, PGD, JointThreat, ThreatModel, guard
from lightning_robust.attacks.joint import side_by_side
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

IMAGE = ThreatModel("linf", 0.1, PixelSpace(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125)))
SOUND = ThreatModel("l2", 0.5, PixelSpace(bounds=None))
SHAPES = (torch.Size([3, 2, 2]), torch.Size([7]))
Y = torch.tensor([0, 1, 0, 1])


def inputs() -> tuple[Tensor, Tensor]:
    generator = seeded(0)
    image = IMAGE.pixels.to_model(torch.rand(4, *SHAPES[0], generator=generator))
    return image, torch.randn(4, *SHAPES[1], generator=generator)


def packed(image: Tensor, sound: Tensor) -> Tensor:
    return torch.cat([image.flatten(1), sound], 1)


WEIGHTS = torch.randn(12 + 7, 2, generator=seeded(1))


def logits_fn(x: Tensor) -> Tensor:
    return x @ WEIGHTS


def test_on_a_linear_model_every_input_ends_where_its_own_attack_would_take_it() -> None:
    # The gradient of a linear model's margin is the same everywhere: what one input does is no matter to the other.
    def margin(logits: Tensor, y: Tensor) -> Tensor:
        return (logits[:, 1] - logits[:, 0]) * torch.where(y == 0, 1.0, -1.0)

    image, sound = inputs()
    joint = side_by_side(JointThreat((IMAGE, SOUND)), SHAPES)
    moved = guard(PGD(joint, steps=5, start="zero", objective=margin))(logits_fn, packed(image, sound), Y)

    def alone(threat: ThreatModel, x: Tensor, weights: Tensor) -> Tensor:
        attack = PGD(threat, steps=5, start="zero", objective=margin)
        return attack(lambda z: z.flatten(1) @ weights, x, Y).flatten(1)

    torch.testing.assert_close(moved[:, :12], alone(IMAGE, image, WEIGHTS[:12]))
    torch.testing.assert_close(moved[:, 12:], alone(SOUND, sound, WEIGHTS[12:]))
    distances = SOUND.distance(moved[:, 12:], sound)
    torch.testing.assert_close(distances, torch.full((4,), 0.5))


@pytest.mark.parametrize("noise", ["one generator", "one a sample"])
def test_random_starts_and_restarts_stay_in_every_ball_and_box(noise: str) -> None:
    image, sound = inputs()
    threat = side_by_side(JointThreat((IMAGE, SOUND)), SHAPES)
    generator = seeded(3) if noise == "one generator" else [seeded(3, i) for i in range(4)]
    moved = PGD(threat, steps=3, restarts=2)(logits_fn, packed(image, sound), Y, generator=generator)
    pixels = IMAGE.pixels.to_pixels(moved[:, :12].view(4, *SHAPES[0]))
    assert float((pixels - IMAGE.pixels.to_pixels(image)).abs().max()) <= 0.1 + 1e-6
    assert float(pixels.min()) >= -1e-6
    assert float(pixels.max()) <= 1 + 1e-6
    assert float(SOUND.distance(moved[:, 12:], sound).max()) <= 0.5 + 1e-6
    assert not torch.equal(moved[:, 12:], sound)


def test_one_threat_model_holds_for_each_input() -> None:
    threat = side_by_side(ThreatModel("linf", 0.1), (torch.Size([2]), torch.Size([3])))
    x = torch.full((2, 5), 0.5)
    weights = torch.tensor([[1.0, -1.0]]).repeat(5, 1)
    moved = PGD(threat, steps=2, start="zero")(lambda z: z @ weights, x, torch.tensor([0, 1]))
    torch.testing.assert_close(moved, torch.tensor([[0.4], [0.6]]).expand(2, 5))
    one_step = NFGSM(threat, noise=0.0)(lambda z: z @ weights, x, torch.tensor([0, 1]))
    torch.testing.assert_close(one_step, moved)


def test_the_distance_is_that_of_the_input_that_went_farthest_for_its_radius() -> None:
    threat = side_by_side(JointThreat((ThreatModel("linf", 0.1), ThreatModel("linf", 0.4))), SHAPES)
    clean = torch.zeros(2, 19)
    moved = clean.clone()
    moved[0, 0] = 0.05  # half of its radius, as 0.2 of the largest
    moved[1, -1] = 0.3
    torch.testing.assert_close(threat.distance(moved, clean), torch.tensor([0.2, 0.3]))


def test_an_input_outside_of_its_own_bounds_is_named() -> None:
    image, sound = inputs()
    threat = side_by_side(JointThreat((IMAGE, SOUND)), SHAPES)
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        threat.pixels.check(packed(image + 9, sound))
    assert threat.pixels.count_outside(packed(image + torch.tensor([9, 0, 0, 9.0]).view(4, 1, 1, 1), sound)) == 2


def test_the_number_of_threat_models_is_that_of_the_inputs() -> None:
    with pytest.raises(ValueError, match=r"2 threat models for 1 input: .*input_key=\[...\]"):
        side_by_side(JointThreat((IMAGE, SOUND)), SHAPES[:1])
    with pytest.raises(ValueError, match="two or more inputs"):
        JointThreat((IMAGE,))
