"""Attention processors for UNets: self-attention over several images, and cross-attention that records token maps.

Both are diffusers' AttnProcessor2_0, bit for bit, until their shared state asks for more.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from inspect import Parameter, signature
from typing import Any, Protocol

from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F

from ...attention.token_maps import attention_with_token_maps
from ...runtime.checks import fail
from ...source import Source
from .routing import Routing, Swap
from .ulysses import refuse_context_parallelism

KeyValue = tuple[Tensor, Tensor]


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


class OwnProcessor:
    """Base of this package's processors: made without arguments, each is diffusers' own, bit for bit."""

    is_stock = False
    """whether `make_stock` has made this processor a stock one, which is final"""
    _parallel_config: Any = None
    """diffusers' ParallelConfig, which `enable_parallelism` sets on processors that have this attribute"""

    def stand_in_for(self, stock: Any) -> None:
        """Take over the attention backend and the parallelism of the processor whose place this one takes."""
        for name in ("_attention_backend", "_parallel_config"):
            if hasattr(stock, name):
                setattr(self, name, getattr(stock, name))

    def make_stock(self) -> None:
        """Become stock for good, as the class is without arguments."""
        vars(self).update(vars(type(self)()))
        self.is_stock = True


class StockAttnProcessor(OwnProcessor):
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
        """As diffusers calls it: the layer's output for its hidden states."""
        refuse_context_parallelism(self)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        is_cross = encoder_hidden_states is not None
        batch, keys, _ = (hidden_states if encoder_hidden_states is None else encoder_hidden_states).shape
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


@dataclass
class Pass:
    """The current pass of a UNet while `sharing` lasts; one object, shared by its processors."""

    active: bool = True
    """False: the layers are stock"""
    step: int | None = None
    """the number of the step, from 0; None: no function asks for it"""
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(rows, columns) of the tokens of each layer, by name"""


class CustomAttnProcessor(StockAttnProcessor):
    """Self- or cross-attention by a function of your own, with everything around it as in AttnProcessor2_0.

    The function gets (query, key, value), with all rows of the UNet's batch, and returns the result, (B, N, H, D) like
    the query; or None, where it only looks on and the layer goes on with its own attention. In self-attention key and
    value are (B, N, H, D) too, in cross-attention the text's (B, M, H, D). What it calls is usually
    `multi_source_attention` or one of `lr_kernels.presets`. It gets by keyword what it asks for by a parameter of that
    name, keyword-only or without a default:

        step: int, the number of the step, from 0        (these three from `sharing` alone)
        layer: str, the name of the layer
        grid: (rows, columns) of the layer's tokens
        key_bias: (B, M) to add to the logits, an attention mask, or None
        images: [(key, value), …] of every image of a loaded IP-Adapter, (B, tokens, H, D) each

    Args:
        attention: the function. None: AttnProcessor2_0's.
        layer, run, adapter: by `sharing`: the layer's name, the current pass, the IP-Adapter's processor that this one
            stands in for.

    Raises:
        ValueError: a function that asks for what only `sharing` knows, without it; or for images where there are none.
        TypeError: a result that is not like the query.
        NotImplementedError: an attention mask where the function does not ask for key_bias, or one per query; an
            IP-Adapter's images where it does not ask for them.
    """

    def __init__(
        self,
        attention: Callable[..., Tensor | None] | None = None,
        *,
        layer: str | None = None,
        run: Pass | None = None,
        adapter: IPAdapterAttnProcessor2_0 | None = None,
    ):
        super().__init__()
        self.attention, self.layer, self.adapter = attention, layer, adapter
        self.run = Pass() if run is None else run
        self.asks = () if attention is None else asked(attention)
        self.images: list[KeyValue] = []
        self._check_asked(run)

    def _check_asked(self, run: Pass | None) -> None:
        op, got = type(self).__name__, f"one that asks for {', '.join(self.asks) or 'nothing'}"
        if run is None and not {"step", "layer", "grid"}.isdisjoint(self.asks):
            fail(op, "attention", "a function that asks for key_bias at most", got, "install it by sharing()")
        if self.adapter is None and "images" in self.asks:
            hint = "load an IP-Adapter before sharing(), in cross-attention layers"
            fail(op, "attention", "a function that asks for no images, since there are none", got, hint)
        if self.adapter is not None and "images" not in self.asks:
            expected, hint = "a function that asks for images, since there is an IP-Adapter", "or unload_ip_adapter()"
            fail(op, "attention", expected, got, hint, NotImplementedError)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor]] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: list[Tensor] | None = None,
    ) -> Tensor:
        """As diffusers calls it, with what the function asks for held ready."""
        if self.adapter is not None and not self.run.active:
            given = (attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return self.adapter(*given, ip_adapter_masks=ip_adapter_masks)
        if ip_adapter_masks is not None:
            hint = "give the masks to the function"
            fail(type(self).__name__, "ip_adapter_masks", "None", "masks", hint, NotImplementedError)
        if isinstance(encoder_hidden_states, tuple):  # text, and what an IP-Adapter's encoder says of its images
            encoder_hidden_states, embeddings = encoder_hidden_states
            self.images = self._images_of(embeddings, attn.heads)
        try:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        finally:
            self.images = []

    def _images_of(self, embeddings: list[Tensor], heads: int) -> list[KeyValue]:
        """Keys and values of every image of every adapter, of embeddings (B, images, tokens, channels)."""
        if self.adapter is None:
            fail(type(self).__name__, "encoder_hidden_states", "the text alone", "image embeddings too",
                 "install it by sharing() while the IP-Adapter is loaded", NotImplementedError)  # fmt: skip
        found = []
        for to_key, to_value, given in zip(self.adapter.to_k_ip, self.adapter.to_v_ip, embeddings, strict=True):
            for image in given.unbind(1):
                found.append(tuple(project(image).unflatten(-1, (heads, -1)) for project in (to_key, to_value)))
        return found

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, is_cross: bool
    ) -> Tensor:
        """The function's result, which is checked; stock attention while it is off."""
        if self.attention is None or not self.run.active:
            return super().attend(query, key, value, attention_mask, is_cross)
        tokens_first = [x.transpose(1, 2) for x in (query, key, value)]
        known = {name: getattr(self, f"_{name}")(tokens_first[0], attention_mask) for name in self.asks}
        if attention_mask is not None and "key_bias" not in known:
            hint = "let the function take key_bias, leave the mask out, or make the processor inactive"
            expected = "None while the processor is active"
            fail(type(self).__name__, "attention_mask", expected, "a tensor", hint, NotImplementedError)
        out = self.attention(*tokens_first, **known)
        if out is None:
            return super().attend(query, key, value, attention_mask, is_cross)
        wanted = tokens_first[0].shape
        if not isinstance(out, Tensor) or out.shape != wanted:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            fail(type(self).__name__, "attention", f"a result of shape {tuple(wanted)}", got, error=TypeError)
        return out.transpose(1, 2)

    def _step(self, query: Tensor, attention_mask: Tensor | None) -> int | None:
        return self.run.step

    def _layer(self, query: Tensor, attention_mask: Tensor | None) -> str | None:
        return self.layer

    def _grid(self, query: Tensor, attention_mask: Tensor | None) -> tuple[int, int]:
        assert self.layer is not None
        rows, columns = self.run.grids[self.layer]
        if rows * columns != query.shape[1]:
            got = f"{query.shape[1]} tokens in {self.layer}"
            hint = "something merges tokens, or the UNet is of another kind"
            fail(type(self).__name__, "grid", f"{rows} x {columns} tokens", got, hint, NotImplementedError)
        return rows, columns

    def _key_bias(self, query: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        if attention_mask is None:
            return None
        if attention_mask.shape[2] != 1:
            got = tuple(attention_mask.shape)
            fail(type(self).__name__, "attention_mask", "one per key, (B, 1, M)", got, error=NotImplementedError)
        return attention_mask[:, 0, 0].float()  # the mask is equal in all heads

    def _images(self, query: Tensor, attention_mask: Tensor | None) -> list[KeyValue]:
        return self.images


KEYWORDS = ("step", "layer", "grid", "key_bias", "images")
"""The keywords that a function of a `CustomAttnProcessor` may ask for."""


def asked(function: Callable[..., Tensor | None]) -> tuple[str, ...]:
    """The `KEYWORDS` that are a function's keyword-only parameters, or others without a default. (What a partial
    has bound, and a default as in `lambda q, k, v, layer=name: …`, are the function's own.)"""
    bound = function.keywords if isinstance(function, partial) else {}

    def is_asked(parameter: Parameter) -> bool:
        own = parameter.name in bound or parameter.kind == Parameter.POSITIONAL_ONLY
        return not own and (parameter.kind == Parameter.KEYWORD_ONLY or parameter.default is Parameter.empty)

    parameters = signature(function).parameters
    return tuple(name for name in KEYWORDS if name in parameters and is_asked(parameters[name]))


class Buffer(Protocol):
    """The keys and values that a bank keeps of one layer."""

    def read(self, key: Tensor) -> Source:
        """Keys and values of this step, for a layer whose own keys are these."""


class MultiSourceAttnProcessor(StockAttnProcessor):
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
        """Attention over the sources of the state's routing; stock attention while nothing is shared."""
        if is_cross or not self.state.sharing:
            return super().attend(query, key, value, attention_mask, is_cross)
        if attention_mask is not None:
            refuse_mask(type(self).__name__)
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


class TokenMapAttnProcessor(StockAttnProcessor):
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
        """Stock attention whose maps of the state's tokens are kept in `maps`."""
        if not (is_cross and self.state.capturing):
            return super().attend(query, key, value, attention_mask, is_cross)
        if attention_mask is not None:
            refuse_mask(type(self).__name__)
        assert self.state.token_indices is not None
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out, self.maps = attention_with_token_maps(
            query, key, value, self.state.token_indices, backend=self.state.backend
        )
        return out.transpose(1, 2)


def refuse_mask(processor: str) -> None:
    """NotImplementedError for an attention mask while a processor is active."""
    hint = "leave the mask out, or make the processor inactive"
    fail(processor, "attention_mask", "None while the processor is active", "a tensor", hint, NotImplementedError)
