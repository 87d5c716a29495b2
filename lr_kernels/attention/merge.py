"""merge_attention_states: partial attention results over disjoint key sets, joined exactly."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..runtime import backends
from ..runtime.checks import check_memory, check_sequence, fail
from ..runtime.ops import kernel
from ..runtime.schemas import MAX_PARTS
from ..runtime.tensors import resolved

_OP = "merge_attention_states"


def merge_attention_states(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Join the results of attention over disjoint key sets into the attention over their union.

        lse = log Σ_k exp(lse_k),     out = Σ_k exp(lse_k - lse) · out_k

    Args:
        outs: K tensors (B, N, H, D), 1 to 16, fp32, fp16 or bf16 (the reference backend also float64). Strided views
            are read in place; only the last dimension must be contiguous.
        lses: K natural-log LSEs (B, N, H), fp32 (float64 for float64 outs), as `multi_source_attention` returns.
        backend: "auto", "cpu", "triton" or "reference". A name never falls back.

    Returns:
        out (B, N, H, D) in the outs' dtype and lse (B, N, H) in the lses'. A part with lse -inf is neutral; where all
        parts are, out is 0 and lse -inf. A NaN in a part stays NaN, whatever its lse: it is the mark of a NaN in a
        visible value, which the attention over all keys would show too.

    Raises:
        ValueError: a count, shape, device or stride that does not fit, named with its part. TypeError: a dtype that
        does not fit. RuntimeError: the named backend is not available. NotImplementedError: a named kernel backend
        where a gradient is required.
    """
    for argument, parts in (("outs", outs), ("lses", lses)):
        check_sequence(_OP, argument, parts)
    outs = [resolved(_OP, f"outs[{i}]", x) for i, x in enumerate(outs)]
    lses = [resolved(_OP, f"lses[{i}]", x) for i, x in enumerate(lses)]
    _check(outs, lses)
    like = outs[0]
    result = like.numel() * like.element_size() + like.shape[:3].numel() * 4
    check_memory(_OP, "outs[0]", result, like.device)
    name = backends.choose(_OP, backend, like.device, like.dtype, backends.forward_only(*outs, *lses), "outs[0]")
    if name == "reference":
        check_memory(_OP, "backend 'reference'", 3 * len(outs) * 8 * like.numel(), like.device)
        return reference.merge_attention_states(outs, lses)
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    lse = like.new_empty(like.shape[:3], dtype=torch.float32)
    kernel(_OP, name)(outs, lses, out, lse)
    return out, lse


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Count, shape, dtype and device of every part."""
    if not 1 <= len(outs) <= MAX_PARTS:
        fail(_OP, "outs", f"1 to {MAX_PARTS} tensors", len(outs))
    if len(lses) != len(outs):
        fail(_OP, "lses", f"{len(outs)} tensors", len(lses))
    like = outs[0]
    if like.dim() != 4:
        fail(_OP, "outs[0]", "shape (batch, tokens, heads, head_dim)", tuple(like.shape))
    if not like.is_floating_point():
        fail(_OP, "outs[0]", "one of float32, float16, bfloat16, float64", like.dtype, error=TypeError)
    shape, dtype, device = like.shape, like.dtype, like.device
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for i, (out, lse) in enumerate(zip(outs, lses)):
        if out.shape != shape:
            fail(_OP, f"outs[{i}]", f"shape {tuple(shape)} as of outs[0]", tuple(out.shape))
        if out.dtype != dtype:
            fail(_OP, f"outs[{i}]", str(dtype), out.dtype, "cast all parts to one dtype", TypeError)
        if out.device != device:
            fail(_OP, f"outs[{i}]", str(device), out.device)
        if shape[3] > 1 and out.stride(3) != 1:
            fail(_OP, f"outs[{i}]", "a contiguous last dimension", f"stride {out.stride(3)}", "call .contiguous()")
        if lse.shape != shape[:3]:
            fail(_OP, f"lses[{i}]", f"shape {tuple(shape[:3])}", tuple(lse.shape))
        if lse.dtype != lse_dtype:
            fail(_OP, f"lses[{i}]", str(lse_dtype), lse.dtype, error=TypeError)
        if lse.device != device:
            fail(_OP, f"lses[{i}]", str(device), lse.device)
