"""What both directions of attention in Triton check of query, sources and order of the queries.

Entries of index tables are not looked at: rows and value_index beyond their source are harmless to the kernels, the
others are the caller's promise.
"""

import torch
from torch import Tensor

from ..runtime.calls import Call
from ..runtime.checks import fail
from ..runtime.schemas import (
    EIGHT_BIT_LARGEST,
    MAX_HEAD_DIM,
    MAX_KEY_BLOCK,
    MAX_SOURCES,
    MAX_TOKENS,
    AttentionTables,
)


def attention_inputs(call: Call, query: Tensor, tables: AttentionTables, eight_bit: bool = False) -> None:
    """The arguments that both directions of attention have: query, the sources and the order of the queries. eight_bit:
    whether sources may be in 8 bits."""
    batch, tokens, heads, head_dim = call.input("query", query, ("batch", "tokens", "heads", "head_dim"))
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        fail(call.op, "query", f"head_dim from 1 to {MAX_HEAD_DIM}", head_dim)
    count, classes, value_dim, integers = len(tables.key), 1, 0, torch.int32
    call.require(1 <= count <= MAX_SOURCES, "key", f"1 to {MAX_SOURCES} entries", count)
    names = (
        "value", "rows", "key_index", "key_count", "key_block", "key_range", "value_index", "key_bias", "logit_scale",
        "logit_bias",
    )  # fmt: skip
    scales = ("key_scale", "value_scale")
    call.lists(count, **{name: getattr(tables, name) for name in (*names, *scales)})
    order, starts, block = tables.query_order, tables.class_start, tables.query_block
    call.require(0 <= block <= MAX_TOKENS, "query_block", f"0 to {MAX_TOKENS}", block)
    call.require(not block or order is None, "query_order", "None beside a query_block", "a tensor")
    if block:
        classes = -(-tokens // block)
    call.require((order is None) == (starts is None), "class_start", "a tensor beside query_order", "one alone")
    if order is not None and starts is not None:
        call.input("query_order", order, ((batch, 1), tokens), 1, integers)
        classes = call.input("class_start", starts, ((batch, 1), "classes + 1"), 1, integers)[1] - 1
        call.require(classes >= 1, "class_start", "at least 2 entries", classes + 1)
    for i in range(count):
        key = tables.key[i]
        scaled = eight_bit and key.dtype in EIGHT_BIT_LARGEST
        dtype = key.dtype if scaled else None
        rows, keys, key_heads = call.input(f"key[{i}]", key, (*key.shape[:3], head_dim), 1, dtype)[:3]
        fits = key_heads == heads or (key_heads > 0 and heads % key_heads == 0)
        call.require(fits, f"key[{i}]", f"{heads} heads or a divisor of it", key_heads)
        moved = tables.value_index[i]
        shape = (rows, "values" if moved is not None else keys, key_heads, "head_dim" if i == 0 else value_dim)
        values = call.input(f"value[{i}]", tables.value[i], shape, 1, dtype)
        value_dim = values[3]
        call.require(1 <= value_dim <= MAX_HEAD_DIM, f"value[{i}]", f"head_dim from 1 to {MAX_HEAD_DIM}", value_dim)
        for name, x, number in (("key", tables.key_scale[i], keys), ("value", tables.value_scale[i], values[1])):
            expected = f"a tensor beside an 8-bit {name}" if scaled else f"None beside a {name} of the query's dtype"
            call.require((x is not None) == scaled, f"{name}_scale[{i}]", expected, "the other")
            if x is not None:
                call.input(f"{name}_scale[{i}]", x, ((rows, 1), (number, 1), (key_heads, 1)), 0, torch.float32)
        if max(rows, keys, values[1]) > MAX_TOKENS:
            fail(call.op, f"key[{i}]", f"at most {MAX_TOKENS} rows, keys and values", (rows, keys, values[1]))
        table, index, listed = tables.rows[i], tables.key_index[i], tables.key_count[i]
        if table is not None:
            call.input(f"rows[{i}]", table, (batch,), 1, integers)
        else:
            call.require(rows in (1, batch), f"rows[{i}]", f"a tensor, since key has {rows} rows for {batch}", None)
        call.require((index is None) == (listed is None), f"key_count[{i}]", "a tensor beside key_index", "one alone")
        size = tables.key_block[i]
        power = 1 <= size <= MAX_KEY_BLOCK and size & (size - 1) == 0
        call.require(power, f"key_block[{i}]", f"a power of two up to {MAX_KEY_BLOCK}", size)
        if index is not None and listed is not None:
            lists = call.input(f"key_count[{i}]", listed, ((classes, 1), (rows, 1), (heads, 1)), 0, integers)
            call.input(f"key_index[{i}]", index, (*lists, -(-keys // size)), 1, integers)
        ranges = tables.key_range[i]
        if ranges is not None:
            call.input(f"key_range[{i}]", ranges, ((batch, 1), tokens, 2), 2, integers)
        if moved is not None:
            call.input(f"value_index[{i}]", moved, ((rows, batch, 1), keys), 1, integers)
        bias = tables.key_bias[i]
        if bias is not None:
            call.input(f"key_bias[{i}]", bias, ((rows, 1), keys), 1, torch.float32)
        for name, strength in (("logit_scale", tables.logit_scale[i]), ("logit_bias", tables.logit_bias[i])):
            if strength is not None:
                call.input(f"{name}[{i}]", strength, (batch, heads), 0, torch.float32)
