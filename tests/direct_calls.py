"""Direct calls of the ops: right ones, and such that lie in one to three arguments. `make fuzz` makes 20,000 of the
latter on a build with AddressSanitizer and UBSan; each must raise a RuntimeError, ValueError or TypeError, or succeed.

    python tests/direct_calls.py [calls [first seed]]

A tensor's memory ends with its last element, so that whatever reaches further is seen.
"""

import math
import random
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from lr_kernels import plan_attention
from lr_kernels.runtime.schemas import COLUMNS

Arguments = list
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
REFUSALS = (RuntimeError, ValueError, TypeError)


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


def attention_inputs(draw: Draw) -> tuple[tuple[int, ...], Arguments]:
    """(sizes of query, the arguments from query to class_start)"""
    shape = draw.size(0, 3), draw.size(0, 40), draw.size(0, 3), draw.size(1, 70)
    batch, tokens, heads, head_dim = shape
    dtype = draw.random.choice(FLOATS)
    groups = draw.below(4, draw.one_or(batch), tokens).byte() if draw.rarely() else None
    sources: list[list] = []
    masks, bytes_ = [], []
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
        key = draw.tokens(rows, keys, heads, head_dim, dtype=dtype)
        value = draw.tokens(rows, values, heads, head_dim, dtype=dtype)
        sources.append([key, value, table, moved, bias, *strengths])
    plan = plan_attention(masks, bytes_, groups)
    key, value, rows, moved, *rest = (list(x) for x in zip(*sources))
    query = draw.tokens(*shape, dtype=dtype)
    lists = [key, value, rows, list(plan.key_index), list(plan.key_count), moved, *rest]
    return shape, [query, *lists, plan.query_order, plan.class_start]


def multi_source_attention(draw: Draw) -> Arguments:
    shape, inputs = attention_inputs(draw)
    groups = [0]
    for _ in inputs[1][1:]:
        groups.append(groups[-1] + draw.rarely())
    weights = [draw.tensor(*shape[:2]) if draw.rarely() else None for _ in range(groups[-1] + 1)]
    lse = torch.empty(shape[:3], dtype=draw.random.choice((torch.float32, torch.float64)))
    out = torch.empty(shape, dtype=inputs[0].dtype)
    return [*inputs, groups, weights, 0.3, out, lse if groups[-1] == 0 and draw.often() else None]


def multi_source_attention_backward(draw: Draw) -> Arguments:
    shape, inputs = attention_inputs(draw)
    query, key, value, bias = inputs[0], inputs[1], inputs[2], inputs[7]
    grad_lse = draw.tensor(*shape[:3]) if draw.rarely() else None
    out, grad_out = (draw.tokens(*shape, dtype=query.dtype) for _ in range(2))
    lse = draw.tensor(*shape[:3]).double()
    gradients = [[torch.zeros(x.shape) for x in kind] for kind in (key, value)]
    of_bias = [torch.zeros(shape[2], *x.shape) if x is not None and draw.often() else torch.zeros(0) for x in bias]
    grad_query = torch.empty(shape, dtype=query.dtype)
    return [grad_out, grad_lse, *inputs, 0.3, out, lse, grad_query, *gradients, of_bias]


def attention_with_token_maps(draw: Draw) -> Arguments:
    batch, queries, heads, head_dim = draw.size(0, 3), draw.size(0, 40), draw.size(1, 3), draw.size(1, 70)
    keys, dtype = draw.size(1, 30), draw.random.choice(FLOATS)
    query, key, value = (draw.tokens(batch, n, heads, head_dim, dtype=dtype) for n in (queries, keys, keys))
    chosen = draw.below(keys, batch, draw.size(0, 5))
    maps = torch.empty(batch, queries, chosen.shape[1])
    return [query, key, value, chosen, 0.3, torch.empty(query.shape, dtype=dtype), maps]


def subject_mask(draw: Draw) -> Arguments:
    maps = draw.tensor(draw.size(0, 3), draw.size(1, 3), draw.size(1, 12), draw.size(1, 12))
    level = draw.random.choice(((None, None), (0.4, None), (None, 0.7)))
    out = torch.empty(maps.shape[0], draw.size(3, 20), draw.size(3, 20), dtype=torch.bool)
    return [maps, *level, draw.random.choice((1, 3)), out]


def step_blend(draw: Draw) -> Arguments:
    shape, dtype = (draw.size(0, 3), draw.size(1, 3), draw.size(0, 9), draw.size(1, 9)), draw.random.choice(FLOATS)
    batch, count, steps = shape[0], draw.size(1, 6), draw.size(1, 4)

    def latents(wanted: bool = True) -> Tensor | None:
        return draw.tensor(*shape, dtype=dtype) if wanted else None

    masked, kept, noise, history = (draw.rarely() for _ in range(4))
    table = draw.tensor(steps, draw.one_or(batch), count + len(COLUMNS))
    for name, given in (("sigma", noise), ("q", noise), ("h", history)):
        table[..., count + COLUMNS.index(name)] *= given
    mask = draw.bits(draw.one_or(batch), *shape[2:]).float() if masked else None
    step = draw.below(steps, 1) if draw.rarely() else None
    copies = draw.tensor(2 * batch, *shape[1:], dtype=dtype) if draw.rarely() else None
    return [
        latents(), [latents() for _ in range(count)], table, step, steps - 1, mask, latents(masked or kept),
        latents(noise), latents(history), draw.bits(batch) if kept else None, latents(), copies, latents(draw.rarely()),
    ]  # fmt: skip


def merge_attention_states(draw: Draw) -> Arguments:
    shape, dtype = (draw.size(0, 3), draw.size(0, 20), draw.size(1, 3), draw.size(1, 40)), draw.random.choice(FLOATS)
    parts = draw.size(1, 4)
    outs, lses = (
        [draw.tokens(*shape, dtype=dtype) for _ in range(parts)],
        [draw.tensor(*shape[:3]) for _ in range(parts)],
    )
    return [outs, lses, torch.empty(shape, dtype=dtype), torch.empty(shape[:3])]


def adain(draw: Draw) -> Arguments:
    batch, tokens, others = draw.size(0, 3), draw.size(0, 40), draw.size(0, 40)
    heads, channels, dtype = draw.size(1, 3), draw.size(1, 40), draw.random.choice(FLOATS)
    rows = draw.one_or(batch)
    x, reference = (draw.tokens(r, n, heads, channels, dtype=dtype) for r, n in ((batch, tokens), (rows, others)))
    masks = [draw.bits(draw.one_or(batch), n) if draw.often() else None for n in (tokens, others)]
    return [x, reference, *masks, 1e-5, torch.empty(x.shape, dtype=dtype)]


def correspondence(draw: Draw) -> Arguments:
    batch, channels, dtype = draw.size(0, 3), draw.size(1, 40), draw.random.choice(FLOATS)
    target = draw.tokens(batch, draw.size(0, 50), channels, dtype=dtype)
    reference = draw.tokens(draw.one_or(batch), draw.size(1, 50), channels, dtype=dtype)
    radii = draw.below(20, draw.one_or(batch)).long()
    shape = target.shape[:2]
    return [target, reference, draw.size(1, 9), radii, torch.empty(shape, dtype=torch.long), torch.empty(shape) > 0]


def compact_keys(draw: Draw) -> Arguments:
    rows, keys, classes = draw.size(1, 3), draw.size(0, 40), draw.size(1, 4)
    mask = draw.bits(draw.one_or(rows), keys) if draw.often() else None
    groups = draw.below(4, draw.one_or(rows), keys).byte() if draw.often() else None
    index = torch.empty(classes, rows, keys, dtype=torch.int32)
    return [mask, groups, list(range(classes)), index, torch.empty(classes, rows, dtype=torch.int32)]


OPERATORS: dict[str, Callable[[Draw], Arguments]] = {
    f.__name__: f
    for f in (
        multi_source_attention, multi_source_attention_backward, attention_with_token_maps, subject_mask, step_blend,
        merge_attention_states, adain, correspondence, compact_keys,
    )
}  # fmt: skip
"""compact_keys has no CPU implementation."""
ON_CPU = [name for name in OPERATORS if name != "compact_keys"]

Place = tuple[int, ...]
"""Of an argument, or of an entry of a list."""


def places(arguments: Arguments) -> list[Place]:
    found: list[Place] = []
    for i, x in enumerate(arguments):
        found.append((i,))
        if isinstance(x, list):
            found += [(i, j) for j in range(len(x))]
    return found


def at(arguments: Arguments, place: Place) -> object:
    x = arguments[place[0]]
    return x if len(place) == 1 else x[place[1]]


def replaced(arguments: Arguments, place: Place, x: object) -> Arguments:
    copy = [list(y) if isinstance(y, list) else y for y in arguments]
    if len(place) == 1:
        copy[place[0]] = x
    else:
        copy[place[0]][place[1]] = x
    return copy


# ---- lies ----


def other_dtype(draw: Draw, x: Tensor) -> Tensor:
    dtypes = (*FLOATS, torch.float64, torch.int32, torch.int64, torch.bool, torch.uint8, torch.int8, torch.complex64)
    return x.to(draw.random.choice([y for y in dtypes if y != x.dtype]))


def one_dimension_more(draw: Draw, x: Tensor) -> Tensor:
    return x.unsqueeze(draw.random.randint(0, x.dim()))


def one_dimension_less(draw: Draw, x: Tensor) -> Tensor:
    return x.sum(draw.random.randrange(x.dim())).to(x.dtype) if x.dim() else x[None]


def _some_dimension(draw: Draw, x: Tensor) -> int:
    return draw.random.randrange(x.dim())


def shorter(draw: Draw, x: Tensor) -> Tensor:
    d = _some_dimension(draw, x)
    return x.narrow(d, 0, max(0, x.shape[d] - draw.random.randint(1, 3)))


def longer(draw: Draw, x: Tensor) -> Tensor:
    d = _some_dimension(draw, x)
    shape = list(x.shape)
    shape[d] += draw.random.randint(1, 40)
    return torch.ones(shape, dtype=x.dtype)


def empty(draw: Draw, x: Tensor) -> Tensor:
    return x.narrow(_some_dimension(draw, x), 0, 0)


def expanded(draw: Draw, x: Tensor) -> Tensor:
    """The first entry of a dimension again and again, often as many as before."""
    d = _some_dimension(draw, x)
    shape = list(x.shape)
    shape[d] = draw.random.choice((x.shape[d], x.shape[d], 1000, 2**20 if x.numel() < 1000 else 5))
    return x.narrow(d, 0, min(1, x.shape[d])).expand(shape) if x.shape[d] else x


def spread(draw: Draw, x: Tensor) -> Tensor:
    """Gaps in the last dimension."""
    wide = torch.zeros(*x.shape, 2, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def transposed(draw: Draw, x: Tensor) -> Tensor:
    a, b = _some_dimension(draw, x), _some_dimension(draw, x)
    return x.transpose(a, b).contiguous().transpose(a, b) if draw.often() else x.transpose(a, b)


def huge_strides(draw: Draw, x: Tensor) -> Tensor:
    """Where no element is: of dimensions of one entry, or of an empty tensor."""
    if draw.often():
        x = x.narrow(_some_dimension(draw, x), 0, 0)
    strides = [s if x.numel() and n > 1 else draw.random.choice((2**62, 2**31, 0)) for n, s in zip(x.shape, x.stride())]
    return x.as_strided(x.shape, strides)


def overlapping(draw: Draw, x: Tensor) -> Tensor:
    """Each row begins before the one before has ended."""
    return x.as_strided(x.shape, [max(1, s // 2) for s in x.stride()])


def released(draw: Draw, x: Tensor) -> Tensor:
    """Memory that was made smaller, or given back, under the tensor."""
    x = x.clone()
    x.untyped_storage().resize_(draw.random.choice((0, x.untyped_storage().nbytes() // 2)))
    return x


def other_entries(draw: Draw, x: Tensor) -> Tensor:
    """Numbers that no list and no table should hold."""
    if x.dtype == torch.bool or not x.numel():
        return ~x
    x = x.clone(memory_format=torch.contiguous_format)
    wrong = (-1, -2, 0, 7, 1000, 2**31 - 1, -(2**31)) if not x.is_floating_point() else (math.nan, math.inf, -1e30, 0)
    flat = x.view(-1)
    for _ in range(draw.random.randint(1, 3)):
        number = draw.random.choice(wrong)
        flat[draw.random.randrange(flat.numel())] = number % 256 if x.dtype == torch.uint8 else number
    return x


def on_meta(draw: Draw, x: Tensor) -> Tensor:
    return x.to("meta")


def of_zeros(draw: Draw, x: Tensor) -> Tensor:
    """A tensor without memory that reads as zeros."""
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


def sparse(draw: Draw, x: Tensor) -> Tensor:
    return x.to_sparse()


def negated(draw: Draw, x: Tensor) -> Tensor:
    return torch._neg_view(x) if x.is_floating_point() else x


def wants_gradient(draw: Draw, x: Tensor) -> Tensor:
    return x.clone().requires_grad_() if x.is_floating_point() else x


STRUCTURAL = (
    other_dtype, one_dimension_more, one_dimension_less, shorter, longer, empty, expanded, spread, transposed,
    huge_strides, overlapping, released, on_meta, of_zeros, sparse, negated, wants_gradient,
)  # fmt: skip
IN_PLACE = (released, expanded, on_meta, of_zeros, sparse, negated, wants_gradient, huge_strides)
"""Lies that would be gone in memory of its own."""
NUMBERS = (-1, 0, 1, 2, 17, 2**31, 2**63 - 1, -(2**63))
REALS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300, 2.0)


def hollow(x: Tensor) -> bool:
    """Whether there is no memory behind some element."""
    if x.layout != torch.strided or x.device.type != "cpu" or x._is_zerotensor():
        return True
    reach = x.storage_offset() + 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.numel() > 0 and reach * x.element_size() > x.untyped_storage().nbytes()


def lie(draw: Draw, arguments: Arguments) -> Arguments:
    """The arguments with one changed: a tensor, a list, a number, or which of them share memory."""
    place = draw.random.choice(places(arguments))
    x = at(arguments, place)
    tensors = [y for y in (at(arguments, p) for p in places(arguments)) if isinstance(y, Tensor)]
    if isinstance(x, Tensor):
        if draw.random.random() < 0.1:  # outputs share memory with others
            y = draw.random.choice(tensors)
            if draw.often() and y.numel() >= x.numel() and y.dtype == x.dtype and y.is_contiguous():
                y = y.view(-1)[: x.numel()].view(x.shape)
            return replaced(arguments, place, y)
        change = other_entries if draw.rarely() else draw.random.choice(STRUCTURAL)
        if x.dim() == 0 and change not in (other_dtype, one_dimension_more, on_meta):
            return arguments
        # torch itself would not survive a change of a tensor without memory, nor print one in a refusal of its type
        if hollow(x) or x.numel() > 2**20 or place in draw.filled:
            return arguments
        x = change(draw, x)
        return replaced(arguments, place, x if change in IN_PLACE else own(x))
    if isinstance(x, list):
        changed = draw.random.choice((x[:-1], x + x[-1:], [], x[::-1], x * 5))
        return replaced(arguments, place, changed)
    if x is None:
        whole = [y for y in tensors if not hollow(y)]
        draw.filled.add(place)
        return replaced(arguments, place, draw.random.choice(whole)) if whole else arguments
    if isinstance(x, float):
        return replaced(arguments, place, draw.random.choice((*REALS, None)))
    return replaced(arguments, place, draw.random.choice((*NUMBERS, None)))


def make_call(seed: int) -> tuple[str, str]:
    """One lying call; returns the op and what came of it."""
    draw = Draw(seed)
    name = draw.random.choice(ON_CPU)
    arguments = OPERATORS[name](draw)
    try:
        for _ in range(draw.random.randint(1, 3)):
            arguments = lie(draw, arguments)
    except REFUSALS:  # torch itself refuses to make such a tensor
        return name, "not made"
    try:
        getattr(torch.ops.lr_kernels, f"{name}_cpu")(*arguments)
        return name, "succeeded"
    except REFUSALS as error:
        return name, "refused by the op" if f"lr_kernels.{name}: " in str(error) else "refused by torch"


def main(calls: int = 20_000, first: int = 0) -> None:
    found: Counter[tuple[str, str]] = Counter()
    seed, made = first, 0
    while made < calls:
        name, outcome = make_call(seed)
        found[name, outcome] += 1
        made += outcome != "not made"
        seed += 1
        if seed % 1000 == 0:
            print(f"up to seed {seed}", flush=True)  # where to look after a crash
    for (name, outcome), count in sorted(found.items()):
        print(f"{name:34} {outcome:18} {count:6}")
    for outcome in sorted({outcome for _, outcome in found}):
        print(f"{'all':34} {outcome:18} {sum(n for (_, x), n in found.items() if x == outcome):6}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
