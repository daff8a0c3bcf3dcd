"""Calling a step as Lightning does."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import pytorch_lightning as pl
import zoo

from lightning_robust.attach.seam import install
from lightning_robust.attach.step import Step, defines


class Steps(zoo.Shape):
    def training_step(self, batch: Any) -> Any:
        return ("training", batch)

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> Any:
        return ("validation", batch, index, dataloader_idx)

    def test_step(self, *args: Any) -> Any:
        return ("test", *args)


@pytest.mark.parametrize(
    ("name", "args", "result"),
    [
        ("training_step", (1, 2), ("training", 1)),
        ("validation_step", (1, 2), ("validation", 1, 2, 0)),
        ("validation_step", (1, 2, 3), ("validation", 1, 2, 3)),
        ("test_step", (1, 2, 3), ("test", 1, 2, 3)),
    ],
)
def test_a_step_gets_as_many_arguments_as_it_takes(name: str, args: tuple[Any, ...], result: Any) -> None:
    assert Step.of(Steps(), name, *args).run() == result


def test_another_batch_keeps_the_indices() -> None:
    step = Step.of(Steps(), "validation_step", 1, 2, 3)
    assert step.batch == 1
    assert step.with_batch(9).run() == ("validation", 9, 2, 3)


def test_a_step_is_the_users_own_below_our_seam() -> None:
    module = Steps()
    install(module, "test", feed=lambda step: "fed")
    assert module.training_step(1) == ("training", "fed")
    assert Step.of(module, "training_step", 1).run() == ("training", 1)


def test_only_what_the_user_wrote_counts_as_defined() -> None:
    assert defines(Steps(), "validation_step")
    assert not defines(zoo.NamedTupleBatch(), "validation_step")
    assert not defines(pl.LightningDataModule(), "test_dataloader")


def test_a_wrapper_around_a_bound_method_takes_what_that_method_takes() -> None:
    module = Steps()
    original = module.validation_step

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:  # as torch.distributed.fsdp.register_fsdp_forward_method
        return original(*args, **kwargs)

    vars(module)["validation_step"] = types.MethodType(wrapper, module)
    assert Step.of(module, "validation_step", 1, 2).run() == ("validation", 1, 2, 0)
