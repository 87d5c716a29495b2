"""Self-attention of a retouch step: queries over their own, the context's and the reference's keys, against today's
ways.

Shapes are the layers of SD1.5 at 512² and SDXL at 1024² (tokens x heads x head_dim); three sources of as many keys as
there are queries, the reference shared by all rows. "67 % visible": half of the context's and of the reference's keys
are hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lr_kernels import Source, multi_source_attention, plan_attention, reference
from lr_kernels.testing import assert_matches

BATCH = 2


@dataclass(frozen=True)
class Layer:
    id: str
    model: str
    tokens: int
    heads: int
    head_dim: int


LAYERS = (
    Layer("sd64", "SD1.5 64²", 4096, 8, 40),
    Layer("sd32", "SD1.5 32²", 1024, 8, 80),
    Layer("sd16", "SD1.5 16²", 256, 8, 160),
    Layer("xl64", "SDXL 64²", 4096, 10, 64),
    Layer("xl32", "SDXL 32²", 1024, 20, 64),
)


@dataclass
class Problem:
    """Inputs of one layer, and every way to compute it."""

    query: Tensor
    sources: list[Source]
    flops: float  # of the visible work
    contenders: dict[str, Callable[[], Tensor]]


def problem(layer: Layer, dtype: torch.dtype, masked: bool, naive: bool) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def randn(rows: int) -> Tensor:
        return torch.randn(rows, layer.tokens, layer.heads, layer.head_dim, generator=generator).to(dtype)

    query = randn(BATCH)
    keys, values = zip(*((randn(rows), randn(rows)) for rows in (BATCH, BATCH, 1)))
    masks = [None, None, None]
    if masked:
        masks[1:] = [torch.rand(1, layer.tokens, generator=generator) < 0.5 for _ in range(2)]
    sources = [Source(k, v, key_mask=m) for k, v, m in zip(keys, values, masks)]
    plan = plan_attention(masks)
    visible = sum(layer.tokens if m is None else int(m.sum()) for m in masks)

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    def concatenate(parts: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([x.expand(BATCH, -1, -1, -1) for x in parts], 1)

    def sdpa(k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return heads_first(F.scaled_dot_product_attention(*map(heads_first, (query, k, v)), attn_mask=mask))

    dense_mask = torch.cat([torch.ones(1, layer.tokens, dtype=torch.bool) if m is None else m for m in masks], 1)
    kept = [None if m is None else m[0].nonzero()[:, 0] for m in masks]

    def gathered() -> Tensor:
        def select(parts: tuple[Tensor, ...]) -> Tensor:
            return concatenate(tuple(x if i is None else x.index_select(1, i) for x, i in zip(parts, kept)))

        return sdpa(select(keys), select(values))

    def by_hand() -> Tensor:
        k, v = concatenate(keys), concatenate(values)
        scores = torch.einsum("bnhd,bmhd->bhnm", query, k) * layer.head_dim**-0.5
        if masked:
            scores = scores.masked_fill(~dense_mask[:, None, None], -torch.inf)
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)

    contenders = {"lr_kernels": lambda: multi_source_attention(query, sources, plan=plan, backend="cpu")}
    if masked:
        expanded = dense_mask[:, None, None].expand(BATCH, 1, 1, -1)
        contenders["SDPA + mask"] = lambda: sdpa(concatenate(keys), concatenate(values), expanded)
        contenders["gather + SDPA"] = gathered
    else:
        contenders["cat + SDPA"] = lambda: sdpa(concatenate(keys), concatenate(values))
    if naive:
        contenders["naive"] = by_hand
    return Problem(query, sources, 4.0 * BATCH * layer.heads * layer.tokens * visible * layer.head_dim, contenders)


def check(problem: Problem, queries: int = 64) -> None:
    """Every contender against the float64 reference, on the first queries; a wrong one must not be timed."""
    few = problem.query[:, :queries]
    exact = [s._replace(key=s.key.double(), value=s.value.double()) for s in problem.sources]
    truth = reference.multi_source_attention(few.double(), exact)
    low = reference.multi_source_attention(few, problem.sources)
    for name, call in problem.contenders.items():
        assert_matches(call()[:, :queries], low, truth, name)
