"""An alarm is for maps that had settled and move again."""

from __future__ import annotations

import pytest
import torch

from lightning_robust.callbacks.watched_probes import WatchedProbes
from lightning_robust.saliency import ProbeSet


def watched(*skills: float) -> WatchedProbes:
    probes = WatchedProbes("")
    probes.history = [{"gradient": {"iou10_skill_to_previous": skill}} for skill in (1.2, *skills)]
    return probes


@pytest.mark.parametrize(
    ("skills", "expected"),
    [
        ((), 0),  # the anchor alone
        ((0.1,), 0),  # early in training everything moves
        ((0.1, 0.2, 0.0), 0),  # never settled
        ((0.3, 0.6, 0.7), 0),  # settled, and stays
        ((0.6, 0.8, 0.2), 0),  # moves a little: a quarter of .7 is .175
        ((0.6, 0.8, 0.1), 1),  # had settled, and moved
        ((0.3, 0.6, 0.0), 0),  # once was not enough
        ((0.6, 0.8, 0.1, 0.7), 0),  # over again
        ((0.6, float("nan")), 0),
        ((0.8, 0.9, float("nan"), 0.8, 0.05), 1),  # a snapshot of NaN is no skill
    ],
)
def test_the_alarm_is_up_while_maps_that_had_settled_move(skills: tuple[float, ...], expected: int) -> None:
    assert watched(*skills).alarm("gradient", 0.25) == expected
    assert watched(*skills).alarm("gradcam", 0.25) == 0


def test_films_end_where_the_samples_are_others() -> None:
    one, other = (ProbeSet(torch.arange(2), torch.zeros(2).long(), torch.full((2, 3), fill)) for fill in (0.0, 1.0))
    probes = watched(0.5)
    assert probes.settle(one) is None
    probes.first_seen = torch.zeros(2)
    entry = probes.to_dict()
    assert entry is not None
    same, changed = WatchedProbes(""), WatchedProbes("")
    for again in (same, changed):
        again.restore(entry)
    assert same.settle(one) is None
    assert same.history == probes.history
    assert "explain other samples" in str(changed.settle(other))
    assert changed.history == []
    assert changed.settle(ProbeSet.of([])) is None  # nothing is no probe set
    assert changed.probes is other
