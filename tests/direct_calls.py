"""Direct calls of the ops: valid ones, and ones with one to three wrong arguments, which this file calls lies. `make
fuzz` makes 20,000 such calls on a build with AddressSanitizer and UBSan; each must raise a RuntimeError, ValueError or
TypeError, or succeed.

    python tests/direct_calls.py [calls [first seed]]

A tensor's memory ends with its last element, so that whatever reaches further is seen.
"""

import math
import sys
from collections import Counter
from importlib import import_module

import torch
from draw import FLOATS, Arguments, Draw, Place, own
from torch import Tensor

from lr_kernels.runtime.schemas import SCHEMAS

REFUSALS = (RuntimeError, ValueError, TypeError)


OPERATORS = {name: import_module(f"test_{name}").right_call for name in SCHEMAS}
"""How to draw the arguments of a right call of an op: the operator's test file says it."""
ON_CPU = [name for name in OPERATORS if name != "compact_keys"]
"""compact_keys has no CPU implementation."""


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
"""Changes that concern how a tensor lies in memory: a copy into memory of its own (`own`) would undo them."""
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
        # Changing a tensor without memory would crash torch itself, and so would printing it in a TypeError.
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
