"""multi_source_attention, its gradients, merge_attention_states and attention_with_token_maps."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..runtime.modes import transforms_active
from ..source import Source
from .precision import compute_dtype, without_autocast

__all__ = [
    "SourceGradients",
    "attention_with_token_maps",
    "merge_attention_states",
    "multi_source_attention",
    "multi_source_attention_backward",
]

_FAR = 2.0**120
"""Where a logit is beyond this, the numbers that it is summed from may be beyond float32."""


def _per_head(x: float | Tensor | None, default: float, query: Tensor, dtype: torch.dtype) -> Tensor:
    """None, scalar, (B,) or (B, H) -> (B or 1, H or 1, 1, 1), to broadcast over scores (B, H, N, M)."""
    x = default if x is None else x
    x = torch.as_tensor(x, dtype=dtype, device=query.device)
    return x.reshape(tuple(x.shape) + (1,) * (4 - x.dim())) if x.dim() else x.reshape(1, 1, 1, 1)


def _per_query(weight: float | Tensor, query: Tensor, dtype: torch.dtype) -> Tensor:
    """Scalar, (B,) or (B, N) -> broadcastable to out (B, N, H, D)."""
    w = torch.as_tensor(weight, dtype=dtype, device=query.device)
    return w.reshape(tuple(w.shape) + (1,) * (4 - w.dim())) if w.dim() else w


def source_rows(source: Source, batch: int) -> Tensor:
    """(B,) int64: the row of the source that each query row reads, -1 for none."""
    if source.rows is not None:
        return source.rows.long()
    if source.key.shape[0] == 1:
        return torch.zeros(batch, dtype=torch.long, device=source.key.device)
    return torch.arange(batch, device=source.key.device)


def visible_keys(query: Tensor, source: Source, query_groups: Tensor | None) -> Tensor:
    """(B, H or 1, N, M) bool: key j is visible to query (b, i) iff rows[b] >= 0, key_mask[j], the groups share a bit,
    key_range[b, i] holds j, and block_mask is true of their blocks."""
    batch, tokens, keys = query.shape[0], query.shape[1], source.key.shape[1]
    rows = source_rows(source, batch)
    visible = (rows >= 0)[:, None, None].expand(batch, tokens, keys)
    if source.key_mask is not None:
        visible = visible & _row_of(source.key_mask, rows)[:, None, :]
    if source.key_groups is not None and query_groups is not None:
        visible = visible & ((query_groups[:, :, None] & _row_of(source.key_groups, rows)[:, None, :]) != 0)
    if source.key_range is not None:
        place = torch.arange(keys, device=query.device)
        visible = visible & (place >= source.key_range[..., :1]) & (place < source.key_range[..., 1:])
    visible = visible[:, None]
    if source.block_mask is not None:
        blocks = source.block_mask
        for dim, size, count in zip((2, 3), source.block_size, (tokens, keys)):
            blocks = blocks.repeat_interleave(size, dim).narrow(dim, 0, count)
        visible = visible & _row_of(blocks, rows)
    return visible


def _row_of(table: Tensor, rows: Tensor) -> Tensor:
    """(R or 1, ...) -> (B, ...): the entry of each query row; a table of one row is shared by all."""
    return table[rows.clamp(min=0)] if table.shape[0] > 1 else table.expand(len(rows), *table.shape[1:])


def dequantized(source: Source, dtype: torch.dtype) -> Source:
    """The source with its keys and values as numbers of the query's dtype: those in 8 bits times their scale, in
    float32, then rounded; in float64 nothing is rounded."""
    wide = compute_dtype(dtype)

    def numbers(x: Tensor, scale: Tensor | None) -> Tensor:
        return x if scale is None else (x.to(wide) * scale.to(wide)[..., None]).to(dtype)

    key, value = numbers(source.key, source.key_scale), numbers(source.value, source.value_scale)
    return source._replace(key=key, value=value, key_scale=None, value_scale=None)


@overload
def multi_source_attention(
    query: Tensor,
    sources: Sequence[Source],
    *,
    query_groups: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def multi_source_attention(
    query: Tensor,
    sources: Sequence[Source],
    *,
    query_groups: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


@without_autocast
def multi_source_attention(
    query: Tensor,
    sources: Sequence[Source],
    *,
    query_groups: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out[b,i,h] = Σ_g w_g[b,i] · Σ_{s∈g} Σ_j P^g[b,i,h,s,j] · V_s[r_s(b), v_s(j), h], with

        P^g = softmax over the visible (s, j) of group g of  α_s·scale·⟨Q[b,i,h], K_s[r_s(b),j,h]⟩ + β_s + bias_s[j]

    Shapes as in `lr_kernels.multi_source_attention`. An empty visible set gives out 0 and lse -inf. A NaN or Inf in a
    key or value reaches only the queries that see it. Where float32 cannot hold the logits or the sums, the query is
    computed in float64; an lse beyond float32 is its largest or smallest number. A source in 8 bits is the source of
    its `dequantized` keys and values, K = round(key · key_scale) and V = round(value · value_scale).
    """
    dtype = compute_dtype(query.dtype)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    sources = [dequantized(s, query.dtype) for s in sources]
    out, lse, held = _softmax_groups(query, sources, query_groups, scale, dtype)
    if dtype == torch.float32 and not held.all():
        wide, wide_lse, _ = _softmax_groups(query, sources, query_groups, scale, torch.float64)
        limit = torch.finfo(dtype).max
        wide_lse = torch.where(wide_lse.isinf(), wide_lse, wide_lse.clamp(-limit, limit))
        held = held & (not out.requires_grad)  # a NaN that is not chosen would still reach the gradients
        out = torch.where(held[..., None], out, wide.to(dtype))
        lse = torch.where(held, lse, wide_lse.to(dtype))
    out = out.to(query.dtype)
    return (out, lse) if return_lse else out


def _softmax_groups(
    query: Tensor, sources: Sequence[Source], query_groups: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, N, H, E) and the last group's lse (B, N, H) in dtype, and bool (B, N, H): whether float32 holds what the
    query meets."""
    batch, tokens, heads, _ = query.shape
    out = torch.zeros(*query.shape[:3], sources[0].value.shape[3], dtype=dtype, device=query.device)
    lse = torch.full((batch, tokens, heads), -math.inf, dtype=dtype, device=query.device)
    held = torch.ones((batch, tokens, heads), dtype=torch.bool, device=query.device)
    for group in sorted({s.softmax_group for s in sources}):
        members = [s for s in sources if s.softmax_group == group]
        part, lse, fits, *_ = _joint_softmax(query.to(dtype), members, query_groups, scale, dtype)
        lse = lse.transpose(1, 2)
        weight = members[0].weight
        out = out + (part if weight is None else _per_query(weight, query, dtype) * part)
        held = held & fits
    return out, lse, held


class _Gathered(NamedTuple):
    """One source as each query row reads it."""

    key: Tensor  # (B, M, H, D), 0 where no query sees the key
    value: Tensor  # (B, M, H, E), likewise
    visible: Tensor  # (B, H or 1, N, M)
    alpha: Tensor  # (B or 1, H or 1, 1, 1)
    scores: Tensor  # (B, H, N, M), -inf where hidden


def _gather(query: Tensor, source: Source, query_groups: Tensor | None, scale: float, dtype: torch.dtype) -> _Gathered:
    rows = source_rows(source, query.shape[0])
    visible = visible_keys(query, source, query_groups)
    seen = visible.any(2).transpose(1, 2)[..., None]  # a key that no query sees must not leak through 0 · NaN
    key, value = (_per_query_head(x[rows.clamp(min=0)], query).to(dtype) for x in (source.key, source.value))
    key = torch.where(seen, key, 0)
    if source.value_index is not None:
        value = value.gather(1, _value_tokens(source, rows)[:, :, None, None].expand(-1, -1, *value.shape[2:]))
    alpha = scale * _per_head(source.logit_scale, 1.0, query, dtype)
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * alpha
    scores = scores + _per_head(source.logit_bias, 0.0, query, dtype)
    if source.key_bias is not None:
        scores = scores + _row_of(source.key_bias.to(dtype), rows)[:, None, None, :]
    scores = scores.masked_fill(~visible, -math.inf)
    return _Gathered(key, torch.where(seen, value, 0), visible, alpha, scores)


def _per_query_head(x: Tensor, query: Tensor) -> Tensor:
    """(B, M, K, …) -> (B, M, H, …): keys or values as each head of the query reads them."""
    heads = query.shape[2]
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _per_key_head(x: Tensor, key: Tensor) -> Tensor:
    """(B, M, H, …) -> (B, M, K, …): the sum over the query's heads that read a head of the keys."""
    heads = key.shape[2]
    return x if x.shape[2] == heads else x.unflatten(2, (heads, -1)).sum(3)


def _value_tokens(source: Source, rows: Tensor) -> Tensor:
    """(B, M): the value token that each key of a query row's source row reads."""
    assert source.value_index is not None
    index = source.value_index.long()
    return _row_of(index, rows) if index.shape[0] in (1, source.key.shape[0]) else index


class _Softmax(NamedTuple):
    """One softmax over the keys of several sources."""

    out: Tensor  # (B, N, H, E)
    lse: Tensor  # (B, H, N)
    held: Tensor  # bool (B, N, H), whether float32 holds the logits and the sums
    top: Tensor  # (B, H, N), the largest logit
    mass: Tensor  # (B, H, N), log Σ exp(logit - top): beside a huge top, lse has lost it to rounding


def _joint_softmax(
    query: Tensor, sources: Sequence[Source], query_groups: Tensor | None, scale: float, dtype: torch.dtype
) -> _Softmax:
    # a source of no rows is read by nobody
    parts = [_gather(query, s, query_groups, scale, dtype) for s in sources if s.key.shape[0] and s.key.shape[1]]
    if not parts:
        blank = query.new_full((*query.transpose(1, 2).shape[:3],), -math.inf)
        nothing = query.new_zeros(*query.shape[:3], sources[0].value.shape[3])
        return _Softmax(nothing, blank, torch.ones_like(query[..., 0], dtype=torch.bool), blank, blank)
    s, value = torch.cat([x.scores for x in parts], -1), torch.cat([x.value for x in parts], 1)
    top, mass, blind = _log_sum(s, -1)
    lse = torch.where(blind, -math.inf, top + mass)
    p = torch.where(blind[..., None], 0, s.masked_fill(blind[..., None], 0).softmax(-1))
    finite = value.isfinite()
    out = torch.einsum("bhnm,bmhd->bnhd", p, torch.where(finite, value, 0))
    heads = max(x.visible.shape[1] for x in parts)
    visible = torch.cat([x.visible.expand(-1, heads, -1, -1) for x in parts], -1)
    held = ~visible.any(-1).transpose(1, 2) | ((lse.abs() < _FAR).transpose(1, 2) & out.isfinite().all(-1))
    if not finite.all():
        seen = visible.expand(-1, query.shape[2], -1, -1).to(dtype)
        reached = torch.einsum("bhnm,bmhd->bnhd", seen, (~finite).to(dtype)) > 0
        out = out.masked_fill(reached, math.nan)
    return _Softmax(out, lse, held, top, mass.detach())


def _log_sum(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """top and mass, whose sum is log Σ exp(x), and where all x are -inf: there both mean nothing. The gradient through
    mass is the softmax also where top is huge, and finite everywhere: that of torch.logsumexp is exp(x - lse), where
    rounding and -inf have their way."""
    top = x.detach().amax(dim)
    blind = top == -math.inf
    top = torch.where(top.isfinite(), top, 0)
    x = x.masked_fill(blind.unsqueeze(dim), 0)
    return top, (x - top.unsqueeze(dim)).logsumexp(dim), blind


class SourceGradients(NamedTuple):
    """Gradients of one source, each in the shape of its tensor; key_bias None where the source has none."""

    key: Tensor
    value: Tensor
    key_bias: Tensor | None


@without_autocast
def multi_source_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    sources: Sequence[Source],
    *,
    query_groups: Tensor | None = None,
    scale: float | None = None,
    grad_lse: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, list[SourceGradients]]:
    """Gradients of query, key, value and key_bias, given those of out (B, N, H, E) and of lse (B, N, H).

        P = softmax_g(logit)      dP = w_g·⟨grad_out, V⟩      dS = P·(dP - w_g·⟨grad_out, out_g⟩ + grad_lse)
        grad_Q = Σ α·dS·K           grad_K = Σ α·dS·Q           grad_V = Σ P·w_g·grad_out       grad_bias = Σ dS

    with α = α_s·scale. Keys and values of rows that several batch rows read collect all their gradients, and so do
    values that several keys read. Gradients come in the dtype of their tensors. out: the rounded result of the forward
    pass, where one softmax group without a weight makes it; default: computed here.
    """
    dtype = compute_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, grad_query = query.to(dtype), torch.zeros_like(query, dtype=dtype)
    grads: list[SourceGradients] = []
    first = {s.softmax_group: s for s in reversed(sources)}
    for source in sources:
        members = [s for s in sources if s.softmax_group == source.softmax_group]
        computed, _, _, top, mass = _joint_softmax(q, members, query_groups, scale, dtype)
        weight = first[source.softmax_group].weight
        grad = grad_out.to(dtype) * (1.0 if weight is None else _per_query(weight, query, dtype))
        kept = (computed.to(query.dtype) if out is None else out).to(dtype)
        delta = (grad * kept).sum(-1) - (0.0 if grad_lse is None else grad_lse.to(dtype))
        key, value = (torch.zeros_like(x, dtype=dtype) for x in (source.key, source.value))
        bias = None if source.key_bias is None else torch.zeros_like(source.key_bias, dtype=dtype)
        if source.key.shape[0] and source.key.shape[1]:
            rows = source_rows(source, query.shape[0])
            read = rows >= 0
            x = _gather(q, source, query_groups, scale, dtype)
            hidden = x.scores == -math.inf
            p = torch.where(hidden, 0, (x.scores - top[..., None] - mass[..., None]).exp())
            ds = p * (torch.einsum("bnhd,bmhd->bhnm", grad, x.value) - delta.transpose(1, 2)[..., None])
            ds = torch.where(hidden, 0, ds)  # a value of NaN that this query does not see
            grad_query += torch.einsum("bhnm,bmhd->bnhd", x.alpha * ds, x.key)
            of_keys = _per_key_head(torch.einsum("bhnm,bnhd->bmhd", x.alpha * ds, q), source.key)
            key.index_add_(0, rows[read], of_keys[read])
            moved = _per_key_head(torch.einsum("bhnm,bnhd->bmhd", p, grad), source.value)
            if source.value_index is not None:
                tokens = _value_tokens(source, rows)[:, :, None, None].expand_as(moved)
                moved = moved.new_zeros(len(rows), *value.shape[1:]).scatter_add(1, tokens, moved)
            value.index_add_(0, rows[read], moved[read])
            if bias is not None:
                bias.index_add_(0, rows[read] if len(bias) > 1 else rows[read] * 0, ds.sum((1, 2))[read])
        if bias is not None and source.key_bias is not None:
            bias = bias.to(source.key_bias.dtype)
        grads.append(SourceGradients(key.to(query.dtype), value.to(query.dtype), bias))
    return grad_query.to(query.dtype), grads


@without_autocast
def merge_attention_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join softmaxes over disjoint key sets: outs K x (B, N, H, D), lses K x (B, N, H) -> (out, lse).

    lse = log Σ_k exp(lse_k);  out = Σ_k exp(lse_k - lse) · out_k; a part with lse -inf is neutral.
    """
    dtype = compute_dtype(outs[0].dtype)
    stacked = torch.stack([x.to(dtype) for x in lses])
    top, mass, blind = _log_sum(stacked, 0)
    lse = torch.where(blind, -math.inf, top + mass)
    share = torch.where(blind, 0, (stacked.masked_fill(blind, 0) - top - mass).exp())
    parts = torch.stack([x.to(dtype) for x in outs])
    parts = torch.where((share > 0)[..., None] | parts.isnan(), parts, 0)
    return (share[..., None] * parts).sum(0).to(outs[0].dtype), lse


@without_autocast
def attention_with_token_maps(
    query: Tensor, key: Tensor, value: Tensor, token_indices: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-attention and the head-mean probability of chosen keys; P in float64 where float32 cannot hold a logit.

    query (B, N, H, D); key, value (B, M, H, D); token_indices int (T,) or (B, T).
    out (B, N, H, D) = softmax(scale · Q Kᵀ) V;  maps (B, N, T) fp32: maps[b,i,t] = mean_h P[b,i,h,token_indices[b,t]].
    """
    dtype = compute_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for wide in (dtype, torch.float64):
        p = (torch.einsum("bnhd,bmhd->bhnm", query.to(wide), key.to(wide)) * scale).softmax(-1).to(dtype)
        if transforms_active() or p.isfinite().all():  # torch.vmap cannot decide by values
            break
    out = torch.einsum("bhnm,bmhd->bnhd", p, value.to(dtype)).to(query.dtype)
    index = token_indices.long().expand(query.shape[0], token_indices.shape[-1])
    return out, p.mean(1).gather(2, index[:, None, :].expand(-1, query.shape[1], -1))


OTSU_BINS = 256
