"""What `python -m lr_kernels info` tells: versions, instruction set, each backend and why it cannot run."""

import ctypes
import importlib.metadata
import json
import platform
import time
from pathlib import Path

import torch

from . import backends, ops

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
    """What the CPU kernels use here, as `LR_KERNELS_ISA` names it; None without the extension."""
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
    return ctypes.CDLL(str(Path(__file__).parent / "_C.so"))


def report() -> str:
    """The text of `python -m lr_kernels info`."""
    lines = [f"{name:<14}{version}" for name, version in versions().items()]
    lines += ["", f"{'machine':<14}{platform.machine()}, {torch.get_num_threads()} threads"]
    lines += [f"{'cpu kernels':<14}{instruction_set() or 'not available'}"]
    record = Path(__file__).parent / "_build.json"
    if record.exists():
        build = json.loads(record.read_text())
        lines += [f"{'built with':<14}torch {build['torch']}, serves torch >= {build['torch_minimum']}"]
    if torch.cuda.is_available():
        lines += [f"{'gpu':<14}{torch.cuda.get_device_name()}"]
    lines += [""]
    for operator in ops.SCHEMAS:
        lines.append(operator)
        for name in backends.BACKENDS:
            reason = backends.unavailable(name, operator)
            lines.append(f"    {name:<12}" + ("available" if reason is None else f"no: {reason}"))
    return "\n".join(lines)
