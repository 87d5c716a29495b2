"""multi_source_attention, backward of one softmax group, without atomic operations: the same bits every time.

With P = exp2(logit - lse) computed again, dP = ⟨grad_out, V⟩ and dS = P · (dP - ⟨grad_out, out⟩ + grad_lse):

    grad_query = Σ α · dS · K     grad_key = Σ α · dS · Q     grad_value = Σ P · grad_out     grad_key_bias = Σ dS

The first kernel walks the keys of all sources for a tile of queries, as the forward pass does. The second runs once per
source: a program owns a tile of keys of one source row and one head, and walks the queries of all batch rows that read
that row. Logits and lse are in log2 units; lse has two fp32 parts, since a huge logit and a rounded lse do not cancel.
Where lse is coarse, the rounding of the logits decides, and a tile finds maximum and sum again, as P is computed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.calls import Call
from ..runtime.schemas import AttentionTables
from ..runtime.tensors import true_places
from . import tiles
from .attention_arguments import by_dimension, constants_of, in_units, query_order, source_arguments, strided_tables
from .attention_backward_steps import (
    COARSE,
    add_products,
    add_to_rows,
    load_lse,
    products,
    queries_in_range,
    range_of_tile,
    seen_keys,
    source_logits,
    store_parts,
    sums_again,
    weights,
)
from .attention_checks import attention_inputs
from .compact_keys import compact_keys_triton
from .launch import architecture, check_grid, dense_last, on_device, strides
from .sources import (
    INF,
    LOG2E,
    block_tile,
    key_entries,
    key_shift,
    key_tokens,
    load_parts,
    pick,
    pick_int,
    query_tile,
    query_tokens,
    to_log2,
)


@triton.jit(
    do_not_specialize=[
        "N", "H", "classes", "query_block", "tiles_per_head",
        "with_rows", "with_index", "with_range", "with_bias", "with_scale", "with_shift",
        "query_b", "query_n", "query_h", "out_b", "out_n", "out_h", "grad_b", "grad_n", "grad_h",
        "lse_b", "lse_n", "lse_h", "order_b", "class_b",
    ]
)  # fmt: skip
def attention_backward_query_kernel(
    grad_out, grad_lse,  # (B, N, H, E), fp32 (B, N, H) or None
    query,  # (B, N, H, D)
    key, value,  # S x (R, M, K, D), S x (R, M, K, E)
    rows, key_index, key_count, key_range, key_bias, logit_scale, logit_bias,  # as in the forward kernel
    query_order, class_start,
    out, lse,  # (B, N, H, E), fp64 (B, N, H) contiguous
    grad_query, terms,  # results: (B, N, H, D), and fp32 (B, N, H, 3): lse in two parts, <grad_out, out>; contiguous
    M, R, key_block, heads_per_key_head,
    key_stride, value_stride, index_stride, count_stride, range_stride, bias_stride, scale_stride, shift_stride,
    N, H, classes, query_block, tiles_per_head, scale,
    with_rows, with_index, with_range, with_bias, with_scale, with_shift,
    query_b, query_n, query_h, out_b, out_n, out_h, grad_b, grad_n, grad_h,  # in units of UNIT elements
    lse_b, lse_n, lse_h,  # of grad_lse
    order_b, class_b,
    S: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grad_query of BM queries of one class and head, and their terms for the other kernel."""
    scale = tl.cast(scale, tl.float32)  # the interpreter takes a tiny number for fp64
    pid = tl.program_id(0)
    tile = pid % tiles_per_head
    h = pid // tiles_per_head % H
    b = pid // tiles_per_head // H
    h64 = h.to(tl.int64)
    b64 = b.to(tl.int64)
    om = tl.arange(0, BM)
    c64 = tl.cast(0, tl.int64)
    first = tile * BM
    end = N
    if query_block is not None:
        c, first, end = block_tile(query_block, tile, N, BM)
        if first >= end:
            return
        c64 = c.to(tl.int64)
    elif query_order is not None:
        c, first, end = query_tile(class_start + b64 * class_b, tile, classes, BM)
        if first >= end:
            return
        c64 = c.to(tl.int64)
        query_order += b64 * order_b
    slot = first + om
    query_ok = slot < end
    i = query_tokens(query_order, slot, query_ok)

    q_at = query + (b64 * query_b + h64 * query_h) * UNIT + (i * query_n)[:, None] * UNIT
    q0, q1 = load_parts(q_at, query_ok, D, D0, D1, UPCAST)
    g_at = grad_out + (b64 * grad_b + h64 * grad_h) * UNIT + (i * grad_n)[:, None] * UNIT
    g0, g1 = load_parts(g_at, query_ok, E, E0, E1, UPCAST)
    o_at = out + (b64 * out_b + h64 * out_h) * UNIT + (i * out_n)[:, None] * UNIT
    o0, o1 = load_parts(o_at, query_ok, E, E0, E1, UPCAST)
    # the diagonal of a product: rounded as dP is, so that the two cancel where one key has all the weight
    crossed = products(g0, g1, o0, o1, E1, PRECISION)
    sums = tl.sum(tl.where(om[:, None] == om[None, :], crossed, 0.0), 1)
    places = (b64 * N + i) * H + h
    top, rest = load_lse(lse, places, query_ok)
    coarse = tl.max(tl.where(tl.abs(top) < INF, tl.abs(top), 0.0), 0) > COARSE
    if coarse:
        top, rest = sums_again(
            q0, q1, key, rows, key_index, key_count, key_range, key_bias, logit_scale, logit_bias,
            query_order, slot, end,
            M, R, key_block, heads_per_key_head, key_stride, index_stride, count_stride, range_stride, bias_stride,
            scale_stride, shift_stride, with_rows, with_index, with_range, with_bias, with_scale, with_shift,
            scale, b, h64, c64,
            S, D, D0, D1, BM, BN, UNIT, PRECISION, UPCAST,
        )  # fmt: skip
    tl.store(terms + places * 3, top, mask=query_ok)
    tl.store(terms + places * 3 + 1, rest, mask=query_ok)
    tl.store(terms + places * 3 + 2, sums, mask=query_ok)
    # coarse logits are rounded before the maximum is taken off, and their sum divides the result
    before = tl.where(coarse, 0.0, top)
    after = tl.where(coarse, top, rest)
    mass = tl.where(coarse, tl.exp2(-rest), 1.0)
    added = tl.zeros([BM], tl.float32)
    if grad_lse is not None:
        added = tl.load(grad_lse + b64 * lse_b + i * lse_n + h64 * lse_h, mask=query_ok, other=0.0)
    acc0 = tl.zeros([BM, D0], tl.float32)
    acc1 = 0.0
    if D1 > 0:
        acc1 = tl.zeros([BM, D1], tl.float32)

    on = tl.arange(0, BN)
    for s in range(S):
        row, head, k, k_n, index, index_count, block, count, alpha, own, beta, bias, bias_count = source_logits(
            key, rows, key_index, key_count, key_bias, logit_scale, logit_bias,
            M, R, key_block, heads_per_key_head, key_stride, index_stride, count_stride, bias_stride, scale_stride,
            shift_stride, with_rows, with_index, with_bias, with_scale, with_shift, scale, s, b, h64, c64, S, UNIT,
        )  # fmt: skip
        first, last, low, high = range_of_tile(
            key_range, range_stride, with_range, key_index, index, index_count, block, count, query_order, slot, end,
            s, b64, S,
        )  # fmt: skip
        factor = scale * own  # of the natural logit
        v_n = pick_int(value_stride[1], s, S)
        v = pick(value, s, S)
        v += (row * pick_int(value_stride[0], s, S) + head * pick_int(value_stride[2], s, S)) * UNIT
        entries = key_entries(key_index, index, first + on, index_count, block)
        for j in tl.range(first, last, BN):
            at = j + on
            ok = at < last
            tokens = key_tokens(key_index, entries, at, index_count, block)
            entries = key_entries(key_index, index, at + BN, index_count, block)
            shift = key_shift(key_bias, bias, tokens, at, bias_count, beta)
            k0, k1 = load_parts(k + (tokens.to(tl.int64) * k_n)[:, None] * UNIT, ok, D, D0, D1, UPCAST)
            v0, v1 = load_parts(v + (tokens.to(tl.int64) * v_n)[:, None] * UNIT, ok, E, E0, E1, UPCAST)
            scores = products(q0, q1, k0, k1, D1, PRECISION)
            p = weights(tl.fma(scores, alpha, shift - before[:, None]) - after[:, None])
            seen = seen_keys(key_range, ok, tokens, low, high)
            p = tl.where(seen, p, 0.0)
            ds = p * (products(g0, g1, v0, v1, E1, PRECISION) - sums[:, None] + added[:, None])
            if key_range is not None:
                ds = tl.where(seen, ds, 0.0)  # a value of NaN that a query does not see
            acc0, acc1 = add_products(acc0, acc1, ds * factor, k0, k1, D1, PRECISION)

    acc0 *= mass[:, None]
    if D1 > 0:
        acc1 *= mass[:, None]
    i = query_tokens(query_order, slot, query_ok)  # read again: cheaper than registers held through the loop
    store_parts(grad_query + (((b64 * N + i) * H + h) * D)[:, None], acc0, acc1, query_ok, D, D0, D1)


@triton.jit(
    do_not_specialize=[
        "M", "R", "B", "N", "K", "H", "classes", "query_block", "key_tiles",
        "key_b", "key_n", "key_h", "value_b", "value_n", "value_h",
        "index_r", "count_r", "visible_block", "visible_c", "visible_r", "visible_h", "range_b", "bias_r",
        "query_b", "query_n", "query_h", "grad_b", "grad_n", "grad_h", "lse_b", "lse_n", "lse_h",
        "scale_start", "scale_b", "scale_h", "shift_start", "shift_b", "shift_h", "order_b", "class_b",
    ]
)  # fmt: skip
def attention_backward_source_kernel(
    grad_out, grad_lse,  # (B, N, H, E), fp32 (B, N, H) or None
    query,  # (B, N, H, D)
    key, value,  # (R, M, K, D), (R, M, K, E) of one source
    rows,  # int32 (B,) or None
    key_index, key_count,  # int32 (R or 1, M), (R or 1,): the keys that some class and head see; None: all
    visible,  # uint8 (C, R or 1, H or 1, blocks of keys): which class and head see which of them; None: all see all
    key_range,  # int32 (B or 1, N, 2) or None
    key_bias,  # fp32 (R or 1, M) or None
    logit_scale, logit_bias,  # fp32 (B, H) or None
    query_order, class_start,
    terms,  # fp32 (B, N, H, 3) contiguous, from the other kernel
    grad_key, grad_value,  # fp32 (R, M, K, D), (R, M, K, E) contiguous, added to
    grad_key_bias,  # fp32 (K or more, R, M) contiguous, added to, or None
    M, R, B, N, K, H, classes, query_block, key_tiles, scale,
    key_b, key_n, key_h, value_b, value_n, value_h,  # in units of UNIT elements
    index_r, count_r,
    visible_block,  # log2 of the keys of a block of visible
    visible_c, visible_r, visible_h, range_b, bias_r,
    query_b, query_n, query_h, grad_b, grad_n, grad_h,  # in units of UNIT elements
    lse_b, lse_n, lse_h,  # of grad_lse
    scale_start, scale_b, scale_h, shift_start, shift_b, shift_h, order_b, class_b,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grad_key, grad_value and grad_key_bias of BN keys of one row and head of a source; BM queries a step."""
    scale = tl.cast(scale, tl.float32)  # the interpreter takes a tiny number for fp64
    pid = tl.program_id(0)
    tile = pid % key_tiles
    head = pid // key_tiles % K
    r = pid // key_tiles // K
    head64 = head.to(tl.int64)
    r64 = r.to(tl.int64)
    om = tl.arange(0, BM)
    at = tile * BN + tl.arange(0, BN)
    count = M
    if key_index is not None:
        count = tl.load(key_count + r64 * count_r)
    if tile * BN >= count:
        return
    ok = at < count
    tokens = at
    if key_index is not None:
        tokens = tl.load(key_index + r64 * index_r + at, mask=ok, other=0)
    tokens = tokens.to(tl.int64)
    k_at = key + (r64 * key_b + head64 * key_h) * UNIT + (tokens * key_n)[:, None] * UNIT
    k0, k1 = load_parts(k_at, ok, D, D0, D1, UPCAST)
    v_at = value + (r64 * value_b + head64 * value_h) * UNIT + (tokens * value_n)[:, None] * UNIT
    v0, v1 = load_parts(v_at, ok, E, E0, E1, UPCAST)
    bias = tl.zeros([BN], tl.float32)
    if key_bias is not None:
        bias = to_log2(tl.load(key_bias + r64 * bias_r + tokens, mask=ok, other=0.0))
    key0 = tl.zeros([BN, D0], tl.float32)
    value0 = tl.zeros([BN, E0], tl.float32)
    key1 = 0.0
    value1 = 0.0
    if D1 > 0:
        key1 = tl.zeros([BN, D1], tl.float32)
    if E1 > 0:
        value1 = tl.zeros([BN, E1], tl.float32)
    bias_sums = tl.zeros([BN], tl.float32)

    # The batch rows that read this row: one of the same number, all, or those that name it; and for each the heads
    # that read this head
    first_b = tl.where(R == 1, 0, r)
    last_b = tl.where(R == 1, B, r + 1)
    if rows is not None:
        first_b = 0
        last_b = B
    group = H // K
    for x in range(first_b * group, last_b * group):
        b = x // group
        b64 = tl.cast(b, tl.int64)
        h64 = head64 * group + (x - b * group)
        reads = True
        if rows is not None:
            reads = tl.load(rows + b) == r
        alpha = scale * LOG2E
        factor = scale
        if logit_scale is not None:
            own = tl.load(logit_scale + scale_start + b64 * scale_b + h64 * scale_h)
            alpha *= own
            factor = scale * own
        shift = bias
        if logit_bias is not None:
            beta = to_log2(tl.load(logit_bias + shift_start + b64 * shift_b + h64 * shift_h))
            alpha = tl.where(tl.abs(beta) > 1e30, 0.0, alpha)  # fp32 loses ⟨q, k⟩ beside such a bias
            shift = bias + beta
        q = query + (b64 * query_b + h64 * query_h) * UNIT
        g = grad_out + (b64 * grad_b + h64 * grad_h) * UNIT
        order = query_order
        if query_order is not None:
            order += b64 * order_b
        for c in range(classes):
            low = 0
            high = tl.cast(N, tl.int32)
            if query_block is not None:
                low = c * query_block
                high = tl.minimum(low + query_block, high)
            elif query_order is not None:
                low = tl.load(class_start + b64 * class_b + c)
                high = tl.load(class_start + b64 * class_b + c + 1)
            seen = ok
            if visible is not None:
                at_flags = visible + c * visible_c + r64 * visible_r + h64 * visible_h
                flags = tl.load(at_flags + (tokens >> visible_block), mask=ok, other=0).to(tl.int32)
                seen = flags != 0
                high = tl.where(tl.max(flags, 0) != 0, high, low)
            high = tl.where(reads, high, low)
            if key_range is not None:
                low, high = queries_in_range(key_range + b64 * range_b, order, low, high, tokens, ok)
            for j in tl.range(low, high, BM):
                query_ok = j + om < high
                i = query_tokens(order, j + om, query_ok)
                pairs = seen[:, None]
                if key_range is not None:
                    at_range = key_range + b64 * range_b + i * 2
                    begin = tl.load(at_range, mask=query_ok, other=0)
                    end = tl.load(at_range + 1, mask=query_ok, other=0)
                    pairs = pairs & (tokens[:, None] >= begin[None, :]) & (tokens[:, None] < end[None, :])
                q0, q1 = load_parts(q + (i * query_n)[:, None] * UNIT, query_ok, D, D0, D1, UPCAST)
                g0, g1 = load_parts(g + (i * grad_n)[:, None] * UNIT, query_ok, E, E0, E1, UPCAST)
                at_terms = terms + ((b64 * N + i) * H + h64) * 3
                top = tl.load(at_terms, mask=query_ok, other=INF)  # P = 0
                rest = tl.load(at_terms + 1, mask=query_ok, other=0.0)
                sums = tl.load(at_terms + 2, mask=query_ok, other=0.0)
                scores = products(k0, k1, q0, q1, D1, PRECISION)
                p = weights(tl.fma(scores, alpha, shift[:, None]) - top[None, :] - rest[None, :])
                p = tl.where(pairs, p, 0.0)
                value0, value1 = add_products(value0, value1, p, g0, g1, E1, PRECISION)
                ds = products(v0, v1, g0, g1, E1, PRECISION) - sums[None, :]
                if grad_lse is not None:
                    lse_at = grad_lse + b64 * lse_b + i * lse_n + h64 * lse_h
                    ds += tl.load(lse_at, mask=query_ok, other=0.0)[None, :]
                ds = p * ds
                if key_range is not None:
                    ds = tl.where(pairs, ds, 0.0)  # a value of NaN that a query does not see
                key0, key1 = add_products(key0, key1, ds * factor, q0, q1, D1, PRECISION)
                if grad_key_bias is not None:
                    bias_sums += tl.sum(ds, 1)

    # No other program has these keys
    place = (r64 * M + tokens) * K + head
    add_to_rows(grad_key + (place * D)[:, None], key0, key1, ok, D, D0, D1)
    add_to_rows(grad_value + (place * E)[:, None], value0, value1, ok, E, E0, E1)
    if grad_key_bias is not None:
        bias_at = grad_key_bias + (head64 * R + r) * M + tokens
        tl.store(bias_at, tl.load(bias_at, mask=ok, other=0.0) + bias_sums, mask=ok)


def multi_source_attention_backward_triton(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, *arguments: Any
) -> None:
    """Arguments as in the schema `multi_source_attention_backward` of runtime/schemas.py, without value_index."""
    *fields, scale, out, lse, grad_query, grad_key, grad_value, grad_key_bias = arguments
    none = [None] * len(fields[0])
    tables = AttentionTables._make([*fields, [0] * len(grad_key), [None], none, none, scale])
    _check(grad_out, grad_lse, query, tables, out, lse, grad_query, grad_key, grad_value, grad_key_bias)
    # Early return for trivial cases
    if query.numel() == 0:
        return
    if not any(k.shape[1] for k in tables.key):
        grad_query.zero_()
        return
    arch = architecture(query.device)
    terms = torch.empty(*lse.shape, 3, dtype=torch.float32, device=lse.device)
    with on_device(query.device):
        arguments, constants, programs = query_launch(
            grad_out, grad_lse, query, tables, out, lse, grad_query, terms, arch
        )
        grid = check_grid("multi_source_attention_backward", programs)
        attention_backward_query_kernel[grid](*arguments, **constants)
        for s, bias in enumerate(grad_key_bias):
            if tables.key[s].numel() == 0:
                continue
            # a bias that all rows share still gets one sum per row here, so that no two programs add to one place
            shared = bias.numel() > 0 and bias.shape[1] != tables.key[s].shape[0]
            by_row = bias.new_zeros(bias.shape[0], tables.key[s].shape[0], bias.shape[2]) if shared else bias
            arguments, constants, programs = source_launch(
                grad_out, grad_lse, query, tables, s, terms, grad_key[s], grad_value[s],
                by_row if bias.numel() else None, arch,
            )  # fmt: skip
            grid = check_grid("multi_source_attention_backward", programs)
            attention_backward_source_kernel[grid](*arguments, **constants)
            if shared:
                bias += by_row.sum(1, keepdim=True)


def query_launch(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, tables: AttentionTables, out: Tensor, lse: Tensor,
    grad_query: Tensor, terms: Tensor, arch: int,
) -> tuple[tuple, dict, int]:  # fmt: skip
    """(positional arguments, constants and options, number of programs) of attention_backward_query_kernel."""
    B, N, H, D = query.shape
    key, value = tables.key, tables.value
    S, E = len(key), value[0].shape[3]
    tile = tiles.backward_tile(arch, max(D, E), query.dtype, "query")
    sources, order = source_arguments(H, tables), query_order(N, tables)
    tiles_per_head = order.tiles(N, tile.BM)
    unit, units = in_units(query, out, grad_out, *key, *value)
    query_strides, out_strides, grad_strides, *source_strides = units
    arguments = (
        grad_out, grad_lse, query, tuple(key), tuple(value), sources.rows, sources.lists, sources.counts,
        sources.ranges, sources.bias, sources.scales, sources.shifts, order.order, order.starts,
        out, lse, grad_query, terms, sources.keys_of_source, sources.rows_of_source,
        sources.key_block, sources.heads_per_key_head,
        by_dimension(source_strides[:S]), by_dimension(source_strides[S:]),
        sources.index_strides, sources.count_strides, sources.range_strides, sources.bias_strides,
        sources.scale_strides, sources.shift_strides,
        N, H, order.classes, order.block, tiles_per_head, tables.scale, *sources.bits,
        *query_strides, *out_strides, *grad_strides,
        *((0, 0, 0) if grad_lse is None else strides(grad_lse, 0, 1, 2)), *order.strides,
    )  # fmt: skip
    return arguments, {"S": S, **constants_of(tile, D, E, 16, unit, query.dtype)}, B * H * tiles_per_head


def source_launch(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, tables: AttentionTables, s: int, terms: Tensor,
    grad_key: Tensor, grad_value: Tensor, grad_key_bias: Tensor | None, arch: int,
) -> tuple[tuple, dict, int]:  # fmt: skip
    """(positional arguments, constants and options, number of programs) of attention_backward_source_kernel."""
    B, N, H, D = query.shape
    key, value, bias = tables.key[s], tables.value[s], dense_last(tables.key_bias[s])
    R, M, K = key.shape[:3]
    E = value.shape[3]
    tile = tiles.backward_tile(arch, max(D, E), query.dtype, "source")
    block, ranges = tables.key_block[s], dense_last(tables.key_range[s])
    index, count, visible = _keys_of_any_class(tables.key_index[s], tables.key_count[s], block)
    scales, scale_strides, _ = strided_tables([tables.logit_scale[s]])
    shifts, shift_strides, _ = strided_tables([tables.logit_bias[s]])
    order = query_order(N, tables)
    key_tiles = triton.cdiv(M, tile.BN)
    unit, units = in_units(query, grad_out, key, value)
    query_strides, grad_strides, key_strides, value_strides = units

    def plain(encoded: tuple | None) -> tuple[int, ...]:
        return (0, 0, 0) if encoded is None else tuple(x[0] // 16 for x in encoded)

    arguments = (
        grad_out, grad_lse, query, key, value, tables.rows[s], index, count, visible, ranges, bias,
        None if scales is None else scales[0], None if shifts is None else shifts[0], order.order, order.starts,
        terms, grad_key, grad_value, grad_key_bias,
        M, R, B, N, K, H, order.classes, order.block, key_tiles, tables.scale, *key_strides, *value_strides,
        *((0, 0) if index is None or count is None else (*strides(index, 0), *strides(count, 0))),
        0 if visible is None else block.bit_length() - 1,
        *((0, 0, 0) if visible is None else strides(visible, 0, 1, 2)),
        0 if ranges is None else strides(ranges, 0)[0], 0 if bias is None else strides(bias, 0)[0],
        *query_strides, *grad_strides, *((0, 0, 0) if grad_lse is None else strides(grad_lse, 0, 1, 2)),
        *plain(scale_strides), *plain(shift_strides), *order.strides,
    )  # fmt: skip
    return arguments, constants_of(tile, D, E, 16, unit, query.dtype), R * K * key_tiles


def _keys_of_any_class(
    index: Tensor | None, count: Tensor | None, block: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Lists (C or 1, R or 1, H or 1, entries) of the classes and heads -> one list (R or 1, M) of the keys that any of
    them sees, its count, and uint8 (C, R or 1, H or 1, entries) which of them see an entry (None: they all see the
    same). Of entries that are blocks of keys there is no joint list."""
    if index is None or count is None:
        return None, None, None
    if block == 1 and index.shape[0] == index.shape[2] == 1:
        return dense_last(index[0, :, 0]), count[0, :, 0], None
    keys = index.shape[3]
    listed = torch.arange(keys, device=index.device) < count[..., None]
    visible = index.new_zeros(*index.shape[:3], keys + 1, dtype=torch.uint8)
    visible = visible.scatter_(3, torch.where(listed, index, keys).long(), 1)[..., :keys]
    if block > 1:
        return None, None, visible
    seen = visible.amax((0, 2)) > 0
    if seen.is_cuda:  # in one launch
        joint, joint_count = index.new_empty(1, *seen.shape), count.new_empty(1, len(seen))
        compact_keys_triton(seen, None, [0], joint, joint_count)
        return joint[0], joint_count[0], visible
    return *true_places(seen), visible


def _check(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, tables: AttentionTables, out: Tensor, lse: Tensor,
    grad_query: Tensor, grad_key: Sequence[Tensor], grad_value: Sequence[Tensor], grad_key_bias: Sequence[Tensor],
) -> None:  # fmt: skip
    """The arguments of multi_source_attention_backward."""
    call = Call("multi_source_attention_backward", query, "query")
    attention_inputs(call, query, tables)
    rows = query.shape[:3]
    results = (*rows, tables.value[0].shape[3])
    call.input("out", out, results)
    call.input("lse", lse, rows, 0, torch.float64)
    call.input("grad_out", grad_out, results)
    if grad_lse is not None:
        call.input("grad_lse", grad_lse, rows, 0, torch.float32)
    call.output("grad_query", grad_query, query.shape, 4)
    call.lists(len(tables.key), grad_key=grad_key, grad_value=grad_value, grad_key_bias=grad_key_bias)
    for i, (key, value, bias) in enumerate(zip(tables.key, tables.value, tables.key_bias)):
        call.require(tables.value_index[i] is None, f"value_index[{i}]", "None", "a tensor, which needs backend 'cpu'")
        call.output(f"grad_key[{i}]", grad_key[i], key.shape, 4, torch.float32)
        call.output(f"grad_value[{i}]", grad_value[i], value.shape, 4, torch.float32)
        if grad_key_bias[i].numel():
            call.require(bias is not None, f"grad_key_bias[{i}]", "an empty tensor, since key_bias is None", "a tensor")
            assert bias is not None
            call.output(f"grad_key_bias[{i}]", grad_key_bias[i], (query.shape[2], *bias.shape), 3, torch.float32)
