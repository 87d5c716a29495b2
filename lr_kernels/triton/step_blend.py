"""step_blend: combine predictions, update the sample, blend with the background, in one pass over the latents.

The coefficients are a device table indexed by a device step counter, so a captured graph serves every step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.step_blend_checks import check_step_blend
from .launch import check_grid, dense_last, on_device, strides

_BLOCK = 1024
"""elements of a program: 16-byte accesses of 4 warps"""


@triton.jit
def _add(total, weight, x, start, i, plane):
    """total + weight * x[start + i]. A tensor of weight 0 is not read (no branch: loads overlap); NaN where a tensor of
    another weight is missing, since nothing here can raise."""
    if x is None:
        total += tl.where(weight != 0, float("nan"), 0.0)
    else:
        end = tl.where(weight != 0, plane, 0)
        total += weight * tl.load(x + start + i, mask=i < end, other=0.0).to(tl.float32)
    return total


@triton.jit(
    do_not_specialize=["row", "C", "steps", "blocks", "copy_size", "coefficient_step", "coefficient_b", "mask_b"]
)
def step_blend_kernel(
    sample, predictions,  # (B, C, plane), K x (B, C, plane)
    coefficients, step, row,  # fp32 (steps, B or 1, K + 9): g_0 .. g_{K-1}, a, e, sigma, h, p, q, c, d, s; int32 (1,)
    mask, background, noise, history,  # fp32 (B or 1, plane) or None, (B, C, plane) or None
    keep_rows,  # bool (B,) or None
    out, model_input, history_out,  # (B, C, plane), (copies, B, C, plane) or None, (B, C, plane) or None
    plane, C, steps, blocks, copy_size, coefficient_step, coefficient_b, mask_b,
    K: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The next latents of one block of one channel, and what else is wanted of them."""
    pid = tl.program_id(0)
    channel = (pid // blocks).to(tl.int64)
    b = channel // C
    i = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = i < plane
    start = channel * plane
    at = start + i
    zero = tl.zeros([BLOCK], tl.float32)
    lost = float("nan")
    now = row
    if step is not None:
        now = tl.load(step)
    # A step outside the table gives NaN
    known = (now >= 0) & (now < steps)
    g = coefficients + now.to(tl.int64) * coefficient_step + b * coefficient_b
    c = g + K
    live = 1
    if keep_rows is not None:
        live = 1 - tl.load(keep_rows + b).to(tl.int32)
    result = zero
    clean = zero
    if live != 0:
        a = tl.load(c, mask=known, other=lost)
        e = tl.load(c + 1, mask=known, other=lost)
        sigma = tl.load(c + 2, mask=known, other=lost)
        h = tl.load(c + 3, mask=known, other=lost)
        used = e != 0
        if history_out is not None:
            d = tl.load(c + 7, mask=known, other=lost)
            used = used | (d != 0)
        guided = zero
        for k in tl.static_range(K):
            weight = tl.where(used, tl.load(g + k, mask=known, other=lost), 0.0)
            guided = _add(guided, weight, predictions[k], start, i, plane)
        result = _add(result, a, sample, start, i, plane)
        result = _add(result, sigma, noise, start, i, plane)
        result = _add(result, h, history, start, i, plane)
        result += tl.where(e == 0, 0.0, e * guided)
        if history_out is not None:
            clean = _add(clean, tl.load(c + 6, mask=known, other=lost), sample, start, i, plane)
            clean += tl.where(d == 0, 0.0, d * guided)
    if background is not None:
        p = tl.load(c + 4, mask=known, other=lost)
        q = tl.load(c + 5, mask=known, other=lost)
        if mask is None:  # then only the rows to keep take it
            p = tl.where(live != 0, 0.0, p)
            q = tl.where(live != 0, 0.0, q)
        kept = _add(_add(zero, p, background, start, i, plane), q, noise, start, i, plane)
        m = zero + live
        if mask is not None:
            if live != 0:
                m = tl.load(mask + b * mask_b + i, mask=ok, other=0.0)
        result = tl.where(m == 1, result, tl.where(m == 0, kept, m * result + (1.0 - m) * kept))
    tl.store(out + at, result.to(out.dtype.element_ty), mask=ok)
    if history_out is not None:
        tl.store(history_out + at, clean.to(out.dtype.element_ty), mask=ok)
    if model_input is not None:
        scaled = (tl.load(c + 8, mask=known, other=lost) * result).to(out.dtype.element_ty)
        for j in tl.static_range(COPIES):
            tl.store(model_input + at + j * tl.cast(copy_size, tl.int64), scaled, mask=ok)


def step_blend_triton(
    sample: Tensor, predictions: list[Tensor], coefficients: Tensor, step: Tensor | None, row: int,
    mask: Tensor | None, background: Tensor | None, noise: Tensor | None, history: Tensor | None,
    keep_rows: Tensor | None, out: Tensor, model_input: Tensor | None, history_out: Tensor | None,
) -> None:  # fmt: skip
    """Shapes as in the schema `step_blend` of runtime/schemas.py; the outputs are contiguous."""
    check_step_blend(
        sample, predictions, coefficients, step, row, mask, background, noise, history, keep_rows,
        out, model_input, history_out,
    )  # fmt: skip
    # Early return for trivial cases
    if out.numel() == 0:
        return
    arguments, constants, programs = launch_arguments(
        sample, predictions, coefficients, step, row, mask, background, noise, history, keep_rows,
        out, model_input, history_out,
    )  # fmt: skip
    grid = check_grid("step_blend", programs)
    with on_device(sample.device):
        step_blend_kernel[grid](*arguments, **constants)


def launch_arguments(
    sample: Tensor, predictions: list[Tensor], coefficients: Tensor, step: Tensor | None, row: int,
    mask: Tensor | None, background: Tensor | None, noise: Tensor | None, history: Tensor | None,
    keep_rows: Tensor | None, out: Tensor, model_input: Tensor | None, history_out: Tensor | None,
) -> tuple[tuple, dict, int]:  # fmt: skip
    """(positional arguments, constants and options, number of programs) of the kernel."""
    B, C, h, w = sample.shape
    blocks = triton.cdiv(h * w, _BLOCK)
    table = dense_last(coefficients)
    mask, background, noise, history, keep_rows = (
        None if x is None else x.contiguous() for x in (mask, background, noise, history, keep_rows)
    )
    arguments = (
        sample.contiguous(), tuple(x.contiguous() for x in predictions), table, step, row,
        mask, background, noise, history, keep_rows, out, model_input, history_out,
        h * w, C, table.shape[0], blocks, out.numel(),
        *strides(table, 0, 1), 0 if mask is None else strides(mask, 0)[0],
    )  # fmt: skip
    copies = 0 if model_input is None else model_input.shape[0] // B
    constants = {"K": len(predictions), "COPIES": copies, "BLOCK": _BLOCK, "num_warps": 4, "enable_fp_fusion": True}
    return arguments, constants, B * C * blocks


def examples(arch: int) -> list[tuple]:
    """(name, kernel, positional arguments, constants and options) of launches whose registers the report tells."""
    x = torch.empty(2, 4, 64, 64, dtype=torch.bfloat16, device="meta")
    table = torch.empty(50, 2, 15, device="meta")
    step = torch.empty(1, dtype=torch.int32, device="meta")
    keep = torch.empty(2, dtype=torch.bool, device="meta")
    twice, mask = torch.cat([x, x]), torch.empty(2, 1, 64, 64, device="meta")[:, 0]
    plain = launch_arguments(x, [x] * 4, table, step, 0, None, None, None, None, None, x, None, None)
    full = launch_arguments(x, [x] * 6, table, step, 0, mask, x, x, x, keep, x, twice, x)
    return [
        ("step_blend K4 bf16", step_blend_kernel, *plain[:2]),
        ("step_blend K6 bf16 full", step_blend_kernel, *full[:2]),
    ]
