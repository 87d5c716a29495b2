"""correspondence: matrix products tile by tile with a running best, both ways by the same kernel with swapped roles.

Tokens are first copied, padded and scaled by a power of two (exact), so that the products need no masks and do not
overflow; what is left of their norms, and NaN for padding and for tokens that are not finite, multiplies the products.
Large inputs fill the GPU by tiles of targets; for small ones the keys are split too, and merged in order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.calls import Call
from ..runtime.schemas import MAX_TOKENS
from .launch import INTERPRETED, check_grid, dot_precision, on_device, strides

_INF = tl.constexpr(float("inf"))
_PROGRAMS = 264
"""the programs that a launch should have: 2 for each of the 132 SMs of an H100"""


@triton.jit(do_not_specialize=["T", "C", "blocks", "x_b", "x_n"])
def correspondence_prepare_kernel(
    x,  # (R, T, C)
    scaled, inverse,  # (R, padded T, padded C), fp32 (R, padded T): 1 / norm of the scaled token
    T, C, blocks, x_b, x_n,
    PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of ROWS tokens. A zero vector has inverse 0; padding and what is not finite, NaN and the value 0."""
    pid = tl.program_id(0)
    r = (pid // blocks).to(tl.int64)
    i = pid % blocks * ROWS + tl.arange(0, ROWS)
    base = x + r * x_b + (i.to(tl.int64) * x_n)[:, None]
    largest = tl.zeros([ROWS], tl.float32)
    broken = tl.zeros([ROWS], tl.int32)
    for start in range(0, PADDED, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        value = tl.abs(tl.load(base + c[None, :], mask=(i < T)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.max(value, 1))
        broken += tl.sum(tl.where(value < _INF, 0, 1), 1)
    usable = (broken == 0) & (i < T)
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    scale = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)  # 2^-e, at least 2^-126
    squares = tl.zeros([ROWS], tl.float32)
    at = scaled + ((r * blocks * ROWS + i) * PADDED)[:, None]
    for start in range(0, PADDED, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        value = tl.load(base + c[None, :], mask=usable[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        value = (value * scale[:, None]).to(scaled.dtype.element_ty)
        squares += tl.sum(value.to(tl.float32) * value.to(tl.float32), 1)
        tl.store(at + c[None, :], value)
    result = tl.where(squares > 0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(squares > 0, squares, 1.0))), 0.0)
    tl.store(inverse + r * blocks * ROWS + i, tl.where(usable, result, float("nan")))


@triton.jit(do_not_specialize=["tiles", "splits", "split_tiles", "key_tiles", "query_b", "key_b"])
def correspondence_best_kernel(
    query, query_inverse,  # (R, padded N, padded C), fp32 (R, padded N)
    key, key_inverse,  # the same of M tokens
    top, index,  # fp32 and int32 (B, splits, padded N): similarity to the best key of the split, and which it is
    tiles, splits, split_tiles, key_tiles, query_b, key_b,  # query_b, key_b: tokens from row to row, 0 where shared
    PADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The best key of each query within one split of the keys."""
    pid = tl.program_id(0)
    split = pid // tiles % splits
    b = (pid // tiles // splits).to(tl.int64)
    i = pid % tiles * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    q_at = query + ((b * query_b + i) * PADDED)[:, None] + k[None, :]
    q_inverse = tl.load(query_inverse + b * query_b + i)
    best = tl.full([BM], -_INF, tl.float32)
    which = tl.zeros([BM], tl.int32)
    for tile in range(split * split_tiles, tl.minimum((split + 1) * split_tiles, key_tiles)):
        j = tile * BN + tl.arange(0, BN)
        k_at = key + ((b * key_b + j) * PADDED)[:, None] + k[None, :]
        products = tl.zeros([BM, BN], tl.float32)
        for start in range(0, PADDED, BK):
            x = tl.load(q_at + start)
            y = tl.load(k_at + start)
            if UPCAST:
                x = x.to(tl.float32)
                y = y.to(tl.float32)
            products = tl.dot(x, tl.trans(y), products, input_precision=PRECISION)
        similarity = products * (q_inverse[:, None] * tl.load(key_inverse + b * key_b + j)[None, :])
        similarity = tl.where(similarity == similarity, similarity, -_INF)
        found, place = tl.max(similarity, 1, return_indices=True, return_indices_tie_break_left=True)
        which = tl.where(found > best, tile * BN + place, which)
        best = tl.maximum(best, found)
    at = (b * splits + split) * tiles * BM + i
    tl.store(top + at, best)
    tl.store(index + at, which)


@triton.jit
def _merged(top, index, at, step, splits, ok, BLOCK: tl.constexpr):
    """The best of all splits; of equal ones the first, which has the lower index."""
    best = tl.full([BLOCK], -_INF, tl.float32)
    which = tl.zeros([BLOCK], tl.int32)
    for split in range(splits):
        found = tl.load(top + at + split * step, mask=ok, other=-_INF)
        which = tl.where(found > best, tl.load(index + at + split * step, mask=ok, other=0), which)
        best = tl.maximum(best, found)
    return best, which


@triton.jit(do_not_specialize=["N", "blocks", "splits", "step", "back_splits", "back_step", "columns", "radius_b"])
def correspondence_check_kernel(
    top, index,  # fp32, int32 (B, splits, step)
    back_top, back_index,  # fp32, int32 (B, back_splits, back_step)
    radius_squared,  # int64 (B or 1,)
    out, consistent,  # int64 (B, N), bool (B, N), contiguous
    N, blocks, splits, step, back_splits, back_step, columns, radius_b, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the splits, follow the way back, compare its end with its start."""
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    i = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = i < N
    best, there = _merged(top, index, b * splits * step + i, step, splits, ok, BLOCK)
    _, back = _merged(back_top, back_index, b * back_splits * back_step + there, back_step, back_splits, ok, BLOCK)
    dy = (back // columns - i // columns).to(tl.int64)
    dx = (back % columns - i % columns).to(tl.int64)
    tl.store(out + b * N + i, there.to(tl.int64), mask=ok)
    near = dy * dy + dx * dx <= tl.load(radius_squared + b * radius_b)
    tl.store(consistent + b * N + i, (best > -_INF) & near, mask=ok)


class _Tokens(NamedTuple):
    """One token set, ready for products."""

    scaled: Tensor  # (R, padded, padded C)
    inverse: Tensor  # fp32 (R, padded)


def correspondence_triton(
    target: Tensor, reference: Tensor, columns: int, radius_squared: Tensor, index: Tensor, consistent: Tensor
) -> None:
    """Shapes as in the schema `correspondence` of runtime/schemas.py."""
    _check(target, reference, columns, radius_squared, index, consistent)
    # Early return for trivial cases
    if index.numel() == 0:
        return
    launches = launch_arguments(target, reference, columns, radius_squared, index, consistent)
    with on_device(target.device):
        for kernel, arguments, constants, programs in launches:
            kernel[check_grid("correspondence", programs)](*arguments, **constants)


def launch_arguments(
    target: Tensor, reference: Tensor, columns: int, radius_squared: Tensor, index: Tensor, consistent: Tensor
) -> list[tuple]:
    """(kernel, positional arguments, constants and options, number of programs) of each launch."""
    B, N, C = target.shape
    exact = target.dtype == torch.float32
    BM = BN = 32 if INTERPRETED else 64 if exact else 128
    BK = 32 if exact else 64
    padded = triton.cdiv(C, BK) * BK
    launches: list[tuple] = []

    def prepare(x: Tensor) -> _Tokens:
        R, T, _ = x.shape
        rows, count = 16, triton.cdiv(T, BM) * BM
        tokens = _Tokens(x.new_empty((R, count, padded)), x.new_empty((R, count), dtype=torch.float32))
        arguments = (x, *tokens, T, C, count // rows, *strides(x, 0, 1))
        constants = {"PADDED": padded, "ROWS": rows, "COLUMNS": BK, "num_warps": 4, "enable_fp_fusion": True}
        launches.append((correspondence_prepare_kernel, arguments, constants, R * count // rows))
        return tokens

    def best(query: _Tokens, key: _Tokens) -> tuple[Tensor, Tensor]:
        count = query.inverse.shape[1]
        tiles, key_tiles = count // BM, key.inverse.shape[1] // BN
        splits = min(key_tiles, triton.cdiv(_PROGRAMS, B * tiles))
        split_tiles = triton.cdiv(key_tiles, splits)
        splits = triton.cdiv(key_tiles, split_tiles)
        found = query.inverse.new_empty((B, splits, count)), index.new_empty((B, splits, count), dtype=torch.int32)
        arguments = (
            *query, *key, *found, tiles, splits, split_tiles, key_tiles,
            *strides(query.inverse, 0), *strides(key.inverse, 0),
        )  # fmt: skip
        constants = {
            "PADDED": padded, "BM": BM, "BN": BN, "BK": BK, "PRECISION": dot_precision(target.dtype),
            "UPCAST": INTERPRETED, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True,
        }  # fmt: skip
        launches.append((correspondence_best_kernel, arguments, constants, B * splits * tiles))
        return found

    targets, references = prepare(target), prepare(reference)
    there, back = best(targets, references), best(references, targets)
    block = 256
    blocks = triton.cdiv(N, block)
    sizes = (N, blocks, *there[0].shape[1:], *back[0].shape[1:], columns, *strides(radius_squared, 0))
    constants = {"BLOCK": block, "num_warps": 4}
    arguments = (*there, *back, radius_squared, index, consistent, *sizes)
    return [*launches, (correspondence_check_kernel, arguments, constants, B * blocks)]


def examples(arch: int) -> list[tuple]:
    """(name, kernel, positional arguments, constants and options) of launches whose registers the report tells."""
    index, radii = (torch.empty(2, *n, dtype=torch.int64, device="meta") for n in ((4096,), ()))
    chosen = torch.empty(2, 4096, dtype=torch.bool, device="meta")
    found = []
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        x = torch.empty(2, 4096, 320, dtype=dtype, device="meta")
        for kernel, *rest, _ in launch_arguments(x, x, 64, radii, index, chosen)[::2]:  # of two alike the first
            found.append((f"{kernel.fn.__name__.removesuffix('_kernel')} {label}", kernel, *rest))
    return found


def _check(
    target: Tensor, reference: Tensor, columns: int, radius_squared: Tensor, index: Tensor, consistent: Tensor
) -> None:
    """The arguments of correspondence."""
    call = Call("correspondence", target, "target")
    batch, tokens, channels = call.input("target", target, ("batch", "tokens", "channels"))
    others = call.input("reference", reference, ((batch, 1), "tokens", channels))[1]
    call.require(tokens <= MAX_TOKENS, "target", f"at most {MAX_TOKENS} tokens", tokens)
    call.require(1 <= others <= MAX_TOKENS, "reference", f"1 to {MAX_TOKENS} tokens", others)
    call.require(channels >= 1, "target", "at least one channel", channels)
    call.require(columns >= 1, "columns", "at least 1", columns)
    call.input("radius_squared", radius_squared, ((batch, 1),), 1, torch.int64)
    call.output("index", index, (batch, tokens), 2, torch.int64)
    call.output("consistent", consistent, (batch, tokens), 2, torch.bool)
