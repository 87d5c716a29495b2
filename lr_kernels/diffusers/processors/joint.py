"""Joint attention over text and image tokens by a function of your own (Flux, Flux2, SD3, Qwen-Image); text and image
are two sources."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

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
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
)
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb_qwen,
)
from torch import Tensor, nn

from ...attention.api import multi_source_attention
from ...runtime.checks import fail
from ...source import Source
from .install import check_model, check_stock
from .ulysses import Ulysses, refuse_context_parallelism, ulysses_of
from .unet import OwnProcessor, refuse_mask

JointLayer: TypeAlias = Attention | FluxAttention | Flux2Attention | Flux2ParallelSelfAttention

JOINT_PROCESSORS = (
    FluxAttnProcessor, FluxIPAdapterAttnProcessor, Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor,
    JointAttnProcessor2_0, FusedJointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0,
    QwenDoubleStreamAttnProcessor2_0,
)  # fmt: skip


def joint_attention_layers(model: nn.Module) -> dict[str, JointLayer]:
    """The layers of a model that have the processor of Flux, Flux2, SD3 or Qwen-Image, by name, also where it is an
    IP-Adapter's or one of fused projections.

    Raises:
        ValueError: a model without such layers. TypeError: no model.
    """
    check_model("joint_attention_layers", "model", model)
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the module and renames its children
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, JointLayer) and isinstance(module.processor, JOINT_PROCESSORS)
    }
    if not layers:
        expected = "one with the attention of Flux, Flux2, SD3 or Qwen-Image"
        hint = "its processors are neither stock nor this library's for joint attention"
        fail("joint_attention_layers", "model", expected, type(model).__name__, hint)
    return layers


class Tokens(NamedTuple):
    """Queries, keys and values of one kind of tokens, (B, N, H, D) each: normalized, positions applied."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    """bool (B, N): False where a token is padding, whose key no query may see; None: all are visible. Only the text of
    Qwen-Image has one: a function gives it to its source as `key_mask`."""


JointAttention = Callable[[Tokens | None, Tokens], tuple[Tensor | None, Tensor]]
"""(text or None where a layer has the tokens of both in one stream, image) -> (result for text or None, for image)"""


def joint_attention(text: Tokens | None, image: Tokens) -> tuple[Tensor | None, Tensor]:
    """The attention of the stock models: all queries attend to the text's and the image's keys."""
    if text is None:
        return None, multi_source_attention(image.query, [Source(image.key, image.value)])
    sources = [Source(text.key, text.value, key_mask=text.mask), Source(image.key, image.value)]
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

    Raises:
        ValueError: more text tokens than there are, or fewer than none.
    """
    if text is not None:
        own = [Source(text.key, text.value, key_mask=text.mask), Source(image.key, image.value)]
        read = multi_source_attention(text.query, own)
        shared = Source(image.key, image.value, rows, logit_bias=strength)
        return read, multi_source_attention(image.query, [*own, shared])
    if not 0 <= text_tokens < image.query.shape[1]:
        expected = f"from 0 to fewer than the stream's {image.query.shape[1]} tokens"
        fail("shared_joint_attention", "text_tokens", expected, text_tokens)
    key, value = (x[:, text_tokens:] for x in (image.key, image.value))
    own = [Source(image.key, image.value)]
    queries = image.query.split([text_tokens, image.query.shape[1] - text_tokens], 1)
    shared = Source(key, value, rows, logit_bias=strength)
    parts = [multi_source_attention(queries[0], own), multi_source_attention(queries[1], [*own, shared])]
    return None, torch.cat(parts, 1)


def image_grid(ids: Tensor) -> tuple[int, int]:
    """(rows, columns) of the image's tokens in Flux, by their positions `img_ids` (N, 3) or (B, N, 3); it synchronizes
    a GPU."""
    rows, columns = (int(x) + 1 for x in (ids[0] if ids.dim() == 3 else ids)[:, 1:].amax(0))
    return rows, columns


def projected(
    x: Tensor, projections: tuple[nn.Module, ...], norms: tuple[nn.Module | None, ...], heads: tuple[int, int]
) -> Tokens:
    """Tokens of hidden states (B, N, channels), before positions are applied; heads: (heads, head_dim), one of them may
    be -1."""
    return normalized((project(x) for project in projections), norms, heads)


def normalized(parts: Iterable[Tensor], norms: tuple[nn.Module | None, ...], heads: tuple[int, int]) -> Tokens:
    """Tokens of queries, keys and values (B, N, H * D) as the projections give them; `heads` as in `projected`."""
    query, key, value = (x.unflatten(-1, heads) for x in parts)
    query, key = (y if norm is None else norm(y) for norm, y in zip(norms, (query, key)))
    return Tokens(query, key, value)


def rotated(tokens: Tokens, rotary: tuple[Tensor, Tensor] | None) -> Tokens:
    """The tokens with Flux's positions applied: rotary, cosines and sines (N, D) each."""
    if rotary is None:
        return tokens
    query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in tokens[:2])
    return tokens._replace(query=query, key=key)


def rotated_apart(
    text: Tokens | None, image: Tokens, rotary: tuple[Tensor, Tensor] | None
) -> tuple[Tokens | None, Tokens]:
    """`rotated` for tokens of Flux or Flux2; rotary: of the text's tokens, if they are apart, then of the image's."""
    if text is not None and rotary is not None:
        start = text.query.shape[1]
        text = rotated(text, (rotary[0][:start], rotary[1][:start]))
        rotary = rotary[0][start:], rotary[1][start:]
    return text, rotated(image, rotary)


def flux_tokens(
    attn: FluxAttention | Flux2Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None
) -> tuple[Tokens | None, Tokens]:
    """Text, None where both are one stream, and image of a layer of Flux or Flux2, before positions are applied. The
    projections may be fused."""
    heads, text = (-1, attn.head_dim), None  # under tensor parallelism a rank has some of the heads
    fused, x, y = attn.fused_projections, hidden_states, encoder_hidden_states
    if y is not None:
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        parts = attn.to_added_qkv(y).chunk(3, -1) if fused else [project(y) for project in added]
        text = normalized(parts, (attn.norm_added_q, attn.norm_added_k), heads)
    parts = attn.to_qkv(x).chunk(3, -1) if fused else [project(x) for project in (attn.to_q, attn.to_k, attn.to_v)]
    return text, normalized(parts, (attn.norm_q, attn.norm_k), heads)


def flux2_stream(attn: Flux2ParallelSelfAttention, hidden_states: Tensor) -> tuple[Tokens, Tensor]:
    """The tokens of a single block of Flux2, before positions are applied, and the input of its feed-forward part."""
    x = attn.to_qkv_mlp_proj(hidden_states)
    whole = 3 * attn.inner_dim + attn.mlp_hidden_dim * attn.mlp_mult_factor
    attended = x.shape[-1] * 3 * attn.inner_dim // whole  # under tensor parallelism a rank has a share of both
    x, feed_forward = x.split([attended, x.shape[-1] - attended], -1)
    return normalized(x.chunk(3, -1), (attn.norm_q, attn.norm_k), (-1, attn.head_dim)), feed_forward


def whole_tokens(ulysses: Ulysses, parts: Sequence[Tokens]) -> list[Tokens]:
    """Of each kind of tokens of this card, those of all cards with this card's heads."""
    whole = ulysses.gathered([torch.cat(x[:3], -1) for x in parts])
    masks = [None if x.mask is None else ulysses.gathered_mask(x.mask) for x in parts]
    apart = (x.chunk(3, -1) for x in whole)
    return [Tokens(query, key, value, mask) for (query, key, value), mask in zip(apart, masks)]


@dataclass
class Stream:
    """What layers with text and image apart tell those that have both in one stream; one object for a model's layers,
    which is read under Ulysses only."""

    text_tokens: int | None = None
    """how many of the stream's first tokens are text, on this card; None: no such layer has run"""


class JointProcessor(OwnProcessor):
    """Base of the processors of joint attention by a function; None: diffusers' own processor, bit for bit.

    Under Ulysses the function gets all tokens, with this card's heads."""

    def __init__(self, attention: JointAttention | None = None):
        super().__init__()
        self.attention = attention
        self.stream = Stream()

    def check(self, attn: nn.Module, attention_mask: Tensor | None) -> None:
        """NotImplementedError for what the active processors lack: an attention mask, fused projections, context
        parallelism other than Ulysses, heads that its cards do not divide."""
        name = type(self).__name__
        if attention_mask is not None:
            refuse_mask(name)
        if getattr(attn, "fused_projections", False) and not isinstance(attn, Attention):  # those keep separate ones
            fail(name, "attn", "separate projections", "fused ones", "call unfuse_qkv_projections()",
                 NotImplementedError)  # fmt: skip
        ulysses_of(self, cast(int, attn.heads))

    def attend_rotated(
        self, text: Tokens | None, image: Tokens, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor | None, Tensor]:
        """`attend` for tokens of Flux or Flux2, with positions applied: rotary, of the text's tokens, then of the
        image's."""
        return self.attend(*rotated_apart(text, image, rotary))

    def attend(self, text: Tokens | None, image: Tokens) -> tuple[Tensor | None, Tensor]:
        """The function's results, checked, with heads side by side, (B, N, H * D) in the queries' dtypes: of the text,
        None where both are one stream, and of the image."""
        ulysses = ulysses_of(self)
        if ulysses is None:
            of_text, of_image = self._results(text, image)
        else:
            of_text, of_image = self._results_under_ulysses(ulysses, text, image)
        return None if of_text is None else of_text.flatten(2), of_image.flatten(2)

    def _results_under_ulysses(
        self, ulysses: Ulysses, text: Tokens | None, image: Tokens
    ) -> tuple[Tensor | None, Tensor]:
        """`_results` of all cards' tokens for this card's heads, exchanged for those of this card's tokens."""
        if text is not None:
            self.stream.text_tokens = text.query.shape[1]
            results = self._results(*whole_tokens(ulysses, [text, image]))
            assert results[0] is not None
            of_text, of_image = ulysses.scattered([results[0], results[1]])
            return of_text, of_image
        start = self.stream.text_tokens
        if start is None:
            hint = "install those of joint_processors(layers, attention) in all layers of the model"
            expected = "layers with text and image apart that have such a processor, too, under Ulysses"
            fail(type(self).__name__, "attn", expected, "none", hint, NotImplementedError)
        parts = [Tokens(*(x[:, :start] for x in image[:3])), Tokens(*(x[:, start:] for x in image[:3]))]
        whole = whole_tokens(ulysses, parts)  # each card's stream begins with its text: all text goes first
        joined = Tokens(*(torch.cat(pair, 1) for pair in zip(whole[0][:3], whole[1][:3])))
        _, out = self._results(None, joined)
        return None, torch.cat(ulysses.scattered(out.split([x.query.shape[1] for x in whole], 1)), 1)

    def _results(self, text: Tokens | None, image: Tokens) -> tuple[Tensor | None, Tensor]:
        results: Any = (self.attention or joint_attention)(text, image)
        if not isinstance(results, tuple | list) or len(results) != 2:
            expected = "(result of the text or None, result of the image) from it"
            fail(type(self).__name__, "attention", expected, type(results).__name__, error=TypeError)
        of_text, of_image = results
        found = self._checked("image", of_image, image)
        return None if text is None else self._checked("text", of_text, text), found

    def _checked(self, name: str, found: Tensor | None, tokens: Tokens) -> Tensor:
        if not isinstance(found, Tensor) or found.shape != tokens.query.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else found
            expected = f"a result for the {name} of shape {tuple(tokens.query.shape)}"
            fail(type(self).__name__, "attention", expected, got, error=TypeError)
        return found.to(tokens.query.dtype)


def _refuse_adapter(processor: JointProcessor, **arguments: object) -> None:
    """NotImplementedError for an IP-Adapter's arguments. diffusers hands them to processors whose signature names them
    and silently drops them otherwise, so the processors name them and refuse them here."""
    for name, x in arguments.items():
        if x is not None:
            hint = "unload_ip_adapter(), or make the processor inactive"
            fail(type(processor).__name__, name, "None while the processor is active", "an IP-Adapter's", hint,
                 NotImplementedError)  # fmt: skip


def _refuse_cache(processor: JointProcessor, kv_cache_mode: str | None) -> None:
    """NotImplementedError for a pass with cached references, which stock processors of these classes would drop too."""
    if kv_cache_mode is not None:
        hint = "install processors that read references, as Flux2KleinKVPipeline's do"
        fail(type(processor).__name__, "kv_cache_mode", "None", repr(kv_cache_mode), hint, NotImplementedError)


class CustomFluxAttnProcessor(JointProcessor, FluxAttnProcessor):
    """Flux's joint attention by `attention`; None: diffusers' own processor, bit for bit.

    Raises:
        NotImplementedError: while active, an attention mask, an IP-Adapter's arguments in double blocks (single blocks
            have none of it), fused projections, context parallelism other than Ulysses.
    """

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
        if encoder_hidden_states is not None:
            _refuse_adapter(self, ip_hidden_states=ip_hidden_states, ip_adapter_masks=ip_adapter_masks)
        self.check(attn, attention_mask)
        tokens = flux_tokens(attn, hidden_states, encoder_hidden_states)
        text, image = self.attend_rotated(*tokens, image_rotary_emb)
        return image if text is None else (attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text))


class CustomFlux2AttnProcessor(JointProcessor, Flux2AttnProcessor):
    """The joint attention of Flux2's double blocks by `attention`; None: diffusers' own processor, bit for bit.

    Raises:
        NotImplementedError: a pass with cached references; while active, an attention mask, fused projections, context
            parallelism other than Ulysses.
    """

    def __call__(
        self,
        attn: Flux2Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache_mode: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As diffusers calls it: the attended tokens of the image, and of the text where it is apart."""
        _refuse_cache(self, kv_cache_mode)
        if self.attention is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        self.check(attn, attention_mask)
        tokens = flux_tokens(attn, hidden_states, encoder_hidden_states)
        text, image = self.attend_rotated(*tokens, image_rotary_emb)
        image = attn.to_out[1](attn.to_out[0](image))
        return image if text is None else (image, attn.to_add_out(text))


class CustomFlux2ParallelSelfAttnProcessor(JointProcessor, Flux2ParallelSelfAttnProcessor):
    """As `CustomFlux2AttnProcessor`, for the single blocks: text and image tokens are one stream, and the function's
    text is None."""

    def __call__(
        self,
        attn: Flux2ParallelSelfAttention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache_mode: str | None = None,
    ) -> Tensor:
        """As diffusers calls it: the block's attended tokens with its feed-forward part."""
        _refuse_cache(self, kv_cache_mode)
        if self.attention is None:
            return super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)
        self.check(attn, attention_mask)
        tokens, feed_forward = flux2_stream(attn, hidden_states)
        _, out = self.attend_rotated(None, tokens, image_rotary_emb)
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(feed_forward)], -1))


class CustomSD3AttnProcessor(JointProcessor, JointAttnProcessor2_0):
    """SD3's joint attention by `attention`; None: diffusers' own processor, bit for bit.

    Raises:
        NotImplementedError: while active, an attention mask, an IP-Adapter's arguments, context parallelism.
    """

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
        _refuse_adapter(self, ip_hidden_states=ip_hidden_states)
        refuse_context_parallelism(self)
        self.check(attn, attention_mask)
        heads, text = (attn.heads, -1), None
        if encoder_hidden_states is not None:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = projected(encoder_hidden_states, projections, (attn.norm_added_q, attn.norm_added_k), heads)
        image = projected(hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), heads)
        of_text, out = self.attend(text, image)
        out = attn.to_out[1](attn.to_out[0](out))
        if of_text is None:
            return out
        return out, of_text if attn.context_pre_only else attn.to_add_out(of_text)


class CustomQwenImageAttnProcessor(JointProcessor, QwenDoubleStreamAttnProcessor2_0):
    """Qwen-Image's joint attention by `attention`; None: diffusers' own processor, bit for bit.

    The function gets the mask of the text's padding as `text.mask`.

    Raises:
        NotImplementedError: while active, an attention mask beside the text's, context parallelism other than
            Ulysses.
        ValueError: a call without text, as in diffusers.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As diffusers calls it: the attended tokens of the image and of the text."""
        if self.attention is None:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            )
        if encoder_hidden_states is None:
            fail(type(self).__name__, "encoder_hidden_states", "the text's", None)
        self.check(attn, attention_mask)
        heads = (-1, attn.inner_dim // attn.heads)  # under tensor parallelism a rank has some of the heads
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = projected(encoder_hidden_states, projections, (attn.norm_added_q, attn.norm_added_k), heads)
        image = projected(hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), heads)
        if image_rotary_emb is not None:
            image, text = (
                tokens._replace(
                    query=apply_rotary_emb_qwen(tokens.query, rotary, use_real=False),
                    key=apply_rotary_emb_qwen(tokens.key, rotary, use_real=False),
                )
                for tokens, rotary in zip((image, text), image_rotary_emb)
            )
        of_text, out = self.attend(text._replace(mask=encoder_hidden_states_mask), image)
        assert of_text is not None
        for module in attn.to_out:
            out = module(out)
        return out, attn.to_add_out(of_text)


_IN_PLACE_OF: dict[type, type[JointProcessor]] = {
    FluxAttnProcessor: CustomFluxAttnProcessor,
    Flux2AttnProcessor: CustomFlux2AttnProcessor,
    Flux2ParallelSelfAttnProcessor: CustomFlux2ParallelSelfAttnProcessor,
    JointAttnProcessor2_0: CustomSD3AttnProcessor,
    QwenDoubleStreamAttnProcessor2_0: CustomQwenImageAttnProcessor,
}


def joint_processors(
    layers: Mapping[str, JointLayer], attention: JointAttention | None = None
) -> dict[str, JointProcessor]:
    """For `install_processors`: the processor that computes `attention` in each layer of `joint_attention_layers`, with
    the attention backend and the parallelism of the one that it stands in for.

    Raises:
        ValueError: a layer without text and image tokens.
        TypeError: an `attention` that is no function.
        NotImplementedError: a layer whose processor is not stock, as an IP-Adapter's.
    """
    if attention is not None and not callable(attention):
        expected = "a function of (text, image), or None"
        fail("joint_processors", "attention", expected, type(attention).__name__, error=TypeError)
    check_stock(layers)
    found, stream = {}, Stream()
    for name, layer in layers.items():
        kinds = [ours for stock, ours in _IN_PLACE_OF.items() if isinstance(layer.processor, stock)]
        if not kinds:
            expected = "layers of joint_attention_layers(model)"
            fail("joint_processors", "layers", expected, f"{name} with {type(layer.processor).__name__}")
        found[name] = processor = kinds[0](attention)
        processor.stand_in_for(layer.processor)
        processor.stream = stream
    return found
