"""What is found out on the first batch: integer pictures, dead gradients, loss of another make, a second softmax."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attach.probe import Probe
from lightning_robust.attach.route import Route
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError


def discovered(shape: Any, batch: Any = None, **settings: Any) -> Route:
    module = zoo.standalone(shape)
    return Probe(**settings).discover(Step.of(module, "training_step", shape.batch(8) if batch is None else batch, 0))


class Bytes(zoo.Shape):
    @staticmethod
    def batch(n: int) -> Any:
        return {"image": (zoo.images(n) * 255).to(torch.uint8), "label": zoo.labels(n), "view": torch.arange(n)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["image"].float() / 255), batch["label"])


class BytesScaledByType(Bytes):
    """Scales bytes, and leaves floats as they are."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch["image"]
        return F.cross_entropy(self.net(x.float() / 255 if x.dtype == torch.uint8 else x), batch["label"])


class Tokens(zoo.Shape):
    """Ids and a mask that is used as numbers: a float copy of the mask gives the same logits, and a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 10)

    @staticmethod
    def batch(n: int) -> Any:
        return {"ids": torch.ones(n, 5).long(), "mask": torch.ones(n, 5).long(), "label": zoo.labels(n)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        embedded = self.embedding(batch["ids"]) * batch["mask"].unsqueeze(-1)
        return F.cross_entropy(embedded.mean(1), batch["label"])


def test_integer_pictures_are_read_as_floats_where_the_logits_stay_the_same() -> None:
    route = discovered(Bytes)
    assert (route.input, route.integer, route.differentiable) == (("image",), True, True)
    assert Route.from_dict(route.to_dict()) == route
    assert discovered(Bytes, input_key="image").integer


def test_a_step_that_treats_floats_otherwise_is_no_route() -> None:
    with pytest.raises(ProbeError, match=r"no floating-point input.*uint8 \(8, 1, 8, 8\).*cast them to float"):
        discovered(BytesScaledByType)
    with pytest.raises(ProbeError, match=r"input_key names integers, .*does something else with them"):
        discovered(BytesScaledByType, input_key="image")


def test_a_mask_of_numbers_is_not_taken_for_a_picture() -> None:
    with pytest.raises(ProbeError, match=r"no floating-point input.*Token ids cannot be perturbed"):
        discovered(Tokens)
    with pytest.raises(ProbeError, match="input_key names integers"):
        discovered(Tokens, input_key="ids")


class SideBySide(zoo.Shape):
    """Two domains in one forward; the loss is about the first."""

    @staticmethod
    def batch(n: int) -> Any:
        return {"source": zoo.images(n), "target": zoo.images(n, 1), "label": zoo.labels(n)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(torch.cat([batch["source"], batch["target"]]))
        return F.cross_entropy(logits[: len(batch["source"])], batch["label"])


def test_a_domain_whose_gradient_is_zero_is_not_the_input() -> None:
    assert discovered(SideBySide).input == ("source",)


class Rounds(zoo.Shape):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0].round()), batch[1])


class ZeroHead(zoo.ListBatch):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.net[-1].weight)


class ProbabilitiesOut(zoo.Shape):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).softmax(1), batch[1])


def test_a_gradient_that_is_zero_everywhere_is_an_error_unless_the_head_starts_at_zero() -> None:
    with pytest.raises(ProbeError, match=r"batch\[0\] is exactly zero for all 8 samples.*rounds or quantises"):
        discovered(Rounds)
    assert discovered(ZeroHead).input == (0,)


class SigmoidTwice(zoo.SigmoidMultiLabel):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.net(batch[0]).sigmoid().view(len(batch[0]), -1), batch[1])


class WithoutLogarithm(zoo.Shape):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(self.net(batch[0]).softmax(1), batch[1])


SQUASHED = {
    ProbabilitiesOut: "ProbabilitiesOut.training_step: cross_entropy gets rows that sum to 1",
    SigmoidTwice: "SigmoidTwice.training_step: binary_cross_entropy_with_logits gets the output of a sigmoid",
    WithoutLogarithm: "WithoutLogarithm.training_step: nll_loss takes log-probabilities",
}


@pytest.mark.parametrize("shape", SQUASHED, ids=lambda shape: shape.__name__)
def test_a_second_softmax_is_warned_of_once_and_read_as_it_is(shape: Any) -> None:
    probe, step = Probe(), Step.of(zoo.standalone(shape), "training_step", shape.batch(8), 0)
    with pytest.warns(UserWarning, match=SQUASHED[shape]):
        route = probe.discover(step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe.discover(step) == route


@pytest.mark.parametrize("shape", zoo.ZOO, ids=lambda shape: shape.__name__)
def test_ordinary_losses_are_not_warned_of(shape: type[zoo.Shape]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert discovered(shape).differentiable


class Focal(zoo.Shape):
    """A focal loss, written by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        p = self.net(x).softmax(1).gather(1, y[:, None])
        return (-((1 - p) ** 2) * p.log()).mean()


@dataclass
class Holder:
    parts: dict[str, Tensor]
    label: Tensor


class FocalOfObject(Focal):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.net])

    @staticmethod
    def batch(n: int) -> Any:
        return Holder({"image": zoo.images(n)}, zoo.labels(n))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch.parts["image"], batch.label), batch_idx)


@pytest.mark.parametrize("shape", [Focal, FocalOfObject], ids=lambda shape: shape.__name__)
def test_the_proposal_for_a_hand_written_loss_reads_it_as_it_stands(shape: Any) -> None:
    with pytest.raises(ProbeError, match="logits_fn=lambda module, batch: ") as caught:
        discovered(shape)
    text = str(caught.value)
    proposed = text[text.rindex("logits_fn=") :].rstrip(".")
    settings = eval(f"dict({proposed})")  # the proposal is code; a reader pastes it
    module, batch = zoo.standalone(shape), shape.batch(8)
    with Probe(**settings).reading(Step.of(module, "training_step", batch, 0)) as reading:
        call = reading.read(reading.x)
    torch.testing.assert_close(call.logits, module.eval().net(zoo.images(8)))
    assert torch.equal(call.target, zoo.labels(8))
