"""The steps of attention's forward kernel: the walk over all sources, and what it does for a tile of keys.

A walk in log2 units is fast and right for logits below 2^28. Where it meets larger ones, or its sums leave fp32, it
says so, and a second walk holds the logits in units of 256 log2, in which no sum of finite biases leaves fp32.
"""

import triton
import triton.language as tl

from .sources import (
    INF,
    LOG2E,
    MAX,
    dequantized,
    in_range,
    key_entries,
    key_head,
    key_list,
    key_tokens,
    load_parts,
    load_tile,
    per_head,
    pick,
    pick_int,
    query_ranges,
    query_tokens,
    range_places,
    source_row,
)

_LN2 = tl.constexpr(0.6931471805599453)
_FAR = tl.constexpr(2.0**28)
"""Neighbouring fp32 numbers are 32 apart here: the rounding of a logit alone moves its weight by up to 2^16."""


@triton.jit
def _key_shift(key_bias, bias, tokens, at, bias_count, beta, TO_UNITS: tl.constexpr):
    """beta plus the bias of each key, (1, BN); without any bias beta alone."""
    if key_bias is None:
        return beta
    else:
        return (tl.load(bias + tokens, mask=at < bias_count, other=0.0) * TO_UNITS + beta)[None, :]


@triton.jit
def _attend_tile(
    q0, q1, acc0, acc1, top, total,  # (BM, D0), (BM, D1), (BM, E0), (BM, E1), (BM,), (BM, 8)
    key, value, tokens, value_tokens, seen,  # pointers at (row, 0, head, 0); (BN,) to read; (1 or BM, BN) which of them
    key_stride, value_stride, alpha, shift,  # shift: scalar, or (1, BN)
    eight_bit,  # of a source in 8 bits: pointers to the scales of its keys and values, their strides, whether e4m3
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    NARROW: tl.constexpr, PER_PAIR: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    LOG2_UNITS: tl.constexpr, WEIGHT: tl.constexpr, EIGHT_BIT: tl.constexpr, DTYPE: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys and values to the running softmax of BM queries; alpha, shift and top are in units of
    LOG2_UNITS log2. MASKED: some keys are not seen; HIDDEN: by some queries alone, to which their values, which may be
    NaN, must not come."""
    c0 = tl.arange(0, D0)
    if NARROW:  # the launcher knows that no token offset of a source reaches 2^31: half the address registers
        k_at = key + (tokens * (key_stride.to(tl.int32) * UNIT))[:, None]
        v_at = value + (value_tokens * (value_stride.to(tl.int32) * UNIT))[:, None]
    else:
        k_at = key + (tokens.to(tl.int64) * key_stride)[:, None] * UNIT
        v_at = value + (value_tokens.to(tl.int64) * value_stride)[:, None] * UNIT
    W0: tl.constexpr = D0 if D1 > 0 else D
    k0 = load_tile(k_at + c0[None, :], seen, c0, W0, D0, False, UPCAST and EIGHT_BIT == 0)
    if EIGHT_BIT > 0:
        k_scale, v_scale, k_step, v_step, float8 = eight_bit
        k_scale = tl.load(k_scale + tokens.to(tl.int64) * k_step)
        v_scale = tl.load(v_scale + value_tokens.to(tl.int64) * v_step)
        k0 = dequantized(k0, k_scale, float8, DTYPE, EIGHT_BIT, UPCAST)
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        c1 = tl.arange(0, D1)
        k1 = load_tile(k_at + (D0 + c1)[None, :], seen, c1, D - D0, D1, False, UPCAST and EIGHT_BIT == 0)
        if EIGHT_BIT > 0:
            k1 = dequantized(k1, k_scale, float8, DTYPE, EIGHT_BIT, UPCAST)
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
    e0 = tl.arange(0, E0)
    V0: tl.constexpr = E0 if E1 > 0 else E
    v0 = load_tile(v_at + e0[None, :], seen, e0, V0, E0, False, UPCAST and EIGHT_BIT == 0)
    if PER_PAIR:  # bias per key, or an alpha that may be negative: one instruction more per pair
        t = tl.fma(s, alpha, shift)
        if MASKED:
            t = tl.where(seen, t, -INF)
        # min(): a live +inf gives NaN for its own row; max() drops NaN, which p carries on
        new_top = tl.minimum(tl.maximum(top, tl.max(t, 1)), MAX)
        p = tl.exp2((t - new_top[:, None]) * LOG2_UNITS) * WEIGHT
    else:
        if MASKED:
            s = tl.where(seen, s, -INF)
        new_top = tl.minimum(tl.maximum(top, tl.max(s, 1) * alpha + shift), MAX)
        p = tl.exp2(s * alpha - (new_top - shift)[:, None])
    shrink = tl.exp2((top - new_top) * LOG2_UNITS)
    # 8 partial sums per row stay inside a thread, which halves the shuffles of the loop
    total = total * shrink[:, None] + tl.sum(tl.reshape(p, (BM, BN // 8, 8)), 1)
    if EIGHT_BIT > 0:
        v0 = dequantized(v0, v_scale, float8, DTYPE, EIGHT_BIT, UPCAST)
    p = p.to(v0.dtype)
    if HIDDEN:
        v0, acc0 = _only_to_seeing(v0, acc0, seen, PRECISION)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
    if E1 > 0:
        e1 = tl.arange(0, E1)
        v1 = load_tile(v_at + (E0 + e1)[None, :], seen, e1, E - E0, E1, False, UPCAST and EIGHT_BIT == 0)
        if EIGHT_BIT > 0:
            v1 = dequantized(v1, v_scale, float8, DTYPE, EIGHT_BIT, UPCAST)
        if HIDDEN:
            v1, acc1 = _only_to_seeing(v1, acc1, seen, PRECISION)
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, new_top, total


@triton.jit
def _only_to_seeing(v, acc, seen, PRECISION: tl.constexpr):
    """(v with 0 in place of what is not finite; acc, NaN in the channels where its query sees such a value)."""
    odd = (v.to(tl.float32) * 0.0) != 0.0
    reached = tl.dot(seen.to(v.dtype), odd.to(v.dtype), input_precision=PRECISION)
    return tl.where(odd, 0.0, v).to(v.dtype), tl.where(reached > 0, float("nan"), acc)


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
def _group_factor(
    mass, top, keys, weight, weight_stride, with_weight, s, b64, i, ok, S: tl.constexpr, WIDE: tl.constexpr
):
    """(BM,) weight / mass of the softmax group that source s ends; 0 where a query saw no key, and NaN in the first
    walk where the largest logit of its `keys` is far out."""
    factor = tl.where(mass == 0, 0.0, 1.0 / mass)
    if not WIDE:
        factor = tl.where((tl.abs(top) >= _FAR) & (keys > 0), float("nan"), factor)
    if weight is not None:
        has = ((with_weight >> s) & 1) != 0
        place = pick_int(weight_stride[0], s, S) + b64 * pick_int(weight_stride[1], s, S)
        places = place + i * pick_int(weight_stride[2], s, S)
        factor *= tl.where(has, tl.load(pick(weight, s, S) + places, mask=ok, other=0.0), 1.0)
    return factor


@triton.jit
def _rows_not_finite(x):
    """(BM,) which rows of (BM, n) hold an infinity or a NaN."""
    return tl.sum(x * 0.0, 1) != 0


@triton.jit
def _attend_source(
    q0, q1, acc0, acc1, top, total,
    key, value, key_index, index, index_count, block, value_list, value_count, last, key_bias, bias, bias_count,
    on, query_ok, count, ranges, key_stride, value_stride, alpha, beta, eight_bit,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    NARROW: tl.constexpr, PER_PAIR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    LOG2_UNITS: tl.constexpr, WEIGHT: tl.constexpr, EIGHT_BIT: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
    TO_UNITS: tl.constexpr,
):  # fmt: skip
    """Add `count` keys of one source to the running softmax, a tile at a time.

    Whole tiles of keys that all queries see, then the keys that are left. Without ranges of the queries these are a
    loop of at most one turn, since straight code reads the tiles of shared memory at constant addresses, which ptxas
    12.8 (Triton 3.6) gets wrong in tiles below 128 bytes a row.
    """
    first = 0  # of the whole tiles
    stop = count
    if ranges is not None:
        low, high, lowest, first, stop, highest = ranges
        lowest = tl.minimum(lowest, count)
        highest = tl.minimum(highest, count)
        first = highest if WIDE else tl.minimum(first, highest)
        stop = tl.minimum(stop, highest)
    whole = first if WIDE else first + (stop - first) // BN * BN
    entries = key_entries(key_index, index, first + on, index_count, block)
    if not WIDE:
        for j in tl.range(first, whole, BN):
            at = j + on
            tokens = key_tokens(key_index, entries, at, index_count, block)
            entries = key_entries(key_index, index, at + BN, index_count, block)
            value_tokens = _value_tokens(value_list, tokens, at, value_count, last)
            shift = _key_shift(key_bias, bias, tokens, at, bias_count, beta, TO_UNITS)
            acc0, acc1, top, total = _attend_tile(
                q0, q1, acc0, acc1, top, total, key, value, tokens, value_tokens, query_ok,
                key_stride, value_stride, alpha, shift, eight_bit,
                D, D0, D1, E, E0, E1, BM, BN, UNIT, NARROW, PER_PAIR, False, PRECISION, UPCAST, LOG2_UNITS, WEIGHT,
                EIGHT_BIT, DTYPE, False,
            )  # fmt: skip
    if ranges is None:
        before = 0
        turns = tl.cdiv(count - whole, BN)
    else:  # the keys before the whole tiles, and those after them
        before = tl.cdiv(first - lowest, BN)
        turns = before + tl.cdiv(highest - whole, BN)
    for turn in tl.range(0, turns):
        j = whole + (turn - before) * BN
        stop = count
        if ranges is not None:
            j = tl.where(turn < before, lowest + turn * BN, j)
            stop = tl.where(turn < before, first, highest)
        at = tl.minimum(j + on, stop - 1)  # past the end the last key again, of weight 0
        tokens = key_tokens(key_index, key_entries(key_index, index, at, index_count, block), at, index_count, block)
        value_tokens = _value_tokens(value_list, tokens, at, value_count, last)
        shift = _key_shift(key_bias, bias, tokens, at, bias_count, beta, TO_UNITS)
        seen = (j + on < stop)[None, :]
        if ranges is not None:
            seen = seen & in_range(tokens, low, high)
        acc0, acc1, top, total = _attend_tile(
            q0, q1, acc0, acc1, top, total, key, value, tokens, value_tokens, seen,
            key_stride, value_stride, alpha, shift, eight_bit,
            D, D0, D1, E, E0, E1, BM, BN, UNIT, NARROW, PER_PAIR, True, PRECISION, UPCAST, LOG2_UNITS, WEIGHT,
            EIGHT_BIT, DTYPE, WIDE and ranges is not None,
        )  # fmt: skip
    return acc0, acc1, top, total


@triton.jit
def _rows_of(tokens, stride, s, row, h64, S: tl.constexpr, UNIT: tl.constexpr):
    """Pointer to the first key, or value, of source s at this row and head."""
    return pick(tokens, s, S) + (row * pick_int(stride[0], s, S) + h64 * pick_int(stride[2], s, S)) * UNIT


@triton.jit
def _scales_of(scales, stride, s, row, h64, S: tl.constexpr):
    """Pointer to the scale of the first key, or value, of source s at this row and head."""
    place = pick_int(stride[0], s, S) + row * pick_int(stride[1], s, S) + h64 * pick_int(stride[3], s, S)
    return pick(scales, s, S) + place


@triton.jit
def attend_queries(
    call, first, end, b, h, c,
    S: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UNIT: tl.constexpr, NARROW: tl.constexpr, PER_PAIR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    UNIT8: tl.constexpr, EIGHT_BIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Up to BM queries of class c, from place `first` of the order to `end`, walk over their visible keys of all
    sources and store output and lse -> not 0 if numbers left fp32 and the walk must be done again, WIDE."""
    (
        query, key, value, rows, key_index, key_count, key_range, value_index, key_bias, logit_scale, logit_bias,
        weight, query_order, out, lse, M, R, V, key_block, heads_per_key_head, key_stride, value_stride,
        index_stride, count_stride, range_stride, value_index_stride, bias_stride, scale_stride, shift_stride,
        weight_stride, scale, with_rows, with_index, with_range, with_bias, with_scale, with_shift,
        with_value_index, with_weight, group_ends,
        query_b, query_n, query_h, out_b, out_n, out_h, lse_b, lse_n, lse_h,
        key8, value8, key_scale, value_scale, key8_stride, value8_stride, key_scale_stride, value_scale_stride,
        with_eight_bit, with_float8,
    ) = call  # fmt: skip
    DTYPE: tl.constexpr = query.dtype.element_ty
    # fp16 has no room for smaller weights and queries, and no need: its values and scores stay far inside fp32. 2^-16
    # in every weight: the sum of up to 65,536 weighted values stays in fp32 where their mean does. 1/16 in the queries:
    # a score ⟨q, k⟩ of 16 times what fp32 holds is a logit that it holds, with most scales.
    ROOM: tl.constexpr = WIDE and DTYPE != tl.float16
    LOG2_UNITS: tl.constexpr = 256.0 if WIDE else 1.0
    WEIGHT: tl.constexpr = 0.0000152587890625 if ROOM else 1.0
    SHRINK: tl.constexpr = 0.0625 if ROOM else 1.0
    TO_UNITS: tl.constexpr = LOG2E / LOG2_UNITS
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    c64 = tl.cast(c, tl.int64)

    # The queries stay in registers or shared memory for all sources
    slot = first + tl.arange(0, BM)
    query_ok = slot < end
    i = query_tokens(query_order, slot, query_ok)
    q_at = query + (b64 * query_b + h64 * query_h) * UNIT + (i * query_n)[:, None] * UNIT
    q0, q1 = load_parts(q_at, query_ok, D, D0, D1, UPCAST)
    if ROOM:
        q0 = (q0 * SHRINK).to(q0.dtype)
        if D1 > 0:
            q1 = (q1 * SHRINK).to(q1.dtype)
    acc0 = tl.zeros([BM, E0], tl.float32)
    acc1 = 0.0
    if E1 > 0:
        acc1 = tl.zeros([BM, E1], tl.float32)
    top = tl.full([BM], -MAX, tl.float32)
    total = tl.zeros([BM, 8], tl.float32)
    sum0, sum1 = acc0, acc1  # of the groups that are done
    keys = 0  # of the group

    on = tl.arange(0, BN)
    for s in range(S):
        row, reads = source_row(rows, with_rows, R, s, b, S)
        index, index_count, block, count = key_list(
            key_index, key_count, index_stride, count_stride, key_block, with_index, M, s, c64, row, h64, reads, S
        )
        head = key_head(heads_per_key_head, s, h64, S)
        value_list = None
        value_count = 0
        last = 0
        if value_index is not None:
            last = pick_int(V, s, S).to(tl.int32) - 1
            count = tl.where(last < 0, 0, count)
            value_count = tl.where(((with_value_index >> s) & 1) != 0, count, 0)
            value_list = pick(value_index, s, S)
            value_list += row * pick_int(value_index_stride[0], s, S) + b64 * pick_int(value_index_stride[1], s, S)
        # logit = alpha · ⟨q, k⟩ + beta + bias
        alpha = scale * (TO_UNITS / SHRINK)
        if logit_scale is not None:
            alpha *= per_head(logit_scale, scale_stride, with_scale, s, b64, h64, 1.0, S)
        beta = 0.0
        if logit_bias is not None:
            beta = per_head(logit_bias, shift_stride, with_shift, s, b64, h64, 0.0, S) * TO_UNITS
        bias = None
        bias_count = 0
        if key_bias is not None:
            bias_count = tl.where(((with_bias >> s) & 1) != 0, count, 0)
            bias = pick(key_bias, s, S) + row * pick_int(bias_stride[0], s, S)
        ranges = None
        if key_range is not None:
            low, high = query_ranges(key_range, range_stride, with_range, s, b64, query_order, slot, end, S)
            lowest, inner, outer, highest = range_places(key_index, index, index_count, block, count, low, high)
            ranges = (low, high, lowest, inner, outer, highest)
        keys += count

        # A source is plain or in 8 bits, so that one of these two walks has no keys
        if EIGHT_BIT > 0:
            count8 = tl.where(((with_eight_bit >> s) & 1) != 0, count, 0)
            count -= count8
            float8 = False
            if EIGHT_BIT == 3:
                float8 = ((with_float8 >> s) & 1) != 0
            eight_bit = (
                _scales_of(key_scale, key_scale_stride, s, row, head, S),
                _scales_of(value_scale, value_scale_stride, s, row, head, S),
                pick_int(key_scale_stride[2], s, S), pick_int(value_scale_stride[2], s, S), float8,
            )  # fmt: skip
            acc0, acc1, top, total = _attend_source(
                q0, q1, acc0, acc1, top, total,
                _rows_of(key8, key8_stride, s, row, head, S, UNIT8),
                _rows_of(value8, value8_stride, s, row, head, S, UNIT8), key_index, index, index_count, block,
                value_list, value_count, last, key_bias, bias, bias_count, on, query_ok, count8, ranges,
                pick_int(key8_stride[1], s, S), pick_int(value8_stride[1], s, S), alpha, beta, eight_bit,
                D, D0, D1, E, E0, E1, BM, BN, UNIT8, NARROW, PER_PAIR, PRECISION, UPCAST, LOG2_UNITS, WEIGHT,
                EIGHT_BIT, DTYPE, WIDE, TO_UNITS,
            )  # fmt: skip
        if key is not None:
            acc0, acc1, top, total = _attend_source(
                q0, q1, acc0, acc1, top, total,
                _rows_of(key, key_stride, s, row, head, S, UNIT),
                _rows_of(value, value_stride, s, row, head, S, UNIT), key_index, index, index_count, block,
                value_list, value_count, last, key_bias, bias, bias_count, on, query_ok, count, ranges,
                pick_int(key_stride[1], s, S), pick_int(value_stride[1], s, S), alpha, beta, None,
                D, D0, D1, E, E0, E1, BM, BN, UNIT, NARROW, PER_PAIR, PRECISION, UPCAST, LOG2_UNITS, WEIGHT,
                0, DTYPE, WIDE, TO_UNITS,
            )  # fmt: skip

        if group_ends is not None:
            if ((group_ends >> s) & 1) != 0:
                i = query_tokens(query_order, slot, query_ok)
                factor = _group_factor(
                    tl.sum(total, 1), top, keys, weight, weight_stride, with_weight, s, b64, i, query_ok, S, WIDE
                )
                sum0 += acc0 * factor[:, None]
                acc0 = tl.zeros([BM, E0], tl.float32)
                if E1 > 0:
                    sum1 += acc1 * factor[:, None]
                    acc1 = tl.zeros([BM, E1], tl.float32)
                top = tl.full([BM], -MAX, tl.float32)
                total = tl.zeros([BM, 8], tl.float32)
                keys = 0

    # Normalize and store; no visible key: out 0, lse -inf; a NaN in acc stays
    mass = tl.sum(total, 1)
    i = query_tokens(query_order, slot, query_ok)  # read again: cheaper than registers held through the loop
    if group_ends is None:
        factor = _group_factor(mass, top, keys, weight, weight_stride, with_weight, S - 1, b64, i, query_ok, S, WIDE)
        sum0 = acc0 * factor[:, None]
        if E1 > 0:
            sum1 = acc1 * factor[:, None]
    o_at = out + (b64 * out_b + h64 * out_h) * UNIT + (i * out_n)[:, None] * UNIT
    e0 = tl.arange(0, E0)
    V0: tl.constexpr = E0 if E1 > 0 else E
    tl.store(o_at + e0[None, :], sum0.to(out.dtype.element_ty), mask=query_ok[:, None] & (e0[None, :] < V0))
    if E1 > 0:
        e1 = tl.arange(0, E1)
        o1 = tl.cast(sum1, out.dtype.element_ty)
        tl.store(o_at + (E0 + e1)[None, :], o1, mask=query_ok[:, None] & (e1[None, :] < E - E0))
    if lse is not None:
        wide = top.to(lse.dtype.element_ty)  # fp64 keeps the mass beside a huge top, as the backward pass needs
        natural = wide * (LOG2_UNITS * _LN2) + tl.log2(mass / WEIGHT).to(wide.dtype) * _LN2
        if WIDE:
            beyond = (tl.abs(natural) == INF) & (mass < INF)  # -inf is for a query that sees nothing
            natural = tl.where(beyond, tl.where(top > 0, MAX, -MAX), natural)
        tl.store(lse + b64 * lse_b + i * lse_n + h64 * lse_h, tl.where(mass == 0, -INF, natural), mask=query_ok)
    if not WIDE:  # NaN for now: what left fp32
        again = _rows_not_finite(sum0)
        if E1 > 0:
            again |= _rows_not_finite(sum1)
        return tl.max(again.to(tl.int32), 0)
