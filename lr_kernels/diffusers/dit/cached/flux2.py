"""Flux.2 klein with cached references: its joint attention reads the references' keys where they lie.

The stock processors of `Flux2KleinKVPipeline` write the references' keys and values to a cache in the first step, and
copy them between those of text and image in every layer of every other step. Here they are a source of their own: the
softmax does not depend on the order of its keys.
"""

import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2KVAttnProcessor,
    Flux2KVLayerCache,
    Flux2KVParallelSelfAttnProcessor,
    Flux2ParallelSelfAttention,
)
from torch import Tensor

from ....attention.api import multi_source_attention
from ....attention.plan import plan_attention
from ....source import Source
from ...processors.joint import Tokens, flux2_stream, flux_tokens, rotated, rotated_apart, whole_tokens
from ...processors.ulysses import refuse_context_parallelism, ulysses_of
from ...processors.unet import OwnProcessor, refuse_mask
from .references import ReadsReferences

_READER, _REFERENCE = 1, 2
"""Bits of the groups in the pass that fills the cache: references read references alone; text and image read all."""

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the tokens' positions, (N, D) each"""


class _Flux2References(ReadsReferences):
    """What the processors of double and single blocks share."""

    def read(self, tokens: list[Tokens], kv_cache: Flux2KVLayerCache | None) -> Tensor:
        """The attention of all tokens (B, N, H, D), which also read the references of the bank or of the cache."""
        reference = self.reference
        if reference is None:
            assert kv_cache is not None  # as `mode` says
            reference = Source(*kv_cache.get())
        ulysses = ulysses_of(self)
        if ulysses is not None:
            tokens, reference = whole_tokens(ulysses, tokens), ulysses.heads_of(reference)
        out = multi_source_attention(_queries(tokens), [*(Source(x.key, x.value) for x in tokens), reference])
        if ulysses is None:
            return out
        return torch.cat(ulysses.scattered(out.split([x.query.shape[1] for x in tokens], 1)), 1)

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

    def mode(self, kv_cache: Flux2KVLayerCache | None, mode: str | None, count: int) -> str | None:
        """What the layer does: "extract", "cached", or None, what stock does. NotImplementedError for context
        parallelism in a pass that fills the cache: each card would have a part of the references."""
        if self.reference is not None:
            self.refuse_cache(mode)
            return "cached"
        if mode == "extract" and count > 0:
            refuse_context_parallelism(self)
            return "extract"
        return "cached" if mode == "cached" and kv_cache is not None else None


def _queries(tokens: list[Tokens]) -> Tensor:
    return torch.cat([x.query for x in tokens], 1) if len(tokens) > 1 else tokens[0].query


class MultiSourceFlux2KVAttnProcessor(_Flux2References, OwnProcessor, Flux2KVAttnProcessor):
    """Joint attention of Flux.2 klein's double blocks with references as a source of their own.

    It is stock, bit for bit, in passes without references, and equal to stock to rounding in those that fill the
    model's cache or read it. Where `reference` is set, a bank's keys are read and the model needs no cache.

    Raises:
        NotImplementedError: in passes with references, an attention mask or context parallelism, but for Ulysses in
            those that read them; a pass that fills the model's cache while a bank is read.
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
        ulysses_of(self, attn.heads)
        text, image = flux_tokens(attn, hidden_states, encoder_hidden_states)
        unrotated = image.key
        text, image = rotated_apart(text, image, image_rotary_emb)
        tokens = [image] if text is None else [text, image]
        if mode == "extract":
            out = self.fill(tokens, unrotated, slice(0, num_ref_tokens), kv_cache)
        else:
            out = self.read(tokens, kv_cache)
        out, start = out.flatten(2).to(image.query.dtype), 0 if text is None else text.query.shape[1]
        found = attn.to_out[1](attn.to_out[0](out[:, start:]))
        return found if text is None else (found, attn.to_add_out(out[:, :start]))


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
        ulysses_of(self, attn.heads)
        tokens, feed_forward = flux2_stream(attn, hidden_states)
        unrotated = tokens.key
        tokens = rotated(tokens, image_rotary_emb)
        if mode == "extract":
            part = slice(num_txt_tokens, num_txt_tokens + num_ref_tokens)
            out = self.fill([tokens], unrotated, part, kv_cache)
        else:
            out = self.read([tokens], kv_cache)
        out = out.flatten(2).to(tokens.query.dtype)
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(feed_forward)], -1))


REPLACES = {
    Flux2KVAttnProcessor: MultiSourceFlux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor: MultiSourceFlux2KVParallelSelfAttnProcessor,
}
"""Stock processors, and those that read references in place."""
