"""ECE, temperature fits and separation beside what else computes them; ``side_by_side`` prints their values as well."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust import ood
from lightning_robust.calibration import fit_temperature
from lightning_robust.metrics import CalibrationError
from lightning_robust.randomness import seeded
from tests.benchmarks.timing import Row, compared, interleaved, progress

__all__ = [
    "FITTERS",
    "SHOWN",
    "calibration_errors",
    "ece",
    "found_peer",
    "pytorch_ood",
    "scaled_logits",
    "separation",
    "separators",
    "temperature",
]

Fitter = Callable[[Tensor, Tensor], float]
SHOWN = ("auroc", "aupr_out", "fpr95_ood_positive")


# -- calibration error -------------------------------------------------------------------------------------------------


def ece() -> list[Row]:
    """ECE of 1,000 x 100 logits a batch (ours: NLL and Brier score too), updated and computed, over torchmetrics."""
    generator = seeded(0)
    logits, labels = 3 * torch.randn(1000, 100, generator=generator), torch.randint(100, (1000,), generator=generator)
    metrics = calibration_errors(100)
    ours = list(metrics)[-1]
    progress("ece: updates")

    def hundred(metric: Any) -> None:
        metric.reset()
        for _ in range(100):
            metric.update(logits, labels)

    updates = interleaved({name: partial(hundred, metric) for name, metric in metrics.items()}, 9)
    rows = compared("ece", "100 updates, (1000, 100)", updates, "torchmetrics", {ours: 0.667})

    progress("ece: the error of a million")
    for metric in metrics.values():
        for _ in range(900):
            metric.update(logits, labels)

    def computed(metric: Any) -> None:
        for _ in range(10):
            metric._computed = None  # torchmetrics keeps what it computed
            metric.compute()

    values = interleaved({name: partial(computed, metric) for name, metric in metrics.items()}, 9)
    return rows + compared("ece", "10 times the error of 1,000,000", values, "torchmetrics", {ours: 0.01})


def calibration_errors(classes: int) -> dict[str, Any]:
    """Metrics of the expected calibration error over 15 bins by name, the last one ours (with NLL and Brier score)."""
    from torchmetrics.classification import MulticlassCalibrationError

    return {
        "torchmetrics": MulticlassCalibrationError(classes, n_bins=15),
        "torchmetrics, validate_args=False": MulticlassCalibrationError(classes, n_bins=15, validate_args=False),
        "metrics.CalibrationError": CalibrationError(),
    }


# -- temperature -------------------------------------------------------------------------------------------------------


def temperature() -> list[Row]:
    """A temperature for 50,000 x 100 logits, over the quickest LBFGS that is published; values: `side_by_side`."""
    logits, labels = scaled_logits(1.6)
    contenders = {name: partial(fit, logits, labels) for name, fit in FITTERS.items()}
    floor = next(name for name in FITTERS if name.endswith("(torch-uncertainty 0.13)"))
    progress(f"temperature: {len(contenders)} fitters, 5 times")
    seconds = interleaved(contenders, 5)
    return compared("temperature", "50,000 x 100, T* = 1.6", seconds, floor, {"calibration.fit_temperature": 0.2})


def scaled_logits(scale: float, rows: int = 50_000, classes: int = 100) -> tuple[Tensor, Tensor]:
    """Logits whose best temperature is near ``scale``: labels are drawn before the logits are multiplied by it."""
    generator = seeded(0)
    logits = 2 * torch.randn(rows, classes, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return scale * logits, labels


def _newton(logits: Tensor, labels: Tensor) -> float:
    return fit_temperature(logits, labels).temperature


def _lbfgs(
    logits: Tensor,
    labels: Tensor,
    *,
    start: float,
    read: Callable[[Tensor], Tensor],
    **settings: Any,
) -> float:
    """LBFGS on one number, of which ``read`` makes the factor of the logits."""
    number = nn.Parameter(torch.tensor([start]))
    optimizer = torch.optim.LBFGS([number], **settings)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits * read(number), labels)
        value.backward()  # type: ignore[no-untyped-call]  # as torch has it
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]  # likewise
    return 1 / float(read(number.detach()))


def _netcal(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> float:
    from netcal.scaling import TemperatureScaling  # type: ignore[import-untyped]  # ships no types

    scaling = TemperatureScaling()
    scaling.fit(logits.to(dtype).softmax(1).numpy(), labels.numpy())
    return 1 / float(scaling.temperature[0])  # what it calls temperature is the inverse


def _fitters() -> dict[str, Fitter]:
    def inverse(number: Tensor) -> Tensor:
        return 1 / number

    # The algorithms as published, not the packages: those want a model, a loader or a GPU around the same lines.
    fitters: dict[str, Fitter] = {
        "calibration.fit_temperature": _newton,
        "LBFGS on T, lr 0.01, 50 it. (gpleiss, to 2025)": partial(
            _lbfgs, start=1.5, read=inverse, lr=0.01, max_iter=50
        ),
        "LBFGS on T, lr 0.01, 200 it. (gpleiss)": partial(_lbfgs, start=1.5, read=inverse, lr=0.01, max_iter=200),
        "LBFGS on T, lr 0.1, 100 it. (torch-uncertainty 0.8)": partial(
            _lbfgs, start=1.0, read=inverse, lr=0.1, max_iter=100
        ),
        "LBFGS on 1/T, lr 0.1, 100 it. (torch-uncertainty 0.13)": partial(
            _lbfgs, start=1.0, read=lambda number: number, lr=0.1, max_iter=100
        ),
        "LBFGS on log 1/T, strong Wolfe": partial(
            _lbfgs, start=0.0, read=torch.exp, lr=1.0, max_iter=50, line_search_fn="strong_wolfe"
        ),
    }
    if found_peer("netcal") and found_peer("pyro"):
        fitters["netcal, float64"] = partial(_netcal, dtype=torch.float64)
        fitters["netcal, float32"] = partial(_netcal, dtype=torch.float32)
    return fitters


# -- separation --------------------------------------------------------------------------------------------------------


def separation() -> list[Row]:
    """AUROC, AUPR and FPR95 of a million scores of either side, over torchmetrics; values: `side_by_side`."""
    generator = seeded(0)
    s_in, s_out = (shift + torch.randn(1_000_000, generator=generator) for shift in (0.0, 1.5))
    contenders = separators(s_in, s_out)
    progress(f"separation: {len(contenders)} ways, 5 times")
    floor = next(name for name in contenders if name.startswith("torchmetrics"))
    return compared("separation", "1M + 1M", interleaved(contenders, 5), floor, {"ood.separation": 0.5})


def separators(s_in: Tensor, s_out: Tensor) -> dict[str, Callable[[], dict[str, float]]]:
    """Ways to AUROC, AUPR and FPR95, foreign samples positive, of the same scores."""
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_roc

    scores = torch.cat([s_in, s_out])
    foreign = torch.cat([torch.zeros(len(s_in), dtype=torch.long), torch.ones(len(s_out), dtype=torch.long)])
    arrays = foreign.numpy(), scores.numpy()

    def streamed() -> dict[str, float]:
        sides = [sum(map(ood.StreamedScores.of, side.split(1000)), ood.StreamedScores.zero()) for side in (s_in, s_out)]
        return ood.separation_streamed(*sides)

    def torchmetrics() -> dict[str, float]:
        fpr, tpr, _ = binary_roc(scores, foreign)
        auroc, aupr = binary_auroc(scores, foreign), binary_average_precision(scores, foreign)
        return dict(zip(SHOWN, (float(auroc), float(aupr), float(fpr[tpr >= 0.95][0])), strict=True))

    def sklearn() -> dict[str, float]:
        fpr, tpr, _ = roc_curve(*arrays)
        found = (roc_auc_score(*arrays), average_precision_score(*arrays), fpr[tpr >= 0.95][0])
        return dict(zip(SHOWN, map(float, found), strict=True))

    ways: dict[str, Callable[[], dict[str, float]]] = {
        "ood.separation": lambda: ood.separation(s_in, s_out),
        "ood.separation_streamed, batches of 1,000": streamed,
        "torchmetrics auroc, average_precision, roc": torchmetrics,
        "scikit-learn roc_auc, average_precision, roc_curve": sklearn,
    }
    if functional := pytorch_ood("metrics.functional"):

        def of_pytorch_ood() -> dict[str, float]:
            labels = -foreign
            found = (
                functional.auroc(scores, labels),
                functional.aupr(scores, labels),
                functional.fpr_at_tpr(scores, labels),
            )
            return dict(zip(SHOWN, map(float, found), strict=True))

        ways["pytorch-ood auroc, aupr, fpr_at_tpr"] = of_pytorch_ood
    return ways


# -- peers -------------------------------------------------------------------------------------------------------------


def found_peer(name: str) -> bool:
    """Whether a peer is installed; ``make bench`` does."""
    return importlib.util.find_spec(name) is not None


def pytorch_ood(module: str) -> Any:
    """A module of pytorch-ood; None where the package is not installed.

    The files themselves need torch alone, the package's ``__init__`` needs torchvision for its data sets.
    """
    spec = importlib.util.find_spec("pytorch_ood")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    for folder in ("", "detector", "metrics", "model", "utils"):
        name = f"pytorch_ood.{folder}".rstrip(".")
        if name not in sys.modules:
            sys.modules[name] = package = ModuleType(name)
            package.__path__, package.__spec__ = [str(root / folder)], spec
    return importlib.import_module(f"pytorch_ood.{module}")


FITTERS = _fitters()
