"""AutoAttack through pyautoattack: the same numbers as its direct use, and an honest name where it is not standard."""

from __future__ import annotations

import builtins
import copy
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PGD, PixelSpace, RobustAccuracy, ThreatModel
from lightning_robust.attacks import AutoAttack, guard

pyautoattack = pytest.importorskip("pyautoattack")
THREAT = ThreatModel("linf", 0.15)
FAST: Any = ("apgd-ce",)  # where the search itself is not the question


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 8x8 digits in [0, 1], in a seeded order."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    return images[order], torch.tensor(found.target)[order]


def trained(x: Tensor, y: Tensor, outputs: int) -> nn.Module:
    """A small net after a few epochs of PGD training, in eval mode."""
    torch.set_num_threads(1)  # fixtures of a module come before the one that says so
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, outputs))
    order, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam(net.parameters(), 3e-3)
    attack = PGD(THREAT, steps=4, objective=None if outputs > 1 else yes_no)
    loss: Callable[..., Tensor] = F.cross_entropy if outputs > 1 else lambda z, y: yes_no(z, y).mean()
    for _ in range(8):
        for rows in torch.randperm(len(x), generator=order).split(100):
            attacked = attack(net, x[rows], y[rows], generator=order)
            optimizer.zero_grad()
            loss(net(attacked), y[rows]).backward()
            optimizer.step()
    return net.eval()


def yes_no(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z.flatten(), y.float(), reduction="none")


@pytest.fixture(scope="module")
def ten(digits: tuple[Tensor, Tensor]) -> nn.Module:
    return trained(digits[0][:1400], digits[1][:1400], 10)


@pytest.fixture
def batch(digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return digits[0][1400:1440], digits[1][1400:1440]


def of_classes(digits: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    keep = digits[1] < k
    return digits[0][keep], digits[1][keep]


def direct(net: Any, norm: str, eps: float, seed: int, x: Tensor, y: Tensor, **changes: Any) -> Tensor:
    """What the package itself finds; its check that sets a trace function is left in."""
    trace = sys.gettrace()
    attack = pyautoattack.AutoAttack(net, norm=norm, eps=eps, version="standard", seed=seed, device="cpu")
    attack.verbose = False
    attack.attacks_to_run = changes.pop("attacks", attack.attacks_to_run)
    for name, value in changes.items():
        setattr(attack.apgd_targeted, name, value)
        setattr(attack.fab, name, value)
    try:
        found: Tensor = attack.run_standard_evaluation(x, y, batch_size=250)[0]
    finally:
        sys.settrace(trace)
    return found


def holds(net: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        z = net(x)
        return (z.flatten() > 0) == y.bool() if z.shape[1:] in ((), (1,)) else z.argmax(1) == y


# -- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "theirs", "eps"), [("linf", "Linf", 0.15), ("l2", "L2", 0.6)])
def test_every_pixel_is_that_of_a_direct_use_of_the_package(
    ten: nn.Module, batch: tuple[Tensor, Tensor], norm: Any, theirs: str, eps: float
) -> None:
    attack = AutoAttack(ThreatModel(norm, eps), seed=3)
    found, expected = attack(ten, *batch), direct(ten, theirs, eps, 3, *batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(holds(ten, found, batch[1]), holds(ten, expected, batch[1]))
    assert 5 < int(holds(ten, found, batch[1]).sum()) < int(holds(ten, *batch).sum()) - 5
    assert attack.name == f"autoattack-standard_{norm}_{eps:g}"
    distance = attack.threat.distance(found, batch[0])
    assert float(distance.max()) <= eps * (1 + 1e-5)


def test_pixels_in_0_to_255_and_normalised_ones_give_the_same_result(
    ten: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    expected = holds(ten, AutoAttack(THREAT, only=FAST)(ten, x, y), y)
    wide = AutoAttack(ThreatModel("linf", 255 * 0.15, PixelSpace(bounds=(0, 255))), only=FAST)
    assert torch.equal(holds(ten, guard(wide)(lambda p: ten(p / 255), 255 * x, y) / 255, y), expected)
    space = PixelSpace(mean=0.3, std=0.2)
    normalised = AutoAttack(ThreatModel("linf", 0.15, space), only=FAST)
    found = guard(normalised)(lambda z: ten(space.to_pixels(z)), space.to_model(x), y)
    assert torch.equal(holds(ten, space.to_pixels(found), y), expected)
    assert 5 < int(expected.sum()) < 35


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [pytest.param(3, id="three classes"), pytest.param(1, id="one yes/no output")])
def test_few_classes_work_and_are_said_to_be_modified(digits: tuple[Tensor, Tensor], outputs: int) -> None:
    classes = max(outputs, 2)
    x, y = of_classes(digits, classes)
    net = trained(x[:-16], y[:-16], outputs)
    x, y = x[-16:], y[-16:]
    threat = ThreatModel("linf", 0.3)
    attack = AutoAttack(threat, classes=classes)
    found = guard(attack)(net, x, y)
    model = net if outputs > 1 else lambda p: torch.cat([-net(p) / 2, net(p) / 2], 1)
    expected = direct(model, "Linf", 0.3, 0, x, y, attacks=["apgd-ce", "fab-t", "square"], n_target_classes=classes - 1)
    assert torch.equal(holds(net, found, y), holds(net, expected, y))
    assert int(holds(net, found, y).sum()) < int(holds(net, x, y).sum())
    assert attack.name == "autoattack-modified_linf_0.3"


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_few_classes_have_to_be_stated(ten: nn.Module, batch: tuple[Tensor, Tensor], classes: int) -> None:
    x, y = batch[0], batch[1] % classes
    for told, complaint in (
        (None, f"aims at 9 wrong classes, but there are {classes} classes. Say classes={classes}"),
        (7, f"told of classes=7, but the model has {classes}"),
    ):
        with pytest.raises(ValueError, match=complaint):
            AutoAttack(THREAT, classes=told)(lambda p: ten(p)[:, :classes], x, y)
    stated = AutoAttack(THREAT, classes=classes, only=FAST)
    assert stated(lambda p: ten(p)[:, :classes], x, y).shape == x.shape
    assert AutoAttack(THREAT, classes=classes).name == AutoAttack(THREAT, "plus", classes=classes).name
    assert AutoAttack(THREAT, classes=classes).name == "autoattack-modified_linf_0.15"
    assert AutoAttack(THREAT, classes=10).name == AutoAttack(THREAT).name == "autoattack-standard_linf_0.15"


def test_only_some_attacks_are_modified_and_at_least_as_weak(ten: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    attack = AutoAttack(THREAT, only=["apgd-dlr", "apgd-ce"])
    assert attack.name == "autoattack-modified-apgd-dlr-apgd-ce_linf_0.15"
    found = attack(ten, *batch)
    assert torch.equal(found, attack(ten, *batch))
    some = direct(ten, "Linf", 0.15, 0, *batch, attacks=["apgd-dlr", "apgd-ce"])
    assert torch.equal(holds(ten, found, batch[1]), holds(ten, some, batch[1]))


@pytest.mark.parametrize("wrong", [40, 39])
def test_a_batch_that_is_wrong_as_it_is_comes_back(ten: nn.Module, batch: tuple[Tensor, Tensor], wrong: int) -> None:
    """The package has crashed where nothing, or one sample, was left to do."""
    x, right = batch[0], ten(batch[0]).argmax(1)
    y = torch.cat([(right[:wrong] + 1) % 10, right[wrong:]])
    parts: Any = None if wrong == len(x) else ("apgd-ce", "apgd-t", "fab")
    found = AutoAttack(ThreatModel("linf", 0.01), only=parts)(ten, x, y)
    assert torch.equal(found[:wrong], x[:wrong])


def test_targets_may_be_probabilities_or_integers_of_any_size(ten: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    attack = AutoAttack(THREAT, only=FAST)
    expected = attack(ten, x, y)
    assert torch.equal(attack(ten, x, y.int()), expected)
    assert torch.equal(attack(ten, x, F.one_hot(y, 10) * 0.9 + 0.01), expected)


# -- refusals -------------------------------------------------------------------------------------------------------


class Reads:
    """Logits as callbacks hand them out."""

    def __init__(self, net: Any, divisible: bool = True) -> None:
        self.net, self.divisible = net, divisible

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def at(self, rows: Tensor) -> Reads:
        return self


def test_what_it_cannot_do_is_refused_with_the_remedy(ten: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    with pytest.raises(ValueError, match=r"version=\) must be 'standard' or 'plus', got 'rand'"):
        AutoAttack(THREAT, version="rand")  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ValueError, match="needs pixel bounds"):
        AutoAttack(ThreatModel("linf", 0.1, PixelSpace(bounds=None)))
    with pytest.raises(ValueError, match=r"from 2 on, got 1"):
        AutoAttack(THREAT, classes=1)
    with pytest.raises(ValueError, match=r"only=\) takes some of apgd-ce, .*, got pgd"):
        AutoAttack(THREAT, only=("pgd",))  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ValueError, match="there is no apgd-t for 3 classes"):
        AutoAttack(THREAT, only=("apgd-t",), classes=3)(lambda p: ten(p)[:, :3], x, y % 3)
    attack = AutoAttack(THREAT, only=FAST)
    with pytest.raises(ValueError, match=r"pictures \(N, C, H, W\), got \(40, 64\)"):
        attack(lambda p: ten(p.view(-1, 1, 8, 8)), x.flatten(1), y)
    with pytest.raises(ValueError, match="rows refer to each other"):
        attack(Reads(ten, divisible=False), x, y)
    with pytest.raises(ValueError, match="rows refer to each other"):
        attack(Reads(lambda p: ten(p) + torch.arange(len(p)).unsqueeze(1) * torch.arange(10)), x, y)
    with pytest.raises(ValueError, match="expected pixels within"):
        AutoAttack(THREAT.widened(), only=FAST)(ten, x + 0.5, y)
    assert torch.equal(attack(Reads(ten), x, y), attack(ten, x, y))
    assert attack(Reads(ten, divisible=False), x[:1], y[:1]).shape == (1, 1, 8, 8)  # a sample has only itself


def test_the_missing_package_is_named_with_the_line_that_installs_it(
    ten: nn.Module, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pyautoattack":
            raise ModuleNotFoundError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-robust\[eval\]'"):
        AutoAttack(THREAT)(ten, *batch)


# -- no traces ------------------------------------------------------------------------------------------------------


def test_streams_traces_gradients_and_output_are_untouched(
    ten: nn.Module, batch: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[str] = []

    def trace(frame: Any, event: str, arg: Any) -> None:
        events.append(frame.f_code.co_name)

    net = copy.deepcopy(ten)
    net.zero_grad()
    numbers = np.random.get_state()[1]
    before = torch.get_rng_state(), random.getstate()
    outer, check = sys.gettrace(), pyautoattack.autoattack.checks.check_dynamic
    sys.settrace(trace)
    try:
        AutoAttack(THREAT, only=("apgd-ce", "fab-t"), seed=7)(net, batch[0][:4], batch[1][:4])
        assert sys.gettrace() is trace
    finally:
        sys.settrace(outer)
    assert "check_square_sr" in events  # still traced at the very end
    assert pyautoattack.autoattack.checks.check_dynamic is check
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], numbers)
    assert random.getstate() == before[1]
    assert all(p.grad is None for p in net.parameters())  # FAB calls backward()
    assert capsys.readouterr() == ("", "")


def test_it_runs_in_fp32_under_autocast_and_in_inference_mode(ten: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    attack = AutoAttack(THREAT, only=FAST)
    types: set[torch.dtype] = set()

    def watched(x: Tensor) -> Tensor:
        found: Tensor = ten(x)
        types.add(found.dtype)
        return found

    expected = attack(ten, *batch)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        x, y = (tensor.clone() for tensor in batch)
        assert torch.equal(guard(attack)(watched, x, y), expected)
    assert types == {torch.float32}


class Digits(pl.LightningModule):
    """The trained net in a module as users write them; binary with one output."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        z = self.net(x)
        one = z.shape[1] == 1
        loss = F.binary_cross_entropy_with_logits(z, y.float().unsqueeze(1)) if one else F.cross_entropy(z, y)
        self.log("test_loss", loss)


@pytest.mark.parametrize("outputs", [10, 1])
def test_robust_accuracy_in_test_is_that_of_a_direct_use(
    ten: nn.Module, batch: tuple[Tensor, Tensor], digits: tuple[Tensor, Tensor], outputs: int
) -> None:
    net, (x, y), threat = ten, batch, THREAT
    if outputs == 1:
        images, labels = of_classes(digits, 2)
        net, x, y, threat = trained(images[:-40], labels[:-40], 1), images[-40:], labels[-40:], ThreatModel("linf", 0.3)
    parts: Any = ("apgd-ce", "fab-t" if outputs == 1 else "apgd-t")
    attack = AutoAttack(threat, only=parts, classes=max(outputs, 2))
    monitor = RobustAccuracy(attack, stages=("test",), strict=True)
    trainer = zoo.trainer(callbacks=[monitor])
    trainer.test(Digits(net), DataLoader(TensorDataset(x, y), batch_size=40), verbose=False)
    found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("robust/test/accuracy")}
    model = net if outputs > 1 else lambda p: torch.cat([-net(p) / 2, net(p) / 2], 1)
    expected = direct(model, "Linf", threat.eps, 0, x, y, attacks=list(parts), n_target_classes=max(outputs, 2) - 1)
    accuracy = float(holds(net, expected, y).double().mean())
    assert found == pytest.approx({"robust/test/accuracy": accuracy, f"robust/test/accuracy_{attack.name}": accuracy})
    assert 0.1 < accuracy < 0.95
