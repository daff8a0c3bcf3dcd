"""Saliency-guided training: a prediction shall not change when what matters least to it is replaced by noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_robust.divergence import kl_divergences
from lightning_robust.losses import LossCall
from lightning_robust.penalties.derivatives import drawn, forward, right_answer
from lightning_robust.penalties.features import channels_of, ranges
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise, uniform

__all__ = ["SaliencyGuided"]


@dataclass(frozen=True)
class SaliencyGuided:
    r"""``mean_i KL(p(x_i) || p(x~_i))``, where ``x~`` is ``x`` with its least salient features replaced by noise.

    Least salient are those with the smallest magnitude of the gradient of the right answer's score (the logit of the
    right class; :func:`~lightning_robust.penalties.derivatives.right_answer`). The gradient only chooses: it is not
    differentiated, so that any network will do. Noise is uniform between the lowest and the highest value of the
    channel in that image, or of the column in that batch for tables. Both predictions are trained, as in TRADES; of
    pixels or labels the mean is taken.

    Args:
        share: Of the features that are replaced, above 0 and below 1.
        channel_dim: The dimension whose entries are one feature and are replaced together (the colours of a pixel),
            for inputs of three and more dimensions; None: each number is a feature of its own. For sequences
            ``(N, time, features)`` say -1.

    Raises:
        ValueError: If the share is out of range.

    Example:
        The second input hardly matters, and noise in its place changes next to nothing.

        >>> net = torch.nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 0.01], [-3.0, 0.0]]))
        >>> x, y = torch.rand(4, 2), torch.tensor([0, 1, 0, 1])
        >>> bool(SaliencyGuided(share=0.5)(net, x, y) < 1e-4)
        True

    References:
        Ismail, Corrada Bravo & Feizi, `Improving Deep Learning Interpretability by Saliency Guided Training
        <https://arxiv.org/abs/2111.14338>`_, 2021, equation 2 and algorithm 1.
    """

    name: ClassVar[str] = "saliency_guided"
    starts_at_zero: ClassVar[bool] = True  # before training no feature matters much

    share: float = 0.5
    channel_dim: int | None = 1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(
                f"SaliencyGuided(share=) is the part of the features that noise replaces, above 0 and below 1, got "
                f"{self.share}."
            )

    def __call__(
        self,
        logits_fn: LogitsFn,
        x: Tensor,
        y: Tensor,
        *,
        call: Callable[[Tensor], LossCall] | None = None,
        logits: Tensor | None = None,
        reuse: bool = True,
        generator: Noise = None,
    ) -> Tensor:
        """The penalty, a scalar, differentiable with respect to the parameters behind ``logits_fn``.

        Args:
            logits_fn: Inputs to logits.
            x: Model inputs ``(N, ...)``.
            y: Targets, which say whose gradient is meant.
            call: Logits to the loss call that knows their log-probabilities, where it is not the usual one.
            logits: The logits of ``x``, if computed already; ``x`` is then the leaf of their graph.
            reuse: Whether that graph can be kept for a second backward pass; if not, one more forward is run.
            generator: Of the noise; None seeds one from torch's global stream.

        Raises:
            ValueError: If no usual loss takes these logits and targets, the logits do not depend on ``x``, or ``x`` has
                no dimension ``channel_dim``.
        """
        call = call or (lambda z: LossCall.for_head(z, y))
        generator = drawn(generator)
        run = forward(logits_fn, x, logits, differentiable=reuse)
        gradient = run.gradient(lambda z: right_answer(call(z)), reuse=reuse)
        x = run.x.detach()
        low, high = ranges(x, self.channel_dim)
        replaced = torch.where(self._least(gradient), low + (high - low) * uniform(x, generator), x)
        log_q = call(run.again(replaced)).log_probabilities()
        return kl_divergences(call(run.logits).log_probabilities(), log_q).mean()

    def _least(self, gradient: Tensor) -> Tensor:
        """Which features have the smallest gradients; it broadcasts with ``gradient``."""
        channels = channels_of(gradient, self.channel_dim)
        size = gradient.abs() if channels is None else gradient.abs().sum(channels, keepdim=True)
        flat = size.flatten(1)
        number = max(1, round(self.share * flat.shape[1]))
        # So many, not all below a threshold: of dead pixels there are many with one gradient, 0.
        least = flat.topk(number, dim=1, largest=False, sorted=False).indices
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, least, True).view_as(size)
