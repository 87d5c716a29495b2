"""The arguments of multi_source_attention: shapes, dtypes and devices, each error naming its argument and source."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..runtime.checks import FLOAT32_MAX, check_entries, check_memory, fail, has_shape, one_of
from ..runtime.schemas import EIGHT_BIT_LARGEST, MAX_HEAD_DIM, MAX_SOURCES, MAX_TOKENS
from ..runtime.tensors import check_dense, is_plain, resolved, within_float32
from ..source import Source
from .plan import (
    AttentionPlan,
    as_made,
    changed_mask,
    check_block_masks,
    check_lists,
    check_masks,
    check_parts,
)

OP = "multi_source_attention"
_REAL_TABLES = ("key_bias", "logit_scale", "logit_bias", "weight")
_QUERY_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Facts(NamedTuple):
    """What the checks learn about a call's arguments."""

    lazy: bool
    """whether a tensor that a kernel would read is lazy (see `resolve`); the dispatcher resolves negatives among query,
    keys and values"""
    requires_grad: bool
    groups: int
    """softmax groups"""


def check(query: Tensor, sources: Sequence[Source], query_groups: Tensor | None, plan: AttentionPlan | None) -> Facts:
    """Shapes, dtypes and devices of every argument, in the order of the signature."""
    try:
        return _check(query, sources, query_groups, plan)
    except RuntimeError:  # a nested tensor has no shape
        check_dense(OP, "query", query)
        check_types(query, sources)
        raise


def check_types(query: Tensor, sources: Sequence[Source]) -> None:
    """The checks that must come before autocast casts and before the transforms of torch.func are looked for."""
    check_dense(OP, "query", query)
    for i, source in enumerate(sources):
        if not isinstance(source, Source):
            fail(OP, f"sources[{i}]", "a Source", type(source).__name__, error=TypeError)
        for name, x in zip(Source._fields, source):
            if isinstance(x, Tensor) or name in ("key", "value"):
                check_dense(OP, f"{name}[{i}]", x)


def _check(query: Tensor, sources: Sequence[Source], query_groups: Tensor | None, plan: AttentionPlan | None) -> Facts:
    eager = not torch.compiler.is_compiling()
    if eager and query.__class__ is not Tensor:
        check_dense(OP, "query", query)
    if query.dim() != 4:
        fail(OP, "query", "shape (batch, tokens, heads, head_dim)", tuple(query.shape))
    batch, tokens, _, head_dim = query.shape
    if query.dtype not in _QUERY_DTYPES:
        fail(OP, "query", "one of float32, float16, bfloat16, float64", query.dtype, error=TypeError)
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        fail(OP, "query", f"head_dim from 1 to {MAX_HEAD_DIM}", head_dim)
    if query.stride(3) != 1:
        _check_stride("query", query, eager)
    if not 1 <= len(sources) <= MAX_SOURCES:
        fail(OP, "sources", f"1 to {MAX_SOURCES}", len(sources))
    first_of_group: dict[int, int] = {}
    lazy, requires_grad = eager and query._is_zerotensor(), query.requires_grad
    blocked = False
    for i, source in enumerate(sources):
        lazy |= _check_source(i, source, query, eager)
        blocked |= source.block_mask is not None
        if source.value.shape[3] != sources[0].value.shape[3]:
            fail(OP, f"value[{i}]", f"head_dim {sources[0].value.shape[3]} as value[0]", source.value.shape[3])
        requires_grad = requires_grad or _requires_grad(source)
        if not isinstance(source.softmax_group, (int, Integral)):
            fail(OP, f"softmax_group[{i}]", "an int", repr(source.softmax_group), error=TypeError)
        first = first_of_group.setdefault(source.softmax_group, i)
        if first != i and source.weight is not None:
            fail(
                OP,
                f"weight[{i}]",
                f"None, since softmax group {source.softmax_group} takes weight[{first}]",
                "a weight",
            )
    if plan is None:
        masks, groups = [s.key_mask for s in sources], [s.key_groups for s in sources]
        check_masks(OP, masks, groups, query_groups)
        if blocked:
            sizes = [s.block_size for s in sources]
            check_block_masks(OP, [s.block_mask for s in sources], sizes, masks, groups, query_groups)
            for i, source in enumerate(sources):
                _check_block_mask(i, source, query)
    else:
        _check_plan(plan, sources, query_groups, query, eager)
    if query_groups is not None:
        _check_table("query_groups", query_groups, query, batch, tokens)
        if tokens > MAX_TOKENS:  # the order of the queries is a table of int32
            fail(OP, "query", f"at most {MAX_TOKENS} tokens with query_groups", tokens)
    return Facts(lazy, requires_grad, len(first_of_group))


def _requires_grad(source: Source) -> bool:
    for x in source:
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def resolve(query: Tensor, sources: Sequence[Source]) -> tuple[Tensor, list[Source]]:
    """The arguments as kernels can read them: lazy tensors written out, float64 biases and strengths within float32."""
    found = []
    for i, source in enumerate(sources):
        tensors = {name: x for name, x in zip(source._fields, source) if isinstance(x, Tensor)}
        values: dict[str, Any] = {name: resolved(OP, f"{name}[{i}]", x) for name, x in tensors.items()}
        if query.dtype != torch.float64:
            values |= {name: within_float32(values[name]) for name in _REAL_TABLES if name in values}
        found.append(source._replace(**values))
    return resolved(OP, "query", query), found


def _check_source(i: int, source: Source, query: Tensor, eager: bool) -> bool:
    if not isinstance(source, Source):
        fail(OP, f"sources[{i}]", "a Source", type(source).__name__, error=TypeError)
    batch, _, heads, head_dim = query.shape
    lazy = False
    for name in ("rows", "key_mask", "key_groups", "key_bias", "value_index", "key_range", "block_mask"):
        x = getattr(source, name)
        if x is None:
            continue
        if not isinstance(x, Tensor):
            fail(OP, f"{name}[{i}]", "a tensor or None", type(x).__name__, error=TypeError)
        if eager and not is_plain(x):
            check_dense(OP, f"{name}[{i}]", x)
            lazy = True
    for name, x in (("key", source.key), ("value", source.value)):
        if not isinstance(x, Tensor):
            fail(OP, f"{name}[{i}]", "a tensor", type(x).__name__, error=TypeError)
        if eager:
            if x.__class__ is not Tensor:
                check_dense(OP, f"{name}[{i}]", x)
            lazy |= x._is_zerotensor()
        shape = x.shape
        if len(shape) != 4:
            fail(OP, f"{name}[{i}]", "shape (rows, keys, heads, head_dim)", tuple(shape))
        if shape[0] > MAX_TOKENS or shape[1] > MAX_TOKENS:
            fail(OP, f"{name}[{i}]", f"at most {MAX_TOKENS} rows and keys", tuple(shape))
        if x is source.key and shape[3] != head_dim:
            fail(OP, f"key[{i}]", f"head_dim {head_dim}", shape[3])
        if not 1 <= shape[3] <= MAX_HEAD_DIM:
            fail(OP, f"{name}[{i}]", f"head_dim from 1 to {MAX_HEAD_DIM}", shape[3])
        if shape[2] != heads and (shape[2] == 0 or heads % shape[2]):
            fail(OP, f"{name}[{i}]", f"{heads} heads or a divisor of it", shape[2])
        if x.dtype != query.dtype and x.dtype not in EIGHT_BIT_LARGEST:
            _refuse_dtype(f"{name}[{i}]", x, query)
        if x.device != query.device:
            fail(OP, f"{name}[{i}]", str(query.device), x.device)
        if x.stride(3) != 1:
            _check_stride(f"{name}[{i}]", x, eager)
    if source.value.dtype != source.key.dtype:
        fail(OP, f"value[{i}]", f"{source.key.dtype} as key[{i}]", source.value.dtype, error=TypeError)
    if source.key.dtype != query.dtype or source.key_scale is not None or source.value_scale is not None:
        lazy |= _check_scales(i, source, query, eager)
    rows, keys = source.key.shape[:2]
    value_rows, values = source.value.shape[:2]
    if source.value.shape[2] != source.key.shape[2]:
        fail(OP, f"value[{i}]", f"{source.key.shape[2]} heads as key[{i}]", source.value.shape[2])
    if value_rows != rows or (source.value_index is None and values != keys):
        fail(OP, f"value[{i}]", f"{rows} rows of {keys} keys as in key[{i}]", (value_rows, values))
    if source.rows is None:
        if not one_of(rows, 1, batch):
            fail(OP, f"rows[{i}]", f"a tensor, since key[{i}] has {rows} rows for a batch of {batch}", None)
    else:
        if source.rows.shape != (batch,):
            fail(OP, f"rows[{i}]", f"shape ({batch},)", tuple(source.rows.shape))
        if source.rows.dtype not in _INDEX_DTYPES:
            fail(OP, f"rows[{i}]", "an integer dtype", source.rows.dtype, error=TypeError)
        if source.rows.device != query.device:
            fail(OP, f"rows[{i}]", str(query.device), source.rows.device)
        check_entries(OP, f"rows[{i}]", source.rows, -1, rows - 1)  # on a GPU, others read as -1
    if source.value_index is not None:
        _check_value_index(i, source, query)
    if source.key_range is not None:
        _check_key_range(i, source.key_range, query)
    for name in ("logit_scale", "logit_bias", "weight"):
        strength = getattr(source, name)
        if strength is not None:
            lazy |= _check_strength(f"{name}[{i}]", strength, eager)
    if source.key_bias is not None:
        if not source.key_bias.is_floating_point():
            hint = "a mask goes to key_mask" if source.key_bias.dtype == torch.bool else ""
            fail(OP, f"key_bias[{i}]", "a floating dtype", source.key_bias.dtype, hint, TypeError)
        lazy |= source.key_bias.dtype == torch.float64
    if isinstance(source.weight, Tensor) and not has_shape(source.weight, (), (batch,), (batch, query.shape[1])):
        fail(OP, f"weight[{i}]", f"a scalar, ({batch},) or ({batch}, {query.shape[1]})", tuple(source.weight.shape))
    tables = (("key_mask", source.key_mask), ("key_groups", source.key_groups), ("key_bias", source.key_bias))
    for name, table in tables:
        if table is not None:
            _check_table(f"{name}[{i}]", table, query, rows, keys)
    for name, strength in (("logit_scale", source.logit_scale), ("logit_bias", source.logit_bias)):
        if isinstance(strength, Tensor) and not has_shape(strength, (), (batch,), (batch, heads)):
            fail(OP, f"{name}[{i}]", f"a scalar, ({batch},) or ({batch}, {heads})", tuple(strength.shape))
    return lazy


def _refuse_dtype(name: str, x: Tensor, query: Tensor) -> None:
    """TypeError for keys or values of a dtype that no source has."""
    expected, hint = str(query.dtype), "cast all tensors to one dtype"
    if x.dtype.itemsize == 1 and x.dtype != torch.bool:
        expected, hint = ", ".join(map(str, (query.dtype, *EIGHT_BIT_LARGEST))), ""
    fail(OP, name, expected, x.dtype, hint, TypeError)


def _check_scales(i: int, source: Source, query: Tensor, eager: bool) -> bool:
    """Every 8-bit key and value has a scale that fits, and no others have one; returns whether one of them is lazy."""
    eight_bit, lazy = source.key.dtype in EIGHT_BIT_LARGEST, False
    for name, x, scale in (("key", source.key, source.key_scale), ("value", source.value, source.value_scale)):
        argument = f"{name}_scale[{i}]"
        if scale is None:
            if eight_bit:
                fail(OP, argument, f"a tensor, since {name}[{i}] is {x.dtype}", None)
            continue
        if not isinstance(scale, Tensor):
            fail(OP, argument, "a tensor or None", type(scale).__name__, error=TypeError)
        if not eight_bit:
            fail(
                OP, argument, f"None, since {name}[{i}] is {x.dtype}", "a tensor", "only 8-bit keys and values have it"
            )
        if eager and not is_plain(scale):
            check_dense(OP, argument, scale)
            lazy = True
        rows, tokens, heads = x.shape[:3]
        sizes = scale.shape
        if len(sizes) != 3 or not all(one_of(n, 1, most) for n, most in zip(sizes, (rows, tokens, heads))):
            fail(OP, argument, f"shape ({rows} or 1, {tokens} or 1, {heads} or 1)", tuple(sizes))
        if scale.dtype != torch.float32:
            fail(OP, argument, "torch.float32", scale.dtype, error=TypeError)
        if scale.device != query.device:
            fail(OP, argument, str(query.device), scale.device)
    return lazy


def _check_stride(name: str, x: Tensor, eager: bool) -> None:
    """Refuse a tensor whose last dimension is not contiguous, which kernels cannot read, or that is sparse."""
    if eager:
        check_dense(OP, name, x)
    if x.shape[3] > 1:
        fail(OP, name, "a contiguous last dimension", f"stride {x.stride(3)}", "call .contiguous()")


def _check_strength(name: str, x: object, eager: bool) -> bool:
    """Refuse a strength that is neither a tensor of real numbers nor a number that float32 holds (infinities and NaN it
    holds); returns whether `resolve` would change it."""
    if type(x) is float or type(x) is int:
        if not -FLOAT32_MAX <= x <= FLOAT32_MAX:
            _check_beyond(name, x)
        return False
    if isinstance(x, Tensor):
        if x.is_meta:
            fail(OP, name, "a tensor with data", "one on the device meta")
        if x.dtype.is_complex or x.dtype == torch.bool:
            fail(OP, name, "a floating or integer dtype", x.dtype, error=TypeError)
        if eager and not is_plain(x):
            check_dense(OP, name, x)
            return True
        return x.dtype == torch.float64
    if not isinstance(x, Real):
        fail(OP, name, "a number or a tensor", type(x).__name__, error=TypeError)
    if not -FLOAT32_MAX <= cast(float, x) <= FLOAT32_MAX:
        _check_beyond(name, x)
    return False


def _check_beyond(name: str, x: Real | float) -> None:
    """Refuse a finite number beyond float32's largest one."""
    if x == x and x != math.inf and x != -math.inf:
        fail(OP, name, "a number that float32 holds", x)


def _check_value_index(i: int, source: Source, query: Tensor) -> None:
    index, (rows, keys), tokens = source.value_index, source.key.shape[:2], source.value.shape[1]
    assert index is not None
    if index.dtype not in _INDEX_DTYPES:
        fail(OP, f"value_index[{i}]", "an integer dtype", index.dtype, error=TypeError)
    if index.dim() != 2 or not one_of(index.shape[0], 1, rows, query.shape[0]) or index.shape[1] != keys:
        fail(OP, f"value_index[{i}]", f"shape ({rows} or {query.shape[0]} or 1, {keys})", tuple(index.shape))
    if index.device != query.device:
        fail(OP, f"value_index[{i}]", str(query.device), index.device)
    check_entries(OP, f"value_index[{i}]", index, 0, tokens - 1)


def _check_key_range(i: int, ranges: Tensor, query: Tensor) -> None:
    if ranges.dtype not in _INDEX_DTYPES:
        fail(OP, f"key_range[{i}]", "an integer dtype", ranges.dtype, error=TypeError)
    batch, tokens = query.shape[:2]
    if not has_shape(ranges, (batch, tokens, 2), (1, tokens, 2)):
        fail(OP, f"key_range[{i}]", f"shape ({batch} or 1, {tokens}, 2)", tuple(ranges.shape))
    if ranges.device != query.device:
        fail(OP, f"key_range[{i}]", str(query.device), ranges.device)


def _check_block_mask(i: int, source: Source, query: Tensor) -> None:
    """The sizes of a block mask that has passed `check_block_masks`."""
    blocks = source.block_mask
    if blocks is None:
        return
    rows, keys = source.key.shape[:2]
    tokens, heads = query.shape[1:3]
    expected = (-(-tokens // source.block_size[0]), -(-keys // source.block_size[1]))
    if not one_of(blocks.shape[0], 1, rows) or not one_of(blocks.shape[1], 1, heads) or blocks.shape[2:] != expected:
        shape = f"shape ({rows} or 1, {heads} or 1, {expected[0]}, {expected[1]})"
        fail(OP, f"block_mask[{i}]", shape, tuple(blocks.shape), f"of blocks of {tuple(source.block_size)}")
    if blocks.device != query.device:
        fail(OP, f"block_mask[{i}]", str(query.device), blocks.device)


def check_copies(query: Tensor, sources: Sequence[Source]) -> None:
    """Refuse the copies that autocast makes of query, keys and values where they are beyond the memory; 8-bit ones it
    leaves alone."""
    cast = [x for s in sources for x in (s.key, s.value) if x.dtype not in EIGHT_BIT_LARGEST]
    count = query.numel() + sum(x.numel() for x in cast)
    check_memory(OP, "query", 2 * count, query.device)


def check_gradient_memory(query: Tensor, sources: Sequence[Source]) -> None:
    """The gradients of keys and values are summed in float32 buffers of their shapes, then cast."""
    count = sum(s.key.numel() + s.value.numel() for s in sources)
    check_memory(OP, "key", (4 + query.element_size()) * count, query.device)


def check_reference_memory(query: Tensor, sources: Sequence[Source]) -> None:
    """The specification stores the scores about three times: scores, their concatenation, probabilities."""
    batch, tokens, heads, _ = query.shape
    pairs = batch * tokens * heads * sum(s.key.shape[1] for s in sources)
    size = 8 if query.dtype == torch.float64 else 4
    numbers = sum(s.key.numel() + s.value.numel() for s in sources if s.key.dtype in EIGHT_BIT_LARGEST)
    check_memory(OP, "backend 'reference'", 3 * size * pairs + 2 * size * numbers, query.device)


def _check_table(name: str, table: Tensor, query: Tensor, rows: int, columns: int) -> None:
    if table.dim() != 2 or not one_of(table.shape[0], 1, rows) or table.shape[1] != columns:
        fail(OP, name, f"shape ({rows} or 1, {columns})", tuple(table.shape))
    if table.device != query.device:
        fail(OP, name, str(query.device), table.device)


def _check_plan(
    plan: AttentionPlan, sources: Sequence[Source], query_groups: Tensor | None, query: Tensor, eager: bool
) -> None:
    """A plan belongs to the very masks it was built from, as they were then."""
    if not isinstance(plan, AttentionPlan):
        fail(OP, "plan", "an AttentionPlan from plan_attention", type(plan).__name__, error=TypeError)
    made = eager and as_made(plan)
    if not made:
        check_parts(OP, plan)
    if len(plan.key_masks) != len(sources):
        fail(OP, "plan", f"a plan for {len(sources)} sources", f"one for {len(plan.key_masks)}")
    for i, source in enumerate(sources):
        if plan.key_masks[i] is not source.key_mask or plan.key_groups[i] is not source.key_groups:
            fail(OP, "plan", f"a plan built from key_mask[{i}] and key_groups[{i}]", "one built from other tensors")
    block_masks = plan.block_masks or (None,) * len(sources)
    if len(block_masks) != len(sources):
        fail(OP, "plan.block_masks", f"{len(sources)} entries or None", len(block_masks))
    for i, source in enumerate(sources):
        if block_masks[i] is not source.block_mask:
            fail(OP, "plan", f"a plan built from block_mask[{i}]", "one built from another tensor")
        if source.block_mask is not None:
            if plan.block_size is None or tuple(source.block_size) != tuple(plan.block_size):
                fail(OP, "plan", f"a plan of block_size[{i}] {tuple(source.block_size)}", plan.block_size)
            _check_block_mask(i, source, query)
    if plan.query_groups is not query_groups:
        fail(OP, "plan", "a plan built from query_groups", "one built from another tensor")
    if eager:
        changed = changed_mask(plan)
        if changed is not None:
            fail(OP, "plan", f"a plan of {changed} as it is now", "one built before it changed", "build the plan anew")
        if not made:
            check_lists(OP, plan, [s.key.shape[1] for s in sources], query)
