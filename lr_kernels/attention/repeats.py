"""Which calls of multi_source_attention may be recorded, and the key under which an equal call is found again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ..runtime.platform import tf32_allowed
from ..runtime.tensors import is_plain
from ..source import Source
from .plan import AttentionPlan, as_made, changed_mask

_PLAIN = (Tensor, Parameter)


def signature(
    query: Tensor, sources: Sequence[Source], query_groups: Tensor | None, scale: float | None, return_lse: bool,
    plan: AttentionPlan | None,
) -> tuple[list, list[Tensor], int] | None:  # fmt: skip
    """The parts of a call that decide how it is launched, as a dictionary's key, the tensors it is launched with, and
    the head_dim of its result.

    None for a call that must be checked and laid out anew: gradients, masks without a plan, a plan for other masks (the
    checks say what is wrong), numbers instead of tensors as strengths, tensors of a subclass, a dispatch mode.
    """
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
        return None
    if type(scale) not in (float, int, type(None)):
        return None
    key: list = [scale, return_lse]
    if query.dtype == torch.float32:
        key.append(tf32_allowed())  # it may change between calls
    tensors = [query]
    if plan is None:
        if query_groups is not None:
            return None
        key.append(None)
    else:
        if plan.__class__ is not AttentionPlan or not (plan.stamp is None or as_made(plan)):
            return None
        if plan.query_groups is not query_groups or len(plan.key_masks) != len(sources) or changed_mask(plan):
            return None
        if plan.block_masks is not None and len(plan.block_masks) != len(sources):
            return None
        key.append(plan.block_size)
        for x in (*plan.key_index, *plan.key_count, plan.query_order, plan.class_start):
            key.append(x is None)
            if x is not None:
                tensors.append(x)
    for i, source in enumerate(sources):
        if source.__class__ is not Source:
            return None
        mask, groups = (None, None) if plan is None else (plan.key_masks[i], plan.key_groups[i])
        if source.key_mask is not mask or source.key_groups is not groups:
            return None
        blocks, size = None, None
        if plan is not None and plan.block_masks is not None:
            blocks, size = plan.block_masks[i], plan.block_size
        if source.block_mask is not blocks or (blocks is not None and source.block_size != size):
            return None
        tensors.append(source.key)
        tensors.append(source.value)
        given: tuple[Any, ...] = (
            source.rows, source.key_bias, source.logit_scale, source.logit_bias, source.value_index, source.weight,
            source.key_scale, source.value_scale, source.key_range,
        )  # fmt: skip
        for x in given:
            key.append(x is None)
            if x is not None:
                tensors.append(x)
        if type(source.softmax_group) is not int:
            return None
        key.append(source.softmax_group)
    gradients = torch.is_grad_enabled()
    for x in tensors:
        if x.__class__ not in _PLAIN or (gradients and x.requires_grad) or not is_plain(x):
            return None
        key += (x.shape, x.stride(), x.dtype, x.get_device())
    return key, tensors, sources[0].value.shape[-1]
