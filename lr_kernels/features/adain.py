"""adain: give queries, keys, values or latents the per-channel token statistics of a reference."""

import torch
from torch import Tensor

from .. import reference as specification
from ..runtime import backends
from ..runtime.checks import check_memory, check_number, fail, one_of
from ..runtime.ops import kernel
from ..runtime.tensors import resolved, resolved_or_none

_OP = "adain"


def adain(
    x: Tensor,
    reference: Tensor,
    *,
    mask: Tensor | None = None,
    reference_mask: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Adaptive instance normalization over tokens: per row, head and channel,

        out = (x - μ_x) / sqrt(var_x + eps) · sqrt(var_r + eps) + μ_r

    with the mean and the (biased) variance over the chosen tokens of x and of reference. Latents (B, C, h, w) go in as
    the view `latents.flatten(2).mT[..., None]`; `out[..., 0].mT.unflatten(2, (h, w))` brings them back without a copy.

    Args:
        x: (B, N, H, D), fp32, fp16 or bf16 (the reference backend also float64).
        reference: (B or 1, M, H, D); one row is shared by the batch. Strided views are read in place; only the last
            dimension must be contiguous.
        mask: bool (B or 1, N), the tokens to change: x's statistics are of these, the others come out as they are.
        reference_mask: bool (B or 1, M), the tokens that the reference's statistics are of.
        eps: added to both variances, above 0.
        backend: "auto", "cpu", "triton" or "reference". A name never falls back.

    Returns:
        (B, N, H, D) in x's dtype; where D is 1 with x's strides, else contiguous. A row where either choice of tokens
        is empty is unchanged. A NaN or Inf in a chosen token makes its row, head and channel NaN, in another token it
        has no effect.

    Raises:
        ValueError: a shape, device, stride or eps that does not fit, or a result beyond the memory.
        TypeError: a dtype that does not fit. RuntimeError: the named backend is not available.
        NotImplementedError: a named kernel backend where a gradient is required.

    X. Huang, S. Belongie, arXiv 1703.06868; on queries and keys of shared attention: A. Hertz et al., arXiv 2312.02133.
    """
    x, reference = resolved(_OP, "x", x), resolved(_OP, "reference", reference)
    mask, reference_mask = (
        resolved_or_none(_OP, label, table) for label, table in (("mask", mask), ("reference_mask", reference_mask))
    )
    eps = _check(x, reference, mask, reference_mask, eps)
    copied = sum(m.numel() for m in (mask, reference_mask) if m is not None and m.stride(1) != 1)
    check_memory(_OP, "x", x.numel() * x.element_size() + copied, x.device)
    name = backends.choose(_OP, backend, x.device, x.dtype, backends.forward_only(x, reference), "x")
    if name == "reference":
        check_memory(_OP, "backend 'reference'", 4 * 8 * (x.numel() + reference.numel()), x.device)
        return specification.adain(x, reference, mask=mask, reference_mask=reference_mask, eps=eps)
    layout = torch.preserve_format if x.shape[3] == 1 else torch.contiguous_format
    out = torch.empty_like(x, memory_format=layout)
    kernel(_OP, name)(x, reference, _dense(mask), _dense(reference_mask), eps, out)
    return out


def _dense(mask: Tensor | None) -> Tensor | None:
    """The mask with contiguous tokens; no copy if they are so already."""
    return mask if mask is None or mask.stride(1) == 1 else mask.contiguous()


def _check(x: Tensor, reference: Tensor, mask: Tensor | None, reference_mask: Tensor | None, eps: float) -> float:
    """Shapes, dtypes and devices of every argument, in the order of the signature; returns eps."""
    if x.dim() != 4:
        fail(_OP, "x", "shape (batch, tokens, heads, channels)", tuple(x.shape))
    if not x.is_floating_point():
        fail(_OP, "x", "one of float32, float16, bfloat16, float64", x.dtype, error=TypeError)
    batch, tokens, heads, channels = x.shape
    rows = reference.shape[0] if reference.dim() == 4 else 0
    if reference.dim() != 4 or not one_of(rows, 1, batch) or tuple(reference.shape[2:]) != (heads, channels):
        fail(_OP, "reference", f"shape ({batch} or 1, tokens, {heads}, {channels})", tuple(reference.shape))
    if reference.dtype != x.dtype:
        fail(_OP, "reference", str(x.dtype), reference.dtype, "cast both tensors to one dtype", TypeError)
    if reference.device != x.device:
        fail(_OP, "reference", str(x.device), reference.device)
    for name, tensor in (("x", x), ("reference", reference)):
        if channels > 1 and tensor.stride(3) != 1:
            fail(_OP, name, "a contiguous last dimension", f"stride {tensor.stride(3)}", "call .contiguous()")
    for name, table, count in (("mask", mask, tokens), ("reference_mask", reference_mask, reference.shape[1])):
        if table is None:
            continue
        if table.dtype != torch.bool:
            fail(_OP, name, "torch.bool", table.dtype, error=TypeError)
        if table.dim() != 2 or not one_of(table.shape[0], 1, batch) or table.shape[1] != count:
            fail(_OP, name, f"shape ({batch} or 1, {count})", tuple(table.shape))
        if table.device != x.device:
            fail(_OP, name, str(x.device), table.device)
    number = check_number(_OP, "eps", eps, "a number above 0", low=0)
    if number == 0:
        fail(_OP, "eps", "a number above 0", eps)
    return number
