"""multi_source_attention, forward: one launch for all sources, masks and query classes of a layer.

A run-time loop over the sources picks pointers by a select chain, so there is one pipelined loop over key tiles however
many sources there are, no pointer table on the device and no host synchronization. Scores live in log2 units.
Between softmax groups the running softmax starts anew and its result moves to a second fp32 accumulator. What a call
does not have is None or a constant for the compiler; how its sources fall into groups and all values are run-time data.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import AttentionTables
from . import tiles
from .launch import INTERPRETED, architecture, check_grid, dense_last, on_device, strides

LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(LOG2E)
_MAX = tl.constexpr(3.4028234663852886e38)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _pick(options, s, S: tl.constexpr):
    """options[s] of an S-tuple for a run-time s."""
    picked = options[0]
    for i in tl.static_range(1, S):
        picked = tl.where(s == i, options[i], picked)
    return picked


@triton.jit
def _pick_int(options, s, S: tl.constexpr):
    """int64 options[s] of integers that came through `_encode`."""
    return (_pick(options, s, S) >> 4).to(tl.int64)


@triton.jit
def load_tile(
    pointers, ok, columns, WIDTH: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr
):
    """(tokens, PADDED) of which WIDTH columns, and with MASKED only the rows `ok`, are read; zeros elsewhere."""
    if WIDTH < PADDED:
        if MASKED:
            x = tl.load(pointers, mask=ok[:, None] & (columns[None, :] < WIDTH), other=0.0)
        else:
            x = tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    elif MASKED:
        x = tl.load(pointers, mask=ok[:, None], other=0.0)
    else:
        x = tl.load(pointers)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _to_log2(x):
    """Natural-log weight -> log2 units. What is finite stays finite: finfo.min must not turn into -inf."""
    y = tl.minimum(x * _LOG2E, _MAX, propagate_nan=tl.PropagateNan.ALL)
    y = tl.maximum(y, -_MAX, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(tl.abs(x) == _INF, x, y)


@triton.jit
def _attend_tile(
    q0, q1, acc0, acc1, top, total,  # (BM, D0), (BM, D1), (BM, D0), (BM, D1), (BM,), (BM, 8)
    key, value, tokens, value_tokens, ok,  # pointers at (row, 0, head, 0); (BN,) to read; (BN,) which of them exist
    key_stride, value_stride, alpha, shift,  # shift: scalar, or (1, BN)
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    NARROW: tl.constexpr, PER_PAIR: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys and values to the running softmax of BM queries."""
    c0 = tl.arange(0, D0)
    if NARROW:  # the launcher knows that no token offset of a source reaches 2^31: half the address registers
        k_at = key + (tokens * (key_stride.to(tl.int32) * UNIT))[:, None]
        v_at = value + (value_tokens * (value_stride.to(tl.int32) * UNIT))[:, None]
    else:
        k_at = key + (tokens.to(tl.int64) * key_stride)[:, None] * UNIT
        v_at = value + (value_tokens.to(tl.int64) * value_stride)[:, None] * UNIT
    W0: tl.constexpr = D0 if D1 > 0 else D
    k0 = load_tile(k_at + c0[None, :], ok, c0, W0, D0, MASKED, UPCAST)
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        c1 = tl.arange(0, D1)
        k1 = load_tile(k_at + (D0 + c1)[None, :], ok, c1, D - D0, D1, MASKED, UPCAST)
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
    v0 = load_tile(v_at + c0[None, :], ok, c0, W0, D0, MASKED, UPCAST)
    if PER_PAIR or MASKED:  # bias per key, or an alpha that may be negative: one instruction more per pair
        t = s * alpha + shift
        if MASKED:
            t = tl.where(ok[None, :], t, -_INF)
        # min(): a live +inf gives NaN for its own row; max() drops NaN, which p carries on
        new_top = tl.minimum(tl.maximum(top, tl.max(t, 1)), _MAX)
        p = tl.exp2(t - new_top[:, None])
    else:
        new_top = tl.minimum(tl.maximum(top, tl.max(s, 1) * alpha + shift), _MAX)
        p = tl.exp2(s * alpha - (new_top - shift)[:, None])
    shrink = tl.exp2(top - new_top)
    # 8 partial sums per row stay inside a thread, which halves the shuffles of the loop
    total = total * shrink[:, None] + tl.sum(tl.reshape(p, (BM, BN // 8, 8)), 1)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
    if D1 > 0:
        c1 = tl.arange(0, D1)
        v1 = load_tile(v_at + (D0 + c1)[None, :], ok, c1, D - D0, D1, MASKED, UPCAST)
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, new_top, total


@triton.jit
def _key_tokens(index, at, index_count):
    """(BN,) tokens of the keys at places `at` of the list; index_count is 0 where this source has no list."""
    if index is None:
        return at
    else:
        listed = at < index_count
        return tl.where(listed, tl.load(index + at, mask=listed, other=0), at)


@triton.jit
def _value_tokens(value_index, tokens, at, index_count, last):
    """(BN,) tokens of the values that go with key tokens; index_count is 0 where this source has no value_index. An
    entry outside [0, last] reads the nearest token inside."""
    if value_index is None:
        return tokens
    else:
        moved = at < index_count
        found = tl.load(value_index + tokens, mask=moved, other=0)
        return tl.where(moved, tl.minimum(tl.maximum(found, 0), last), tokens)


@triton.jit
def _key_shift(bias, tokens, at, bias_count, beta):
    """beta plus the bias of each key in log2 units, (1, BN); without any bias beta alone."""
    if bias is None:
        return beta
    else:
        return (_to_log2(tl.load(bias + tokens, mask=at < bias_count, other=0.0)) + beta)[None, :]


@triton.jit
def _query_tokens(query_order, slot, ok):
    """(BM,) int64: the queries at these places of the order."""
    if query_order is None:
        return slot.to(tl.int64)
    else:
        return tl.load(query_order + slot, mask=ok, other=0).to(tl.int64)


@triton.jit
def _group_factor(mass, weight, weight_stride, with_weight, s, b64, i, ok, S: tl.constexpr):
    """(BM,) weight / mass of the softmax group that source s ends; 0 where a query saw no key."""
    factor = tl.where(mass == 0, 0.0, 1.0 / mass)
    if weight is not None:
        has = ((with_weight >> s) & 1) != 0
        place = _pick_int(weight_stride[0], s, S) + b64 * _pick_int(weight_stride[1], s, S)
        places = place + i * _pick_int(weight_stride[2], s, S)
        factor *= tl.where(has, tl.load(_pick(weight, s, S) + places, mask=ok, other=0.0), 1.0)
    return factor


@triton.jit
def _query_tile(class_start, tile, classes, BM: tl.constexpr):
    """Tile number -> (class, first place, end place) in query_order; past the last tile (0, 0, 0). No tile straddles
    classes."""
    c_found = 0
    first = 0
    end = 0
    for c in range(classes):
        low = tl.load(class_start + c)
        high = tl.load(class_start + c + 1)
        count = tl.cdiv(high - low, BM)
        here = (tile >= 0) & (tile < count)
        c_found = tl.where(here, c, c_found)
        first = tl.where(here, low + tile * BM, first)
        end = tl.where(here, high, end)
        tile -= count
    return c_found, first, end


@triton.jit(
    do_not_specialize=[
        "N", "H", "classes", "tiles_per_head", "with_rows", "with_index", "with_bias", "with_scale", "with_shift",
        "with_value_index", "with_weight", "group_ends",
        "query_b", "query_n", "query_h", "out_b", "out_n", "out_h", "lse_b", "lse_n", "lse_h", "order_b", "class_b",
    ]
)  # fmt: skip
def multi_source_attention_forward_kernel(
    query,  # (B, N, H, D)
    key, value,  # S x (R, M, H, D)
    rows,  # S x int32 (B,); here and in all up to weight, None where no source has it
    key_index, key_count,  # S x int32 (C or 1, R or 1, M), S x int32 (C or 1, R or 1)
    value_index,  # S x int32 (R or B or 1, M)
    key_bias,  # S x fp32 (R or 1, M)
    logit_scale, logit_bias,  # S x fp32 (B, H)
    weight,  # S x fp32 (B, N), of the source's group
    query_order, class_start,  # int32 (B or 1, N), (B or 1, C + 1), or None: one class
    out, lse,  # (B, N, H, D), fp32 (B, N, H) or None
    M, R, V,  # S encoded integers each, as all strides of sources; V, tokens of the values, None without value_index
    key_stride, value_stride,  # (row, key, head) x S, in units of UNIT elements
    index_stride, count_stride, value_index_stride, bias_stride,  # (class, row), same, (row, b), (row,)
    scale_stride, shift_stride, weight_stride,  # (start, b, h), same, (start, b, n)
    N, H, classes, tiles_per_head, scale_log2,
    with_rows, with_index, with_bias, with_scale, with_shift,  # bit s: source s has it
    with_value_index, with_weight,  # the same, None where no source has it
    group_ends,  # bit s: source s is the last of its softmax group; None: one group
    query_b, query_n, query_h, out_b, out_n, out_h,  # strides in units of UNIT elements
    lse_b, lse_n, lse_h, order_b, class_b,
    S: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UNIT: tl.constexpr, NARROW: tl.constexpr, PER_PAIR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Which queries: one tile of BM queries of one class, one head
    pid = tl.program_id(0)
    tile = pid % tiles_per_head
    h = pid // tiles_per_head % H
    b = pid // tiles_per_head // H
    h64 = h.to(tl.int64)
    b64 = b.to(tl.int64)
    om = tl.arange(0, BM)
    c64 = tl.cast(0, tl.int64)
    if query_order is None:
        slot = tile * BM + om
        query_ok = slot < N
    else:
        c, first, end = _query_tile(class_start + b64 * class_b, tile, classes, BM)
        if first >= end:
            return
        c64 = c.to(tl.int64)
        slot = first + om
        query_ok = slot < end
        query_order += b64 * order_b
    i = _query_tokens(query_order, slot, query_ok)

    # The queries stay in registers or shared memory for all sources
    c0 = tl.arange(0, D0)
    W0: tl.constexpr = D0 if D1 > 0 else D
    q_at = query + (b64 * query_b + h64 * query_h) * UNIT + (i * query_n)[:, None] * UNIT
    q0 = load_tile(q_at + c0[None, :], query_ok, c0, W0, D0, True, UPCAST)
    q1 = q0
    acc0 = tl.zeros([BM, D0], tl.float32)
    acc1 = 0.0
    if D1 > 0:
        c1 = tl.arange(0, D1)
        q1 = load_tile(q_at + (D0 + c1)[None, :], query_ok, c1, D - D0, D1, True, UPCAST)
        acc1 = tl.zeros([BM, D1], tl.float32)
    top = tl.full([BM], -_MAX, tl.float32)
    total = tl.zeros([BM, 8], tl.float32)
    sum0, sum1 = acc0, acc1  # of the groups that are done

    on = tl.arange(0, BN)
    for s in range(S):
        # Which row of the source; a row outside [0, R) reads nothing
        row = b64
        reads = True
        if rows is not None:
            has = ((with_rows >> s) & 1) != 0
            r = tl.load(_pick(rows, s, S) + b, mask=has, other=0).to(tl.int64)
            reads = (r >= 0) & (r < _pick_int(R, s, S))
            row = tl.where(has, tl.where(reads, r, 0), b64)
        # How many keys: all, or the count of the class, read from the device
        count = _pick_int(M, s, S).to(tl.int32)
        index = None
        index_count = 0
        if key_index is not None:
            gathered = ((with_index >> s) & 1) != 0
            index = _pick(key_index, s, S)
            index += c64 * _pick_int(index_stride[0], s, S) + row * _pick_int(index_stride[1], s, S)
            counts = _pick(key_count, s, S)
            counts += c64 * _pick_int(count_stride[0], s, S) + row * _pick_int(count_stride[1], s, S)
            count = tl.where(gathered, tl.load(counts, mask=gathered, other=0), count)
            index_count = tl.where(gathered, count, 0)
        count = tl.where(reads, count, 0)
        value_list = None
        value_count = 0
        last = 0
        if value_index is not None:
            last = _pick_int(V, s, S).to(tl.int32) - 1
            count = tl.where(last < 0, 0, count)
            value_count = tl.where(((with_value_index >> s) & 1) != 0, count, 0)
            value_list = _pick(value_index, s, S)
            value_list += row * _pick_int(value_index_stride[0], s, S) + b64 * _pick_int(value_index_stride[1], s, S)
        # logit = alpha · ⟨q, k⟩ + beta + bias
        alpha = scale_log2
        if logit_scale is not None:
            has = ((with_scale >> s) & 1) != 0
            place = _pick_int(scale_stride[0], s, S) + b64 * _pick_int(scale_stride[1], s, S)
            place += h64 * _pick_int(scale_stride[2], s, S)
            alpha = scale_log2 * tl.load(_pick(logit_scale, s, S) + place, mask=has, other=1.0)
        beta = 0.0
        if logit_bias is not None:
            has = ((with_shift >> s) & 1) != 0
            place = _pick_int(shift_stride[0], s, S) + b64 * _pick_int(shift_stride[1], s, S)
            place += h64 * _pick_int(shift_stride[2], s, S)
            beta = _to_log2(tl.load(_pick(logit_bias, s, S) + place, mask=has, other=0.0))
            # fp32 loses ⟨q, k⟩ beside such a bias; without this exp2(alpha · s) could overflow
            alpha = tl.where(tl.abs(beta) > 1e30, 0.0, alpha)
        bias = None
        bias_count = 0
        if key_bias is not None:
            bias_count = tl.where(((with_bias >> s) & 1) != 0, count, 0)
            bias = _pick(key_bias, s, S) + row * _pick_int(bias_stride[0], s, S)
        k_n = _pick_int(key_stride[1], s, S)
        v_n = _pick_int(value_stride[1], s, S)
        k = _pick(key, s, S)
        k += (row * _pick_int(key_stride[0], s, S) + h64 * _pick_int(key_stride[2], s, S)) * UNIT
        v = _pick(value, s, S)
        v += (row * _pick_int(value_stride[0], s, S) + h64 * _pick_int(value_stride[2], s, S)) * UNIT

        full = count // BN * BN
        for j in tl.range(0, full, BN):
            at = j + on
            tokens = _key_tokens(index, at, index_count)
            value_tokens = _value_tokens(value_list, tokens, at, value_count, last)
            shift = _key_shift(bias, tokens, at, bias_count, beta)
            acc0, acc1, top, total = _attend_tile(
                q0, q1, acc0, acc1, top, total, k, v, tokens, value_tokens, query_ok, k_n, v_n, alpha, shift,
                D, D0, D1, BM, BN, UNIT, NARROW, PER_PAIR, False, PRECISION, UPCAST,
            )  # fmt: skip
        if full < count:
            at = full + on
            ok = at < count
            tokens = _key_tokens(index, at, index_count)
            value_tokens = _value_tokens(value_list, tokens, at, value_count, last)
            shift = _key_shift(bias, tokens, at, bias_count, beta)
            acc0, acc1, top, total = _attend_tile(
                q0, q1, acc0, acc1, top, total, k, v, tokens, value_tokens, ok, k_n, v_n, alpha, shift,
                D, D0, D1, BM, BN, UNIT, NARROW, PER_PAIR, True, PRECISION, UPCAST,
            )  # fmt: skip

        if group_ends is not None:
            if ((group_ends >> s) & 1) != 0:
                i = _query_tokens(query_order, slot, query_ok)
                factor = _group_factor(tl.sum(total, 1), weight, weight_stride, with_weight, s, b64, i, query_ok, S)
                sum0 += acc0 * factor[:, None]
                acc0 = tl.zeros([BM, D0], tl.float32)
                if D1 > 0:
                    sum1 += acc1 * factor[:, None]
                    acc1 = tl.zeros([BM, D1], tl.float32)
                top = tl.full([BM], -_MAX, tl.float32)
                total = tl.zeros([BM, 8], tl.float32)

    # Normalize and store; no visible key: out 0, lse -inf; a NaN in acc stays
    i = _query_tokens(query_order, slot, query_ok)  # read again: cheaper than registers held through the loop
    mass = tl.sum(total, 1)
    if group_ends is None:
        factor = _group_factor(mass, weight, weight_stride, with_weight, S - 1, b64, i, query_ok, S)
        sum0 = acc0 * factor[:, None]
        if D1 > 0:
            sum1 = acc1 * factor[:, None]
    o_at = out + (b64 * out_b + h64 * out_h) * UNIT + (i * out_n)[:, None] * UNIT
    tl.store(o_at + c0[None, :], sum0.to(out.dtype.element_ty), mask=query_ok[:, None] & (c0[None, :] < W0))
    if D1 > 0:
        c1 = tl.arange(0, D1)
        o1 = sum1.to(out.dtype.element_ty)
        tl.store(o_at + (D0 + c1)[None, :], o1, mask=query_ok[:, None] & (c1[None, :] < D - D0))
    if lse is not None:
        log2_mass = top + tl.log2(mass)
        natural = tl.where(log2_mass <= -_MAX, -_MAX, log2_mass * _LN2)
        tl.store(lse + b64 * lse_b + i * lse_n + h64 * lse_h, tl.where(mass == 0, -_INF, natural), mask=query_ok)


def _encode(integers) -> tuple[int, ...]:
    """Integers for a tuple argument. Triton (3.6 to 3.9) compiles anew for tuple elements that are 1 or that become
    divisible by 16, whatever do_not_specialize says; times 16 they all look alike."""
    return tuple(16 * x for x in integers)


def _optional(tensors: Sequence[Tensor | None]) -> tuple[tuple[Tensor, ...], int]:
    """(S pointers, bit set of the sources that have one); the gaps hold a pointer that is never read."""
    filler = next((x for x in tensors if x is not None), None)
    bits = sum(1 << s for s, x in enumerate(tensors) if x is not None)
    return () if filler is None else tuple(filler if x is None else x for x in tensors), bits


def _tables(tensors: Sequence[Tensor | None], *dims: int) -> tuple[tuple[Tensor, ...] | None, tuple | None, int]:
    """`_optional` of tables made contiguous in the last dimension, and the encoded strides of `dims`; None for none."""
    pointers, bits = _optional([dense_last(x) for x in tensors])
    if not pointers:
        return None, None, bits
    return pointers, tuple(_encode(x) for x in zip(*(strides(x, *dims) for x in pointers))), bits


def _strided_tables(tensors: Sequence[Tensor | None]) -> tuple[tuple[Tensor, ...] | None, tuple | None, int]:
    """`_optional` of fp32 (B, n) of any strides, and encoded (start, stride of B, stride of n). Triton would compile
    anew for pointers off a 16-byte boundary, so a slice of a schedule is passed from the boundary before it on."""
    pointers, bits = _optional(tensors)
    if not pointers:
        return None, None, bits
    starts = [x.storage_offset() % 4 for x in pointers]
    places = zip(*((start, *strides(x, 0, 1)) for start, x in zip(starts, pointers)))
    pointers = tuple(_from_boundary(x, start) if start else x for start, x in zip(starts, pointers))
    return pointers, tuple(_encode(x) for x in places), bits


def _from_boundary(x: Tensor, start: int) -> Tensor:
    """The memory of x and the `start` elements before it."""
    span = start + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride())) + 1
    return x.as_strided((span,), (1,), x.storage_offset() - start)


def _value_index_strides(indices: tuple[Tensor, ...] | None, key: Sequence[Tensor]) -> tuple | None:
    """Encoded (strides of the source row, strides of the batch row): one of the two is 0."""
    if indices is None:
        return None
    by_row = [x.shape[0] == k.shape[0] for x, k in zip(indices, key)]
    steps = [strides(x, 0)[0] for x in indices]
    return tuple(_encode(x if r == wanted else 0 for x, r in zip(steps, by_row)) for wanted in (True, False))


def multi_source_attention_triton(query: Tensor, *arguments) -> None:
    """arguments: those of AttentionTables, out, lse; shapes as in the schema `multi_source_attention` of
    lr_kernels/ops.py. An entry of rows outside the source reads nothing; one of value_index outside the values reads
    the nearest token inside."""
    *fields, out, lse = arguments
    tables = AttentionTables(*fields)
    # Early return for trivial cases
    if out.numel() == 0:
        return
    if not any(k.shape[1] for k in tables.key):
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        return
    arguments, constants, programs = launch_arguments(query, tables, out, lse, architecture(query.device))
    grid = check_grid("multi_source_attention", programs)
    with on_device(query.device):
        multi_source_attention_forward_kernel[grid](*arguments, **constants)


def launch_arguments(
    query: Tensor, tables: AttentionTables, out: Tensor, lse: Tensor | None, arch: int
) -> tuple[tuple, dict, int]:
    """(positional arguments, constants and options, number of programs) of the kernel on an architecture."""
    B, N, H, D = query.shape
    key, value, groups = tables.key, tables.value, tables.softmax_group
    S = len(key)
    rows, _, with_rows = _tables(tables.rows)
    index, index_strides, with_index = _tables(tables.key_index, 0, 1)
    count, count_strides, _ = _tables(tables.key_count, 0, 1)
    value_index, _, with_value_index = _tables(tables.value_index)
    bias, bias_strides, with_bias = _tables(tables.key_bias, 0)
    scales, scale_strides, with_scale = _strided_tables(tables.logit_scale)
    shifts, shift_strides, with_shift = _strided_tables(tables.logit_bias)
    weights, weight_strides, with_weight = _strided_tables([tables.weight[g] for g in groups])
    order, starts = dense_last(tables.query_order), dense_last(tables.class_start)
    grouped = groups[0] != groups[-1]
    group_ends = sum(1 << s for s in range(S) if s == S - 1 or groups[s + 1] != groups[s]) if grouped else None
    per_pair = bias is not None or scales is not None or not tables.scale > 0
    biased = per_pair or value_index is not None
    kind = "grouped" if grouped else "biased" if biased else "dense" if index is None else "gathered"
    tile = tiles.attention_tile(arch, D, query.dtype, kind)
    classes = 1 if starts is None else starts.shape[1] - 1
    tiles_per_head = triton.cdiv(N, tile.BM) + classes - 1
    # 16-byte loads need every stride to be a multiple of 16 bytes; strides are then passed in those units
    unit = 16 // query.element_size()
    dims = [strides(x, 0, 1, 2) for x in (query, out, *key, *value)]
    if any(x % unit for strides_ in dims for x in strides_):
        unit = 1
    units = [tuple(x // unit for x in strides_) for strides_ in dims]
    query_strides, out_strides, *source_units = units
    arguments = (
        query, tuple(key), tuple(value), rows, index, count, value_index, bias, scales, shifts, weights,
        order, starts, out, lse,
        _encode(k.shape[1] for k in key), _encode(k.shape[0] for k in key),
        None if value_index is None else _encode(v.shape[1] for v in value),
        tuple(_encode(x) for x in zip(*source_units[:S])), tuple(_encode(x) for x in zip(*source_units[S:])),
        index_strides, count_strides, _value_index_strides(value_index, key), bias_strides,
        scale_strides, shift_strides, weight_strides,
        N, H, classes, tiles_per_head, tables.scale * LOG2E,
        with_rows, with_index, with_bias, with_scale, with_shift,
        with_value_index or None, with_weight or None, group_ends,
        *query_strides, *out_strides, *((0, 0, 0) if lse is None else strides(lse, 0, 1, 2)),
        *((0, 0) if order is None else (*strides(order, 0), *strides(starts, 0))),
    )  # fmt: skip
    constants = {
        "S": S, "D": D, "D0": tile.D0, "D1": tile.D1, "BM": tile.BM, "BN": tile.BN, "UNIT": unit,
        "NARROW": all(x.shape[1] * x.stride(1) < 2**31 for x in (*key, *value)), "PER_PAIR": per_pair,
        "PRECISION": dot_precision(query.dtype), "UPCAST": INTERPRETED,
        "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True,
    }  # fmt: skip
    return arguments, constants, B * H * tiles_per_head


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies fp32: exactly, unless PyTorch was told that TF32 is good enough."""
    allowed = torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"
