"""Numbers for groups: the same on all processes, exact in a double."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_robust.attach.groups import Groups, GroupSums, parts


def test_whole_numbers_stay_and_strings_get_a_number_that_depends_on_nothing_else() -> None:
    groups, others = Groups("site"), Groups("site")
    assert groups.codes({"site": torch.tensor([3, -1, 3])}, 3).tolist() == [3, -1, 3]
    assert groups.name(3) == "3"
    codes = groups.codes({"site": ["north", "south", "north"]}, 3)
    assert codes[0] == codes[2] != codes[1]
    assert torch.equal(codes.flip(0)[:2], others.codes({"site": ("north", "south")}, 2))
    assert [groups.name(code) for code in codes.tolist()] == ["north", "south", "north"]
    assert torch.equal(codes.double().long(), codes)  # the table holds doubles


def test_names_from_numpy_become_plain_strings() -> None:
    groups = Groups("site")
    codes = groups.codes({"site": list(np.array(["north", "south"]))}, 2)
    assert torch.equal(codes, Groups("site").codes({"site": ["north", "south"]}, 2))
    assert [type(groups.name(code)) for code in codes.tolist()] == [str, str]


def test_a_path_leads_into_nested_batches() -> None:
    assert Groups(("meta", 1)).codes({"meta": [0, torch.tensor([1, 2])]}, 2).tolist() == [1, 2]


@pytest.mark.parametrize("found", [torch.tensor([0.5, 1.5]), torch.tensor([1]), ["a"], [1, "b"], "ab", None])
def test_what_is_no_group_for_each_sample_is_refused_with_where_it_was(found: Any) -> None:
    with pytest.raises(
        ValueError, match=r"a whole number or a string for each of 2 samples, got .* at batch\['site'\]"
    ):
        Groups("site").codes({"site": found}, 2)


def test_a_list_of_whole_numbers_will_do() -> None:
    assert Groups("site").codes({"site": [3, -1, 3]}, 3).tolist() == [3, -1, 3]
    assert Groups("site").codes({"site": []}, 0).dtype == torch.long


def test_rows_are_parted_by_group_and_every_row_is_in_one() -> None:
    codes = torch.tensor([4, -2, 4, 7])
    found = dict(parts(codes))
    assert list(found) == [-2, 4, 7]
    assert torch.stack(list(found.values())).sum(0).tolist() == [1, 1, 1, 1]
    assert all(set(codes[rows].tolist()) == {code} for code, rows in found.items())


def test_sums_of_groups_are_handed_out_by_name_and_in_double_precision() -> None:
    sums = GroupSums(groups := Groups("site"), 2)
    codes = groups.codes({"site": ["a", "b"]}, 2).tolist()
    for _ in range(3):
        sums.add(codes[0], torch.tensor([0.1, 1.0]))
    sums.add(codes[1], torch.tensor([5.0, 2.0**53], dtype=torch.float64))
    found = sums.everyones(SimpleNamespace(world_size=1), lambda state: state)
    assert found["a"].tolist() == pytest.approx([3 * float(torch.tensor(0.1)), 3.0], rel=1e-15)
    assert found["b"].tolist() == [5.0, 2.0**53]
    assert GroupSums(groups, 2).everyones(SimpleNamespace(world_size=1), lambda state: state) == {}


def test_alone_nothing_is_shared() -> None:
    groups = Groups("site")
    groups.codes({"site": ["a"]}, 1)
    groups.share(SimpleNamespace(world_size=1))
    assert list(groups._names.values()) == ["a"]
