"""GLM-Image with condition images: its attention reads each sample's cached keys where they lie.

The stock processor expands the cached keys and values to the batch, joins those of all samples, and copies them before
the layer's own in every layer and step. Here each sample is a source, with a row table that says which rows read it.
"""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_glm_image import GlmImageAttnProcessor, GlmImageLayerKVCache
from torch import Tensor

from ....attention.api import multi_source_attention
from ....runtime.checks import fail
from ....runtime.schemas import MAX_SOURCES
from ....source import Source
from ...processors.ulysses import refuse_context_parallelism
from ...processors.unet import OwnProcessor

_SAMPLES = MAX_SOURCES - 1
"""The cached samples of one call of the operator, beside the rows' own keys."""


class MultiSourceGlmImageAttnProcessor(OwnProcessor, GlmImageAttnProcessor):
    """GLM-Image's attention with the cached condition images as sources of their own.

    It is stock, bit for bit, in passes that write the model's cache, skip it or have none, and equal to stock to
    rounding in those that read it. The cached samples may differ in their numbers of tokens, which stock refuses.

    Raises:
        ValueError: in passes that read the cache, a batch that is no multiple of the cached samples; cached keys of
            more than one row each.
        NotImplementedError: in these passes, an attention mask (stock's has the shape of the layer's own tokens and
            does not fit the longer keys either) or context parallelism.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache: GlmImageLayerKVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As diffusers calls it: the attended tokens of the image and of the text."""
        if self.is_stock or kv_cache is None or kv_cache.mode != "read" or not kv_cache.k_caches:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, kv_cache
            )
        self._refuse(attention_mask)
        text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], 1)
        query, key, value = (
            project(tokens).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query).to(encoder_hidden_states.dtype)
        if attn.norm_k is not None:
            key = attn.norm_k(key).to(encoder_hidden_states.dtype)
        if image_rotary_emb is not None:
            for x in (query, key):  # in place: these are the layer's own tensors, and the text's positions stay
                image = x[:, text:]
                image.copy_(apply_rotary_emb(image, image_rotary_emb, sequence_dim=1, use_real_unbind_dim=-2))
        out = read_samples(query, Source(key, value), kv_cache.k_caches, kv_cache.v_caches)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2)))
        return out[:, text:], out[:, :text]

    def _refuse(self, attention_mask: Tensor | None) -> None:
        op = type(self).__name__
        if attention_mask is not None:
            hint = "leave the mask out, as GlmImagePipeline does"
            fail(op, "attention_mask", "None in passes that read the cache", "a tensor", hint, NotImplementedError)
        refuse_context_parallelism(self)


def read_samples(query: Tensor, own: Source, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Attention of `query` (B, N, H, D) to its own keys and to those of its sample, (B, N, H, D).

    Args:
        keys, values: of S samples, (1, tokens, H, D) each. One is read by all rows; of several, sample i by the rows
            i * B / S to (i + 1) * B / S, as `num_images_per_prompt` orders them.

    Raises:
        ValueError: B is no multiple of S; keys of more than one row.
    """
    op, batch, samples = "MultiSourceGlmImageAttnProcessor", query.shape[0], len(keys)
    if samples == 1:
        return multi_source_attention(query, [Source(keys[0], values[0]), own])
    if batch % samples:
        hint = "write one sample for all rows, or one for each prompt"
        fail(op, "kv_cache", "cached samples that divide the batch", f"{samples} for a batch of {batch}", hint)
    for x in keys:
        if x.shape[0] != 1:
            fail(op, "kv_cache", "one row of each sample", x.shape[0], "write the samples one by one")
    each = batch // samples
    parts = []
    for first in range(0, samples, _SAMPLES):
        held = slice(first, first + _SAMPLES)
        rows = slice(first * each, (first + _SAMPLES) * each)
        queries = query[rows]
        sample = torch.arange(queries.shape[0], device=query.device) // each
        sources = [Source(own.key[rows], own.value[rows])]
        for i, (key, value) in enumerate(zip(keys[held], values[held])):
            sources.append(Source(key, value, (sample != i).int().neg()))  # row 0 where the sample is i, else none
        parts.append(multi_source_attention(queries, sources))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


REPLACES = {GlmImageAttnProcessor: MultiSourceGlmImageAttnProcessor}
"""Stock processors, and those that read references in place."""
