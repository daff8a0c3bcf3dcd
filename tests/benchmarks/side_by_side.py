"""Calibration and separation beside what others compute of the same data: ``python -m tests.benchmarks.side_by_side``.

Values, process time and memory of the state. Markdown goes to stdout. Peers that are not installed (``make bench``
installs them) are left out, with a line that says so.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor

from lightning_robust import ood
from lightning_robust.calibration import calibration_error
from lightning_robust.metrics.separation import Separation
from lightning_robust.randomness import seeded
from tests.benchmarks import timing
from tests.benchmarks.accumulators import (
    FITTERS,
    SHOWN,
    calibration_errors,
    ece,
    found_peer,
    pytorch_ood,
    scaled_logits,
    separators,
)
from tests.benchmarks.timing import interleaved, progress

MILLION, BATCH, BINS = 1_000_000, 10_000, 15
OVERCONFIDENT = 0.03
TEMPERATURES = (0.3, 1.6, 8.0, 30.0)


def main() -> None:
    """All tables."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for peer, what in (("netcal", "its temperatures"), ("pytorch_ood", "its areas and scores")):
        if not found_peer(peer):
            print(f"{peer} is not installed: {what} are left out.\n")
    for tell in (calibration, temperatures, separations, sigmoids, scores):
        start = time.process_time()
        for line in tell():
            print(line, flush=True)
        print()
        progress(f"{tell.__name__} took {time.process_time() - start:.0f} s of process time")


def table(title: str, columns: str) -> list[str]:
    """The head of a Markdown table; all columns but the first are numbers."""
    names = columns.split(" | ")
    return [f"### {title}", "", f"| {columns} |", "|---|" + "---:|" * (len(names) - 1)]


def state_bytes(metric: Any) -> int:
    """What a torchmetrics object holds, of tensors."""
    state = [part for value in metric.metric_state.values() for part in (value if isinstance(value, list) else [value])]
    return sum(part.nbytes for part in state)


# -- calibration error -------------------------------------------------------------------------------------------------


def calibration() -> Iterator[str]:
    """ECE of millions of predictions, batch by batch."""
    yield from table(
        "Expected calibration error of millions of confident predictions (two classes, batches of 10,000)",
        "metric | million | value | relative error | seconds | bytes of state",
    )
    for millions in (1, 5, 25):
        progress(f"calibration: {millions} million")
        metrics = calibration_errors(2)
        metrics.pop("torchmetrics, validate_args=False")
        seconds = dict.fromkeys(metrics, 0.0)
        truth = torch.zeros(BINS, dtype=torch.float64)
        for number in range(millions):
            logits, labels = confident(number)
            truth += gaps(logits, labels)
            for name, metric in metrics.items():
                start = time.process_time()
                for batch in zip(logits.split(BATCH), labels.split(BATCH), strict=True):
                    metric.update(*batch)
                seconds[name] += time.process_time() - start
        true = float(truth.abs().sum()) / (millions * MILLION)
        yield f"| float64 | {millions} | {true:.9f} | | | |"
        for name, metric in metrics.items():
            start = time.process_time()
            value = metric.reliability.ece if name.startswith("metrics.") else float(metric.compute())
            seconds[name] += time.process_time() - start
            size = state_bytes(metric)
            yield f"| {name} | {millions} | {value:.9f} | {value / true - 1:+.1e} | {seconds[name]:.2f} | {size:,} |"
    yield ""
    yield timing.table("Time of the calibration error", ece())


def confident(number: int) -> tuple[Tensor, Tensor]:
    """A million log-probabilities ``(N, 2)`` and labels: mostly very sure, three points less often right than sure."""
    generator = seeded(0, number)

    def beta(a: float, b: float, n: int) -> Tensor:
        # torch's own distributions draw from the global stream.
        one, other = (torch._standard_gamma(torch.full((n,), of), generator=generator) for of in (a, b))
        return one / (one + other)

    sure = beta(60.0, 1.0, 7 * MILLION // 10)
    confidence = torch.cat([sure, beta(4.0, 1.5, MILLION - len(sure))])
    confidence = torch.maximum(confidence, 1 - confidence).clamp(max=1 - 1e-7)
    confidence = confidence[torch.randperm(MILLION, generator=generator)]
    right = torch.rand(MILLION, generator=generator) < confidence - OVERCONFIDENT
    return torch.stack([confidence, 1 - confidence], 1).log(), (~right).long()


def gaps(logits: Tensor, labels: Tensor) -> Tensor:
    """Confidence minus accuracy, summed over each bin ``((m-1)/M, m/M]``, all in doubles, ``(M,)``."""
    confidence, predicted = logits.double().softmax(1).max(1)
    edges = torch.arange(1, BINS, dtype=torch.float64) / BINS
    return torch.bincount(torch.bucketize(confidence, edges), confidence - (predicted == labels).double(), BINS)


# -- temperature -------------------------------------------------------------------------------------------------------


def temperatures() -> Iterator[str]:
    """Where fitters end up, from cold to hot."""
    yield from table(
        "Temperature of 50,000 x 100 logits: fitted T, excess of its NLL over the best, ECE at it; time at T* = 1.6",
        " | ".join(["fitter", *(f"T* near {scale:g}" for scale in TEMPERATURES), "ms", "x ours"]),
    )
    cells: dict[str, list[str]] = {name: [] for name in ("best, float64", *FITTERS)}
    for scale in TEMPERATURES:
        progress(f"temperatures: {scale:g}")
        logits, labels = scaled_logits(scale)
        best = 1 / brentq(partial(slope, logits.double(), labels), 1e-3, 1e2, xtol=1e-13)
        least = nll(logits, labels, best)
        cells["best, float64"].append(f"{best:.6g}, NLL {least:.6f}, {calibration_error(logits / best, labels):.4f}")
        for name, fit in FITTERS.items():
            found = fit(logits, labels)
            excess = nll(logits, labels, found) - least
            cells[name].append(f"{found:.6g}, {excess:.0e}, {calibration_error(logits / found, labels):.4f}")
    logits, labels = scaled_logits(1.6)
    seconds = interleaved({name: partial(fit, logits, labels) for name, fit in FITTERS.items()}, 3, warmup=0)
    ours = next(iter(FITTERS))
    yield f"| best, float64 | {' | '.join(cells.pop('best, float64'))} | | |"
    for name, ends in cells.items():
        ratio = median(own / base for own, base in zip(seconds[name], seconds[ours], strict=True))
        yield f"| {name} | {' | '.join(ends)} | {1e3 * median(seconds[name]):.0f} | {ratio:.1f} |"


def slope(logits: Tensor, labels: Tensor, beta: float) -> float:
    """The derivative of the mean loss by 1/T."""
    expected = (torch.softmax(beta * logits, 1) * logits).sum(1)
    return float((expected - logits.gather(1, labels[:, None])[:, 0]).mean())


def nll(logits: Tensor, labels: Tensor, temperature: float) -> float:
    """The mean loss at a temperature, in doubles."""
    return float(torch.nn.functional.cross_entropy(logits.double() / temperature, labels))


# -- separation --------------------------------------------------------------------------------------------------------


def separations() -> Iterator[str]:
    """Areas and rates of a million scores of either side."""
    generator = seeded(0)
    s_in, s_out = (shift + torch.randn(MILLION, generator=generator) for shift in (0.0, 1.5))
    yield from table(
        "Separation of 1,000,000 + 1,000,000 scores (foreign ones positive)",
        "how | AUROC | AUPR | FPR95 | ms | x ours",
    )
    ways = separators(s_in, s_out)
    progress("separations: values and times")
    seconds = interleaved(ways, 5)
    ours = next(iter(ways))
    for name, find in ways.items():
        found = find()
        values = " | ".join(f"{found[measure]:.8f}" for measure in SHOWN)
        ratio = median(own / base for own, base in zip(seconds[name], seconds[ours], strict=True))
        yield f"| {name} | {values} | {1e3 * median(seconds[name]):.0f} | {ratio:.1f} |"
    yield ""
    yield from table(
        "The same as metrics, 2,000 batches of 1,000",
        "metric | AUROC | update, ms | compute, ms | bytes of state",
    )
    for name, (metric, compute) in _metrics().items():
        progress(f"separations: {name}")
        start = time.process_time()
        for side, foreign in ((s_in, 0), (s_out, 1)):
            labels = torch.full((1000,), foreign)
            for batch in side.split(1000):
                metric.update(batch, labels)
        middle = time.process_time()
        value = compute(metric)
        took, finding = middle - start, time.process_time() - middle
        parts = metric.values(copy_state=False) if hasattr(metric, "compute_groups") else [metric]
        # Of a collection the metrics share one state, if they can.
        size = max(map(state_bytes, parts))
        yield f"| {name} | {value:.8f} | {1e3 * took:.0f} | {1e3 * finding:.0f} | {size:,} |"


def _metrics() -> dict[str, tuple[Any, Callable[[Any], float]]]:
    from torchmetrics import MetricCollection
    from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision, BinaryROC

    theirs = MetricCollection([BinaryAUROC(), BinaryAveragePrecision(), BinaryROC()])
    return {
        "metrics.Separation (10 measures)": (Separation(), lambda metric: metric.found["auroc"]),
        "metrics.Separation(streaming=False)": (Separation(streaming=False), lambda metric: metric.found["auroc"]),
        "torchmetrics auroc, average precision, roc": (theirs, lambda metric: float(metric.compute()["BinaryAUROC"])),
    }


def sigmoids() -> Iterator[str]:
    """One and the same set of scores, in batches of different sizes."""
    from torchmetrics.classification import BinaryAUROC

    sizes = (1000, 128, 32, 8)
    yield from table(
        "AUROC of the entropy of 10,000 + 10,000 predictions, the own ones first: does the size of batches matter?",
        " | ".join(["metric", "all at once", *(f"batches of {size}" for size in sizes)]),
    )
    generator = seeded(0)
    # One class is ahead of nine, further for one's own data: few of their entropies are above 1.
    ahead = torch.nn.functional.one_hot(torch.tensor(0), 10)
    sides = [ood.entropy(by * ahead + torch.randn(10_000, 10, generator=generator)) for by in (6, 4)]
    exact = ood.separation(*sides)["auroc"]
    for name, make in (("metrics.Separation", Separation), ("torchmetrics BinaryAUROC", BinaryAUROC)):
        values = []
        for size in (20_000, *sizes):
            metric = make()
            whole = [torch.cat(sides)] if size == 20_000 else [batch for side in sides for batch in side.split(size)]
            seen = 0
            for batch in whole:
                metric.update(batch, (torch.arange(seen, seen + len(batch)) >= 10_000).long())
                seen += len(batch)
            values.append(f"{float(metric.compute()):.4f}")
        yield f"| {name} | {' | '.join(values)} |"
    yield f"| ood.separation | {exact:.4f} |" + " |" * len(sizes)


def scores() -> Iterator[str]:
    """Scores of logits beside those of pytorch-ood."""
    if not found_peer("pytorch_ood"):
        return
    yield from table(
        "Scores of 10,000 x 100 logits, from 0.3 to 30 wide: largest error against float64, and how many are distinct",
        "score | error, ours | distinct | pytorch-ood | error | distinct",
    )
    logits = torch.logspace(-0.5, 1.5, 10_000)[:, None] * torch.randn(10_000, 100, generator=seeded(0))
    for name, module, detector, shown in _pairs():
        theirs = getattr(pytorch_ood(f"detector.{module}"), detector)(None).predict_logits(logits)
        ours, exact = ood.SCORES[name](logits), shown(ood.SCORES[name](logits.double()))
        off, off_theirs = (float((found - exact).abs().max()) for found in (shown(ours), theirs))
        distinct, distinct_theirs = (len(found.unique()) for found in (ours, theirs))
        yield f"| {name} | {off:.0e} | {distinct:,} | {detector} | {off_theirs:.0e} | {distinct_theirs:,} |"


def _pairs() -> list[tuple[str, str, str, Callable[[Tensor], Tensor]]]:
    """Our score, module and class there, and what turns ours into theirs, where they are on another scale."""
    return [
        ("energy", "energy", "EnergyBased", lambda s: s),
        ("max_logit", "maxlogit", "MaxLogit", lambda s: s),
        ("msp", "softmax", "MaxSoftmax", torch.expm1),
        ("entropy", "entropy", "Entropy", lambda s: s),
        ("gen", "gen", "GEN", lambda s: s / 100),
    ]


if __name__ == "__main__":
    main()
