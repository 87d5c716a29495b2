"""Joint attention over text and image tokens (Flux, SD3) by a function of your own; text and image are two sources."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import (
    Attention,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from torch import Tensor, nn

from ...attention.api import multi_source_attention
from ...runtime.checks import fail
from ...source import Source
from .unet import OwnProcessor, refuse_mask

JOINT_PROCESSORS = (FluxAttnProcessor, FluxIPAdapterAttnProcessor, JointAttnProcessor2_0, FusedJointAttnProcessor2_0,
                     SD3IPAdapterJointAttnProcessor2_0)  # fmt: skip


def joint_attention_layers(model: nn.Module) -> dict[str, Attention | FluxAttention]:
    """The layers of a model that have Flux's or SD3's processor, their IP-Adapter's and fused ones included, by name.

    Raises:
        ValueError: a model without such layers.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the module and renames its children
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Attention | FluxAttention) and isinstance(module.processor, JOINT_PROCESSORS)
    }
    if not layers:
        fail("joint_attention_layers", "model", "one with Flux's or SD3's attention", type(model).__name__)
    return layers


class Tokens(NamedTuple):
    """Queries, keys and values of one kind of tokens, (B, N, H, D) each: normalized, positions applied."""

    query: Tensor
    key: Tensor
    value: Tensor


JointAttention = Callable[[Tokens | None, Tokens], tuple[Tensor | None, Tensor]]
"""(text or None where a layer has the tokens of both in one stream, image) -> (result for text or None, for image)"""


def joint_attention(text: Tokens | None, image: Tokens) -> tuple[Tensor | None, Tensor]:
    """The attention of the stock models: all queries attend to the text's and the image's keys."""
    if text is None:
        return None, multi_source_attention(image.query, [Source(image.key, image.value)])
    sources = [Source(text.key, text.value), Source(image.key, image.value)]
    out = multi_source_attention(torch.cat([text.query, image.query], 1), sources)
    of_text, of_image = out.split([text.query.shape[1], image.query.shape[1]], 1)
    return of_text, of_image


def shared_joint_attention(
    text: Tokens | None, image: Tokens, rows: Tensor, strength: Tensor | None = None, text_tokens: int = 0
) -> tuple[Tensor | None, Tensor]:
    """Image queries also read the image keys of another row: shared attention, as StyleAligned's, in a DiT.

    Args:
        rows: int32 (B,): the row that each row reads besides its own, -1: none.
        strength: logits of the other row get this added, () or (B,).
        text_tokens: where text and image are one stream, as in Flux's single blocks: how many of the first tokens are
            text. They are not shared, and read what they read anyway.
    """
    if text is not None:
        own = [Source(text.key, text.value), Source(image.key, image.value)]
        read = multi_source_attention(text.query, own)
        shared = Source(image.key, image.value, rows, logit_bias=strength)
        return read, multi_source_attention(image.query, [*own, shared])
    key, value = (x[:, text_tokens:] for x in (image.key, image.value))
    own = [Source(image.key, image.value)]
    queries = image.query.split([text_tokens, image.query.shape[1] - text_tokens], 1)
    shared = Source(key, value, rows, logit_bias=strength)
    parts = [multi_source_attention(queries[0], own), multi_source_attention(queries[1], [*own, shared])]
    return None, torch.cat(parts, 1)


def _refuse_adapter(processor: str, **arguments: object) -> None:
    """NotImplementedError for an IP-Adapter's arguments. diffusers hands them to processors whose signature names them
    and silently drops them otherwise, so the processors name them and refuse them here."""
    for name, x in arguments.items():
        if x is not None:
            hint = "unload_ip_adapter(), or make the processor inactive"
            fail(processor, name, "None while the processor is active", "an IP-Adapter's", hint, NotImplementedError)


def _of_text(processor: str, found: Tensor | None) -> Tensor:
    """The result for the text, where there is one."""
    if found is None:
        fail(processor, "attention", "a result for the text beside that for the image", None, error=TypeError)
    return found


class CustomFluxAttnProcessor(OwnProcessor, FluxAttnProcessor):
    """Flux's joint attention by `attention`; None: diffusers' own processor, bit for bit.

    Raises:
        NotImplementedError: while active, an attention mask, an IP-Adapter's arguments, fused projections.
    """

    def __init__(self, attention: JointAttention | None = None):
        super().__init__()
        self.attention = attention

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ip_hidden_states: list[Tensor] | None = None,
        ip_adapter_masks: list[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As diffusers calls it: the attended tokens of the image, and of the text where it is apart."""
        if self.attention is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        _refuse_adapter(type(self).__name__, ip_hidden_states=ip_hidden_states, ip_adapter_masks=ip_adapter_masks)
        if attention_mask is not None:
            refuse_mask(type(self).__name__)
        if getattr(attn, "fused_projections", False):
            fail(type(self).__name__, "attn", "separate projections", "fused ones", "call unfuse_qkv_projections()",
                 NotImplementedError)  # fmt: skip

        def tokens(
            x: Tensor, projections: tuple[nn.Module, ...], norms: tuple[nn.Module, ...], rotary: tuple | None
        ) -> Tokens:
            query, key, value = (project(x).unflatten(-1, (-1, attn.head_dim)) for project in projections)
            query, key = (norm(y) for norm, y in zip(norms, (query, key)))
            if rotary is not None:
                query, key = (apply_rotary_emb(y, rotary, sequence_dim=1) for y in (query, key))
            return Tokens(query, key, value)

        text, start = None, 0
        if encoder_hidden_states is not None:
            start = encoder_hidden_states.shape[1]
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            rotary = None if image_rotary_emb is None else tuple(x[:start] for x in image_rotary_emb)
            text = tokens(encoder_hidden_states, projections, (attn.norm_added_q, attn.norm_added_k), rotary)
        rotary = None if image_rotary_emb is None else tuple(x[start:] for x in image_rotary_emb)
        image = tokens(hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), rotary)
        text_out, out = self.attention(text, image)
        out = out.flatten(2).to(image.query.dtype)
        if text is None:
            return out
        out = attn.to_out[1](attn.to_out[0](out))
        return out, attn.to_add_out(_of_text(type(self).__name__, text_out).flatten(2).to(text.query.dtype))


class CustomSD3AttnProcessor(OwnProcessor, JointAttnProcessor2_0):
    """SD3's joint attention by `attention`; None: diffusers' own processor, bit for bit.

    Raises:
        NotImplementedError: while active, an attention mask, an IP-Adapter's arguments.
    """

    def __init__(self, attention: JointAttention | None = None):
        super().__init__()
        self.attention = attention

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        ip_hidden_states: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As diffusers calls it: the attended tokens of the image, and of the text where it is apart."""
        if self.attention is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        _refuse_adapter(type(self).__name__, ip_hidden_states=ip_hidden_states)
        if attention_mask is not None:
            refuse_mask(type(self).__name__)

        def tokens(x: Tensor, projections: tuple[nn.Module, ...], norms: tuple[nn.Module | None, ...]) -> Tokens:
            query, key, value = (project(x).unflatten(-1, (attn.heads, -1)) for project in projections)
            query, key = (y if norm is None else norm(y) for norm, y in zip(norms, (query, key)))
            return Tokens(query, key, value)

        text = None
        if encoder_hidden_states is not None:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = tokens(encoder_hidden_states, projections, (attn.norm_added_q, attn.norm_added_k))
        image = tokens(hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        text_out, out = self.attention(text, image)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2).to(image.query.dtype)))
        if text is None:
            return out
        text_out = _of_text(type(self).__name__, text_out).flatten(2).to(text.query.dtype)
        return out, text_out if attn.context_pre_only else attn.to_add_out(text_out)
