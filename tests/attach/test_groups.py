"""Numbers for groups: the same on all processes, exact in a double."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_robust.attach.groups import Groups


def test_whole_numbers_stay_and_strings_get_a_number_that_depends_on_nothing_else() -> None:
    groups, others = Groups("site"), Groups("site")
    assert groups.codes({"site": torch.tensor([3, -1, 3])}, 3).tolist() == [3, -1, 3]
    assert groups.name(3) == "3"
    codes = groups.codes({"site": ["north", "south", "north"]}, 3)
    assert codes[0] == codes[2] != codes[1]
    assert torch.equal(codes.flip(0)[:2], others.codes({"site": ("north", "south")}, 2))
    assert [groups.name(code) for code in codes.tolist()] == ["north", "south", "north"]
    assert torch.equal(codes.double().long(), codes)  # the table holds doubles


def test_a_path_leads_into_nested_batches() -> None:
    assert Groups(("meta", 1)).codes({"meta": [0, torch.tensor([1, 2])]}, 2).tolist() == [1, 2]


@pytest.mark.parametrize("found", [torch.tensor([0.5, 1.5]), torch.tensor([1]), ["a"], [1, "b"], "ab", None])
def test_what_is_no_group_for_each_sample_is_refused_with_where_it_was(found: Any) -> None:
    with pytest.raises(
        ValueError, match=r"a whole number or a string for each of 2 samples, got .* at batch\['site'\]"
    ):
        Groups("site").codes({"site": found}, 2)


def test_alone_nothing_is_shared() -> None:
    groups = Groups("site")
    groups.codes({"site": ["a"]}, 1)
    groups.share(SimpleNamespace(world_size=1))
    assert list(groups._names.values()) == ["a"]
