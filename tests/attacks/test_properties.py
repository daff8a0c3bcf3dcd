"""What every attack promises, whatever it is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lightning_robust.attacks import APGD, FGSM, NFGSM, PGD, Square, ThreatModel, UniformNoise, guard
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import Noise, seeded

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

CHANNELS, CLASSES = 3, 4
QUIETLY = hypothesis.settings(derandomize=True, deadline=None, max_examples=150)

ATTACKS: dict[str, Any] = {
    "fgsm": FGSM,
    "fgsm-rs": lambda threat: FGSM(threat, start="uniform"),
    "n-fgsm": NFGSM,
    "pgd": lambda threat: PGD(threat, steps=3),
    "pgd, zero": lambda threat: PGD(threat, steps=2, start="zero"),
    "pgd, gaussian, kl": lambda threat: PGD(threat, steps=2, start="gaussian", objective="kl"),
    "pgd, best, dlr": lambda threat: PGD(threat, steps=3, keep="best", objective="dlr"),
    "pgd, early exit, restarts": lambda threat: PGD(threat, steps=3, early_exit=True, restarts=2),
    "pgd, random target": lambda threat: PGD(threat, steps=2, targeted="random", keep="best"),
    "pgd, runner-up": lambda threat: PGD(threat, steps=2, targeted="runner-up", restarts=2),
    "noise": lambda threat: UniformNoise(threat, draws=2),
    "apgd": lambda threat: APGD(threat, steps=6),
    "apgd, all": lambda threat: APGD(threat, steps=6, objective="margin", early_exit=False, restarts=2),
    "apgd-t": lambda threat: APGD(threat, steps=4, targets=2),
    "square": lambda threat: Square(threat, queries=5),
    "square, all": lambda threat: Square(threat, queries=5, early_exit=False),
}


@dataclass(frozen=True)
class Case:
    """One attack on one batch."""

    attack: str
    norm: Literal["linf", "l2"]
    eps: float
    space: PixelSpace
    dtype: torch.dtype
    size: tuple[int, ...]
    local: Literal["", "mask", "masks", "eps", "both"]
    generators: bool
    seed: int

    def batch(self) -> tuple[Tensor, Tensor]:
        """Model inputs with some pixels exactly on the bounds, and classes."""
        low, high = self.space.bounds or (-2.0, 2.0)
        share = torch.rand(self.size, dtype=torch.float64, generator=seeded(self.seed)) * 1.2 - 0.1
        pixels = low + (high - low) * share.clamp(0, 1)
        return self.space.to_model(pixels, self.dtype), torch.arange(self.size[0]) % CLASSES

    def mask(self) -> Tensor | None:
        if self.local not in ("mask", "masks", "both"):
            return None
        shape = self.size if self.local == "masks" else (1, *self.size[1:])
        return (torch.rand(shape, generator=seeded(self.seed, 1)) < 0.6).float()

    def made(self) -> Any:
        low, high = self.space.bounds or (0.0, 1.0)
        threat: Any = ThreatModel(self.norm, self.eps * (high - low), self.space)
        if self.local:
            radii = threat.eps * (0.25 + 0.75 * torch.rand(self.size[0], generator=seeded(self.seed, 2)))
            threat = threat.within(mask=self.mask(), eps=radii if self.local in ("eps", "both") else None)
        return ATTACKS[self.attack](threat)

    def noise(self) -> Noise:
        return [seeded(self.seed, 3, i) for i in range(self.size[0])] if self.generators else seeded(self.seed, 3)


def logits_fn(case: Case) -> Any:
    """Not linear, of moderate slope in every pixel space; in the type of its inputs."""
    features, (low, high) = torch.Size(case.size[1:]).numel(), case.space.bounds or (-2.0, 2.0)
    # Where tanh is saturated the sign of a gradient is round-off.
    slope = 4 * float(torch.tensor(case.space.std).max()) / (high - low) / features**0.5
    first = slope * torch.randn(features, 8, generator=seeded(case.seed, 4))
    second = torch.randn(8, CLASSES, generator=seeded(case.seed, 5))

    def logits(x: Tensor) -> Tensor:
        assert x.dtype == case.dtype
        return torch.tanh(x.flatten(1) @ first.to(x)) @ second.to(x)

    return logits


def spaces() -> Any:
    def normalised(bounds: tuple[float, float] | None, kind: str) -> PixelSpace:
        low, high = bounds or (0.0, 1.0)
        middle, width = (low + high) / 2, high - low
        mean = {"none": 0.0, "scalar": middle, "channels": (middle, middle - 0.03 * width, middle + 0.05 * width)}[kind]
        std = {"none": 1.0, "scalar": 0.25 * width, "channels": (0.2 * width, 0.25 * width, 0.3 * width)}[kind]
        return PixelSpace(bounds, mean, std)

    bounds = st.sampled_from([(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0), None])
    return st.builds(normalised, bounds, st.sampled_from(["none", "scalar", "channels"]))


CASES = st.builds(
    Case,
    attack=st.sampled_from(sorted(ATTACKS)),
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.sampled_from([0.0, 1e-3, 8 / 255, 0.3, 2.0]),
    space=spaces(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    size=st.sampled_from([(1, CHANNELS), (4, CHANNELS, 2), (5, CHANNELS, 4, 4), (3, CHANNELS, 5, 3)]),
    local=st.sampled_from(["", "", "mask", "masks", "eps", "both"]),
    generators=st.booleans(),
    seed=st.integers(0, 1000),
).filter(lambda case: case.norm == "linf" or case.attack != "n-fgsm")


@QUIETLY
@hypothesis.given(CASES)
def test_every_attack_keeps_its_promises(case: Case) -> None:
    attack, logits, (x, y) = case.made(), logits_fn(case), case.batch()
    before = x.clone()
    found = guard(attack)(logits, x, y, generator=case.noise())  # ball, box, shape and finiteness, by their own rules
    assert (found.shape, found.dtype, found.requires_grad) == (x.shape, x.dtype, False)
    assert bool(found.isfinite().all())
    assert torch.equal(x, before)
    inside_the_ball(case, x, found, getattr(attack, "reach", attack.threat.eps))
    assert torch.equal(guard(attack)(logits, x, y, generator=case.noise()), found)


def inside_the_ball(case: Case, x: Tensor, found: Tensor, reach: float) -> None:
    """Ball and box once more, in doubles and without the library's own distance."""
    space, threat = case.space, case.made().threat
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, *[1] * (x.ndim - 2)) for v in (space.mean, space.std))
    clean, moved = (v.double() * std + mean for v in (x, found))
    largest = max(float(clean.abs().max()), float(moved.abs().max()), float(mean.abs().max()), threat.eps)
    rounding = 4 * torch.finfo(x.dtype).eps * largest
    delta = (moved - clean).flatten(1)
    length = delta.abs().amax(1) if case.norm == "linf" else delta.norm(dim=1)
    radii = torch.full((len(x),), threat.eps) if getattr(threat, "radii", None) is None else threat.radii
    allowed = radii.double() * (reach / threat.eps if threat.eps else 1)
    assert bool((length <= allowed * (1 + 1e-6) + rounding * (delta.shape[1] ** 0.5 if case.norm == "l2" else 1)).all())
    if (mask := case.mask()) is not None:
        assert float(((moved - clean) * (mask == 0)).abs().max()) <= rounding
    if space.bounds is not None:
        assert float(moved.min()) >= space.bounds[0] - rounding
        assert float(moved.max()) <= space.bounds[1] + rounding


@QUIETLY
@hypothesis.given(CASES)
def test_with_a_generator_a_sample_no_attack_depends_on_the_rest_of_the_batch(case: Case) -> None:
    # Of fooled samples whose class comes third DLR is 1 whatever happens: they walk where round-off leads them.
    hypothesis.assume("dlr" not in case.attack)
    case = replace(case, generators=True, dtype=torch.float64, size=(4, CHANNELS, 4, 4))
    attack, logits, (x, y) = case.made(), logits_fn(case), case.batch()
    whole = attack(logits, x, y, generator=case.noise())
    local, rows = getattr(attack.threat, "at", None), torch.tensor([2, 0])
    part = replace(attack, threat=local(rows)) if local else attack
    noise: Any = case.noise()
    alone = part(logits, x[rows], y[rows], generator=[noise[i] for i in rows.tolist()])
    tolerance = 1e-9 * max(1.0, float(whole.abs().max()))
    torch.testing.assert_close(alone, whole[rows], rtol=0, atol=tolerance)
