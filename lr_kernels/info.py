"""What `python -m lr_kernels info` tells: versions, instruction set, each backend and why it cannot run."""

import ctypes
import importlib.metadata
import json
import platform
import time

import torch

from .runtime import backends, ops
from .runtime.installation import PACKAGE, installed_elsewhere, is_source_folder
from .runtime.schemas import SCHEMAS

PACKAGES = ("lr_kernels", "torch", "triton", "diffusers", "transformers", "numpy", "xformers")


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter here; "-" for one that is missing."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    found["torch"] = torch.__version__
    return found


def instruction_set() -> str | None:
    """The instruction set that the CPU kernels use here, as `LR_KERNELS_ISA` names it; None without the extension."""
    if ops.extension_error is not None:
        return None
    library = _library()
    library.lr_kernels_isa.restype = ctypes.c_char_p
    return library.lr_kernels_isa().decode()


def arithmetic_peak(bf16: bool = False) -> float | None:
    """GFLOP/s of multiply-adds in registers on torch's threads, with the instruction set that the CPU kernels use.

    fp32, or with `bf16` products of bf16 pairs summed in fp32. The best of 10 runs of a few milliseconds. None without
    the extension, or where the instruction set has no such products.
    """
    if ops.extension_error is not None:
        return None
    peak = _library().lr_kernels_peak
    peak.restype, peak.argtypes = ctypes.c_double, (ctypes.c_bool, ctypes.c_int64)
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        operations = peak(bf16, 1_000_000)
        best = max(best, operations / (time.perf_counter() - start))
    return best * 1e-9 or None


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(PACKAGE / "_C.so"))


def report() -> str:
    """The text of `python -m lr_kernels info`."""
    lines = [f"{name:<14}{version}" for name, version in versions().items()]
    lines += ["", f"{'package':<14}{PACKAGE}{' (source folder)' if is_source_folder() else ''}"]
    hidden = installed_elsewhere()
    if hidden is not None:
        lines += [f"{'':<14}hides the installed {hidden}: to use that one, cd elsewhere"]
    lines += [f"{'machine':<14}{platform.machine()}, {torch.get_num_threads()} threads"]
    lines += [f"{'cpu kernels':<14}{instruction_set() or 'not available'}"]
    record = PACKAGE / "_build.json"
    if record.exists():
        build = json.loads(record.read_text())
        lines += [f"{'built with':<14}torch {build['torch']}, serves torch >= {build['torch_minimum']}"]
    if torch.cuda.is_available():
        lines += [f"{'gpu':<14}{torch.cuda.get_device_name()}"]
    lines += ["", *(f"{name:<14}{availability(name)}" for name in backends.BACKENDS)]
    return "\n".join(lines)


def availability(backend: str) -> str:
    """Whether a backend is available for the operators that it has, or why not. Operators that differ from most are
    named with their own answer."""
    has = [op for op in SCHEMAS if backend == "reference" or op in ops.BACKENDS[backend].operators]
    found: dict[str, list[str]] = {}
    for operator in has:
        reason = backends.unavailable(backend, operator)
        found.setdefault("available" if reason is None else f"no: {reason}", []).append(operator)
    most, *others = sorted(found, key=lambda state: -len(found[state]))
    only = f"of {', '.join(has[:-1])} and {has[-1]} alone: " if len(has) < len(SCHEMAS) else ""
    return "; ".join([only + most, *(f"{', '.join(found[state])}: {state}" for state in others)])
