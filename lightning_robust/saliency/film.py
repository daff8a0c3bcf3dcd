"""The snapshots of one method over a run, in little space: the first, a few in between, the one before, and now."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_robust.saliency.drift import QuantisedMaps, drift, quantised
from lightning_robust.saliency.sanity import means, skill

__all__ = ["Film"]

BETWEEN = 4  # snapshots kept between the first and the last
SHOWN_BETWEEN = 2
SIMILARITIES = ("iou10", "cosine", "spearman", "ssim")  # what has a null and a floor; a distance has none


class Film:
    """Snapshots of one probe set by one method, oldest first, in 16 bits; the first is the anchor.

    Of the snapshots in between, every one is kept at first, then every second, every fourth, and so on: the size stays
    the same however long the run is.

    Attributes:
        null: Similarity of the anchor to maps that have nothing to do with the trained weights; empty if not measured.
        floor: Similarity of the anchor to maps of the same inputs with a little noise; empty if not measured.

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
        self.null: dict[str, float] = {}
        self.floor: dict[str, float] = {}

    def __len__(self) -> int:
        """How many snapshots were taken so far."""
        return self._kept[-1][0] + 1 if self._kept else 0

    def add(self, caption: str, maps: Tensor) -> dict[str, float]:
        """Add the present maps ``(N, ...)``.

        Returns:
            Means over the probes of everything that :func:`~lightning_robust.saliency.drift` measures, as
            ``iou10_to_anchor``, ``iou10_to_previous`` and so on; the first snapshot has not moved. Both sides are
            compared in 16 bits, so that equal maps are equal, also with those that a checkpoint brought back.
        """
        now = quantised(maps)
        anchor, previous = (self._kept[0][2], self._kept[-1][2]) if self._kept else (now, now)
        moved = {
            f"{name}_to_{since}": value
            for since, earlier in (("anchor", anchor), ("previous", previous))
            for name, value in _similarity(now, earlier).items()
        }
        self._kept.append((len(self), caption, now))
        self._thin()
        return moved

    def calibrate(self, null: Tensor, noisy: Tensor) -> None:
        """What similarities to the anchor mean: the present snapshot has to be the anchor.

        Args:
            null: Maps by a network whose weights were permuted, ``(N, ...)``.
            noisy: Maps of the same inputs with a little noise, ``(N, ...)``.
        """
        anchor = self._kept[0][2]
        self.null, self.floor = (_similarity(anchor, quantised(maps)) for maps in (null, noisy))

    def skills(self, moved: dict[str, float]) -> dict[str, float]:
        """What :meth:`add` returned on a scale of its own: 0 is nothing in common, 1 as near as noise allows.

        Returns:
            ``iou10_skill_to_anchor`` and so on, beside ``iou10_null`` and ``iou10_floor``; nothing if not calibrated.
        """
        found: dict[str, float] = {}
        for name in SIMILARITIES:
            if name in self.null and name in self.floor:
                null, floor = self.null[name], self.floor[name]
                found |= {f"{name}_null": null, f"{name}_floor": floor}
                for since in ("anchor", "previous"):
                    found[f"{name}_skill_to_{since}"] = skill(moved[f"{name}_to_{since}"], null, floor)
        return found

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
        return {"stride": self._stride, "kept": kept, "null": self.null, "floor": self.floor}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Film:
        """What :meth:`to_dict` gave."""
        film = cls()
        film._stride = state["stride"]
        film._kept = [(kept["number"], kept["caption"], QuantisedMaps.from_dict(kept)) for kept in state["kept"]]
        film.null, film.floor = dict(state.get("null", {})), dict(state.get("floor", {}))
        return film

    def _thin(self) -> None:
        first, between, last = self._kept[:1], self._kept[1:-2], self._kept[1:][-2:]  # last: "previous" and "now"
        between = [kept for kept in between if kept[0] % self._stride == 0]
        while len(between) > BETWEEN:
            self._stride *= 2
            between = [kept for kept in between if kept[0] % self._stride == 0]
        self._kept = first + between + last


def _similarity(now: QuantisedMaps, earlier: QuantisedMaps) -> dict[str, float]:
    return means(drift(now.maps(), earlier.maps()))
