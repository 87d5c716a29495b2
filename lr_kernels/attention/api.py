"""multi_source_attention: attention of one query over several sources of keys and values, never concatenated."""

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from ..source import Source
from .hopper import direct_call, op_for
from .plan import AttentionPlan
from .prepare import prepare


@overload
def multi_source_attention(
    query: Tensor,
    sources: Sequence[Source],
    *,
    query_groups: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    plan: AttentionPlan | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def multi_source_attention(
    query: Tensor,
    sources: Sequence[Source],
    *,
    query_groups: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    plan: AttentionPlan | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


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
        P^g = softmax over the visible (s, j) of softmax group g of  α_s·scale·⟨Q[b,i,h], K_s[r_s(b), j, h]⟩ + β_s +
        bias_s[j]

    α, β, w, r and v are logit_scale, logit_bias, weight, rows and value_index of the source; head h of the query reads
    head h // (H // K) of a source with K heads. Key j of source s is visible to query (b, i) iff rows_s[b] >= 0,
    key_mask_s[j], query_groups[b,i] & key_groups_s[j], key_range_s[b,i] holds j, and block_mask_s is true of the blocks
    of i and j. Nothing is concatenated, expanded or expressed as a dense mask: hidden keys cost nothing, but for those
    beside a query's interval within one step of the kernel.

    A source may hold its keys and values in 8 bits, as `quantize` makes them: K = key · key_scale and V = value ·
    value_scale, multiplied in fp32 and rounded once to the query's dtype, block by block as they are read. On "cpu" the
    result is bit for bit that of the same call on these K and V. Scales are finite; 0 and negative ones are allowed.

    Args:
        query: (B, N, H, D), fp32, fp16 or bf16 (the reference backend also float64); D 1 to 256.
        sources: 1 to 16 `Source`s, whose values have one head_dim E, 1 to 256. With several softmax groups their
            results are added, each with its weight.
        query_groups: uint8 bits (B or 1, N); needed where a source has key_groups.
        scale: default D ** -0.5.
        return_lse: also return the natural-log sum of exponentials, fp32 (B, N, H); needs a single softmax group.
        plan: from `plan_attention` for the same masks and groups; default: built here.
        backend: "auto", "cpu", "cuda", "triton" or "reference". "cuda" is for Hopper (compute capability 9.0), fp16 and
            bf16, a head_dim that is a multiple of 8 and that of the values, and calls without gradients, key_range and
            block_mask; there "auto" takes it before "triton".
            A named backend never falls back to another.

    Returns:
        out (B, N, H, E) in the query's dtype, or (out, lse). A query that sees no key gets out 0, lse -inf. Finite
        logits of any size keep their order, also where their parts or their sum leave fp32's range: on "cpu" and "cuda"
        always, on "triton" while ⟨Q, K⟩ stays below 5e39 (fp16: always) and α·scale below 3e38. An lse beyond fp32 is
        ±finfo.max.
        A visible logit of +inf or NaN (so also of -inf plus +inf) makes the query's out NaN; one of -inf has no weight.
        Values may be of any size too; on "triton", beyond 65,536 keys, their sum should stay below 2e43.
        CPU scratch: per thread at most 1 MiB, whatever N and M.

    Gradients: of query, key, value and key_bias on "cpu" and, without value_index, "triton" (P is computed again from
        the lse: no N x M memory; gradients of keys and values are summed in fp32 buffers of their shapes, in the same
        order every time); of every floating argument on "reference". "auto" takes "reference", with its N x M memory,
        where a strength or weight requires a gradient or a source is in 8 bits, and for gradients of gradients, forward
        mode and torch.func's transforms except vmap. No backend takes torch.vmap over a tensor of the call.

    Raises:
        ValueError, TypeError: an argument that does not fit, named with its source: `key[2]: expected …, got …`.
        ValueError: the outputs, or the scores of the reference backend, would not fit the memory.
        NotImplementedError: the named backend lacks an argument of this call. RuntimeError: it is not available.

    The retouch stage of Layout-and-Retouch (arXiv 2407.09779) is this operator with the layout and the reference image
    as sources.
    """
    op = op_for(query) if backend in ("auto", "cuda") else None
    if op is not None:
        result = direct_call(op, query, sources, query_groups, scale, return_lse, plan)
        if result is not None:
            return result
    return prepare(query, sources, query_groups, scale, return_lse, plan, backend)()
