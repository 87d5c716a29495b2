"""Qwen-Image 2.1 with its cached prefix: the target reads the keys of text and condition images where they lie.

The stock processors copy the prefix's keys and values before the target's own in every layer and step. Here the prefix
is a source of its own.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21Attention,
    QwenImage21AttnProcessor,
    QwenImage21FlexAttnProcessor,
    QwenImage21KVLayerCache,
    apply_rotary_emb_qwen,
)
from torch import Tensor
from torch.nn import functional as F

from ....attention.api import multi_source_attention
from ....runtime.checks import fail
from ....source import Source
from ...processors.ulysses import refuse_context_parallelism
from ...processors.unet import OwnProcessor


class _ReadsPrefix:
    """What both processors share: the pass that reads the model's cache."""

    def read(
        self,
        attn: QwenImage21Attention,
        hidden_states: Tensor,
        attention_mask: Any | None,
        rotary_emb: Tensor | None,
        layer_cache: QwenImage21KVLayerCache,
    ) -> Tensor:
        """The attended tokens of the target, (B, N, channels) as its hidden states."""
        refuse_context_parallelism(self)
        query, own = _tokens(attn, hidden_states, rotary_emb)
        out = read_prefix(query, own, Source(*layer_cache.get()), attention_mask)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


def _tokens(attn: QwenImage21Attention, hidden_states: Tensor, rotary_emb: Tensor | None) -> tuple[Tensor, Source]:
    """Queries (B, N, H, D), and the keys and values of the same tokens."""
    head_dim = attn.inner_dim // attn.heads  # under tensor parallelism a rank holds some of the heads
    query, key, value = (
        project(hidden_states).unflatten(-1, (-1, head_dim)) for project in (attn.to_q, attn.to_k, attn.to_v)
    )
    query, key = attn.norm_q(query).to(value.dtype), attn.norm_k(key).to(value.dtype)
    if rotary_emb is not None:
        query, key = (apply_rotary_emb_qwen(x, rotary_emb, use_real=False) for x in (query, key))
    return query, Source(key, value)


class MultiSourceQwenImage21AttnProcessor(_ReadsPrefix, OwnProcessor, QwenImage21AttnProcessor):
    """Qwen-Image 2.1's attention with the cached prefix as a source of its own.

    Passes with the model's cache are equal to stock to rounding. `kv_cache_mode="cached"` reads it: the padding mask
    over prefix and target becomes the key masks of the two sources. `"extract"` fills it, with what stock puts there,
    and is causal: each image of the prefix, and the target, reads all keys up to its end, by one call of
    `multi_source_attention` over slices; each text does the same by PyTorch's attention, with a mask for the triangle
    of its own keys. Passes without a cache are stock, bit for bit.

    Raises:
        NotImplementedError: in passes with a cache, context parallelism; in those that read it, an attention mask that
            is not one per key.
    """

    def __call__(
        self,
        attn: QwenImage21Attention,
        hidden_states: Tensor,
        attention_mask: Any | None = None,
        rotary_emb: Tensor | None = None,
        layer_cache: QwenImage21KVLayerCache | None = None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: Tensor | None = None,
    ) -> Tensor:
        """As diffusers calls it: the attended tokens, of the target alone where the prefix is cached."""
        if self.is_stock or layer_cache is None or kv_cache_mode not in ("extract", "cached"):
            return super().__call__(
                attn, hidden_states, attention_mask, rotary_emb, layer_cache, kv_cache_mode, cache_write_slice,
                segments, key_valid,
            )  # fmt: skip
        if kv_cache_mode == "cached":
            return self.read(attn, hidden_states, attention_mask, rotary_emb, layer_cache)
        refuse_context_parallelism(self)
        assert segments is not None and cache_write_slice is not None
        query, own = _tokens(attn, hidden_states, rotary_emb)
        layer_cache.store(own.key[:, cache_write_slice].clone(), own.value[:, cache_write_slice].clone())
        out = block_causal(query, own, segments, key_valid)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class MultiSourceQwenImage21FlexAttnProcessor(_ReadsPrefix, OwnProcessor, QwenImage21FlexAttnProcessor):
    """As `MultiSourceQwenImage21AttnProcessor` in passes that read the model's cache. The pass that fills it is stock,
    bit for bit: one call of PyTorch's flex attention."""

    def __call__(
        self,
        attn: QwenImage21Attention,
        hidden_states: Tensor,
        attention_mask: Any | None = None,
        rotary_emb: Tensor | None = None,
        layer_cache: QwenImage21KVLayerCache | None = None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: Tensor | None = None,
    ) -> Tensor:
        """As diffusers calls it: the attended tokens, of the target alone where the prefix is cached."""
        if self.is_stock or layer_cache is None or kv_cache_mode != "cached":
            return super().__call__(
                attn, hidden_states, attention_mask, rotary_emb, layer_cache, kv_cache_mode, cache_write_slice,
                segments, key_valid,
            )  # fmt: skip
        return self.read(attn, hidden_states, attention_mask, rotary_emb, layer_cache)


def read_prefix(query: Tensor, own: Source, prefix: Source, mask: Tensor | None = None) -> Tensor:
    """Attention of `query` (B, N, H, D) to a cached prefix and to its own keys, (B, N, H, D).

    Args:
        mask: bool (B, 1, 1, M), the keys of the prefix and then its own that may be read. None: all.

    Raises:
        NotImplementedError: another mask.
    """
    if mask is not None:
        keys = prefix.key.shape[1] + own.key.shape[1]
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1:] != (1, 1, keys):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            fail("MultiSourceQwenImage21AttnProcessor", "attention_mask", f"one per key, (B, 1, 1, {keys})", got,
                 "the model makes it of encoder_hidden_states_mask", NotImplementedError)  # fmt: skip
        ends = mask[:, 0, 0].split([prefix.key.shape[1], own.key.shape[1]], 1)
        prefix, own = (source._replace(key_mask=part) for source, part in zip((prefix, own), ends))
    return multi_source_attention(query, [prefix, own])


def block_causal(
    query: Tensor, own: Source, segments: list[tuple[int, int, bool]], key_valid: Tensor | None = None
) -> Tensor:
    """Attention of text, images and target in one sequence, each to all keys up to its own end, (B, N, H, D).

    Args:
        query: (B, N, H, D). own: keys and values of the same tokens.
        segments: (start, end, whether it is text) of the parts of the prefix; what follows them is the target. Text is
            causal within itself, an image is not.
        key_valid: bool (B, N), False for padded text, which no query reads.
    """
    tokens = query.shape[1]
    target = segments[-1][1] if segments else 0
    outs = []
    for start, end, is_text in (*segments, (target, tokens, False)):
        queries, key, value = query[:, start:end], own.key[:, :end], own.value[:, :end]
        mask = None if key_valid is None else key_valid[:, :end]
        if not is_text:
            outs.append(multi_source_attention(queries, [Source(key, value, key_mask=mask)]))
            continue
        seen = torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril(start)
        seen = seen[None, None] if mask is None else seen & mask[:, None, None]
        queries, key, value = (x.transpose(1, 2) for x in (queries, key, value))
        outs.append(F.scaled_dot_product_attention(queries, key, value, seen).transpose(1, 2))
    return torch.cat(outs, 1)


REPLACES = {
    QwenImage21AttnProcessor: MultiSourceQwenImage21AttnProcessor,
    QwenImage21FlexAttnProcessor: MultiSourceQwenImage21FlexAttnProcessor,
}
"""Stock processors, and those that read references in place."""
