"""The specification: every operator in plain PyTorch, the one place where shapes and formulas are defined.

Low-precision inputs are computed in float32 and rounded once at the end; float64 stays float64, which makes this module
the oracle of every test. Optimized backends are compared with it and never import it.

Sizes: B query rows, N queries, H heads, D head_dim; a source has R rows of M keys.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .attention import Source


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
    key or value reaches only the queries that see it.
    """
    dtype = _compute_dtype(query.dtype)
    batch, tokens, heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, tokens, heads, head_dim, dtype=dtype, device=query.device)
    lse = torch.full((batch, heads, tokens), -math.inf, dtype=dtype, device=query.device)
    for group in sorted({s.softmax_group for s in sources}):
        members = [s for s in sources if s.softmax_group == group]
        part, lse = _joint_softmax(query.to(dtype), members, query_groups, scale, dtype)
        weight = members[0].weight
        out = out + (part if weight is None else _per_query(weight, query, dtype) * part)
    out = out.to(query.dtype)
    lse_out = lse.transpose(1, 2).to(dtype if dtype == torch.float64 else torch.float32)
    return (out, lse_out) if return_lse else out


def _joint_softmax(
    query: Tensor, sources: "Sequence[Source]", query_groups: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One softmax over all keys of `sources`: out (B, N, H, D) and lse (B, H, N)."""
    scores, values, visibles = [], [], []
    for source in sources:
        if source.key.shape[0] == 0:  # rows can only be -1
            continue
        rows = source_rows(source, query.shape[0])
        visible = visible_keys(query, source, query_groups)
        seen = visible.any(1)[:, :, None, None]  # a key that no query sees must not leak through 0 · NaN
        key = torch.where(seen, source.key[rows.clamp(min=0)].to(dtype), 0)
        value = source.value[rows.clamp(min=0)].to(dtype)
        if source.value_index is not None:
            by_row = source.value_index.shape[0] in (1, source.key.shape[0])
            index = _row_of(source.value_index.long(), rows) if by_row else source.value_index.long()
            value = value.gather(1, index[:, :, None, None].expand(-1, -1, *value.shape[2:]))
        s = torch.einsum("bnhd,bmhd->bhnm", query, key) * (scale * _per_head(source.logit_scale, 1.0, query, dtype))
        s = s + _per_head(source.logit_bias, 0.0, query, dtype)
        if source.key_bias is not None:
            s = s + _row_of(source.key_bias.to(dtype), rows)[:, None, None, :]
        scores.append(s.masked_fill(~visible[:, None], -math.inf))
        values.append(torch.where(seen, value, 0))
        visibles.append(visible)
    if not scores:
        return torch.zeros_like(query), query.new_full((*query.transpose(1, 2).shape[:3],), -math.inf)
    s, value, visible = torch.cat(scores, -1), torch.cat(values, 1), torch.cat(visibles, -1)
    if s.shape[-1] == 0:
        return torch.zeros_like(query), s.new_full(s.shape[:-1], -math.inf)
    lse = s.logsumexp(-1)
    blind = (lse == -math.inf)[..., None]
    p = torch.where(blind, 0, s.masked_fill(blind, 0).softmax(-1))
    finite = value.isfinite()
    out = torch.einsum("bhnm,bmhd->bnhd", p, torch.where(finite, value, 0))
    if not finite.all():
        reached = torch.einsum("bnm,bmhd->bnhd", visible.to(dtype), (~finite).to(dtype)) > 0
        out = out.masked_fill(reached, math.nan)
    return out, lse


def merge_attention_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join softmaxes over disjoint key sets: outs K x (B, N, H, D), lses K x (B, N, H) -> (out, lse).

    lse = log Σ_k exp(lse_k);  out = Σ_k exp(lse_k - lse) · out_k; a part with lse -inf is neutral.
    """
    dtype = _compute_dtype(outs[0].dtype)
    stacked = torch.stack([x.to(dtype) for x in lses])
    lse = stacked.logsumexp(0)
    share = torch.where(lse == -math.inf, 0, (stacked - lse).exp())
    parts = torch.stack([x.to(dtype) for x in outs])
    parts = torch.where((share > 0)[..., None] | parts.isnan(), parts, 0)
    return (share[..., None] * parts).sum(0).to(outs[0].dtype), lse


def attention_with_token_maps(
    query: Tensor, key: Tensor, value: Tensor, token_indices: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-attention and the head-mean probability of chosen keys.

    query (B, N, H, D); key, value (B, M, H, D); token_indices int (T,) or (B, T).
    out (B, N, H, D) = softmax(scale · Q Kᵀ) V;  maps (B, N, T) fp32: maps[b,i,t] = mean_h P[b,i,h,token_indices[b,t]].
    """
    dtype = _compute_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    p = (torch.einsum("bnhd,bmhd->bhnm", query.to(dtype), key.to(dtype)) * scale).softmax(-1)
    out = torch.einsum("bhnm,bmhd->bnhd", p, value.to(dtype)).to(query.dtype)
    index = token_indices.long().expand(query.shape[0], token_indices.shape[-1])
    maps = p.mean(1).gather(2, index[:, None, :].expand(-1, query.shape[1], -1))
    return out, maps if dtype == torch.float64 else maps.float()


OTSU_BINS = 256


def subject_mask(
    maps: Tensor, *, size: tuple[int, int] | None = None, threshold: float | str = "otsu", smoothing: int = 1
) -> Tensor:
    """Foreground mask of a subject from its cross-attention maps.

    maps (B, L, h, w): L layers or tokens. Layer mean -> min-max to [0, 1] -> bilinear resize to `size` (half-pixel
    centres) -> mean over a square of side `smoothing` (odd, edges repeated) -> value > threshold. "otsu": the
    threshold that maximizes the between-class variance of a 256-bin histogram of [0, 1]. Returns bool (B, *size). A
    constant map has no foreground: all False.
    """
    dtype = _compute_dtype(maps.dtype)
    x = maps.to(dtype).mean(1)
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    x = torch.where(high > low, (x - low) / (high - low), 0)
    if size is not None and tuple(size) != tuple(x.shape[1:]):
        x = F.interpolate(x[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    if smoothing > 1:
        half = smoothing // 2
        x = F.avg_pool2d(F.pad(x[:, None], (half,) * 4, mode="replicate"), smoothing, stride=1)[:, 0]
    level = otsu_threshold(x) if isinstance(threshold, str) else x.new_full((len(x),), threshold)
    return x > level[:, None, None]


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
) -> Tensor:
    """The next latents of one denoising step, in one pass.

        next = a·sample + Σ_k w_k·prediction_k + σ·noise
        next = m·next + (1 - m)·(p·background + q·noise)          where a mask is given

    sample, predictions (K <= 6), background, noise: (B, C, height, width). coefficients (steps, B or 1, K + 4) fp32:
    the columns are w_0 … w_{K-1}, a, σ, p, q (see `lr_kernels.step_coefficients`). mask (B or 1, height, width) in [0,
    1]. A prediction with w_k = 0 is not read, so a NaN in it has no effect.
    """
    dtype = _compute_dtype(sample.dtype)
    c = coefficients[int(step)].to(dtype)[:, :, None, None, None]
    count = len(predictions)
    terms = [(c[:, k], x) for k, x in enumerate(predictions)] + [(c[:, count], sample)]
    result = torch.zeros_like(sample, dtype=dtype)
    for weight, x in terms if noise is None else [*terms, (c[:, count + 1], noise)]:
        result = result + torch.where(weight == 0, 0, weight * x.to(dtype))
    if mask is not None:
        assert background is not None
        kept = c[:, count + 2] * background.to(dtype)
        if noise is not None:
            kept = kept + torch.where(c[:, count + 3] == 0, 0, c[:, count + 3] * noise.to(dtype))
        m = mask.to(dtype)[:, None]
        result = torch.where(m == 1, result, torch.where(m == 0, kept, m * result + (1 - m) * kept))
    return result.to(sample.dtype)


def adain(x: Tensor, reference: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Give x (B, N, H, D) the token mean and deviation of reference (B or 1, M, H, D), per row, head and channel."""
    dtype = _compute_dtype(x.dtype)
    x_, r = x.to(dtype), reference.to(dtype)
    x_std, r_std = ((t.var(1, keepdim=True, unbiased=False) + eps).sqrt() for t in (x_, r))
    return ((x_ - x_.mean(1, keepdim=True)) / x_std * r_std + r.mean(1, keepdim=True)).to(x.dtype)


def correspondence(
    target: Tensor, reference: Tensor, *, radius: float = 0.0, grid: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Two-way nearest neighbour in cosine distance.

    target (B, N, C), reference (B or 1, M, C) -> index int64 (B, N): the reference token most like each target token,
    and consistent bool (B, N): going back from it ends within `radius` grid cells of the start (grid: (rows, columns)
    of the target; radius 0 asks for the very token).
    """
    dtype = _compute_dtype(target.dtype)
    similarity = F.normalize(target.to(dtype), dim=-1) @ F.normalize(reference.to(dtype), dim=-1).mT
    index = similarity.argmax(2)
    back = similarity.argmax(1).gather(1, index)
    start = torch.arange(target.shape[1], device=target.device)
    if radius == 0 or grid is None:
        return index, back == start
    dy, dx = back // grid[1] - start // grid[1], back % grid[1] - start % grid[1]
    return index, dy**2 + dx**2 <= radius**2
