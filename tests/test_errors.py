"""Bad input, in one table: every row goes through a real Trainer and says what was expected, what came, what to do.

A row that stops a fit says how many optimizer steps were taken by then: none, where the fault can be known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import bad_input as bad
import captum.attr
import pytest
import torch
import zoo
from bad_input import ATTACK, THREAT, bits, loader, plain
from torch import nn

from lightning_robust import (
    NFGSM,
    PGD,
    AdversarialTraining,
    CalibrationMonitor,
    CorruptionMonitor,
    InputGradientPenalty,
    OODMonitor,
    PixelSpace,
    RightReasons,
    RobustAccuracy,
    SaliencyRegularization,
    SaliencySnapshots,
    TemperatureScaling,
    ThreatModel,
)
from lightning_robust.attacks import JointThreat

WHOLE = 3  # optimizer steps of a fit that is not stopped


@dataclass(frozen=True)
class Row:
    """One piece of bad input.

    Attributes:
        callbacks: Builds the callbacks; a constructor check fails in here.
        says: Pattern of the message: expected, got and remedy.
        module: Builds the module.
        train: The training loader.
        val: The validation loader, if there is one.
        steps: Optimizer steps when the run stopped; all of them where the message is a warning.
        error: What is raised; None for a warning and a run that goes on.
        settings: Of the Trainer.
        run: Which of the Trainer's functions.
    """

    callbacks: Callable[[], list[Any]]
    says: str
    error: type[BaseException] | None = ValueError
    module: Callable[[], Any] = plain
    train: Callable[[], Any] = loader
    val: Callable[[], Any] | None = None
    steps: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    run: str = "fit"


def trained(*attack: Any, **settings: Any) -> Callable[[], list[Any]]:
    return lambda: [AdversarialTraining(*(attack or (ATTACK,)), **settings)]


def penalty(*arguments: Any, **settings: Any) -> Callable[[], list[Any]]:
    return lambda: [SaliencyRegularization(*(arguments or (InputGradientPenalty(),)), **settings)]


CONSTRUCTORS: dict[str, Row] = {
    "a typo in a method": Row(trained(ATTACK, "trade"), r"one of madry, trades, mart, .*; got 'trade'.*mean 'trades'"),
    "beta without trades": Row(trained(ATTACK, beta=6.0), r"beta= .*'trades'.*'madry' has none. Leave it out"),
    "trades with an attack of its own": Row(
        trained(NFGSM(THREAT), "trades"), r"give a PGD or a ThreatModel, got nfgsm"
    ),
    "a radius that is text": Row(lambda: [PGD(ThreatModel("linf", "8/255"))], r"a number >= 0.*8 / 255, got '8/255'"),
    "captum as a penalty": Row(
        lambda: [SaliencyRegularization(captum.attr.IntegratedGradients(nn.Identity()))],
        r"IntegratedGradients of captum is not differentiable.*Use InputGradientPenalty",
        TypeError,
    ),
    "no attack": Row(lambda: [RobustAccuracy([])], r"needs attacks with different names, got \[\]; name them"),
    "a typo in a saliency method": Row(lambda: [SaliencySnapshots(["gradcma"])], r"gradcma.*gradcam"),
    "a typo in a score": Row(lambda: [OODMonitor(scores=["enery"])], r"enery.*energy"),
    "a stage that is no list": Row(
        lambda: [CalibrationMonitor(stages="val")], r"takes a list of 'val', 'test'.*got 'val'"
    ),
    "an OOD set that can be iterated once": Row(
        lambda: [OODMonitor({"once": iter([])})], r"'once' is an iterator.*once only; give a data set"
    ),
}

INPUTS: dict[str, Row] = {
    "normalised inputs": Row(
        trained(), r"within \[0, 1\], got \[-.*look normalised: say so with PixelSpace", train=bad.normalised
    ),
    "0..255 inputs": Row(
        trained(), r"within \[0, 1\], got \[0, 255\].*look like 0..255.*bounds=\(0, 255\)", train=bad.bytes_as_floats
    ),
    "normalised inputs, penalised and attacked": Row(
        lambda: [SaliencyRegularization(InputGradientPenalty()), AdversarialTraining(ATTACK)],
        r"within \[0, 1\].*PixelSpace",
        train=bad.normalised,
    ),
    "inputs outside of the declared normalisation": Row(
        trained(PGD(ThreatModel("linf", 0.1, PixelSpace(mean=0.5, std=0.5)), steps=1)),
        r"within \[0, 1\], got \[0.5, 128\] after undoing mean and std.*use PixelSpace\(bounds=",
        train=bad.bytes_as_floats,
    ),
    "NaN inputs": Row(trained(), r"expected finite inputs, got 64 NaN or infinite values", train=bad.nan_inputs),
    "infinite inputs": Row(trained(), r"expected finite inputs, got 64 NaN or infinite", train=bad.infinite_inputs),
    "NaN inputs in the third batch": Row(
        trained(), r"returned 64 NaN or infinite values", RuntimeError, train=bad.nan_later, steps=2
    ),
    "NaN logits": Row(
        trained(),
        r"expected finite logits, got 160 NaN or infinite values for the first batch. The weights are not finite",
        module=bad.nan_weights,
    ),
    "channels of another picture": Row(
        trained(PGD(ThreatModel("linf", 0.1, PixelSpace(mean=(0.5, 0.5, 0.5))), steps=1)),
        r"PixelSpace has 3 channels, but inputs of shape \(16, 1, 8, 8\) have 1.*give one number or one per channel",
    ),
    "fewer labels than inputs": Row(
        trained(), r"batch_size \(16\) to match target batch_size \(8\)", train=bad.fewer_labels
    ),
    "labels beyond the classes": Row(trained(), r"Target \d+ is out of bounds", IndexError, train=bad.labels_beyond),
    "token ids": Row(
        trained(), r"no floating-point input.*int64 \(16, 5\).*Token ids cannot", RuntimeError, bad.Tokens, bad.tokens
    ),
    "token ids, penalised": Row(penalty(), r"no floating-point input.*Token ids", RuntimeError, bad.Tokens, bad.tokens),
    "bytes that the step scales by their type": Row(
        trained(),
        r"no floating-point input.*uint8 \(16, 1, 8, 8\).*cast them to float",
        RuntimeError,
        bad.ScalesBytes,
        bad.bytes_,
    ),
    "inputs that leave the bounds later": Row(
        trained(),
        r"1 of 16 inputs leave the pixel bounds.*counted in robust/train/outside_box",
        None,
        train=bad.overshoots_later,
    ),
}

STEPS: dict[str, Row] = {
    "a frozen backbone": Row(trained(), r"no gradient reaches .*no_grad\(\).*loss_index=1", RuntimeError, bad.Frozen),
    "a frozen backbone, penalised": Row(penalty(), r"no gradient reaches .*no_grad\(\)", RuntimeError, bad.Frozen),
    "two inputs": Row(
        trained(),
        r"several inputs: batch\['left'\], batch\['right'\], batch\['few'\]. Say which.*input_key='left'.*all of them",
        RuntimeError,
        bad.Towers,
        bad.towers,
    ),
    "inputs with other numbers of rows": Row(
        trained(input_key=["left", "few"]),
        r"numbers of rows differ: batch\['left'\] 16, batch\['few'\] 1",
        module=bad.Towers,
        train=bad.towers,
    ),
    "two threat models for one input": Row(
        trained(PGD(JointThreat((THREAT, THREAT)), steps=1)), r"2 threat models for 1 input: give one for each key"
    ),
    "a key that is not there": Row(
        trained(input_key="picture"), r"nothing at batch\['picture'\]; it has batch\[0\], batch\[1\]", KeyError
    ),
    "a key of the labels": Row(trained(input_key=1), r"do not depend on batch\[1\].*The batch has", RuntimeError),
    "a loss written by hand": Row(
        trained(),
        r"calls none of the losses.*log_softmax of a tensor \(16, 10\).*logits_fn=lambda module, batch: module.net"
        r"\(batch\[0\]\), target_key=1",
        RuntimeError,
        bad.HandWritten,
    ),
    "regression": Row(trained(), r"calls none of the losses.*Regression.*not served", RuntimeError, bad.Regression),
    "regression, penalised": Row(penalty(), r"Regression and detection.*not served", RuntimeError, bad.Regression),
    "detection": Row(trained(), r"Regression and detection .*not served", RuntimeError, bad.Detection, bad.boxes),
    "a loss that the step does not call": Row(
        trained(loss_index=3),
        r"loss_index=3, but .*training_step calls only 1 loss functions; count from 0",
        RuntimeError,
    ),
    "a step that rounds its input": Row(
        trained(), r"exactly zero for all 16 samples.*rounds or quantises.*input_key=", RuntimeError, bad.Rounds
    ),
    "a step that takes an iterator": Row(
        trained(), r"takes an iterator instead of a batch \(dataloader_iter\)", RuntimeError, bad.TakesIterator
    ),
    "a step that returns text": Row(
        penalty(),
        r"expected training_step to return a tensor, a mapping with 'loss' or None, got str",
        RuntimeError,
        bad.ReturnsText,
    ),
    "a loss that is missing later": Row(
        trained(ATTACK, "trades"),
        r"calls none of the losses.*logits_fn=.*with target_key=",
        RuntimeError,
        bad.LosesItsLoss,
        steps=1,
    ),
    "two adversaries": Row(
        lambda: [AdversarialTraining(ATTACK), AdversarialTraining(THREAT, "n-fgsm", name="other")],
        r"both want to attack .*one step has one adversary. Keep one",
        RuntimeError,
    ),
    "two callbacks with one name": Row(
        lambda: [RobustAccuracy(ATTACK), RobustAccuracy(PGD(THREAT, steps=3))],
        r"both write robust/...; give one of them a name, e.g. name='strong'",
    ),
    "a backward pass past Lightning": Row(
        trained(ATTACK, "trades"),
        r"called no self.manual_backward\(loss\).*Call that instead of loss.backward\(\)",
        RuntimeError,
        bad.BareBackward,
        steps=1,
    ),
    "a step by hand that forgets the attack": Row(
        list,
        r"does this by hand \(by_hand = True\), but the step did not call self.perturbed\(batch\)",
        RuntimeError,
        bad.Forgets,
    ),
    "a step by hand that asks twice": Row(
        list,
        r"calls self.perturbed\(batch\) twice. One step has one attacked batch: call it once",
        RuntimeError,
        bad.AsksTwice,
    ),
    "a softmax in front of cross_entropy": Row(
        trained(), r"cross_entropy gets rows that sum to 1.*hand the loss what stands before", None, bad.Softmaxed
    ),
    "a softmax without its logarithm": Row(
        penalty(), r"nll_loss takes log-probabilities, and gets rows that sum to 1", None, bad.WithoutLogarithm
    ),
}

ATTACKS: dict[str, Row] = {
    "an attack that leaves its ball": Row(
        trained(bad.TooFar()), r"moved an input by 0.2 .*promised at most 0.1.*`reach`", RuntimeError
    ),
    "an attack that returns another shape": Row(
        trained(lambda f, x, y: x[:, :, :4]),
        r"must return a tensor of shape \(16, 1, 8, 8\), got \(16, 1, 4, 8\)",
        RuntimeError,
    ),
    "an attack that returns text": Row(
        trained(lambda f, x, y: "x"), r"must return a tensor of shape \(16, 1, 8, 8\), got str", RuntimeError
    ),
    "an attack that returns NaN": Row(
        trained(lambda f, x, y: x / 0 * 0), r"returned 1024 NaN or infinite values", RuntimeError
    ),
    "an attack that is no attack": Row(
        lambda: [RobustAccuracy({"broken": lambda f, x, y: None})],
        r"must return a tensor of shape \(\d+, 1, 8, 8\), got NoneType",
        RuntimeError,
        val=loader,
        run="validate",
    ),
}

PENALTIES: dict[str, Row] = {
    "masks that are not in the batch": Row(
        penalty(RightReasons(mask_key=2)), r"nothing at batch\[2\]; it has batch\[0\], batch\[1\]", KeyError
    ),
    "masks of another shape": Row(
        penalty(RightReasons(mask_key=2)),
        r"a mask of shape \(16, 3\) does not fit inputs \(16, 1, 8, 8\)",
        module=bad.Masked,
        train=bad.masks_of_another_shape,
        val=None,
    ),
    "a penalty that is no scalar": Row(
        penalty(lambda f, x, y: f(x).sum(1)),
        r"must return a scalar tensor, got a tensor \(16,\): return the mean",
        TypeError,
    ),
    "a penalty that is NaN": Row(
        penalty(lambda f, x, y: f(x).sum() * float("nan")),
        r"is nan, and 6 of its 6 gradients are not finite. Look for inputs that are not finite",
        RuntimeError,
    ),
    "a penalty that trains nothing": Row(
        penalty(lambda f, x, y: torch.zeros(())),
        r"reaches 0 of 6 trainable parameters.*create_graph=True",
        RuntimeError,
    ),
    "no second derivative": Row(
        penalty(InputGradientPenalty("double_backward")),
        r"finite_differences",
        RuntimeError,
        bad.OnceDifferentiable,
    ),
    "no second derivative in a compiled network": Row(
        penalty(InputGradientPenalty("double_backward")),
        r"compiled network has no second derivative. Use method='finite_differences'",
        RuntimeError,
        bad.compiled,
    ),
}


def measured(*arguments: Any, **settings: Any) -> Row:
    row = Row(*arguments, **settings)
    return row if row.val is not None or "val" in settings else replace(row, val=loader)


MONITORS: dict[str, Row] = {
    "regression, measured": measured(
        lambda: [CalibrationMonitor()],
        r"calls none of the losses.*Regression.*not served",
        RuntimeError,
        bad.Regression,
    ),
    "token ids, attacked in validation": measured(
        lambda: [RobustAccuracy(ATTACK)],
        r"no floating-point input.*Token ids",
        RuntimeError,
        bad.Tokens,
        bad.tokens,
        bad.tokens,
    ),
    "normalised validation data": measured(
        lambda: [RobustAccuracy(ATTACK)], r"within \[0, 1\], got .*look normalised.*PixelSpace", val=bad.normalised
    ),
    "a loss written by hand, measured": measured(
        lambda: [CalibrationMonitor()], r"none of the losses.*logits_fn=lambda", RuntimeError, bad.HandWritten
    ),
    "rows that belong to no single sample": measured(
        lambda: [RobustAccuracy(ATTACK)],
        r"the loss gets 128 rows for a batch of 16 samples.*Give logits_fn=",
        RuntimeError,
        bad.Pixelwise,
        bad.pixels_labelled,
        bad.pixels_labelled,
        run="validate",
    ),
    "an OOD set with other channels": measured(
        lambda: [OODMonitor({"colour": torch.utils.data.TensorDataset(torch.rand(8, 3, 8, 8))})],
        r"'colour': expected inputs like .*\(N, 1, 8, 8\), got a batch with .*\(8, 3, 8, 8\)",
    ),
    "an empty OOD set": measured(
        lambda: [OODMonitor({"none": torch.utils.data.TensorDataset(torch.rand(0, 1, 8, 8))})],
        r"'none': expected foreign inputs, got no batch at all. Give a data set",
    ),
    "an OOD set with other channels, in mid-run": measured(
        lambda: [OODMonitor({"colour": torch.utils.data.TensorDataset(torch.rand(8, 3, 8, 8))})],
        r"failed in val at step 3: ValueError: OOD set 'colour'.*missing \(NaN\), and training goes on; strict=True",
        None,
        settings={"num_sanity_val_steps": 0},
    ),
    "the same, strictly": measured(
        lambda: [OODMonitor({"colour": torch.utils.data.TensorDataset(torch.rand(8, 3, 8, 8))}, strict=True)],
        r"'colour': expected inputs like",
        settings={"num_sanity_val_steps": 0},
        steps=WHOLE,
    ),
    "a layer that is not there": measured(
        lambda: [SaliencySnapshots(layer="net.conv9")], r"layer='net.conv9' is no submodule of .*; it has net, net.0"
    ),
    "no temperature without data": measured(
        lambda: [TemperatureScaling(when="after_fit")], r"needs dataloader= where there is no validation", val=None
    ),
    "calibration without validation": measured(
        lambda: [CalibrationMonitor()], r"has no validation, where it measures: give validation data", None, val=None
    ),
    "robustness without validation": measured(
        lambda: [RobustAccuracy(ATTACK)], r"has no validation, .*stages=\['test'\]", None, val=None
    ),
    "temperature without validation": measured(
        lambda: [TemperatureScaling()], r"fits in validation, and this fit has none.*dataloader=", None, val=None
    ),
    "classes that the model does not know": measured(
        lambda: [CalibrationMonitor(target_key=1, logits_fn=lambda module, batch: module.net(batch[0]))],
        r"failed in val .*expected labels from 0 to 9.*got labels from 3 to 12.*same classes",
        module=bad.Silent,
        error=None,
        val=bad.labels_beyond,
    ),
    "a validation loader that shuffles": measured(
        lambda: [RobustAccuracy(ATTACK)], r"loader 0 shuffles.*use shuffle=False", None, val=bad.shuffled
    ),
    "Grad-CAM of a table": measured(
        lambda: [SaliencySnapshots(["gradient", "gradcam"])],
        r"gradcam needs a feature map, and this module has no convolution .*for inputs \(N, 64\)",
        None,
        bad.Table,
        bad.table,
        bad.table,
    ),
    "synthetic foreign data of a table": measured(
        lambda: [OODMonitor()],
        r"pictures \(N, C, H, W\).*the input is float32 \(16, 64\): name data sets",
        None,
        bad.Table,
        bad.table,
        bad.table,
    ),
    "energy of log-probabilities": measured(
        lambda: [OODMonitor()],
        r"\(nll_loss\) gets log-probabilities, which have no energy; use msp",
        None,
        bad.LogProbabilities,
    ),
    "snapshots of several labels": measured(
        lambda: [SaliencySnapshots(["gradient"])],
        r"one class a sample can be explained; .*labels \(16, 4\) for 16 samples",
        None,
        bad.MultiLabel,
        bits,
        bits,
    ),
    "a temperature that nobody fitted": measured(
        lambda: [TemperatureScaling()],
        r"has no temperature for these weights: fit with it, test with ckpt_path=",
        None,
        run="test",
    ),
    "a temperature that is to be applied and is not there": measured(
        lambda: [TemperatureScaling(apply=True)],
        r"has no temperature.*Fit or validate first, or pass ckpt_path=",
        RuntimeError,
        run="test",
    ),
}


def shifted(**settings: Any) -> Callable[[], list[Any]]:
    return lambda: [CorruptionMonitor(**settings)]


def images(*tensors: torch.Tensor) -> dict[str, Any]:
    return {"other": torch.utils.data.TensorDataset(*tensors)}


SHIFT: dict[str, Row] = {
    "shifted data without labels": measured(
        shifted(shift_loaders=images(bad.X)),
        r"shift_loaders\['other'\].*those of the evaluation loader have .*made alike",
        RuntimeError,
    ),
    "shifted data of other classes": measured(
        shifted(shift_loaders=images(bad.X, bad.Y + 8)),
        r"shift_loaders\['other'\]: expected labels from 0 to 9.*got labels from .*same classes",
    ),
    "shifted data that are none": measured(
        shifted(shift_loaders=images(bad.X[:0], bad.Y[:0])), r"'other'\] gave no batch at all; give a data set"
    ),
    "normalised pictures, corrupted": measured(
        shifted(), r"within \[0, 1\], got \[-.*look normalised.*PixelSpace", val=bad.normalised
    ),
    "0..255 pictures, corrupted": measured(
        shifted(), r"within \[0, 1\], got \[0, 255\].*bounds=\(0, 255\)", val=bad.bytes_as_floats
    ),
    "NaN pictures, corrupted": measured(shifted(), r"expected finite inputs, got 64 NaN", val=bad.nan_inputs),
    "pictures without bounds": measured(
        shifted(pixels=PixelSpace(bounds=None)), r"a pixel space with bounds, got PixelSpace\(bounds=None\).*give the"
    ),
    "saturated grey pictures": measured(
        shifted(corruptions=["saturate"]), r"three channels for 'saturate', got 1; leave it out"
    ),
    "a corrupted table": measured(
        shifted(),
        r"pictures \(N, C, H, W\).*the input is float32 \(16, 64\): name loaders of shifted data",
        None,
        bad.Table,
        bad.table,
        bad.table,
    ),
    "a loader that shuffles, corrupted": measured(
        shifted(), r"loader 0 shuffles.*other samples.*use shuffle=False", None, val=bad.shuffled
    ),
    "corruptions without validation": measured(shifted(), r"has no validation, .*stages=\['test'\]", None, val=None),
}

RECALIBRATED: dict[str, Row] = {
    "groups that are not in the batch": measured(
        lambda: [CalibrationMonitor(group_key="site")], r"nothing at batch\['site'\]; it has batch\[0\]", KeyError
    ),
    "groups that are pictures": measured(
        lambda: [OODMonitor(group_key=0)],
        r"a whole number or a string for each of 16 samples, got torch.float32 \(16, 1, 8, 8\) at batch\[0\]",
    ),
    "yes/no calibration of ten classes": measured(
        lambda: [CalibrationMonitor(mode="positive")],
        r"'positive' is about yes/no outputs, .* tells 10 classes apart; use mode='top_label'",
    ),
    "Platt scaling of ten classes": measured(
        lambda: [TemperatureScaling(methods=["platt"])],
        r"\['platt'\] is for yes/no outputs and two classes, these predictions have 10; take 'vector'",
    ),
    "calibration data without labels": measured(
        lambda: [TemperatureScaling(dataloader=torch.utils.data.TensorDataset(bad.X))],
        r"dataloader.*those of the evaluation loader have .*made alike",
        RuntimeError,
    ),
    "detectors on a layer that is not there": measured(
        lambda: [OODMonitor(detectors=["knn"], feature_layer="net.conv9")],
        r"knn: feature_layer='net.conv9' is no submodule of .*; it has net, net.0",
    ),
    "detectors fitted on data without labels": measured(
        lambda: [OODMonitor(detectors=["knn"], fit_data=torch.utils.data.TensorDataset(bad.X))],
        r"knn: fit_data.*those of the evaluation loader have .*made alike",
    ),
    "foreign data attacked where nothing can be": measured(
        lambda: [OODMonitor({"same": torch.utils.data.TensorDataset(torch.ones(4, 5).long())}, attacked=ATTACK)],
        r"attacked= needs gradients, that set is left out, other sets go on: .*Token ids",
        None,
        bad.Tokens,
        bad.tokens,
        bad.tokens,
    ),
}

TABLE = {**CONSTRUCTORS, **INPUTS, **STEPS, **ATTACKS, **PENALTIES, **MONITORS, **SHIFT, **RECALIBRATED}


def run(row: Row) -> int:
    """Go through the row; the number of optimizer steps that were taken."""
    trainer = zoo.trainer(callbacks=row.callbacks(), **row.settings)
    module = row.module()
    steps: list[int] = []
    optimizers = module.configure_optimizers

    def counted() -> Any:
        optimizer = optimizers()
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        return optimizer

    module.configure_optimizers = counted
    val = None if row.val is None else row.val()
    try:
        if row.run == "fit":
            trainer.fit(module, row.train(), val)
        else:
            getattr(trainer, row.run)(module, val, verbose=False)
    finally:
        taken.append(len(steps))
    return len(steps)


taken: list[int] = []


# Lightning's and Dynamo's own words about such input.
@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument in the `training_step`")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_bad_input_says_what_was_expected_what_came_and_what_to_do(row: Row) -> None:
    taken.clear()
    pattern = f"(?s){row.says}"
    if row.error is None:
        with pytest.warns(UserWarning, match=pattern):
            assert run(row) == (WHOLE if row.run == "fit" else 0)
        return
    with pytest.raises(row.error, match=pattern):
        run(row)
    assert (taken or [0]) == [row.steps]


def test_the_table_is_long_and_few_rows_are_constructor_checks() -> None:
    assert len(TABLE) >= 60
    assert len(TABLE) == sum(map(len, (CONSTRUCTORS, INPUTS, STEPS, ATTACKS, PENALTIES, MONITORS, SHIFT, RECALIBRATED)))
    assert len(CONSTRUCTORS) <= 10
