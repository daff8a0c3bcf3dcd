"""The snapshots of one method over a run, in little space: the first, a few in between, the one before, and now."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_robust.saliency.drift import QuantisedMaps, drift, quantised

__all__ = ["Film"]

BETWEEN = 4  # snapshots kept between the first and the last
SHOWN_BETWEEN = 2


class Film:
    """Snapshots of one probe set by one method, oldest first, in 8 bits; the first is the anchor.

    Of the snapshots in between, every one is kept at first, then every second, every fourth, and so on: the size stays
    the same however long the run is.

    Example:
        >>> import torch
        >>> film = Film()
        >>> for epoch in range(1, 30):
        ...     _ = film.add(f"epoch {epoch}", torch.rand(2, 4, 4))
        >>> [caption for caption, _ in film.shown()]
        ['first: epoch 1', 'epoch 9', 'epoch 17', 'previous: epoch 28', 'now: epoch 29']
    """

    def __init__(self) -> None:
        self._kept: list[tuple[int, str, QuantisedMaps]] = []  # number, caption, maps
        self._stride = 1

    def __len__(self) -> int:
        """How many snapshots were taken so far."""
        return self._kept[-1][0] + 1 if self._kept else 0

    def add(self, caption: str, maps: Tensor) -> dict[str, float]:
        """Add the present maps ``(N, ...)``.

        Returns:
            Means over the probes: ``iou10_to_anchor``, ``cosine_to_anchor``, ``iou10_to_previous`` and
            ``cosine_to_previous``; all 1 for the first snapshot. Both sides are compared in 8 bits, so that equal maps
            are equal, also with those that a checkpoint brought back.
        """
        now = quantised(maps)
        anchor, previous = (self._kept[0][2], self._kept[-1][2]) if self._kept else (now, now)
        moved: dict[str, float] = {}
        for since, earlier in (("anchor", anchor), ("previous", previous)):
            for name, values in drift(now.maps(), earlier.maps()).items():
                moved[f"{name}_to_{since}"] = float(values.mean())
        self._kept.append((len(self), caption, now))
        self._thin()
        return moved

    def shown(self) -> list[tuple[str, Tensor]]:
        """Captions and maps ``(N, ...)`` for a filmstrip, oldest first, five at most."""
        names = ["first: ", *[""] * (len(self._kept) - 3), "previous: ", "now: "]
        if len(self._kept) < 3:
            names = ["first: ", "now: "][: len(self._kept)]
        rows = [(number, name + caption, maps) for name, (number, caption, maps) in zip(names, self._kept, strict=True)]
        between = rows[1:-2]
        if len(between) > SHOWN_BETWEEN:
            # Those nearest to an even spacing in time.
            times = [len(self) * i / (SHOWN_BETWEEN + 1) for i in range(1, SHOWN_BETWEEN + 1)]
            between = [min(between, key=lambda row: abs(row[0] - time)) for time in times]
        return [(caption, maps.maps()) for _, caption, maps in rows[:1] + between + rows[1:][-2:]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and tensors, for a checkpoint."""
        kept = [{"number": n, "caption": caption, **maps.to_dict()} for n, caption, maps in self._kept]
        return {"stride": self._stride, "kept": kept}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Film:
        """What :meth:`to_dict` gave."""
        film = cls()
        film._stride = state["stride"]
        film._kept = [(kept["number"], kept["caption"], QuantisedMaps.from_dict(kept)) for kept in state["kept"]]
        return film

    def _thin(self) -> None:
        first, between, last = self._kept[:1], self._kept[1:-2], self._kept[1:][-2:]  # last: "previous" and "now"
        between = [kept for kept in between if kept[0] % self._stride == 0]
        while len(between) > BETWEEN:
            self._stride *= 2
            between = [kept for kept in between if kept[0] % self._stride == 0]
        self._kept = first + between + last
