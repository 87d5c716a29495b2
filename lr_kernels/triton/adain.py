"""adain in three launches: partial statistics of x and of the reference, a strip of channels and a run of tokens each;
then every program merges the partials of its strip and writes its tokens. No atomics: the same bits every time.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.calls import Call
from .launch import check_grid, on_device, strides

_TILE = 2048
"""elements of a tile: 16 a thread"""
_RUNS = 64
"""the most partial statistics that are merged"""


@triton.jit
def _merge(count, mean, squares, n, other_mean, other_squares):
    """Statistics of two disjoint sets of tokens: T. Chan, G. Golub, R. LeVeque, 1979. Squares are of differences."""
    total = count + n
    share = n / tl.maximum(total, 1.0)
    delta = other_mean - mean
    return total, mean + delta * share, squares + other_squares + delta * delta * count * share


@triton.jit
def _chosen(mask, t, ok):
    """Which of the tokens t are chosen; mask: pointer at the row, or None: all that are `ok`."""
    if mask is not None:
        ok = ok & (tl.load(mask + t, mask=ok, other=0) != 0)
    return ok


@triton.jit(do_not_specialize=["N", "C", "D", "runs", "strips", "tiles", "x_b", "x_h", "mask_b"])
def adain_statistics_kernel(
    x, mask,  # (R, N, H, D), uint8 (R or 1, N) or None
    partial,  # fp32 (R, runs, 3, C): count, mean, sum of squared differences; C = H * D
    N, C, D, runs, strips, tiles,  # a run is `tiles` tiles of tokens
    x_b, x_n, x_h, mask_b, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Partial statistics of a run of tokens, for a strip of channels."""
    pid = tl.program_id(0)
    c = pid % strips * COLUMNS + tl.arange(0, COLUMNS)
    run = pid // strips % runs
    r = (pid // strips // runs).to(tl.int64)
    base = x + r * x_b + (c // D).to(tl.int64) * x_h + c % D
    if mask is not None:
        mask += r * mask_b
    count = 0.0
    mean = tl.zeros([COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for tile in range(tiles):
        t = (run * tiles + tile) * ROWS + tl.arange(0, ROWS)
        ok = _chosen(mask, t, t < N)
        at = base[None, :] + (t.to(tl.int64) * x_n)[:, None]
        value = tl.load(at, mask=ok[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        n = tl.sum(tl.where(ok, 1.0, 0.0), 0)
        tile_mean = tl.sum(value, 0) / tl.maximum(n, 1.0)
        difference = tl.where(ok[:, None], value - tile_mean[None, :], 0.0)
        count, mean, squares = _merge(count, mean, squares, n, tile_mean, tl.sum(difference * difference, 0))
    at = partial + (r * runs + run) * 3 * C + c
    tl.store(at, tl.zeros([COLUMNS], tl.float32) + count, mask=c < C)
    tl.store(at + C, mean, mask=c < C)
    tl.store(at + 2 * C, squares, mask=c < C)


@triton.jit
def _statistics(partial, runs, C, c, eps, COLUMNS: tl.constexpr):
    """Count, mean and deviation of COLUMNS channels over all runs; partial: pointer at the row."""
    count = tl.zeros([COLUMNS], tl.float32)
    mean = tl.zeros([COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for run in range(runs):
        at = partial + run * 3 * C + c
        n = tl.load(at, mask=c < C, other=0.0)
        other_mean = tl.load(at + C, mask=c < C, other=0.0)
        other_squares = tl.load(at + 2 * C, mask=c < C, other=0.0)
        count, mean, squares = _merge(count, mean, squares, n, other_mean, other_squares)
    return count, mean, tl.sqrt_rn(squares / tl.maximum(count, 1.0) + eps)


@triton.jit(
    do_not_specialize=[
        "N", "C", "D", "runs", "strips", "tiles", "other_runs", "other_b", "x_b", "x_h", "mask_b", "out_b", "out_h",
    ]
)  # fmt: skip
def adain_apply_kernel(
    x, mask, own, other,  # (B, N, H, D), uint8 (B or 1, N) or None, partials of x and of the reference
    out,  # (B, N, H, D)
    N, C, D, runs, strips, tiles, other_runs, other_b, eps,
    x_b, x_n, x_h, mask_b, out_b, out_n, out_h, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge the partial statistics of both sides and write a run of tokens."""
    pid = tl.program_id(0)
    c = pid % strips * COLUMNS + tl.arange(0, COLUMNS)
    run = pid // strips % runs
    b = (pid // strips // runs).to(tl.int64)
    count, mean, deviation = _statistics(own + b * runs * 3 * C, runs, C, c, eps, COLUMNS)
    other_count, other_mean, other_deviation = _statistics(other + b * other_b, other_runs, C, c, eps, COLUMNS)
    gain = other_deviation / deviation
    changed = (count > 0) & (other_count > 0)
    head = (c // D).to(tl.int64)
    source = x + b * x_b + head * x_h + c % D
    target = out + b * out_b + head * out_h + c % D
    if mask is not None:
        mask += b * mask_b
    for tile in range(tiles):
        t = (run * tiles + tile) * ROWS + tl.arange(0, ROWS)
        chosen = _chosen(mask, t, t < N)
        inside = (t < N)[:, None] & (c < C)[None, :]
        t64 = t.to(tl.int64)
        value = tl.load(source[None, :] + (t64 * x_n)[:, None], mask=inside, other=0.0).to(tl.float32)
        moved = (value - mean[None, :]) * gain[None, :] + other_mean[None, :]
        value = tl.where(chosen[:, None] & changed[None, :], moved, value)
        tl.store(target[None, :] + (t64 * out_n)[:, None], value.to(out.dtype.element_ty), mask=inside)


def adain_triton(
    x: Tensor, reference: Tensor, mask: Tensor | None, reference_mask: Tensor | None, eps: float, out: Tensor
) -> None:
    """Shapes as in the schema `adain` of runtime/schemas.py."""
    _check(x, reference, mask, reference_mask, eps, out)
    # Early return for trivial cases
    if out.numel() == 0:
        return
    if reference.shape[1] == 0:
        out.copy_(x)
        return
    with on_device(x.device):
        for kernel, arguments, constants, programs in launch_arguments(x, reference, mask, reference_mask, eps, out):
            kernel[check_grid("adain", programs)](*arguments, **constants)


def launch_arguments(
    x: Tensor, reference: Tensor, mask: Tensor | None, reference_mask: Tensor | None, eps: float, out: Tensor
) -> list[tuple]:
    """(kernel, positional arguments, constants and options, number of programs) of each launch."""
    H, D = x.shape[2:]
    C = H * D
    columns = min(64, triton.next_power_of_2(C))
    rows = _TILE // columns
    strips = triton.cdiv(C, columns)
    constants = {"ROWS": rows, "COLUMNS": columns, "num_warps": 4, "enable_fp_fusion": True}
    launches: list[tuple] = []
    partials = []
    for tensor, chosen in ((x, mask), (reference, reference_mask)):
        R, N = tensor.shape[:2]
        tiles = max(4, triton.cdiv(N, _RUNS * rows))
        runs = triton.cdiv(N, tiles * rows)
        partials.append(tensor.new_empty((R, runs, 3, C), dtype=torch.float32))
        table = None if chosen is None else chosen.view(torch.uint8)
        sizes = (N, C, D, runs, strips, tiles)
        step = (*strides(tensor, 0, 1, 2), 0 if table is None else strides(table, 0)[0])
        launches.append(
            (adain_statistics_kernel, (tensor, table, partials[-1], *sizes, *step), constants, R * runs * strips)
        )
    own, other = partials
    (_, table, _, *rest), programs = launches[0][1], launches[0][3]
    arguments = (
        x, table, own, other, out, *rest[:6], other.shape[1], *strides(other, 0), eps, *rest[6:],
        *strides(out, 0, 1, 2),
    )  # fmt: skip
    return [*launches, (adain_apply_kernel, arguments, constants, programs)]


def examples(arch: int) -> list[tuple]:
    """(name, kernel, positional arguments, constants and options) of launches whose registers the report tells."""
    tokens = torch.empty(2, 4096, 8, 40, dtype=torch.bfloat16, device="meta")
    latents = torch.empty(2, 4, 4096, dtype=torch.bfloat16, device="meta").mT[..., None]
    chosen = torch.empty(2, 4096, dtype=torch.bool, device="meta")
    found = []
    for name, x in (("", tokens), (" latents", latents)):
        for kernel, *rest, _ in launch_arguments(x, x, chosen, chosen, 1e-5, x)[1:]:  # the first is like the second
            found.append((kernel.fn.__name__.removesuffix("_kernel") + name, kernel, *rest))
    return found


def _check(
    x: Tensor, reference: Tensor, mask: Tensor | None, reference_mask: Tensor | None, eps: float, out: Tensor
) -> None:
    """The arguments of adain."""
    call = Call("adain", x, "x")
    batch, tokens, *channels = call.input("x", x, ("batch", "tokens", "heads", "head_dim"))
    others = call.input("reference", reference, ((batch, 1), "tokens", *channels))[1]
    for name, table, count in (("mask", mask, tokens), ("reference_mask", reference_mask, others)):
        if table is not None:
            call.input(name, table, ((batch, 1), count), 1, torch.bool)
    call.require(eps > 0 and math.isfinite(eps), "eps", "a number above 0", eps)
    call.output("out", out, x.shape)
