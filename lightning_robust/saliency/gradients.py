"""Methods that are gradients with respect to the input: plain, times the input, under noise, along a path."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import normal, seeded
from lightning_robust.saliency.explaining import broadcast, explained, without_channels

__all__ = ["gradient", "input_x_gradient", "integrated_gradients", "smoothgrad"]


def gradient(logits_fn: LogitsFn, x: Tensor, target: Tensor, *, chunk_size: int | None = None) -> Tensor:
    r"""Plain gradients: how much the target's logit moves with each input, whichever the direction.

    .. math:: S = \sum_c \left| \partial f_y / \partial x_c \right|

    Args:
        logits_fn: Inputs ``(M, ...)`` of any batch size to logits ``(M, K)``, differentiable. One yes/no logit per
            sample, ``(M,)`` or ``(M, 1)``, counts as two classes: class 1 is the logit, class 0 its negative.
        x: Inputs ``(N, C, ...)`` or ``(N, D)``; not changed. Works under ``no_grad`` and in inference mode.
        target: The classes to explain, ``(N,)``. Keep them fixed over time: explaining the argmax makes every change
            of class look like a change of attention.
        chunk_size: Samples a forward, for memory; ``None`` for all. Maps do not depend on it.

    Returns:
        Maps ``(N, ...)``, at least 0, the channels summed; ``(N, D)`` for inputs without channels. float32, detached.

    Raises:
        ValueError: If ``x`` has no sample or is not floating point, there is not one target for each sample, or the
            logits are not those of one class a sample, with a gradient.

    Example:
        >>> x, target = torch.tensor([[1.0, 2.0]]), torch.tensor([1])
        >>> gradient(lambda x: x @ torch.tensor([[1.0, 3.0], [1.0, -4.0]]), x, target)
        tensor([[3., 4.]])

    References:
        Simonyan et al., `Deep Inside Convolutional Networks <https://arxiv.org/abs/1312.6034>`_, 2013, section 3.
        They take the largest of the channels; the sum is what Adebayo et al. compare over training.
    """
    from captum.attr import Saliency  # type: ignore[import-untyped]  # captum ships no types

    def attribute(logits: LogitsFn, x: Tensor, target: Tensor) -> Tensor:
        return without_channels(Saliency(logits).attribute(x, target))

    return explained(attribute, logits_fn, x, target, chunk_size)


def input_x_gradient(logits_fn: LogitsFn, x: Tensor, target: Tensor, *, chunk_size: int | None = None) -> Tensor:
    r"""Gradient times input: what each input adds to the target's logit, as far as the model is linear.

    .. math:: S = \sum_c x_c \cdot \partial f_y / \partial x_c

    On networks of ReLU and max pooling this is also what layer-wise relevance propagation gives (LRP-0).

    Args:
        logits_fn: As for :func:`gradient`.
        x: As for :func:`gradient`. An input of 0 gets 0: mind what 0 means after a normalisation.
        target: As for :func:`gradient`.
        chunk_size: As for :func:`gradient`.

    Returns:
        Maps as for :func:`gradient`, with signs: positive speaks for the target, negative against it.

    Raises:
        ValueError: As for :func:`gradient`.

    Example:
        >>> x, target = torch.tensor([[1.0, 2.0]]), torch.tensor([1])
        >>> input_x_gradient(lambda x: x @ torch.tensor([[1.0, 3.0], [1.0, -4.0]]), x, target)
        tensor([[ 3., -8.]])

    References:
        Shrikumar et al., `Not Just a Black Box <https://arxiv.org/abs/1605.01713>`_, 2016; Ancona et al., `Towards
        Better Understanding of Gradient-based Attribution Methods <https://arxiv.org/abs/1711.06104>`_, 2018,
        proposition 1 (LRP).
    """
    from captum.attr import InputXGradient

    def attribute(logits: LogitsFn, x: Tensor, target: Tensor) -> Tensor:
        return without_channels(InputXGradient(logits).attribute(x, target))

    return explained(attribute, logits_fn, x, target, chunk_size)


def smoothgrad(
    logits_fn: LogitsFn,
    x: Tensor,
    target: Tensor,
    *,
    samples: int = 25,
    noise: float = 0.15,
    seed: int = 0,
    chunk_size: int | None = None,
) -> Tensor:
    r"""SmoothGrad: the gradient averaged over noisy copies of the input, then its magnitude.

    .. math:: S = \sum_c \Big| \frac{1}{n} \sum_{i=1}^{n} \partial f_y(x + \sigma \epsilon_i) / \partial x_c \Big|,
        \quad \sigma = \mathrm{noise} \cdot (\max x - \min x)

    Gradients are averaged with their signs, so that what only flickers cancels out; a mean of magnitudes would keep it.
    The range is that of each sample, and every sample gets the same draws: a map depends on its sample and ``seed``
    alone, not on the batch, the place in it, or how often the method ran before. (captum's NoiseTunnel draws from the
    global stream, at one noise level for all.)

    Args:
        logits_fn: As for :func:`gradient`; it is called ``samples`` times.
        x: As for :func:`gradient`. For tables the range is that over a sample's features: standardise them.
        target: As for :func:`gradient`.
        samples: Noisy copies; the authors see little change beyond 50.
        noise: Standard deviation as a share of the sample's value range; the authors recommend 0.1 to 0.2.
        seed: Of the noise.
        chunk_size: As for :func:`gradient`.

    Returns:
        Maps as for :func:`gradient`, at least 0.

    Raises:
        ValueError: As for :func:`gradient`, and if ``samples`` is below 1 or ``noise`` negative.

    Example:
        >>> x, target = torch.tensor([[1.0, 2.0]]), torch.tensor([1])
        >>> smoothgrad(lambda x: x @ torch.tensor([[1.0, 3.0], [1.0, -4.0]]), x, target)  # no noise in a linear model
        tensor([[3., 4.]])

    References:
        Smilkov et al., `SmoothGrad: removing noise by adding noise <https://arxiv.org/abs/1706.03825>`_, 2017.
    """
    from captum.attr import Saliency

    if samples < 1 or not noise >= 0:
        raise ValueError(f"smoothgrad(samples=, noise=) must be at least 1 and 0, got {samples} and {noise}.")

    def attribute(logits: LogitsFn, x: Tensor, target: Tensor) -> Tensor:
        saliency, clean = Saliency(logits), x.detach()
        low, high = clean.flatten(1).aminmax(dim=1)
        deviation = (noise * (high - low)).view(-1, *[1] * (x.ndim - 1))
        total = torch.zeros_like(clean)
        for i in range(samples):
            noisy = clean + deviation * normal(clean[:1].float(), seeded(seed, i)).to(clean)
            total += saliency.attribute(noisy.requires_grad_(), target, abs=False)
        return without_channels((total / samples).abs())

    return explained(attribute, logits_fn, x, target, chunk_size)


def integrated_gradients(
    logits_fn: LogitsFn,
    x: Tensor,
    target: Tensor,
    *,
    steps: int = 16,
    baseline: float | Tensor = 0.0,
    method: str = "riemann_middle",
    chunk_size: int | None = None,
) -> Tensor:
    r"""Integrated gradients: what each input adds to the target's logit on the way from the baseline to ``x``.

    .. math:: S = (x - x_0) \cdot \int_0^1 \nabla f_y(x_0 + a (x - x_0)) \, da

    Complete: the map of a sample sums to ``f(x) - f(baseline)``, up to the error of the quadrature. With 16 midpoints
    that is about 1 % on small ReLU nets, what Gauss-Legendre needs 32 points for;
    :func:`~lightning_robust.saliency.completeness.completeness` measures it.

    Args:
        logits_fn: As for :func:`gradient`. It is called ``steps`` times with a batch or chunk, so that memory stays
            that of one.
        x: As for :func:`gradient`.
        target: As for :func:`gradient`.
        steps: Points of the quadrature, at least 1.
        baseline: Where the path starts: a number, or a tensor that broadcasts against ``x`` (for normalised inputs,
            black is ``-mean / std``).
        method: captum's name of the quadrature: ``riemann_middle``, ``riemann_trapezoid``, ``gausslegendre``, ...
        chunk_size: As for :func:`gradient`.

    Returns:
        Maps as for :func:`gradient`, with signs: positive speaks for the target, negative against it.

    Raises:
        ValueError: As for :func:`gradient`, and if ``steps`` is below 1 or ``baseline`` does not fit.

    Example:
        >>> x, target = torch.tensor([[1.0, 2.0]]), torch.tensor([1])
        >>> integrated_gradients(lambda x: x @ torch.tensor([[1.0, 3.0], [1.0, -4.0]]), x, target)
        tensor([[ 3., -8.]])

    References:
        Sundararajan et al., `Axiomatic Attribution for Deep Networks <https://arxiv.org/abs/1703.01365>`_, 2017,
        equation 1.
    """
    from captum.attr import IntegratedGradients

    if steps < 1:
        raise ValueError(f"integrated_gradients(steps=) must be at least 1, got {steps}.")

    def attribute(logits: LogitsFn, x: Tensor, target: Tensor, start: Tensor) -> Tensor:
        maps = IntegratedGradients(logits).attribute(
            x.detach(), start, target, n_steps=steps, method=method, internal_batch_size=len(x)
        )
        return without_channels(maps)

    return explained(attribute, logits_fn, x, target, chunk_size, broadcast(baseline, x))
