"""What `python -m lr_kernels info` tells: versions, instruction set, each backend and why it cannot run."""

import ctypes
import importlib.metadata
import json
import platform
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
    """ "avx512bf16", "avx512", "avx2" or "baseline": what the CPU kernels use here; None without the extension."""
    if ops.extension_error is not None:
        return None
    library = ctypes.CDLL(str(Path(__file__).parent / "_C.so"))
    library.lr_kernels_isa.restype = ctypes.c_char_p
    return library.lr_kernels_isa().decode()


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
