"""What every step of the Triton ladder computes, and what several of them need on the host."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lr_kernels import Source


@triton.jit
def pick(options, s, S: tl.constexpr):
    """options[s] of an S-tuple for a run-time s."""
    picked = options[0]
    for i in tl.static_range(1, S):
        picked = tl.where(s == i, options[i], picked)
    return picked


def make_inputs(queries: int = 64, keys: int = 160, heads: int = 2, d: int = 32) -> tuple[Tensor, list[Source]]:
    """Queries (3, queries, heads, d), all contiguous, fp32. Source 0: as many keys of their own; source 1:
    one row of `keys` keys, of which 30 % are visible, and which the first row of queries does not read."""
    g = torch.Generator().manual_seed(0)
    query, own_key, own_value = (torch.randn(3, queries, heads, d, generator=g) for _ in range(3))
    key, value = (torch.randn(1, keys, heads, d, generator=g) for _ in range(2))
    visible = torch.rand(1, keys, generator=g) < 0.3
    rows = torch.tensor([-1, 0, 0], dtype=torch.int32)
    return query, [Source(own_key, own_value), Source(key, value, rows, visible)]


def row_table(source: Source, batch: int) -> Tensor:
    """int32 (batch,): the row of the source that each row of queries reads, -1 for none."""
    return torch.arange(batch, dtype=torch.int32) if source.rows is None else source.rows


def concatenated(batch: int, sources: list[Source]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (batch, M, H, D) of all sources side by side, and bool (batch, M): which of them are visible."""
    keys, values, visible = [], [], []
    for s in sources:
        rows = row_table(s, batch)
        mask = torch.ones(s.key.shape[:2], dtype=torch.bool) if s.key_mask is None else s.key_mask
        keys.append(s.key[rows.clamp(min=0).long()])
        values.append(s.value[rows.clamp(min=0).long()])
        visible.append(mask[rows.clamp(min=0).long()] & (rows >= 0)[:, None])
    return torch.cat(keys, 1), torch.cat(values, 1), torch.cat(visible, 1)
