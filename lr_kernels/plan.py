"""AttentionPlan: which keys each class of queries reads, built once per mask and reused by layers, heads and steps.

Queries with the same group byte form a class. The kernels walk the queries class by class, and for each class only the
keys it sees, so the work follows the visible share. Everything is built on the masks' device.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .checks import fail


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
        ValueError: lists of different lengths; key_groups without query_groups.
        TypeError: a mask that is not bool, groups that are not uint8.
    """
    key_groups = [None] * len(key_masks) if key_groups is None else key_groups
    if len(key_groups) != len(key_masks):
        fail("plan_attention", "key_groups", f"{len(key_masks)} entries", len(key_groups))
    check_masks("plan_attention", key_masks, key_groups, query_groups)
    if backends.transforms_active():
        tables = {f"key_mask[{i}]": x for i, x in enumerate(key_masks)}
        tables |= {f"key_groups[{i}]": x for i, x in enumerate(key_groups)}
        backends.refuse_vmap("plan_attention", {**tables, "query_groups": query_groups})
    query_order = class_start = None
    classes: Sequence[int] = ()
    if query_groups is not None:
        classes = query_groups.unique().tolist() if query_classes is None else query_classes
        classes = sorted({int(c) if isinstance(c, Integral) else c for c in classes})
        for c in classes:
            if not isinstance(c, int) or not 0 <= c <= 255:
                fail("plan_attention", "query_classes", "integers from 0 to 255", c)
        classes = classes or [0]  # no queries at all
        query_order, class_start = _order_queries(query_groups, classes)
    lists = [visible_lists(mask, groups, classes) for mask, groups in zip(key_masks, key_groups)]
    return AttentionPlan(
        tuple(key_masks),
        tuple(key_groups),
        query_groups,
        tuple(index for index, _ in lists),
        tuple(count for _, count in lists),
        query_order,
        class_start,
    )


def check_masks(
    op: str,
    key_masks: Sequence[Tensor | None],
    key_groups: Sequence[Tensor | None],
    query_groups: Tensor | None,
) -> None:
    """The dtype and rank rules of masks and groups."""
    for i, (mask, groups) in enumerate(zip(key_masks, key_groups)):
        for name, x in (("key_mask", mask), ("key_groups", groups)):
            if x is not None and not isinstance(x, Tensor):
                fail(op, f"{name}[{i}]", "a tensor or None", type(x).__name__, error=TypeError)
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
    backend = backends.choose("compact_keys", "auto", given.device, torch.float32) if given.is_cuda else "reference"
    if backend != "reference":
        return _compact(mask, groups, [0] if groups is None else list(classes), given, backend)
    if groups is None:
        assert mask is not None
        visible = mask[None]
    else:
        visible = torch.stack([(groups & c) != 0 for c in classes])
        visible = visible if mask is None else visible & mask
    keys = visible.shape[-1]
    place = torch.where(visible, visible.cumsum(-1) - 1, keys)  # hidden keys all land in one spare slot, cut off below
    index = torch.zeros(*visible.shape[:-1], keys + 1, dtype=torch.int32, device=visible.device)
    index.scatter_(-1, place, torch.arange(keys, dtype=torch.int32, device=visible.device).expand_as(place))
    return index[..., :keys], visible.sum(-1, dtype=torch.int32)


def _compact(
    mask: Tensor | None, groups: Tensor | None, classes: list[int], given: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """The same in one launch, or one per class. `given`: either of the two."""
    (rows, keys), device = given.shape, given.device
    if mask is not None and groups is not None:
        rows = max(mask.shape[0], groups.shape[0])
    index = torch.empty(len(classes), rows, keys, dtype=torch.int32, device=device)
    count = torch.empty(len(classes), rows, dtype=torch.int32, device=device)
    if backend == "triton":
        from . import triton  # noqa: F401  (registers the Triton implementations)
    op = getattr(torch.ops.lr_kernels, f"compact_keys_{backend}")
    op(*(x if x is None or x.stride(1) == 1 else x.contiguous() for x in (mask, groups)), classes, index, count)
    return index, count
