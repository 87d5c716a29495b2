"""What the CUDA C++ kernel for Hopper takes, and the calls that go to it as they are.

Most of a call's time on the host is Python, which checks tensors one attribute at a time and lays them out in lists. A
call whose tensors need no change goes to an op that does both in C++ (bindings/attention_sm90.h). What that op does not
take comes back, to be cast, laid out or refused in Python.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ..runtime import ops
from ..runtime.schemas import MAX_SOURCES
from ..source import Source
from .plan import AttentionPlan, as_made, changed_mask

_PLAIN = frozenset((Tensor, Parameter))
_NONE = (None,) * MAX_SOURCES
_DTYPES = (torch.bfloat16, torch.float16)

# Which optional tensors the op is given: bits of a source, then bits of the call
_ROWS, _LISTS, _VALUE_INDEX, _KEY_BIAS, _LOGIT_SCALE, _LOGIT_BIAS = 1, 2 + 4, 8, 16, 32, 64
_KEY_SCALE, _VALUE_SCALE = 128, 256
_GROUP = 9
"""From this bit on, the number of a source's softmax group."""
_ORDER, _FIRST_WEIGHT = 1, 2


@torch.compiler.assume_constant_result
def is_hopper(index: int) -> bool:
    """Whether the CUDA device of this number has compute capability 9.0, for which the kernel is compiled."""
    return _capability(index) == (9, 0)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def lacks(query: Tensor, sources: Sequence[Source], gradients: bool, on_hopper: bool) -> list[str]:
    """What the kernel lacks of a call that has passed the checks, in words for an error."""
    reasons = []
    if not on_hopper:
        reasons.append("devices other than compute capability 9.0")
    if gradients:
        reasons.append("gradients")
    if query.dtype not in _DTYPES:
        reasons.append(str(query.dtype).removeprefix("torch."))
    if query.shape[-1] % 8:
        reasons.append(f"head_dim {query.shape[-1]}, which is no multiple of 8")
    tensors = {"query": query}
    for i, source in enumerate(sources):
        tensors |= {f"key[{i}]": source.key, f"value[{i}]": source.value}
        reasons += [f"{name}[{i}]" for name in ("key_range", "block_mask") if getattr(source, name) is not None]
        if source.value.shape[3] != query.shape[3]:
            reasons.append(f"value[{i}] whose head_dim is not that of the keys")
    for name, x in tensors.items():
        if not _aligned(x):
            reasons.append(f"{name} whose rows do not start at multiples of {8 * x.element_size()} bytes")
    return reasons


def _aligned(x: Tensor) -> bool:
    """Whether rows start at multiples of eight numbers. Of a traced tensor only the strides are known; where it starts
    elsewhere, the op copies it."""
    if x.numel() == 0:
        return True
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
    if any(stride % 8 for stride in strides):
        return False
    return torch.compiler.is_compiling() or x.data_ptr() % (8 * x.element_size()) == 0


def op_for(query: object) -> Callable[..., list[Tensor]] | None:
    """The op that takes whole calls, where the query is on a Hopper card and the op is built."""
    if torch.compiler.is_compiling():  # the public call is traced as it is written in Python
        return None
    if query.__class__ is not Tensor or not query.is_cuda:  # type: ignore[attr-defined]
        return None
    if ops.cuda_extension_error is not None or not is_hopper(query.get_device()):  # type: ignore[attr-defined]
        return None
    return ops.attention_flat_cuda


def direct_call(
    op: Callable[..., list[Tensor]],
    query: Tensor,
    sources: Sequence[Source],
    query_groups: Tensor | None,
    scale: float | None,
    return_lse: bool,
    plan: AttentionPlan | None,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """The result of multi_source_attention, of a call that `op` takes as it is.

    None for all others: gradients, autocast and other modes, masks without a plan, tables in other dtypes, numbers
    instead of tensors as strengths, and whatever is wrong, so that the checks in Python can say what it is.
    """
    if query.dtype not in _DTYPES or query.dim() != 4 or sources.__class__ not in (list, tuple):
        return None
    if return_lse.__class__ is not bool or scale.__class__ not in (float, type(None)):
        return None
    if _in_a_mode(query):
        return None
    packed = _pack(query, sources, query_groups, plan)
    if packed is None or not _PLAIN.issuperset(map(type, packed[0])):
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in packed[0]):
        return None
    results = op(*packed, query.shape[3] ** -0.5 if scale is None else scale, return_lse)
    if not results:
        return None
    return (results[0], results[1]) if return_lse else results[0]


def _in_a_mode(query: Tensor) -> bool:
    """Whether a dispatch mode, forward gradients, torch.func or autocast changes what a call does."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch.is_autocast_enabled(query.device.type)
    )


def _pack(
    query: Tensor, sources: Sequence[Source], query_groups: Tensor | None, plan: AttentionPlan | None
) -> tuple[list[Any], list[int]] | None:
    """(tensors, layout) as the op takes them; None where softmax groups are not in order, or where the plan must be
    built or does not go with the masks.

    One loop for everything: these lines are a third of what a call costs the host.
    """
    number = len(sources)
    masks: tuple[Tensor | None, ...] = _NONE[:number]
    groups = key_index = key_count = masks
    if plan is None:
        if query_groups is not None or number > MAX_SOURCES:
            return None
    else:
        if plan.__class__ is not AttentionPlan or not as_made(plan) or changed_mask(plan):
            return None
        masks, groups, of_queries, key_index, key_count = plan[:5]
        if of_queries is not query_groups or len(masks) != number:
            return None
    tensors: list[Any] = [query]
    layout, weights = [], []
    last, of_call = -1, 0
    for source, mask, bits_of_keys, index, count in zip(sources, masks, groups, key_index, key_count):
        if source.__class__ is not Source:
            return None
        (key, value, rows, key_mask, key_groups, bias, logit_scale, logit_bias, value_index, group, weight, key_scale,
         value_scale, key_range, block_mask, _) = source  # fmt: skip
        if key_mask is not mask or key_groups is not bits_of_keys:
            return None
        if key_range is not None or block_mask is not None:
            return None
        tensors += (key, value)
        bits = 0
        if rows is not None:
            bits = _ROWS
            tensors.append(rows)
        if index is not None:
            bits |= _LISTS
            tensors += (index, count)
        if value_index is not None:
            bits |= _VALUE_INDEX
            tensors.append(value_index)
        if bias is not None:
            bits |= _KEY_BIAS
            tensors.append(bias)
        if logit_scale is not None:
            bits |= _LOGIT_SCALE
            tensors.append(logit_scale)
        if logit_bias is not None:
            bits |= _LOGIT_BIAS
            tensors.append(logit_bias)
        if key_scale is not None:
            bits |= _KEY_SCALE
            tensors.append(key_scale)
        if value_scale is not None:
            bits |= _VALUE_SCALE
            tensors.append(value_scale)
        if group != last:
            if group.__class__ is not int or group != last + 1:
                return None
            last = group
            if weight is not None:
                of_call |= _FIRST_WEIGHT << group
                weights.append(weight)
        elif weight is not None:
            return None
        layout.append(bits | group << _GROUP)
    if plan is not None and plan.query_order is not None:
        of_call |= _ORDER
        tensors += (plan.query_order, plan.class_start)
    tensors += weights
    layout.append(of_call)
    return tensors, layout
