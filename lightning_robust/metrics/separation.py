"""How well a score finds foreign inputs, as a metric: scores in, counts of fixed size inside."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.ood.separation import MEASURES, separation
from lightning_robust.ood.streaming import LEVELS, StreamedScores, places, separation_streamed

__all__ = ["Separation"]


class Separation(Metric):
    """How well a score tells out-of-distribution inputs from the others; AUROC or another measure, in [0, 1].

    By default the state is two times 65,537 counts, one MiB whatever the number of samples; two processes equal one,
    and the measures are those of :func:`~lightning_robust.ood.separation_streamed`. No score is ever squashed: results
    do not depend on the range of scores in a batch, nor on the size of batches.

    Args:
        metric: What :meth:`compute` returns, one of the names that :func:`~lightning_robust.ood.separation` finds,
            e.g. ``"auroc"`` or ``"fpr95_ood_positive"``.
        streaming: ``False`` keeps all scores, for exact values; needed only where all scores lie within 1 % of a number
            that is not 0.
        **kwargs: torchmetrics' own, e.g. ``sync_on_compute``.

    Raises:
        ValueError: If there is no such metric; the message names the nearest one.

    Example:
        >>> from lightning_robust.ood import energy
        >>> metric = Separation("auroc")
        >>> metric.update(energy(torch.tensor([[9.0, 0.0], [1.0, 0.0]])), torch.tensor([False, True]))
        >>> metric.update(torch.tensor([-5.0, -0.8]), torch.tensor([False, False]))
        >>> metric.compute()
        tensor(0.6667)
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    counts: Tensor
    familiar: list[Tensor]
    foreign: list[Tensor]

    def __init__(self, metric: str = "auroc", streaming: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if metric not in MEASURES:
            near = difflib.get_close_matches(str(metric), MEASURES, 1, cutoff=0.3)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"expected a metric out of {', '.join(MEASURES)}; got {metric!r}.{hint}")
        self.metric = metric
        self.streaming = streaming
        if streaming:
            self.add_state("counts", torch.zeros(2, LEVELS + 1, dtype=torch.int64), dist_reduce_fx="sum")
        else:
            self.add_state("familiar", [], dist_reduce_fx="cat")
            self.add_state("foreign", [], dist_reduce_fx="cat")

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]  # torchmetrics has an attribute of the class there
        """Whether a better score has a higher value: for areas, not for error rates."""
        return self.metric.startswith("au")

    def update(self, scores: Tensor, is_foreign: Tensor) -> None:
        """Count a batch.

        Args:
            scores: ``(N,)``, higher = more out-of-distribution. NaN and infinite ones are counted as invalid only.
            is_foreign: ``(N,)``, true or 1 for out-of-distribution samples, false or 0 for the others.

        Raises:
            ValueError: If the shapes are not (N,), or ``is_foreign`` holds other numbers than 0 and 1.
        """
        if scores.ndim != 1 or is_foreign.shape != scores.shape:
            raise ValueError(
                "expected scores (N,) and is_foreign (N,), got "
                f"{tuple(scores.shape)} and {tuple(is_foreign.shape)}; one score a sample."
            )
        foreign = is_foreign.to(torch.bool)
        if not bool((foreign == is_foreign).all()):
            raise ValueError(f"expected is_foreign of 0 and 1, got {is_foreign.unique().tolist()[:10]}.")  # type: ignore[no-untyped-call]  # as torch has it
        if self.streaming:
            # Both sides in one count: a batch is small beside the table that it is added to.
            rows = places(scores) + foreign * (LEVELS + 1)
            counts = torch.bincount(rows.cpu(), minlength=2 * (LEVELS + 1)).view(2, LEVELS + 1)
            self.counts = self.counts + counts.to(self.counts.device)
        else:
            self.familiar.append(scores.detach()[~foreign])
            self.foreign.append(scores.detach()[foreign])

    def compute(self) -> Tensor:
        """The measure, a scalar; NaN if a side has no scores."""
        return torch.tensor(self.found[self.metric], dtype=torch.float32, device=self.device)

    @property
    def found(self) -> dict[str, float]:
        """All measures; within ``sync_context()`` of all processes."""
        if self.streaming:
            inside, outside = map(StreamedScores.load, self.counts)
            return separation_streamed(inside, outside) if inside.n and outside.n else _nothing()
        sides = [scores[scores.isfinite()] for scores in self._exact()]
        return separation(*sides) if all(map(len, sides)) else _nothing()

    @property
    def invalid(self) -> int:
        """How many scores were NaN or infinite; they are in no measure."""
        if self.streaming:
            return int(self.counts[:, -1].sum())
        return sum(int((~scores.isfinite()).sum()) for scores in self._exact())

    def _exact(self) -> list[Tensor]:
        # A state that was synchronised is one tensor, no list.
        sides = [[side] if isinstance(side, Tensor) else side for side in (self.familiar, self.foreign)]
        return [torch.cat(side) if side else torch.zeros(0) for side in sides]

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> Any:
        # torchmetrics' own hook. `set_dtype` would round counts and scores to half precision.
        states = ("counts",) if self.streaming else ("familiar", "foreign")
        result = super()._apply(fn, exclude_state=states)
        for name in states:
            state = getattr(self, name)
            moved = state.to(self.device) if isinstance(state, Tensor) else [part.to(self.device) for part in state]
            setattr(self, name, moved)
        return result


def _nothing() -> dict[str, float]:
    return dict.fromkeys(MEASURES, math.nan)
