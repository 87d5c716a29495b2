"""compact_keys: masks -> lists of visible keys, on the device, a program per list."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.calls import Call
from ..runtime.schemas import MAX_TOKENS
from .launch import check_grid, dense_last, on_device, strides

_BLOCK = 1024
"""keys of a step"""


@triton.jit(do_not_specialize=["M", "query_class", "mask_r", "groups_r"])
def compact_keys_kernel(
    mask, groups,  # bool (R or 1, M) or None, uint8 (R or 1, M) or None
    index, count,  # int32 (R, M), (R,) of one class, contiguous
    M, query_class, mask_r, groups_r, BLOCK: tl.constexpr,
):  # fmt: skip
    """The list of the keys of one row that one class of queries sees."""
    r = tl.program_id(0).to(tl.int64)
    index += r * M
    total = 0
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ok = j < M
        seen = ok
        if mask is not None:
            seen = seen & (tl.load(mask + r * mask_r + j, mask=ok, other=0).to(tl.int32) != 0)
        if groups is not None:
            bits = tl.load(groups + r * groups_r + j, mask=ok, other=0).to(tl.int32)
            seen = seen & ((bits & query_class) != 0)
        one = seen.to(tl.int32)
        tl.store(index + total + tl.cumsum(one, 0) - 1, j, mask=seen)
        total += tl.sum(one, 0)
    for start in range(total, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        tl.store(index + j, tl.zeros([BLOCK], tl.int32), mask=j < M)
    tl.store(count + r, total)


def compact_keys_triton(
    mask: Tensor | None, groups: Tensor | None, classes: Sequence[int], index: Tensor, count: Tensor
) -> None:
    """Shapes as in the schema `compact_keys` of runtime/schemas.py; the outputs are contiguous."""
    _check(mask, groups, classes, index, count)
    # Early return for trivial cases
    if count.numel() == 0:
        return
    with on_device(index.device):
        for c in range(len(classes)):
            arguments, constants, programs = launch_arguments(mask, groups, classes[c], index[c], count[c])
            compact_keys_kernel[check_grid("compact_keys", programs)](*arguments, **constants)


def launch_arguments(
    mask: Tensor | None, groups: Tensor | None, query_class: int, index: Tensor, count: Tensor
) -> tuple[tuple, dict, int]:
    """(positional arguments, constants and options, number of programs) of the kernel."""
    R, M = index.shape
    mask, groups = dense_last(mask), dense_last(groups)
    steps = [0 if x is None else strides(x, 0)[0] for x in (mask, groups)]
    return (mask, groups, index, count, M, query_class, *steps), {"BLOCK": _BLOCK, "num_warps": 4}, R


def examples(arch: int) -> list[tuple]:
    """(name, kernel, positional arguments, constants and options) of launches whose registers the report tells."""
    mask = torch.empty(2, 4096, dtype=torch.bool, device="meta")
    index, count = (
        torch.empty(2, 4096, dtype=torch.int32, device="meta"),
        torch.empty(2, dtype=torch.int32, device="meta"),
    )
    arguments, constants, _ = launch_arguments(mask, mask.to(torch.uint8), 3, index, count)
    return [("compact_keys", compact_keys_kernel, arguments, constants)]


def _check(mask: Tensor | None, groups: Tensor | None, classes: Sequence[int], index: Tensor, count: Tensor) -> None:
    """The arguments of compact_keys."""
    call = Call("compact_keys", index, "index", (torch.int32,))
    for i, c in enumerate(classes):
        call.require(0 <= c <= 255, f"classes[{i}]", "0 to 255", c)
    call.require(index.dim() == 3, "index", "shape (classes, rows, keys)", tuple(index.shape))
    _, rows, keys = index.shape
    call.require(keys <= MAX_TOKENS, "index", f"at most {MAX_TOKENS} keys", keys)
    for name, x, dtype in (("mask", mask, torch.bool), ("groups", groups, torch.uint8)):
        if x is not None:
            call.input(name, x, ((rows, 1), keys), 1, dtype)
    call.output("index", index, (len(classes), rows, keys), 3)
    call.output("count", count, (len(classes), rows), 2)
