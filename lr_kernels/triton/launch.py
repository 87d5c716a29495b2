"""What every launcher needs: architecture, device guard, grid limit, strides as kernel arguments, precision of fp32."""

import contextlib
import functools
from typing import overload

import torch
from torch import Tensor

from ..runtime.checks import fail
from ..runtime.platform import interpreted, tf32_allowed

GRID_LIMIT = 2**31 - 1
"""Programs along grid axis x. The other axes end at 65,535, so every kernel here uses x alone."""

INTERPRETED = interpreted()
"""Fixed when the kernels are decorated. The interpreter gets bf16 arithmetic wrong, so kernels upcast their loads."""


def architecture(device: torch.device) -> int:
    """Compute capability as major * 10 + minor; 0 in the interpreter."""
    return 0 if INTERPRETED else _architecture(device.index)


@functools.cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` current around a launch: Triton launches on the current device and its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def check_grid(op: str, programs: int) -> tuple[int]:
    """The grid of a launch of so many programs."""
    if programs > GRID_LIMIT:
        fail(op, "out", f"at most {GRID_LIMIT} tiles of work", programs, "split the batch")
    return (programs,)


@overload
def dense_last(x: Tensor) -> Tensor: ...


@overload
def dense_last(x: Tensor | None) -> Tensor | None: ...


def dense_last(x: Tensor | None) -> Tensor | None:
    """A small table whose last dimension is contiguous; a copy only where it is not."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor, *dims: int) -> tuple[int, ...]:
    """Strides of `dims`, 0 where the dimension has one entry: a table of one row is shared by all."""
    return tuple(x.stride(d) if x.shape[d] > 1 else 0 for d in dims)


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies fp32: exactly, unless PyTorch was told that TF32 is good enough."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"
