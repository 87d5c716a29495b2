"""How everything is measured: interleaved medians, peak memory and the share of the arithmetic peak, in one process.

How much faster one contender is than another is the median of the ratios of each round, since a slow phase of the
machine, which may last for half of the rounds, slows both times of a round alike.
"""

import ctypes
import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lr_kernels.info import arithmetic_peak, instruction_set, versions
from lr_kernels.testing import assert_matches

_libc = ctypes.CDLL(None)
_libc.mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads, which malloc_trim can return to the system whole

OURS = "lr_kernels"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIGURES = ("ms", "gflops", "percent_of_peak", "peak_mib", "ours_is_faster", "error_vs_sdpa", "time_vs_share")
SHORTEST = 2e-3
"""Seconds that one measurement lasts at least: faster calls are repeated within it."""


class NotRun(Exception):
    """Raised by a contender that cannot run here. The message is the reason and goes into the table."""


@dataclass(frozen=True)
class Contender:
    call: Callable[[], object]
    """Returns its freshly allocated result, whose bytes do not count as extra memory, or None."""
    threads: int | None = None
    """Default: the threads of the run."""


@dataclass
class Problem:
    """One line of the table: the same work done by several contenders, of which OURS is one."""

    op: str
    layer: str
    model: str
    shape: str
    dtype: str
    flops: float
    """Floating-point operations of the visible work."""
    contenders: dict[str, Contender]
    error: Callable[[str, object], float]
    """Relative L2 error of a contender's result against float64; raises AssertionError for a wrong one, which must not
    be timed."""
    visible: str = "100%"
    share: float = 1.0
    """The exact visible share."""
    baseline: str = ""
    """The contender whose error ours is compared with."""


@dataclass
class Measurement:
    """One contender on one problem: what it costs, or why it did not run."""

    seconds: float = 0.0
    """Median of a call."""
    peak_bytes: int = 0
    """Peak memory of a call beyond its inputs and its result."""
    error: float = 0.0
    not_run: str = ""
    rounds: list[float] = field(default_factory=list)


def measure(problems: Sequence[Problem], repeats: int) -> list[dict[str, str]]:
    """Rows of the CSV: all contenders of all `problems` in turn, `repeats` rounds, so that a slow phase of the machine
    hits all of them alike."""
    found = {(i, name): Measurement() for i, problem in enumerate(problems) for name in problem.contenders}
    calls: dict[tuple[int, str], Callable[[], float]] = {}
    for (i, name), measurement in found.items():
        contender = problems[i].contenders[name]
        try:
            measurement.error = problems[i].error(name, _run(contender))
        except NotRun as reason:
            measurement.not_run = str(reason)
            continue
        start = time.perf_counter()
        measurement.peak_bytes = peak_memory(functools.partial(_run, contender))
        long = time.perf_counter() - start > 50 * SHORTEST
        count = 1 if long else max(1, round(SHORTEST / _seconds(contender, 1)))
        calls[i, name] = functools.partial(_seconds, contender, count)
    for i, name in calls:
        sample_peak(problems[i].dtype, problems[i].contenders[name].threads or torch.get_num_threads())
    order = list(calls)
    for round_ in range(repeats):
        start = round_ % max(1, len(order))
        for key in order[start:] + order[:start]:
            found[key].rounds.append(calls[key]())
    for measurement in found.values():
        measurement.seconds = statistics.median(measurement.rounds) if measurement.rounds else 0.0
    return [_row(problems[i], name, {n: m for (j, n), m in found.items() if j == i}) for i, name in found]


def _run(contender: Contender) -> object:
    if contender.threads is None:
        return contender.call()
    before = torch.get_num_threads()
    torch.set_num_threads(contender.threads)
    try:
        return contender.call()
    finally:
        torch.set_num_threads(before)


def _seconds(contender: Contender, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        _run(contender)
    return (time.perf_counter() - start) / count


def _row(problem: Problem, name: str, found: dict[str, Measurement]) -> dict[str, str]:
    result, ours, baseline = found[name], found[OURS], found.get(problem.baseline)
    row = {key: getattr(problem, key) for key in ("op", "layer", "model", "shape", "dtype", "visible")}
    threads = problem.contenders[name].threads or torch.get_num_threads()
    row |= {"share": f"{problem.share:.4f}", "contender": name, "not_run": result.not_run, "threads": str(threads)}
    row |= dict.fromkeys(FIGURES, "")
    if result.not_run:
        return row
    row["ms"], row["gflops"] = f"{result.seconds * 1e3:.4g}", f"{problem.flops / result.seconds * 1e-9:.1f}"
    row["peak_mib"] = f"{result.peak_bytes / 2**20:.1f}"
    if not ours.not_run:
        row["ours_is_faster"] = f"{_times_as_long(result, ours):.2f}"
    if baseline is not None and not baseline.not_run:
        row["error_vs_sdpa"] = f"{result.error / baseline.error:.2f}"
    return row


def _times_as_long(result: Measurement, ours: Measurement) -> float:
    return statistics.median(a / b for a, b in zip(result.rounds, ours.rounds, strict=True))


def finish(rows: Sequence[dict[str, str]]) -> None:
    """Fills in what the whole run tells: the share of the peak, and of our rows with hidden keys the time ÷ (visible
    share × time of the same layer with every key visible)."""
    ours = [r for r in rows if r["contender"] == OURS and r["ms"]]
    dense = {(r["op"], r["layer"], r["dtype"]): float(r["ms"]) for r in ours if r["visible"] == "100%"}
    for row in rows:
        if row["ms"]:
            row["percent_of_peak"] = f"{100 * float(row['gflops']) / _peaks[row['dtype'], int(row['threads'])]:.0f}"
    for row in ours:
        whole = dense.get((row["op"], row["layer"], row["dtype"]))
        if whole is not None and row["visible"] != "100%":
            row["time_vs_share"] = f"{float(row['ms']) / (float(row['share']) * whole):.2f}"


_peaks: dict[tuple[str, int], float] = {}


def sample_peak(dtype: str, threads: int) -> float:
    """The highest GFLOP/s of multiply-adds alone in this run so far, measured once more: of bf16 pairs for bf16 where
    the processor has them, else fp32."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = arithmetic_peak(bf16=True) if dtype == "bf16" else None
        found = found or arithmetic_peak()
    finally:
        torch.set_num_threads(before)
    if found is None:
        raise SystemExit("the benchmarks need the compiled CPU kernels; see `python -m lr_kernels info`")
    _peaks[dtype, threads] = max(found, _peaks.get((dtype, threads), 0.0))
    return _peaks[dtype, threads]


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which the process grew at its peak during one call, less the bytes of the result (Linux).

    The call runs in a fresh thread, which gets worker threads of its own: scratch that threads keep between calls
    counts every time.
    """

    def measured() -> int:
        _libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status_bytes("VmRSS")
        result = call()
        return _status_bytes("VmHWM") - before - _result_bytes(result)

    with ThreadPoolExecutor(1) as thread:
        return max(0, thread.submit(measured).result())


def _result_bytes(result: object) -> int:
    if isinstance(result, Tensor):
        return result.nbytes
    return sum(map(_result_bytes, result)) if isinstance(result, (tuple, list)) else 0


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """‖result − truth‖ ÷ ‖truth‖"""
    return ((result.double() - truth).norm() / truth.norm()).item()


def checked_error(name: str, result: Tensor, low: Tensor, truth: Tensor) -> float:
    """The relative error, after the tolerance rule: ours with the working dtype's rounding, a peer, which may round
    more often, with bf16's."""
    assert_matches(result, low if name.startswith(OURS) else low.bfloat16(), truth, name)
    return relative_error(result, truth)


def commit() -> str:
    """The commit that is measured, with "-dirty" where files have changed. The environment variable COMMIT gives it for
    a copy without Git history."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def machine() -> dict[str, str]:
    """Device, instruction set, peaks, versions and commit: written into every CSV."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    peaks = {f"peak_gflops_{dtype}": f"{sample_peak(dtype, torch.get_num_threads()):.0f}" for dtype in DTYPES}
    about = {"device": cpu, "isa": instruction_set() or "-", **peaks, "commit": commit()}
    return {**about, **versions()}
