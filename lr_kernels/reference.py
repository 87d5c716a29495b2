"""The specification: every operator in plain PyTorch, the one place where shapes and formulas are defined.

Low-precision inputs are computed in float32 and rounded once at the end (in float64 where float32 cannot hold logits);
float64 stays float64, which makes this module every test's oracle. Backends are compared with it and never import it.

Sizes: B query rows, N queries, H heads, D head_dim; a source has R rows of M keys.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .runtime.checks import fail
from .runtime.modes import transforms_active
from .runtime.tensors import without_autocast

if TYPE_CHECKING:
    from .attention.source import Source


_FAR = 2.0**120
"""Of a logit: its parts may be beyond float32."""


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_head(x: float | Tensor | None, default: float, query: Tensor, dtype: torch.dtype) -> Tensor:
    """None, scalar, (B,) or (B, H) -> (B or 1, H or 1, 1, 1), to broadcast over scores (B, H, N, M)."""
    x = default if x is None else x
    x = torch.as_tensor(x, dtype=dtype, device=query.device)
    return x.reshape(tuple(x.shape) + (1,) * (4 - x.dim())) if x.dim() else x.reshape(1, 1, 1, 1)


def _per_query(weight: float | Tensor, query: Tensor, dtype: torch.dtype) -> Tensor:
    """Scalar, (B,) or (B, N) -> broadcastable to out (B, N, H, D)."""
    w = torch.as_tensor(weight, dtype=dtype, device=query.device)
    return w.reshape(tuple(w.shape) + (1,) * (4 - w.dim())) if w.dim() else w


def source_rows(source: "Source", batch: int) -> Tensor:
    """(B,) int64: the row of the source that each query row reads, -1 for none."""
    if source.rows is not None:
        return source.rows.long()
    if source.key.shape[0] == 1:
        return torch.zeros(batch, dtype=torch.long, device=source.key.device)
    return torch.arange(batch, device=source.key.device)


def visible_keys(query: Tensor, source: "Source", query_groups: Tensor | None) -> Tensor:
    """(B, N, M) bool: key j is visible to query (b, i) iff rows[b] >= 0, key_mask[j] and the groups share a bit."""
    batch, tokens, keys = query.shape[0], query.shape[1], source.key.shape[1]
    rows = source_rows(source, batch)
    visible = (rows >= 0)[:, None, None].expand(batch, tokens, keys)
    if source.key_mask is not None:
        visible = visible & _row_of(source.key_mask, rows)[:, None, :]
    if source.key_groups is not None and query_groups is not None:
        visible = visible & ((query_groups[:, :, None] & _row_of(source.key_groups, rows)[:, None, :]) != 0)
    return visible


def _row_of(table: Tensor, rows: Tensor) -> Tensor:
    """(R or 1, ...) -> (B, ...): the entry of each query row; a table of one row is shared by all."""
    return table[rows.clamp(min=0)] if table.shape[0] > 1 else table.expand(len(rows), *table.shape[1:])


@without_autocast
def multi_source_attention(
    query: Tensor,
    sources: "Sequence[Source]",
    *,
    query_groups: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out[b,i,h] = Σ_g w_g[b,i] · Σ_{s∈g} Σ_j P^g[b,i,h,s,j] · V_s[r_s(b), v_s(j), h], with

        P^g = softmax over the visible (s, j) of group g of  α_s·scale·⟨Q[b,i,h], K_s[r_s(b),j,h]⟩ + β_s + bias_s[j]

    Shapes as in `lr_kernels.multi_source_attention`. An empty visible set gives out 0 and lse -inf. A NaN or Inf in a
    key or value reaches only the queries that see it. Where float32 cannot hold the logits or the sums, the query is
    computed in float64; an lse beyond float32 is its largest or smallest number.
    """
    dtype = _compute_dtype(query.dtype)
    scale = query.shape[3] ** -0.5 if scale is None else scale
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
    query: Tensor, sources: "Sequence[Source]", query_groups: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, N, H, D) and the last group's lse (B, N, H) in dtype, and bool (B, N, H): whether float32 holds what the
    query meets."""
    batch, tokens, heads, _ = query.shape
    out = torch.zeros(query.shape, dtype=dtype, device=query.device)
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
    value: Tensor  # (B, M, H, D), likewise
    visible: Tensor  # (B, N, M)
    alpha: Tensor  # (B or 1, H or 1, 1, 1)
    scores: Tensor  # (B, H, N, M), -inf where hidden


def _gather(
    query: Tensor, source: "Source", query_groups: Tensor | None, scale: float, dtype: torch.dtype
) -> _Gathered:
    rows = source_rows(source, query.shape[0])
    visible = visible_keys(query, source, query_groups)
    seen = visible.any(1)[:, :, None, None]  # a key that no query sees must not leak through 0 · NaN
    key = torch.where(seen, source.key[rows.clamp(min=0)].to(dtype), 0)
    value = source.value[rows.clamp(min=0)].to(dtype)
    if source.value_index is not None:
        value = value.gather(1, _value_tokens(source, rows)[:, :, None, None].expand(-1, -1, *value.shape[2:]))
    alpha = scale * _per_head(source.logit_scale, 1.0, query, dtype)
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * alpha
    scores = scores + _per_head(source.logit_bias, 0.0, query, dtype)
    if source.key_bias is not None:
        scores = scores + _row_of(source.key_bias.to(dtype), rows)[:, None, None, :]
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    return _Gathered(key, torch.where(seen, value, 0), visible, alpha, scores)


def _value_tokens(source: "Source", rows: Tensor) -> Tensor:
    """(B, M): the value token that each key of a query row's source row reads."""
    assert source.value_index is not None
    index = source.value_index.long()
    return _row_of(index, rows) if index.shape[0] in (1, source.key.shape[0]) else index


class _Softmax(NamedTuple):
    """One softmax over the keys of several sources."""

    out: Tensor  # (B, N, H, D)
    lse: Tensor  # (B, H, N)
    held: Tensor  # bool (B, N, H), whether float32 holds the logits and the sums
    top: Tensor  # (B, H, N), the largest logit
    mass: Tensor  # (B, H, N), log Σ exp(logit - top): beside a huge top, lse has lost it to rounding


def _joint_softmax(
    query: Tensor, sources: "Sequence[Source]", query_groups: Tensor | None, scale: float, dtype: torch.dtype
) -> _Softmax:
    # a source of no rows is read by nobody
    parts = [_gather(query, s, query_groups, scale, dtype) for s in sources if s.key.shape[0] and s.key.shape[1]]
    if not parts:
        blank = query.new_full((*query.transpose(1, 2).shape[:3],), -math.inf)
        return _Softmax(torch.zeros_like(query), blank, torch.ones_like(query[..., 0], dtype=torch.bool), blank, blank)
    s, value = torch.cat([x.scores for x in parts], -1), torch.cat([x.value for x in parts], 1)
    top, mass, blind = _log_sum(s, -1)
    lse = torch.where(blind, -math.inf, top + mass)
    p = torch.where(blind[..., None], 0, s.masked_fill(blind[..., None], 0).softmax(-1))
    finite = value.isfinite()
    out = torch.einsum("bhnm,bmhd->bnhd", p, torch.where(finite, value, 0))
    visible = torch.cat([x.visible for x in parts], -1)
    held = ~visible.any(-1)[..., None] | ((lse.abs() < _FAR).transpose(1, 2) & out.isfinite().all(-1))
    if not finite.all():
        reached = torch.einsum("bnm,bmhd->bnhd", visible.to(dtype), (~finite).to(dtype)) > 0
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
    key: Tensor
    value: Tensor
    key_bias: Tensor | None


@without_autocast
def multi_source_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    sources: "Sequence[Source]",
    *,
    query_groups: Tensor | None = None,
    scale: float | None = None,
    grad_lse: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, list[SourceGradients]]:
    """Gradients of query, key, value and key_bias, given those of out (B, N, H, D) and of lse (B, N, H).

        P = softmax_g(logit)      dP = w_g·⟨grad_out, V⟩      dS = P·(dP - w_g·⟨grad_out, out_g⟩ + grad_lse)
        grad_Q = Σ α·dS·K           grad_K = Σ α·dS·Q           grad_V = Σ P·w_g·grad_out       grad_bias = Σ dS

    with α = α_s·scale. Keys and values of rows that several query rows read collect all their gradients, and so do
    values that several keys read. Gradients come in the dtype of their tensors. out: the rounded result of the forward
    pass, where one softmax group without a weight makes it; default: computed here.
    """
    dtype = _compute_dtype(query.dtype)
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
            p = torch.where(x.scores == -math.inf, 0, (x.scores - top[..., None] - mass[..., None]).exp())
            ds = p * (torch.einsum("bnhd,bmhd->bhnm", grad, x.value) - delta.transpose(1, 2)[..., None])
            grad_query += torch.einsum("bhnm,bmhd->bnhd", x.alpha * ds, x.key)
            key.index_add_(0, rows[read], torch.einsum("bhnm,bnhd->bmhd", x.alpha * ds, q)[read])
            moved = torch.einsum("bhnm,bnhd->bmhd", p, grad)
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
    dtype = _compute_dtype(outs[0].dtype)
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
    dtype = _compute_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for wide in (dtype, torch.float64):
        p = (torch.einsum("bnhd,bmhd->bhnm", query.to(wide), key.to(wide)) * scale).softmax(-1).to(dtype)
        if transforms_active() or p.isfinite().all():  # torch.vmap cannot decide by values
            break
    out = torch.einsum("bhnm,bmhd->bnhd", p, value.to(dtype)).to(query.dtype)
    index = token_indices.long().expand(query.shape[0], token_indices.shape[-1])
    return out, p.mean(1).gather(2, index[:, None, :].expand(-1, query.shape[1], -1))


OTSU_BINS = 256


def subject_mask(
    maps: Tensor,
    *,
    size: tuple[int, int] | None = None,
    threshold: float | str = "otsu",
    quantile: float | None = None,
    smoothing: int = 1,
) -> Tensor:
    """Foreground mask of a subject from its cross-attention maps.

    maps (B, L, h, w): L layers or tokens. The values of `subject_map` above a level are foreground. The level is
    `threshold`; or with "otsu" the threshold that maximizes the between-class variance of a 256-bin histogram of
    [0, 1]; or with `quantile` the pixel value of rank floor(quantile · (P - 1)) among a row's P pixels in ascending
    order. Returns bool (B, *size). A constant map has no foreground: all False.
    """
    x = subject_map(maps, size=size, smoothing=smoothing)
    if quantile is not None:
        pixels = x.flatten(1).sort(1).values
        level = pixels[:, math.floor(quantile * (pixels.shape[1] - 1))]
    else:
        level = otsu_threshold(x) if isinstance(threshold, str) else x.new_full((len(x),), threshold)
    return x > level[:, None, None]


def subject_map(maps: Tensor, *, size: tuple[int, int] | None = None, smoothing: int = 1) -> Tensor:
    """(B, L, h, w) -> (B, *size): layer mean -> min-max to [0, 1] -> bilinear resize to `size` (half-pixel centres) ->
    mean over a square of side `smoothing` (odd, edges repeated). Rows without a finite range are 0."""
    x = maps.to(_compute_dtype(maps.dtype))
    x = (x / (4 * x.shape[1])).sum(1)  # min-max drops the factor 4; without it a sum or a range could overflow
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    x = torch.where(high > low, (x - low) / (high - low), 0)
    if size is not None and tuple(size) != tuple(x.shape[1:]):
        x = F.interpolate(x[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    if smoothing > 1:
        half = smoothing // 2
        x = F.avg_pool2d(F.pad(x[:, None], (half,) * 4, mode="replicate"), smoothing, stride=1)[:, 0]
    return x


def otsu_threshold(x: Tensor) -> Tensor:
    """(B, h, w) in [0, 1] -> (B,): upper edge of the histogram bin that maximizes between-class variance (the first
    one).

    Between-class variance of a split after bin k: (μ·n_k - s_k)² / (n_k · (n - n_k)) up to a constant, with n_k the
    count and s_k the sum of bin indices of bins 0..k, μ = s/n. N. Otsu, IEEE Trans. SMC 9(1), 1979.
    """
    bins = (x.flatten(1) * OTSU_BINS).long().clamp(0, OTSU_BINS - 1)
    counts = torch.zeros(len(x), OTSU_BINS, dtype=x.dtype, device=x.device)
    counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=x.dtype))
    n_below = counts.cumsum(1)
    s_below = (counts * torch.arange(OTSU_BINS, dtype=x.dtype, device=x.device)).cumsum(1)
    n, s = n_below[:, -1:], s_below[:, -1:]
    split = n_below * (n - n_below)
    variance = torch.where(split > 0, (s * n_below - s_below * n) ** 2 / split.clamp(min=1), -1)
    return (variance.argmax(1) + 1).to(x.dtype) / OTSU_BINS


def step_blend(
    sample: Tensor,
    predictions: Sequence[Tensor],
    coefficients: Tensor,
    step: int | Tensor,
    *,
    mask: Tensor | None = None,
    background: Tensor | None = None,
    noise: Tensor | None = None,
    history: Tensor | None = None,
    keep_rows: Tensor | None = None,
    model_input: Tensor | None = None,
    history_out: Tensor | None = None,
) -> Tensor:
    """The next latents of one denoising step, in one pass; also writes `model_input` and `history_out` where given.

        G    = Σ_k g_k·prediction_k
        next = a·sample + e·G + σ·noise + h·history
        kept = p·background + q·noise
        next = m·next + (1 - m)·kept                where a mask is given; next = kept in the rows of keep_rows
        x0   = c·sample + d·G                       0 in the rows of keep_rows
        history_out = x0, model_input = s·next, written n times along the batch

    sample, predictions (K <= 6), background, noise, history, history_out: (B, C, height, width); model_input
    (n·B, C, height, width); mask (B or 1, height, width) in [0, 1]; keep_rows bool (B,). coefficients fp32
    (steps, B or 1, K + 9): the columns are g_0 … g_{K-1}, a, e, σ, h, p, q, c, d, s.

    A term whose coefficient is 0 is left out: its tensor is not read, so a NaN in it has no effect. That holds for G as
    a whole where e or d is 0, and on either side of a mask of 0 or 1. Another coefficient's tensor must be there.
    """
    dtype, count = _compute_dtype(sample.dtype), len(predictions)
    columns = coefficients[int(step)].to(dtype)[:, :, None, None, None].unbind(1)
    a, e, sigma, h, p, q, c, d, s = columns[count:]
    for name, x, weights in (
        ("noise", noise, (sigma, q if background is not None else sigma)),
        ("history", history, (h,)),
    ):
        if x is None and any(bool(weight.any()) for weight in weights):
            expected = f"a tensor, since its coefficient in step {int(step)} is not 0"
            fail("step_blend", name, expected, None, error=RuntimeError)

    def total(*terms: tuple[Tensor, Tensor | None]) -> Tensor:
        result = torch.zeros_like(sample, dtype=dtype)
        for weight, x in terms:
            if x is not None:
                result = result + torch.where(weight == 0, 0, weight * x.to(dtype))
        return result

    guided = total(*zip(columns[:count], predictions))
    result = total((a, sample), (e, guided), (sigma, noise), (h, history))
    kept = total((p, background), (q, noise))
    clean = total((c, sample), (d, guided))
    if mask is not None:
        m = mask.to(dtype)[:, None]
        result = torch.where(m == 1, result, torch.where(m == 0, kept, m * result + (1 - m) * kept))
    if keep_rows is not None:
        keep = keep_rows[:, None, None, None]
        result, clean = torch.where(keep, kept, result), torch.where(keep, 0, clean)
    if history_out is not None:
        history_out.copy_(clean)
    if model_input is not None and model_input.numel():
        model_input.copy_((s * result).repeat(len(model_input) // len(sample), 1, 1, 1))
    return result.to(sample.dtype)


def adain(
    x: Tensor,
    reference: Tensor,
    *,
    mask: Tensor | None = None,
    reference_mask: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Give x (B, N, H, D) the token mean and deviation of reference (B or 1, M, H, D), per row, head and channel:

        out = (x - μ_x) / sqrt(var_x + eps) · sqrt(var_r + eps) + μ_r

    mask (B or 1, N) and reference_mask (B or 1, M) choose the tokens that the statistics are of. Tokens of x outside
    the mask are unchanged; so are rows where either choice is empty.
    """
    dtype = _compute_dtype(x.dtype)
    x_count, x_mean, x_std = _token_statistics(x.to(dtype), mask, eps)
    r_count, r_mean, r_std = _token_statistics(reference.to(dtype), reference_mask, eps)
    out = (x.to(dtype) - x_mean) / x_std * r_std + r_mean
    changed = (x_count > 0) & (r_count > 0)
    if mask is not None:
        changed = changed & mask[:, :, None, None]
    return torch.where(changed, out.to(x.dtype), x)


def _token_statistics(x: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and deviation of the chosen tokens: (R or 1, 1, 1, 1), (R, 1, H, D), (R, 1, H, D)."""
    mask = torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device) if mask is None else mask
    chosen = mask[:, :, None, None]
    count = chosen.sum(1, keepdim=True)
    mean = torch.where(chosen, x, 0).sum(1, keepdim=True) / count.clamp(min=1)
    variance = torch.where(chosen, x - mean, 0).square().sum(1, keepdim=True) / count.clamp(min=1)
    return count, mean, (variance + eps).sqrt()


@without_autocast
def cosine_similarity(target: Tensor, reference: Tensor) -> Tensor:
    """target (B, N, C), reference (B or 1, M, C) -> (B, N, M).

    A zero vector has similarity 0 to all; a vector with a NaN or Inf has -inf, so that it is never chosen.
    """
    similarity = _unit_vectors(target) @ _unit_vectors(reference).mT
    return torch.where(similarity.isnan(), -math.inf, similarity)


def _unit_vectors(x: Tensor) -> Tensor:
    """x / |x| along the last dimension. The division by the largest element keeps squares from over- or underflow."""
    x = x.to(_compute_dtype(x.dtype))
    largest = x.abs().amax(-1, keepdim=True)
    x = torch.where(largest == 0, 0, x / largest)
    return torch.where(largest == 0, 0, x / x.norm(dim=-1, keepdim=True))


@without_autocast
def correspondence(
    target: Tensor,
    reference: Tensor,
    *,
    radius: float | Sequence[float] | Tensor = 0.0,
    grid: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Two-way nearest neighbour in cosine similarity.

    target (B, N, C), reference (B or 1, M, C) -> index int64 (B, N): the reference token most like each target token,
    and consistent bool (B, N): going back from it ends within `radius` grid cells of the start (radius: scalar or (B,);
    grid: (rows, columns) of the target; radius 0 asks for the very token). Of equal similarities the lowest index
    counts. A target token without any similarity above -inf gets index 0 and consistent False.
    """
    similarity = cosine_similarity(target, reference)
    best, index = similarity.max(2)
    if index.numel() == 0:
        return index, index.bool()
    back = similarity.argmax(1).gather(1, index)
    start = torch.arange(target.shape[1], device=target.device)
    columns = 1 if grid is None else max(1, grid[1])
    dy, dx = back // columns - start // columns, back % columns - start % columns
    cells = torch.as_tensor(radius, dtype=torch.float64, device=target.device).reshape(-1, 1)
    return index, (dy**2 + dx**2 <= cells**2) & (best > -math.inf)
