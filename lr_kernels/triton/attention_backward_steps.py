"""The steps that the two backward kernels of attention share."""

import math

import triton
import triton.language as tl

from .sources import (
    INF,
    LOG2E,
    MAX,
    in_range,
    key_entries,
    key_head,
    key_list,
    key_shift,
    key_tokens,
    load_parts,
    per_head,
    pick,
    pick_int,
    query_ranges,
    query_tokens,
    range_places,
    source_row,
    to_log2,
)

COARSE = tl.constexpr(8192 / math.log(2))
"""Beyond this an lse is its maximum alone: in fp32 the log of the sum is lost beside it."""


@triton.jit
def products(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a · bᵀ of tensors in two parts."""
    s = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if D1 > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision=PRECISION)
    return s


@triton.jit
def add_products(acc0, acc1, w, x0, x1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """acc + w · x of tensors in two parts."""
    w = w.to(x0.dtype)
    acc0 = tl.dot(w, x0, acc0, input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(w, x1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def store_parts(at, x0, x1, ok, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Store columns [0, D0) and [D0, D0 + D1) of the rows `ok`."""
    c0 = tl.arange(0, D0)
    W0: tl.constexpr = D0 if D1 > 0 else D
    tl.store(at + c0[None, :], x0.to(at.dtype.element_ty), mask=ok[:, None] & (c0[None, :] < W0))
    if D1 > 0:
        c1 = tl.arange(0, D1)
        tl.store(at + (D0 + c1)[None, :], x1.to(at.dtype.element_ty), mask=ok[:, None] & (c1[None, :] < D - D0))


@triton.jit
def load_lse(lse, places, ok):
    """fp64 natural-log lse -> fp32 (log2 units, what rounding took); inf, which makes P 0, where no key was seen."""
    natural = tl.load(lse + places, mask=ok, other=-INF)
    exact = natural * 1.4426950408889634
    top = tl.where(tl.abs(natural) < INF, tl.minimum(tl.maximum(exact, -MAX), MAX), exact).to(tl.float32)
    rest = (exact - top.to(tl.float64)).to(tl.float32)
    return tl.where(natural == -INF, INF, top), tl.where(tl.abs(top) < INF, rest, 0.0)


@triton.jit
def weights(t):
    """P, at most 1: what the rounding of lse adds to a huge logit must not become an infinity."""
    return tl.exp2(tl.minimum(t, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def source_logits(
    key, rows, key_index, key_count, key_bias, logit_scale, logit_bias,
    M, R, key_block, heads_per_key_head, key_stride, index_stride, count_stride, bias_stride, scale_stride,
    shift_stride, with_rows, with_index, with_bias, with_scale, with_shift, scale, s, b, h64, c64,
    S: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Source s as query row b and head h read it: its row and head, keys, their stride, list of keys, keys in it, log2
    of the keys of an entry, number of keys, alpha, own scale, beta, biases and number of those."""
    b64 = b.to(tl.int64)
    row, reads = source_row(rows, with_rows, R, s, b, S)
    index, index_count, block, count = key_list(
        key_index, key_count, index_stride, count_stride, key_block, with_index, M, s, c64, row, h64, reads, S
    )
    head = key_head(heads_per_key_head, s, h64, S)
    alpha = scale * LOG2E  # rounded as in the forward pass: P must fit its lse
    own = 1.0
    if logit_scale is not None:
        own = per_head(logit_scale, scale_stride, with_scale, s, b64, h64, 1.0, S)
        alpha *= own
    beta = 0.0
    if logit_bias is not None:
        beta = to_log2(per_head(logit_bias, shift_stride, with_shift, s, b64, h64, 0.0, S))
        alpha = tl.where(tl.abs(beta) > 1e30, 0.0, alpha)  # fp32 loses ⟨q, k⟩ beside such a bias
    bias = count
    bias_count = 0
    if key_bias is not None:
        bias_count = tl.where(((with_bias >> s) & 1) != 0, count, 0)
        bias = pick(key_bias, s, S) + row * pick_int(bias_stride[0], s, S)
    k_n = pick_int(key_stride[1], s, S)
    k = pick(key, s, S)
    k += (row * pick_int(key_stride[0], s, S) + head * pick_int(key_stride[2], s, S)) * UNIT
    return row, head, k, k_n, index, index_count, block, count, alpha, own, beta, bias, bias_count


@triton.jit
def range_of_tile(
    key_range, range_stride, with_range, key_index, index, index_count, block, count, query_order, slot, end, s, b64,
    S: tl.constexpr,
):  # fmt: skip
    """(first place, end place, (BM,), (BM,)): the places among a source's keys that some query of the tile sees, and
    the tokens between which each does. Without ranges all places, and twice 0."""
    if key_range is None:
        return 0, count, 0, 0
    else:
        low, high = query_ranges(key_range, range_stride, with_range, s, b64, query_order, slot, end, S)
        first, _, _, last = range_places(key_index, index, index_count, block, count, low, high)
        return first, last, low, high


@triton.jit
def queries_in_range(ranges, query_order, low, high, tokens, ok):
    """[low, high) narrowed to the places from the first to the last whose query sees some of these tokens. ranges:
    those of the batch row; ok: which tokens exist."""
    least = tl.min(tl.where(ok, tokens, 0x7FFFFFFF), 0)
    most = tl.max(tl.where(ok, tokens, -1), 0)
    first = high
    last = low
    for j in range(low, high, 128):
        slot = j + tl.arange(0, 128)
        inside = slot < high
        at = ranges + query_tokens(query_order, slot, inside) * 2
        begin = tl.load(at, mask=inside, other=0)
        end = tl.load(at + 1, mask=inside, other=0)
        hit = inside & (begin <= most) & (end > least) & (begin < end)
        first = tl.minimum(first, tl.min(tl.where(hit, slot, high), 0))
        last = tl.maximum(last, tl.max(tl.where(hit, slot + 1, low), 0))
    return first, tl.maximum(last, first)


@triton.jit
def seen_keys(key_range, ok, tokens, low, high):
    """(1 or BM, BN): which of the keys, where they exist, each query of a tile sees; low, high from `range_of_tile`."""
    if key_range is None:
        return ok[None, :]
    else:
        return ok[None, :] & in_range(tokens, low, high)


@triton.jit
def sums_again(
    q0, q1, key, rows, key_index, key_count, key_range, key_bias, logit_scale, logit_bias, query_order, slot, end,
    M, R, key_block, heads_per_key_head, key_stride, index_stride, count_stride, range_stride, bias_stride,
    scale_stride, shift_stride, with_rows, with_index, with_range, with_bias, with_scale, with_shift,
    scale, b, h64, c64,
    S: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(maximum, log2 of the sum) of the logits of BM queries; (inf, 0) of one that sees no key."""
    on = tl.arange(0, BN)
    top = tl.full([BM], -MAX, tl.float32)
    mass = tl.zeros([BM], tl.float32)
    for s in range(S):
        _, _, k, k_n, index, index_count, block, count, alpha, _, beta, bias, bias_count = source_logits(
            key, rows, key_index, key_count, key_bias, logit_scale, logit_bias,
            M, R, key_block, heads_per_key_head, key_stride, index_stride, count_stride, bias_stride, scale_stride,
            shift_stride, with_rows, with_index, with_bias, with_scale, with_shift, scale, s, b, h64, c64, S, UNIT,
        )  # fmt: skip
        first, last, low, high = range_of_tile(
            key_range, range_stride, with_range, key_index, index, index_count, block, count, query_order, slot, end,
            s, b.to(tl.int64), S,
        )  # fmt: skip
        for j in tl.range(first, last, BN, num_stages=1):
            at = j + on
            ok = at < last
            entries = key_entries(key_index, index, at, index_count, block)
            tokens = key_tokens(key_index, entries, at, index_count, block)
            shift = key_shift(key_bias, bias, tokens, at, bias_count, beta)
            k0, k1 = load_parts(k + (tokens.to(tl.int64) * k_n)[:, None] * UNIT, ok, D, D0, D1, UPCAST)
            seen = seen_keys(key_range, ok, tokens, low, high)
            t = tl.where(seen, tl.fma(products(q0, q1, k0, k1, D1, PRECISION), alpha, shift), -INF)
            new_top = tl.minimum(tl.maximum(top, tl.max(t, 1)), MAX)
            mass = mass * tl.exp2(top - new_top) + tl.sum(tl.exp2(t - new_top[:, None]), 1)
            top = new_top
    return tl.where(mass == 0, INF, top), tl.where(mass == 0, 0.0, tl.log2(mass))


@triton.jit
def add_to_rows(at, x0, x1, ok, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Add both parts to the rows `ok` in memory, which no other program writes."""
    old0, old1 = load_parts(at, ok, D, D0, D1, False)
    if D1 > 0:
        x1 += old1
    store_parts(at, x0 + old0, x1, ok, D, D0, D1)
