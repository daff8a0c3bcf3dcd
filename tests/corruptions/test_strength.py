"""As strong as the published corruptions, on the same photographs: PSNR within 10 % of other people's code."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from corruptions.real_pictures import real_pictures
from corruptions.reference_psnr import AS_PUBLISHED, CORRUPT_TTA

from lightning_robust.corruptions import CORRUPTIONS, SEVERITIES, applicable, corrupt, psnr

SIDES = {"imagenet": 224, "small": 32}
# Whose strength varies from draw to draw: these are drawn several times.
VARIABLE = {"motion_blur": 6, "snow": 6, "fog": 16, "elastic": 10}
ELSEWISE = {
    ("motion_blur", 32): "corrupt_tta draws a straight line of even weight, whatever sigma: see AS_PUBLISHED",
    ("elastic", 32): "corrupt_tta moves small pictures by as many pixels as large ones: see AS_PUBLISHED",
}
# What the published settings themselves do; AS_PUBLISHED shows it as well.
NOT_ORDERED = {
    ("imagenet", "saturate"): "1 and 2 take colour away, the others add some",
    ("imagenet", "elastic"): "1 and 2 slant the picture, the others ripple it",
    ("imagenet", "fog"): "3 and 4 are as much fog, of another grain",
    ("small", "saturate"): "1 and 2 take colour away, the others add some",
    ("small", "elastic"): "slant falls while ripple grows",
    ("small", "glass_blur"): "blur is traded for rounds",
    ("small", "pixelate"): "30 cells fit a side of 32 worse than 28",
}


@cache
def distances(name: str, side: int, table: str, channels: int = 3) -> tuple[float, ...]:
    """Mean PSNR at severities 1 to 5."""
    x = real_pictures(side, channels)
    draws = VARIABLE.get(name, 1) * (1 if side == 224 else 4)
    indices = torch.arange(4 * draws).view(draws, 4)
    return tuple(
        float(torch.stack([psnr(corrupt(x, name, s, index=four, table=table), x) for four in indices]).mean())
        for s in SEVERITIES
    )


@pytest.mark.parametrize(
    ("name", "side"), [(name, side) for side in CORRUPT_TTA for name in CORRUPTIONS if (name, side) not in ELSEWISE]
)
def test_as_strong_as_corrupt_tta(name: str, side: int) -> None:
    assert distances(name, side, "imagenet") == pytest.approx(CORRUPT_TTA[side][name], rel=0.1)


@pytest.mark.parametrize("table", SIDES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_as_strong_as_published_settings_in_code_that_follows_the_published_one(name: str, table: str) -> None:
    assert distances(name, SIDES[table], table) == pytest.approx(AS_PUBLISHED[table][name], rel=0.05)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "table"), [(name, table) for table in SIDES for name in CORRUPTIONS if (table, name) not in NOT_ORDERED]
)
def test_a_higher_severity_leads_farther_away(name: str, table: str, channels: int) -> None:
    found = distances(name, SIDES[table], table, channels)
    assert all(farther < nearer for nearer, farther in pairwise(found))


@pytest.mark.parametrize(("table", "name"), NOT_ORDERED)
def test_where_severity_is_no_order_of_distance_the_published_settings_say_so_too(table: str, name: str) -> None:
    published = AS_PUBLISHED[table][name]
    assert list(published) != sorted(published, reverse=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_severity_of_every_corruption_changes_pictures(channels: int) -> None:
    x = real_pictures(28, channels)
    for name in (name for name in CORRUPTIONS if applicable(name, channels)):
        for severity in SEVERITIES:
            assert torch.isfinite(psnr(corrupt(x, name, severity, index=range(4)), x)).all(), (name, severity)
