"""A checkpoint put to use: every kind of head, its logits divided by what the file says, and nothing else changed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_robust import TemperatureScaling, calibrated, load_temperature
from lightning_robust.attach.route import Route
from lightning_robust.attach.scaling import preferred, route_of, scale_output, stored_temperature
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.calibration import load_recalibrator

BOUND = np.log(64)


class Validated:
    """A stand-in for the user's habit of validating as they train."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)  # type: ignore[attr-defined]  # a LightningModule has it


def noisy(y: Tensor) -> Tensor:
    """Every fourth answer is wrong, so that no model is right to be sure."""
    wrong = torch.arange(len(y)) % 4 == 3
    return torch.where(wrong.view(-1, *[1] * (y.ndim - 1)), 1 - y, y)


def teacher(x: Tensor, outputs: int = 1) -> Tensor:
    weights = torch.randn(64, outputs, generator=torch.Generator().manual_seed(outputs))
    return ((x.flatten(1) - 0.5) @ weights > 0).long()


class Classes(Validated, zoo.Shape):
    """cross_entropy of the module's own forward."""

    def __init__(self) -> None:
        super().__init__(outputs=2)

    @staticmethod
    def batch(n: int) -> Any:
        x = zoo.images(n, n)
        return [x, noisy(teacher(x)[:, 0])]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class LogProbabilities(Classes):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).log_softmax(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(self(batch[0]), batch[1])


class OneLogit(Validated, zoo.Shape):
    def __init__(self) -> None:
        super().__init__(outputs=1)

    batch = Classes.batch

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]).squeeze(1), batch[1].float())


class Probability(OneLogit):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sigmoid()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy(self(batch[0]), batch[1].float().unsqueeze(1))


class MultiLabel(OneLogit):
    def __init__(self) -> None:
        zoo.Shape.__init__(self, outputs=4)

    @staticmethod
    def batch(n: int) -> Any:
        x = zoo.images(n, n)
        return [x, noisy(teacher(x, 4)).float()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])


class Transposed(Classes):
    """The logits are the network's output, turned: no module returns them as the loss gets them."""

    def forward(self, x: Tensor) -> Any:
        return {"scores": self.net(x) * 2}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])["scores"], batch[1])


HEADS = [Classes, LogProbabilities, OneLogit, Probability, MultiLabel]


def saved(shape: type[Any], folder: Path, methods: Sequence[str] = ()) -> Path:
    trainer = zoo.trainer(max_epochs=8, callbacks=[TemperatureScaling(methods=methods)])
    trainer.fit(zoo.built(shape), zoo.loader(shape, (96, 64)), zoo.loader(shape, (100, 44)))
    trainer.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt"


def plain(shape: type[Any], path: Path) -> Any:
    module = shape()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return module.eval()


def validation(shape: type[Any]) -> tuple[Tensor, Tensor]:
    batches = [shape.batch(n) for n in (100, 44)]
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def by_hand(shape: type[Any], z: Tensor, y: Tensor) -> float:
    """The best temperature of the network's own logits, by scipy."""
    z = z.double()

    def loss(log_t: float) -> float:
        scaled = z / np.exp(log_t)
        if z.shape[1] == 1 or shape is MultiLabel:
            return float(F.binary_cross_entropy_with_logits(scaled, y.double().view_as(scaled)))
        return float(F.cross_entropy(scaled, y))

    found = minimize_scalar(loss, bounds=(-BOUND, BOUND), method="bounded", options={"xatol": 1e-9})
    return float(np.exp(found.x))


@pytest.mark.parametrize("shape", HEADS)
def test_logits_of_every_head_are_divided_by_the_temperature_of_scipy(shape: type[Any], tmp_path: Path) -> None:
    path = saved(shape, tmp_path)
    x, y = validation(shape)
    module = plain(shape, path)
    with torch.no_grad():
        z = module.net(x)
        temperature = load_temperature(path, strict=True)
        assert temperature == pytest.approx(by_hand(shape, z, y), rel=1e-3)
        assert abs(np.log(temperature)) < BOUND - 0.1
        found = calibrated(shape, path)(x)
    if shape is LogProbabilities:
        expected = (z / temperature).log_softmax(1)
        torch.testing.assert_close(found.exp().sum(1), torch.ones(len(x)))
    elif shape is Probability:
        expected = (z / temperature).sigmoid()
    else:
        expected = z / temperature
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", HEADS)
def test_a_calibrated_module_predicts_in_every_mode_and_has_the_same_weights(shape: type[Any], tmp_path: Path) -> None:
    path = saved(shape, tmp_path)
    module, x = calibrated(shape, path), validation(shape)[0]
    assert not module.training
    weights = zip(module.state_dict().values(), plain(shape, path).state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    with torch.no_grad():
        expected = module(x)
        assert not torch.equal(expected, plain(shape, path)(x))
        copies = [copy.deepcopy(module), module.train().eval()]
        assert all(torch.equal(other(x), expected) for other in copies)
    predicted = zoo.trainer().predict(module, DataLoader(x, 50))
    torch.testing.assert_close(torch.cat(predicted), expected)


def test_a_calibrated_module_can_be_trained_on_and_its_gradient_is_that_of_scaled_logits(tmp_path: Path) -> None:
    path = saved(Classes, tmp_path)
    x, y = Classes.batch(16)
    module, other = calibrated(Classes, path), plain(Classes, path)
    F.cross_entropy(module(x), y).backward()
    F.cross_entropy(other.net(x) / load_temperature(path), y).backward()
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_calibrated_module_can_be_pickled_and_exported(tmp_path: Path) -> None:
    module, x = calibrated(Classes, saved(Classes, tmp_path)), zoo.images(4)
    torch.save(module, tmp_path / "whole.pt")
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), expected)
        torch.testing.assert_close(torch.export.export(module.net, (x,)).module()(x), expected)


@pytest.mark.parametrize("shape", [Classes, Transposed])
def test_logits_fn_may_call_the_module_itself(shape: type[Any], tmp_path: Path) -> None:
    path = saved(shape, tmp_path)
    x = validation(shape)[0]

    def logits_fn(module: Any, x: Tensor) -> Tensor:
        out = module(x)
        return out["scores"] if isinstance(out, dict) else out

    module = calibrated(shape, path, logits_fn=logits_fn)
    with torch.no_grad():
        expected = logits_fn(plain(shape, path), x) / load_temperature(path)
        assert torch.equal(module(x), expected)
        duplicate = copy.deepcopy(module)
        for parameter in module.parameters():
            parameter.zero_()
        assert torch.equal(duplicate(x), expected)  # has weights of its own
    predicted = zoo.trainer().predict(duplicate, DataLoader(x, 50))
    torch.testing.assert_close(torch.cat(predicted), expected)


def test_without_a_recorded_module_one_must_be_named(tmp_path: Path) -> None:
    path = saved(Transposed, tmp_path)
    with pytest.raises(ProbeError, match=r"does not record a submodule of Transposed.*module='net.head'.*logits_fn="):
        calibrated(Transposed, path)
    x = validation(Transposed)[0]
    with torch.no_grad():
        found = calibrated(Transposed, path, module="net")(x)["scores"]
        torch.testing.assert_close(found, plain(Transposed, path)(x)["scores"] / load_temperature(path))


class SigmoidInStep(OneLogit):
    """Forward returns logits, the step makes probabilities of them."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy(self(batch[0]).sigmoid(), batch[1].float().unsqueeze(1))


class SoftmaxInStep(Classes):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(self(batch[0]).log_softmax(1), batch[1])


@pytest.mark.parametrize("shape", [SigmoidInStep, SoftmaxInStep])
def test_a_named_module_gives_logits_whatever_the_step_makes_of_them(shape: type[Any], tmp_path: Path) -> None:
    path = saved(shape, tmp_path)
    x, y = validation(shape)
    with torch.no_grad():
        found, z = calibrated(shape, path, module="net")(x), plain(shape, path)(x)
    assert load_temperature(path) == pytest.approx(by_hand(shape, z, y), rel=1e-3)
    expected = z / load_temperature(path)
    same = torch.sigmoid if shape is SigmoidInStep else lambda logits: logits.softmax(1)
    torch.testing.assert_close(same(found), same(expected))


def test_naming_the_recorded_module_is_naming_what_its_output_means(tmp_path: Path) -> None:
    path = saved(Probability, tmp_path)
    x = zoo.images(20)
    with torch.no_grad():
        assert torch.equal(calibrated(Probability, path, module="")(x), calibrated(Probability, path)(x))


def test_a_submodule_that_does_not_exist_is_named_beside_those_that_do(tmp_path: Path) -> None:
    path = saved(Classes, tmp_path)
    with pytest.raises(ProbeError, match=r"Classes has no submodule 'head'; it has net, net\.0"):
        calibrated(Classes, path, module="head")


def test_arguments_reach_the_class_and_lightning(tmp_path: Path) -> None:
    class WithObject(Classes):
        def __init__(self, optimizer: Any) -> None:
            super().__init__()
            self.save_hyperparameters(logger=False)

    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    trainer = zoo.trainer(max_epochs=2, callbacks=[TemperatureScaling()])
    pl.seed_everything(0, verbose=False)
    trainer.fit(WithObject(optimizer), zoo.loader(WithObject), zoo.loader(WithObject, (50,)))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    module = calibrated(WithObject, tmp_path / "x.ckpt", map_location="cpu", weights_only=False, optimizer=optimizer)
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=False)
    raw = WithObject(optimizer).eval()
    raw.load_state_dict(loaded["state_dict"])
    x = zoo.images(8)
    with torch.no_grad():
        assert torch.equal(module(x), raw(x) / load_temperature(loaded, strict=True))


# -- other recalibrators ---------------------------------------------------------------------------------------------

METHODS = [(shape, method) for shape in HEADS for method in ("vector", "isotonic", "platt")]


def log_p_of(shape: type[Any], z: Tensor) -> Tensor:
    """Log-probabilities ``(R, 2)`` of the network's own logits, one row a label."""
    two = shape in (Classes, LogProbabilities)
    return z.log_softmax(1) if two else torch.stack([F.logsigmoid(-z.flatten()), F.logsigmoid(z.flatten())], 1)


@pytest.mark.parametrize(("shape", "method"), METHODS)
def test_every_recalibrator_takes_the_place_of_the_logits_of_every_head(
    shape: type[Any], method: str, tmp_path: Path
) -> None:
    path = saved(shape, tmp_path, methods=["vector", "isotonic", "platt"])
    x = validation(shape)[0]
    stored = torch.load(path, weights_only=True)["lightning_robust"]["calibration"]["recalibrators"][method]
    module = calibrated(shape, path, method=method)
    with torch.no_grad():
        log_p = load_recalibrator(stored)(log_p_of(shape, plain(shape, path).net(x)))
        found = module(x)
    odds = (log_p[:, 1] - log_p[:, 0]).view(len(x), -1)
    expected = log_p if shape in (Classes, LogProbabilities) else odds.sigmoid() if shape is Probability else odds
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.save(module, tmp_path / "whole.pt")
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), found)
        assert torch.equal(copy.deepcopy(module)(x), found)
    assert torch.equal(torch.cat(zoo.trainer().predict(module, DataLoader(x, 144))), found)


def test_a_recalibrated_module_can_be_trained_on(tmp_path: Path) -> None:
    path = saved(Classes, tmp_path, methods=["vector"])
    x, y = Classes.batch(16)
    module, other = calibrated(Classes, path, method="vector"), plain(Classes, path)
    stored = torch.load(path, weights_only=True)["lightning_robust"]["calibration"]["recalibrators"]["vector"]
    scale, bias = torch.tensor(stored["scale"]), torch.tensor(stored["bias"])
    F.cross_entropy(module(x), y).backward()
    F.cross_entropy(other.net(x).log_softmax(1) * scale + bias, y).backward()
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_recalibrator_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path: Path) -> None:
    path = saved(Classes, tmp_path, methods=["vector"])
    with pytest.raises(KeyError, match=r"no recalibrator 'platt', only temperature, vector; .*methods=\['platt'\]"):
        calibrated(Classes, path, method="platt")
    with pytest.raises(KeyError, match="no recalibrator 'matrix', only temperature, vector"):
        calibrated(Classes, path, method="matrix")
    with pytest.raises(ValueError, match=r"logits_fn= says nothing about what its logits are.*method='vector'"):
        calibrated(Classes, path, method="vector", logits_fn=lambda module, x: module(x))


@pytest.mark.parametrize("shape", HEADS)
def test_predictions_of_every_head_are_the_same_at_every_temperature(shape: type[Any], tmp_path: Path) -> None:
    path = saved(shape, tmp_path)
    x, entry = validation(shape)[0], torch.load(path, weights_only=True)
    with torch.no_grad():
        raw = plain(shape, path).net(x)
        for temperature in (1 / 64, 0.3, 7.0, 64.0):
            entry["lightning_robust"]["calibration"]["temperature"] = temperature
            torch.save(entry, path)
            found = calibrated(shape, path)(x)
            if shape in (Classes, LogProbabilities):
                assert torch.equal(found.argmax(1), raw.argmax(1))
            else:
                assert torch.equal(found > (0.5 if shape is Probability else 0), raw > 0)


# -- what is stored --------------------------------------------------------------------------------------------------


def test_a_stale_temperature_is_said_to_be_one() -> None:
    entry = {"global_step": 30, "calibration": {"temperature": 2.5, "fit_step": 20}}
    with pytest.warns(UserWarning, match="fitted at step 20, the weights are from step 30"):
        assert stored_temperature(entry) == 2.5
    with pytest.raises(ValueError, match="belongs to other weights"):
        stored_temperature(entry, strict=True)
    assert stored_temperature({**entry, "global_step": 20}, strict=True) == 2.5


def test_a_lower_bound_in_an_older_file_scales_nothing_and_is_said_to_be_none() -> None:
    section = {"temperature": 1 / 64, "at_bound": True, "fit_step": 20, "samples": 300}
    with pytest.warns(UserWarning, match="1 is no finding, and nothing is scaled: for the 300 predictions"):
        assert stored_temperature({"global_step": 20, "calibration": section}) == 1.0
    with pytest.warns(UserWarning, match="64 is a bound, not a finding: for the 300 predictions"):
        assert stored_temperature({"global_step": 20, "calibration": {**section, "temperature": 64.0}}) == 64.0


def test_no_temperature_is_an_error_that_says_how_to_get_one() -> None:
    for entry in ({"global_step": 1}, {"global_step": 1, "calibration": {"nll": 1.0}}):
        with pytest.raises(KeyError, match=r"no temperature.*TemperatureScaling"):
            stored_temperature(entry)
    with pytest.raises(KeyError, match="no temperature"):
        stored_temperature({"global_step": 1, "calibration": {"temperature": 1.0, "fit_step": 1}}, name="other")


def test_a_checkpoint_of_strangers_has_no_entry(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(KeyError, match="no 'lightning_robust' entry"):
        load_temperature(tmp_path / "x.ckpt")


# -- which module ----------------------------------------------------------------------------------------------------


def route(step: str, module: str | None, kind: str = "cross_entropy") -> Route:
    return Route(step, (0,), (1,), kind, module)


def test_the_evaluations_module_comes_before_that_of_training() -> None:
    both = [route("training_step", "student"), route("test_step", "other"), route("validation_step", "teacher")]
    assert preferred(both).module == "teacher"  # type: ignore[union-attr]  # it is there
    assert preferred(both[:1]).module == "student"  # type: ignore[union-attr]  # it is there
    assert preferred([route("validation_step", None)]) is None
    entry = {"route": {r.step: r.to_dict() for r in both}}
    assert route_of(entry).module == "teacher"  # type: ignore[union-attr]  # it is there
    assert route_of({}) is None
    assert route_of({}, "net") == Route("validation_step", (), None, "cross_entropy", "net")
    log_p = {"route": {"validation_step": route("validation_step", None, "nll_loss").to_dict()}}
    assert route_of(log_p, "net").kind == "nll_loss"  # type: ignore[union-attr]  # it is there


def test_scaling_is_undone_and_a_missing_temperature_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(3, 4))
    x = torch.rand(5, 3)
    plain_output, now = net(x), [2.0]
    undo = scale_output(net, route("validation_step", "0"), lambda: now[0])
    assert torch.equal(net(x), plain_output / 2)
    now[0] = None  # type: ignore[call-overload]  # the state before the first fit
    assert torch.equal(net(x), plain_output)
    undo()
    undo()
    assert not net[0]._forward_hooks


def test_a_loss_that_sees_another_view_gets_it_normalised_in_that_view() -> None:
    """Log-probabilities of four tokens, as one row: (N, 12) from the module, (N * 4, 3) in the loss."""

    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 4, 3).log_softmax(2).view(-1, 12)

    seen = Route("validation_step", (0,), (1,), "nll_loss", "0", shape=(3,))
    net, x = nn.Sequential(Tokens()), torch.randn(5, 12)
    scale_output(net, seen, lambda: 3.0)
    torch.testing.assert_close(net(x), (x.view(-1, 4, 3) / 3).log_softmax(2).view(-1, 12))


@pytest.mark.parametrize("output", [None, torch.tensor(2.0), {"loss": torch.tensor(1.0)}, (1, 2)])
def test_what_is_no_batch_of_logits_passes_as_it_is(output: Any) -> None:
    """A strategy that wraps a module sends whole steps through its hooks."""

    class Step(nn.Module):
        def forward(self) -> Any:
            return output

    module = Step()
    scale_output(module, route("validation_step", ""), lambda: 2.0)
    assert module() is output


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["cross_entropy", "nll_loss", "binary_cross_entropy"])
def test_the_type_of_the_output_stays_what_it_is(kind: str, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Identity())
    scale_output(net, route("validation_step", "0", kind), lambda: 2.0)
    x = torch.rand(4, 3, dtype=dtype)
    assert net(x).dtype == dtype
    assert net(x).shape == x.shape
