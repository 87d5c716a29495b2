"""AttentionPlan: which keys each class of queries reads, built once per mask and reused by layers, heads and steps.

Queries with the same group byte form a class, and so do those of a block where there are block masks. The kernels walk
the queries class by class, and for each class only the keys it sees, so the work follows the visible share. Everything
is built on the masks' device.
"""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime import modes
from ..runtime.checks import check_memory, check_pair, check_sequence, fail, one_of
from ..runtime.schemas import MAX_KEY_BLOCK
from ..runtime.tensors import check_dense, resolved, resolved_or_none
from .lists import block_lists, order_queries, visible_lists


class Kept:
    """One mask at the time when the plan was built. The alias keeps the memory alive, so that no other mask gets the
    address."""

    def __init__(self, mask: Tensor) -> None:
        self.alias = mask.detach()
        self.address = mask.data_ptr()
        self.shape = mask.shape
        self.version = None if mask.is_inference() else mask._version  # inference tensors do not count changes

    def is_as_before(self, mask: Tensor) -> bool:
        """Whether the mask is in the same memory, of the same shape, and was not changed since."""
        return (
            (self.version is None or mask._version == self.version)
            and mask.data_ptr() == self.address
            and mask.shape == self.shape
        )


class PlanStamp:
    """The masks and lists of a plan as `plan_attention` made it, to see later whether either has changed. A copy of a
    plan (copy, pickle) holds other masks and has no stamp."""

    def __init__(self, masks: Sequence[tuple[str, Tensor]], parts: tuple) -> None:
        self.masks = [(name, mask, Kept(mask)) for name, mask in masks]
        self.parts = parts

    def __reduce__(self) -> tuple:
        return type(None), ()


class AttentionPlan(NamedTuple):
    """Index lists for one set of masks; build it with `plan_attention`. One entry per source in the tuples.

    The masks are kept: a call with this plan must pass the very same tensors in its sources.
    """

    key_masks: tuple[Tensor | None, ...]
    key_groups: tuple[Tensor | None, ...]
    query_groups: Tensor | None
    key_index: tuple[Tensor | None, ...]
    """int32 (C or 1, R or 1, H or 1, ·): the visible keys of a class and source row, ascending; None: all keys. Of a
    source with a block mask alone the entries are blocks of keys."""
    key_count: tuple[Tensor | None, ...]
    """int32 (C or 1, R or 1, H or 1): how many of them."""
    query_order: Tensor | None
    """int32 (B or 1, N): the queries, class by class; None: one class."""
    class_start: Tensor | None
    """int32 (B or 1, C + 1): where each class starts in query_order."""
    block_masks: tuple[Tensor | None, ...] | None = None
    """None: no source has one."""
    block_size: tuple[int, int] | None = None
    """Queries and keys in a block of the block masks."""
    stamp: PlanStamp | None = None
    """How the masks were when the plan was built. None: not known, as in a traced plan."""


def plan_attention(
    key_masks: Sequence[Tensor | None],
    key_groups: Sequence[Tensor | None] | None = None,
    query_groups: Tensor | None = None,
    *,
    query_classes: Sequence[int] | None = None,
    block_masks: Sequence[Tensor | None] | None = None,
    block_size: tuple[int, int] = (128, 128),
) -> AttentionPlan:
    """Build the plan of `multi_source_attention` for sources with these masks.

    Args:
        key_masks: one bool (R or 1, M) or None per source.
        key_groups: one uint8 (R or 1, M) or None per source; None: no source has groups.
        query_groups: uint8 (B or 1, N) or None.
        query_classes: the bytes that occur in query_groups. Default: found by looking, which synchronizes with a GPU
            and cannot be traced by torch.compile; name them where that matters. A byte that is not named is an error,
            raised on the device.
        block_masks: one bool (R or 1, H or 1, query blocks, key blocks) or None per source; None: no source has one.
            Beside them there are no groups.
        block_size: queries and keys in a block of block_masks; that of the sources. Keys: a power of two.

    A source's key_range needs no plan.

    Raises:
        ValueError: lists of different lengths; key_groups without query_groups; block masks beside groups, or with
            different numbers of query blocks; lists beyond the memory.
        TypeError: a mask that is not bool, groups that are not uint8.

    The plan is of the masks as they are now. A call refuses it once one of them was changed in place (a view shares the
    count of changes of its base), or was given other data. Changes that PyTorch does not count are not seen: of
    inference tensors, through `.data`, and of a NumPy array that shares the memory; nor does a function compiled by
    torch.compile look. Build the plan anew after such changes.
    """
    check_sequence("plan_attention", "key_masks", key_masks)
    if key_groups is not None:
        check_sequence("plan_attention", "key_groups", key_groups)
    if query_groups is not None and not isinstance(query_groups, Tensor):
        fail("plan_attention", "query_groups", "a tensor or None", type(query_groups).__name__, error=TypeError)
    if query_classes is not None and not isinstance(query_classes, Iterable):
        fail("plan_attention", "query_classes", "integers from 0 to 255", repr(query_classes), error=TypeError)
    key_groups = [None] * len(key_masks) if key_groups is None else key_groups
    if len(key_groups) != len(key_masks):
        fail("plan_attention", "key_groups", f"{len(key_masks)} entries", len(key_groups))
    if block_masks is not None:
        check_sequence("plan_attention", "block_masks", block_masks)
        if len(block_masks) != len(key_masks):
            fail("plan_attention", "block_masks", f"{len(key_masks)} entries", len(block_masks))
        if all(x is None for x in block_masks):
            block_masks = None
    check_masks("plan_attention", key_masks, key_groups, query_groups)
    if block_masks is not None:
        sizes = [block_size] * len(block_masks)
        check_block_masks("plan_attention", block_masks, sizes, key_masks, key_groups, query_groups)
    if modes.transforms_active():
        named = _named(key_masks, key_groups, query_groups, block_masks)
        modes.refuse_vmap("plan_attention", dict(named))
    return build_plan(key_masks, key_groups, query_groups, query_classes, block_masks, block_size)


def _named(
    key_masks: Sequence[Tensor | None],
    key_groups: Sequence[Tensor | None],
    query_groups: Tensor | None,
    block_masks: Sequence[Tensor | None] | None,
) -> list[tuple[str, Tensor]]:
    """The masks that are not None, each with the name of its argument."""
    named = [
        *((f"key_mask[{i}]", x) for i, x in enumerate(key_masks)),
        *((f"key_groups[{i}]", x) for i, x in enumerate(key_groups)),
        ("query_groups", query_groups),
        *((f"block_mask[{i}]", x) for i, x in enumerate(block_masks or ())),
    ]
    return [(name, x) for name, x in named if x is not None]


def build_plan(
    key_masks: Sequence[Tensor | None],
    key_groups: Sequence[Tensor | None],
    query_groups: Tensor | None,
    query_classes: Iterable[int] | None = None,
    block_masks: Sequence[Tensor | None] | None = None,
    block_size: tuple[int, int] = (128, 128),
) -> AttentionPlan:
    """`plan_attention` without its checks, for masks that are known to fit."""
    masks = _named(key_masks, key_groups, query_groups, block_masks)
    query_order = class_start = None
    classes: Sequence[int] = ()
    if query_groups is not None:
        named = query_groups.unique().tolist() if query_classes is None else list(query_classes)
        for c in named:
            if not isinstance(c, Integral) or not 0 <= int(c) <= 255:
                fail("plan_attention", "query_classes", "integers from 0 to 255", c)
        classes = sorted({int(c) for c in named})
        classes = classes or [0]  # there are no queries
        _check_list_memory(masks, query_groups, len(classes))
        query_order, class_start = order_queries(query_groups, classes)
    else:
        _check_list_memory(masks, None, 1)
    lists = []
    for i, (mask, groups) in enumerate(zip(key_masks, key_groups)):
        of_blocks = None if block_masks is None else block_masks[i]
        if of_blocks is None:
            found = visible_lists(mask, groups, classes)  # the same for all heads
            lists.append(tuple(None if x is None else x.unsqueeze(2) for x in found))
        else:
            lists.append(_lists_of_blocks(of_blocks, mask, block_size[1]))
    index, count = tuple(index for index, _ in lists), tuple(count for _, count in lists)
    blocks = None if block_masks is None else tuple(block_masks)
    size = None if block_masks is None else (int(block_size[0]), int(block_size[1]))
    made = (tuple(key_masks), tuple(key_groups), query_groups, index, count, query_order, class_start, blocks, size)
    stamp = (
        PlanStamp(masks, made) if not torch.compiler.is_compiling() and all(_has_memory(x) for _, x in masks) else None
    )
    return AttentionPlan(*made, stamp)


def _has_memory(x: Tensor) -> bool:
    """Whether x is a tensor of its own: not fake, not of a subclass, not inside a transform of torch.func."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _lists_of_blocks(blocks: Tensor, mask: Tensor | None, key_block: int) -> tuple[Tensor, Tensor]:
    """`block_lists`, refused where they cannot fit the memory."""
    rows, heads, query_blocks, key_blocks = blocks.shape
    if mask is not None:
        rows, key_blocks = max(rows, mask.shape[0]), mask.shape[1]
    check_memory("plan_attention", "block_masks", 21 * rows * heads * query_blocks * key_blocks, blocks.device)
    mask = resolved_or_none("plan_attention", "key_masks", mask)
    return block_lists(resolved("plan_attention", "block_masks", blocks), mask, key_block)


def _check_list_memory(masks: Sequence[tuple[str, Tensor]], query_groups: Tensor | None, classes: int) -> None:
    """Refuse lists that cannot fit: per entry 4 bytes that stay, and while they are made 17 of places and order."""
    if masks:
        entries = sum(x.numel() * classes for name, x in masks if name.startswith("key"))
        queries = 0 if query_groups is None else query_groups.numel() * (classes + 24)
        check_memory("plan_attention", "key_masks", 21 * entries + queries, masks[0][1].device)


def changed_mask(plan: AttentionPlan) -> str | None:
    """The name of a mask that has changed since the plan was built, or None."""
    if plan.stamp is not None:
        for name, mask, kept in plan.stamp.masks:
            if not kept.is_as_before(mask):
                return name
    return None


def as_made(plan: AttentionPlan) -> bool:
    """Whether the masks and the lists are those that `plan_attention` was given and made."""
    if plan.stamp.__class__ is not PlanStamp:
        return False
    for field, made in zip(plan, plan.stamp.parts):
        if field is not made:
            return False
    return True


def check_parts(op: str, plan: AttentionPlan) -> None:
    """TypeError if a field of the plan has a wrong type, as in a plan that was put together by hand."""
    for name in ("key_masks", "key_groups", "key_index", "key_count"):
        if not isinstance(getattr(plan, name), (list, tuple)):
            fail(op, f"plan.{name}", "a tuple", type(getattr(plan, name)).__name__, error=TypeError)
    if plan.stamp is not None and not isinstance(plan.stamp, PlanStamp):
        fail(op, "plan.stamp", "that of plan_attention or None", type(plan.stamp).__name__, error=TypeError)
    if len(plan.key_groups) != len(plan.key_masks):
        fail(op, "plan.key_groups", f"{len(plan.key_masks)} entries", len(plan.key_groups))


def check_lists(op: str, plan: AttentionPlan, keys: Sequence[int], query: Tensor) -> None:
    """ValueError or TypeError where lists do not fit: keys M of each source, query (B, N, H, D). Their entries the
    kernels' bindings check."""
    batch, tokens, heads = query.shape[:3]
    classes = 1
    grouped = plan.query_groups is not None
    block_masks = plan.block_masks or (None,) * len(keys)
    for name, x, shape in (
        ("query_order", plan.query_order, (batch, tokens)),
        ("class_start", plan.class_start, (batch, None)),
    ):
        if (x is not None) != grouped:
            fail(op, f"plan.{name}", "a tensor" if grouped else "None", type(x).__name__)
        if x is not None:
            _check_list(op, name, x, shape, query)
    if plan.class_start is not None:
        classes = plan.class_start.shape[1] - 1
        if classes < 1:
            fail(op, "plan.class_start", "shape (rows, classes + 1)", tuple(plan.class_start.shape))
    if plan.block_size is not None:
        classes = -(-tokens // plan.block_size[0])
    for name, lists in (("key_index", plan.key_index), ("key_count", plan.key_count)):
        if len(lists) != len(keys):
            fail(op, f"plan.{name}", f"{len(keys)} entries", len(lists))
    for i, (index, count, mask, groups, blocks) in enumerate(
        zip(plan.key_index, plan.key_count, plan.key_masks, plan.key_groups, block_masks)
    ):
        given = [x for x in (mask, groups, blocks) if x is not None]
        rows = max((x.shape[0] for x in given), default=1)
        entries = -(-keys[i] // keys_of_entry(plan, i))
        lists_of_source: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
            (f"key_index[{i}]", index, (classes, rows, heads, entries)),
            (f"key_count[{i}]", count, (classes, rows, heads)),
        )
        for name, x, sizes in lists_of_source:
            if (x is not None) != bool(given):
                fail(op, f"plan.{name}", "a tensor" if given else "None", type(x).__name__)
            if x is not None:
                _check_list(op, name, x, sizes, query)


def keys_of_entry(plan: AttentionPlan, i: int) -> int:
    """How many keys an entry of key_index[i] stands for."""
    if plan.block_masks is None or plan.block_size is None or plan.block_masks[i] is None:
        return 1
    return plan.block_size[1] if plan.key_masks[i] is None else 1


def _check_list(op: str, name: str, x: object, shape: tuple[int | None, ...], query: Tensor) -> None:
    """int32 of a shape, whose dimensions before the last may be 1; None: any size."""
    check_dense(op, f"plan.{name}", x)
    assert isinstance(x, Tensor)
    sizes = tuple(x.shape)
    fits = len(sizes) == len(shape) and all(
        wanted is None or size == wanted or (size == 1 and (d < len(shape) - 1 or len(shape) in (2, 3)))
        for d, (size, wanted) in enumerate(zip(sizes, shape))
    )
    if not fits:
        fail(op, f"plan.{name}", f"shape {shape}", sizes, "build the plan anew")
    if x.dtype != torch.int32:
        fail(op, f"plan.{name}", "torch.int32", x.dtype, error=TypeError)
    if x.device != query.device:
        fail(op, f"plan.{name}", str(query.device), x.device)
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        fail(op, f"plan.{name}", "a contiguous last dimension", f"stride {x.stride(-1)}")


def check_masks(
    op: str,
    key_masks: Sequence[Tensor | None],
    key_groups: Sequence[Tensor | None],
    query_groups: Tensor | None,
) -> None:
    """Check dtype and number of dimensions of masks and groups."""
    for i, (mask, groups) in enumerate(zip(key_masks, key_groups)):
        for name, x in (("key_mask", mask), ("key_groups", groups)):
            if x is not None and not isinstance(x, Tensor):
                fail(op, f"{name}[{i}]", "a tensor or None", type(x).__name__, error=TypeError)
            if x is not None and not torch.compiler.is_compiling():
                check_dense(op, f"{name}[{i}]", x)
        if mask is not None and mask.dtype != torch.bool:
            fail(op, f"key_mask[{i}]", "torch.bool", mask.dtype, "soft masks go to key_bias as log-weights", TypeError)
        if groups is not None and groups.dtype != torch.uint8:
            fail(op, f"key_groups[{i}]", "torch.uint8", groups.dtype, error=TypeError)
        for name, x in (("key_mask", mask), ("key_groups", groups)):
            if x is not None and x.dim() != 2:
                fail(op, f"{name}[{i}]", "shape (rows or 1, keys)", tuple(x.shape))
        if mask is not None and groups is not None:
            (rows, keys), (others, other_keys) = mask.shape, groups.shape
            if other_keys != keys or (others != rows and others != 1 and rows != 1):
                fail(op, f"key_groups[{i}]", f"shape ({rows} or 1, {keys}) as key_mask[{i}]", tuple(groups.shape))
            if groups.device != mask.device:
                fail(op, f"key_groups[{i}]", str(mask.device), groups.device)
        if groups is not None and query_groups is None:
            fail(op, "query_groups", f"a tensor, since key_groups[{i}] is given", None)
    if query_groups is not None:
        if not torch.compiler.is_compiling():
            check_dense(op, "query_groups", query_groups)
        if query_groups.dtype != torch.uint8:
            fail(op, "query_groups", "torch.uint8", query_groups.dtype, error=TypeError)
        if query_groups.dim() != 2:
            fail(op, "query_groups", "shape (batch or 1, queries)", tuple(query_groups.shape))


def check_block_masks(
    op: str,
    block_masks: Sequence[Tensor | None],
    sizes: Sequence[tuple[int, int]],
    key_masks: Sequence[Tensor | None],
    key_groups: Sequence[Tensor | None],
    query_groups: Tensor | None,
) -> None:
    """Check block masks, of which one at least is not None, and what goes with them."""
    given = [i for i, x in enumerate(block_masks) if x is not None]
    first = given[0]
    for i in given:
        blocks, mask = block_masks[i], key_masks[i]
        if not isinstance(blocks, Tensor):
            fail(op, f"block_mask[{i}]", "a tensor or None", type(blocks).__name__, error=TypeError)
        if not torch.compiler.is_compiling():
            check_dense(op, f"block_mask[{i}]", blocks)
        if blocks.dtype != torch.bool:
            fail(op, f"block_mask[{i}]", "torch.bool", blocks.dtype, error=TypeError)
        if blocks.dim() != 4:
            fail(op, f"block_mask[{i}]", "shape (rows or 1, heads or 1, query blocks, key blocks)", tuple(blocks.shape))
        size = check_pair(op, f"block_size[{i}]", sizes[i], 1, "numbers of queries and of keys, from 1 on")
        if size[1] & (size[1] - 1) or size[1] > MAX_KEY_BLOCK:
            hint = "repeat the mask's columns for smaller blocks"
            fail(op, f"block_size[{i}]", f"a power of two up to {MAX_KEY_BLOCK} for the keys", size[1], hint)
        if tuple(sizes[i]) != tuple(sizes[first]):
            fail(op, f"block_size[{i}]", f"{tuple(sizes[first])} as block_size[{first}]", tuple(sizes[i]))
        of_first = block_masks[first]
        assert of_first is not None
        if blocks.shape[2] != of_first.shape[2]:
            fail(op, f"block_mask[{i}]", f"{of_first.shape[2]} query blocks as block_mask[{first}]", blocks.shape[2])
        if mask is not None:
            if not one_of(mask.shape[0], 1, blocks.shape[0]) and blocks.shape[0] != 1:
                fail(op, f"block_mask[{i}]", f"{mask.shape[0]} rows or 1, as key_mask[{i}]", blocks.shape[0])
            count = -(-mask.shape[1] // size[1])
            if count != blocks.shape[3]:
                fail(op, f"block_mask[{i}]", f"{count} key blocks, as key_mask[{i}] has", blocks.shape[3])
            if mask.device != blocks.device:
                fail(op, f"block_mask[{i}]", str(mask.device), blocks.device)
        if key_groups[i] is not None:
            fail(op, f"key_groups[{i}]", f"None beside block_mask[{i}]", "a tensor", _BLOCKS_OR_GROUPS)
    if query_groups is not None:
        fail(op, "query_groups", f"None beside block_mask[{first}]", "a tensor", _BLOCKS_OR_GROUPS)


_BLOCKS_OR_GROUPS = "a query's class is its block or its group byte: express the groups as blocks"
