"""Attention processors for UNets: self-attention over several images, and cross-attention that records token maps.

Both are diffusers' AttnProcessor2_0, bit for bit, until their shared state asks for more.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F

from ..checks import fail
from ..token_maps import attention_with_token_maps
from .routing import KeyValue, Routing, Swap


@dataclass
class AttentionState:
    """What the processors of one UNet do in its next forward passes; one object, shared by them all."""

    sharing: bool = False
    """self-attention reads other rows, as `routings` says"""
    routings: dict[int, Routing | Swap] = field(default_factory=dict)
    """per number of tokens: built once for a mask, shared by all layers and steps"""
    capturing: bool = False
    """cross-attention keeps the maps of `token_indices`, self-attention its queries and keys where `captures` is set"""
    token_indices: Tensor | None = None
    """int32 (B, T), B rows of the UNet's batch"""
    backend: str = "auto"


class _OwnProcessor:
    """Base of this package's processors: made without arguments, each is diffusers' own, bit for bit."""

    is_stock = False
    """made so by `make_stock`, for good"""

    def make_stock(self) -> None:
        """Become what the class makes without arguments."""
        vars(self).update(vars(type(self)()))
        self.is_stock = True


class _StockAttnProcessor(_OwnProcessor):
    """AttnProcessor2_0 with its attention call as a method, `attend`, for subclasses to replace."""

    captures = False
    """whether it keeps what `captured` says while `state.capturing` is set"""

    def __init__(self, state: AttentionState | None = None):
        self.state = AttentionState() if state is None else state
        self.captured: tuple[Tensor, Tensor] | None = None
        """queries and keys (B, N, H, D) of the last pass of a self-attention layer"""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        is_cross = encoder_hidden_states is not None
        batch, keys, _ = (encoder_hidden_states if is_cross else hidden_states).shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, keys, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query = attn.to_q(hidden_states)
        if not is_cross:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        head_dim = key.shape[-1] // attn.heads
        query, key, value = (x.view(batch, -1, attn.heads, head_dim).transpose(1, 2) for x in (query, key, value))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        if self.captures and self.state.capturing and not is_cross:
            self.captured = query.transpose(1, 2), key.transpose(1, 2)
        hidden_states = self.attend(query, key, value, attention_mask, is_cross)

        hidden_states = hidden_states.transpose(1, 2).reshape(batch, -1, attn.heads * head_dim).to(query.dtype)
        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)
        if image_shape is not None:
            hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, is_cross: bool
    ) -> Tensor:
        """(B, H, N, D) x (B, H, M, D) -> (B, H, N, D)."""
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)


class CustomAttnProcessor(_StockAttnProcessor):
    """Self-attention by a function of your own, with everything around it as in AttnProcessor2_0.

    Args:
        attention: (query, key, value), each (B, N, H, D) with all rows of the UNet's batch -> (B, N, H, D); what it
            calls is usually `multi_source_attention` or one of `lr_kernels.presets`. None: AttnProcessor2_0's.

    Raises:
        NotImplementedError: an attention mask in a self-attention layer.
    """

    def __init__(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None):
        super().__init__()
        self.attention = attention

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, is_cross: bool
    ) -> Tensor:
        if is_cross or self.attention is None:
            return super().attend(query, key, value, attention_mask, is_cross)
        if attention_mask is not None:
            _refuse_mask(type(self).__name__)
        return self.attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


class Buffer(Protocol):
    """What a bank keeps of one layer."""

    def read(self, key: Tensor) -> KeyValue: ...


class MultiSourceAttnProcessor(_StockAttnProcessor):
    """Self-attention in which rows of the batch read other rows: the retouch stage of arXiv 2407.09779.

    While `state.sharing` is set, each layer makes one `multi_source_attention` call for all rows, with the routing of
    its number of tokens. Otherwise, and for cross-attention, it is AttnProcessor2_0.

    Args:
        state: shared by the processors of a UNet. Default: a new one, inactive.
        references: of this layer in a bank, where the references are not in the batch. contexts: likewise.
        tokens: of the layer by itself, to tell them from merged ones. None: not known.

    Raises:
        ValueError: no routing for the layer's number of tokens; a stale bank.
        NotImplementedError: an attention mask, or merged tokens, while sharing.
    """

    def __init__(
        self,
        state: AttentionState | None = None,
        references: Buffer | None = None,
        contexts: Buffer | None = None,
        tokens: int | None = None,
    ):
        super().__init__(state)
        self.references, self.contexts, self.tokens = references, contexts, tokens

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, is_cross: bool
    ) -> Tensor:
        if is_cross or not self.state.sharing:
            return super().attend(query, key, value, attention_mask, is_cross)
        if attention_mask is not None:
            _refuse_mask(type(self).__name__)
        tokens = query.shape[2]
        if self.tokens is not None and tokens != self.tokens:  # the number may be that of another layer's routing
            hint = "remove what merges tokens from the UNet, as tomesd.remove_patch() does"
            fail(type(self).__name__, "query", f"{self.tokens} tokens", tokens, hint, NotImplementedError)
        if tokens not in self.state.routings:
            fail(type(self).__name__, "state.routings", f"a routing for {tokens} tokens", sorted(self.state.routings))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        references, contexts = (None if x is None else x.read(key) for x in (self.references, self.contexts))
        routing = self.state.routings[tokens]
        return routing.attend(query, key, value, references, contexts, backend=self.state.backend).transpose(1, 2)


class TokenMapAttnProcessor(_StockAttnProcessor):
    """Cross-attention that keeps the head-mean maps of chosen text tokens.

    While `state.capturing` is set, `maps` holds those of the last forward pass: fp32 (B, N, T) for
    `state.token_indices`. Otherwise it is AttnProcessor2_0.

    Args:
        state: shared by the processors of a UNet. Default: a new one, inactive.

    Raises:
        NotImplementedError: an attention mask while capturing.
    """

    def __init__(self, state: AttentionState | None = None):
        super().__init__(state)
        self.maps: Tensor | None = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, is_cross: bool
    ) -> Tensor:
        if not (is_cross and self.state.capturing):
            return super().attend(query, key, value, attention_mask, is_cross)
        if attention_mask is not None:
            _refuse_mask(type(self).__name__)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out, self.maps = attention_with_token_maps(
            query, key, value, self.state.token_indices, backend=self.state.backend
        )
        return out.transpose(1, 2)


def _refuse_mask(processor: str) -> None:
    hint = "leave the mask out, or make the processor inactive"
    fail(processor, "attention_mask", "None while the processor is active", "a tensor", hint, NotImplementedError)
