"""The arguments of the attention ops, laid out from those of multi_source_attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.checks import check_memory
from ..runtime.schemas import MAX_TOKENS, AttentionTables
from ..source import Source
from .plan import AttentionPlan, keys_of_entry


def lay_out(query: Tensor, sources: Sequence[Source], plan: AttentionPlan, scale: float | None) -> AttentionTables:
    """The arguments of the op, the sources ordered by softmax group."""
    numbers = [s.softmax_group for s in sources]
    groups = sorted(set(numbers))
    index, count = plan.key_index, plan.key_count
    entry = tuple(keys_of_entry(plan, i) for i in range(len(sources)))
    if numbers != sorted(numbers):
        order = sorted(range(len(sources)), key=numbers.__getitem__)
        sources = [sources[i] for i in order]
        index, count = tuple(index[i] for i in order), tuple(count[i] for i in order)
        entry = tuple(entry[i] for i in order)
    weights = [next(s.weight for s in sources if s.softmax_group == g) for g in groups]
    return AttentionTables(
        [s.key for s in sources],
        [s.value for s in sources],
        [_table("rows", s.rows, torch.int32) for s in sources],
        index,
        count,
        entry,
        [_ranges(s.key_range) for s in sources],
        [_table("value_index", s.value_index, torch.int32) for s in sources],
        [_table("key_bias", s.key_bias, torch.float32) for s in sources],
        [_per_head(s.logit_scale, query) for s in sources],
        [_per_head(s.logit_bias, query) for s in sources],
        plan.query_order,
        plan.class_start,
        0 if plan.block_size is None else plan.block_size[0],
        [groups.index(s.softmax_group) for s in sources],
        [_per_query(w, query) for w in weights],
        [s.key_scale for s in sources],
        [s.value_scale for s in sources],
        query.shape[3] ** -0.5 if scale is None else scale,
    )


def _table(name: str, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The table in the kernels' dtype and contiguous in the last dimension; no copy if it is so already."""
    if x is None:
        return None
    if x.dtype != dtype or x.stride(-1) != 1:
        check_memory("multi_source_attention", name, 2 * dtype.itemsize * x.numel(), x.device)
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _ranges(x: Tensor | None) -> Tensor | None:
    """key_range as int32 that is contiguous in its last two dimensions."""
    if x is None:
        return None
    if x.dtype == torch.int64:
        x = x.clamp(0, MAX_TOKENS)  # int32 would wrap around
    x = _table("key_range", x, torch.int32)
    assert x is not None
    return x if x.stride(1) == 2 or x.shape[1] <= 1 else x.contiguous()


def _per_head(x: float | Tensor | None, query: Tensor) -> Tensor | None:
    """Scalar, (B,) or (B, H) -> fp32 (B, H), without a copy where it is one already."""
    if x is None:
        return None
    x = torch.as_tensor(x, dtype=torch.float32, device=query.device)
    return (x[:, None] if x.dim() == 1 else x).expand(query.shape[0], query.shape[2])


def _per_query(x: float | Tensor | None, query: Tensor) -> Tensor | None:
    """Scalar, (B,) or (B, N) -> fp32 (B, N), without a copy where it is one already."""
    if x is None:
        return None
    x = torch.as_tensor(x, dtype=torch.float32, device=query.device)
    return (x[:, None] if x.dim() == 1 else x).expand(query.shape[:2])
