"""Self-attention of a retouch step: queries over their own, the context's and the reference's keys, against today's
ways.

Shapes are the layers of SD1.5 at 512² and SDXL at 1024² (tokens x heads x head_dim); three sources of as many keys as
there are queries, the reference shared by all rows. "67 % visible": half of the context's and of the reference's keys
are hidden; "30 %" and "10 %": every source has a key mask of that share.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lr_kernels import Source, multi_source_attention, plan_attention, reference

from .harness import DTYPES, OURS, Contender, NotRun, Problem, checked_error

BATCH = 2
CHECKED = 64
"""Queries whose results are compared with float64."""
VISIBLE: dict[str, tuple[float, ...]] = {
    "100%": (1.0, 1.0, 1.0),
    "67%": (1.0, 0.5, 0.5),
    "30%": (0.3, 0.3, 0.3),
    "10%": (0.1, 0.1, 0.1),
}
"""Visible share of each source's keys."""


@dataclass(frozen=True)
class Layer:
    id: str
    model: str
    tokens: int
    heads: int
    head_dim: int

    @property
    def shape(self) -> str:
        return f"{self.tokens}x{self.heads}x{self.head_dim}"


LAYERS = (
    Layer("sd64", "SD1.5 64²", 4096, 8, 40),
    Layer("sd32", "SD1.5 32²", 1024, 8, 80),
    Layer("sd16", "SD1.5 16²", 256, 8, 160),
    Layer("xl64", "SDXL 64²", 4096, 10, 64),
    Layer("xl32", "SDXL 32²", 1024, 20, 64),
)


@dataclass(frozen=True)
class Tensors:
    """query (B, N, H, D); keys and values: one (B or 1, N, H, D) per source."""

    query: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def tensors(layer: Layer, dtype: str, rows: Sequence[int] = (BATCH, BATCH, 1)) -> Tensors:
    """Random inputs; `rows` has an entry per source, the first is the batch."""
    generator = torch.Generator().manual_seed(0)

    def randn(rows: int) -> Tensor:
        x = torch.randn(rows, layer.tokens, layer.heads, layer.head_dim, generator=generator)
        return x.to(DTYPES[dtype])

    return Tensors(randn(rows[0]), tuple(map(randn, rows)), tuple(map(randn, rows)))


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def concatenate(parts: Sequence[Tensor], batch: int) -> Tensor:
    return torch.cat([x.expand(batch, -1, -1, -1) for x in parts], 1)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return heads_first(F.scaled_dot_product_attention(*map(heads_first, (query, key, value)), attn_mask=mask))


def naive(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The explicit softmax, which stores all N x M scores."""
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value)


def block_mask_of_keys(visible: Tensor, queries: int) -> BlockMask:
    """FlexAttention's form of a mask bool (1, M) of the concatenated keys."""
    hidden_or_not, device = visible[0], visible.device.type
    return create_block_mask(
        lambda b, h, q, kv: hidden_or_not[kv], None, None, queries, visible.shape[1], device=device
    )


class Flex:
    """FlexAttention, compiled, with a block mask where keys are hidden; keys and values may have fewer heads."""

    def __init__(self, block_mask: BlockMask | None) -> None:
        self.block_mask = block_mask
        torch._dynamo.reset()  # a recompilation too many would silently run uncompiled
        self.compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        try:
            options = dict(block_mask=self.block_mask, enable_gqa=query.shape[2] != key.shape[2])
            out = self.compiled(*map(heads_first, (query, key, value)), **options)
        except Exception as error:  # whatever its compiler cannot do on this machine
            raise NotRun(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
        return heads_first(out)


def problem(
    layer: Layer,
    dtype: str,
    visible: str,
    shares: Sequence[float],
    inputs: Tensors,
    *,
    with_naive: bool = False,
    with_flex: bool = False,
    with_one_thread: bool = False,
    op: str = "attention",
) -> Problem:
    """`shares`: the visible share of each source's keys; hidden ones are drawn at random."""
    query, keys, values = inputs.query, inputs.keys, inputs.values
    batch, tokens = query.shape[:2]
    generator = torch.Generator().manual_seed(1)
    masks = [None if s == 1 else torch.rand(1, tokens, generator=generator) < s for s in shares]
    masked = any(m is not None for m in masks)
    sources = [Source(k, v, key_mask=m) for k, v, m in zip(keys, values, masks)]
    plan = plan_attention(masks)
    dense = torch.cat([torch.ones(1, tokens, dtype=torch.bool) if m is None else m for m in masks], 1)
    kept = [None if m is None else m[0].nonzero()[:, 0] for m in masks]
    wide = dense[:, None, None].expand(batch, 1, 1, -1) if masked else None

    def joined() -> tuple[Tensor, Tensor, Tensor]:
        return query, concatenate(keys, batch), concatenate(values, batch)

    def gathered() -> Tensor:
        def select(parts: Sequence[Tensor]) -> Tensor:
            return concatenate([x if i is None else x.index_select(1, i) for x, i in zip(parts, kept)], batch)

        return sdpa(query, select(keys), select(values))

    def ours() -> Tensor:
        return multi_source_attention(query, sources, plan=plan, backend="cpu")

    baseline = "SDPA + mask" if masked else "cat + SDPA"
    contenders = {OURS: Contender(ours), baseline: Contender(lambda: sdpa(*joined(), wide))}
    if masked:
        contenders["gather + SDPA"] = Contender(gathered)
    if with_naive:
        contenders["naive"] = Contender(lambda: naive(*joined(), wide))
    if with_flex:
        flex = Flex(block_mask_of_keys(dense, tokens) if masked else None)
        contenders["FlexAttention"] = Contender(lambda: flex(*joined()))
    if with_one_thread and not masked:
        contenders[f"{OURS}, 1 thread"] = Contender(ours, threads=1)

    few = query[:, :CHECKED]
    exact = [s._replace(key=s.key.double(), value=s.value.double()) for s in sources]
    truth = reference.multi_source_attention(few.double(), exact)
    low = reference.multi_source_attention(few, sources)

    def error(name: str, result: Tensor) -> float:
        return checked_error(name, result[:, :CHECKED], low, truth)

    count = int(dense.sum())
    flops = 4.0 * batch * layer.heads * tokens * count * layer.head_dim
    share = count / dense.shape[1]
    return Problem(op, layer.id, layer.model, layer.shape, dtype, flops, contenders, error, visible, share, baseline)


def problems(
    layers: Sequence[Layer],
    dtypes: Sequence[str],
    visible: Sequence[str],
    *,
    with_naive: bool,
    flex_layers: Sequence[str],
    scaling: bool,
) -> list[Callable[[], list[Problem]]]:
    """One builder per layer and dtype; each builds the problems of all visible shares, to be measured together."""

    def build(layer: Layer, dtype: str) -> list[Problem]:
        inputs = tensors(layer, dtype)
        extra = dict(with_naive=with_naive, with_flex=layer.id in flex_layers, with_one_thread=scaling)
        return [problem(layer, dtype, name, VISIBLE[name], inputs, **extra) for name in visible]

    return [functools.partial(build, layer, dtype) for layer in layers for dtype in dtypes]
