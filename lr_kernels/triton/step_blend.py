"""step_blend: combine predictions, update the sample, blend with the background, in one pass over the latents.

The coefficients are a device table indexed by a device step counter, so a captured graph serves every step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_grid, dense_last, on_device, strides

_BLOCK = 1024
"""elements of a program: 16-byte accesses of 4 warps"""


@triton.jit(do_not_specialize=["C", "steps", "blocks", "coefficient_step", "coefficient_b", "mask_b"])
def step_blend_kernel(
    sample, predictions,  # (B, C, plane), K x (B, C, plane)
    coefficients, step,  # fp32 (steps, B or 1, K + 4): w_0 .. w_{K-1}, a, sigma, p, q; int32 (1,)
    mask, background, noise,  # fp32 (B or 1, plane) or None, (B, C, plane) or None
    out,  # (B, C, plane)
    plane, C, steps, blocks, coefficient_step, coefficient_b, mask_b,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    channel = (pid // blocks).to(tl.int64)
    b = channel // C
    i = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = i < plane
    at = channel * plane + i
    # A step outside the table gives NaN: it cannot raise without a synchronization
    now = tl.load(step)
    known = (now >= 0) & (now < steps)
    c = coefficients + now.to(tl.int64) * coefficient_step + b * coefficient_b
    result = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        w = tl.load(c + k, mask=known, other=float("nan"))
        if w != 0:
            result += w * tl.load(predictions[k] + at, mask=ok, other=0.0).to(tl.float32)
    a = tl.load(c + K, mask=known, other=float("nan"))
    if a != 0:
        result += a * tl.load(sample + at, mask=ok, other=0.0).to(tl.float32)
    if noise is not None:
        sigma = tl.load(c + K + 1, mask=known, other=0.0)
        if sigma != 0:
            result += sigma * tl.load(noise + at, mask=ok, other=0.0).to(tl.float32)
    if mask is not None:
        p = tl.load(c + K + 2, mask=known, other=float("nan"))
        kept = p * tl.load(background + at, mask=ok, other=0.0).to(tl.float32)
        if noise is not None:
            q = tl.load(c + K + 3, mask=known, other=0.0)
            if q != 0:
                kept += q * tl.load(noise + at, mask=ok, other=0.0).to(tl.float32)
        m = tl.load(mask + b * mask_b + i, mask=ok, other=0.0)
        mixed = m * result + (1.0 - m) * kept
        result = tl.where(m == 1, result, tl.where(m == 0, kept, mixed))
    tl.store(out + at, result.to(out.dtype.element_ty), mask=ok)


def step_blend_triton(
    sample: Tensor, predictions: list[Tensor], coefficients: Tensor, step: Tensor,
    mask: Tensor | None, background: Tensor | None, noise: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Shapes as in the schema `step_blend` of lr_kernels/ops.py."""
    # Early return for trivial cases
    if out.numel() == 0:
        return
    dense = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    arguments, constants, programs = launch_arguments(
        sample, predictions, coefficients, step, mask, background, noise, dense
    )
    grid = check_grid("step_blend", programs)
    with on_device(sample.device):
        step_blend_kernel[grid](*arguments, **constants)
    if dense is not out:
        out.copy_(dense)


def launch_arguments(
    sample: Tensor, predictions: list[Tensor], coefficients: Tensor, step: Tensor,
    mask: Tensor | None, background: Tensor | None, noise: Tensor | None, out: Tensor,
) -> tuple[tuple, dict, int]:  # fmt: skip
    """(positional arguments, constants and options, number of programs) of the kernel."""
    B, C, h, w = sample.shape
    blocks = triton.cdiv(h * w, _BLOCK)
    table = dense_last(coefficients)
    weights = None if mask is None else mask.contiguous()
    arguments = (
        sample.contiguous(), tuple(x.contiguous() for x in predictions), table, step, weights,
        None if mask is None else background.contiguous(), None if noise is None else noise.contiguous(), out,
        h * w, C, table.shape[0], blocks, *strides(table, 0, 1), 0 if weights is None else strides(weights, 0)[0],
    )  # fmt: skip
    constants = {"K": len(predictions), "BLOCK": _BLOCK, "num_warps": 4, "enable_fp_fusion": True}
    return arguments, constants, B * C * blocks
