"""multi_source_attention: attention of one query over several sources of keys and values, never concatenated."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from .. import reference
from ..runtime import backends, modes
from ..runtime.checks import FLOAT32_MAX, check_memory, check_sequence, fail
from ..runtime.ops import kernel
from ..source import Source
from .checks import OP, check, check_copies, check_gradient_memory, check_reference_memory, check_types, resolve
from .grad import Options, attention_with_gradients
from .plan import AttentionPlan, plan_attention
from .tables import lay_out


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
        out (B, N, H, D) in the query's dtype, or (out, lse). A query that sees no key gets out 0, lse -inf. Finite
        logits of any size keep their order, also where their parts or their sum leave fp32's range: on "cpu" always, on
        "triton" while ⟨Q, K⟩ stays below 5e39 (fp16: always) and α·scale below 3e38. An lse beyond fp32 is ±finfo.max.
        A visible logit of +inf or NaN (so also of -inf plus +inf) makes the query's out NaN; one of -inf has no weight.
        Values may be of any size too; on "triton", beyond 65,536 keys, their sum should stay below 2e43.
        CPU scratch: per thread at most 1 MiB, whatever N and M.

    Gradients: of query, key, value and key_bias on "cpu" and, without value_index, "triton" (P is computed again from
        the lse: no N x M memory; gradients of keys and values are summed in fp32 buffers of their shapes, in the same
        order every time); of every floating argument on "reference". Gradients of gradients, forward mode and
        torch.func: on "reference", which "auto" takes for them, with its N x M memory. torch.vmap over a tensor of the
        call: on none.

    Raises:
        ValueError, TypeError: an argument that does not fit, named with its source: `key[2]: expected …, got …`.
        ValueError: the outputs, or the scores of the reference backend, would not fit the memory.
        NotImplementedError: the named backend lacks an argument of this call. RuntimeError: it is not available.

    The retouch stage of Layout-and-Retouch (arXiv 2407.09779) is this operator with the layout and the reference image
    as sources.
    """
    if not isinstance(query, Tensor):
        fail(OP, "query", "a tensor", type(query).__name__, error=TypeError)
    if query.is_meta:
        fail(OP, "query", "a tensor with data", "one on the device meta", "FakeTensorMode shows shapes without data")
    if scale is not None and not torch.compiler.is_compiling():
        if not isinstance(scale, Real):
            fail(OP, "scale", "a number", type(scale).__name__, error=TypeError)
        if not abs(scale) <= FLOAT32_MAX:
            fail(OP, "scale", "a number that float32 holds", scale)
        scale = float(scale)
    if not isinstance(sources, (list, tuple)):
        check_sequence(OP, "sources", sources)
    if not isinstance(return_lse, bool):
        fail(OP, "return_lse", "True or False", repr(return_lse), error=TypeError)
    transforms, autocast = modes.transforms_active(), torch.is_autocast_enabled(query.device.type)
    if transforms or autocast:
        check_types(query, sources)
    if transforms:
        fields = {f"{name}[{i}]": x for i, s in enumerate(sources) for name, x in zip(Source._fields, s)}
        modes.refuse_vmap(OP, {"query": query, **fields, "query_groups": query_groups})
        plan = None  # the reference needs none, and inside a transform its masks may be wrapped: other tensors
    if autocast:
        check_copies(query, sources)
        query, sources = _autocast(query, sources)
    call = None
    if query.is_cuda and backend in ("auto", "triton") and not torch.compiler.is_compiling():
        from ..triton.attention_replay import recordable

        call = recordable(query, sources, query_groups, scale, return_lse, plan)
        if call is not None and call.replay(query):
            return call.result
    if check(query, sources, query_groups, plan):
        query, sources = resolve(query, sources)
    if return_lse and any(s.softmax_group != sources[0].softmax_group for s in sources):
        fail(OP, "return_lse", "one softmax group", "several", "each group has its own lse")
    check_memory(
        OP, "query", query.numel() * query.element_size() + return_lse * query.shape[:3].numel() * 4, query.device
    )
    wanted = torch.is_grad_enabled() and (query.requires_grad or any(_requires_grad(s) for s in sources))
    lacking = _lacking(sources, wanted)
    if modes.forward_mode_active() and modes.forward_mode(query, *(x for s in sources for x in s)):
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
    if wanted:
        check_gradient_memory(query, sources)
        options = Options(name, backend == "auto", scale, return_lse)
        return attention_with_gradients(options, query, sources, query_groups, plan)
    tables = lay_out(query, sources, plan, scale)
    if call is not None and name == "triton":
        call.run(query, tables)
        return call.result
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if return_lse else None
    kernel("multi_source_attention", name)(query, *tables, out, lse)
    return out if lse is None else (out, lse)


def _autocast(query: Tensor, sources: Sequence[Source]) -> tuple[Tensor, list[Source]]:
    cast = modes.autocast
    return cast(query), [s._replace(key=cast(s.key), value=cast(s.value)) for s in sources]


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
