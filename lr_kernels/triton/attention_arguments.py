"""How the launchers of attention, forward and backward, turn the tables of the op into kernel arguments."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.schemas import EIGHT_BIT_LARGEST, AttentionTables
from .launch import INTERPRETED, dense_last, dot_precision, strides
from .tiles import Tile


def encode(integers: Iterable[int]) -> tuple[int, ...]:
    """Integers for a tuple argument. Triton (3.6 to 3.9) compiles anew for tuple elements that are 1 or that become
    divisible by 16, whatever do_not_specialize says; times 16 they all look alike."""
    return tuple(16 * x for x in integers)


def optional(tensors: Sequence[Tensor | None]) -> tuple[tuple[Tensor, ...], int]:
    """(S pointers, bit set of the sources that have one); the gaps hold a pointer that is never read."""
    filler = next((x for x in tensors if x is not None), None)
    bits = sum(1 << s for s, x in enumerate(tensors) if x is not None)
    return () if filler is None else tuple(filler if x is None else x for x in tensors), bits


def tables_of(tensors: Sequence[Tensor | None], *dims: int) -> tuple[tuple[Tensor, ...] | None, tuple | None, int]:
    """`optional` of tables made contiguous in the last dimension, and the encoded strides of `dims`; None for none."""
    pointers, bits = optional([dense_last(x) for x in tensors])
    if not pointers:
        return None, None, bits
    return pointers, tuple(encode(x) for x in zip(*(strides(x, *dims) for x in pointers))), bits


def strided_tables(
    tensors: Sequence[Tensor | None], dims: int = 2
) -> tuple[tuple[Tensor, ...] | None, tuple | None, int]:
    """`optional` of fp32 tables of any strides, and encoded (start, strides of the `dims` dimensions). Triton would
    compile anew for pointers off a 16-byte boundary, so a slice of a schedule is passed from the boundary before it on.
    """
    pointers, bits = optional(tensors)
    if not pointers:
        return None, None, bits
    starts = [int(x.storage_offset()) % 4 for x in pointers]
    places = zip(*((start, *strides(x, *range(dims))) for start, x in zip(starts, pointers)))
    pointers = tuple(_from_boundary(x, start) if start else x for start, x in zip(starts, pointers))
    return pointers, tuple(encode(x) for x in places), bits


def _from_boundary(x: Tensor, start: int) -> Tensor:
    """The memory of x and the `start` elements before it."""
    span = start + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride())) + 1
    return x.as_strided((span,), (1,), x.storage_offset() - start)


Pointers = tuple[Tensor, ...] | None
Strides = tuple[tuple[int, ...], ...] | None
"""Encoded strides: one tuple of S integers per dimension."""


class SourceArguments(NamedTuple):
    """The tables of a call as both directions of attention pass them to a kernel over all sources."""

    rows: Pointers
    lists: Pointers
    counts: Pointers
    ranges: Pointers
    bias: Pointers
    scales: Pointers
    shifts: Pointers
    keys_of_source: tuple[int, ...]
    rows_of_source: tuple[int, ...]
    key_block: tuple[int, ...] | None
    """log2 of the keys of an entry of the lists; None: every entry is one key"""
    heads_per_key_head: tuple[int, ...] | None
    """None: every source has as many heads as the query"""
    index_strides: Strides
    count_strides: Strides
    range_strides: Strides
    bias_strides: Strides
    scale_strides: Strides
    shift_strides: Strides
    bits: tuple[int, int, int | None, int, int, int]
    """Bit sets over the sources, bit s for source s: which have a table of rows, a list of keys, ranges (None: no
    source), a bias, a scale, a shift."""


def source_arguments(heads: int, tables: AttentionTables) -> SourceArguments:
    """The tables of all sources, contiguous in the last dimension, and their strides. heads: of the query."""
    rows, _, with_rows = tables_of(tables.rows)
    index, index_strides, with_index = tables_of(tables.key_index, 0, 1, 2)
    count, count_strides, _ = tables_of(tables.key_count, 0, 1, 2)
    ranges, range_strides, with_range = tables_of(tables.key_range, 0)
    blocks = [n if x is not None else 1 for n, x in zip(tables.key_block, tables.key_index)]
    shared = [heads // max(1, k.shape[2]) for k in tables.key]
    bias, bias_strides, with_bias = tables_of(tables.key_bias, 0)
    scales, scale_strides, with_scale = strided_tables(tables.logit_scale)
    shifts, shift_strides, with_shift = strided_tables(tables.logit_bias)
    return SourceArguments(
        rows, index, count, ranges, bias, scales, shifts,
        encode(k.shape[1] for k in tables.key), encode(k.shape[0] for k in tables.key),
        encode(n.bit_length() - 1 for n in blocks) if max(blocks) > 1 else None,
        encode(shared) if max(shared) > 1 else None,
        index_strides, count_strides, range_strides, bias_strides, scale_strides, shift_strides,
        (with_rows, with_index, with_range or None, with_bias, with_scale, with_shift),
    )  # fmt: skip


class EightBitArguments(NamedTuple):
    """The sources of a call whose keys and values are in 8 bits, as the forward kernel takes them; None without any."""

    key: Pointers = None
    """as int8, whatever the bits mean"""
    value: Pointers = None
    key_scale: Pointers = None
    value_scale: Pointers = None
    key_strides: Strides = None
    value_strides: Strides = None
    key_scale_strides: Strides = None
    value_scale_strides: Strides = None
    sources: int | None = None
    """Bit s: source s is in 8 bits"""
    float8: int | None = None
    """Bit s: they are e4m3 numbers; None where all 8-bit sources are alike"""
    formats: int = 0
    """1: some are int8, 2: some are e4m3, 3: both"""
    unit: int = 16
    """of the strides, in elements"""


_NO_EIGHT_BITS = EightBitArguments()


def eight_bit_arguments(tables: AttentionTables) -> EightBitArguments:
    """The 8-bit sources of a call, whose scales have any strides."""
    if all(x is None for x in tables.key_scale):
        return _NO_EIGHT_BITS
    found = [(s, k) for s, k in enumerate(tables.key) if k.dtype in EIGHT_BIT_LARGEST]
    float8 = sum(1 << s for s, k in found if k.dtype == torch.float8_e4m3fn)

    def as_bits(tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], int]:
        return optional([x.view(torch.int8) if x.dtype in EIGHT_BIT_LARGEST else None for x in tensors])

    key, sources = as_bits(tables.key)
    value, _ = as_bits(tables.value)
    unit, steps = in_units(*key, *value)
    key_scale, key_scale_strides, _ = strided_tables(tables.key_scale, 3)
    value_scale, value_scale_strides, _ = strided_tables(tables.value_scale, 3)
    formats = (float8 != sources) + 2 * (float8 != 0)
    return EightBitArguments(
        key, value, key_scale, value_scale, by_dimension(steps[: len(key)]), by_dimension(steps[len(key) :]),
        key_scale_strides, value_scale_strides, sources, float8 if formats == 3 else None, formats, unit,
    )  # fmt: skip


class QueryOrder(NamedTuple):
    """The order of the queries by class, as the kernels read it."""

    order: Tensor | None
    starts: Tensor | None
    classes: int
    strides: tuple[int, int]
    """The strides of the batch row in `order` and in `starts`."""
    block: int | None = None
    """Queries of a class, where the classes are blocks of queries in order."""

    def tiles(self, queries: int, size: int) -> int:
        """Tiles of `size` queries of a batch row and head, at most."""
        if self.block is not None:
            return self.classes * -(-self.block // size)
        return -(-queries // size) + self.classes - 1


def query_order(queries: int, tables: AttentionTables) -> QueryOrder:
    """The order of the queries, contiguous in the last dimension; without one all queries are one class."""
    if tables.query_block:
        classes = -(-queries // tables.query_block)
        return QueryOrder(None, None, classes, (0, 0), tables.query_block)
    order, starts = dense_last(tables.query_order), dense_last(tables.class_start)
    if order is None or starts is None:
        return QueryOrder(None, None, 1, (0, 0))
    return QueryOrder(order, starts, starts.shape[1] - 1, (strides(order, 0)[0], strides(starts, 0)[0]))


def in_units(*tensors: Tensor) -> tuple[int, list[tuple[int, ...]]]:
    """(unit, strides of B, N, H of each tensor in units): 16 bytes where all strides allow it, else one element."""
    unit = 16 // tensors[0].element_size()
    found = [strides(x, 0, 1, 2) for x in tensors]
    if any(x % unit for steps in found for x in steps):
        unit = 1
    return unit, [tuple(x // unit for x in steps) for steps in found]


def by_dimension(steps: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Strides of S tensors -> encoded, a tuple of S per dimension."""
    return tuple(encode(x) for x in zip(*steps))


def constants_of(
    tile: Tile, head_dim: int, value_dim: int, least: int, unit: int, dtype: torch.dtype
) -> dict[str, object]:
    """The compile-time arguments and options of a kernel of attention. The tile is that of the larger head_dim; the
    smaller one is computed in one part of a power of two of columns, of `least` or more."""
    columns = {max(head_dim, value_dim): (tile.D0, tile.D1)}
    d, e = (columns.get(x) or (max(least, 1 << (x - 1).bit_length()), 0) for x in (head_dim, value_dim))
    return {
        "D": head_dim, "D0": d[0], "D1": d[1], "E": value_dim, "E0": e[0], "E1": e[1],
        "BM": tile.BM, "BN": tile.BN, "UNIT": unit,
        "PRECISION": dot_precision(dtype), "UPCAST": INTERPRETED,
        "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True,
    }  # fmt: skip
