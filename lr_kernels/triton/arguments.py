"""How every Triton op checks its arguments before it launches: all but the contents, which stay on the device.

The same rules as those of the C++ ops (bindings/): shapes against each other, dtypes, one device, dense last
dimensions, lengths of lists, and outputs with memory of their own. Entries of index tables are not looked at: rows and
value_index beyond their source are harmless to the kernels, the others are the caller's promise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.checks import fail
from ..runtime.platform import KERNEL_DTYPES
from ..runtime.schemas import (
    MAX_HEAD_DIM,
    MAX_SOURCES,
    MAX_TOKENS,
    AttentionTables,
)

Extent = int | tuple[int, ...] | None
"""Of a dimension: its size, or one of several, or any."""


class Call:
    """The checks of one call. The tensor that decides dtype and device comes first, outputs come after the inputs."""

    def __init__(self, op: str, first: Tensor, argument: str, dtypes: Sequence[torch.dtype] = KERNEL_DTYPES) -> None:
        self.op, self.dtype, self.device, self.index = op, first.dtype, first.device, first.get_device()
        self.taken: list[tuple[int, int]] = []
        if first.dtype not in dtypes:
            expected = ", ".join(str(x).removeprefix("torch.") for x in dtypes)
            fail(op, argument, f"one of {expected}", first.dtype, error=TypeError)

    def require(self, fits: bool, argument: str, expected: str, got: object) -> None:
        if not fits:
            fail(self.op, argument, expected, got)

    def lists(self, count: int, **lists: Sequence[object]) -> None:
        """Every list has so many entries."""
        for name, x in lists.items():
            if len(x) != count:
                fail(self.op, name, f"{count} entries", len(x))

    def input(
        self, name: str, x: Tensor, shape: Sequence[Extent], dense: int = 1, dtype: torch.dtype | None = None
    ) -> torch.Size:
        """A tensor that is read, its last `dense` dimensions without gaps; returns its sizes."""
        self.taken.append(self._look(name, x, shape, dense, dtype or self.dtype))
        return x.shape

    def output(
        self, name: str, x: Tensor, shape: Sequence[Extent], dense: int = 1, dtype: torch.dtype | None = None
    ) -> None:
        """A tensor that is written: its elements share no memory with each other and with no other tensor."""
        start, end = span = self._look(name, x, shape, dense, dtype or self.dtype)
        if start == end:
            return
        reach = 0  # of the dimensions with smaller strides
        for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride()) if size > 1):
            self.require(stride > reach, name, "elements that share no memory", x.stride())
            reach += (size - 1) * stride
        for first, last in self.taken:
            if start < last and first < end:
                fail(self.op, name, "memory of its own", "memory that another tensor of the call shares")
        self.taken.append(span)

    def _look(self, name: str, x: Tensor, shape: Sequence[Extent], dense: int, dtype: torch.dtype) -> tuple[int, int]:
        """[first byte, end) of a tensor that fits."""
        if x.dtype != dtype:
            fail(self.op, name, str(dtype), x.dtype, error=TypeError)
        if x.get_device() != self.index:
            fail(self.op, name, str(self.device), x.device)
        start, sizes = x.data_ptr(), x.shape
        if sizes == shape and x.is_contiguous() and start:  # most are so, and this precedes every launch
            return start, start + x.nbytes
        strides = x.stride()
        fits, gap, empty = len(sizes) == len(shape), False, False
        packed, reach, free = 1, 1, len(sizes) - dense
        for i in range(len(sizes) - 1, -1, -1) if fits else ():
            size, want = sizes[i], shape[i]
            if size != want and want is not None and not (want.__class__ is tuple and size in want):
                fits = False
            if size > 1:
                gap = gap or (i >= free and strides[i] != packed)
                reach += (size - 1) * strides[i]
                packed *= size
            elif size == 0:
                empty = True
        if not fits:
            fail(self.op, name, f"shape {_text(shape)}", tuple(sizes))
        if empty:
            return 0, 0
        if gap:
            fail(self.op, name, f"no gaps in the last {dense} dimensions", f"strides {strides}")
        self.require(start != 0, name, "a tensor with memory", "one whose memory was released")
        return start, start + reach * x.element_size()


def _text(shape: Sequence[Extent]) -> str:
    sizes = ("any" if x is None else " or ".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in shape)
    return f"({', '.join(sizes)})"


def attention_inputs(call: Call, query: Tensor, tables: AttentionTables) -> None:
    """The arguments that both directions of attention have: query, the sources and the order of the queries."""
    batch, tokens, heads, head_dim = call.input("query", query, (None,) * 4)
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        fail(call.op, "query", f"head_dim from 1 to {MAX_HEAD_DIM}", head_dim)
    count, classes, integers = len(tables.key), 1, torch.int32
    call.require(1 <= count <= MAX_SOURCES, "key", f"1 to {MAX_SOURCES} entries", count)
    names = ("value", "rows", "key_index", "key_count", "value_index", "key_bias", "logit_scale", "logit_bias")
    call.lists(count, **{name: getattr(tables, name) for name in names})
    order, starts = tables.query_order, tables.class_start
    call.require((order is None) == (starts is None), "class_start", "a tensor beside query_order", "one alone")
    if order is not None and starts is not None:
        call.input("query_order", order, ((batch, 1), tokens), 1, integers)
        classes = call.input("class_start", starts, ((batch, 1), None), 1, integers)[1] - 1
        call.require(classes >= 1, "class_start", "at least 2 entries", classes + 1)
    for i in range(count):
        rows, keys = call.input(f"key[{i}]", tables.key[i], (*tables.key[i].shape[:2], heads, head_dim))[:2]
        moved = tables.value_index[i]
        values = call.input(
            f"value[{i}]", tables.value[i], (rows, None if moved is not None else keys, heads, head_dim)
        )
        if max(rows, keys, values[1]) > MAX_TOKENS:
            fail(call.op, f"key[{i}]", f"at most {MAX_TOKENS} rows, keys and values", (rows, keys, values[1]))
        table, index, number = tables.rows[i], tables.key_index[i], tables.key_count[i]
        if table is not None:
            call.input(f"rows[{i}]", table, (batch,), 1, integers)
        else:
            call.require(rows in (1, batch), f"rows[{i}]", f"a tensor, since key has {rows} rows for {batch}", None)
        call.require((index is None) == (number is None), f"key_count[{i}]", "a tensor beside key_index", "one alone")
        if index is not None and number is not None:
            lists = call.input(f"key_count[{i}]", number, ((classes, 1), (rows, 1)), 0, integers)
            call.input(f"key_index[{i}]", index, (*lists, keys), 1, integers)
        if moved is not None:
            call.input(f"value_index[{i}]", moved, ((rows, batch, 1), keys), 1, integers)
        bias = tables.key_bias[i]
        if bias is not None:
            call.input(f"key_bias[{i}]", bias, ((rows, 1), keys), 1, torch.float32)
        for name, strength in (("logit_scale", tables.logit_scale[i]), ("logit_bias", tables.logit_bias[i])):
            if strength is not None:
                call.input(f"{name}[{i}]", strength, (batch, heads), 0, torch.float32)
