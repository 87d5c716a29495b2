"""multi_source_attention, forward: one launch for all sources, masks and query classes of a layer.

A run-time loop over the sources picks pointers by a select chain, so there is one pipelined loop over key tiles however
many sources there are, no pointer table on the device and no host synchronization. Logits live in log2 units; a tile
that meets numbers which leave fp32 in them walks its keys once more, in wider units: see attention_steps.
Between softmax groups the running softmax starts anew and its result moves to a second fp32 accumulator. What a call
does not have is None or a constant for the compiler; how its sources fall into groups and all values are run-time data.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.calls import Call
from ..runtime.schemas import AttentionTables
from . import tiles
from .attention_arguments import (
    by_dimension,
    constants_of,
    eight_bit_arguments,
    encode,
    in_units,
    optional,
    query_order,
    source_arguments,
    strided_tables,
    tables_of,
)
from .attention_checks import attention_inputs
from .attention_steps import attend_queries
from .launch import architecture, check_grid, on_device, strides
from .sources import block_tile, query_tile


@triton.jit(
    do_not_specialize=[
        "N", "H", "classes", "query_block", "tiles_per_head",
        "with_rows", "with_index", "with_range", "with_bias", "with_scale", "with_shift",
        "with_value_index", "with_weight", "group_ends", "with_eight_bit", "with_float8",
        "query_b", "query_n", "query_h", "out_b", "out_n", "out_h", "lse_b", "lse_n", "lse_h", "order_b", "class_b",
    ]
)  # fmt: skip
def multi_source_attention_forward_kernel(
    query,  # (B, N, H, D)
    key, value,  # S x (R, M, K, D), S x (R, M, K, E); None where all sources are in 8 bits
    rows,  # S x int32 (B,); here and in all up to weight, None where no source has it
    key_index, key_count,  # S x int32 (C or 1, R or 1, H or 1, entries), S x int32 (C or 1, R or 1, H or 1)
    key_range,  # S x int32 (B or 1, N, 2)
    value_index,  # S x int32 (R or B or 1, M)
    key_bias,  # S x fp32 (R or 1, M)
    logit_scale, logit_bias,  # S x fp32 (B, H)
    weight,  # S x fp32 (B, N), of the source's group
    query_order, class_start,  # int32 (B or 1, N), (B or 1, C + 1), or None: one class
    out, lse,  # (B, N, H, E), fp32 or fp64 (B, N, H) or None
    M, R, V,  # S encoded integers each, as all strides of sources; V, tokens of the values, None without value_index
    key_block,  # log2 of the keys of an entry of key_index; None: 0 for all
    heads_per_key_head,  # H / K; None: 1 for all
    key_stride, value_stride,  # (row, key, head) x S, in units of UNIT elements
    index_stride, count_stride, range_stride,  # (class, row, head), same, (b,)
    value_index_stride, bias_stride,  # (row, b), (row,)
    scale_stride, shift_stride, weight_stride,  # (start, b, h), same, (start, b, n)
    N, H, classes, query_block, tiles_per_head, scale,  # query_block: of a class; None: by class_start
    with_rows, with_index, with_range, with_bias, with_scale, with_shift,  # bit s: source s has it
    with_value_index, with_weight,  # the same, None where no source has it
    group_ends,  # bit s: source s is the last of its softmax group; None: one group
    query_b, query_n, query_h, out_b, out_n, out_h,  # strides in units of UNIT elements
    lse_b, lse_n, lse_h, order_b, class_b,
    key8, value8,  # S x int8 (R, M, K, D or E) of the sources in 8 bits; here and below, None without any
    key_scale, value_scale,  # S x fp32 (R or 1, M or 1, K or 1)
    key8_stride, value8_stride,  # (row, key, head) x S, in units of UNIT8 elements
    key_scale_stride, value_scale_stride,  # (start, row, token, head) x S
    with_eight_bit, with_float8,  # bit s: source s is in 8 bits; and they are e4m3, None where all are alike
    S: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E: tl.constexpr, E0: tl.constexpr,
    E1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UNIT: tl.constexpr, NARROW: tl.constexpr, PER_PAIR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    UNIT8: tl.constexpr, EIGHT_BIT: tl.constexpr,
):  # fmt: skip
    """Out and lse of one tile of queries of one head, over all sources."""
    # Which queries: one tile of BM queries of one class, one head
    pid = tl.program_id(0)
    tile = pid % tiles_per_head
    h = pid // tiles_per_head % H
    b = pid // tiles_per_head // H
    b64 = b.to(tl.int64)
    c = 0
    if query_block is not None:
        c, first, end = block_tile(query_block, tile, N, BM)
        if first >= end:
            return
    elif query_order is None:
        first = tile * BM
        end = N
    else:
        c, first, end = query_tile(class_start + b64 * class_b, tile, classes, BM)
        if first >= end:
            return
        query_order += b64 * order_b
    scale = tl.cast(scale, tl.float32)  # the interpreter takes a tiny number for fp64
    call = (
        query, key, value, rows, key_index, key_count, key_range, value_index, key_bias, logit_scale, logit_bias,
        weight, query_order, out, lse, M, R, V, key_block, heads_per_key_head, key_stride, value_stride,
        index_stride, count_stride, range_stride, value_index_stride, bias_stride, scale_stride, shift_stride,
        weight_stride, scale, with_rows, with_index, with_range, with_bias, with_scale, with_shift,
        with_value_index, with_weight, group_ends,
        query_b, query_n, query_h, out_b, out_n, out_h, lse_b, lse_n, lse_h,
        key8, value8, key_scale, value_scale, key8_stride, value8_stride, key_scale_stride, value_scale_stride,
        with_eight_bit, with_float8,
    )  # fmt: skip
    again = attend_queries(
        call, first, end, b, h, c,
        S, D, D0, D1, E, E0, E1, BM, BN, UNIT, NARROW, PER_PAIR, PRECISION, UPCAST, UNIT8, EIGHT_BIT, False,
    )  # fmt: skip
    if again != 0:  # in small tiles: this walk must not take registers from the first
        tl.debug_barrier()  # other threads store the same results now
        last = tl.minimum(first + BM, end)
        for start in range(first, last, 16):
            attend_queries(
                call, start, last, b, h, c,
                S, D, D0, D1, E, E0, E1, 16, 16, UNIT, False, True, PRECISION, UPCAST, UNIT8, EIGHT_BIT, True,
            )  # fmt: skip


def _value_index_strides(indices: tuple[Tensor, ...] | None, key: Sequence[Tensor]) -> tuple | None:
    """Encoded (strides of the source row, strides of the batch row): one of the two is 0."""
    if indices is None:
        return None
    by_row = [x.shape[0] == k.shape[0] for x, k in zip(indices, key)]
    steps = [strides(x, 0)[0] for x in indices]
    return tuple(encode(x if r == wanted else 0 for x, r in zip(steps, by_row)) for wanted in (True, False))


def _plain(tensors: Sequence[Tensor], scales: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The keys, or values, in place of those in 8 bits any other: no program reads them."""
    return optional([x if scale is None else None for x, scale in zip(tensors, scales)])[0]


def multi_source_attention_triton(query: Tensor, *arguments: Any) -> None:
    """arguments: those of AttentionTables, out, lse; shapes as in the schema `multi_source_attention` of
    runtime/schemas.py. An entry of rows outside the source reads nothing; one of value_index outside the values reads
    the nearest token inside."""
    *fields, out, lse = arguments
    tables = AttentionTables(*fields)
    _check(query, tables, out, lse)
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
    S, E = len(key), value[0].shape[3]
    sources, order, eight = source_arguments(H, tables), query_order(N, tables), eight_bit_arguments(tables)
    value_index, _, with_value_index = tables_of(tables.value_index)
    weights, weight_strides, with_weight = strided_tables([tables.weight[g] for g in groups])
    grouped = groups[0] != groups[-1]
    group_ends = sum(1 << s for s in range(S) if s == S - 1 or groups[s + 1] != groups[s]) if grouped else None
    per_pair = sources.bias is not None or sources.scales is not None or not tables.scale > 0
    biased = per_pair or sources.shifts is not None or value_index is not None or eight.formats > 0
    biased |= sources.ranges is not None
    kind = "grouped" if grouped else "biased" if biased else "dense" if sources.lists is None else "gathered"
    plain_key, plain_value = key, value
    if eight.formats:
        plain_key, plain_value = (_plain(x, tables.key_scale) for x in (key, value))
    unit, units = in_units(query, out, *plain_key, *plain_value)
    query_strides, out_strides, *source_strides = units
    plain = len(plain_key)  # S, or 0 where all sources are in 8 bits
    widest, least = max(D, E), 16
    tile = tiles.attention_tile(arch, widest, query.dtype, kind, B * N * H, eight.formats > 0)
    if query.element_size() == 2 and arch != tiles.INTERPRETER:
        # int8 beside e4m3 takes the small tile too: in the others Triton 3.6 spills
        both = eight.formats == 3
        if both or 1 in (unit, eight.unit) or any(x.data_ptr() % 16 for x in (query, *key, *value)):
            tile, least = tiles.unaligned_tile(arch, widest), 64
    tiles_per_head = order.tiles(N, tile.BM)
    arguments = (
        query, tuple(plain_key) or None, tuple(plain_value) or None, sources.rows, sources.lists, sources.counts,
        sources.ranges, value_index, sources.bias, sources.scales, sources.shifts, weights, order.order, order.starts,
        out, lse, sources.keys_of_source, sources.rows_of_source,
        None if value_index is None else encode(v.shape[1] for v in value),
        sources.key_block, sources.heads_per_key_head,
        by_dimension(source_strides[:plain]) or None, by_dimension(source_strides[plain:]) or None,
        sources.index_strides, sources.count_strides, sources.range_strides, _value_index_strides(value_index, key),
        sources.bias_strides, sources.scale_strides, sources.shift_strides, weight_strides,
        N, H, order.classes, order.block, tiles_per_head, tables.scale,
        *sources.bits, with_value_index or None, with_weight or None, group_ends,
        *query_strides, *out_strides, *((0, 0, 0) if lse is None else strides(lse, 0, 1, 2)), *order.strides,
        *eight[:-2],
    )  # fmt: skip
    constants = {
        "S": S, **constants_of(tile, D, E, least, unit, query.dtype), "PER_PAIR": per_pair,
        "UNIT8": eight.unit, "EIGHT_BIT": eight.formats,
        "NARROW": all(x.shape[1] * x.stride(1) < 2**31 for x in (*key, *value)),
    }  # fmt: skip
    return arguments, constants, B * H * tiles_per_head


def _check(query: Tensor, tables: AttentionTables, out: Tensor, lse: Tensor | None) -> None:
    """The arguments of multi_source_attention."""
    call = Call("multi_source_attention", query, "query")
    attention_inputs(call, query, tables, eight_bit=True)
    batch, tokens, heads, _ = query.shape
    groups = list(tables.softmax_group)
    call.lists(len(tables.key), softmax_group=groups)
    ascending = groups[0] == 0 and all(0 <= b - a <= 1 for a, b in pairwise(groups))
    call.require(ascending, "softmax_group", "numbers that ascend from 0 in steps of 1", groups)
    call.lists(groups[-1] + 1, weight=tables.weight)
    for g, weight in enumerate(tables.weight):
        if weight is not None:
            call.input(f"weight[{g}]", weight, (batch, tokens), 0, torch.float32)
    call.output("out", out, (*query.shape[:3], tables.value[0].shape[3]))
    if lse is not None:
        call.require(groups[-1] == 0, "lse", "None, since each softmax group has its own", "a tensor")
        dtype = torch.float64 if lse.dtype == torch.float64 else torch.float32
        call.output("lse", lse, (batch, tokens, heads), 0, dtype)
