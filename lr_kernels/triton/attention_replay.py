"""Recorded calls of multi_source_attention: see replay.py."""

import torch
from torch import Tensor

from ..runtime.schemas import AttentionTables
from . import attention
from .launch import architecture, check_grid, on_device
from .replay import Recorder, record

recorder = Recorder()


class Call:
    """A call that may be recorded: what decides its launch, and its tensors (see `Recorder`)."""

    out: Tensor
    lse: Tensor | None = None

    def __init__(self, key: list, tensors: list[Tensor], value_dim: int, return_lse: bool) -> None:
        self.value_dim, self.return_lse = value_dim, return_lse
        self.pointers = pointers = [x.data_ptr() for x in tensors]
        # Which tensors are the same (a recorded launch finds a pointer at its first place), and whether Triton may take
        # every address for a multiple of 16
        key += map(pointers.index, pointers)
        key.append(any(p % 16 for p in pointers))
        self.key = tuple(key)
        self.recorded = recorder.get(self.key)
        """the launch of an earlier call that this one repeats"""

    def replay(self, query: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Run the recorded launch with the tensors of this call."""
        assert self.recorded is not None
        self.allocate(query)
        self.recorded.run(self.pointers, query.device)
        return self.result

    def run(self, query: Tensor, tables: AttentionTables) -> Tensor | tuple[Tensor, Tensor]:
        """Launch for the first time, and record it."""
        self.allocate(query)
        device, kernel = query.device, attention.multi_source_attention_forward_kernel
        if self.out.numel() == 0 or not any(k.shape[1] for k in tables.key):
            attention.multi_source_attention_triton(query, *tables, self.out, self.lse)
            return self.result
        arguments, constants, programs = attention.launch_arguments(
            query, tables, self.out, self.lse, architecture(device)
        )
        with on_device(device):
            compiled = kernel[check_grid("multi_source_attention", programs)](*arguments, **constants)
        launch = record(kernel, compiled, programs, arguments, constants, self.pointers)
        if launch is not None:
            recorder.add(self.key, launch)
        return self.result

    def allocate(self, query: Tensor) -> None:
        """Allocate the results."""
        self.out = query.new_empty(*query.shape[:3], self.value_dim)
        self.pointers.append(self.out.data_ptr())
        if self.return_lse:
            self.lse = query.new_empty(query.shape[:3], dtype=torch.float32)
            self.pointers.append(self.lse.data_ptr())

    @property
    def result(self) -> Tensor | tuple[Tensor, Tensor]:
        """The results: out, or (out, lse)."""
        return self.out if self.lse is None else (self.out, self.lse)
