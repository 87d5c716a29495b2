"""multi_source_attention: attention of one query over several sources of keys and values, never concatenated."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, reference
from .checks import fail
from .plan import AttentionPlan, check_masks, plan_attention

_OP = "multi_source_attention"
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MAX_SOURCES = 16
MAX_HEAD_DIM = 256


class Source(NamedTuple):
    """Keys and values that queries attend to, with their own number of rows R and of tokens M.

    Only `key` and `value` are needed. Strided views are read in place; only the last dimension must be contiguous.
    """

    key: Tensor
    """(R, M, H, D), the query's dtype and device"""
    value: Tensor
    """(R, M, H, D)"""
    rows: Tensor | None = None
    """int (B,): the row that each query row reads, -1: none. Default: row b, or row 0 where R = 1"""
    key_mask: Tensor | None = None
    """bool (R or 1, M): False leaves a key out of the softmax, for all heads"""
    key_groups: Tensor | None = None
    """uint8 bits (R or 1, M): a key is visible to queries that share a bit with it"""
    key_bias: Tensor | None = None
    """fp32 (R or 1, M): added to the logits, a log-weight per key"""
    logit_scale: float | Tensor | None = None
    """scalar, (B,) or (B, H): multiplies the logits of this source"""
    logit_bias: float | Tensor | None = None
    """scalar, (B,) or (B, H): added to the logits of this source"""
    value_index: Tensor | None = None
    """int (R or B, M): the value token read for key j. Default: j"""
    softmax_group: int = 0
    """sources with the same number share one softmax; the groups' results are added"""
    weight: float | Tensor | None = None
    """scalar, (B,) or (B, N): weight of the softmax group, taken from its first source"""


def multi_source_attention(
    query: Tensor,
    sources: Sequence[Source],
    *,
    query_groups: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    plan: AttentionPlan | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of `query` over the visible keys of all `sources` together.

        out[b,i,h] = Σ_{s,j} P[b,i,h,s,j] · V_s[r_s(b), j, h],   P = softmax over visible (s, j) of
                     α_s·scale·⟨Q[b,i,h], K_s[r_s(b), j, h]⟩ + β_s + bias_s[j]

    Key j of source s is visible to query (b, i) iff rows_s[b] >= 0, key_mask_s[j] and query_groups[b,i] &
    key_groups_s[j]. Nothing is concatenated, expanded or expressed as a dense mask: hidden keys cost nothing.

    Args:
        query: (B, N, H, D), fp32, fp16 or bf16 (the reference backend also float64); D 1 to 256.
        sources: 1 to 16 `Source`s.
        query_groups: uint8 bits (B or 1, N); needed where a source has key_groups.
        scale: default D ** -0.5.
        return_lse: also return the natural-log sum of exponentials, fp32 (B, N, H).
        plan: from `plan_attention` for the same masks and groups; default: built here.
        backend: "auto", "cpu", "triton" or "reference". A name never falls back.

    Returns:
        out (B, N, H, D) in the query's dtype, or (out, lse). A query that sees no key gets out 0, lse -inf.
        CPU scratch: per thread at most 1 MiB, whatever N and M.

    Raises:
        ValueError, TypeError: an argument that does not fit, named with its source: `key[2]: expected …, got …`.
        NotImplementedError: the named backend lacks an argument of this call. RuntimeError: it is not available.

    The retouch stage of Layout-and-Retouch (arXiv 2407.09779) is this operator with the layout and the reference image
    as sources.
    """
    if torch.is_autocast_enabled(query.device.type):
        query, sources = _autocast(query, sources)
    _check(query, sources, query_groups, plan)
    name = backends.choose(_OP, backend, query.device, query.dtype, _lacking(query, sources))
    if return_lse and len({s.softmax_group for s in sources}) > 1:
        fail(_OP, "return_lse", "one softmax group", "several", "each group has its own lse")
    if name == "reference":
        return reference.multi_source_attention(
            query, sources, query_groups=query_groups, scale=scale, return_lse=return_lse
        )
    if plan is None:
        plan = plan_attention([s.key_mask for s in sources], [s.key_groups for s in sources], query_groups)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if return_lse else None
    op = torch.ops.lr_kernels.multi_source_attention_cpu
    if name == "triton":
        from . import triton  # noqa: F401  (registers the Triton implementations)

        op = torch.ops.lr_kernels.multi_source_attention_triton
    op(
        query,
        [s.key for s in sources],
        [s.value for s in sources],
        [_table(s.rows, torch.int32) for s in sources],
        plan.key_index,
        plan.key_count,
        [_table(s.key_bias, torch.float32) for s in sources],
        [_per_head(s.logit_scale, query) for s in sources],
        [_per_head(s.logit_bias, query) for s in sources],
        plan.query_order,
        plan.class_start,
        query.shape[3] ** -0.5 if scale is None else scale,
        out,
        lse,
    )
    return out if lse is None else (out, lse)


def merge_attention_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join the results of attention over disjoint key sets into the attention over their union.

    Args:
        outs: K tensors (B, N, H, D). lses: K natural-log LSEs, fp32 (B, N, H); -inf marks an empty part.

    Returns:
        (out, lse): out = Σ_k exp(lse_k - lse)·out_k, lse = log Σ_k exp(lse_k).
    """
    if len(outs) != len(lses) or not outs:
        fail("merge_attention_states", "lses", f"{len(outs)} tensors, at least one", len(lses))
    lse = torch.stack(list(lses)).logsumexp(0)
    merged = torch.zeros_like(outs[0], dtype=torch.float32)
    for out, part in zip(outs, lses):
        share = torch.where(part == -torch.inf, 0, (part - lse).exp())[..., None]
        merged += torch.where(share == 0, 0, share * out)
    return merged.to(outs[0].dtype), lse


def _autocast(query: Tensor, sources: Sequence[Source]) -> tuple[Tensor, list[Source]]:
    dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), [s._replace(key=s.key.to(dtype), value=s.value.to(dtype)) for s in sources]


def _table(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """In the kernels' dtype and contiguous in the last dimension; as it is where it is so already."""
    if x is None:
        return None
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _per_head(x: float | Tensor | None, query: Tensor) -> Tensor | None:
    """Scalar, (B,) or (B, H) -> fp32 (B, H), without a copy where it is one already."""
    if x is None:
        return None
    x = torch.as_tensor(x, dtype=torch.float32, device=query.device)
    return (x[:, None] if x.dim() == 1 else x).expand(query.shape[0], query.shape[2])


def _lacking(query: Tensor, sources: Sequence[Source]) -> list[str]:
    """The arguments of this call that the kernels do not implement; the reference implements all."""
    lacking = []
    for i, source in enumerate(sources):
        if source.value_index is not None:
            lacking.append(f"value_index[{i}]")
        if source.weight is not None:
            lacking.append(f"weight[{i}]")
        if source.softmax_group != sources[0].softmax_group:
            lacking.append(f"softmax_group[{i}]")
    if torch.is_grad_enabled() and (query.requires_grad or any(_requires_grad(s) for s in sources)):
        lacking.append("gradients")
    return lacking


def _requires_grad(source: Source) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in source)


def _check(query: Tensor, sources: Sequence[Source], query_groups: Tensor | None, plan: AttentionPlan | None) -> None:
    """Shapes, dtypes and devices of every argument, in the order of the signature."""
    if query.dim() != 4:
        fail(_OP, "query", "shape (batch, tokens, heads, head_dim)", tuple(query.shape))
    batch, tokens, _, head_dim = query.shape
    if not query.is_floating_point():
        fail(_OP, "query", "one of float32, float16, bfloat16, float64", query.dtype, error=TypeError)
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        fail(_OP, "query", f"head_dim from 1 to {MAX_HEAD_DIM}", head_dim)
    if query.stride(3) != 1 and head_dim > 1:
        fail(_OP, "query", "a contiguous last dimension", f"stride {query.stride(3)}", "call .contiguous()")
    if not 1 <= len(sources) <= MAX_SOURCES:
        fail(_OP, "sources", f"1 to {MAX_SOURCES}", len(sources))
    for i, source in enumerate(sources):
        _check_source(i, source, query)
    if plan is None:
        check_masks(_OP, [s.key_mask for s in sources], [s.key_groups for s in sources], query_groups)
    else:
        _check_plan(plan, sources, query_groups)
    if query_groups is not None:
        _check_table("query_groups", query_groups, query, batch, tokens)


def _check_source(i: int, source: Source, query: Tensor) -> None:
    batch, _, heads, head_dim = query.shape
    for name, x in (("key", source.key), ("value", source.value)):
        shape = x.shape
        if len(shape) != 4:
            fail(_OP, f"{name}[{i}]", "shape (rows, keys, heads, head_dim)", tuple(shape))
        if shape[3] != head_dim:
            fail(_OP, f"{name}[{i}]", f"head_dim {head_dim}", shape[3])
        if shape[2] != heads:
            fail(_OP, f"{name}[{i}]", f"{heads} heads", shape[2])
        if x.dtype != query.dtype:
            fail(_OP, f"{name}[{i}]", str(query.dtype), x.dtype, "cast all tensors to one dtype", TypeError)
        if x.device != query.device:
            fail(_OP, f"{name}[{i}]", str(query.device), x.device)
        if head_dim > 1 and x.stride(3) != 1:
            fail(_OP, f"{name}[{i}]", "a contiguous last dimension", f"stride {x.stride(3)}", "call .contiguous()")
    rows, keys = source.key.shape[:2]
    value_rows, values = source.value.shape[:2]
    if value_rows != rows or (source.value_index is None and values != keys):
        fail(_OP, f"value[{i}]", f"{rows} rows of {keys} keys as in key[{i}]", (value_rows, values))
    if source.rows is None:
        if rows not in (1, batch):
            fail(_OP, f"rows[{i}]", f"a tensor, since key[{i}] has {rows} rows for a batch of {batch}", None)
    else:
        if source.rows.shape != (batch,):
            fail(_OP, f"rows[{i}]", f"shape ({batch},)", tuple(source.rows.shape))
        if source.rows.dtype not in _INDEX_DTYPES:
            fail(_OP, f"rows[{i}]", "an integer dtype", source.rows.dtype, error=TypeError)
        if source.rows.device != query.device:
            fail(_OP, f"rows[{i}]", str(query.device), source.rows.device)
        if source.rows.device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling():
            low, high = torch.aminmax(
                source.rows
            )  # on a GPU, looking would synchronize: there a row beyond reads as -1
            if int(low) < -1 or int(high) >= rows:
                fail(_OP, f"rows[{i}]", f"-1 to {rows - 1}", f"{int(low)} to {int(high)}")
    if source.value_index is not None:
        if source.value_index.dtype not in _INDEX_DTYPES:
            fail(_OP, f"value_index[{i}]", "an integer dtype", source.value_index.dtype, error=TypeError)
        if source.value_index.dim() != 2 or source.value_index.shape[1] != keys:
            fail(_OP, f"value_index[{i}]", f"shape ({rows} or {batch}, {keys})", tuple(source.value_index.shape))
    if isinstance(source.weight, Tensor) and tuple(source.weight.shape) not in ((), (batch,), (batch, query.shape[1])):
        fail(_OP, f"weight[{i}]", f"a scalar, ({batch},) or ({batch}, {query.shape[1]})", tuple(source.weight.shape))
    tables = (("key_mask", source.key_mask), ("key_groups", source.key_groups), ("key_bias", source.key_bias))
    for name, table in tables:
        if table is not None:
            _check_table(f"{name}[{i}]", table, query, rows, keys)
    for name, strength in (("logit_scale", source.logit_scale), ("logit_bias", source.logit_bias)):
        if isinstance(strength, Tensor) and tuple(strength.shape) not in ((), (batch,), (batch, heads)):
            fail(_OP, f"{name}[{i}]", f"a scalar, ({batch},) or ({batch}, {heads})", tuple(strength.shape))


def _check_table(name: str, table: Tensor, query: Tensor, rows: int, columns: int) -> None:
    if table.dim() != 2 or table.shape[0] not in (1, rows) or table.shape[1] != columns:
        fail(_OP, name, f"shape ({rows} or 1, {columns})", tuple(table.shape))
    if table.device != query.device:
        fail(_OP, name, str(query.device), table.device)


def _check_plan(plan: AttentionPlan, sources: Sequence[Source], query_groups: Tensor | None) -> None:
    """A plan belongs to the very masks it was built from."""
    if len(plan.key_masks) != len(sources):
        fail(_OP, "plan", f"a plan for {len(sources)} sources", f"one for {len(plan.key_masks)}")
    for i, source in enumerate(sources):
        if plan.key_masks[i] is not source.key_mask or plan.key_groups[i] is not source.key_groups:
            fail(_OP, "plan", f"a plan built from key_mask[{i}] and key_groups[{i}]", "one built from other tensors")
    if plan.query_groups is not query_groups:
        fail(_OP, "plan", "a plan built from query_groups", "one built from another tensor")
