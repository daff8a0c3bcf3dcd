"""One probe set over a run: which samples it holds, films of their maps, and what was predicted at the anchor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_robust.saliency import Candidates, Film, ProbeSet

__all__ = ["WatchedProbes"]

SETTLED = 0.5  # skill to the snapshot before


class WatchedProbes:
    """A probe set, chosen once in the life of a run, and what becomes of it.

    Args:
        name: What distinguishes its keys from those of other sets; may be empty.

    Attributes:
        candidates: What picks the probes, while it does.
        probes: The samples, once they are chosen.
        films: Snapshots by method.
        first_seen: Predictions at the anchor, ``(n,)``.
        history: Of each snapshot when it was, and how far the maps of each method had moved.
        evaluations: How many evaluations of the fit there were.
        known: The entry of a checkpoint or an earlier evaluation, until this run has chosen its samples.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.candidates: Candidates | None = None
        self.probes: ProbeSet | None = None
        self.known: Mapping[str, Any] | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        self.films: dict[str, Film] = {}
        self.first_seen: Tensor | None = None
        self.history: list[dict[str, Any]] = []
        self.evaluations = 0

    def restore(self, entry: Mapping[str, Any]) -> None:
        """Go on where :meth:`to_dict` left off, if the samples turn out to be the same."""
        self.known, self.probes = entry, None
        self.first_seen = torch.tensor(entry["predictions"])
        self.films = {method: Film.from_dict(film) for method, film in entry["films"].items()}
        self.history = list(entry["drift"])
        self.evaluations = int(entry.get("evaluations", 0))

    def to_dict(self) -> Mapping[str, Any] | None:
        """Plain numbers, lists and tensors for a checkpoint; None before the first snapshot."""
        if self.probes is None or self.first_seen is None:
            return self.known
        return {
            "hash": self.probes.hash,
            "indices": self.probes.index.tolist(),
            "labels": self.probes.label.tolist(),
            "predictions": self.first_seen.tolist(),
            "films": {method: film.to_dict() for method, film in self.films.items()},
            "drift": self.history,
            "evaluations": self.evaluations,
        }

    def settle(self, probes: ProbeSet) -> str | None:
        """Take these samples from now on; what is wrong with them if a film of other samples has to end here."""
        if not len(probes):
            return None
        known, self.known, self.probes = self.known, None, probes
        if known is None or known["hash"] == probes.hash:
            return None
        self._start_anew()
        return (
            f"earlier snapshots explain other samples than this run's data (hash {known['hash']}, now {probes.hash}); "
            "a new anchor is set. Is the loader shuffled, augmented, or of other data?"
        )

    def reconsider(self) -> None:
        """Choose the samples again in the next evaluation, perhaps of other data, and compare."""
        self.known, self.probes = self.to_dict(), None

    @property
    def started(self) -> bool:
        """Whether there is a snapshot."""
        return any(map(len, self.films.values()))

    def alarm(self, method: str, share: float) -> float:
        """1 where maps that had settled have moved since the snapshot before, else 0.

        Settled: half of the earlier snapshots had a skill to the one before of at least 0.5. Moved: it is below this
        share of that median.
        """
        skills = [row.get(method, {}).get("iou10_skill_to_previous", math.nan) for row in self.history[1:]]
        known = [skill for skill in skills[:-1] if math.isfinite(skill)]
        usual = median(known) if known else 0.0
        return float(usual >= SETTLED and skills[-1] < share * usual)
