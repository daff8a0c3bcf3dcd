"""Attacks of other libraries as ours: they run on whatever model they are given, and leave no trace on it."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attacks.heads import head_of
from lightning_robust.attacks.search import Search, searching
from lightning_robust.attacks.threat import ThreatModel
from lightning_robust.protocols import LogitsFn

__all__ = ["StandIn", "from_foolbox", "from_torchattacks", "lent"]


class _OfInputAlone(torch.autograd.Function):
    """A function of pixels whose backward pass reaches the pixels and nothing else.

    Some libraries call ``loss.backward()``, which adds to the gradient of every parameter on its way.
    """

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            leaf = pixels.detach().requires_grad_()
            result = function(leaf)
        if not result.requires_grad:
            raise RuntimeError(
                "the logits do not depend on the input: is the network run under torch.no_grad(), or detached?"
            )
        ctx.leaf, ctx.result = leaf, result
        return result.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator, unused-ignore]  # torch has no types there
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        # Kept, since attacks that take one class after the other come back to the same graph.
        (gradient,) = torch.autograd.grad(ctx.result, ctx.leaf, gradients, retain_graph=True, allow_unused=True)
        return gradient, None


class StandIn(nn.Module):
    """A function of pixels in the place of the model that another library wants, in eval mode, without parameters.

    What that library does to flags of its model stays with the stand-in.

    Attributes:
        search: The attack on one batch.
        labels: The right classes, ``(N,)``.
        classes: How many there are.

    Raises:
        ValueError: If a sample has several predictions.
    """

    def __init__(self, search: Search) -> None:
        super().__init__()
        self.search = search  # not a module: the model inside must not become a part of this one
        self._rows_checked = False
        with torch.no_grad():
            clean, labels = self._head(search.clean)
        if labels.shape == clean.shape:
            labels = labels.argmax(1)  # probabilities
        if clean.ndim != 2 or labels.numel() != len(clean):
            raise ValueError(
                f"attacks of other libraries are for one prediction a sample, got scores {tuple(clean.shape)} and "
                f"targets {tuple(labels.shape)}. PGD, APGD and Square take pixels and several labels as well."
            )
        self.labels, self.classes, self._clean = labels.reshape(len(clean)).long(), clean.shape[1], clean
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels, also of some samples only, to class scores ``(N, K)`` in float32."""
        if len(pixels) != len(self._clean):
            self.check_rows()
        if torch.is_grad_enabled() and pixels.requires_grad:
            scores: Tensor = _OfInputAlone.apply(pixels, self._scores)  # type: ignore[no-untyped-call]  # torch has no types there
            return scores
        return self._scores(pixels)

    def check_rows(self) -> None:
        """Whether scores of a sample depend on its pixels alone: other libraries take batches apart.

        Raises:
            ValueError: If not.
        """
        if self._rows_checked or len(self._clean) < 2:
            return
        self._rows_checked = True
        apart = self.search.divisible
        if apart and hasattr(self.search.logits_fn, "at"):  # it may use more of a batch than the pixels
            with torch.no_grad():
                turned = self._scores(self.search.clean.flip(0)).flip(0)
            apart = bool(((turned - self._clean).abs() <= 1e-3 * (self._clean.abs().max() + 1e-6)).all())
        if not apart:
            raise ValueError(
                "this attack takes batches apart, but here samples cannot be read by their pixels alone: rows refer to "
                "each other or to other entries of the batch, the step draws random numbers, or the model is compiled "
                "or sharded. Use PGD, APGD or Square."
            )

    def _scores(self, pixels: Tensor) -> Tensor:
        return self._head(pixels)[0]

    def _head(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores, and the targets of the whole batch."""
        search = self.search
        y = search.y
        if len(pixels) != len(y):  # of some samples, in any order: only scores matter
            y = y[:1].expand(len(pixels), *y.shape[1:])
        scores, labels = head_of(search.objective)(search.logits(pixels), y)
        scores = scores.float()
        return (scores.flatten(1) if scores[0].numel() == scores.shape[1] else scores), labels


@contextmanager
def lent(
    threat: Any, logits_fn: LogitsFn, x: Tensor, y: Tensor, objective: Any
) -> Iterator[tuple[StandIn, Tensor, Callable[[Tensor], Tensor]]]:
    """A batch as other libraries want it.

    Yields:
        A model of pixels, the pixels within their bounds, and what turns attacked pixels into model inputs.

    Raises:
        ValueError: If the threat is not one ball around one input.
    """
    if not isinstance(threat, ThreatModel):
        raise ValueError(
            f"attacks of other libraries know one radius and one input, got a {type(threat).__name__}. Leave out "
            "mask_key=, eps_key= and a list of input keys, or use PGD, APGD or Square."
        )
    with searching(threat, logits_fn, x, y, objective) as search:
        low, high = threat.pixels.bounds or (-math.inf, math.inf)
        inside = search.clean.clamp(low, high)
        beyond = search.clean - inside  # round-off of a normalisation, or augmentation that overshoots

        def returned(pixels: Tensor) -> Tensor:
            return threat.pixels.to_model(pixels.detach() + beyond, x.dtype)

        yield StandIn(search), inside, returned


@dataclass(frozen=True, eq=False)
class _FromTorchattacks:
    """See :func:`from_torchattacks`."""

    attack: Any
    threat: ThreatModel
    objective: Any = None  # what it says about the head counts; callbacks fill it in

    @property
    def name(self) -> str:
        return f"torchattacks-{self.attack.attack.lower()}_{self.threat}"

    # Without `generator`: the guard gives attacks that draw from the global streams streams of their own.
    def __call__(self, logits_fn: LogitsFn, x: Tensor, y: Tensor) -> Tensor:
        with lent(self.threat, logits_fn, x, y, self.objective) as (model, pixels, returned):
            # Wherever the model stands in the attack, in the parts of a MultiAttack too, the copy holds the stand-in.
            # Not by set_model(): torchattacks keeps all that it was ever given in a list, whole batches with it.
            attack = copy.deepcopy(self.attack, {id(self.attack.model): model})
            for part in _parts(attack):
                vars(part)["device"] = x.device
                self._set_radius(part)
            found = attack(pixels, model.labels)
            if any(_radius(part) is None for part in _parts(attack) if not part._attacks):
                # One that looks for the nearest mistake, however far: as far as it may go on the way there.
                found = self.threat.project(found, pixels, (0.0, 1.0))
            return returned(found)

    def _set_radius(self, part: Any) -> None:
        """Callbacks change the radius (warm-up, curves); steps go in proportion."""
        name = _radius(part)
        own = 0.0 if name is None else getattr(part, name)
        if own:
            vars(part)[name] = self.threat.eps
            if hasattr(part, "alpha"):
                vars(part)["alpha"] = part.alpha * self.threat.eps / own


def _parts(attack: Any) -> list[Any]:
    return [attack, *attack._attacks.values()]


def _radius(part: Any) -> str | None:
    """The name of an attack's radius, if it has one."""
    return next((name for name in ("eps", "max_epsilon") if getattr(part, name, None) is not None), None)


def from_torchattacks(attack: Any, threat: ThreatModel) -> Any:
    """An attack of torchattacks as one of ours; it runs on whatever model it is given, not on its own.

    The defects of the original stay outside: flags of frozen BatchNorm and gradients of parameters are as before, and
    normalised inputs are attacked in pixels. Random numbers come from the global streams; callbacks and
    :func:`~lightning_robust.attacks.guard` give it streams of its own.

    An attack with a radius (``eps``) must have that of ``threat``; where callbacks change the radius, its step
    (``alpha``) changes in proportion. One that looks for the nearest mistake (CW, DeepFool) or changes few pixels
    (OnePixel: ``ThreatModel("linf", 1.0)``) has none: what it returns is projected into the ball.

    It treats a sample by its pixels alone, and does not know the training mode: ``set_model_training_mode`` has no
    effect.

    Args:
        attack: Built as its documentation says, around any model: ``torchattacks.CW(nn.Identity())``.
        threat: What it may do, in pixel units; its bounds must be (0, 1), which torchattacks takes for granted.

    Returns:
        A callable ``(logits_fn, x, y) -> x_adv``, for callbacks as well. Labels are classes ``(N,)``, probabilities, or
        0/1 for a single output.

    Raises:
        ValueError: If the bounds are not (0, 1), the radii differ, or the attack was told to normalise or to reach the
            classes that it is given.

    Example:
        ::

            jitter = from_torchattacks(torchattacks.Jitter(nn.Identity(), eps=8 / 255), ThreatModel("linf", 8 / 255))
            trainer = Trainer(callbacks=[RobustAccuracy(jitter)])

    References:
        Kim, `Torchattacks <https://arxiv.org/abs/2010.01950>`_, 2020.
    """
    if not hasattr(attack, "_attacks") or not hasattr(attack, "attack"):
        raise TypeError(f"from_torchattacks takes an attack of torchattacks, got {type(attack).__name__}.")
    if not isinstance(threat, ThreatModel) or threat.pixels.bounds != (0.0, 1.0):
        got = f"bounds {threat.pixels.bounds}" if isinstance(threat, ThreatModel) else f"a {type(threat).__name__}"
        raise ValueError(f"torchattacks takes pixels in [0, 1]: expected a ThreatModel with these bounds, got {got}.")
    for part in _parts(attack):
        if getattr(part, "normalization_used", None) is not None:
            raise ValueError("leave set_normalization_used() out: the threat model's PixelSpace says mean and std.")
        if part.attack_mode == "targeted(label)":
            raise ValueError(
                "set_mode_targeted_by_label() makes it go where y says, and y holds the right classes here. Choose "
                "targets by set_mode_targeted_by_function(), _random() or _least_likely()."
            )
        eps = getattr(part, _radius(part) or "", threat.eps)
        if not math.isclose(eps, threat.eps, rel_tol=1e-6):
            raise ValueError(f"{part.attack} has radius {eps:g}, but the threat model is {threat}: make them equal.")
    return _FromTorchattacks(attack, threat)


@dataclass(frozen=True, eq=False)
class _FromFoolbox:
    """See :func:`from_foolbox`."""

    attack: Any
    threat: ThreatModel
    objective: Any = None

    @property
    def name(self) -> str:
        return f"foolbox-{type(self.attack).__name__.lower()}_{self.threat}"

    def __call__(self, logits_fn: LogitsFn, x: Tensor, y: Tensor) -> Tensor:
        foolbox: Any = importlib.import_module("foolbox")
        with lent(self.threat, logits_fn, x, y, self.objective) as (model, pixels, returned):
            theirs = foolbox.PyTorchModel(model, bounds=self.threat.pixels.bounds, device=x.device)
            _, found, _ = self.attack(theirs, pixels, model.labels, epsilons=self.threat.eps)
            return returned(found)


def from_foolbox(attack: Any, threat: ThreatModel) -> Any:
    """An attack of foolbox as one of ours; see :func:`from_torchattacks`.

    Args:
        attack: E.g. ``foolbox.attacks.LinfDeepFoolAttack()``; untargeted.
        threat: What it may do, in pixel units; it needs bounds. What the attack finds is clipped to its radius.

    Returns:
        A callable ``(logits_fn, x, y) -> x_adv``.

    Raises:
        ValueError: If there are no bounds, or the attack measures distances in another norm.

    References:
        Rauber et al., `Foolbox Native <https://doi.org/10.21105/joss.02607>`_, 2020.
    """
    if not isinstance(threat, ThreatModel) or threat.pixels.bounds is None:
        raise ValueError("foolbox needs pixel bounds: expected a ThreatModel with PixelSpace(bounds=(low, high)).")
    p = getattr(getattr(attack, "distance", None), "p", None)
    if p is not None and p != {"linf": math.inf, "l2": 2}[threat.norm]:
        raise ValueError(
            f"{type(attack).__name__} measures distances in the l{p} norm, but the threat model is {threat}."
        )
    return _FromFoolbox(attack, threat)
