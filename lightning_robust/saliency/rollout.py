"""Attention rollout: which inputs a transformer's output has mixed in, followed through all layers."""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_robust.protocols import LogitsFn
from lightning_robust.saliency.explaining import explained
from lightning_robust.saliency.grids import enlarged_to, token_grid

__all__ = ["attention_rollout"]

_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)
_NO_CLASS_TOKEN = (0, 4)  # how many tokens stand in front of the patches: none, or registers


def attention_rollout(
    logits_fn: LogitsFn,
    x: Tensor,
    target: Tensor,
    *,
    class_token: Literal["first", "last"] = "first",
    chunk_size: int | None = None,
) -> Tensor:
    r"""Attention rollout: how much of each input's token is in the class token, if layers only mixed by attention.

    .. math:: R = \hat A_L \cdots \hat A_1, \quad \hat A_l = \tfrac12 (A_l + I)

    with :math:`A_l` the attention of layer l, averaged over its heads, and the identity for the residual connection.

    It does not know classes: ``target`` is ignored, and the map is the same for all of them. It says where the model
    gathers from, not what speaks for the answer.

    Attention is read where it is computed, in ``torch.nn.functional``: by ``multi_head_attention_forward``
    (``nn.MultiheadAttention``, ``nn.TransformerEncoder``) and ``scaled_dot_product_attention`` (timm, transformers).
    Weights are computed a second time beside it; what the model computes stays as it is. Cross-attention is left out:
    where the lengths of two sequences differ, and in ``multi_head_attention_forward`` where query and key are two
    tensors.

    Args:
        logits_fn: As for :func:`~lightning_robust.saliency.methods.gradient`, though it need not be differentiable.
        x: Pictures ``(N, C, H, W)``, or tables ``(N, D)`` with a token for each feature.
        target: Classes ``(N,)``, ignored.
        class_token: Where in a table's tokens the class token is, if there is one more token than features. Of pictures
            class and register tokens stand in front, the class token first; four of them are registers alone.
        chunk_size: Samples a forward, for memory; ``None`` for all.

    Returns:
        Maps ``(N, H, W)`` or ``(N, D)``, at least 0: the row of the class token, or the mean of the input's own rows
        where there is no class token (registers alone are none). Pictures' maps are enlarged linearly. float32,
        detached.

    Raises:
        ValueError: If no attention was seen (written by hand, compiled, or of a library's own kernel), or its tokens
            are not those of the whole input (windows, tokens that are merged on the way).

    Example:
        One layer and uniform attention: half of each token stays, the other half is spread over all four.

        >>> def logits_fn(x):  # four tokens that are all the same
        ...     tokens = torch.ones(len(x), 1, 4, 2)
        ...     return F.scaled_dot_product_attention(tokens, tokens, tokens).sum((2, 3)).expand(-1, 2)
        >>> attention_rollout(logits_fn, torch.zeros(1, 3), torch.tensor([0]))  # a class token and three features
        tensor([[0.1250, 0.1250, 0.1250]])

    References:
        Abnar and Zuidema, `Quantifying Attention Flow in Transformers <https://arxiv.org/abs/2005.00928>`_, 2020,
        equation 1.
    """
    if class_token not in ("first", "last"):
        raise ValueError(f"attention_rollout(class_token=) must be 'first' or 'last', got {class_token!r}.")

    def attribute(logits: LogitsFn, x: Tensor, target: Tensor) -> Tensor:
        watcher = _AttentionWatcher(len(x))
        with torch.no_grad(), watcher:
            logits(x)
        if watcher.problem:
            raise ValueError(watcher.problem)
        if watcher.rolled is None:
            raise ValueError(
                "no self-attention was seen: attention rollout sees torch.nn.functional.multi_head_attention_forward "
                "(of one tensor to itself) and scaled_dot_product_attention, not attention that is written by hand, "
                "from one sequence to another, compiled, or computed by "
                "another library (timm: fused_attn; transformers: attn_implementation='sdpa'). Use 'gradient' or "
                "another method for models without attention."
            )
        return _on_input(watcher.rolled, x, class_token)

    return explained(attribute, logits_fn, x, target, chunk_size)


def _on_input(rolled: Tensor, x: Tensor, class_token: str) -> Tensor:
    """The rolled-out attention ``(N, T, T)`` of output tokens to input tokens, as maps over the input."""
    tokens = rolled.shape[1]
    if x.ndim == 2 and tokens - x.shape[1] in (0, 1):
        if tokens == x.shape[1]:
            return rolled.mean(1)
        return rolled[:, 0, 1:] if class_token == "first" else rolled[:, -1, :-1]
    grid = token_grid(tokens, (x.shape[2], x.shape[3])) if x.ndim == 4 else None
    if grid is None:
        raise ValueError(
            f"attention runs over {tokens} tokens, which are neither a grid of patches (with up to five tokens in "
            f"front) nor the features of inputs {tuple(x.shape)}. Use another method."
        )
    extra, rows, columns = grid
    # Without a class token an output is the mean of patches; what registers look at is dropped with them.
    row = rolled[:, extra:, extra:].mean(1) if extra in _NO_CLASS_TOKEN else rolled[:, 0, extra:]
    return enlarged_to(row.reshape(-1, rows, columns), x.shape)


class _AttentionWatcher(TorchFunctionMode):
    """Rolls out the self-attention of whatever runs inside.

    Sees calls also where the code inside runs under modes of its own, as those pass on what they do not handle.

    Args:
        samples: How many the model is given.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.rolled: Tensor | None = None
        # Said afterwards: whoever reads a user's step takes an error in it for one of that step.
        self.problem: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            call = _MULTI_HEAD.bind(*args, **kwargs)
            if call.arguments["query"] is call.arguments["key"]:
                self._add(_multi_head_weights(call))
        elif func is F.scaled_dot_product_attention:
            self._add(_dot_product_weights(*args, **kwargs))
        return result

    def _add(self, attention: Tensor) -> None:
        if attention.shape[-2] != attention.shape[-1]:
            return  # of one sequence to another
        if attention.ndim != 3 or len(attention) != self.samples:
            self.problem = (
                f"attention of shape {tuple(attention.shape)} for {self.samples} inputs: it runs in windows, or mixes "
                f"samples; attention rollout needs all tokens of a sample in each layer. Use another method."
            )
            return
        if self.rolled is not None and attention.shape != self.rolled.shape:
            self.problem = (
                f"the number of tokens changes from {self.rolled.shape[1]} to {attention.shape[1]}: attention rollout "
                f"cannot follow tokens that are merged or dropped. Use another method."
            )
            return
        here = torch.eye(attention.shape[1], device=attention.device)
        mixed = (attention + here) / 2
        self.rolled = mixed if self.rolled is None else mixed @ self.rolled


def _multi_head_weights(call: inspect.BoundArguments) -> Tensor:
    """Attention ``(N, T, S)`` of one call, averaged over heads; the same call again, which returns it."""
    # Without dropout: its random numbers are the model's own.
    call.arguments.update(need_weights=True, average_attn_weights=True, training=False)
    if call.arguments.get("attn_mask") is not None:
        call.arguments["is_causal"] = False  # a hint that the mask makes needless
    _, weights = F.multi_head_attention_forward(*call.args, **call.kwargs)
    assert weights is not None  # they were asked for
    attention = weights.float()
    return attention if attention.ndim == 3 else attention[None]


def _dot_product_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention ``(N, T, S)`` of one call, averaged over heads; computed as torch documents it."""
    del value, dropout_p
    if query.shape[-2] != key.shape[-2]:
        return query.new_empty(*query.shape[:-1], key.shape[-2])  # not asked for: no self-attention
    query, key = query.float(), key.float()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if masked else scores + attn_mask
    attention = scores.softmax(-1)
    return attention.mean(-3) if attention.ndim == 4 else attention
