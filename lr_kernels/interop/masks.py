"""What a mask in PyTorch's form, (B or 1, H or 1, N or 1, M or 1), means for the operator: which keys are hidden from
all queries, from which queries a key is hidden, a number per key.

A mask that holds one row for all heads and queries (padding) is taken as it is. One that holds a row for each query is
looked into, once as long as it stays the same: this synchronizes with a GPU. It is read as

    keys that no query sees, and for each query an interval of the others (causal order, windows, packed sequences);
    or at most 8 different rows, each of a group of queries.

What fits neither is refused.
"""

from collections import OrderedDict
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..attention.plan import AttentionPlan, Kept, plan_attention
from ..runtime.checks import fail, one_of
from ..runtime.tensors import within_float32

_REMEMBERED = 8
"""Masks whose parts are kept, with the masks themselves."""
_MAX_GROUPS = 8


class MaskParts(NamedTuple):
    """A mask as fields of a source of as many rows as the mask, and the groups of the queries."""

    key_mask: Tensor | None = None  # bool (B or 1, M)
    key_bias: Tensor | None = None  # (B or 1, M)
    key_range: Tensor | None = None  # int32 (B or 1, N, 2)
    key_groups: Tensor | None = None  # uint8 (B or 1, M)
    query_groups: Tensor | None = None  # uint8 (B or 1, N)
    plan: AttentionPlan | None = None


def read_mask(op: str, name: str, mask: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> MaskParts:
    """The parts of a mask that is broadcastable to `shape`, (B, H, N, M); dtype: of the query.

    Raises:
        ValueError: a shape that does not fit. TypeError: a mask that is neither bool nor floating.
        NotImplementedError: a mask that is none of those above, or that holds numbers for each query or head and
            requires a gradient.
    """
    if mask.dtype != torch.bool and not mask.is_floating_point():
        fail(op, name, "bool or a floating dtype", mask.dtype, error=TypeError)
    if not 1 <= mask.dim() <= 4:
        fail(op, name, "1 to 4 dimensions", mask.dim())
    mask = mask[(None,) * (4 - mask.dim())]
    if not all(one_of(n, 1, wanted) for n, wanted in zip(mask.shape, shape)):
        fail(op, name, f"a shape that broadcasts to {shape}", tuple(mask.shape))
    if 0 in mask.shape[1:3]:  # no query could see a difference
        mask = mask.new_ones(1, 1, 1, 1)
    for dim in (1, 2):  # of an expanded dimension one entry is enough
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    capturing = mask.is_cuda and torch.cuda.is_current_stream_capturing()
    alike = mask.shape[1] == mask.shape[2] == 1
    if not alike and mask.requires_grad and torch.is_grad_enabled():  # each copy has a gradient of its own
        what = "head" if mask.shape[1] > 1 else "query"
        _refuse(op, name, f"the same for every {what}", "copies that require gradients")
    if torch.compiler.is_compiling() or capturing or mask.requires_grad:
        return _of_keys(_assert_alike(op, name, mask), shape, dtype)
    known = _remembered.find(mask, shape, dtype)
    if known is None:
        known = _of_keys(mask, shape, dtype) if alike else _of_queries(op, name, mask, shape, dtype)
        known = _with_plan(known)
        _remembered.keep(mask, shape, dtype, known)
    return known


class _Remembered:
    """The parts of the last masks, by the masks' memory and count of changes."""

    def __init__(self) -> None:
        self.entries: OrderedDict[tuple, tuple[Kept, MaskParts]] = OrderedDict()

    @staticmethod
    def key(mask: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple:
        return (mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, mask.device, shape, dtype)

    def find(self, mask: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> MaskParts | None:
        kept, parts = self.entries.get(self.key(mask, shape, dtype), (None, None))
        return parts if kept is not None and kept.is_as_before(mask) else None

    def keep(self, mask: Tensor, shape: tuple[int, ...], dtype: torch.dtype, parts: MaskParts) -> None:
        kept = Kept(mask)
        foreign = not mask.untyped_storage().resizable()  # as NumPy's memory, which others change uncounted
        if kept.version is None or type(mask) is not Tensor or foreign:
            return
        self.entries[self.key(mask, shape, dtype)] = (kept, parts)
        while len(self.entries) > _REMEMBERED:
            self.entries.popitem(last=False)


_remembered = _Remembered()


def _with_plan(parts: MaskParts) -> MaskParts:
    if parts.key_mask is None and parts.key_groups is None:
        return parts
    groups = None if parts.key_groups is None else [parts.key_groups]
    return parts._replace(plan=plan_attention([parts.key_mask], groups, parts.query_groups))


def _of_keys(mask: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> MaskParts:
    """Of a mask that is the same for all heads and queries."""
    per_key = mask[:, 0, 0].expand(mask.shape[0], shape[3])
    if per_key.dtype == torch.bool:
        return MaskParts(key_mask=per_key)
    return MaskParts(key_bias=per_key if dtype == torch.float64 else within_float32(per_key).float())


def _assert_alike(op: str, name: str, mask: Tensor) -> Tensor:
    """The first entry of heads and queries, and an assertion on the device that the others are the same."""
    for dim, what in ((1, "head"), (2, "query")):
        first = mask.narrow(dim, 0, 1)
        if mask.shape[dim] != 1:
            torch._assert_async((mask == first).all(), f"lr_kernels.{op}: {name}: expected the same for every {what}")
        mask = first
    return mask


def _of_queries(op: str, name: str, mask: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> MaskParts:
    """Of a mask that holds a row for each query, or for each head."""
    if mask.shape[1] > 1:
        if not (mask == mask[:, :1]).all():
            _refuse(op, name, "the same for every head", f"different ones, {tuple(mask.shape)}")
        mask = mask[:, :1]
    if (mask == mask[:, :, :1]).all():
        return _of_keys(mask[:, :, :1], shape, dtype)
    mask = mask[:, 0].expand(-1, shape[2], shape[3])
    visible, bias = (mask, None) if mask.dtype == torch.bool else _split_numbers(op, name, mask)
    if bias is not None and dtype != torch.float64:
        bias = within_float32(bias).float()
    seen = visible.any(1)
    found = _intervals(visible, seen)
    if found is not None:
        return MaskParts(None if seen.all() else seen, bias, found)
    groups = _groups(visible)
    if groups is None:
        rows = f"rows of {tuple(mask.shape)} that are neither"
        _refuse(op, name, f"an interval of keys for each query, or at most {_MAX_GROUPS} different rows", rows)
    return MaskParts(None, bias, None, *groups)


def _split_numbers(op: str, name: str, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """(bool, which keys a query sees; a number per key (B, M) or None) of a floating mask (B, N, M)."""
    visible = mask > torch.finfo(mask.dtype).min
    highest = mask.amax(1)
    lowest = torch.where(visible, mask, torch.inf).amin(1)
    seen = visible.any(1)
    if not torch.where(seen, highest == lowest, True).all():
        _refuse(op, name, "one number for each key", "numbers that differ between queries")
    if not visible.any(2).all() and (mask == torch.finfo(mask.dtype).min).any():
        hint = "one that hides every key by a finite number, which PyTorch attends to alike"
        _refuse(op, name, "a key for every query", hint)
    bias = torch.where(seen, highest, 0)
    return visible, None if not bias.any() else bias


def _intervals(visible: Tensor, seen: Tensor) -> Tensor | None:
    """key_range int32 (B, N, 2) where each query sees an interval of the keys that some query sees; else None.

    visible: bool (B, N, M), seen: bool (B, M).
    """
    place = torch.arange(visible.shape[2], dtype=torch.int32, device=visible.device)
    begin = torch.where(visible, place, visible.shape[2]).amin(2)
    end = torch.where(visible, place + 1, 0).amax(2)
    before = torch.nn.functional.pad(seen.cumsum(1), (1, 0))  # how many seen keys lie before each place
    held = before.gather(1, end.long()) - before.gather(1, torch.minimum(begin, end).long())
    if not (held == visible.sum(2)).all():
        return None
    return torch.stack([torch.minimum(begin, end), end], -1).int()


def _groups(visible: Tensor) -> tuple[Tensor, Tensor] | None:
    """(key_groups uint8 (B, M), query_groups uint8 (B, N)) of at most 8 different rows in each batch row; else None."""
    generator = torch.Generator(visible.device).manual_seed(0)
    weights = torch.rand(visible.shape[2], dtype=torch.float64, device=visible.device, generator=generator)
    sums = visible.double() @ weights
    keys = visible.new_zeros(visible.shape[0], visible.shape[2], dtype=torch.uint8)
    queries = visible.new_zeros(visible.shape[:2], dtype=torch.uint8)
    for b, row in enumerate(visible):
        bit = 0
        left = row.any(1)
        while left.any():
            if bit == _MAX_GROUPS:
                return None
            first = int(left.int().argmax())
            same = left & (sums[b] == sums[b, first])
            if not (row[same] == row[first]).all():
                return None
            keys[b] |= row[first].to(torch.uint8) << bit
            queries[b][same] = 1 << bit
            left = left & ~same
            bit += 1
    return keys, queries


def _refuse(op: str, name: str, expected: str, got: str) -> NoReturn:
    hint = (
        "block masks and other patterns go to multi_source_attention (block_mask, key_range, key_groups); "
        "or use PyTorch's attention"
    )
    fail(op, name, expected, got, hint, NotImplementedError)
