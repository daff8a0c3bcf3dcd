"""Plain values of what detectors remember: what they become, how much they take, and what is refused."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from lightning_robust.attach.plain import plain, size_in_bytes


def test_whatever_comes_out_is_read_with_weights_only() -> None:
    state = OrderedDict(
        weight=torch.nn.Parameter(torch.ones(2)),
        mean=np.float64(0.5),
        rows=np.zeros((2, 3), dtype=np.float32)[:, ::-1],
        names=("a", np.str_("b"), None, True),
    )
    file = io.BytesIO()
    torch.save(plain(state), file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert read["weight"].tolist() == [1.0, 1.0]
    assert (read["mean"], read["rows"].shape, read["rows"].dtype) == (0.5, (2, 3), torch.float32)
    assert read["names"] == ("a", "b", None, True)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": [object()]}, r"state\['a'\]\[0\] is of type object"),
        (np.array([object()]), "state is of type numpy object"),
        ({(1, object()): 0}, r"a key of state\[1\] is of type object"),
        ({1, 2}, "state is of type set"),
    ],
)
def test_anything_else_is_an_error_that_names_its_place(value: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says + "; a checkpoint takes tensors"):
        plain(value)


def test_the_size_counts_tensors_and_every_number_of_a_list() -> None:
    assert size_in_bytes({"a": torch.zeros(3, dtype=torch.float64), "b": [[1.0] * 10, (2, None)]}) == 2 + 24 + 96
