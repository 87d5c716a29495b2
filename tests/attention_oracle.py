"""multi_source_attention and its gradients in float64, in NumPy, from the formula alone: an oracle for random calls
that shares no code with lr_kernels.

    out[b,i,h] = Σ_g w_g[b,i] · Σ_{s∈g} Σ_j P^g[b,i,h,s,j] · V_s[r_s(b), v_s(j), h]
    P^g = softmax over the visible (s, j) of group g of  α_s·scale·⟨Q[b,i,h], K_s[r_s(b),j,h]⟩ + β_s + bias_s[j]
    (s, j) is visible to (b, i)  iff  r_s(b) >= 0,  key_mask_s[j],  query_groups[b,i] & key_groups_s[j] is not 0,
    key_range_s[b,i] holds j  and  block_mask_s is true of the blocks of i and j

It computes one batch row at a time, with the keys of all sources of a softmax group concatenated.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from lr_kernels import Source


def array(x: torch.Tensor) -> np.ndarray:
    """The values of a tensor, floats as float64."""
    x = x.detach().resolve_neg().clone()
    return (x.double() if x.is_floating_point() else x).numpy()


def per_head(x, b: int, heads: int, default: float) -> np.ndarray:
    """(H,): the entries of batch row b of None, a number, (), (B,) or (B, H)."""
    x = np.asarray(default if x is None else array(x) if isinstance(x, torch.Tensor) else float(x))
    return np.full(heads, x[b] if x.ndim == 1 else x) if x.ndim < 2 else x[b]


def per_query(x, b: int, queries: int) -> np.ndarray:
    """(N,): the same for None, a number, (), (B,) or (B, N)."""
    return per_head(x, b, queries, 1.0)


def table_row(table: np.ndarray, row: int) -> np.ndarray:
    return table[row if len(table) > 1 else 0]


@dataclass
class Part:
    """The keys and values of one source as one batch row reads them."""

    number: int  # of the source
    row: int
    key: np.ndarray  # (M, H, D)
    value: np.ndarray  # (M, H, E)
    tokens: np.ndarray  # (M,) of the values
    visible: np.ndarray  # (H or 1, N, M)
    heads: np.ndarray  # (H,) of the source, as the query's heads read them
    alpha: np.ndarray  # (H,)
    shift: np.ndarray  # (H, M)


def numbers(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """Keys or values; those in 8 bits as the query's dtype holds them, times their scales in fp32."""
    return array(x if scale is None else (x.float() * scale[..., None]).to(dtype))


def read(
    i: int, source: Source, b: int, query: np.ndarray, groups: np.ndarray | None, scale: float, dtype: torch.dtype
) -> Part | None:
    """None where the query row reads nothing of source i."""
    _, queries, heads, _ = query.shape
    rows, keys = source.key.shape[:2]
    row = int(source.rows[b]) if source.rows is not None else 0 if rows == 1 else b
    if row < 0 or rows == 0 or keys == 0:
        return None
    visible = np.ones((queries, keys), dtype=bool)
    if source.key_mask is not None:
        visible &= table_row(array(source.key_mask), row)
    if source.key_groups is not None and groups is not None:
        visible &= (table_row(groups, b)[:, None] & table_row(array(source.key_groups), row)) != 0
    if source.key_range is not None:
        ends = table_row(array(source.key_range), b)
        visible &= (np.arange(keys) >= ends[:, :1]) & (np.arange(keys) < ends[:, 1:])
    visible = visible[None]
    if source.block_mask is not None:
        blocks = table_row(array(source.block_mask), row)
        of_query, of_key = (np.arange(n) // size for n, size in zip((queries, keys), source.block_size))
        visible = visible & blocks[:, of_query][:, :, of_key]
    shared = np.arange(heads) // (heads // source.key.shape[2]) if heads else np.arange(0)
    tokens = np.arange(keys)
    if source.value_index is not None:
        index = array(source.value_index)
        tokens = table_row(index, row) if len(index) in (1, rows) else index[b]
    shift = np.repeat(per_head(source.logit_bias, b, heads, 0.0)[:, None], keys, 1)
    if source.key_bias is not None:
        shift = shift + table_row(array(source.key_bias), row)
    alpha = scale * per_head(source.logit_scale, b, heads, 1.0)
    key = numbers(source.key, source.key_scale, dtype)[row][:, shared]
    value = numbers(source.value, source.value_scale, dtype)[row][:, shared]
    return Part(i, row, key, value[tokens], tokens, visible, shared, alpha, shift)


@dataclass
class Gradients:
    query: np.ndarray
    key: list[np.ndarray] = field(default_factory=list)
    value: list[np.ndarray] = field(default_factory=list)
    key_bias: list[np.ndarray | None] = field(default_factory=list)


def attention(query, sources, query_groups=None, scale=None, grad_out=None, grad_lse=None):
    """(out (B, N, H, E), lse (B, N, H) of the last group, Gradients or None)."""
    q = array(query)
    batch, queries, _, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    groups = None if query_groups is None else array(query_groups)
    out, lse = np.zeros((*q.shape[:3], sources[0].value.shape[3])), np.full(q.shape[:3], -np.inf)
    grads = None
    if grad_out is not None:
        empty = [None if s.key_bias is None else np.zeros(s.key_bias.shape) for s in sources]
        grads = Gradients(
            np.zeros(q.shape),
            [np.zeros(s.key.shape) for s in sources],
            [np.zeros(s.value.shape) for s in sources],
            empty,
        )
    with np.errstate(all="ignore"):
        for b in range(batch):
            for group in sorted({s.softmax_group for s in sources}):
                members = [i for i, s in enumerate(sources) if s.softmax_group == group]
                parts = [read(i, sources[i], b, q, groups, scale, query.dtype) for i in members]
                parts = [part for part in parts if part is not None]
                lse[b] = -np.inf
                if not parts:
                    continue
                weight = per_query(sources[members[0]].weight, b, queries)[:, None, None]
                p, lse[b], result = softmax(q[b], parts)
                out[b] += weight * result
                if grads is not None:
                    g = weight * array(grad_out)[b]
                    gl = 0.0 if grad_lse is None else array(grad_lse)[b].T[:, :, None]
                    add_gradients(grads, b, q[b], parts, p, g, result, gl)
    return out, lse, grads


def by_key(x: np.ndarray, key: np.ndarray) -> np.ndarray:
    """(N, H, D), (M, H, D) -> (H, N, M)"""
    return x.swapaxes(0, 1) @ key.transpose(1, 2, 0)


def over_keys(weight: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(H, N, M), (M, H, D) -> (N, H, D)"""
    return (weight @ value.swapaxes(0, 1)).swapaxes(0, 1)


def softmax(q: np.ndarray, parts: list[Part]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P (H, N, keys), lse (N, H) and P·V (N, H, D) of one query row."""
    logits = np.concatenate([by_key(q, x.key) * x.alpha[:, None, None] + x.shift[:, None, :] for x in parts], 2)
    heads = max(len(x.visible) for x in parts)
    visible = np.concatenate([np.broadcast_to(x.visible, (heads, *x.visible.shape[1:])) for x in parts], 2)
    value = np.concatenate([x.value for x in parts])
    logits = np.where(visible, logits, -np.inf)
    top = logits.max(2, keepdims=True)  # NaN where a logit is
    weights = np.where(logits == -np.inf, np.where(np.isnan(top), np.nan, 0.0), np.exp(logits - top))
    mass = weights.sum(2, keepdims=True)
    p = np.where(mass == 0, 0.0, weights / mass)
    lse = np.where(top == np.inf, np.inf, top + np.log(mass))[:, :, 0].T
    odd = ~np.isfinite(value)
    result = over_keys(p, np.where(odd, 0.0, value))
    if odd.any():
        result[over_keys(np.broadcast_to(visible, p.shape).astype(float), odd.astype(float)) > 0] = np.nan
    return p, lse, result


def add_gradients(grads: Gradients, b: int, q, parts: list[Part], p, grad, result, grad_lse) -> None:
    """dS = P·(⟨grad, V⟩ - ⟨grad, out⟩ + grad_lse), and what follows from it."""
    delta = (grad * result).sum(2).T[:, :, None]  # (H, N, 1)
    start = 0
    for x in parts:
        part = p[:, :, start : start + len(x.key)]
        start += len(x.key)
        ds = part * (by_key(grad, x.value) - delta + grad_lse)
        scaled = ds * x.alpha[:, None, None]
        grads.query[b] += over_keys(scaled, x.key)
        place = (np.arange(len(x.key))[:, None], x.heads[None])
        np.add.at(grads.key[x.number][x.row], place, over_keys(scaled.swapaxes(1, 2), q))
        place = (x.tokens[:, None], x.heads[None])
        np.add.at(grads.value[x.number][x.row], place, over_keys(part.swapaxes(1, 2), grad))
        bias = grads.key_bias[x.number]
        if bias is not None:
            bias[x.row if len(bias) > 1 else 0] += ds.sum((0, 1))
