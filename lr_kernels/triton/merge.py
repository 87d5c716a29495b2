"""merge_attention_states: one pass over the parts; a program merges a block of (token, head) rows."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.calls import Call
from ..runtime.schemas import MAX_PARTS
from .attention_arguments import by_dimension
from .launch import check_grid, on_device, strides

_INF = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["rows", "N", "H"])
def merge_attention_states_kernel(
    outs, lses,  # K x (B, N, H, D), K x fp32 (B, N, H)
    out, lse,  # (B, N, H, D), fp32 (B, N, H), contiguous
    rows, N, H,  # rows = B * N * H
    out_strides, lse_strides,  # (b, n, h) x K, times 16
    K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Join the partial results of a block of queries."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = row < rows
    h = row % H
    i = row // H % N
    b = row // H // N
    # Log-sum-exp of the parts; the second loop reads them again, from cache
    top = tl.full([BLOCK], -_INF, tl.float32)
    nans = tl.zeros([BLOCK], tl.int32)
    for k in tl.static_range(K):
        at = b * (lse_strides[0][k] >> 4) + i * (lse_strides[1][k] >> 4) + h * (lse_strides[2][k] >> 4)
        part = tl.load(lses[k] + at, mask=ok, other=0.0)
        top = tl.maximum(top, part)
        nans += tl.where(part != part, 1, 0)
    base = tl.where(top == -_INF, 0.0, top)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        at = b * (lse_strides[0][k] >> 4) + i * (lse_strides[1][k] >> 4) + h * (lse_strides[2][k] >> 4)
        total += tl.exp(tl.load(lses[k] + at, mask=ok, other=0.0) - base)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    merged = tl.where(empty, -_INF, base + tl.log(total))
    merged = tl.where((top == _INF) & (nans == 0), _INF, merged)
    tl.store(lse + row, merged, mask=ok)
    # Weighted sum; a part without a share adds nothing but its NaNs
    c = tl.arange(0, COLUMNS)
    inside = ok[:, None] & (c[None, :] < D)
    acc = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for k in tl.static_range(K):
        at = b * (lse_strides[0][k] >> 4) + i * (lse_strides[1][k] >> 4) + h * (lse_strides[2][k] >> 4)
        weight = tl.exp(tl.load(lses[k] + at, mask=ok, other=0.0) - base)
        share = tl.where(empty, 0.0, weight / total)[:, None]
        at = b * (out_strides[0][k] >> 4) + i * (out_strides[1][k] >> 4) + h * (out_strides[2][k] >> 4)
        part = tl.load(outs[k] + at[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
        acc += tl.where((share == 0) & (part == part), 0.0, share * part)
    tl.store(out + row[:, None] * D + c[None, :], acc.to(out.dtype.element_ty), mask=inside)


def merge_attention_states_triton(outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor) -> None:
    """Shapes as in the schema `merge_attention_states` of runtime/schemas.py."""
    _check(outs, lses, out, lse)
    # Early return for trivial cases
    if lse.numel() == 0:
        return
    arguments, constants, programs = launch_arguments(outs, lses, out, lse)
    grid = check_grid("merge_attention_states", programs)
    with on_device(out.device):
        merge_attention_states_kernel[grid](*arguments, **constants)


def launch_arguments(outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor) -> tuple[tuple, dict, int]:
    """(positional arguments, constants and options, number of programs) of the kernel."""
    B, N, H, D = out.shape
    columns = max(16, triton.next_power_of_2(D))
    block = max(1, (2048 if len(outs) <= 4 else 512) // columns)  # 16 parts of 2048 elements spill
    steps = [by_dimension([strides(x, 0, 1, 2) for x in parts]) for parts in (outs, lses)]
    arguments = (tuple(outs), tuple(lses), out, lse, B * N * H, N, H, *steps)
    constants = {"K": len(outs), "D": D, "BLOCK": block, "COLUMNS": columns, "num_warps": 4, "enable_fp_fusion": True}
    return arguments, constants, triton.cdiv(B * N * H, block)


def examples(arch: int) -> list[tuple]:
    """(name, kernel, positional arguments, constants and options) of launches whose registers the report tells."""
    x = torch.empty(2, 4096, 8, 160, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(2, 4096, 8, device="meta")
    found = []
    for parts in (3, 16):
        arguments, constants, _ = launch_arguments([x] * parts, [lse] * parts, x, lse)
        name = f"merge_attention_states K{parts} bf16"
        found.append((name, merge_attention_states_kernel, arguments, constants))
    return found


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor) -> None:
    """The arguments of merge_attention_states."""
    call = Call("merge_attention_states", out, "out")
    call.require(1 <= len(outs) <= MAX_PARTS, "outs", f"1 to {MAX_PARTS} entries", len(outs))
    call.lists(len(outs), lses=lses)
    shape = call.input("outs[0]", outs[0], ("batch", "tokens", "heads", "head_dim"))
    for i, (part, part_lse) in enumerate(zip(outs, lses)):
        call.input(f"outs[{i}]", part, shape)
        call.input(f"lses[{i}]", part_lse, shape[:3], 0, torch.float32)
    call.output("out", out, shape, 4)
    call.output("lse", lse, shape[:3], 3, torch.float32)
