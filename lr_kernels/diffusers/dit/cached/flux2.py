"""Flux.2 klein with cached references: its joint attention reads the references' keys where they lie.

The stock processors of `Flux2KleinKVPipeline` write the references' keys and values to a cache in the first step, and
copy them between those of text and image in every layer of every other step. Here they are a source of their own: the
softmax does not depend on the order of its keys.
"""

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2KVAttnProcessor,
    Flux2KVLayerCache,
    Flux2KVParallelSelfAttnProcessor,
    Flux2ParallelSelfAttention,
)
from torch import Tensor, nn

from ....attention.api import multi_source_attention
from ....attention.plan import plan_attention
from ....source import Source
from ...processors.joint import Tokens
from ...processors.unet import OwnProcessor, refuse_context_parallelism, refuse_mask
from .references import ReadsReferences

_READER, _REFERENCE = 1, 2
"""Bits of the groups in the pass that fills the cache: references read references alone; text and image read all."""

Rotary = tuple[Tensor, ...]
"""Cosines and sines of the tokens' positions, (N, D) each"""


class _Flux2References(ReadsReferences):
    """What the processors of double and single blocks share."""

    def read(self, tokens: list[Tokens], kv_cache: Flux2KVLayerCache | None) -> Tensor:
        """The attention of all tokens (B, N, H, D), which also read the references of the bank or of the cache."""
        reference = self.reference
        if reference is None:
            assert kv_cache is not None  # as `mode` says
            reference = Source(*kv_cache.get())
        return multi_source_attention(_queries(tokens), [*(Source(x.key, x.value) for x in tokens), reference])

    def fill(self, tokens: list[Tokens], unrotated: Tensor, part: slice, kv_cache: Flux2KVLayerCache | None) -> Tensor:
        """The attention of all tokens (B, N, H, D) in the pass that keeps the references' keys in the cache.

        Args:
            tokens: of the text and of the image, or of both in one stream. unrotated: the keys of the last of `tokens`
                before RoPE. part: where in the last of `tokens` the references lie.
        """
        query, stream = _queries(tokens), tokens[-1]
        if kv_cache is not None:
            kept = unrotated if self.keeps_unrotated else stream.key
            kv_cache.store(kept[:, part].clone(), stream.value[:, part].clone())
        before = query.shape[1] - stream.key.shape[1]
        groups = query.new_full((1, query.shape[1]), _READER, dtype=torch.uint8)
        seen_by = groups.clone()
        groups[:, before + part.start : before + part.stop] = _REFERENCE
        seen_by[:, before + part.start : before + part.stop] = _READER | _REFERENCE
        of_sources = seen_by.split([x.key.shape[1] for x in tokens], 1)
        plan = plan_attention([None] * len(tokens), of_sources, groups, query_classes=(_READER, _REFERENCE))
        sources = [Source(x.key, x.value, key_groups=seen) for x, seen in zip(tokens, of_sources)]
        return multi_source_attention(query, sources, query_groups=groups, plan=plan)

    def attend(
        self,
        tokens: list[Tokens],
        unrotated: Tensor,
        part: slice,
        kv_cache: Flux2KVLayerCache | None,
        mode: str,
    ) -> Tensor:
        """`fill` or `read`."""
        return self.fill(tokens, unrotated, part, kv_cache) if mode == "extract" else self.read(tokens, kv_cache)

    def mode(self, kv_cache: Flux2KVLayerCache | None, mode: str | None, count: int) -> str | None:
        """What the layer does: "extract", "cached", or None, what stock does."""
        if self.reference is not None:
            self.refuse_cache(mode)
            return "cached"
        if mode == "extract":
            return "extract" if count > 0 else None
        return "cached" if mode == "cached" and kv_cache is not None else None


def _queries(tokens: list[Tokens]) -> Tensor:
    return torch.cat([x.query for x in tokens], 1) if len(tokens) > 1 else tokens[0].query


def _tokens(
    projected: tuple[Tensor, ...], head_dim: int, norms: tuple[nn.Module, nn.Module], rotary: Rotary | None
) -> tuple[Tokens, Tensor]:
    """Tokens of projected queries, keys and values (B, N, H * D), and their keys before RoPE."""
    query, key, value = (x.unflatten(-1, (-1, head_dim)) for x in projected)
    query, key = norms[0](query), norms[1](key)
    unrotated = key
    if rotary is not None:
        query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))
    return Tokens(query, key, value), unrotated


class MultiSourceFlux2KVAttnProcessor(_Flux2References, OwnProcessor, Flux2KVAttnProcessor):
    """Joint attention of Flux.2 klein's double blocks with references as a source of their own.

    It is stock, bit for bit, in passes without references, and equal to stock to rounding in those that fill the
    model's cache or read it. Where `reference` is set, a bank's keys are read and the model needs no cache.

    Raises:
        NotImplementedError: in passes with references, an attention mask or context parallelism; a pass that fills the
            model's cache while a bank is read.
    """

    def __call__(
        self,
        attn: Flux2Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        kv_cache: Flux2KVLayerCache | None = None,
        kv_cache_mode: str | None = None,
        num_ref_tokens: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As diffusers calls it: the attended tokens of the image, and of the text where it is apart."""
        mode = self.mode(kv_cache, kv_cache_mode, num_ref_tokens)
        if mode is None:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb,
                kv_cache, kv_cache_mode, num_ref_tokens,
            )  # fmt: skip
        if attention_mask is not None:
            refuse_mask(type(self).__name__)
        refuse_context_parallelism(self)
        fused = attn.fused_projections
        tokens, start = [], 0
        if encoder_hidden_states is not None and attn.added_kv_proj_dim is not None:
            start = encoder_hidden_states.shape[1]
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            projected = _projected(encoder_hidden_states, attn.to_added_qkv if fused else None, added)
            rotary = None if image_rotary_emb is None else tuple(x[:start] for x in image_rotary_emb)
            tokens.append(_tokens(projected, attn.head_dim, (attn.norm_added_q, attn.norm_added_k), rotary)[0])
        projected = _projected(hidden_states, attn.to_qkv if fused else None, (attn.to_q, attn.to_k, attn.to_v))
        rotary = None if image_rotary_emb is None else tuple(x[start:] for x in image_rotary_emb)
        image, unrotated = _tokens(projected, attn.head_dim, (attn.norm_q, attn.norm_k), rotary)
        out = self.attend([*tokens, image], unrotated, slice(0, num_ref_tokens), kv_cache, mode)
        out = out.flatten(2).to(image.query.dtype)
        found = attn.to_out[1](attn.to_out[0](out[:, start:]))
        return (found, attn.to_add_out(out[:, :start])) if encoder_hidden_states is not None else found


def _projected(x: Tensor, fused: nn.Module | None, apart: tuple[nn.Module, nn.Module, nn.Module]) -> tuple[Tensor, ...]:
    """Queries, keys and values of hidden states (B, N, channels), by one fused projection or by three."""
    return fused(x).chunk(3, -1) if fused is not None else tuple(project(x) for project in apart)


class MultiSourceFlux2KVParallelSelfAttnProcessor(_Flux2References, OwnProcessor, Flux2KVParallelSelfAttnProcessor):
    """As `MultiSourceFlux2KVAttnProcessor`, for the single blocks, where text and image tokens are one stream."""

    def __call__(
        self,
        attn: Flux2ParallelSelfAttention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        kv_cache: Flux2KVLayerCache | None = None,
        kv_cache_mode: str | None = None,
        num_txt_tokens: int = 0,
        num_ref_tokens: int = 0,
    ) -> Tensor:
        """As diffusers calls it: the block's attended tokens with its feed-forward part."""
        mode = self.mode(kv_cache, kv_cache_mode, num_ref_tokens)
        if mode is None:
            return super().__call__(
                attn, hidden_states, attention_mask, image_rotary_emb, kv_cache, kv_cache_mode,
                num_txt_tokens, num_ref_tokens,
            )  # fmt: skip
        if attention_mask is not None:
            refuse_mask(type(self).__name__)
        refuse_context_parallelism(self)
        projected = attn.to_qkv_mlp_proj(hidden_states)
        whole = 3 * attn.inner_dim + attn.mlp_hidden_dim * attn.mlp_mult_factor
        here = projected.shape[-1] * 3 * attn.inner_dim // whole  # a rank of tensor parallelism has a share of both
        attended, feed_forward = projected.split([here, projected.shape[-1] - here], -1)
        norms = (attn.norm_q, attn.norm_k)
        tokens, unrotated = _tokens(attended.chunk(3, -1), attn.head_dim, norms, image_rotary_emb)
        part = slice(num_txt_tokens, num_txt_tokens + num_ref_tokens)
        out = self.attend([tokens], unrotated, part, kv_cache, mode)
        out = out.flatten(2).to(tokens.query.dtype)
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(feed_forward)], -1))


REPLACES = {
    Flux2KVAttnProcessor: MultiSourceFlux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor: MultiSourceFlux2KVParallelSelfAttnProcessor,
}
"""Stock processors, and those that read references in place."""
