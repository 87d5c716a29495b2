"""AttentionPlan: which keys each class of queries reads, built once per mask and reused by layers, heads and steps.

Queries with the same group byte form a class. The kernels walk the queries class by class, and for each class only the
keys it sees, so the work follows the visible share. Everything is built on the masks' device.
"""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime import backends, modes
from ..runtime.checks import check_memory, check_sequence, fail
from ..runtime.ops import kernel
from ..runtime.tensors import check_dense, resolved_or_none, true_places


class _Kept:
    """One mask at the time when the plan was built. The alias keeps the memory alive, so that no other mask gets the
    address."""

    def __init__(self, mask: Tensor) -> None:
        self.alias = mask.detach()
        self.address = mask.data_ptr()
        self.shape = mask.shape
        self.version = None if mask.is_inference() else mask._version  # inference tensors do not count changes

    def is_as_before(self, mask: Tensor) -> bool:
        return (
            (self.version is None or mask._version == self.version)
            and mask.data_ptr() == self.address
            and mask.shape == self.shape
        )


class PlanStamp:
    """The masks and lists of a plan as `plan_attention` made it, to see later whether either has changed. A copy of a
    plan (copy, pickle) holds other masks and has no stamp."""

    def __init__(self, masks: Sequence[tuple[str, Tensor]], parts: tuple) -> None:
        self.masks = [(name, mask, _Kept(mask)) for name, mask in masks]
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
    """int32 (C or 1, R or 1, M): the visible keys of a class and source row, ascending; None: all keys."""
    key_count: tuple[Tensor | None, ...]
    """int32 (C or 1, R or 1): how many of them."""
    query_order: Tensor | None
    """int32 (B or 1, N): the queries, class by class; None: one class."""
    class_start: Tensor | None
    """int32 (B or 1, C + 1): where each class starts in query_order."""
    stamp: PlanStamp | None = None
    """How the masks were when the plan was built. None: not known, as in a traced plan."""


def plan_attention(
    key_masks: Sequence[Tensor | None],
    key_groups: Sequence[Tensor | None] | None = None,
    query_groups: Tensor | None = None,
    *,
    query_classes: Sequence[int] | None = None,
) -> AttentionPlan:
    """Build the plan of `multi_source_attention` for sources with these masks.

    Args:
        key_masks: one bool (R or 1, M) or None per source.
        key_groups: one uint8 (R or 1, M) or None per source; None: no source has groups.
        query_groups: uint8 (B or 1, N) or None.
        query_classes: the bytes that occur in query_groups. Default: found by looking, which synchronizes with a GPU
            and cannot be traced by torch.compile; name them where that matters. A byte that is not named is an error,
            raised on the device.

    Raises:
        ValueError: lists of different lengths; key_groups without query_groups; lists beyond the memory.
        TypeError: a mask that is not bool, groups that are not uint8.

    The plan is of the masks as they are now. A call refuses it once one of them was changed in place (a view shares the
    count of changes of its base), or was given other data. Changes that PyTorch does not count are not seen: of
    inference tensors, through `.data`, and of a NumPy array that shares the memory; build the plan anew after them.
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
    check_masks("plan_attention", key_masks, key_groups, query_groups)
    if modes.transforms_active():
        modes.refuse_vmap("plan_attention", dict(_named(key_masks, key_groups, query_groups)))
    return build_plan(key_masks, key_groups, query_groups, query_classes)


def _named(
    key_masks: Sequence[Tensor | None], key_groups: Sequence[Tensor | None], query_groups: Tensor | None
) -> list[tuple[str, Tensor]]:
    """The masks that are not None, each with the name of its argument."""
    named = [
        *((f"key_mask[{i}]", x) for i, x in enumerate(key_masks)),
        *((f"key_groups[{i}]", x) for i, x in enumerate(key_groups)),
        ("query_groups", query_groups),
    ]
    return [(name, x) for name, x in named if x is not None]


def build_plan(
    key_masks: Sequence[Tensor | None],
    key_groups: Sequence[Tensor | None],
    query_groups: Tensor | None,
    query_classes: Iterable[int] | None = None,
) -> AttentionPlan:
    """`plan_attention` without its checks, for masks that are known to fit."""
    masks = _named(key_masks, key_groups, query_groups)
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
        query_order, class_start = _order_queries(query_groups, classes)
    else:
        _check_list_memory(masks, None, 1)
    lists = [visible_lists(mask, groups, classes) for mask, groups in zip(key_masks, key_groups)]
    index, count = tuple(index for index, _ in lists), tuple(count for _, count in lists)
    made = (tuple(key_masks), tuple(key_groups), query_groups, index, count, query_order, class_start)
    stamp = (
        PlanStamp(masks, made) if not torch.compiler.is_compiling() and all(_has_memory(x) for _, x in masks) else None
    )
    return AttentionPlan(*made, stamp)


def _has_memory(x: Tensor) -> bool:
    """Whether x is a tensor of its own: not fake, not of a subclass, not inside a transform of torch.func."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)


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
    masks, groups, queries, index, count, order, start = plan.stamp.parts
    return (
        plan.key_masks is masks
        and plan.key_groups is groups
        and plan.query_groups is queries
        and plan.key_index is index
        and plan.key_count is count
        and plan.query_order is order
        and plan.class_start is start
    )


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
    batch, tokens = query.shape[:2]
    classes = 1
    grouped = plan.query_groups is not None
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
    for name, lists in (("key_index", plan.key_index), ("key_count", plan.key_count)):
        if len(lists) != len(keys):
            fail(op, f"plan.{name}", f"{len(keys)} entries", len(lists))
    for i, (index, count, mask, groups) in enumerate(
        zip(plan.key_index, plan.key_count, plan.key_masks, plan.key_groups)
    ):
        given = [x for x in (mask, groups) if x is not None]
        rows = max((x.shape[0] for x in given), default=1)
        lists_of_source: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
            (f"key_index[{i}]", index, (classes, rows, keys[i])),
            (f"key_count[{i}]", count, (classes, rows)),
        )
        for name, x, sizes in lists_of_source:
            if (x is not None) != bool(given):
                fail(op, f"plan.{name}", "a tensor" if given else "None", type(x).__name__)
            if x is not None:
                _check_list(op, name, x, sizes, query)


def _check_list(op: str, name: str, x: object, shape: tuple[int | None, ...], query: Tensor) -> None:
    """int32 of a shape, whose dimensions before the last may be 1; None: any size."""
    check_dense(op, f"plan.{name}", x)
    assert isinstance(x, Tensor)
    sizes = tuple(x.shape)
    fits = len(sizes) == len(shape) and all(
        wanted is None or size == wanted or (size == 1 and (d < len(shape) - 1 or len(shape) == 2))
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


def _order_queries(query_groups: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """query_order (B or 1, N) and class_start (B or 1, C + 1), both int32."""
    member = torch.stack([query_groups == c for c in classes], -1)  # (B, N, C); a tensor of classes would be a copy
    torch._assert_async(
        member.any(-1).all(), "lr_kernels.plan_attention: query_classes: a byte of query_groups is missing"
    )
    order = member.int().argmax(-1).argsort(dim=1, stable=True)
    start = torch.nn.functional.pad(member.sum(1), (1, 0)).cumsum(1)
    return order.int(), start.int()


def visible_lists(
    mask: Tensor | None, groups: Tensor | None, classes: Sequence[int]
) -> tuple[Tensor | None, Tensor | None]:
    """key_index (C or 1, R or 1, M) and key_count (C or 1, R or 1) of one source; None where all keys are seen."""
    given = groups if mask is None else mask
    if given is None:
        return None, None
    mask = resolved_or_none("plan_attention", "key_masks", mask)
    groups = resolved_or_none("plan_attention", "key_groups", groups)
    backend = backends.choose("compact_keys", "auto", given.device, torch.float32) if given.is_cuda else "reference"
    if backend != "reference":
        return _compact(mask, groups, [0] if groups is None else list(classes), given, backend)
    if groups is None:
        assert mask is not None
        visible = mask[None]
    else:
        visible = torch.stack([(groups & c) != 0 for c in classes])
        visible = visible if mask is None else visible & mask
    return true_places(visible)


def _compact(
    mask: Tensor | None, groups: Tensor | None, classes: list[int], given: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """The same in one launch, or one per class. `given`: either of the two."""
    (rows, keys), device = given.shape, given.device
    if mask is not None and groups is not None:
        rows = max(mask.shape[0], groups.shape[0])
    index = torch.empty(len(classes), rows, keys, dtype=torch.int32, device=device)
    count = torch.empty(len(classes), rows, dtype=torch.int32, device=device)
    dense = (x if x is None or x.stride(1) == 1 else x.contiguous() for x in (mask, groups))
    kernel("compact_keys", backend)(*dense, classes, index, count)
    return index, count
