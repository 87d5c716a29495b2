"""The door to the kernels: `kernel(operator, backend)` is the torch op that runs an operator on a backend.

An operator is one entry of `schemas.SCHEMAS`, a backend one entry of `BACKENDS`. The C++ extension implements the ops
of "cpu", its CUDA part those of "cuda", `lr_kernels.triton` those of "triton".
"""

import ctypes
import importlib.util
import json
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .._ops import add_op_namespace_prefix, ops
from .installation import PACKAGE, why_not_built
from .platform import interpreted
from .schemas import OPERATORS_WITH_CUDA, SCHEMAS


class Backend(NamedTuple):
    """The kernels that are written in one language."""

    device_type: str
    """The device type of tensors for which "auto" takes this backend."""
    operators: Collection[str]
    """The operators that have a kernel of this backend."""
    unavailable: Callable[[str | None], str | None]
    """A function of a device type (None: any): why the backend cannot run here on such tensors, or None."""
    load: Callable[[], ModuleType] | None = None
    """Imports the module that registers the kernels; None where importing this package does."""


def _cuda_unavailable(device_type: str | None) -> str | None:
    if cuda_extension_error is not None:
        return cuda_extension_error
    return None if _has_cuda(device_type) else "needs a CUDA device"


def _triton_unavailable(device_type: str | None) -> str | None:
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if _has_cuda(device_type) or (interpreted() and device_type in (None, "cpu")):
        return None
    return "needs a CUDA device, or TRITON_INTERPRET=1 to interpret on cpu tensors"


def _cpu_unavailable(device_type: str | None) -> str | None:
    if extension_error is not None:
        return extension_error
    return "runs on cpu tensors only" if device_type not in (None, "cpu") else None


def _has_cuda(device_type: str | None) -> bool:
    return device_type == "cuda" or (device_type is None and torch.cuda.is_available())


def _load_triton() -> ModuleType:
    from .. import triton

    return triton


BACKENDS = {
    "cuda": Backend("cuda", OPERATORS_WITH_CUDA, _cuda_unavailable),
    "triton": Backend("cuda", SCHEMAS, _triton_unavailable, _load_triton),
    "cpu": Backend("cpu", SCHEMAS, _cpu_unavailable),
}
"""The backends with kernels, in the order in which "auto" tries them."""

_LOADERS = {name: about.load for name, about in BACKENDS.items() if about.load is not None}

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def kernel(operator: str, backend: str) -> Callable[..., None]:
    """The torch op that runs `operator` on `backend`, with its kernels loaded."""
    if backend in _LOADERS:
        _LOADERS[backend]()
    return _ops[operator, backend]


def recorded_call(operator: str, backend: str, *arguments: Any) -> Any:
    """A call that the backend can launch again where it repeats an earlier one (see `triton.attention_replay.Call`);
    None where it records none of this operator."""
    calls = _LOADERS[backend]().RECORDED_CALLS if backend in _LOADERS else {}
    return calls[operator](*arguments) if operator in calls else None


_library = torch.library.Library(ops.name, "DEF")
_ops: dict[tuple[str, str], Callable[..., None]] = {}
"""The torch ops by operator and backend."""

for _backend, _about in BACKENDS.items():
    for _operator in _about.operators:
        _name = f"{_operator}_{_backend}"
        _library.define(_name + SCHEMAS[_operator], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(add_op_namespace_prefix(_name), lambda *args: None, lib=_library)
        _ops[_operator, _backend] = getattr(ops, _name).default

_library.define(
    "multi_source_attention_flat_cuda("
    "Tensor[] tensors, int[] layout, "  # layout: which tensors they are, see FlatTensors in bindings/attention_sm90.h
    "float scale, bool return_lse) -> Tensor[]"  # out; lse; nothing of a call that it does not take
)
attention_flat_cuda = ops.multi_source_attention_flat_cuda.default
"""multi_source_attention on the backend "cuda" with all tensors in one list, which costs the host least."""


def _load_extension(folder: Path) -> tuple[str | None, str | None]:
    """Load `_C.so` and `_C_cuda.so` from `folder`. Returns for each None, or why it is not available."""
    library, cuda, record = folder / "_C.so", folder / "_C_cuda.so", folder / "_build.json"
    if not library.exists():
        reason = why_not_built(folder)
        return reason, reason
    build = json.loads(record.read_text())
    running, minimum = torch.__version__, build["torch_minimum"]
    built_for = f"built with torch {build['torch']} for torch >= {minimum}, running torch {running}"
    if tuple(int(x) for x in running.split(".")[:2]) < tuple(int(x) for x in minimum.split(".")):
        reason = f"the C++ extension does not fit: {built_for}"
        return reason, reason
    reasons: list[str | None] = []
    for path in (library, cuda):
        try:
            if not path.exists():
                reasons.append("the package was installed without its CUDA C++ extension (no nvcc at build time)")
                continue
            torch.ops.load_library(str(path))
            ctypes.CDLL(str(path)).lr_kernels_register(ops.name.encode())
            reasons.append(None)
        except (OSError, AttributeError) as error:  # not a library; one without lr_kernels_register
            reasons.append(f"the C++ extension does not load ({error}): {built_for}")
    return reasons[0], reasons[1]


extension_error, cuda_extension_error = _load_extension(PACKAGE)
"""None where the compiled kernels, of the CPU and CUDA C++, are loaded, else the reason."""

if extension_error is not None:
    warnings.warn(f"lr_kernels: no compiled CPU kernels: {extension_error}", RuntimeWarning, stacklevel=2)
