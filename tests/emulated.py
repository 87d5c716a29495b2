"""The Hopper attention on an emulator: builds it, and runs calls of multi_source_attention there, on CPU tensors."""

import ctypes
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from lr_kernels import plan_attention
from lr_kernels.attention.tables import lay_out
from lr_kernels.runtime.ops import kernel

ROOT = Path(__file__).parent.parent
BUILD = ROOT / os.environ.get("LR_EMULATOR_BUILD", "build/emulator")


class Timing(NamedTuple):
    """When the emulated hardware does what it may do at any moment, and how a call is spread."""

    moment: int = 0
    """copies and products happen 0: as late as they may; 1: at once; 2: at random"""
    seed: int = 0
    """of the order in which warps run; 0: in turn"""
    multiprocessors: int = 132
    parts: int = 0
    """into which keys are split; 0: what the kernel chooses"""
    launches: int = 1
    """0: kernels do not run"""


LATE = Timing()


def build(folder: Path) -> Path:
    """The emulator as a library of torch ops; built by CMake, with the options of CMAKE_ARGS, where its sources are
    newer."""
    tools = Path(sys.executable).parent
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # several workers of pytest may want it
        for command in (
            [
                tools / "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}",
                f"-DTORCH_INCLUDE_DIRS={';'.join(include_paths())}",
                f"-DTORCH_LIBRARY_DIRS={';'.join(library_paths())}", *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ],
            [tools / "cmake", "--build", folder, "--target", "_C_emulator", "--parallel"],
        ):  # fmt: skip
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout + run.stderr
    return folder / "_C_emulator.so"


_loaded: list[ctypes.CDLL] = []


def use(path: Path) -> ctypes.CDLL:
    """Load an emulator: `kernel("multi_source_attention", "cuda")` takes CPU tensors from now on, in this process."""
    assert not _loaded, "a process can load one emulator, since its ops are registered once"
    torch.ops.load_library(str(path))
    _loaded.append(ctypes.CDLL(str(path)))
    return _loaded[0]


def library() -> ctypes.CDLL:
    """The emulator, built and loaded when it is first asked for."""
    return _loaded[0] if _loaded else use(build(BUILD))


def set_timing(timing: Timing) -> None:
    """For the calls that follow."""
    moment, seed, *others = timing
    assert moment in (0, 1, 2) and timing.multiprocessors > 0 and timing.parts >= 0, timing
    library().lr_emulator_options(moment, ctypes.c_uint64(seed), *others)


def attend(
    query: Tensor,
    sources,
    query_groups=None,
    scale=None,
    return_lse=False,
    timing: Timing = LATE,
    lse_dtype=torch.float32,
):
    """multi_source_attention on the emulated Hopper. RuntimeError: what the kernel did wrong."""
    set_timing(timing)
    plan = plan_attention([s.key_mask for s in sources], [s.key_groups for s in sources], query_groups)
    out = torch.full_like(query, torch.nan, memory_format=torch.contiguous_format)
    lse = torch.full(query.shape[:3], torch.nan, dtype=lse_dtype) if return_lse else None
    kernel("multi_source_attention", "cuda")(query, *lay_out(query, sources, plan, scale), out, lse)
    return out if lse is None else (out, lse)


if __name__ == "__main__":
    build(BUILD)
