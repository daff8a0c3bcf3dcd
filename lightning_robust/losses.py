"""One call of a loss function: what it says about a model's head, and the same loss again for other logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.attacks.objectives import gaps, sample_margin
from lightning_robust.ood.scores import two_class

__all__ = ["LOSSES", "LossCall", "LossKind"]

LossKind = Literal["cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div"]

LOSSES: dict[Callable[..., Any], str] = {
    F.cross_entropy: "cross_entropy",
    F.nll_loss: "nll_loss",
    F.binary_cross_entropy: "binary_cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
    F.kl_div: "kl_div",
}
"""The loss functions that are recognised, by function."""
if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13; its inner cross_entropy cannot be seen
    LOSSES[F.linear_cross_entropy] = "linear_cross_entropy"

_PARAMETERS = {function: tuple(inspect.signature(function).parameters) for function in LOSSES}
_FUNCTIONS = {name: function for function, name in LOSSES.items()}


@dataclass(frozen=True)
class LossCall:
    """What a loss function was given.

    Attributes:
        kind: Which function; it decides what the first argument means, its values never do.
        logits: The first argument, ``(N, K, ...)``, ``(N, 1)`` or ``(N,)``: logits, log-probabilities (``nll_loss``,
            ``kl_div``) or probabilities (``binary_cross_entropy``).
        target: The second argument.
        options: Class weights, label smoothing and the other arguments; never a reduction.

    Example:
        >>> call = LossCall("binary_cross_entropy_with_logits", torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0]))
        >>> call.correct()
        tensor([1., 0.])
    """

    kind: LossKind
    logits: Tensor
    target: Tensor
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_arguments(cls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LossCall:
        """Read a call of one of :data:`LOSSES`."""
        given = {**dict(zip(_PARAMETERS[function], args, strict=False)), **kwargs}
        logits, target = given.pop("input"), given.pop("target")
        for reduction in ("reduction", "reduce", "size_average", "options"):
            given.pop(reduction, None)
        kind = LOSSES[function]
        if kind == "linear_cross_entropy":
            logits = F.linear(logits, given.pop("linear_weight"), given.pop("linear_bias", None))
            kind = "cross_entropy"
        options = {name: value for name, value in given.items() if value is not None}
        return cls(kind, logits, target, options)  # type: ignore[arg-type]  # LOSSES holds the kinds as plain strings

    @classmethod
    def for_head(cls, logits: Tensor, target: Tensor) -> LossCall:
        """The usual loss of a head that is only known by shapes: logits and targets given by hand.

        Raises:
            ValueError: If no usual loss takes these shapes.
        """
        if target.is_floating_point() and target.shape == logits.shape and logits.ndim <= 2:
            return cls("binary_cross_entropy_with_logits", logits, target)
        if logits.ndim == 1 or logits.shape[1:] == (1,):
            return cls("binary_cross_entropy_with_logits", logits, target.reshape(logits.shape).to(logits.dtype))
        if not target.is_floating_point() and target.shape == logits.shape[:1] + logits.shape[2:]:
            return cls("cross_entropy", logits, target)
        raise ValueError(
            "expected logits (N, K, ...) with integer classes (N, ...), (N,) or (N, 1) with 0/1 targets, or (N, K) "
            f"with 0.0/1.0 targets; got logits {tuple(logits.shape)} for targets {tuple(target.shape)} of type "
            f"{target.dtype}. Several labels a sample are floating-point numbers; a class is one integer a sample."
        )

    def conformed(self, leaf: Tensor) -> Tensor | None:
        """A tensor with as many numbers as this loss has targets, in their shape and type; None if the numbers differ.

        Steps write ``y.float().unsqueeze(1)`` or ``y.view(-1)`` before they call their loss.
        """
        logits, target = self.logits, self.target
        soft = self.binary or self.kind == "kl_div" or leaf.is_floating_point()
        shape = logits.shape if soft else logits.shape[:1] + logits.shape[2:]
        if leaf.numel() != shape.numel():
            return None
        return leaf.reshape(shape).to(target.dtype if soft == target.is_floating_point() else leaf.dtype)

    @property
    def binary(self) -> bool:
        """Whether each logit stands for a yes/no of its own (one output, or multi-label)."""
        return self.kind.startswith("binary")

    def again(self, logits: Tensor) -> LossCall:
        """The same loss for other logits."""
        return replace(self, logits=logits)

    def detached(self) -> LossCall:
        """The same call with copies of its tensors that have no graph."""
        return replace(self, logits=self.logits.detach().clone(), target=self.target.detach().clone())

    def per_sample(self) -> Tensor:
        """The loss of each sample, ``(N,)``, in float32 and differentiable; pixels or labels of a sample are summed."""
        loss = self._loss("none")
        return loss.flatten(1).sum(1) if loss.ndim > 1 else loss

    def mean(self) -> Tensor:
        """The loss as its usual reduction has it: over what has a label, by class weights; ``kl_div`` over samples."""
        return self._loss("batchmean" if self.kind == "kl_div" else "mean")

    def _loss(self, reduction: str) -> Tensor:
        logits = self.logits.float()
        target = self.target.to(logits.dtype) if self.target.is_floating_point() else self.target
        options = {k: v.float() if isinstance(v, Tensor) else v for k, v in self.options.items()}
        loss: Tensor = _FUNCTIONS[self.kind](logits, target, reduction=reduction, **options)
        return loss

    def log_probabilities(self) -> Tensor:
        """``(N, K, ...)`` log-probabilities; a yes/no output becomes two classes, ``(N, 2, ...)``."""
        z = self.logits.float()
        if self.kind == "binary_cross_entropy_with_logits":
            return torch.stack([F.logsigmoid(-z), F.logsigmoid(z)], dim=1)
        if self.kind == "binary_cross_entropy":
            tiny = torch.finfo(z.dtype).tiny
            return torch.stack([torch.log1p(-z.clamp(max=1 - 1e-7)), z.clamp_min(tiny).log()], dim=1)
        return z.log_softmax(1)

    def probabilities(self) -> Tensor:
        """Of classes ``(N, K, ...)``, or of yes, shaped like the logits."""
        p = self.log_probabilities().exp()
        return p[:, 1] if self.binary else p

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every single prediction by itself: pixels, labels and tokens of a sample are rows of their own.

        Returns:
            Log-probabilities ``(R, K)`` (two columns for a yes/no output), right classes ``(R,)``, and the sample that
            each row belongs to, ``(R,)``. Rows without a label (``ignore_index``) are left out.
        """
        log_p, labels = self.log_probabilities().movedim(1, -1), self.labels()
        sample = torch.arange(len(log_p), device=log_p.device).view(-1, *[1] * (labels.ndim - 1)).expand(labels.shape)
        rows = log_p.reshape(-1, log_p.shape[-1]), labels.flatten(), sample.flatten()
        counted = self._counted().flatten()
        if not bool(counted.all()):
            rows = rows[0][counted], rows[1][counted], rows[2][counted]
        self.check_classes(rows[1])
        return rows

    def check_classes(self, labels: Tensor) -> None:
        """Whether there is a logit for every label.

        Raises:
            ValueError: If not.
        """
        if not labels.numel():
            return
        classes = 2 if self.binary else self.logits.shape[1] if self.logits.ndim > 1 else 1
        low, high = (int(end) for end in labels.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"expected labels from 0 to {classes - 1}, as many classes as there are logits, got labels from "
                f"{low} to {high}. Do this loader and the model speak of the same classes, "
                "or is a class a partner in the batch (contrastive losses), which other samples do not have? Labels "
                "that mean 'none' are those of the loss's ignore_index."
            )

    def class_logits(self) -> Tensor | None:
        """Logits ``(N, K)`` of one prediction a sample; None for pixels, several labels, and log-probabilities.

        A yes/no output ``z`` is two classes, ``(-z/2, z/2)``.
        """
        z = self.logits.float()
        if self.binary:
            z = z.logit(eps=1e-7) if self.kind == "binary_cross_entropy" else z
            return two_class(z) if z.ndim == 1 or z.shape[1:] == (1,) else None
        return z if z.ndim == 2 and self.kind == "cross_entropy" else None

    def class_view(self) -> tuple[Tensor, Tensor]:
        """Scores ``(N, K, ...)`` and right answers that every multi-class objective takes.

        A yes/no output is two classes, as log-probabilities; other heads are as they are. Labels that do not count
        are -100, whatever this loss calls them.
        """
        if self.binary:
            return self.log_probabilities(), self.labels()
        if self.target.shape == self.logits.shape:
            return self.logits, self.target
        return self.logits, self.target.masked_fill(~self._counted(), -100)

    def scaled(self, temperature: float) -> LossCall:
        """The same call with its probabilities at a temperature, ``softmax(z / T)``; the kind stays what it is."""
        z = self.logits / temperature
        if self.kind in ("nll_loss", "kl_div"):
            z = z.log_softmax(1)
        elif self.kind == "binary_cross_entropy":
            z = (self.logits.float().logit(eps=1e-7) / temperature).sigmoid().to(self.logits.dtype)
        return replace(self, logits=z)

    def recalibrated(self, recalibrate: Callable[[Tensor], Tensor]) -> LossCall:
        """The same call with other probabilities; the kind stays what it is.

        Args:
            recalibrate: Log-probabilities ``(R, K)`` to recalibrated ones, ``(R, K)``; two columns for a yes/no output.
        """
        log_p = self.log_probabilities().movedim(1, -1)
        z = recalibrate(log_p.reshape(-1, log_p.shape[-1])).reshape(log_p.shape).movedim(-1, 1)
        if self.binary:
            z = z[:, 1] - z[:, 0]
            z = z.sigmoid() if self.kind == "binary_cross_entropy" else z
        return replace(self, logits=z.to(self.logits.dtype))

    def squashed(self) -> str | None:
        """Why what the loss gets looks squashed twice, or squashed otherwise than this loss expects; else None.

        It changes nothing in how the call is treated: that is a matter of its kind.
        """
        z = self.logits.detach()
        rows = self.kind in ("cross_entropy", "nll_loss") and z.ndim > 1 and z.shape[1] > 1 and z.numel() > 0
        if rows and bool((z >= 0).all()) and bool(((z.float().sum(1) - 1).abs() < 1e-3).all()):
            if self.kind == "nll_loss":
                return (
                    "nll_loss takes log-probabilities, and gets rows that sum to 1 (a softmax without its logarithm)."
                )
            return "cross_entropy gets rows that sum to 1 (a softmax), and applies a softmax of its own to them."
        if self.kind == "binary_cross_entropy_with_logits" and _made_by(self.logits, "SigmoidBackward"):
            return "binary_cross_entropy_with_logits gets the output of a sigmoid, and applies its own to it."
        return None

    def predictions(self) -> Tensor:
        """Predicted classes, ``(N, ...)``; for yes/no outputs 0 or 1, shaped like the logits."""
        if self.kind == "binary_cross_entropy_with_logits":
            return (self.logits > 0).long()
        if self.kind == "binary_cross_entropy":
            return (self.logits > 0.5).long()
        return self.logits.argmax(1)

    def labels(self) -> Tensor:
        """The right answers, shaped like :meth:`predictions`; of soft targets the likeliest class."""
        if self.binary:
            return (self.target > 0.5).long()
        return self.target.argmax(1) if self.target.shape == self.logits.shape else self.target

    def correct(self) -> Tensor:
        """How much of each sample is right, ``(N,)`` in [0, 1]: 0 or 1, or the share of its labels or pixels."""
        silent = self.logits.isnan() if self.binary else self.logits.isnan().any(1)  # NaN is no answer
        right = ((self.predictions() == self.labels()) & ~silent).float()
        if right.ndim == 1:
            return right
        counted = self._counted().float()
        return (right * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1)

    def counted(self) -> Tensor:
        """Which samples have a label at all, ``(N,)``; the others hold ``ignore_index`` only."""
        counted = self._counted()
        return counted.flatten(1).any(1) if counted.ndim > 1 else counted

    def _counted(self) -> Tensor:
        labels = self.labels()
        if self.binary or self.target.is_floating_point():
            return torch.ones_like(labels, dtype=torch.bool)
        counted: Tensor = labels != self.options.get("ignore_index", -100)
        return counted

    def margin(self) -> Tensor:
        """How far wrong answers lie above right ones, ``(N,)``; above 0 the model is fooled (:func:`sample_margin`)."""
        if not self.binary:
            counted = self._counted()
            return sample_margin(gaps(self.logits, self.labels().masked_fill(~counted, -1)), counted)
        z = self.logits.float()
        z = z.logit(eps=1e-7) if self.kind == "binary_cross_entropy" else z
        return sample_margin(torch.where(self.target > 0.5, -z, z))


def _made_by(tensor: Tensor, operation: str) -> bool:
    """Whether a tensor is the result of an operation, views aside."""
    node = tensor.grad_fn
    while node is not None and any(view in node.name() for view in ("View", "Squeeze", "Reshape", "Alias")):
        node = node.next_functions[0][0] if node.next_functions else None
    return node is not None and node.name().startswith(operation)
