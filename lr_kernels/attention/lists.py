"""The index lists of an AttentionPlan: the queries class by class, and for each class the keys that it sees."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime import backends
from ..runtime.ops import kernel
from ..runtime.tensors import resolved_or_none, true_places


def order_queries(query_groups: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
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


def block_lists(blocks: Tensor, mask: Tensor | None, key_block: int) -> tuple[Tensor, Tensor]:
    """key_index (C, R or 1, H or 1, ·) and key_count (C, R or 1, H or 1) of one source, whose classes are the blocks of
    queries. Their entries are blocks of keys; where there is a mask, keys.

    blocks: bool (R or 1, H or 1, C, key blocks), mask: bool (R or 1, M).
    """
    visible = blocks.movedim(2, 0)
    if mask is not None:
        keys = visible.repeat_interleave(key_block, -1)[..., : mask.shape[1]]
        visible = keys & mask[:, None]
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
