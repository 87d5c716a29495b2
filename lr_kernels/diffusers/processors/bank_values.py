"""Values that users give a bank, numbers, lists and arrays, as the tensors that it reads."""

import math
from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...runtime.checks import check_number, entries_of, fail, plain_number
from ...runtime.schemas import EIGHT_BIT_LARGEST

MAX_TIMESTEP = 1e6
EIGHT_BITS = tuple(EIGHT_BIT_LARGEST)
"""The dtypes of 8-bit keys and values, which have scales: see `lr_kernels.quantize`."""


def check_numbers(op: str, name: str, values: Sequence[float] | Tensor, high: float) -> list[float]:
    """The values as a list of numbers from 0 to `high`, at least one."""
    entries = entries_of(values)
    if not entries:
        fail(op, name, "a list of numbers, at least one", repr(values))
    return [check_number(op, name, x, f"numbers from 0 to {high:g}", 0, high) for x in entries]


def as_timestep(number: float) -> float:
    """A timestep as a bank keeps it: an int if it is whole, else a float."""
    value = float(number)
    return int(value) if value.is_integer() else value


def check_file(op: str, path: str | PathLike) -> None:
    """ValueError unless it can be the path of a file."""
    if not isinstance(path, str | PathLike):
        fail(op, "path", "the path of a file", type(path).__name__)
    if Path(path).is_dir():
        fail(op, "path", "a safetensors file", f"{path}: a folder")
    if Path(path).exists() and not Path(path).is_file():
        fail(op, "path", "a safetensors file", f"{path}: a device or pipe")


def check_device(op: str, device: str | torch.device, argument: str = "device") -> None:
    """ValueError unless tensors can be made there."""
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError, TypeError) as error:  # builds without CUDA raise AssertionError
        fail(op, argument, "a device of this machine", f"{device!r}: {str(error).splitlines()[0]}")


def as_table(op: str, rows: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """A table of rows as integers (B,) or (n, B)."""
    expected = "integers (B,) or (n, B), the bank's row that each row reads, -1: none"
    try:
        found = rows if isinstance(rows, Tensor) else torch.as_tensor(rows, device=device)
    except (TypeError, ValueError, RuntimeError):
        fail(op, "rows", expected, repr(rows))
    if found.dim() not in (1, 2) or found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        fail(op, "rows", expected, f"{found.dtype} {tuple(found.shape)}")
    return found if isinstance(rows, Tensor) else found.int()


def as_bias(op: str, strength: float | Tensor | Sequence[float], device: torch.device) -> Tensor:
    """A strength as a floating tensor (), (B,) or (n, B). An entry of -inf hides a reference."""
    expected = "a number, or floating (), (B,) or (n, B)"
    number = None if isinstance(strength, Tensor) else plain_number(strength)
    if number is not None and math.isnan(number):
        fail(op, "strength", expected, repr(strength))
    try:
        as_tensor = partial(torch.as_tensor, dtype=torch.float32, device=device)
        found = strength if isinstance(strength, Tensor) else as_tensor(strength)
    except (TypeError, ValueError, RuntimeError):
        fail(op, "strength", expected, repr(strength))
    if not found.is_floating_point() or found.dim() > 2:
        fail(op, "strength", expected, f"{found.dtype} {tuple(found.shape)}")
    return found


def as_foreground(op: str, mask: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """A mask as bool (1 or rows, height, width)."""
    expected = "bool (1 or rows, height, width)"
    found = torch.from_numpy(mask).to(device) if isinstance(mask, np.ndarray) and mask.dtype == bool else mask
    if not isinstance(found, Tensor):
        fail(op, "foreground", expected, f"{type(mask).__name__} {getattr(mask, 'dtype', '')}".strip())
    if found.dim() != 3 or found.dtype != torch.bool:
        fail(op, "foreground", expected, f"{found.dtype} {tuple(found.shape)}")
    return found
