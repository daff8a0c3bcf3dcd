"""Every shape of user code with every callback: it trains, or it ends with the error that is documented for it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from compatibility import table
from compatibility.common import GROUPS
from compatibility.table import SHAPES, Run, shape_of
from torch.overrides import _get_current_function_mode_stack

from lightning_robust import AdversarialTraining

# N-FGSM starts from noise twice as large as eps and is not clipped: it reaches three times as far.
REACH = {"madry": 1.0, "trades": 1.0, "n-fgsm": 3.0}


def served(group: str) -> list[Any]:
    names = [name for name in SHAPES if group not in shape_of(name).errors]
    gaps = {name: shape_of(name).gaps.get(group) for name in names}
    return [pytest.param(n, marks=[pytest.mark.xfail(strict=True, reason=gaps[n])] if gaps[n] else []) for n in names]


def refused(group: str) -> list[str]:
    return [name for name in SHAPES if group in shape_of(name).errors]


def in_pixels(name: str, leaf: torch.Tensor) -> torch.Tensor:
    pixels = shape_of(name).pixels
    return pixels.to_pixels(leaf.float()) if leaf.ndim else leaf.float()


def assert_trained(name: str, run: Run) -> None:
    assert run.error is None, run.error
    after = table.weights(run.module)
    assert all(bool(value.isfinite().all()) for value in after.values() if value.is_floating_point())
    trained = {key for key, p in run.module.named_parameters() if p.requires_grad}
    before = run.start or table.weights(table.code_of(name).Module())
    assert not trained <= before.keys() or any(not torch.equal(after[key], before[key]) for key in trained)
    assert run.trainer.global_step == run.reference().trainer.global_step > 0
    assert_clean(name, run)
    for pattern in shape_of(name).warns:
        assert any(re.search(pattern, text) for text in run.caught)


def assert_clean(name: str, run: Run) -> None:
    """Attributes, counters, hooks, modes and flags as after the same fit without callbacks."""
    traces, expected = run.traces(), run.reference().traces()
    assert traces.keys() == expected.keys()
    assert [(part, traces[part], known) for part, known in expected.items() if traces[part] != known] == []
    assert not _get_current_function_mode_stack()


def fed(name: str, run: Run) -> dict[Any, float]:
    """How far each tensor that the step got is from the clean one, in pixels; at most, over all batches."""
    clean = run.reference().seen
    assert run.seen.keys() == clean.keys()
    moved: dict[Any, float] = {}
    for number, batch in clean.items():
        assert batch.keys() == run.seen[number].keys()
        for path, leaf in batch.items():
            if not torch.equal(leaf.double(), run.seen[number][path].double()):
                far = (in_pixels(name, run.seen[number][path]) - in_pixels(name, leaf)).abs().max()
                moved[path] = max(moved.get(path, 0.0), float(far))
    return moved


def within(values: Iterable[float], low: float, high: float) -> bool:
    return all(math.isfinite(value) and low <= value <= high for value in values)


def assert_measured(name: str, run: Run, callbacks: list[Any]) -> None:
    shape, metrics = shape_of(name), run.metrics()
    groups = table.measurable(name)
    if "robustness" in groups:
        assert 0 <= metrics["robust/val/accuracy"] <= metrics["robust/val/clean_accuracy"] <= 1
        assert (
            next(c for c in callbacks if type(c).__name__ == "RobustAccuracy").section()["robust"]["n"] == shape.samples
        )
    if "calibration" in groups:
        assert within([metrics["calibration/val/ece"]], 0, 1)
        assert within([metrics["calibration/val/nll"], metrics["calibration/val/temperature"]], 1e-6, 1e6)
    keys = (("ood/val/", "msp_auroc"), ("shift/val/", "mean_accuracy"), ("saliency/val/", "flips"))
    for group, (first, last) in zip(("ood", "shift", "saliency"), keys, strict=True):
        found = [value for key, value in metrics.items() if key.startswith(first) and key.endswith(last)]
        found = [value for value in found if not math.isnan(value)]  # what a monitor logs that failed
        assert bool(found) is (group in groups and group not in shape.says)
        assert within(found, 0, 1)
        if group in groups and group in shape.says:
            assert any(re.search(shape.says[group], text) for text in run.caught)
    if "ood" in groups:
        assert all(any(re.search(p, text) for text in run.caught) for p in shape.monitors_warn)


# -- without us ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_the_users_code_trains_by_itself(name: str) -> None:
    run = table.plain(name)
    assert run.error is None, run.error
    assert run.trainer.global_step > 0
    assert run.seen or "iterator" in shape_of(name).about


# -- monitors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SHAPES if table.measurable(name)])
def test_monitors_measure_and_change_no_bit_of_the_run(name: str) -> None:
    callbacks = table.monitors(name, *table.measurable(name))
    run = table.fit(name, *callbacks)
    assert run.error is None, run.error
    assert_measured(name, run, callbacks)
    assert_clean(name, run)
    expected = table.weights(table.plain(name).module)
    assert all(torch.equal(value, expected[key]) for key, value in table.weights(run.module).items())
    assert fed(name, run) == {}
    own = table.plain(name).metrics()
    assert {key: value for key, value in run.metrics().items() if key in own} == own


@pytest.mark.parametrize(
    ("name", "group"), [(name, group) for group in GROUPS[1:] if group != "penalties" for name in refused(group)]
)
def test_a_monitor_that_cannot_serve_ends_with_the_documented_error(name: str, group: str) -> None:
    for callback in table.monitors(name, group, strict=True):
        run = table.fit(name, callback)
        assert_refused(name, group, run)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", served("attacks"))
def test_a_fed_attack_trains_beside_all_monitors_inside_its_radius(name: str) -> None:
    callbacks = [callback for group in table.measurable(name) for callback in table.monitors(name, group)]
    run = table.fit(name, table.adversary(name, "madry"), *callbacks, num_sanity_val_steps=1)
    assert_trained(name, run)
    assert_measured(name, run, callbacks)
    assert_inside(name, fed(name, run), "madry")


@pytest.mark.parametrize("name", served("attacks"))
def test_n_fgsm_trains_inside_its_reach(name: str) -> None:
    run = table.fit(name, table.adversary(name, "n-fgsm"), validation=False)
    assert_trained(name, run)
    assert_inside(name, fed(name, run), "n-fgsm")


@pytest.mark.parametrize("name", served("attacks"))
def test_trades_trains_on_the_clean_batch_and_adds_a_divergence(name: str) -> None:
    run = table.fit(name, table.adversary(name, "trades"), validation=False)
    assert_trained(name, run)
    assert fed(name, run) == {}
    assert 0 < run.metrics()["robust/train/kl"] < 1e3


@pytest.mark.parametrize("name", served("penalties"))
def test_a_penalty_on_input_gradients_trains_on_the_clean_batch(name: str) -> None:
    run = table.fit(name, table.penalty(name), validation=False)
    assert_trained(name, run)
    assert fed(name, run) == {}
    assert 0 < run.metrics()["robust/train/input_gradient"] < 1e6


@pytest.mark.parametrize("method", ["madry", "trades", "n-fgsm"])
@pytest.mark.parametrize("name", refused("attacks"))
def test_an_attack_that_cannot_be_ends_before_the_first_step_with_the_documented_error(name: str, method: str) -> None:
    assert_refused(name, "attacks", table.fit(name, table.adversary(name, method), validation=False), steps=0)


@pytest.mark.parametrize("name", refused("penalties"))
def test_a_penalty_that_cannot_be_ends_before_the_first_step_with_the_documented_error(name: str) -> None:
    assert_refused(name, "penalties", table.fit(name, table.penalty(name), validation=False), steps=0)


def assert_inside(name: str, moved: dict[Any, float], method: str) -> None:
    shape = shape_of(name)
    assert moved.keys() == set(shape.inputs)
    assert within(moved.values(), 0.3 * shape.eps, REACH[method] * shape.eps * (1 + 1e-5) + 1e-6)


def assert_refused(name: str, group: str, run: Run, steps: int | None = None) -> None:
    assert isinstance(run.error, (RuntimeError, ValueError, TypeError))
    assert re.search(shape_of(name).errors[group], str(run.error), re.DOTALL), run.error
    if steps is not None:
        assert run.trainer.global_step == steps
        after = table.weights(run.module)
        assert all(torch.equal(after[key], value) for key, value in run.start.items())
    for part, known in run.traces().items():
        reference = run.reference().traces()[part]
        assert known["attributes"].keys() <= reference["attributes"].keys()
        assert known["hooks"] == reference["hooks"]
        assert known["wanted"] == reference["wanted"]
    assert not _get_current_function_mode_stack()


# -- the table itself ------------------------------------------------------------------------------------------------


def test_every_shape_with_every_group_is_served_or_documented() -> None:
    counts: dict[str, int] = {}
    for name in SHAPES:
        for group in GROUPS:
            outcome = table.outcome(shape_of(name), group)
            counts[outcome] = counts.get(outcome, 0) + 1
    told = [name for name in SHAPES if table.needs(shape_of(name)) != "nothing"]
    print(f"{len(SHAPES)} shapes, {len(told)} need an argument; {counts}")
    assert sum(counts.values()) == len(SHAPES) * len(GROUPS)
    assert counts.keys() <= {"yes", "says so", "error", "not yet"}
    assert len(SHAPES) >= 90
    assert table.markdown().count("\n") == len(SHAPES) + 2


def test_the_recorder_sees_the_attacked_batch_and_not_the_reads_before_it() -> None:
    callback: AdversarialTraining = table.adversary("list_batch", "madry")
    clean, run = table.plain("list_batch"), table.fit("list_batch", callback, limit_train_batches=1)
    assert list(run.seen) == [0]
    assert list(clean.seen) == [0, 1]
    assert fed_is_crafted(run, callback)


def fed_is_crafted(run: Run, callback: AdversarialTraining) -> bool:
    x = run.seen[0][(0,)]
    return x.shape == (8, 1, 8, 8) and bool((x - table.plain("list_batch").seen[0][(0,)]).abs().max() > 0)
