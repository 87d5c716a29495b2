"""What a bank's file holds, and the checks of a file that is loaded."""

import json
from collections.abc import Callable, Mapping
from os import PathLike

import torch
from torch import Tensor

from ...runtime.checks import fail
from ...runtime.platform import KERNEL_DTYPES
from .bank_values import MAX_TIMESTEP


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


def check_stored(path: str | PathLike, tensors: Mapping[str, Tensor], steps: int) -> None:
    """ValueError unless these are the keys and values of every step, of the same rows and dtype in all layers."""
    if not tensors:
        fail("ReferenceBank", "layers", f"keys and values of at least one layer in {path}", "none")
    first = next(iter(tensors.values()))
    rows = first.shape[2] if first.dim() == 6 else 1
    for name, x in tensors.items():
        if x.dim() != 6 or tuple(x.shape[:3]) != (steps, 2, rows) or x.numel() == 0:
            expected = f"({steps} steps, 2, {rows} rows, tokens, heads, head_dim) in {path}"
            fail("ReferenceBank", name, expected, tuple(x.shape))
        if x.dtype not in (*KERNEL_DTYPES, torch.float64) or x.dtype != first.dtype:
            expected = f"{first.dtype} as the other layers" if x.dtype != first.dtype else "a floating dtype"
            fail("ReferenceBank", name, f"{expected} in {path}", x.dtype)
        if not bool(x.isfinite().all()):
            fail("ReferenceBank", name, f"finite keys and values in {path}", "NaN or infinity")
