"""Features of the last linear layer, caught in steps as people write them, and compared with a plain forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attach.features import Caught, FeatureTap
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.losses import LossCall

N = 12


def step_of(module: Any, batch: Any = None) -> Step:
    return Step.of(module, "training_step", module.batch(N) if batch is None else batch, 0)


def caught(module: Any, layer: str | None = None, **probe: Any) -> tuple[FeatureTap, Caught | None]:
    """What a read of the step shows, once the tap knows where to look."""
    module.eval()
    tap, step = FeatureTap(layer), step_of(module)
    with Probe(**probe).reading(step, listening=True) as reading, torch.no_grad():
        tap.find(module, lambda: reading.read(reading.x))
        with tap.open(module) as tapped:
            call = reading.read(reading.x)
    assert not any(part._forward_hooks for part in module.modules())
    return tap, tapped.of(call)


def same(found: Caught | None, features: Tensor) -> bool:
    return found is not None and torch.equal(found.features, features)


class Timm(zoo.Shape):
    """A backbone with a ``head``, dropout before it, as timm's models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU())
        self.model.drop, self.model.head = nn.Dropout(0.3), nn.Linear(6, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.model.body(x).mean((2, 3))  # type: ignore[no-any-return,operator]  # a tensor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model.head(self.model.drop(self.features(x))), y)  # type: ignore[operator]  # a module


class ViT(zoo.Shape):
    """Tokens with a CLS token in front; layers inside have linear layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.embed = nn.Linear(16, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

    def features(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.reshape(len(x), 4, 16))
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1)
        return self.norm(self.block(tokens)[:, 0])  # type: ignore[no-any-return]  # a tensor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.features(batch[0])), batch[1])


class Sequential(zoo.Shape):
    def features(self, x: Tensor) -> Tensor:
        return self.net[:-1](x)  # type: ignore[no-any-return]  # a tensor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class PicturesBefore(Sequential):
    """The network runs on something else first, and again afterwards, as it were for a log."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.net(batch[0][:4])
        self.net(1 - batch[0])
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.net(batch[0] * 0)
        return loss


class Helper(Sequential):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._shared(batch)

    def _shared(self, batch: Any) -> Tensor:
        return nn.CrossEntropyLoss(label_smoothing=0.1)(self._logits(batch[0]), batch[1])  # type: ignore[no-any-return]  # a tensor

    def _logits(self, x: Tensor) -> Tensor:
        return self.net.forward(x)


class LogSoftmax(Sequential):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(self.net(batch[0]).log_softmax(1), batch[1])


class Sigmoid(Sequential):
    def __init__(self) -> None:
        super().__init__(outputs=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy(self.net(batch[0]).sigmoid().squeeze(1), (batch[1] % 2).float())


class OneLogit(Sigmoid):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.net(batch[0])[:, 0], (batch[1] % 2).float())


class TwoHeads(Sequential):
    """Two heads that both begin at zero would look alike; here only one does."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6 * 64, 10)
        nn.init.zeros_(self.other.weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = self.features(batch[0])
        logits = self.net[-1](features)
        self.other(features)
        return F.cross_entropy(logits, batch[1])


class ByName(Sequential):
    """Calls its head with the name of the argument."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net[-1](input=self.features(batch[0])), batch[1])


class Wrapped(Sequential):
    """The head inside of a module that other parts of the network call."""

    def __init__(self) -> None:
        super().__init__()

        class Inner(nn.Module):
            def __init__(self, net: nn.Sequential) -> None:
                super().__init__()
                self.body, self.classifier = net[:-1], nn.ModuleDict({"fc": net[-1]})

            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return {"logits": self.classifier["fc"](self.body(x))}

        self.inner = Inner(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.inner(batch[0])["logits"], batch[1])


class Normed(Sequential):
    """A head whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.net[-1])


SHAPES = [
    Sequential, Timm, ViT, PicturesBefore, Helper, LogSoftmax, Sigmoid, OneLogit, TwoHeads, ByName, Wrapped, Normed,
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_features_are_what_goes_into_the_last_linear_layer(shape: Any) -> None:
    module: Any = zoo.built(shape)
    tap, found = caught(module)
    with torch.no_grad():
        expected = module.features(module.batch(N)[0])
        head = tap.linear(module)
        assert head is not None
        assert head is {Timm: lambda: module.model.head, ViT: lambda: module.head}.get(shape, lambda: module.net[-1])()
        torch.testing.assert_close(found.features, expected)  # type: ignore[union-attr]  # asserted right here
        torch.testing.assert_close(found.output, head(expected))  # type: ignore[union-attr]  # likewise


def test_logits_fn_leads_to_the_head_too() -> None:
    class ByHand(Sequential):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            z = self.net(batch[0])
            return (z.logsumexp(1) - z.gather(1, batch[1][:, None])[:, 0]).mean()

    module = zoo.built(ByHand)
    _, found = caught(module, logits_fn=lambda m, batch: m.net(batch[0]), target_key=1)
    assert same(found, module.features(module.batch(N)[0]))


@pytest.mark.parametrize(("precision", "autocast"), [(torch.bfloat16, False), (torch.float32, True)])
def test_short_floats_find_their_head(precision: torch.dtype, autocast: bool) -> None:
    for shape in (Sequential, LogSoftmax):
        module = zoo.built(shape).to(precision).eval()
        tap, step = FeatureTap(), step_of(module, [zoo.images(N).to(precision), zoo.labels(N)])
        with (
            Probe().reading(step, listening=True) as reading,
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            tap.find(module, lambda reading=reading: reading.read(reading.x))
            assert tap.head == "net.5"
            with tap.open(module) as tapped:
                assert tapped.of(reading.read(reading.x)) is not None


def test_logits_that_are_no_numbers_hide_no_other_rows() -> None:
    module = zoo.built(Sequential).eval()
    x = zoo.images(N)
    x[3] = torch.nan
    tap, step = FeatureTap(), step_of(module, [x, zoo.labels(N)])
    with Probe().reading(step, listening=True) as reading, torch.no_grad():
        tap.find(module, lambda: reading.read(reading.x))
        with tap.open(module) as tapped:
            found = tapped.of(reading.read(reading.x))
    assert found is not None
    assert found.features.isnan().any(1).tolist() == [i == 3 for i in range(N)]


# -- a layer by name ---------------------------------------------------------------------------------------------------


def test_a_layer_by_name_gives_its_output_and_maps_their_mean_over_places() -> None:
    module = zoo.built(Sequential)
    x = module.batch(N)[0]
    tap, found = caught(module, "net.0")
    assert same(found, module.net[0](x).mean((2, 3)).detach())
    assert tap.head == "net.5"  # whose output says which of several calls it was
    _, found = caught(module, "net.4")
    assert same(found, module.net[:5](x).detach())


def test_of_several_calls_a_layer_gives_the_one_that_led_to_the_loss() -> None:
    module = zoo.built(PicturesBefore)
    _, found = caught(module, "net.1")
    assert same(found, module.net[:2](module.batch(N)[0]).mean((2, 3)).detach())


class Averaged(Sequential):
    """Test-time augmentation: no layer's output is what the loss gets."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy((self.net(x) + self.net(x.flip(3))) / 2, y)


def test_where_no_linear_layer_gives_the_logits_the_error_names_what_helps() -> None:
    with pytest.raises(ProbeError, match=r"no linear layer of Averaged .*feature_layer=.*net\.0, net\.1"):
        caught(zoo.built(Averaged))
    module = zoo.built(Averaged)
    tap, found = caught(module, "net.1")
    assert tap.head is None
    assert tap.linear(module) is None
    assert same(found, module.net[:2](module.batch(N)[0].flip(3)).mean((2, 3)).detach())


class Convolutional(zoo.Shape):
    def __init__(self) -> None:
        super().__init__()
        pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 10, 1), *pooled)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_a_head_that_is_a_convolution_needs_a_layer_by_name() -> None:
    with pytest.raises(ProbeError, match="feature_layer='backbone'"):
        caught(zoo.built(Convolutional))
    module = zoo.built(Convolutional)
    assert same(caught(module, "net.1")[1], module.net[:2](module.batch(N)[0]).mean((2, 3)).detach())


@pytest.mark.parametrize("layer", ["net", "net.2"])
def test_of_a_layer_that_ends_with_the_head_the_features_are_the_logits(layer: str) -> None:
    module = zoo.built(Sequential)
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Linear(12, 10))
    tap, found = caught(module, layer)
    assert tap.head is None
    with torch.no_grad():
        assert same(found, module.net(step_of(module).batch[0]))


def test_a_layer_that_is_not_there_or_does_not_run_or_gives_no_features_is_an_error() -> None:
    with pytest.raises(ProbeError, match=r"feature_layer='nett' is no submodule of Sequential; it has net, net\.0"):
        caught(zoo.built(Sequential), "nett")
    with pytest.raises(ProbeError, match=r"feature_layer='embed' gives \(12, 4, 16\); expected features \(N, D\)"):
        caught(zoo.built(ViT), "embed")

    class Idle(Sequential):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(2, 2)

    with pytest.raises(ProbeError, match=r"feature_layer='idle' gave no features for 12 logits"):
        caught(zoo.built(Idle), "idle")


def test_an_output_that_is_no_features_ends_no_step_of_the_users() -> None:
    class Changing(Sequential):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

    module = zoo.built(Changing)
    tap = FeatureTap("layer")
    with tap.open(module, listening=True) as tapped:
        module.layer(torch.zeros(2, 3, 4))
        module.layer(torch.zeros(2, 3))
    assert len(tapped.calls) == 1
    assert not module.layer._forward_hooks


def test_what_follows_in_a_step_changes_nothing_that_was_caught() -> None:
    module = zoo.built(Sequential).eval()
    tap = FeatureTap()
    tap.head = "net.5"
    with torch.no_grad(), tap.open(module, listening=True) as tapped:
        features = module.features(zoo.images(N))
        logits = module.net[-1](features)
        expected = Caught(features.clone(), logits.clone())
        features.mul_(0)
        logits.mul_(0)
    found = tapped.of(LossCall("cross_entropy", expected.output, zoo.labels(N)))  # type: ignore[arg-type]  # not None
    assert same(found, expected.features)


def test_hooks_go_with_an_exception() -> None:
    module = zoo.built(Sequential)
    tap = FeatureTap()
    tap.head = "net.5"
    with pytest.raises(KeyboardInterrupt), tap.open(module):
        raise KeyboardInterrupt
    assert not any(part._forward_hooks for part in module.modules())
    with pytest.raises(ZeroDivisionError):
        tap.find(module, lambda: 1 / 0)
    assert not any(part._forward_hooks for part in module.modules())
