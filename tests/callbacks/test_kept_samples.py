"""What goes into the rows comes out of the table, small, whichever process had it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.callbacks.kept_samples import Kept, Table, rows_of, small
from lightning_robust.randomness import seeded


def sample(n: int, channels: int, masks: bool) -> tuple[Kept, Tensor]:
    """All samples and their maps."""
    x, maps = (torch.rand(n, c, 12, 10, generator=seeded(c)) for c in (channels, 1))
    foreground = (torch.rand(n, 12, 10, generator=seeded(9)) > 0.5).float() if masks else None
    return Kept(torch.arange(n), x, torch.arange(n) % 3, torch.arange(n) % 4, foreground), maps[:, 0] - 0.5


def part(kept: Kept, rows: Tensor) -> Kept:
    foreground = None if kept.foreground is None else kept.foreground[rows]
    return Kept(kept.index[rows], kept.x[rows], kept.label[rows], kept.prediction[rows], foreground)


def table_of_two_processes(kept: Kept, maps: Tensor, *, largest: int) -> Table:
    """Every other sample is in the other process, in batches of three, the last first."""
    seen: list[Tensor] = []

    def summed(places: Tensor) -> Tensor:
        seen.append(places)
        return torch.stack(seen).sum(0)

    for rank in (0, 1):
        rows = [rows_of(part(kept, rows), maps[rows], kept.x[rows]) for rows in kept.index[rank::2].flip(0).split(3)]
        table = Table.gathered(rows, largest, kept.x.shape[1:], kept.foreground is not None, summed)
    return table


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_samples_of_two_processes_come_back_in_their_order(channels: int, masks: bool) -> None:
    kept, maps = sample(11, channels, masks)
    table = table_of_two_processes(kept, maps, largest=20)
    assert len(table) == 11
    assert torch.equal(table.labels, kept.label)
    assert torch.equal(table.predictions, kept.prediction)
    assert torch.equal(table.images, kept.x)
    assert torch.equal(table.maps, maps.clamp(min=0).double())  # what speaks against the class is left out
    if kept.foreground is None:
        assert table.foreground is None
    else:
        assert table.foreground is not None
        assert torch.equal(table.foreground, kept.foreground.double())


def test_of_other_numbers_of_channels_the_mean_is_kept() -> None:
    kept, maps = sample(4, 5, masks=False)
    torch.testing.assert_close(table_of_two_processes(kept, maps, largest=4).images, kept.x.mean(1, keepdim=True))


def test_a_process_without_samples_adds_nothing() -> None:
    assert len(Table.gathered([], 5, torch.Size([1, 12, 10]), False, lambda places: places)) == 0


def test_large_pictures_are_averaged_down() -> None:
    x = torch.rand(2, 3, 112, 84)
    torch.testing.assert_close(small(x), F.avg_pool2d(x, 2))
    kept = Kept(torch.arange(2), x, torch.zeros(2).long(), torch.zeros(2).long(), None)
    table = Table.gathered([rows_of(kept, x[:, 0], x)], 2, x.shape[1:], False, lambda places: places)
    torch.testing.assert_close(table.images, F.avg_pool2d(x, 2))
    torch.testing.assert_close(table.maps.float(), F.avg_pool2d(x[:, :1], 2)[:, 0])
