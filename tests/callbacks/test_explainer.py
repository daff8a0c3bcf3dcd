"""Methods are given what they ask for by name, and one that does not fit is left out with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from lightning_robust import PixelSpace
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.callbacks.explainer import CHUNK, Explainer, submodule
from lightning_robust.saliency.methods import METHODS

X, Y = zoo.images(6), zoo.labels(6)


class Conv(zoo.ListBatch):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()]
        self.net = nn.Sequential(*layers, nn.Linear(6 * 36, 10))


def explained(methods: dict[str, Any], shape: Any = Conv, x: Tensor = X, **settings: Any) -> tuple[Any, list[str]]:
    module, said = zoo.built(shape), []
    pixels = settings.pop("pixels", None)
    explainer = Explainer(methods, settings.pop("layer", None), pixels, 5, lambda text, _: said.append(text))
    with Probe().reading(Step.of(module, "validation_step", [x, Y], 0)) as reading:
        return {name: explainer.maps(name, reading, x, Y) for name in methods}, said


def test_a_method_gets_what_it_has_a_name_for() -> None:
    seen: dict[str, Any] = {}

    def greedy(
        logits_fn: Any, x: Tensor, target: Tensor, *, layer: Any, module: Any, baseline: Any, seed: int, chunk_size: int
    ) -> Tensor:
        seen.update(layer=layer, module=module, baseline=baseline, seed=seed, chunk_size=chunk_size)
        return x[:, 0]

    def modest(logits_fn: Any, x: Tensor, target: Tensor) -> Tensor:
        return logits_fn(x)[:, :1, None] * x[:, 0]

    maps, said = explained({"greedy": greedy, "modest": modest}, pixels=PixelSpace(mean=0.5, std=0.25))
    assert not said
    assert all(m is not None for m in maps.values())
    assert isinstance(seen["module"], Conv)
    assert seen["layer"] is seen["module"].net[3]
    assert torch.equal(seen["baseline"], torch.full((1, 1, 8, 8), -2.0))  # black, as the model sees it
    assert (seen["seed"], seen["chunk_size"]) == (5, CHUNK)


@pytest.mark.parametrize(
    "name", ["gradient", "input_x_gradient", "integrated_gradients", "smoothgrad", "occlusion", "hidden_tiles"]
)
def test_maps_of_a_user_s_step_are_those_of_its_network(name: str) -> None:
    maps, said = explained({name: METHODS[name]})
    module = zoo.built(Conv).eval()
    given = {"seed": 5} if name == "smoothgrad" else {}
    assert not said
    torch.testing.assert_close(maps[name], METHODS[name](module.net, X, Y, **given))


def test_a_named_layer_is_taken_and_a_wrong_name_has_the_right_ones_beside_it() -> None:
    module = zoo.built(Conv)
    assert submodule(module, "net.0") is module.net[0]
    with pytest.raises(ValueError, match=r"layer='net.9' is no submodule of Conv; it has net, net.0, net.1"):
        submodule(module, "net.9")
    named, _ = explained({"gradcam": METHODS["gradcam"]}, layer="net.1")
    found, _ = explained({"gradcam": METHODS["gradcam"]})
    assert not torch.equal(named["gradcam"], found["gradcam"])


class Flat(zoo.ListBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_what_does_not_fit_is_left_out_with_a_reason() -> None:
    def picky(logits_fn: Any, x: Tensor, target: Tensor) -> Tensor:
        raise ValueError("needs signals")

    maps, said = explained({"gradcam": METHODS["gradcam"], "picky": picky}, Flat)
    assert maps == {"gradcam": None, "picky": None}
    assert "gradcam needs a feature map, and this module has no convolution" in said[0]
    assert said[1] == "picky is left out: needs signals"
