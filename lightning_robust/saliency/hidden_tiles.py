"""Occlusion that shows what a prediction rests on: tiles that do not overlap, and log-probabilities."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lightning_robust.ood.scores import two_class
from lightning_robust.protocols import LogitsFn
from lightning_robust.saliency.explaining import broadcast, check_inputs, explained

__all__ = ["hidden_tiles"]


def hidden_tiles(
    logits_fn: LogitsFn,
    x: Tensor,
    target: Tensor,
    *,
    tiles: int = 7,
    baseline: float | Tensor = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    r"""How much log-probability the target loses when a tile of the picture is hidden: what a prediction *rests on*.

    .. math:: S_t = \log p_y(x) - \log p_y(x \text{ without tile } t)

    Occlusion with two differences that show shortcuts. The log-probability tells evidence that decides from evidence
    that there is plenty of: a logit falls a little wherever a stroke is hidden, even if the answer does not change.
    And tiles do not overlap, so that what is seen in one does not spread to its neighbours.

    It sees best what is about as large as a tile and inside one. A shortcut that reaches over several tiles is still
    read from its rest while one is hidden, and may leave no trace; in a much larger tile it is found, but its mass
    spreads over the tile. Try several numbers of tiles where the size is not known. What hides should be what is
    normally there when nothing is: a shortcut of that very colour is not found.

    Args:
        logits_fn: Inputs to logits, ``(M, K)`` or one yes/no logit a sample; called ``tiles ** 2 + 1`` times.
        x: Pictures ``(N, C, H, W)``.
        target: The classes to explain, ``(N,)``; for shortcuts those predicted.
        tiles: In each direction.
        baseline: What hides: a number, or a tensor that broadcasts against ``x``.
        chunk_size: Samples a forward; ``None`` for all.

    Returns:
        Maps ``(N, H, W)``, positive where the target loses; float32.

    Raises:
        ValueError: If ``x`` are no pictures of at least ``tiles`` pixels a side, or ``target`` does not fit.

    Example:
        >>> x, weight = torch.ones(1, 1, 2, 2), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
        >>> maps = hidden_tiles(lambda x: (x * weight).sum((1, 2, 3)), x, torch.tensor([1]), tiles=2)
        >>> maps.round(decimals=2)
        tensor([[[0.0000, 0.0000],
                 [0.6400, 0.0000]]])

    References:
        Zintgraf et al., `Visualizing Deep Neural Network Decisions: Prediction Difference Analysis
        <https://arxiv.org/abs/1702.04595>`_, 2017, on log-odds; Zeiler and Fergus, 2014, https://arxiv.org/abs/1311.2901.
    """
    check_inputs(x, target, chunk_size)
    if x.ndim != 4 or not 1 <= tiles <= min(x.shape[2:]):
        raise ValueError(
            f"hidden_tiles(tiles={tiles}) needs pictures (N, C, H, W) with sides of at least that many pixels (and one "
            f"tile), got {tuple(x.shape)}."
        )
    rows, columns = (
        [slice(*ends) for ends in pairwise(round(i * side / tiles) for i in range(tiles + 1))] for side in x.shape[2:]
    )

    @torch.no_grad()
    def attribute(logits: LogitsFn, x: Tensor, target: Tensor, start: Tensor) -> Tensor:
        def sure(x: Tensor) -> Tensor:
            return logits(x).float().log_softmax(1).gather(1, target[:, None])

        whole, maps = sure(x), torch.zeros(len(x), *x.shape[2:], device=x.device)
        for row in rows:
            for column in columns:
                hidden = x.clone()
                hidden[..., row, column] = start[..., row, column]
                maps[:, row, column] = (whole - sure(hidden))[:, :, None]
        return maps

    def both(x: Tensor) -> Tensor:
        # Elsewhere a yes/no logit is that of class 1 as it is; probabilities need the pair that it stands for.
        z = logits_fn(x)
        return two_class(z) if z.ndim == 1 or z.shape[1:] == (1,) else z

    return explained(attribute, both, x, target, chunk_size, broadcast(baseline, x))
