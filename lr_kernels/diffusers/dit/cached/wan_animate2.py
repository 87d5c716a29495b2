"""Wan-Animate-2 with its cached reference video: each frame reads the keys of its own reference frame where they lie.

The stock processor rotates the reference's keys in every step and copies them, with all queries, keys and values of the
layer, to padded buffers for PyTorch's flex attention, which must be compiled. Here the frames of all samples are rows
of the batch: each reads the keys of its whole video as one source, and one frame of the reference as another, through
row tables. It needs no compilation.
"""

from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan_animate_2 import (
    WanAnimate2Attention,
    WanAnimate2AttnProcessor,
    WanAnimate2KVLayerCache,
)
from torch import Tensor

from ....attention.api import multi_source_attention
from ....runtime.checks import fail
from ....source import Source
from ...processors.ulysses import refuse_context_parallelism
from ...processors.unet import OwnProcessor

_OP = "MultiSourceWanAnimate2AttnProcessor"


class _Position(NamedTuple):
    """What a reference's keys are rotated by: the arguments of `_turns`, and the dtype of the result."""

    frequencies: Tensor
    grid_sizes: Tensor
    stride: int
    dtype: torch.dtype

    def equals(self, other: "_Position") -> bool:
        """Whether both rotate alike. A traced graph cannot read the grids, and takes only the same tensor as equal."""
        if self.frequencies is not other.frequencies or self[2:] != other[2:]:
            return False
        if torch.compiler.is_compiling():
            return self.grid_sizes is other.grid_sizes
        return self.grid_sizes.tolist() == other.grid_sizes.tolist()


class MultiSourceWanAnimate2AttnProcessor(OwnProcessor, WanAnimate2AttnProcessor):
    """Wan-Animate-2's self-attention with the reference video as a source, equal to stock to rounding.

    `kv_cache_mode="extract"` stores keys before RoPE, and attends, as stock. `"cached"`: the tokens of frame f attend
    to all tokens of the generated video and, from frame 1 on, to those of the reference's frame f - 1, if there is one.
    Where a video has fewer frames than `origin_latent_frames` + 1, stock leaves zero keys that its mask does not hide;
    they are a source here too, of one key whose weight is their number.

    Args:
        keeps_rotated: keep the reference's keys after RoPE as an attribute of the stored tensor of keys, with which
            they are freed. They are then rotated once for a generation instead of in every step, and the cache takes
            half as much memory again.

    Raises:
        ValueError: another mode; a cache of another number of samples; more frames than `origin_latent_frames` allows.
        NotImplementedError: context parallelism; frames that have not `origin_latent_hw` tokens in video and reference
            (a compiled graph raises RuntimeError when it runs). RuntimeError: an empty cache.
    """

    def __init__(self, keeps_rotated: bool = False):
        super().__init__()
        self.keeps_rotated = keeps_rotated

    def __call__(
        self,
        attn: WanAnimate2Attention,
        hidden_states: Tensor,
        rotary_emb: Tensor,
        grid_sizes: Tensor,
        kv_cache: WanAnimate2KVLayerCache,
        kv_cache_mode: str,
        rope_stride: int = 1,
        reference_rotary_emb: Tensor | None = None,
        reference_grid_sizes: Tensor | None = None,
        reference_rope_stride: int = 1,
        attention_mask: Any | None = None,
        origin_latent_frames: int | None = None,
        origin_latent_hw: int | None = None,
    ) -> Tensor:
        """As diffusers calls it: the attended tokens. The block mask of stock's attention is not read."""
        if self.is_stock:
            return super().__call__(
                attn, hidden_states, rotary_emb, grid_sizes, kv_cache, kv_cache_mode, rope_stride,
                reference_rotary_emb, reference_grid_sizes, reference_rope_stride, attention_mask,
                origin_latent_frames, origin_latent_hw,
            )  # fmt: skip
        if kv_cache_mode not in ("extract", "cached"):
            fail(_OP, "kv_cache_mode", "extract or cached", repr(kv_cache_mode))
        refuse_context_parallelism(self)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, -1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        turns = _turns(rotary_emb, grid_sizes, rope_stride, query)
        if kv_cache_mode == "extract":
            kv_cache.store(key, value)
            query, key = (_rotated(x, turns, value.dtype) for x in (query, key))
            out = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        else:
            assert reference_rotary_emb is not None and reference_grid_sizes is not None
            assert origin_latent_frames is not None and origin_latent_hw is not None
            _check_frames("grid_sizes", grid_sizes, origin_latent_hw)
            _check_frames("reference_grid_sizes", reference_grid_sizes, origin_latent_hw)
            stored, values = kv_cache.get()
            query, key = (_rotated(x, turns, value.dtype) for x in (query, key))
            position = _Position(reference_rotary_emb, reference_grid_sizes, reference_rope_stride, value.dtype)
            reference = Source(self._placed(stored, position), values)
            out = read_frames(query, Source(key, value), reference, origin_latent_frames, origin_latent_hw)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(query)))

    def _placed(self, key: Tensor, position: _Position) -> Tensor:
        """The stored keys after RoPE. They are kept on the tensor that they are made of: who drops that drops them."""
        kept: tuple[_Position, Tensor] | None = getattr(key, "_lr_kernels_rotated", None)
        if kept is not None and kept[0].equals(position):
            return kept[1]
        frequencies, grid_sizes, stride, dtype = position
        rotated = _rotated(key, _turns(frequencies, grid_sizes, stride, key), dtype)
        if self.keeps_rotated:
            key._lr_kernels_rotated = position, rotated  # type: ignore[attr-defined]
        return rotated


def _turns(frequencies: Tensor, grid_sizes: Tensor, stride: int, tokens: Tensor) -> Tensor:
    """What RoPE multiplies tokens (B, N, H, D) by, complex128 (B, N, 1, D / 2), without reading the grid on the host.

    Args:
        frequencies: (positions, D / 2), of the axes of frames, rows and columns side by side.
        grid_sizes: (B, 3), frames, rows and columns of each sample.
        stride: positions from frame to frame.
    """
    _, rows, columns = grid_sizes.to(tokens.device)[:, :, None].unbind(1)
    token = torch.arange(tokens.shape[1], device=tokens.device)
    places = token // (rows * columns) * stride, token // columns % rows, token % columns
    half = tokens.shape[3] // 2
    axes = frequencies.split([half - 2 * (half // 3), half // 3, half // 3], 1)
    return torch.cat([axis[place] for axis, place in zip(axes, places)], -1)[:, :, None]


def _rotated(x: Tensor, turns: Tensor, dtype: torch.dtype) -> Tensor:
    """RoPE of tokens (B, N, H, D), computed in float64 and rounded to float32 first, as in stock."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).float().to(dtype)


def _check_frames(name: str, grid_sizes: Tensor, tokens: int) -> None:
    """NotImplementedError where a frame of the first sample has another number of tokens; a graph asserts it."""
    if torch.compiler.is_compiling():
        same = grid_sizes[0, 1] * grid_sizes[0, 2] == tokens
        torch._assert_async(same, f"lr_kernels.{_OP}: {name}: expected frames of {tokens} tokens (origin_latent_hw)")
        return
    _, rows, columns = grid_sizes[0].tolist()
    if rows * columns != tokens:
        hint = "give origin_area the height and width of this video"
        fail(_OP, name, f"frames of {tokens} tokens (origin_latent_hw)", f"{rows} x {columns}", hint,
             NotImplementedError)  # fmt: skip


def read_frames(query: Tensor, own: Source, reference: Source, most: int, tokens: int) -> Tensor:
    """Attention of a video's tokens to all of them, and of those of frame f to frame f - 1 of a reference.

    Args:
        query: (B, F * tokens, H, D). own: keys and values of the same tokens. reference: (B, frames * tokens, H, D).
        most: frames of the reference that the model allows for; those that are missing, of the video and of the
            reference, count as zero keys and values, as in stock's buffers. tokens: of a frame.

    Returns:
        (B, F * tokens, H, D).
    """
    batch, count, heads, dim = query.shape
    frames, known = count // tokens, reference.key.shape[1] // tokens
    if reference.key.shape[0] != batch:
        fail(_OP, "kv_cache", f"{batch} samples as in the batch", reference.key.shape[0])
    if frames > most + 1 or known > most:
        fail(_OP, "origin_len", f"a video with at least {max(frames - 1, known)} latent frames", most)
    row = torch.arange(batch * frames, dtype=torch.int32, device=query.device)
    sample, frame = row // frames, row % frames
    seen = (frame >= 1) & (frame <= known)
    references = torch.where(seen, sample * known + frame - 1, -1)
    folded = reference.key.reshape(-1, tokens, heads, dim), reference.value.reshape(-1, tokens, heads, dim)
    sources = [own._replace(rows=sample), Source(*folded, rows=references)]
    if frames <= most or known < frames - 1:
        missing = most + 1 - frames + (frame > known).int()
        zero = query.new_zeros(1, 1, heads, dim)
        sources.append(Source(zero, zero, logit_bias=(missing * tokens).float().log()))  # of none, -inf: not read
    return multi_source_attention(query.reshape(-1, tokens, heads, dim), sources).reshape(query.shape)


class NoBlockMasks(dict):
    """In place of a model's `block_masks`, where all its layers read references in place and none reads a mask.

    `WanAnimate2Transformer3DModel.forward` otherwise compiles the making of a mask for every size of video. With
    `model.block_masks = NoBlockMasks()` it hands its layers a word instead, which stock's flex attention refuses.
    """

    def __contains__(self, size: object) -> bool:
        return True

    def __missing__(self, size: object) -> str:
        return "NoBlockMasks"


REPLACES = {WanAnimate2AttnProcessor: MultiSourceWanAnimate2AttnProcessor}
"""Stock processors, and those that read references in place."""
