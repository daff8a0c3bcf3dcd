"""Maps over hand loops of the same work, a snapshot over a training step, and how long a picture takes."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust import PixelSpace
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.callbacks.explainer import Explainer
from lightning_robust.callbacks.photographer import Photographer
from lightning_robust.callbacks.watched_probes import WatchedProbes
from lightning_robust.saliency import METHODS, ProbeSet, filmstrip, overlays
from lightning_robust.saliency.filmstrip import shrunk
from tests.benchmarks.subjects import Plain, Subject
from tests.benchmarks.timing import Row, compared, interleaved, progress

__all__ = ["saliency"]

PROBES, POINTS, NOISY = 16, 16, 25
OF_A_SNAPSHOT = ("gradient", "gradcam", "integrated_gradients")


def saliency() -> list[Row]:
    """Maps of 16 probes over hand loops, a snapshot of three methods over a training step, and pictures."""
    subject = Subject("cnn", 64, batches=1)
    net, x, y = subject.net().eval(), subject.x[:PROBES], subject.y[:PROBES]
    rows: list[Row] = []
    for name, by_hand in _hands(net, x, y).items():
        progress(f"saliency: {name}")
        given = {"layer": net[_last_map(net)]} if name == "gradcam" else {}
        contenders = {"by hand": by_hand, "ours": partial(METHODS[name], net, x, y, **given)}
        torch.testing.assert_close(contenders["ours"](), by_hand(), rtol=0.05, atol=1e-2)  # the same work
        rows += compared("saliency", f"{name}, {PROBES} probes", interleaved(contenders, 9), "by hand")
    rows += _snapshot(subject)
    return rows + _pictures()


def _last_map(net: Any) -> int:
    return max(i for i, part in enumerate(net) if isinstance(part, nn.ReLU))


def _hands(net: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
    def slope(inputs: Tensor) -> Tensor:
        leaf = inputs.detach().requires_grad_()
        (found,) = torch.autograd.grad(net(leaf).gather(1, y[:, None]).sum(), leaf)
        return found

    def gradcam() -> Tensor:
        parts = list(net)
        below, above = parts[: _last_map(net) + 1], parts[_last_map(net) + 1 :]
        with torch.no_grad():
            features = nn.Sequential(*below)(x)
        features.requires_grad_()
        (slopes,) = torch.autograd.grad(nn.Sequential(*above)(features).gather(1, y[:, None]).sum(), features)
        coarse = (slopes.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
        return F.interpolate(coarse, x.shape[2:], mode="bilinear", align_corners=False)[:, 0].detach()

    def integrated() -> Tensor:
        return (x * sum(slope(x * ((i + 0.5) / POINTS)) for i in range(POINTS)) / POINTS).sum(1)

    return {"gradient": lambda: slope(x).abs().sum(1), "gradcam": gradcam, "integrated_gradients": integrated}


def _snapshot(subject: Subject) -> list[Row]:
    """What an evaluation with a snapshot costs beyond one without: the second of a run, which needs no null."""
    progress("saliency: a snapshot")
    module = Plain(subject.net())
    module.log = lambda *_, **__: None  # type: ignore[method-assign]  # there is no Trainer
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    x, y = subject.x[:64], subject.y[:64]
    probes = ProbeSet(torch.arange(PROBES), y[:PROBES], x[:PROBES])
    said: list[str] = []
    probe = Probe()  # what it finds is found once a run
    explainer = Explainer(
        {name: METHODS[name] for name in OF_A_SNAPSHOT}, None, PixelSpace(), 0, lambda text, _: said.append(text)
    )

    def training_step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(module.net(x), y).backward()
        optimizer.step()

    def snapshot(photographer: Photographer, watched: WatchedProbes, draw: bool) -> None:
        with probe.reading(Step.of(module, "validation_step", [x, y], 0)) as reading:
            photographer.take(reading, watched, probes.x, "now", draw=draw)

    contenders: dict[str, Any] = {"a training step, batch 64": training_step}
    for what, draw, anew in (
        ("a snapshot, without pictures", False, False),
        ("a snapshot, with pictures", True, False),
        ("the anchor, with null and floor, without pictures", False, True),
    ):
        photographer = Photographer(explainer, None, False, False, True, 0, said.append)
        watched = WatchedProbes("")
        watched.settle(probes)
        snapshot(photographer, watched, draw)  # the anchor
        if anew:
            contenders[what] = partial(_anchor, snapshot, photographer, probes)
        else:
            contenders[what] = partial(snapshot, photographer, watched, draw)
    targets = {"a snapshot, without pictures": 5.0}
    case = f"{len(OF_A_SNAPSHOT)} methods, {PROBES} probes 3x32x32"
    return compared("saliency", case, interleaved(contenders, 9), "a training step, batch 64", targets)


def _anchor(snapshot: Any, photographer: Photographer, probes: ProbeSet) -> None:
    watched = WatchedProbes("")
    watched.settle(probes)
    snapshot(photographer, watched, False)


def _pictures() -> list[Row]:
    progress("saliency: pictures")
    rows = []
    for side in (28, 224):
        images, labels = shrunk(torch.rand(8, 3, side, side)), torch.arange(8)
        shown = [(f"epoch {i}", torch.rand(8, *images.shape[2:])) for i in range(5)]  # films are kept small
        sure = torch.full((8,), 0.9)
        maps, lines = shown[-1][1], ["a, seen as b"] * 8
        contenders = {
            "a filmstrip of 8 rows, 7 columns": partial(filmstrip, images, labels, labels, sure, shown, (0.0, 1.0)),
            "8 overlays": partial(overlays, images, maps, lines, [True] * 8, (0.0, 1.0)),
        }
        for what, seconds in interleaved(contenders, 9).items():
            rows.append(Row("saliency", f"pictures of {side}x{side}", what, 1e3 * median(seconds)))
    return rows
