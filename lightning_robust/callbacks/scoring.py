"""The scores of a batch: of its logits, of detectors on its features, and once more of what is right and wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.features import Caught
from lightning_robust.callbacks.detecting import Detecting
from lightning_robust.callbacks.ood_summary import GROUP, RIGHT, WRONG
from lightning_robust.losses import LossCall
from lightning_robust.metrics import ScoreTable, StreamedTable

__all__ = ["Scoring"]


class Scoring:
    """How batches are scored in one evaluation, and the tables that keep it.

    Args:
        scores: Functions of logits, by name.
        detecting: The detectors, if there are any.
        streaming: Whether scores are counted instead of kept.
        warn: ``(message, about)``, once.
    """

    def __init__(
        self,
        scores: Mapping[str, Callable[[Tensor], Tensor]],
        detecting: Detecting | None,
        streaming: bool,
        warn: Callable[..., None],
    ) -> None:
        self.scores, self.detecting, self.streaming, self.warn = scores, detecting, streaming, warn
        self._log_probabilities = False  # whether the loss gets these

    @property
    def names(self) -> list[str]:
        """All scores, those of detectors last."""
        return [*self.scores, *(() if self.detecting is None else self.detecting.detectors)]

    def begin(self) -> None:
        """A new evaluation."""
        self._log_probabilities = False

    def table(self, capacity: int, own: bool = False) -> Any:
        """An empty table; ``own`` for that of the evaluation data."""
        if not self.streaming:
            return ScoreTable([*self.names, *((RIGHT, GROUP) if own else ())], capacity)
        judged = [f"{name}_{verdict}" for name in self.names for verdict in (RIGHT, WRONG)] if own else []
        return StreamedTable([*self.names, *judged])

    def of(self, call: LossCall, n: int, caught: Caught | None) -> dict[str, Tensor] | None:
        """Scores ``(N,)`` on the CPU by name; None, with a warning, where samples are more than one prediction.

        Args:
            call: What the model said.
            n: How many samples there are.
            caught: Their features.
        """
        logits = call.class_logits()
        if logits is None and call.kind in ("nll_loss", "kl_div") and call.logits.ndim == 2:
            logits = call.logits.float()  # right but for the energy, which log-probabilities have lost
            self._log_probabilities = True
            if "energy" in self.scores:
                self.warn(f"the loss ({call.kind}) gets log-probabilities, which have no energy; use msp.")
        if logits is None or len(logits) != n:
            self.warn(
                f"scores are about one prediction a sample; this module's loss gets {tuple(call.logits.shape)} for "
                f"{n} samples ({call.kind}). Nothing is measured.",
                "head",
            )
            return None
        scores = {name: score(logits).cpu() for name, score in self.scores.items()}
        return scores if self.detecting is None else scores | self.detecting.scores(caught, call)

    def judged(self, scores: Mapping[str, Tensor], call: LossCall, codes: Tensor | None) -> dict[str, Tensor]:
        """What the table of the evaluation data has beside the scores, ``(N,)`` by name.

        Args:
            scores: Those of these samples.
            call: What the model said.
            codes: The group of each sample, ``(N,)``.
        """
        right = call.correct().cpu().masked_fill(~call.counted().cpu(), float("nan"))
        if self.streaming:
            verdicts = ((RIGHT, right == 1), (WRONG, right == 0))
            return {
                f"{name}_{verdict}": scores[name].masked_fill(~judged, float("nan"))
                for verdict, judged in verdicts
                for name in self.names
            }
        return {RIGHT: right, GROUP: torch.full_like(right, -1) if codes is None else codes.double()}

    def served(self, summed: Callable[[Tensor], Tensor], unreadable: bool) -> list[str]:
        """The scores that were measured; none where a process could not read its part of a set.

        Args:
            summed: Sums over processes, each of which calls this.
            unreadable: Whether this one could not.
        """
        names = list(self.detecting.detectors) if self.detecting is not None else []
        broken = [unreadable, *(name in self.detecting.broken for name in names if self.detecting is not None)]
        anywhere, *lost = summed(torch.tensor(broken, dtype=torch.float64)).bool().tolist()
        if anywhere:
            return []
        served = [score for score in self.scores if not (self._log_probabilities and score == "energy")]
        fitted = self.detecting.fitted if self.detecting is not None else []
        return served + [name for name, none in zip(names, lost, strict=True) if name in fitted and not none]
