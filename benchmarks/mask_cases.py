"""What queries see in the benchmarks of masks: keys in causal order, in a window, in blocks, without padding; and keys
with fewer heads. Each case is the fields of a source for us, and its peers' own ways to say the same."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from lr_kernels import Source, multi_source_attention, plan_attention, reference
from lr_kernels.interop import causal_range

from .attention import Flex, Layer, heads_first
from .harness import DTYPES, Contender, Problem, checked_error
from .target import Target

TOKENS, WINDOW, BLOCK = 4096, 1024, 128
VISIBLE_BLOCKS = 0.25
"""Of the blocks of keys, for each head and block of queries"""
ROWS = 4
"""Batch rows of the cases of padding"""
SHARES: dict[str, tuple[float, ...]] = {
    "33%": (1 / 3,) * ROWS,
    "30%": (0.3,) * ROWS,
    "60%": (0.6,) * ROWS,
    "90%": (0.9,) * ROWS,
    "30, 60, 90, 100%": (0.3, 0.6, 0.9, 1.0),
}
"""Visible share of each row's keys"""
CHECKED = 16
"""Queries whose results are compared with float64."""
ALL_KEYS = ", all keys"
"""How the names of contenders end that attend to every key: what the cost of a mask is compared with."""


@dataclass(frozen=True)
class Case:
    op: str
    model: str
    """What is visible, in words."""
    visible: str
    query: Tensor
    """(B, N, H, D)"""
    key: Tensor
    """(B, M, K, D), K heads"""
    value: Tensor
    fields: dict[str, Any]
    """Of the source."""
    few: dict[str, Any]
    """The same for the queries `some` alone."""
    some: Tensor
    sdpa: dict[str, Any]
    """The arguments by which SDPA computes the case."""
    mask: Tensor | None = None
    """bool (B or 1, H or 1, N or 1, M); None: all visible"""
    mask_mod: Callable[..., Tensor] | None = None
    """FlexAttention's form of it, of b, h, q, kv"""
    flash: dict[str, Any] | None = None
    """FlashAttention's arguments; None: it has none for the case."""
    lengths: Tensor | None = None
    """int32 (B,): the visible keys of each row, its first ones, in the cases of padding"""

    def ours(self, backend: str) -> Callable[[], Tensor]:
        source, plan = Source(self.key, self.value, **self.fields), None
        if source.key_mask is not None or source.block_mask is not None:
            blocks = dict(block_masks=[source.block_mask], block_size=source.block_size)
            plan = plan_attention([source.key_mask], **blocks if source.block_mask is not None else {})
        return lambda: multi_source_attention(self.query, [source], plan=plan, backend=backend)

    def all_keys(self, backend: str) -> Callable[[], Tensor]:
        source = Source(self.key, self.value)
        return lambda: multi_source_attention(self.query, [source], backend=backend)

    def by(self, function: Callable[..., Tensor], **options: Any) -> Tensor:
        """What a function with the signature of PyTorch's SDPA makes of the case, (B, N, H, D)."""
        return heads_first(function(*map(heads_first, (self.query, self.key, self.value)), **options))

    def repeated(self, call: Callable[["Case"], Tensor]) -> Tensor:
        """The call with the keys and values of every head stored for itself."""
        times = self.query.shape[2] // self.key.shape[2]
        key, value = (x.repeat_interleave(times, 2) for x in (self.key, self.value))
        return call(Case(**{**vars(self), "key": key, "value": value}))

    def block_mask(self) -> BlockMask | None:
        """FlexAttention's form of the mask."""
        if self.mask is None:
            return None
        rows, heads = (n if n > 1 else None for n in self.mask.shape[:2])
        sizes = (rows, heads, self.query.shape[1], self.key.shape[1])
        return create_block_mask(self.mask_mod, *sizes, device=self.query.device.type)

    def by_flex(self) -> Callable[[], Tensor]:
        flex = Flex(self.block_mask())
        return lambda: flex(self.query, self.key, self.value)

    @property
    def share(self) -> float:
        return 1.0 if self.mask is None else int(self.mask.sum()) / self.mask.numel()

    def _expected(self, fields: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """By the specification, in the query's dtype and in float64."""

        def computed(dtype: torch.dtype) -> Tensor:
            source = Source(self.key.to(dtype), self.value.to(dtype), **fields)
            return reference.multi_source_attention(self.query[:, self.some].to(dtype), [source])

        return computed(self.query.dtype), computed(torch.float64)

    def problem(self, dtype: str, contenders: dict[str, Callable[[], object]], baseline: str = "") -> Problem:
        """Ours comes first; contenders whose names end with ALL_KEYS are checked against the result without a mask."""
        masked, whole = self._expected(self.few), self._expected({})

        def error(name: str, result: Tensor) -> float:
            return checked_error(name, result[:, self.some], *(whole if name.endswith(ALL_KEYS) else masked))

        batch, queries, heads, head_dim = self.query.shape
        shape = f"{queries}x{heads}x{head_dim}"
        return Problem(
            op=self.op,
            layer=shape,
            model=self.model,
            shape=shape,
            dtype=dtype,
            flops=4.0 * batch * queries * heads * head_dim * self.key.shape[1] * self.share,
            contenders={name: Contender(call) for name, call in contenders.items()},
            error=error,
            visible=self.visible,
            share=self.share,
            baseline=baseline,
        )


def _tensors(
    layer: Layer, dtype: str, target: Target, *, rows: int = 1, queries: int | None = None, key_heads: int | None = None
) -> dict[str, Tensor]:
    """Random query, key and value, and the queries that are checked; by default as many queries as keys."""
    generator = torch.Generator(target.device).manual_seed(0)

    def randn(tokens: int, heads: int) -> Tensor:
        x = torch.randn(rows, tokens, heads, layer.head_dim, generator=generator, device=target.device)
        return x.to(DTYPES[dtype])

    queries, key_heads = queries or layer.tokens, key_heads or layer.heads
    query, key, value = randn(queries, layer.heads), randn(layer.tokens, key_heads), randn(layer.tokens, key_heads)
    some = torch.linspace(0, queries - 1, min(queries, CHECKED)).long().to(target.device)
    return dict(query=query, key=key, value=value, some=some)


def causal(layer: Layer, dtype: str, target: Target) -> Case:
    """Query i sees keys 0 … i."""
    layer = target.layer(layer)
    tensors = _tensors(layer, dtype, target)
    ranges, some = causal_range(layer.tokens, torch.device(target.device)), tensors["some"]
    place = torch.arange(layer.tokens, device=target.device)
    return Case(
        op="causal",
        model="keys up to the query's own place",
        visible="50%",
        **tensors,
        fields=dict(key_range=ranges),
        few=dict(key_range=ranges[:, some]),
        sdpa=dict(is_causal=True),
        mask=(place <= place[:, None])[None, None],
        mask_mod=lambda b, h, q, kv: kv <= q,
        flash=dict(causal=True),
    )


def window(layer: Layer, dtype: str, target: Target) -> Case:
    """Of the keys 0 … i, query i sees the last ones."""
    layer, size = target.layer(layer), target.size(WINDOW)
    tensors = _tensors(layer, dtype, target)
    ranges, some = causal_range(layer.tokens, torch.device(target.device), 0, size), tensors["some"]
    place = torch.arange(layer.tokens, device=target.device)
    mask = ((place <= place[:, None]) & (place > place[:, None] - size))[None, None]
    return Case(
        op="window",
        model=f"the last {size} keys up to the query's own place",
        visible=f"{int(mask.sum()) / mask.numel():.0%}",
        **tensors,
        fields=dict(key_range=ranges),
        few=dict(key_range=ranges[:, some]),
        sdpa=dict(attn_mask=mask),
        mask=mask,
        mask_mod=lambda b, h, q, kv: (kv <= q) & (kv > q - size),
        flash=dict(causal=True, window_size=(size - 1, 0)),
    )


def blocks(layer: Layer, dtype: str, target: Target) -> Case:
    """For each head and block of queries, a quarter of the blocks of keys, drawn at random."""
    layer, size = target.layer(layer), target.size(BLOCK)
    tensors = _tensors(layer, dtype, target)
    count, some = layer.tokens // size, tensors["some"]
    generator = torch.Generator(target.device).manual_seed(1)
    order = torch.rand(1, layer.heads, count, count, generator=generator, device=target.device).argsort(-1)
    seen = order.argsort(-1) < round(VISIBLE_BLOCKS * count)
    mask = seen.repeat_interleave(size, 2).repeat_interleave(size, 3)
    return Case(
        op="block mask",
        model=f"blocks of {size} x {size}, others for each head",
        visible=f"{VISIBLE_BLOCKS:.0%}",
        **tensors,
        fields=dict(block_mask=seen, block_size=(size, size)),
        few=dict(block_mask=seen[:, :, some // size], block_size=(1, size)),
        sdpa=dict(attn_mask=mask),
        mask=mask,
        mask_mod=lambda b, h, q, kv: seen[0, h, q // size, kv // size],
    )


def padding(layer: Layer, dtype: str, target: Target, queries: int, visible: str) -> Case:
    """Each batch row sees its first keys; visible: a name of SHARES."""
    layer, shares = target.layer(layer), SHARES[visible]
    tensors = _tensors(layer, dtype, target, rows=len(shares), queries=target.size(queries))
    lengths = torch.tensor([round(share * layer.tokens) for share in shares], dtype=torch.int32, device=target.device)
    seen = torch.arange(layer.tokens, device=target.device) < lengths[:, None]
    return Case(
        op="padding",
        model=f"{len(shares)} rows of {layer.tokens} keys",
        visible=visible,
        **tensors,
        fields=dict(key_mask=seen),
        few=dict(key_mask=seen),
        sdpa=dict(attn_mask=seen[:, None, None]),
        mask=seen[:, None, None],
        mask_mod=lambda b, h, q, kv: seen[b, kv],
        lengths=lengths,
    )


def grouped(layer: Layer, dtype: str, target: Target, queries: int, heads_of_a_key: int) -> Case:
    """Each head of the keys is read by several heads of the queries."""
    layer = target.layer(layer)
    key_heads = max(1, layer.heads // heads_of_a_key)
    return Case(
        op="grouped heads",
        model=f"{layer.tokens} keys of {key_heads} head" + "s" * (key_heads > 1),
        visible="100%",
        **_tensors(layer, dtype, target, queries=target.size(queries), key_heads=key_heads),
        fields={},
        few={},
        sdpa=dict(enable_gqa=True),
        flash={},
    )
