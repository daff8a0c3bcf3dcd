"""Interleaved process times: on a shared machine wall time is useless, and blocks of one kind drift apart."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

__all__ = ["Row", "compared", "interleaved", "progress", "table"]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        benchmark: Which table it belongs to.
        case: What it was measured on.
        what: What was measured.
        milliseconds: Median process time.
        ratio: Median of the ratios to the floor, repetition by repetition; ``None`` where a ratio says nothing.
        lowest: The ratio that nine of ten repetitions exceed.
        highest: The ratio that one of ten repetitions exceeds.
        extra_microseconds: Median of the differences to the floor.
        target: Largest ratio that is good enough, if there is a promise.
    """

    benchmark: str
    case: str
    what: str
    milliseconds: float
    ratio: float | None = None
    lowest: float | None = None
    highest: float | None = None
    extra_microseconds: float | None = None
    target: float | None = None


def progress(text: str) -> None:
    """One line to stderr; stdout is for tables."""
    print(f"  {text}", file=sys.stderr, flush=True)


def interleaved(contenders: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Process time in seconds of every call, by name; each repetition runs all of them once, from another one on."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-warmup, repeats):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            start = time.process_time()
            contenders[name]()
            elapsed = time.process_time() - start
            if repetition >= 0:
                seconds[name].append(elapsed)
    return seconds


def compared(
    benchmark: str,
    case: str,
    seconds: Mapping[str, list[float]],
    floor: str,
    targets: Mapping[str, float] | None = None,
) -> list[Row]:
    """Rows of what :func:`interleaved` returned, the floor first.

    Ratios are taken within a repetition: a machine that slows down for a while slows both sides.
    """
    rows = []
    for what in sorted(seconds, key=lambda name: name != floor):
        pairs = list(zip(seconds[what], seconds[floor], strict=True))
        ratios = [own / base for own, base in pairs]
        tenths = quantiles(ratios, n=10, method="inclusive")
        extra = 1e6 * median(own - base for own, base in pairs)
        target = (targets or {}).get(what)
        milliseconds = 1e3 * median(seconds[what])
        rows.append(Row(benchmark, case, what, milliseconds, median(ratios), tenths[0], tenths[-1], extra, target))
    return rows


def table(title: str, rows: list[Row]) -> str:
    """A Markdown table."""
    lines = [
        f"### {title}",
        "",
        "| case | what | median ms | x floor | 10 - 90 % | extra us | target |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        ratio = spread = extra = target = ""
        if row.ratio is not None:
            ratio = f"**{row.ratio:.3f}**"
            if row.lowest is not None:
                spread, extra = f"{row.lowest:.2f} - {row.highest:.2f}", f"{row.extra_microseconds:.0f}"
            if row.target is not None:
                target = f"<= {row.target:g} {'met' if row.ratio <= row.target else 'MISSED'}"
        lines.append(f"| {row.case} | {row.what} | {row.milliseconds:.3f} | {ratio} | {spread} | {extra} | {target} |")
    return "\n".join([*lines, ""])
