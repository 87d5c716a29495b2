"""Random arguments of right calls, their numbers from a seed.

Each operator's test file has a function `right_call(draw)`: the arguments of its op in the order of the schema.
"""

import random

import torch
from torch import Tensor

from lr_kernels import plan_attention
from lr_kernels.attention.plan import keys_of_entry

Arguments = list
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Place = tuple[int, ...]
"""The place of an argument, (index,), or of an entry of an argument that is a list, (index, entry)."""


def own(x: Tensor) -> Tensor:
    """x in memory of its own, with its strides and without a gap behind it."""
    if not x.numel():
        return x
    reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    memory = x.as_strided((reach,), (1,)).clone()
    return memory.as_strided(x.shape, x.stride(), 0)


class Draw:
    """Right arguments, their numbers from a seed."""

    def __init__(self, seed: int) -> None:
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.filled: set[Place] = set()  # places of tensors where there was None

    def size(self, low: int, high: int) -> int:
        """Now and then 0."""
        return 0 if low == 0 and self.random.random() < 0.05 else self.random.randint(max(low, 1), high)

    def rarely(self) -> bool:
        return self.random.random() < 0.25

    def often(self) -> bool:
        return self.random.random() < 0.5

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def tokens(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Plain, or a part of a wider tensor."""
        if self.often():
            return self.tensor(*shape, dtype=dtype)
        return own(self.tensor(shape[0], shape[1], 2, *shape[2:], dtype=dtype)[:, :, 1])

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(max(1, limit), shape, generator=self.generator, dtype=torch.int32)

    def bits(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < 0.6

    def one_or(self, n: int) -> int:
        return self.random.choice((1, n))

    def eight_bits(self, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(R, M, H, D) of any bits, plain or a part of a wider tensor, and their scales."""
        rows, tokens, *rest = like.shape
        bits = torch.randint(256, (rows, tokens, 2, *rest), generator=self.generator, dtype=torch.uint8).view(dtype)
        scale = self.tensor(*(self.one_or(n) for n in like.shape[:3]))
        return own(bits[:, :, 1]) if self.often() else bits[:, :, 1].contiguous(), scale


def drawn_attention(draw: Draw) -> tuple[tuple[int, ...], Arguments]:
    """(sizes of out, the arguments from query to query_block)"""
    shape = draw.size(0, 3), draw.size(0, 40), draw.random.choice((0, 1, 2, 3, 4)), draw.size(1, 70)
    batch, tokens, heads, head_dim = shape
    value_dim = draw.size(1, 70) if draw.rarely() else head_dim
    dtype = draw.random.choice(FLOATS)
    groups = draw.below(4, draw.one_or(batch), tokens).byte() if draw.rarely() else None
    block_size = (draw.size(1, 20), draw.random.choice((1, 4, 16)))
    blocked = groups is None and draw.rarely()
    sources: list[list] = []
    masks, bytes_, blocks = [], [], []
    for _ in range(draw.size(1, 4)):
        keys, rows = draw.size(0, 30), draw.one_or(batch)
        table = None
        if draw.rarely():
            rows = draw.size(1, 3)
            table = draw.below(rows + 1, batch) - 1
        moved, values = None, keys
        if draw.rarely():
            values = draw.size(1, 20)
            moved = draw.below(values, draw.one_or(rows), keys)
        masks.append(draw.bits(draw.one_or(rows), keys) if draw.rarely() else None)
        bytes_.append(draw.below(4, draw.one_or(rows), keys).byte() if groups is not None and draw.often() else None)
        strengths = [draw.tensor(batch, 1).expand(batch, heads) if draw.rarely() else None for _ in range(2)]
        bias = draw.tensor(draw.one_or(rows), keys) if draw.rarely() else None
        key_heads = draw.random.choice([k for k in range(1, heads + 1) if heads % k == 0] or [0])
        key = draw.tokens(rows, keys, key_heads, head_dim, dtype=dtype)
        value = draw.tokens(rows, values, key_heads, value_dim, dtype=dtype)
        ranges = draw.below(keys + 5, draw.one_or(batch), tokens, 2) - 2 if draw.rarely() else None
        if blocked and draw.often():
            counts = (-(-tokens // block_size[0]), -(-keys // block_size[1]))
            blocks.append(draw.bits(draw.one_or(rows), draw.one_or(heads), *counts))
        else:
            blocks.append(None)
        sources.append([key, value, table, ranges, moved, bias, *strengths])
    plan = plan_attention(masks, bytes_, groups, block_masks=blocks, block_size=block_size)
    key, value, rows, ranges, *rest = (list(x) for x in zip(*sources))
    query = draw.tokens(*shape, dtype=dtype)
    entries = [keys_of_entry(plan, i) for i in range(len(key))]
    query_block = 0 if plan.block_size is None else block_size[0]
    lists = [key, value, rows, list(plan.key_index), list(plan.key_count), entries, ranges, *rest]
    out = (*shape[:3], value_dim)
    return out, [query, *lists, plan.query_order, plan.class_start, query_block]
