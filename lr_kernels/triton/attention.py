"""multi_source_attention, forward: one launch for all sources, masks and query classes of a layer.

A run-time loop over the sources picks pointers by a select chain, so there is one pipelined loop over key tiles however
many sources there are, no pointer table on the device and no host synchronization. Logits are held in units of
256 log2, so that no sum of finite biases leaves fp32; the exponents of a row are its logits times 256, or less: see
_exponent_factor.
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
from .arguments import check_attention
from .launch import INTERPRETED, architecture, check_grid, dense_last, on_device, strides
from .sources import (
    INF,
    LOG2E,
    MAX,
    dot_precision,
    encode,
    key_entries,
    key_list,
    key_tokens,
    load_tile,
    per_head,
    pick,
    pick_int,
    query_tile,
    query_tokens,
    source_row,
    strided_tables,
    tables_of,
)

LOGIT_UNIT = LOG2E / 256
QUERY_SHRINK = 1 / 16
"""Of fp32 and bf16 queries: a score ⟨q, k⟩ of 16 times what fp32 holds is a logit that it holds, with most scales."""
_LOGIT_UNIT = tl.constexpr(LOGIT_UNIT)
_QUERY_SHRINK = tl.constexpr(QUERY_SHRINK)


@triton.jit
def _exponent_factor(top):
    """(BM,) what turns the logits of a row into exponents of 2, a power of two: 256, and less where the largest logit,
    `top`, is 2^28 log2 units or more. Neighbouring fp32 numbers are then at least 16 apart and only the largest logits
    have a weight: a factor that brings top below 2^29 leaves them 32 apart, and no exponent overflows."""
    exponent = tl.maximum(top.to(tl.int32, bitcast=True) & 0x7F800000, 147 << 23)
    return ((135 << 23) - (exponent - (147 << 23))).to(tl.float32, bitcast=True)


@triton.jit
def _key_shift(key_bias, bias, tokens, at, bias_count, beta):
    """beta plus the bias of each key, (1, BN); without any bias beta alone."""
    if key_bias is None:
        return beta
    else:
        return (tl.load(bias + tokens, mask=at < bias_count, other=0.0) * _LOGIT_UNIT + beta)[None, :]


@triton.jit
def _attend_tile(
    q0, q1, acc0, acc1, top, total,  # (BM, D0), (BM, D1), (BM, D0), (BM, D1), (BM,), (BM, 8)
    key, value, tokens, value_tokens, ok,  # pointers at (row, 0, head, 0); (BN,) to read; (BN,) which of them exist
    key_stride, value_stride, alpha, shift,  # shift: scalar, or (1, BN)
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    NARROW: tl.constexpr, PER_PAIR: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    HEADROOM: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys and values to the running softmax of BM queries. top: the largest logit plus HEADROOM."""
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
    # min(): a live +inf gives NaN for its own row; max() drops NaN, which p carries on
    if PER_PAIR or MASKED:  # any bias, or an alpha that may be negative: one instruction more per pair
        t = tl.fma(s, alpha, shift)
        if MASKED:
            t = tl.where(ok[None, :], t, -INF)
        new_top = tl.minimum(tl.maximum(top, tl.max(t, 1) + HEADROOM), MAX)
        factor = _exponent_factor(new_top)
        p = tl.exp2(t * factor[:, None] - (new_top * factor)[:, None])  # exact: the factor is a power of two
    else:
        new_top = tl.minimum(tl.maximum(top, tl.max(s, 1) * alpha + HEADROOM), MAX)
        factor = _exponent_factor(new_top)
        p = tl.exp2(s * (alpha * factor)[:, None] - (new_top * factor)[:, None])
    if WEIGHT != 1.0:
        p *= WEIGHT
    shrink = tl.exp2((top - new_top) * 256)
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
def _group_factor(mass, weight, weight_stride, with_weight, s, b64, i, ok, S: tl.constexpr):
    """(BM,) weight / mass of the softmax group that source s ends; 0 where a query saw no key."""
    factor = tl.where(mass == 0, 0.0, 1.0 / mass)
    if weight is not None:
        has = ((with_weight >> s) & 1) != 0
        place = pick_int(weight_stride[0], s, S) + b64 * pick_int(weight_stride[1], s, S)
        places = place + i * pick_int(weight_stride[2], s, S)
        factor *= tl.where(has, tl.load(pick(weight, s, S) + places, mask=ok, other=0.0), 1.0)
    return factor


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
    out, lse,  # (B, N, H, D), fp32 or fp64 (B, N, H) or None
    M, R, V,  # S encoded integers each, as all strides of sources; V, tokens of the values, None without value_index
    key_stride, value_stride,  # (row, key, head) x S, in units of UNIT elements
    index_stride, count_stride, value_index_stride, bias_stride,  # (class, row), same, (row, b), (row,)
    scale_stride, shift_stride, weight_stride,  # (start, b, h), same, (start, b, n)
    N, H, classes, tiles_per_head, unit_scale,
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
        c, first, end = query_tile(class_start + b64 * class_b, tile, classes, BM)
        if first >= end:
            return
        c64 = c.to(tl.int64)
        slot = first + om
        query_ok = slot < end
        query_order += b64 * order_b
    i = query_tokens(query_order, slot, query_ok)
    unit_scale = tl.cast(unit_scale, tl.float32)  # the interpreter takes a tiny number for fp64

    # fp16 has no room for smaller weights and queries, and no need: its values and scores stay far inside fp32.
    # 2^-16 in every weight: the sum of up to 65,536 weighted values stays in fp32 where their mean does. In the
    # exponent it costs nothing, but the exponent's rounding, which fp32 would show.
    DTYPE: tl.constexpr = query.dtype.element_ty
    HEADROOM: tl.constexpr = 0.0625 if DTYPE == tl.bfloat16 else 0.0
    WEIGHT: tl.constexpr = 0.0000152587890625 if DTYPE == tl.float32 else 1.0
    SHRINK: tl.constexpr = 1.0 if DTYPE == tl.float16 else _QUERY_SHRINK

    # The queries stay in registers or shared memory for all sources
    c0 = tl.arange(0, D0)
    W0: tl.constexpr = D0 if D1 > 0 else D
    q_at = query + (b64 * query_b + h64 * query_h) * UNIT + (i * query_n)[:, None] * UNIT
    q0 = load_tile(q_at + c0[None, :], query_ok, c0, W0, D0, True, UPCAST)
    q0 = (q0 * SHRINK).to(q0.dtype)
    q1 = q0
    acc0 = tl.zeros([BM, D0], tl.float32)
    acc1 = 0.0
    if D1 > 0:
        c1 = tl.arange(0, D1)
        q1 = load_tile(q_at + (D0 + c1)[None, :], query_ok, c1, D - D0, D1, True, UPCAST)
        q1 = (q1 * SHRINK).to(q1.dtype)
        acc1 = tl.zeros([BM, D1], tl.float32)
    top = tl.full([BM], -MAX, tl.float32)
    total = tl.zeros([BM, 8], tl.float32)
    sum0, sum1 = acc0, acc1  # of the groups that are done

    on = tl.arange(0, BN)
    for s in range(S):
        row, reads = source_row(rows, with_rows, R, s, b, S)
        index, index_count, count = key_list(
            key_index, key_count, index_stride, count_stride, with_index, M, s, c64, row, reads, S
        )
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
        alpha = unit_scale
        if logit_scale is not None:
            alpha = unit_scale * per_head(logit_scale, scale_stride, with_scale, s, b64, h64, 1.0, S)
        beta = 0.0
        if logit_bias is not None:
            beta = per_head(logit_bias, shift_stride, with_shift, s, b64, h64, 0.0, S) * _LOGIT_UNIT
        bias = None
        bias_count = 0
        if key_bias is not None:
            bias_count = tl.where(((with_bias >> s) & 1) != 0, count, 0)
            bias = pick(key_bias, s, S) + row * pick_int(bias_stride[0], s, S)
        k_n = pick_int(key_stride[1], s, S)
        v_n = pick_int(value_stride[1], s, S)
        k = pick(key, s, S)
        k += (row * pick_int(key_stride[0], s, S) + h64 * pick_int(key_stride[2], s, S)) * UNIT
        v = pick(value, s, S)
        v += (row * pick_int(value_stride[0], s, S) + h64 * pick_int(value_stride[2], s, S)) * UNIT

        # Whole tiles, then the keys that are left: a loop of at most one turn, since straight code reads the tiles of
        # shared memory at constant addresses, which ptxas 12.8 (Triton 3.6) gets wrong in tiles below 128 bytes a row
        whole = count // BN * BN
        entries = key_entries(key_index, index, on, index_count)
        for j in tl.range(0, whole, BN):
            at = j + on
            tokens = key_tokens(key_index, entries, at, index_count)
            entries = key_entries(key_index, index, at + BN, index_count)
            value_tokens = _value_tokens(value_list, tokens, at, value_count, last)
            shift = _key_shift(key_bias, bias, tokens, at, bias_count, beta)
            acc0, acc1, top, total = _attend_tile(
                q0, q1, acc0, acc1, top, total, k, v, tokens, value_tokens, query_ok, k_n, v_n, alpha, shift,
                D, D0, D1, BM, BN, UNIT, NARROW, PER_PAIR, False, PRECISION, UPCAST, HEADROOM, WEIGHT,
            )  # fmt: skip
        for j in tl.range(whole, count, BN):
            at = j + on
            tokens = key_tokens(key_index, key_entries(key_index, index, at, index_count), at, index_count)
            value_tokens = _value_tokens(value_list, tokens, at, value_count, last)
            shift = _key_shift(key_bias, bias, tokens, at, bias_count, beta)
            acc0, acc1, top, total = _attend_tile(
                q0, q1, acc0, acc1, top, total, k, v, tokens, value_tokens, at < count, k_n, v_n, alpha, shift,
                D, D0, D1, BM, BN, UNIT, NARROW, PER_PAIR, True, PRECISION, UPCAST, HEADROOM, WEIGHT,
            )  # fmt: skip

        if group_ends is not None:
            if ((group_ends >> s) & 1) != 0:
                i = query_tokens(query_order, slot, query_ok)
                factor = _group_factor(tl.sum(total, 1), weight, weight_stride, with_weight, s, b64, i, query_ok, S)
                sum0 += acc0 * factor[:, None]
                acc0 = tl.zeros([BM, D0], tl.float32)
                if D1 > 0:
                    sum1 += acc1 * factor[:, None]
                    acc1 = tl.zeros([BM, D1], tl.float32)
                top = tl.full([BM], -MAX, tl.float32)
                total = tl.zeros([BM, 8], tl.float32)

    # Normalize and store; no visible key: out 0, lse -inf; a NaN in acc stays
    i = query_tokens(query_order, slot, query_ok)  # read again: cheaper than registers held through the loop
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
        wide = top.to(lse.dtype.element_ty)  # fp64 keeps the mass beside a huge top, as the backward pass needs
        natural = wide * 177.445678223346 + tl.log2(mass / WEIGHT).to(wide.dtype) * 0.6931471805599453  # 256 ln 2, ln 2
        far = (tl.abs(natural) == INF) & (mass < INF)  # -inf is for a query that sees nothing
        natural = tl.where(far, tl.where(top > 0, MAX, -MAX), natural)
        tl.store(lse + b64 * lse_b + i * lse_n + h64 * lse_h, tl.where(mass == 0, -INF, natural), mask=query_ok)


def _value_index_strides(indices: tuple[Tensor, ...] | None, key: Sequence[Tensor]) -> tuple | None:
    """Encoded (strides of the source row, strides of the batch row): one of the two is 0."""
    if indices is None:
        return None
    by_row = [x.shape[0] == k.shape[0] for x, k in zip(indices, key)]
    steps = [strides(x, 0)[0] for x in indices]
    return tuple(encode(x if r == wanted else 0 for x, r in zip(steps, by_row)) for wanted in (True, False))


def multi_source_attention_triton(query: Tensor, *arguments) -> None:
    """arguments: those of AttentionTables, out, lse; shapes as in the schema `multi_source_attention` of
    lr_kernels/ops.py. An entry of rows outside the source reads nothing; one of value_index outside the values reads
    the nearest token inside."""
    *fields, out, lse = arguments
    tables = AttentionTables(*fields)
    check_attention(query, tables, out, lse)
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
    rows, _, with_rows = tables_of(tables.rows)
    index, index_strides, with_index = tables_of(tables.key_index, 0, 1)
    count, count_strides, _ = tables_of(tables.key_count, 0, 1)
    value_index, _, with_value_index = tables_of(tables.value_index)
    bias, bias_strides, with_bias = tables_of(tables.key_bias, 0)
    scales, scale_strides, with_scale = strided_tables(tables.logit_scale)
    shifts, shift_strides, with_shift = strided_tables(tables.logit_bias)
    weights, weight_strides, with_weight = strided_tables([tables.weight[g] for g in groups])
    order, starts = dense_last(tables.query_order), dense_last(tables.class_start)
    grouped = groups[0] != groups[-1]
    group_ends = sum(1 << s for s in range(S) if s == S - 1 or groups[s + 1] != groups[s]) if grouped else None
    per_pair = any(x is not None for x in (bias, scales, shifts)) or not tables.scale > 0
    biased = per_pair or value_index is not None
    kind = "grouped" if grouped else "biased" if biased else "dense" if index is None else "gathered"
    classes = 1 if starts is None else starts.shape[1] - 1
    # 16-byte loads need every stride to be a multiple of 16 bytes; strides are then passed in those units
    unit = 16 // query.element_size()
    dims = [strides(x, 0, 1, 2) for x in (query, out, *key, *value)]
    if any(x % unit for strides_ in dims for x in strides_):
        unit = 1
    units = [tuple(x // unit for x in strides_) for strides_ in dims]
    query_strides, out_strides, *source_units = units
    tile = tiles.attention_tile(arch, D, query.dtype, kind, B * N * H)
    if query.element_size() == 2 and arch != tiles.INTERPRETER:
        if unit == 1 or any(x.data_ptr() % 16 for x in (query, *key, *value)):
            tile = tiles.unaligned_tile(arch, D)
    tiles_per_head = triton.cdiv(N, tile.BM) + classes - 1
    arguments = (
        query, tuple(key), tuple(value), rows, index, count, value_index, bias, scales, shifts, weights,
        order, starts, out, lse,
        encode(k.shape[1] for k in key), encode(k.shape[0] for k in key),
        None if value_index is None else encode(v.shape[1] for v in value),
        tuple(encode(x) for x in zip(*source_units[:S])), tuple(encode(x) for x in zip(*source_units[S:])),
        index_strides, count_strides, _value_index_strides(value_index, key), bias_strides,
        scale_strides, shift_strides, weight_strides,
        N, H, classes, tiles_per_head,
        tables.scale * LOGIT_UNIT / (1 if query.dtype == torch.float16 else QUERY_SHRINK),
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
