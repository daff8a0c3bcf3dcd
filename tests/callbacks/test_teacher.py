"""A teacher: in eval mode while it teaches, and then what it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.callbacks.teacher import Teacher


def test_it_is_in_eval_mode_and_gets_its_flags_back() -> None:
    network = nn.Sequential(nn.Linear(8, 3), nn.Dropout(), nn.Dropout())
    network[1].eval()
    teacher, x = Teacher(network, 0.5), torch.rand(4, 8)
    undo = teacher.prepare(torch.device("cpu"))
    said = teacher.logits(x, torch.zeros(4, 3, dtype=torch.float64), "me")
    assert not said.requires_grad
    assert said.dtype == torch.float64
    torch.testing.assert_close(said, network[0](x).double())  # no dropout
    undo()
    assert [part.training for part in network.modules()] == [True, True, False, True]
    assert (teacher.weight, str(teacher)) == (0.5, "Sequential")


def test_any_function_teaches_and_what_it_returns_must_be_logits_like_ours() -> None:
    def function(x: Tensor) -> Tensor:
        return x[:, :3]

    teacher = Teacher(function, 1.0)
    teacher.prepare(torch.device("cpu"))()  # nothing to put back
    assert torch.equal(teacher.logits(torch.ones(2, 5), torch.zeros(2, 3), "me"), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"me: teacher= must map the input to logits \(2, 4\).*got \(2, 3\)"):
        teacher.logits(torch.ones(2, 5), torch.zeros(2, 4), "me")
