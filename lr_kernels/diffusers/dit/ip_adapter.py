"""`ip_adapter_masks` for Flux: diffusers hands them to the layers of a loaded IP-Adapter, which ignore them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ...attention.api import multi_source_attention
from ...runtime.checks import fail
from ...runtime.schemas import MAX_SOURCES
from ...source import Source
from ..processors.install import Installation, check_model, install_processors
from ..processors.joint import (
    JointAttention,
    JointProcessor,
    Tokens,
    flux_tokens,
    image_grid,
    joint_attention_layers,
    joint_processors,
)
from ..processors.routing import in_ratio
from ..processors.ulysses import refuse_context_parallelism

Masks = Tensor | Sequence[Tensor | None]


def use_ip_adapter_masks(model: nn.Module, attention: JointAttention | None = None) -> Installation:
    """Let masks act on the IP-Adapters that a Flux model has loaded: `joint_attention_kwargs={"ip_adapter_masks": …}`.

    Args:
        model: the transformer, or the pipeline, after `load_ip_adapter`. The masks' forms:
            `MultiSourceFluxIPAdapterAttnProcessor`.
        attention: the joint attention of all layers, as `partial(regional_joint_attention, regions=…)`. None: the
            model's own.

    Returns:
        The installation, also a context manager: `remove()`, or the end of a `with` block, restores the model.

    Raises:
        ValueError: a model without an IP-Adapter of Flux. TypeError: no model and no pipeline.
        NotImplementedError: with `attention`, another layer whose processor is not stock.
    """
    model = getattr(model, "transformer", model)
    check_model("use_ip_adapter_masks", "model", model)
    layers = joint_attention_layers(model)
    adapters = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer.processor, FluxIPAdapterAttnProcessor)
        and not isinstance(layer.processor, MultiSourceFluxIPAdapterAttnProcessor)
    }
    if not adapters:
        hint = "call load_ip_adapter() first, and remove() an earlier installation"
        expected = "a Flux transformer with a loaded IP-Adapter"
        fail("use_ip_adapter_masks", "model", expected, f"{type(model).__name__} without one", hint)
    masked = {
        name: MultiSourceFluxIPAdapterAttnProcessor(layer.processor, attention) for name, layer in adapters.items()
    }
    if attention is None:
        installation = install_processors(adapters, masked)
    else:
        others = {name: layer for name, layer in layers.items() if name not in adapters}
        installation = install_processors(layers, {**masked, **joint_processors(others, attention)})

    def give_grid(ids: Tensor, inputs: Mapping[str, Any]) -> None:
        grid = image_grid(ids)
        for processor in masked.values():
            processor.grid = grid

    installation.before_passes(model, give_grid)
    return installation


class MultiSourceFluxIPAdapterAttnProcessor(JointProcessor, FluxIPAdapterAttnProcessor, FluxAttnProcessor):
    """The layer of a loaded IP-Adapter of Flux, with masks that say where its images act.

        result of the adapter = Σ_i s_i · m_i(q) · A(q; image_i)

    All images of all adapters are softmax groups of one call, whose queries are the image's before RoPE, as in
    diffusers. Without masks it is the adapter's own processor, bit for bit; there an adapter's images share a softmax.

    Masks, `ip_adapter_masks`, are bool, or floating from 0 to 1, where 1 is: the image acts here. They are

        a tensor (adapters, height, width), or (adapters, 1, height, width) as IPAdapterMaskProcessor makes it, where
            each adapter has one image;
        a list with an entry per adapter: (1 or B, images, height, width), one mask per image, or None, which lets this
            adapter's images act everywhere, in one softmax.

    A mask belongs to the whole picture, in any resolution: square patches of some size make the rows and columns of the
    picture's tokens of its height and width, with less than a patch left over; another mask is refused. A token's
    weight is the mean of the mask over its patch. Where `grid` is not set, as in a pass that is being compiled, the
    tokens form the only rows x columns = N that do so, and a mask is refused where there are none.

    Args:
        adapter: the processor that diffusers loaded. Its to_k_ip, to_v_ip and scale are used and stay its own, under
            the same names in the model's state_dict. None: FluxAttnProcessor, bit for bit.
        attention: the layer's joint attention. None: the model's own.

    Raises:
        ValueError: masks of another number, shape or aspect ratio, or (on a CPU) of other numbers; no images; more than
            16 images.
        TypeError: masks that are neither bool nor floating.
        NotImplementedError: with masks or `attention`, what `CustomFluxAttnProcessor` refuses too.
    """

    adapter: FluxIPAdapterAttnProcessor | None
    grid: tuple[int, int] | None = None
    """(rows, columns) of the image's tokens; `use_ip_adapter_masks` sets it before each pass"""

    def __init__(self, adapter: FluxIPAdapterAttnProcessor | None = None, attention: JointAttention | None = None):
        nn.Module.__init__(self)
        object.__setattr__(self, "adapter", adapter)  # not as a module: its weights are here under their own names
        self.attention = attention
        if adapter is not None:
            self.to_k_ip, self.to_v_ip = adapter.to_k_ip, adapter.to_v_ip
            self.hidden_size, self.cross_attention_dim = adapter.hidden_size, adapter.cross_attention_dim
            self.stand_in_for(adapter)

    @property
    def scale(self) -> list[float]:
        """The adapters' strengths, as `set_ip_adapter_scale` sets them."""
        return [] if self.adapter is None else self.adapter.scale

    @scale.setter
    def scale(self, scale: list[float]) -> None:
        if self.adapter is not None:
            self.adapter.scale = scale

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ip_hidden_states: list[Tensor] | None = None,
        ip_adapter_masks: Masks | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """As diffusers calls it: the attended tokens of the image and of the text, and the adapters' result."""
        given = (attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if self.adapter is None:
            return FluxAttnProcessor.__call__(self, *given)
        if encoder_hidden_states is None or (ip_adapter_masks is None and self.attention is None):
            return FluxIPAdapterAttnProcessor.__call__(self, *given, ip_hidden_states, ip_adapter_masks)
        refuse_context_parallelism(self)
        self.check(attn, attention_mask)
        text, image = flux_tokens(attn, hidden_states, encoder_hidden_states)
        of_images = self._of_images(image, ip_hidden_states, ip_adapter_masks)
        of_text, out = self.attend_rotated(text, image, image_rotary_emb)
        return attn.to_out[1](attn.to_out[0](out)), attn.to_add_out(of_text), of_images

    def _grid_of(self, tokens: int) -> tuple[int, int] | None:
        """The grid of the pass, where it is known and is that of one image."""
        known = self.grid is not None and not torch.compiler.is_compiling() and math.prod(self.grid) == tokens
        return self.grid if known else None

    def _of_images(self, tokens: Tokens, images: list[Tensor] | None, masks: Masks | None) -> Tensor:
        """The adapters' result (B, N, H * D) for the image's tokens before RoPE; images: (B, images, tokens, channels)
        of each adapter."""
        op, query = type(self).__name__, tokens.query
        number = len(self.to_k_ip)
        if images is None or len(images) != number:
            got = None if images is None else len(images)
            fail(op, "ip_hidden_states", f"the images of {number} adapters", got, "give the pipeline ip_adapter_image")
        images = [x if x.dim() == 4 else x[:, None] for x in images]
        counts = [x.shape[1] for x in images]
        per_adapter = [None] * number if masks is None else _masks_per_adapter(op, masks, counts, len(query))
        sources: list[Source] = []
        for x, to_key, to_value, scale, mask in zip(images, self.to_k_ip, self.to_v_ip, self.scale, per_adapter):
            key, value = (project(x).unflatten(-1, query.shape[2:]) for project in (to_key, to_value))
            if mask is None:
                sources.append(Source(key.flatten(1, 2), value.flatten(1, 2), softmax_group=len(sources), weight=scale))
                continue
            at_tokens = _at_tokens(op, mask, query.shape[1], self._grid_of(query.shape[1])).to(query.device)
            weights = scale * at_tokens.expand(len(query), -1, -1)
            for of_key, of_value, weight in zip(key.unbind(1), value.unbind(1), weights.unbind(1)):
                sources.append(Source(of_key, of_value, softmax_group=len(sources), weight=weight))
        if len(sources) > MAX_SOURCES:
            fail(op, "ip_hidden_states", f"at most {MAX_SOURCES} images", len(sources))
        return multi_source_attention(query, sources).flatten(2)


def _masks_per_adapter(op: str, masks: Masks, counts: list[int], batch: int) -> list[Tensor | None]:
    """Of each adapter (1 or B, images, height, width) or None; counts: its images."""
    if isinstance(masks, Tensor):
        if masks.dim() not in (3, 4) or (masks.dim() == 4 and masks.shape[1] != 1):
            hint = "several images of one adapter take a list with (1, images, height, width)"
            expected = "a tensor (adapters, height, width) or (adapters, 1, height, width)"
            fail(op, "ip_adapter_masks", expected, tuple(masks.shape), hint)
        masks = [x.reshape(1, 1, *x.shape[-2:]) for x in masks]
    elif not isinstance(masks, list | tuple):
        fail(op, "ip_adapter_masks", "a tensor or a list of them", type(masks).__name__, error=TypeError)
    if len(masks) != len(counts):
        fail(op, "ip_adapter_masks", f"{len(counts)} masks, one per adapter", len(masks))
    for i, (mask, count) in enumerate(zip(masks, counts)):
        if mask is None:
            continue
        name = f"ip_adapter_masks[{i}]"
        if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            fail(op, name, "a tensor of bools or of floats from 0 to 1, or None", got, error=TypeError)
        if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != count:
            expected = f"shape (1 or {batch}, {count}, height, width), {count} being the adapter's images"
            fail(op, name, expected, tuple(mask.shape))
    return list(masks)


def _at_tokens(op: str, mask: Tensor, tokens: int, known: tuple[int, int] | None) -> Tensor:
    """The mask (R, images, height, width) at the image's tokens, float32 (R, images, tokens).

    Args:
        known: (rows, columns) of the tokens; None: those that the mask's ratio gives.
    """
    grid = token_grid(tokens, *mask.shape[2:]) if known is None else known
    if grid is None or not in_ratio(*grid, *mask.shape[2:]):
        of = f"{tokens} tokens" if known is None else f"{known[0]} x {known[1]} tokens"
        got = f"{mask.shape[2]} x {mask.shape[3]} for {of}"
        fail(op, "ip_adapter_masks", "masks of the picture's height and width, or in that ratio", got)
    means = F.adaptive_avg_pool2d(mask.float(), grid).flatten(2)
    if means.device.type == "cpu" and means.numel() and not torch.compiler.is_compiling():  # elsewhere it synchronizes
        low, high = (x.item() for x in means.aminmax())
        if not (low >= 0 and high <= 1 + 1e-4):  # a mean of ones may round up
            fail(op, "ip_adapter_masks", "numbers from 0 to 1", f"means from {low:g} to {high:g}")
    return means


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The (rows, columns) with rows x columns = tokens that are `in_ratio` with height and width. None where none are.

    There is at most one: both numbers grow as the size shrinks.
    """
    for rows in range(1, tokens + 1):
        columns = tokens // rows
        if rows * columns == tokens and in_ratio(rows, columns, height, width):
            return rows, columns
    return None
