"""The terms that methods add: by closed forms, on the scale of the loss that they join."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from lightning_robust.losses import LossCall
from lightning_robust.penalties.robust_terms import distillation, mart, mean_loss, trades
from lightning_robust.randomness import seeded

CLEAN, ATTACKED = (torch.randn(6, 3, generator=seeded(i)) for i in (1, 2))
Y = torch.arange(6) % 3


def test_trades_and_distillation_are_weighted_divergences() -> None:
    call = LossCall("cross_entropy", CLEAN, Y)
    expected = kl_divergence(Categorical(logits=CLEAN), Categorical(logits=ATTACKED)).mean()
    torch.testing.assert_close(trades(call, call.again(ATTACKED), 6.0)["kl"], 6 * expected)
    torch.testing.assert_close(distillation(CLEAN, call.again(ATTACKED), 0.5)["distillation"], 0.5 * expected)


@pytest.mark.parametrize("kind", ["cross_entropy", "binary_cross_entropy_with_logits"])
def test_pixels_and_labels_are_averaged_as_the_loss_averages_them(kind: str) -> None:
    if kind == "cross_entropy":
        clean, y = torch.randn(2, 3, 5, generator=seeded(3)), torch.zeros(2, 5, dtype=torch.long)
        flat = [z.movedim(1, 2).reshape(10, 3) for z in (clean, clean + torch.arange(3.0).view(1, 3, 1))]
    else:
        clean, y = torch.randn(2, 5, generator=seeded(3)), torch.zeros(2, 5)
        flat = [torch.stack([-z / 2, z / 2], 2).reshape(10, 2) for z in (clean, clean + 1)]
    attacked = clean + (torch.arange(3.0).view(1, 3, 1) if kind == "cross_entropy" else 1)
    call = LossCall(kind, clean, y)  # type: ignore[arg-type]  # a literal by its values
    expected = kl_divergence(*(Categorical(logits=z) for z in flat)).mean()
    torch.testing.assert_close(trades(call, call.again(attacked), 1.0)["kl"], expected)
    theirs = F.cross_entropy(clean, y) if kind == "cross_entropy" else F.binary_cross_entropy_with_logits(clean, y)
    torch.testing.assert_close(mean_loss(call), theirs)


def test_terms_are_on_the_scale_of_the_loss_that_they_join() -> None:
    """Class weights and ignored pixels: means are over what the loss counts."""
    logits, y = torch.randn(6, 3, generator=seeded(5)), torch.arange(6) % 3
    weight = torch.tensor([1.0, 5.0, 10.0])
    call = LossCall("cross_entropy", logits, y, {"weight": weight})
    torch.testing.assert_close(mean_loss(call), F.cross_entropy(logits, y, weight))
    dense, part = torch.randn(2, 3, 8, generator=seeded(6)), torch.full((2, 8), -100)
    part[:, :2] = 1
    counted = LossCall("cross_entropy", dense, part)
    alone = LossCall("cross_entropy", dense[:, :, :2], part[:, :2])
    torch.testing.assert_close(mean_loss(counted), mean_loss(alone))
    for whole, small in zip(
        mart(counted, counted.again(dense + 1), 5.0).values(),
        mart(alone, alone.again(dense[:, :, :2] + 1), 5.0).values(),
        strict=True,
    ):
        torch.testing.assert_close(whole, small)
