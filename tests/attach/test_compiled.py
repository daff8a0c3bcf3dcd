"""All the ways in which a module, a part of it or a function of it may be compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.attach.compiled import is_compiled


def nested(part: nn.Module) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Sequential(part))


def in_place() -> nn.Module:
    net = nn.Linear(2, 2)
    net.compile(backend="eager")
    return net


def holding_a_function() -> nn.Module:
    net: Any = nn.Linear(2, 2)

    def double(x: Tensor) -> Tensor:
        return 2 * x

    net.double_it = torch.compile(double, backend="eager")
    return net


def wrapped() -> Any:
    return torch.compile(nn.Linear(2, 2), backend="eager")


@pytest.mark.parametrize("make", [wrapped, in_place, holding_a_function])
def test_what_is_compiled_is_found_at_any_depth(make: Any) -> None:
    assert is_compiled(make())
    assert is_compiled(nested(make()))


def test_what_is_not_is_not() -> None:
    assert not is_compiled(nested(nn.Linear(2, 2)))
