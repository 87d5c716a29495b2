"""What a bank's file holds, and the checks of a file that is loaded."""

import json
import os
import uuid
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...runtime.checks import fail
from ...runtime.platform import KERNEL_DTYPES
from .bank_values import EIGHT_BITS, MAX_TIMESTEP, check_file


def _list_of(valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(valid(x) for x in value)


def _between(low: float, high: float) -> Callable[[object], bool]:
    return lambda x: isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high


FIELDS: dict[str, tuple[bool, Callable[[object], bool], str]] = {
    "timesteps": (False, _list_of(_between(0, MAX_TIMESTEP)), "a list of timesteps"),
    "signals": (True, _list_of(_between(0, 1)), "a list of numbers from 0 to 1"),
    "shows": (True, _list_of(lambda x: type(x) is int and x >= 0), "a list of subjects' numbers"),
    "words": (True, _list_of(_list_of(lambda x: isinstance(x, str))), "a list of each subject's words"),
}
"""The fields of a bank's file beside its tensors, in JSON: whether a field may be null or missing, its check, and what
it has to be in words."""
_TRIES = 100
SCALE = ".scale"
"""Ends the name of the tensor with a layer's scales, which keys and values in 8 bits have: fp32 (steps, 2, rows,
tokens, heads)."""


def open_file(op: str, path: str | PathLike) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file; on the CPU tensors are the file's pages, mapped.

    Raises:
        ValueError: no safetensors file. FileNotFoundError: no such file.
    """
    check_file(op, path)
    for _ in range(_TRIES):
        before = _identity(path)
        try:
            with safe_open(path, "pt") as file:
                found = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, RuntimeError) as error:
            if _identity(path) == before:
                fail(op, "path", "a safetensors file", f"{path}: {error}")
            continue
        # safetensors opens the file twice, for its header and for its pages: both must have been this one
        if _identity(path) == before:
            return found
    fail(op, "path", "a file that stays as it is while it is opened", f"{path}, which was replaced {_TRIES} times")


def write_file(path: str | PathLike, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all. Processes that have mapped an earlier file keep its pages."""
    partial = Path(f"{path}.{uuid.uuid4().hex}.partial")  # others may save to the same path
    try:
        save_file(tensors, partial, about)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _identity(path: str | PathLike) -> tuple[int, ...]:
    """What is another one once the file has been replaced or written to."""
    about = os.stat(path)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def read_field(path: str | PathLike, about: Mapping[str, str], name: str) -> list | None:
    """A field of the file's metadata. ValueError where it is not what FIELDS says."""
    optional, valid, expected = FIELDS[name]
    text = about.get(name, "null")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if not (valid(value) or (optional and value is None)):
        got = "nothing" if name not in about else text if len(text) < 80 else text[:80] + "…"
        fail("ReferenceBank", name, f"{expected} in {path}", got, "load a file that save() wrote")
    return value


def stored_layers(path: str | PathLike, tensors: Mapping[str, Tensor], steps: int) -> dict[str, tuple[Tensor, ...]]:
    """The keys and values of every layer, and in 8 bits their scales, of a file's tensors. ValueError unless all layers
    have the same rows and dtype at every step."""
    layers = {name: x for name, x in tensors.items() if not name.endswith(SCALE)}
    if not layers:
        fail("ReferenceBank", "layers", f"keys and values of at least one layer in {path}", "none")
    first = next(iter(layers.values()))
    rows = first.shape[2] if first.dim() == 6 else 1
    for name, x in layers.items():
        if x.dim() != 6 or tuple(x.shape[:3]) != (steps, 2, rows) or x.numel() == 0:
            expected = f"({steps} steps, 2, {rows} rows, tokens, heads, head_dim) in {path}"
            fail("ReferenceBank", name, expected, tuple(x.shape))
        if x.dtype not in (*KERNEL_DTYPES, torch.float64, *EIGHT_BITS) or x.dtype != first.dtype:
            expected = f"{first.dtype} as the other layers" if x.dtype != first.dtype else "a floating dtype, or 8 bits"
            fail("ReferenceBank", name, f"{expected} in {path}", x.dtype)
        if not is_finite(x):
            fail("ReferenceBank", name, f"finite keys and values in {path}", "NaN or infinity")
    for name in sorted(tensors.keys() - layers.keys()):
        if (layer := name.removesuffix(SCALE)) not in layers:
            fail("ReferenceBank", name, f"keys and values {layer} beside it in {path}", "none")
        if first.dtype not in EIGHT_BITS:
            fail("ReferenceBank", name, f"none, since keys and values are {first.dtype} in {path}", "a tensor")
    if first.dtype not in EIGHT_BITS:
        return {name: (x,) for name, x in layers.items()}
    return {name: (x, _checked_scale(path, name + SCALE, tensors.get(name + SCALE), x)) for name, x in layers.items()}


def _checked_scale(path: str | PathLike, name: str, scale: Tensor | None, of: Tensor) -> Tensor:
    """The scales of 8-bit keys and values. ValueError unless they fit them."""
    expected = f"torch.float32 {tuple(of.shape[:5])} in {path}, since keys and values are {of.dtype}"
    if scale is None:
        fail("ReferenceBank", name, expected, "none")
    if scale.dtype != torch.float32 or scale.shape != of.shape[:5]:
        fail("ReferenceBank", name, expected, f"{scale.dtype} {tuple(scale.shape)}")
    if not are_scales(scale):
        fail("ReferenceBank", name, f"finite scales of 0 or more in {path}", "others")
    return scale


def are_scales(x: Tensor) -> bool:
    """Whether all numbers are finite, and 0 or more."""
    return bool((x.isfinite() & (x >= 0)).all())


def is_finite(x: Tensor) -> bool:
    """Whether all numbers (n, …) are, a part at a time: a mapped file may be larger than the memory."""
    return x.dtype == torch.int8 or all(_part_is_finite(part) for row in x for part in row.split(4096))


def _part_is_finite(x: Tensor) -> bool:
    if x.dtype == torch.float8_e4m3fn:  # has no infinities, and torch does not look for its NaN, the bytes 7f and ff
        return not bool(((x.view(torch.uint8) & 0x7F) == 0x7F).any())
    return bool(x.isfinite().all())
