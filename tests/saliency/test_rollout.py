"""Attention rollout against a loop over layers, in closed form, and beside what else watches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from saliency.small_nets import PICTURES, TABLE, TARGET, Attention, Block, FeatureTokens, ViT, cnn, with_seeded_weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_robust.attach.watcher import LossWatcher, Stop
from lightning_robust.randomness import RandomState
from lightning_robust.saliency.rollout import attention_rollout


def rolled(attentions: list[Tensor]) -> Tensor:
    """The paper's recursion for attention ``(N, T, T)`` of each layer."""
    result = torch.eye(attentions[0].shape[-1])
    for attention in attentions:
        mixed = 0.5 * attention + 0.5 * torch.eye(attention.shape[-1])
        result = (mixed / mixed.sum(-1, keepdim=True)) @ result
    return result.detach()


def attention_by_hand(net: ViT, x: Tensor) -> list[Tensor]:
    """Of the encoder's layers, each asked for its weights."""
    found = []
    tokens = net.cut(x).flatten(2).transpose(1, 2) + net.place
    if net.extra:
        tokens = torch.cat([net.front.expand(len(x), -1, -1), tokens], 1)
    for layer in net.encoder.layers:
        z = layer.norm1(tokens)
        found.append(layer.self_attn(z, z, z, need_weights=True)[1])
        tokens = layer(tokens)
    return found


def enlarged(rows: Tensor) -> Tensor:
    return F.interpolate(rows.reshape(-1, 1, 4, 4), (8, 8), mode="bilinear", align_corners=False)[:, 0]


@pytest.mark.parametrize("extra", [1, 5])
def test_the_class_tokens_row_is_what_the_recursion_gives(extra: int) -> None:
    net = with_seeded_weights(ViT(extra=extra, layers=3))
    expected = rolled(attention_by_hand(net, PICTURES))[:, 0, extra:]
    torch.testing.assert_close(attention_rollout(net, PICTURES, TARGET), enlarged(expected))


@pytest.mark.parametrize("extra", [0, 4])
def test_without_a_class_token_rows_of_patches_are_averaged(extra: int) -> None:
    """Four tokens in front are registers alone."""
    net = with_seeded_weights(ViT(extra=extra))
    expected = rolled(attention_by_hand(net, PICTURES))[:, extra:, extra:].mean(1)
    torch.testing.assert_close(attention_rollout(net, PICTURES, TARGET), enlarged(expected))


def test_tokens_first_give_the_same_map() -> None:
    one, other = (with_seeded_weights(ViT(kind=kind)) for kind in ("torch", "torch, tokens first"))
    assert torch.equal(attention_rollout(one, PICTURES, TARGET), attention_rollout(other, PICTURES, TARGET))


def own_attention(blocks: nn.Sequential, tokens: Tensor) -> list[Tensor]:
    found = []
    for block in blocks:
        q, k, _ = block.attn.qkv(block.norm1(tokens)).view(*tokens.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        found.append((q @ k.transpose(-1, -2) / math.sqrt(4)).softmax(-1).mean(1))
        tokens = block(tokens)
    return found


@pytest.mark.parametrize("token", ["first", "last", "none"])
def test_tokens_of_a_table_are_its_features(token: Any) -> None:
    net = with_seeded_weights(FeatureTokens(token=token))
    tokens, own = TABLE[..., None] * net.weight + net.bias, net.token.expand(4, -1, -1)
    parts = {"first": [own, tokens], "last": [tokens, own], "none": [tokens]}[token]
    result = rolled(own_attention(net.blocks, torch.cat(parts, 1)))
    expected = {"first": result[:, 0, 1:], "last": result[:, -1, :-1], "none": result.mean(1)}[token]
    maps = attention_rollout(net, TABLE, TARGET, class_token="last" if token == "last" else "first")
    torch.testing.assert_close(maps, expected)


def scores_of(**how: Any) -> Tensor:
    """Rollout of one call of torch's function on a table of four tokens without a class token."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 4, 4, 8, generator=generator) for _ in range(2))

    def logits_fn(x: Tensor) -> Tensor:
        key = k[:, ::2] if how.get("enable_gqa") else k
        return F.scaled_dot_product_attention(q, key, key, **how).sum((2, 3))

    return attention_rollout(logits_fn, torch.zeros(2, 4), torch.tensor([0, 1]))


def test_masks_and_scales_count_as_torch_has_them() -> None:
    lower = torch.ones(4, 4, dtype=torch.bool).tril()
    as_numbers = torch.zeros(4, 4).masked_fill(~lower, -math.inf)
    causal = scores_of(is_causal=True)
    torch.testing.assert_close(scores_of(attn_mask=lower), causal)
    torch.testing.assert_close(scores_of(attn_mask=as_numbers), causal)
    assert not torch.allclose(scores_of(), causal)
    # At a scale of 0 attention is even, and so is the mean of its rows.
    torch.testing.assert_close(scores_of(scale=0.0), torch.full((2, 4), 0.25))
    if "enable_gqa" in (F.scaled_dot_product_attention.__doc__ or ""):  # newer than the oldest torch
        assert scores_of(enable_gqa=True).shape == (2, 4)


def test_a_causal_encoder_is_seen_with_its_mask() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    mask, tokens = nn.Transformer.generate_square_subsequent_mask(4), torch.rand(2, 4, 8)
    layer.eval()

    def logits_fn(x: Tensor) -> Tensor:
        return layer(tokens, src_mask=mask, is_causal=True).mean((1, 2))

    expected = rolled([layer.self_attn(tokens, tokens, tokens, attn_mask=mask)[1]]).mean(1)
    torch.testing.assert_close(attention_rollout(logits_fn, torch.zeros(2, 4), torch.tensor([0, 1])), expected)


def test_every_target_has_the_same_map() -> None:
    net = with_seeded_weights(ViT())
    assert torch.equal(attention_rollout(net, PICTURES, TARGET), attention_rollout(net, PICTURES, TARGET * 0))


def test_watching_changes_neither_the_output_nor_random_numbers() -> None:
    net = with_seeded_weights(ViT()).train()  # with dropout
    outputs: list[Tensor] = []

    def logits_fn(x: Tensor) -> Tensor:
        outputs.append(net(x))
        return outputs[-1]

    state = RandomState.capture()
    expected = net(PICTURES)
    after = RandomState.capture()
    state.restore()
    attention_rollout(logits_fn, PICTURES, TARGET)
    assert torch.equal(outputs[0], expected)
    assert after.is_current()


class Passing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["torch", "own"])
def test_it_sees_through_the_watcher_that_reads_a_users_step(kind: Any) -> None:
    net = with_seeded_weights(ViT(kind=kind))

    def logits_fn(x: Tensor) -> Tensor:
        watcher = LossWatcher(stop=True)
        try:
            with Passing(), watcher:
                F.cross_entropy(net(x), torch.zeros(len(x), dtype=torch.long))
        except Stop:
            pass
        assert watcher.call is not None
        return watcher.call.logits

    expected = attention_rollout(net, PICTURES, TARGET)
    assert torch.equal(attention_rollout(logits_fn, PICTURES, TARGET), expected)
    with Passing():
        assert torch.equal(attention_rollout(net, PICTURES, TARGET), expected)


def test_cross_attention_is_left_out() -> None:
    net = with_seeded_weights(FeatureTokens())
    cross = with_seeded_weights(nn.MultiheadAttention(8, 2, batch_first=True))

    def logits_fn(x: Tensor) -> Tensor:
        query, memory = x[:, :2, None].expand(-1, -1, 8), x[..., None].expand(-1, -1, 8)
        F.scaled_dot_product_attention(query, memory, memory)
        return net(x) + cross(query, memory, memory)[0].mean((1, 2))[:, None]

    assert torch.equal(attention_rollout(logits_fn, TABLE, TARGET), attention_rollout(net, TABLE, TARGET))


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no self-attention was seen: .* not attention that is written by hand"):
        attention_rollout(cnn(), PICTURES, TARGET)


def test_attention_in_windows_or_over_changing_tokens_is_refused() -> None:
    attention = with_seeded_weights(Attention(8))
    tokens = torch.rand(4, 16, 8)

    ran: list[bool] = []

    def windows(x: Tensor) -> Tensor:
        logits = attention(tokens.view(16, 4, 8)).view(4, -1)
        ran.append(True)  # an error in here would look like one of the user's step
        return logits

    with pytest.raises(ValueError, match=r"attention of shape \(16, 4, 4\) for 4 inputs: it runs in windows"):
        attention_rollout(windows, PICTURES, TARGET)
    assert ran

    def merging(x: Tensor) -> Tensor:
        return attention(attention(tokens)[:, ::2]).flatten(1)

    with pytest.raises(ValueError, match="the number of tokens changes from 16 to 8"):
        attention_rollout(merging, PICTURES, TARGET)


def test_tokens_that_are_not_those_of_the_input_are_refused() -> None:
    block = with_seeded_weights(Block(8))
    with pytest.raises(ValueError, match="attention runs over 15 tokens, which are neither a grid of patches"):
        attention_rollout(lambda x: block(torch.rand(4, 15, 8)).flatten(1), PICTURES, TARGET)
    with pytest.raises(ValueError, match=r"over 9 tokens, .* nor the features of inputs \(4, 6\)"):
        attention_rollout(lambda x: block(torch.rand(4, 9, 8)).flatten(1), TABLE, TARGET)
    with pytest.raises(ValueError, match="must be 'first' or 'last', got 'front'"):
        attention_rollout(block, TABLE, TARGET, class_token="front")  # type: ignore[arg-type]  # what is wrong


class Across(nn.Module):
    """Learnt queries that gather from as many features; self-attention behind it, if wanted."""

    def __init__(self, more: bool) -> None:
        super().__init__()
        self.enter, self.queries = nn.Linear(1, 8), nn.Parameter(torch.randn(1, 6, 8))
        self.across = nn.MultiheadAttention(8, 2, batch_first=True)
        self.own = nn.MultiheadAttention(8, 2, batch_first=True) if more else None
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.enter(x[..., None])
        if self.own is not None:
            tokens = tokens + self.own(tokens, tokens, tokens)[0]
        return self.head(self.across(self.queries.expand(len(x), -1, -1), tokens, tokens)[0].mean(1))


def test_attention_to_another_sequence_of_the_same_length_is_left_out() -> None:
    table, target = torch.rand(2, 6), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"no self-attention was seen: .*from one sequence to another"):
        attention_rollout(Across(more=False), table, target)
    net = Across(more=True).eval()
    tokens = net.enter(table[..., None])
    expected = rolled([net.own(tokens, tokens, tokens)[1]]).mean(1)
    torch.testing.assert_close(attention_rollout(net, table, target), expected)
