"""Where things are in a layer's output: feature maps, channels-last maps and tokens, as maps over the picture."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

__all__ = ["as_feature_map", "enlarged_to", "token_grid"]

# Bilinear or its like, by the number of dimensions of the input.
_ENLARGE = {3: "linear", 4: "bilinear", 5: "trilinear"}
# No extra token, a class token, one for distillation too; four registers, alone or behind a class token.
_EXTRA = (0, 1, 2, 4, 5)
_FEATURES_FIRST = (_ConvNd, _BatchNorm, nn.GroupNorm)
_FEATURES_LAST = (nn.Linear, nn.LayerNorm, nn.MultiheadAttention)


def enlarged_to(maps: Tensor, size: torch.Size) -> Tensor:
    """Maps ``(N, ...)`` enlarged linearly to the last dimensions of inputs ``size``, ``(N, C, ...)``.

    Example:
        >>> enlarged_to(torch.tensor([[0.0, 4.0]]), torch.Size([1, 3, 4]))
        tensor([[0., 1., 3., 4.]])
    """
    return F.interpolate(maps[:, None], list(size[2:]), mode=_ENLARGE[len(size)], align_corners=False)[:, 0]


def token_grid(tokens: int, size: tuple[int, int]) -> tuple[int, int, int] | None:
    """How many extra tokens stand in front of a grid of patches, and the rows and columns of that grid.

    Patches are as high as wide, so ``rows : columns`` is ``H : W``, or what cutting into whole patches leaves of it.
    Extra tokens are none, a class token, a class and a distillation token, or four registers with or without a class
    token; the fewest that fit.

    Args:
        tokens: How many there are.
        size: Height and width of the picture.

    Returns:
        ``(extra, rows, columns)``; ``None`` where no grid fits.

    Example:
        >>> token_grid(197, (224, 224)), token_grid(32, (32, 64)), token_grid(15, (32, 32))
        ((1, 14, 14), (0, 4, 8), None)
    """
    height, width = size
    whole = {(height // side, width // side) for side in range(1, min(height, width) + 1)}
    grids = [
        (extra, rows, (tokens - extra) // rows)
        for extra in _EXTRA
        for rows in range(1, tokens - extra + 1)
        if (tokens - extra) % rows == 0 and extra < tokens - extra > 1
    ]
    fitting = [grid for grid in grids if grid[1] * width == grid[2] * height]
    # What is cut off at the edges is only thought of where nothing else fits.
    fitting += [grid for grid in grids if grid[1:] in whole and grid[0] <= 1]
    return fitting[0] if fitting else None


def as_feature_map(values: Tensor, x: Tensor, layer: nn.Module) -> tuple[Tensor, int]:
    """A layer's output as a feature map ``(N, K, ...)`` over the input, and how many tokens in front were left out.

    Args:
        values: Output of the layer, or anything of its shape: a feature map ``(N, K, ...)``, one with the channels
            last ``(N, H, W, K)``, or tokens ``(N, T, K)`` of a picture.
        x: The inputs ``(N, C, ...)``.
        layer: What gave them. What it is made of tells where the features are if the shape alone does not.

    Returns:
        The map, and the number of class and register tokens.

    Raises:
        ValueError: If this is no map over the input, or may be one in two ways.

    Example:
        >>> x = torch.zeros(2, 3, 32, 32)
        >>> tokens, extra = as_feature_map(torch.zeros(2, 17, 8), x, nn.LayerNorm(8))
        >>> tokens.shape, extra
        (torch.Size([2, 8, 4, 4]), 1)
    """
    if values.ndim == x.ndim == 4 and values[0].numel():
        last = _channels_are_last(values.shape, x.shape, layer)
        return (values.movedim(-1, 1) if last else values), 0
    if values.ndim == 3 and x.ndim == 4:
        extra, rows, columns = _grid_of_tokens(values.shape, x.shape, layer)
        return values[:, extra:].transpose(1, 2).reshape(len(values), -1, rows, columns), extra
    # Tokens of a signal look like its feature maps, and their number says little: any may be a class token.
    if values.ndim == x.ndim and x.ndim in _ENLARGE and values[0].numel() and _features(layer) != "last":
        return values, 0
    raise _misfit(values.shape, x.shape, layer)


def _misfit(shape: torch.Size, inputs: torch.Size, layer: nn.Module) -> ValueError:
    return ValueError(
        f"class activation maps need a layer whose output is (M, K, ...) like the input {tuple(inputs)}, or the tokens "
        f"(M, T, K) of a picture's grid of patches; that of {type(layer).__name__} is {tuple(shape)}. Name a "
        f"convolution, a block of them, or a norm in front of an attention; or use another method."
    )


def _features(layer: nn.Module) -> str:
    """Whether what a layer is made of puts features first, last, or does not tell."""
    if type(layer) in (nn.Linear, nn.LayerNorm):  # subclasses often move the channels there and back
        return "last"
    parts = list(layer.modules())
    first, last = (any(isinstance(part, kinds) for part in parts) for kinds in (_FEATURES_FIRST, _FEATURES_LAST))
    return "unknown" if first == last else "first" if first else "last"


def _channels_are_last(shape: torch.Size, inputs: torch.Size, layer: nn.Module) -> bool:
    first, last = _scales(shape[2:], inputs[2:]), _scales(shape[1:3], inputs[2:])
    made = _features(layer)
    if made == "first" or not last:
        if made == "last" and not first:
            raise _misfit(shape, inputs, layer)
        return False
    if type(layer) in (nn.Linear, nn.LayerNorm) or (made == "last" and not first):
        return True
    if made == "unknown" and first:
        return False
    raise ValueError(
        f"the output {tuple(shape)} of {type(layer).__name__} may have its channels first or last, for inputs "
        f"{tuple(inputs)}. Name a layer inside of it, such as a convolution or an nn.LayerNorm."
    )


def _scales(sides: torch.Size, to: torch.Size) -> bool:
    """Whether one scale, give or take a pixel a side, leads from these sides to those."""
    low = max(big / (small + 1) for small, big in zip(sides, to, strict=True))
    high = min(big / (small - 1) if small > 1 else inf for small, big in zip(sides, to, strict=True))
    return low <= high


def _grid_of_tokens(shape: torch.Size, inputs: torch.Size, layer: nn.Module) -> tuple[int, int, int]:
    size = (inputs[2], inputs[3])
    grid, made = token_grid(shape[1], size), _features(layer)
    if grid is None or made == "first" or shape[0] != inputs[0]:
        raise _misfit(shape, inputs, layer)
    if made == "unknown" and token_grid(shape[2], size) is not None:
        raise ValueError(
            f"the output {tuple(shape)} of {type(layer).__name__} may be {shape[1]} tokens or {shape[2]} tokens. Name "
            f"a layer that tells, such as an nn.LayerNorm or a whole block."
        )
    return grid
