"""How everything is measured: interleaved medians and peak memory, in one process on the same data."""

import ctypes
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lr_kernels.info import versions


@dataclass
class Measurement:
    """One contender on one case: median seconds of a call, and bytes of memory it needed beyond its inputs."""

    seconds: float
    peak_bytes: int


def measure(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, Measurement]:
    """Time the contenders in turn, `repeats` rounds, so that a slow phase of the machine hits all of them alike."""
    peaks = {name: peak_memory(call) for name, call in contenders.items()}  # also the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for round_ in range(repeats):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: Measurement(statistics.median(seconds[name]), peaks[name]) for name in names}


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which the process grew at its peak during one call, its result included (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def machine() -> dict[str, str]:
    """Device, threads, versions and commit: written into every CSV."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return {"device": cpu, "threads": str(torch.get_num_threads()), "commit": commit or "unknown", **versions()}
