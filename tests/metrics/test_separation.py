"""The metric: counts or scores, the same measures as the functions, untouched by batches, casts and processes."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC

from lightning_robust.metrics.separation import Separation
from lightning_robust.ood import MEASURES, entropy, separation
from lightning_robust.randomness import seeded

LOGITS = torch.randn(2000, 10, generator=seeded(0)) * torch.linspace(4, 1, 2000)[:, None]
SCORES = entropy(LOGITS)
FOREIGN = torch.rand(2000, generator=seeded(1)) < torch.linspace(0.2, 0.8, 2000)

both = pytest.mark.parametrize("streaming", [True, False])


def measured(
    scores: Tensor = SCORES, foreign: Tensor = FOREIGN, batch: int = 300, streaming: bool = True, metric: str = "auroc"
) -> Separation:
    counted = Separation(metric, streaming)
    for s, f in zip(scores.split(batch), foreign.split(batch), strict=True):
        counted.update(s, f)
    return counted


@both
@pytest.mark.parametrize("metric", MEASURES)
def test_every_measure_is_that_of_the_function(metric: str, streaming: bool) -> None:
    expected = separation(SCORES[~FOREIGN], SCORES[FOREIGN])[metric]
    found = float(measured(metric=metric, streaming=streaming).compute())
    assert found == pytest.approx(expected, abs=2e-3 if streaming else 1e-7)


@both
def test_the_area_is_that_of_scikit_learn(streaming: bool) -> None:
    expected = roc_auc_score(FOREIGN.numpy(), SCORES.numpy())
    assert float(measured(streaming=streaming).compute()) == pytest.approx(expected, abs=1e-5)


@both
def test_batches_mean_nothing_where_torchmetrics_squashes_some(streaming: bool) -> None:
    distances = 0.5 + 0.7 * torch.rand(400, generator=seeded(2)) + 0.4 * (torch.arange(400) >= 200)
    foreign = torch.arange(400) >= 200  # first all of the model's own data, then the others, as loaders come
    whole = measured(distances, foreign, 400, streaming).found
    assert measured(distances, foreign, 2, streaming).found == whole
    theirs = BinaryAUROC()
    for s, f in zip(distances.split(2), foreign.long().split(2), strict=True):
        theirs.update(s, f)
    assert abs(float(theirs.compute()) - whole["auroc"]) > 0.1


def test_scores_that_a_sigmoid_saturates_are_told_apart() -> None:
    assert float(measured(100 + 10 * SCORES).compute()) == pytest.approx(float(measured().compute()), abs=1e-4)


@pytest.mark.parametrize("flags", [FOREIGN, FOREIGN.long(), FOREIGN.float()])
def test_flags_are_true_or_one(flags: Tensor) -> None:
    assert measured(foreign=flags).found == measured().found


@both
def test_invalid_scores_are_counted_and_in_no_measure(streaming: bool) -> None:
    counted = measured(streaming=streaming)
    counted.update(torch.tensor([math.nan, math.inf, -math.inf]), torch.tensor([0, 1, 1]))
    assert counted.invalid == 3
    assert counted.found == measured(streaming=streaming).found


@both
@pytest.mark.parametrize("foreign", [True, False])
def test_a_side_without_scores_is_nan(streaming: bool, foreign: bool) -> None:
    counted = measured(SCORES[:5], torch.full((5,), foreign), streaming=streaming)
    assert math.isnan(counted.compute())
    assert set(counted.found) == set(MEASURES)


def test_the_state_is_one_mebibyte_whatever_the_number_of_scores() -> None:
    few, many = measured(SCORES[:8], FOREIGN[:8]), measured()
    assert few.counts.shape == many.counts.shape == (2, 65537)
    assert few.counts.dtype == torch.int64


@both
def test_forward_gives_the_batch_and_remembers_the_rest(streaming: bool) -> None:
    counted = Separation(streaming=streaming)
    values = [counted(s, f) for s, f in zip(SCORES.split(500), FOREIGN.split(500), strict=True)]
    assert values[1] == measured(SCORES[500:1000], FOREIGN[500:1000], streaming=streaming).compute()
    assert counted.compute() == measured(streaming=streaming).compute()


@both
def test_reset_forgets(streaming: bool) -> None:
    counted = measured(streaming=streaming)
    counted.reset()
    counted.update(SCORES[:500], FOREIGN[:500])
    assert counted.compute() == measured(SCORES[:500], FOREIGN[:500], streaming=streaming).compute()


@both
def test_two_processes_are_one(streaming: bool) -> None:
    first, second = (measured(SCORES[part], FOREIGN[part], 300, streaming) for part in (slice(700), slice(700, 2000)))
    theirs = iter([second.counts] if streaming else [torch.cat(second.familiar), torch.cat(second.foreign)])
    first.distributed_available_fn = lambda: True
    with first.sync_context(dist_sync_fn=lambda state, group: [state, next(theirs)]):
        assert first.found == measured(streaming=streaming).found
    assert first.found == measured(SCORES[:700], FOREIGN[:700], streaming=streaming).found


@both
def test_a_pickled_metric_goes_on_counting(streaming: bool) -> None:
    counted = pickle.loads(pickle.dumps(measured(SCORES[:700], FOREIGN[:700], streaming=streaming)))
    counted.update(SCORES[700:], FOREIGN[700:])
    assert counted.compute() == measured(streaming=streaming).compute()


CASTS: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to(torch.float16),
    "set_dtype": lambda module: module[0].set_dtype(torch.float16),  # type: ignore[index]
}


@both
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_no_cast_of_the_module_around_it_touches_the_state(
    cast: Callable[[nn.Module], object], streaming: bool
) -> None:
    counted = measured(SCORES[:700], FOREIGN[:700], streaming=streaming)
    cast(nn.ModuleList([counted, nn.Linear(2, 2)]))
    counted.update(SCORES[700:], FOREIGN[700:])
    assert counted.found == measured(streaming=streaming).found


def test_the_state_follows_the_module_to_its_device() -> None:
    assert measured().to("meta").counts.device.type == "meta"
    assert {part.device.type for part in measured(streaming=False).to("meta").foreign} == {"meta"}


def test_it_can_be_updated_in_inference_mode_and_afterwards() -> None:
    counted = Separation()
    with torch.inference_mode():
        counted.update(SCORES[:700], FOREIGN[:700])
    counted.update(SCORES[700:], FOREIGN[700:])
    assert counted.compute() == measured().compute()


def test_areas_are_better_high_and_error_rates_low() -> None:
    better = {metric: Separation(metric).higher_is_better for metric in MEASURES}
    assert better["auroc"] is better["aupr_out"] is True
    assert better["fpr95_ood_positive"] is better["detection_error"] is False


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match=r"got 'auc'\. Did you mean 'auroc'"):
        Separation("auc")
    with pytest.raises(ValueError, match=r"got \(3, 1\) and \(3,\)"):
        Separation().update(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match=r"of 0 and 1, got \[0, 2\]"):
        Separation().update(torch.zeros(2), torch.tensor([0, 2]))
