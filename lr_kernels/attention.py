"""multi_source_attention: attention of one query over several sources of keys and values, never concatenated."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from . import backends, reference
from .attention_checks import OP, check, check_reference_memory
from .attention_grad import attention_with_gradients
from .checks import check_memory, fail
from .ops import AttentionTables, attention_op
from .plan import AttentionPlan, plan_attention
from .source import Source


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

        out[b,i,h] = Σ_g w_g[b,i] · Σ_{s∈g} Σ_j P^g[b,i,h,s,j] · V_s[r_s(b), v_s(j), h]
        P^g = softmax over the visible (s, j) of group g of  α_s·scale·⟨Q[b,i,h], K_s[r_s(b), j, h]⟩ + β_s + bias_s[j]

    Key j of source s is visible to query (b, i) iff rows_s[b] >= 0, key_mask_s[j] and query_groups[b,i] &
    key_groups_s[j]. Nothing is concatenated, expanded or expressed as a dense mask: hidden keys cost nothing.

    Args:
        query: (B, N, H, D), fp32, fp16 or bf16 (the reference backend also float64); D 1 to 256.
        sources: 1 to 16 `Source`s. With several softmax groups their results are added, each with its weight.
        query_groups: uint8 bits (B or 1, N); needed where a source has key_groups.
        scale: default D ** -0.5.
        return_lse: also return the natural-log sum of exponentials, fp32 (B, N, H); needs a single softmax group.
        plan: from `plan_attention` for the same masks and groups; default: built here.
        backend: "auto", "cpu", "triton" or "reference". A name never falls back.

    Returns:
        out (B, N, H, D) in the query's dtype, or (out, lse). A query that sees no key gets out 0, lse -inf.
        CPU scratch: per thread at most 1 MiB, whatever N and M.

    Gradients: of query, key, value and key_bias on "cpu" and, without value_index, "triton" (P is computed again from
        the lse: no N x M memory; gradients of keys and values are summed in fp32 buffers of their shapes, in the same
        order every time); of every floating argument on "reference".

    Raises:
        ValueError, TypeError: an argument that does not fit, named with its source: `key[2]: expected …, got …`.
        ValueError: the outputs, or the scores of the reference backend, would not fit the memory.
        NotImplementedError: the named backend lacks an argument of this call. RuntimeError: it is not available.

    The retouch stage of Layout-and-Retouch (arXiv 2407.09779) is this operator with the layout and the reference image
    as sources.
    """
    if not isinstance(query, Tensor):
        fail(OP, "query", "a tensor", type(query).__name__, error=TypeError)
    if scale is not None and not torch.compiler.is_compiling():
        if not isinstance(scale, Real):
            fail(OP, "scale", "a number", type(scale).__name__, error=TypeError)
        scale = float(scale)
    if torch.is_autocast_enabled(query.device.type):
        query, sources = _autocast(query, sources)
    call = None
    if query.is_cuda and backend in ("auto", "triton") and not torch.compiler.is_compiling():
        from .triton.attention_replay import recordable

        call = recordable(query, sources, query_groups, scale, return_lse, plan)
        if call is not None and call.replay(query):
            return call.result
    check(query, sources, query_groups, plan)
    if return_lse and any(s.softmax_group != sources[0].softmax_group for s in sources):
        fail(OP, "return_lse", "one softmax group", "several", "each group has its own lse")
    check_memory(OP, "query", query.numel() * query.element_size(), query.device)
    wanted = torch.is_grad_enabled() and (query.requires_grad or any(_requires_grad(s) for s in sources))
    lacking = _lacking(sources, wanted)
    if backends.forward_mode(query, *(x for s in sources for x in s if isinstance(x, Tensor))):
        for missing in lacking.values():
            missing.append("forward-mode gradients")
    name = backends.choose(OP, backend, query.device, query.dtype, lacking)
    if name == "reference":
        check_reference_memory(query, sources)
        return reference.multi_source_attention(
            query, sources, query_groups=query_groups, scale=scale, return_lse=return_lse
        )
    if plan is None:
        plan = plan_attention([s.key_mask for s in sources], [s.key_groups for s in sources], query_groups)
    tables = _tables(query, sources, plan, scale)
    if wanted:
        return attention_with_gradients(name, query, tables, return_lse)
    if call is not None and name == "triton":
        call.run(query, tables)
        return call.result
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if return_lse else None
    attention_op(name)(query, *tables, out, lse)
    return out if lse is None else (out, lse)


def _autocast(query: Tensor, sources: Sequence[Source]) -> tuple[Tensor, list[Source]]:
    dtype = torch.get_autocast_dtype(query.device.type)

    def cast(x: Tensor) -> Tensor:  # what PyTorch's own autocast casts
        return x.to(dtype) if x.dtype in backends.KERNEL_DTYPES else x

    return cast(query), [s._replace(key=cast(s.key), value=cast(s.value)) for s in sources]


def _tables(query: Tensor, sources: Sequence[Source], plan: AttentionPlan, scale: float | None) -> AttentionTables:
    """The arguments of the op, the sources ordered by softmax group."""
    numbers = [s.softmax_group for s in sources]
    groups = sorted(set(numbers))
    index, count = plan.key_index, plan.key_count
    if numbers != sorted(numbers):
        order = sorted(range(len(sources)), key=numbers.__getitem__)
        sources = [sources[i] for i in order]
        index, count = tuple(index[i] for i in order), tuple(count[i] for i in order)
    weights = [next(s.weight for s in sources if s.softmax_group == g) for g in groups]
    return AttentionTables(
        [s.key for s in sources],
        [s.value for s in sources],
        [_table(s.rows, torch.int32) for s in sources],
        index,
        count,
        [_table(s.value_index, torch.int32) for s in sources],
        [_table(s.key_bias, torch.float32) for s in sources],
        [_per_head(s.logit_scale, query) for s in sources],
        [_per_head(s.logit_bias, query) for s in sources],
        plan.query_order,
        plan.class_start,
        [groups.index(s.softmax_group) for s in sources],
        [_per_query(w, query) for w in weights],
        query.shape[3] ** -0.5 if scale is None else scale,
    )


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


def _per_query(x: float | Tensor | None, query: Tensor) -> Tensor | None:
    """Scalar, (B,) or (B, N) -> fp32 (B, N), without a copy where it is one already."""
    if x is None:
        return None
    x = torch.as_tensor(x, dtype=torch.float32, device=query.device)
    return (x[:, None] if x.dim() == 1 else x).expand(query.shape[:2])


def _lacking(sources: Sequence[Source], gradients: bool) -> dict[str, list[str]]:
    """What each kernel backend lacks of this call; the reference implements all."""
    cpu, triton = [], []
    for i, source in enumerate(sources if gradients else ()):
        for name in ("logit_scale", "logit_bias", "weight"):
            x = getattr(source, name)
            if isinstance(x, Tensor) and x.requires_grad:
                cpu.append(f"gradients of {name}[{i}]")
        if source.value_index is not None:
            triton.append(f"gradients through value_index[{i}]")
    return {"cpu": cpu, "triton": [*cpu, *triton]}


def _requires_grad(source: Source) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in source)
