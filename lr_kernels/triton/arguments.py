"""What every Triton op checks of its arguments before it launches: all but the contents, which stay on the device.

The same rules as those of the C++ ops (bindings/): shapes against each other, dtypes, one device, dense last
dimensions, lengths of lists, and outputs with memory of their own. Entries of index tables are not looked at: rows and
value_index beyond their source are harmless to the kernels, the others are the caller's promise.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..runtime.checks import fail
from ..runtime.platform import KERNEL_DTYPES
from ..runtime.schemas import (
    COLUMNS,
    MAX_HEAD_DIM,
    MAX_PARTS,
    MAX_PREDICTIONS,
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


def check_attention(query: Tensor, tables: AttentionTables, out: Tensor, lse: Tensor | None) -> None:
    """The arguments of multi_source_attention."""
    call = Call("multi_source_attention", query, "query")
    _attention_inputs(call, query, tables)
    batch, tokens, heads, _ = query.shape
    groups = list(tables.softmax_group)
    call.lists(len(tables.key), softmax_group=groups)
    ascending = groups[0] == 0 and all(0 <= b - a <= 1 for a, b in pairwise(groups))
    call.require(ascending, "softmax_group", "numbers that ascend from 0 in steps of 1", groups)
    call.lists(groups[-1] + 1, weight=tables.weight)
    for g, weight in enumerate(tables.weight):
        if weight is not None:
            call.input(f"weight[{g}]", weight, (batch, tokens), 0, torch.float32)
    call.output("out", out, query.shape)
    if lse is not None:
        call.require(groups[-1] == 0, "lse", "None, since each softmax group has its own", "a tensor")
        dtype = torch.float64 if lse.dtype == torch.float64 else torch.float32
        call.output("lse", lse, (batch, tokens, heads), 0, dtype)


def check_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, tables: AttentionTables, out: Tensor, lse: Tensor,
    grad_query: Tensor, grad_key: Sequence[Tensor], grad_value: Sequence[Tensor], grad_key_bias: Sequence[Tensor],
) -> None:  # fmt: skip
    """The arguments of multi_source_attention_backward."""
    call = Call("multi_source_attention_backward", query, "query")
    _attention_inputs(call, query, tables)
    rows = query.shape[:3]
    call.input("out", out, query.shape)
    call.input("lse", lse, rows, 0, torch.float64)
    call.input("grad_out", grad_out, query.shape)
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


def _attention_inputs(call: Call, query: Tensor, tables: AttentionTables) -> None:
    """query, the sources and the order of the queries."""
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


def check_token_maps(
    query: Tensor, key: Tensor, value: Tensor, token_indices: Tensor, out: Tensor, maps: Tensor
) -> None:
    """The arguments of attention_with_token_maps."""
    call = Call("attention_with_token_maps", query, "query")
    batch, tokens, heads, head_dim = call.input("query", query, (None,) * 4)
    call.require(1 <= head_dim <= MAX_HEAD_DIM, "query", f"head_dim from 1 to {MAX_HEAD_DIM}", head_dim)
    call.require(heads >= 1, "query", "at least one head", heads)
    keys = call.input("key", key, (batch, None, heads, head_dim))[1]
    call.require(keys <= MAX_TOKENS, "key", f"at most {MAX_TOKENS} keys", keys)
    call.input("value", value, (batch, keys, heads, head_dim))
    chosen = call.input("token_indices", token_indices, (batch, None), 0, torch.int32)[1]
    call.output("out", out, query.shape)
    call.output("maps", maps, (batch, tokens, chosen), 0, torch.float32)


def check_subject_mask(
    maps: Tensor, threshold: float | None, quantile: float | None, smoothing: int, out: Tensor
) -> None:
    """The arguments of subject_mask."""
    call = Call("subject_mask", maps, "maps", (torch.float32,))
    sizes = call.input("maps", maps, (None,) * 4, 0)
    call.require(0 not in sizes[1:], "maps", "at least one map of at least one pixel", tuple(sizes))
    call.output("out", out, (sizes[0], None, None), 0, torch.bool)
    call.require(0 not in out.shape[1:], "out", "at least one pixel", tuple(out.shape))
    for name, x in (("threshold", threshold), ("quantile", quantile)):
        call.require(x is None or 0 <= x <= 1, name, "0 to 1", x)
    call.require(threshold is None or quantile is None, "quantile", "None beside a threshold", quantile)
    longer = max(out.shape[1:])
    fits = smoothing % 2 == 1 and 1 <= smoothing <= longer
    call.require(fits, "smoothing", f"an odd number from 1 to {longer}", smoothing)


def check_step_blend(
    sample: Tensor, predictions: Sequence[Tensor], coefficients: Tensor, step: Tensor | None, row: int,
    mask: Tensor | None, background: Tensor | None, noise: Tensor | None, history: Tensor | None,
    keep_rows: Tensor | None, out: Tensor, model_input: Tensor | None, history_out: Tensor | None,
) -> None:  # fmt: skip
    """The arguments of step_blend."""
    call = Call("step_blend", sample, "sample")
    batch, *plane = shape = call.input("sample", sample, (None,) * 4, 0)
    count = len(predictions)
    call.require(1 <= count <= MAX_PREDICTIONS, "predictions", f"1 to {MAX_PREDICTIONS} entries", count)
    for i, x in enumerate(predictions):
        call.input(f"predictions[{i}]", x, shape, 0)
    for name, given in (("background", background), ("noise", noise), ("history", history)):
        if given is not None:
            call.input(name, given, shape, 0)
    table = (None, (batch, 1), count + len(COLUMNS))
    steps = call.input("coefficients", coefficients, table, 1, torch.float32)[0]
    if step is not None:
        call.input("step", step, (1,) * min(1, step.dim()), 1, torch.int32)
    call.require(step is not None or 0 <= row < steps, "step", f"0 to {steps - 1}", row)
    if mask is not None:
        call.input("mask", mask, ((batch, 1), *plane[1:]), 0, torch.float32)
    if keep_rows is not None:
        call.input("keep_rows", keep_rows, (batch,), 0, torch.bool)
    kept = mask is not None or keep_rows is not None
    call.require(background is not None or not kept, "background", "a tensor, since mask or keep_rows is given", None)
    call.output("out", out, shape, 4)
    if model_input is not None:
        call.output("model_input", model_input, (None, *plane), 4)
        rows = model_input.shape[0]
        fits = rows == 0 if batch == 0 else rows > 0 and rows % batch == 0
        call.require(fits, "model_input", "the rows of sample once or more", rows)
    if history_out is not None:
        call.output("history_out", history_out, shape, 4)


def check_merge(outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor) -> None:
    """The arguments of merge_attention_states."""
    call = Call("merge_attention_states", out, "out")
    call.require(1 <= len(outs) <= MAX_PARTS, "outs", f"1 to {MAX_PARTS} entries", len(outs))
    call.lists(len(outs), lses=lses)
    shape = call.input("outs[0]", outs[0], (None,) * 4)
    for i, (part, part_lse) in enumerate(zip(outs, lses)):
        call.input(f"outs[{i}]", part, shape)
        call.input(f"lses[{i}]", part_lse, shape[:3], 0, torch.float32)
    call.output("out", out, shape, 4)
    call.output("lse", lse, shape[:3], 3, torch.float32)


def check_adain(
    x: Tensor, reference: Tensor, mask: Tensor | None, reference_mask: Tensor | None, eps: float, out: Tensor
) -> None:
    """The arguments of adain."""
    call = Call("adain", x, "x")
    batch, tokens, *channels = call.input("x", x, (None,) * 4)
    others = call.input("reference", reference, ((batch, 1), None, *channels))[1]
    for name, table, count in (("mask", mask, tokens), ("reference_mask", reference_mask, others)):
        if table is not None:
            call.input(name, table, ((batch, 1), count), 1, torch.bool)
    call.require(eps > 0 and math.isfinite(eps), "eps", "a number above 0", eps)
    call.output("out", out, x.shape)


def check_correspondence(
    target: Tensor, reference: Tensor, columns: int, radius_squared: Tensor, index: Tensor, consistent: Tensor
) -> None:
    """The arguments of correspondence."""
    call = Call("correspondence", target, "target")
    batch, tokens, channels = call.input("target", target, (None,) * 3)
    others = call.input("reference", reference, ((batch, 1), None, channels))[1]
    call.require(tokens <= MAX_TOKENS, "target", f"at most {MAX_TOKENS} tokens", tokens)
    call.require(1 <= others <= MAX_TOKENS, "reference", f"1 to {MAX_TOKENS} tokens", others)
    call.require(channels >= 1, "target", "at least one channel", channels)
    call.require(columns >= 1, "columns", "at least 1", columns)
    call.input("radius_squared", radius_squared, ((batch, 1),), 1, torch.int64)
    call.output("index", index, (batch, tokens), 2, torch.int64)
    call.output("consistent", consistent, (batch, tokens), 2, torch.bool)


def check_compact_keys(
    mask: Tensor | None, groups: Tensor | None, classes: Sequence[int], index: Tensor, count: Tensor
) -> None:
    """The arguments of compact_keys."""
    call = Call("compact_keys", index, "index", (torch.int32,))
    for i, c in enumerate(classes):
        call.require(0 <= c <= 255, f"classes[{i}]", "0 to 255", c)
    call.require(index.dim() == 3, "index", "shape (classes, rows, keys)", tuple(index.shape))
    _, rows, keys = index.shape
    call.require(keys <= MAX_TOKENS, "index", f"at most {MAX_TOKENS} keys", keys)
    for name, x, dtype in (("mask", mask, torch.bool), ("groups", groups, torch.uint8)):
        if x is not None:
            call.input(name, x, ((rows, 1), keys), 1, dtype)
    call.output("index", index, (len(classes), rows, keys), 3)
    call.output("count", count, (len(classes), rows), 2)
