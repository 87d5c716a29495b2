"""Recorded calls of multi_source_attention: see replay.py."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ..attention.plan import AttentionPlan, as_made, changed_mask
from ..runtime.schemas import AttentionTables
from ..runtime.tensors import is_plain
from ..source import Source
from . import attention
from .launch import INTERPRETED, architecture, check_grid, on_device
from .replay import Recorder, record
from .sources import dot_precision

_PLAIN = (Tensor, Parameter)
_recorder = Recorder()


class Call:
    """A call that may be recorded: the metadata that decides its launch, and its tensors."""

    out: Tensor
    lse: Tensor | None = None

    def __init__(self, key: list, tensors: list[Tensor], return_lse: bool) -> None:
        self.return_lse = return_lse
        self.pointers = pointers = [x.data_ptr() for x in tensors]
        # Which tensors are the same (a recorded launch finds a pointer at its first place), and whether Triton may take
        # every address for a multiple of 16
        key += map(pointers.index, pointers)
        key.append(any(p % 16 for p in pointers))
        self.key = tuple(key)

    def replay(self, query: Tensor) -> bool:
        """Whether a launch was recorded and has run."""
        launch = _recorder.get(self.key)
        if launch is None:
            return False
        self._allocate(query)
        launch.run(self.pointers, query.device)
        return True

    @property
    def result(self) -> Tensor | tuple[Tensor, Tensor]:
        return self.out if self.lse is None else (self.out, self.lse)

    def _allocate(self, query: Tensor) -> None:
        self.out = torch.empty_like(query, memory_format=torch.contiguous_format)
        self.pointers.append(self.out.data_ptr())
        if self.return_lse:
            self.lse = query.new_empty(query.shape[:3], dtype=torch.float32)
            self.pointers.append(self.lse.data_ptr())

    def run(self, query: Tensor, tables: AttentionTables) -> None:
        """Launch for the first time, and record it."""
        self._allocate(query)
        device, kernel = query.device, attention.multi_source_attention_forward_kernel
        if self.out.numel() == 0 or not any(k.shape[1] for k in tables.key):
            attention.multi_source_attention_triton(query, *tables, self.out, self.lse)
            return
        arguments, constants, programs = attention.launch_arguments(
            query, tables, self.out, self.lse, architecture(device)
        )
        with on_device(device):
            compiled = kernel[check_grid("multi_source_attention", programs)](*arguments, **constants)
        launch = record(kernel, compiled, programs, arguments, constants, self.pointers)
        if launch is not None:
            _recorder.add(self.key, launch)


def recordable(
    query: Tensor, sources: Sequence[Source], query_groups: Tensor | None, scale: float | None, return_lse: bool,
    plan: AttentionPlan | None,
) -> Call | None:  # fmt: skip
    """The call, or None where it must take the long way: gradients, masks without a plan, a plan for other masks (the
    checks say what is wrong), numbers instead of tensors as strengths, tensors of a subclass, a dispatch mode."""
    if INTERPRETED or torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
        return None
    if type(scale) not in (float, int, type(None)):
        return None
    key: list = [scale, return_lse]
    if query.dtype == torch.float32:
        key.append(dot_precision(query.dtype))  # PyTorch's setting for TF32 may change between calls
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
        tensors.append(source.key)
        tensors.append(source.value)
        for x in (
            source.rows,
            source.key_bias,
            source.logit_scale,
            source.logit_bias,
            source.value_index,
            source.weight,
        ):
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
    return Call(key, tensors, return_lse)
