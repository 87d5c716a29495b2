"""attention_with_token_maps: cross-attention that also returns where chosen text tokens are looked at."""

import torch
from torch import Tensor

from .. import reference
from ..runtime import backends, modes
from ..runtime.checks import FLOAT32_MAX, check_entries, check_memory, check_number, fail
from ..runtime.ops import kernel
from ..runtime.platform import KERNEL_DTYPES
from ..runtime.schemas import MAX_HEAD_DIM, MAX_TOKENS
from ..runtime.tensors import resolved

_OP = "attention_with_token_maps"
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def attention_with_token_maps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_indices: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention and, for each chosen key, the probability that each query gives it, averaged over the heads.

        out = softmax(scale · Q Kᵀ) V,     maps[b,i,t] = mean_h P[b,i,h, token_indices[b,t]]

    The probabilities of all heads are never stored: the maps are summed up while the heads are computed.

    Args:
        query: (B, N, H, D), fp32, fp16 or bf16 (the reference backend also float64); D 1 to 256.
        key, value: (B, M, H, D). Strided views are read in place; only the last dimension must be contiguous.
        token_indices: int64, int32, int16, int8 or uint8 (T,) or (B, T) in [0, M): the keys to map, for example the
            subject's text tokens.
        scale: default D ** -0.5.
        backend: "auto", "cpu", "triton" or "reference". A name never falls back.

    Returns:
        out (B, N, H, D) in the query's dtype and maps fp32 (B, N, T) (float64 for float64 inputs). M = 0 gives out 0.
        CPU scratch per thread, in floats: 32·(M + 2·D) + 128·T, and 2·M·D for 16-bit dtypes.

    Raises:
        ValueError: a shape, device, stride or token index that does not fit. TypeError: a dtype that does not fit.
        RuntimeError: the named backend is not available. NotImplementedError: a named kernel backend where a gradient
        is required. Token indices on a GPU are not checked; in a compiled graph the CPU kernel raises RuntimeError.

    The maps are the input of `subject_mask`, which gives the foreground of adaptive mask blending in Layout-and-Retouch
    (arXiv 2407.09779); cross-attention maps as a place of words: A. Hertz et al., arXiv 2208.01626.
    """
    query, key, value = resolved(_OP, "query", query), resolved(_OP, "key", key), resolved(_OP, "value", value)
    token_indices = resolved(_OP, "token_indices", token_indices)
    if modes.transforms_active():
        modes.refuse_vmap(_OP, {"token_indices": token_indices})
    if scale is not None and not torch.compiler.is_compiling():
        expected = "a number that float32 holds"
        scale = check_number(_OP, "scale", scale, expected, -FLOAT32_MAX, FLOAT32_MAX)
    autocast = not query.is_meta and torch.is_autocast_enabled(query.device.type)
    _check(query, key, value, token_indices, autocast)
    if autocast:
        check_memory(_OP, "query", 2 * (query.numel() + key.numel() + value.numel()), query.device)
        query, key, value = (modes.autocast(x) for x in (query, key, value))
    name = backends.choose(_OP, backend, query.device, query.dtype, backends.forward_only(query, key, value))
    _check_size(query, key, token_indices, name)
    if name == "reference":
        return reference.attention_with_token_maps(query, key, value, token_indices, scale=scale)
    batch, tokens, _, head_dim = query.shape
    indices = token_indices.int().contiguous()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    maps = query.new_empty((batch, tokens, indices.shape[-1]), dtype=torch.float32)
    kernel(_OP, name)(
        query,
        key,
        value,
        indices.expand(batch, -1),
        head_dim**-0.5 if scale is None else scale,
        out,
        maps,
    )
    return out, maps


def _check_size(query: Tensor, key: Tensor, token_indices: Tensor, backend: str) -> None:
    """Refuse results, and the probabilities of the reference backend, beyond the memory."""
    batch, tokens, heads, _ = query.shape
    needed = query.numel() * query.element_size() + 4 * batch * tokens * token_indices.shape[-1]
    needed += 4 * token_indices.numel()
    if backend == "reference":
        needed += 3 * 8 * batch * heads * tokens * key.shape[1]
    check_memory(_OP, "query", needed, query.device)


def _check(query: Tensor, key: Tensor, value: Tensor, token_indices: Tensor, autocast: bool) -> None:
    """Shapes, dtypes and devices of every argument, in the order of the signature; autocast joins dtypes."""
    if query.dim() != 4:
        fail(_OP, "query", "shape (batch, tokens, heads, head_dim)", tuple(query.shape))
    if not query.is_floating_point():
        fail(_OP, "query", "one of float32, float16, bfloat16, float64", query.dtype, error=TypeError)
    batch, _, heads, head_dim = query.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        fail(_OP, "query", f"head_dim from 1 to {MAX_HEAD_DIM}", head_dim)
    if heads < 1:
        fail(_OP, "query", "at least one head", heads)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4 or (x.shape[0], x.shape[2], x.shape[3]) != (batch, heads, head_dim):
            fail(_OP, name, f"shape ({batch}, keys, {heads}, {head_dim})", tuple(x.shape))
        castable = autocast and query.dtype in KERNEL_DTYPES and x.dtype in KERNEL_DTYPES
        if x.dtype != query.dtype and not castable:
            fail(_OP, name, str(query.dtype), x.dtype, "cast all tensors to one dtype", TypeError)
        if x.device != query.device:
            fail(_OP, name, str(query.device), x.device)
        if x.stride(3) != 1 and head_dim > 1:
            fail(_OP, name, "a contiguous last dimension", f"stride {x.stride(3)}", "call .contiguous()")
    keys = key.shape[1]
    if keys > MAX_TOKENS:
        fail(_OP, "key", f"at most {MAX_TOKENS} keys", keys)
    if value.shape[1] != keys:
        fail(_OP, "value", f"{keys} keys as in key", value.shape[1])
    if token_indices.dim() not in (1, 2) or (token_indices.dim() == 2 and token_indices.shape[0] != batch):
        fail(_OP, "token_indices", f"shape (T,) or ({batch}, T)", tuple(token_indices.shape))
    if token_indices.dtype not in _INDEX_DTYPES:
        names = ", ".join(str(x).removeprefix("torch.") for x in _INDEX_DTYPES)
        fail(_OP, "token_indices", f"an integer dtype of {names}", token_indices.dtype, error=TypeError)
    if token_indices.device != query.device:
        fail(_OP, "token_indices", str(query.device), token_indices.device)
    check_entries(_OP, "token_indices", token_indices, 0, keys - 1, f"integers in [0, {keys})")
