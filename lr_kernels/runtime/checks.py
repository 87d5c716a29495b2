"""Error messages of one form: ``lr_kernels.<op>: <argument>: expected …, got …; <hint>``."""

import math
import os
from collections.abc import Hashable, Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import NoReturn

import torch

from . import platform

_GIB = 2**30
FLOAT32_MAX = torch.finfo(torch.float32).max


def fail(
    op: str, argument: str, expected: str, got: object, hint: str = "", error: type[Exception] = ValueError
) -> NoReturn:
    """Raise `error` with the library's one message form."""
    raise error(f"lr_kernels.{op}: {argument}: expected {expected}, got {got}" + (f"; {hint}" if hint else ""))


def check_sequence(op: str, argument: str, value: object) -> None:
    """TypeError unless the value is a list, a tuple, a tensor or another sequence of items."""
    if not isinstance(value, Sequence | torch.Tensor) or isinstance(value, str):
        fail(op, argument, "a sequence", type(value).__name__, error=TypeError)


def entries_of(values: object) -> Sequence | None:
    """What a list, a tuple, an array or a tensor holds, as a sequence; None for anything else."""
    entries = values.tolist() if hasattr(values, "tolist") else values
    return entries if isinstance(entries, Sequence) and not isinstance(entries, str | bytes) else None


def check_choice(op: str, argument: str, value: object, allowed: Sequence[object]) -> None:
    """ValueError unless the value is one of those allowed."""
    if not isinstance(value, Hashable) or value not in allowed:  # an array is not compared as a whole
        fail(op, argument, "one of " + ", ".join(map(str, allowed)), repr(value))


def check_number(
    op: str,
    argument: str,
    value: object,
    expected: str = "a finite number",
    low: float = -math.inf,
    high: float = math.inf,
) -> float:
    """The value as a float. ValueError unless it is a finite real number, of any type that is one, from low to high."""
    number = plain_number(value)
    if number is None or not math.isfinite(number) or not low <= number <= high:
        fail(op, argument, expected, repr(value))
    return float(number)


def check_integer(
    op: str, argument: str, value: object, lowest: int, expected: str, highest: float = math.inf, hint: str = ""
) -> int:
    """The value as an int. ValueError unless it is an integer, of any type that is one, within the bounds."""
    number = plain_number(value)
    if not isinstance(number, int) or not lowest <= number <= highest:
        fail(op, argument, expected, repr(value), hint)
    return number


def check_pair(op: str, argument: str, value: object, lowest: int, expected: str) -> tuple[int, int]:
    """The value as two ints. ValueError unless it holds two integers, each at least the lowest."""
    pair = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    if len(pair) != 2:
        fail(op, argument, expected, repr(value))
    if torch.compiler.is_compiling():  # sizes may be symbolic
        return pair
    if not all(isinstance(x, Integral) and int(x) >= lowest for x in pair):
        fail(op, argument, expected, repr(value))
    return int(pair[0]), int(pair[1])


def plain_number(value: object) -> int | float | None:
    """A real number of Python, NumPy or a tensor without dimensions as an int or a float; None for anything else, also
    for truth values."""
    if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def one_of(size: int, *allowed: int) -> bool:
    """Whether the size is one of those allowed. (Under torch.compile `in` misses a symbolic size that is equal.)"""
    for x in allowed:
        if size == x:
            return True
    return False


def has_shape(x: torch.Tensor, *shapes: tuple[int, ...]) -> bool:
    """Whether x has one of these shapes, for symbolic sizes too: see `one_of`."""
    for shape in shapes:
        if x.dim() == len(shape) and x.shape == shape:
            return True
    return False


def check_entries(op: str, argument: str, table: torch.Tensor, low: int, high: int, expected: str = "") -> None:
    """ValueError where an index table on the CPU has an entry outside low … high; on a GPU, looking would synchronize.

    A compiled graph leaves it to the C++ op, or asserts it where an error of that would not reach Python.
    """
    if table.device.type != "cpu" or table.numel() == 0:
        return
    if not torch.compiler.is_compiling():
        if table.numel() >= _GIB // 16:  # looking at an expanded table copies it, and the kernels take a copy of int32
            check_memory(op, argument, (table.element_size() + 4) * table.numel(), table.device)
        lowest, highest = (int(x) for x in torch.aminmax(table))
        if lowest < low or highest > high:
            fail(op, argument, expected or f"{low} to {high}", f"{lowest} to {highest}")
    elif not platform.ERRORS_REACH_PYTHON:
        inside = ((table >= low) & (table <= high)).all()
        torch._assert_async(inside, f"lr_kernels.{op}: {argument}: expected {low} to {high}")


def check_memory(op: str, argument: str, needed: int, device: torch.device) -> None:
    """Refuse a request of more bytes than the device can ever hold, before anything is allocated."""
    if needed < _GIB or torch.compiler.is_compiling():
        return
    limit = memory_limit(device)
    if limit is not None and needed > limit:
        fail(
            op, argument, "a call that fits the memory",
            f"one that needs {needed / _GIB:.1f} GiB, limit {limit / _GIB:.1f}", "split the batch",
        )  # fmt: skip


def memory_limit(device: torch.device) -> int | None:
    """The device's memory in bytes, on the CPU within the limits of control group and process; None where not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    import resource  # not on Windows

    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    group = Path("/sys/fs/cgroup/memory.max")
    if group.exists() and (text := group.read_text().strip()).isdigit():
        limits.append(int(text))
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    return min(limits)
