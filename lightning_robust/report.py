"""The table at the end of a run: what was measured, in words and numbers a person can compare."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from lightning_robust.ood import SCORES

__all__ = ["cells", "table"]

SCALED = " after temperature"
KINDS = ("near", "far")  # of foreign sets, not sets themselves


def table(columns: Mapping[str, Mapping[str, float]] | Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Runs side by side as a Markdown table, one row a measurement.

    Args:
        columns: Names of the runs and what each logged on test data, by log key; pairs of both where names repeat.

    Example:
        >>> print(table({"quickstart": {"robust/test/clean_accuracy": 0.976, "calibration/test/nll": 0.0812}}))
        | on held-out test data | quickstart |
        | --- | ---: |
        | clean accuracy | 97.6 % |
        | NLL | 0.081 |
    """
    named = list(columns.items() if isinstance(columns, Mapping) else columns)
    shown = [cells(metrics) for _, metrics in named]
    labels = dict.fromkeys(label for column in sorted(shown, key=len, reverse=True) for label in column)
    rows = [("on held-out test data", *(name for name, _ in named))]
    rows += [(label, *(column.get(label, "-") for column in shown)) for label in labels]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * len(named))
    return "\n".join(lines)


def cells(metrics: Mapping[str, float]) -> dict[str, str]:
    """Labels and values of one run, in the order of the table.

    Example:
        >>> ece = {"ece": 0.031, "ece_low": 0.012, "ece_high": 0.05, "ece_floor": 0.018}
        >>> cells({f"calibration/test/{name}": value for name, value in ece.items()})
        {'ECE [95 % interval], floor': '0.031 [0.012, 0.050], 0.018'}
    """
    return dict(pair for rows in (_accuracy, _shift, _calibration, _separation, _saliency) for pair in rows(metrics))


def _accuracy(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    robust = [row for row in _of_area("robust", metrics) if "/" not in row[2]]  # loaders after the first
    known = [key for key in ("test/accuracy", "calibration/test/accuracy") if key in metrics]
    if known and not any(metric == "clean_accuracy" for _, _, metric, _ in robust):
        yield "accuracy", _percent(metrics[known[0]])
    for area, suffix, metric, value in robust:
        if metric == "accuracy":
            attacks = [1 for of, _, other, _ in robust if of == area and other.startswith("accuracy_")]
            if len(attacks) > 1:
                yield f"accuracy, worst of {len(attacks)} attacks{suffix}", _percent(value)
        elif metric.startswith("accuracy_"):
            yield f"accuracy under {_attack(metric.removeprefix('accuracy_'))}{suffix}", _percent(value)
        elif metric == "clean_accuracy":
            yield f"clean accuracy{suffix}", _percent(value)


def _shift(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    labels = {"mean_accuracy": "accuracy under corruption, mean", "retention": "accuracy kept under corruption"}
    for _, suffix, metric, value in _of_area("shift", metrics):
        name, _, last = metric.rpartition("/")
        if metric in labels:
            yield f"{labels[metric]}{suffix}", _percent(value)
        elif name and last == "accuracy":
            yield f"accuracy on {name.replace('_', ' ')}{suffix}", _percent(value)


def _calibration(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    by_area: dict[tuple[str, str], dict[str, float]] = {}
    for area, suffix, metric, value in _of_area("calibration", metrics):
        by_area.setdefault((area, suffix), {})[metric] = value
    for (_, suffix), found in by_area.items():
        for scaled in ("", "_scaled"):
            if f"nll{scaled}" in found:
                yield f"NLL{SCALED if scaled else ''}{suffix}", f"{found[f'nll{scaled}']:.3f}"
        for metric, value in found.items():
            method = metric.removeprefix("nll_")
            if f"ece_{method}" in found and method not in ("scaled", metric):
                yield f"NLL after {method}{suffix}", f"{value:.3f}"
        for scaled in ("", "_scaled"):
            if f"ece{scaled}" in found:
                ece, low, high, floor = (found[f"ece{scaled}{part}"] for part in ("", "_low", "_high", "_floor"))
                label = f"ECE{SCALED if scaled else ''}{suffix} [95 % interval], floor"
                yield label, f"{ece:.3f} [{low:.3f}, {high:.3f}], {floor:.3f}"
        if "temperature" in found:
            yield f"temperature (fitted on validation data){suffix}", f"{found['temperature']:.3f}"
        for metric, value in found.items():
            kind = metric.removeprefix("coverage_")
            if f"set_size_{kind}" in found and kind != metric:
                size = found[f"set_size_{kind}"]
                yield f"prediction sets ({kind}): coverage, mean size{suffix}", f"{_percent(value)}, {size:.2f}"


def _separation(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    rows = [
        (area, suffix, found[1], found[2], value)
        for area, suffix, metric, value in _of_area("ood", metrics)
        if (found := re.fullmatch(r"([^/]+)/([^/]+)(?<!_worst_group)_auroc", metric))
    ]
    of_sets = {(area, score, value) for area, _, name, score, value in rows if name not in KINDS}
    seen: set[tuple[str, str]] = set()
    for area, suffix, name, score, value in rows:
        if name in KINDS and (area, score, value) in of_sets:  # the mean over one set is that set's
            continue
        # One score a set, the first that the callback was given, and every detector.
        detector = score not in SCORES
        if not detector and (area, name) in seen:
            continue
        if not detector:
            seen.add((area, name))
        yield f"AUROC, {_foreign(name, detector)} ({score.replace('_', ' ')}){suffix}", f"{value:.3f}"


def _foreign(name: str, detector: bool) -> str:
    if name in KINDS:
        return f"{name}, mean of sets"
    if name == "attacked":
        return "test data under attack"
    return name.replace("_", " ") + ("" if detector else " against test data")


def _saliency(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for key, value in metrics.items():
        match = re.fullmatch(r"(saliency(?:\.([^/]+))?/val_([^/]+))/iou10_to_anchor", key)
        if match:
            suffix = f" ({match[2]})" if match[2] else ""
            cosine = metrics.get(f"{match[1]}/cosine_to_anchor", float("nan"))
            label = f"{match[3].replace('_', ' ')} maps of first and last epoch: overlap, cosine{suffix}"
            yield label, f"{value:.2f}, {cosine:.2f}"


def _of_area(wanted: str, metrics: Mapping[str, float]) -> Iterator[tuple[str, str, str, float]]:
    """Area, suffix that tells several callbacks apart, metric and value of what was logged on test data."""
    for key, value in metrics.items():
        area, _, metric = key.partition("/test/")
        kind, _, name = area.partition(".")
        if metric and kind == wanted:
            yield area, f" ({name})" if name else "", metric, value


def _attack(name: str) -> str:
    match = re.fullmatch(r"pgd(\d+)(?:x(\d+))?_(\w+?)_([\d.e-]+)", name)
    if not match:
        return name
    restarts = f" with {match[2]} restarts" if match[2] else ""
    return f"PGD-{match[1]}{restarts}, {match[3]} {match[4]}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
