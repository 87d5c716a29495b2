"""The steps of the CPU ladder: compiled with the C++ compiler on PATH, checked by the tolerance rule, timed."""

import ctypes
import functools
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lr_kernels import Source, multi_source_attention, plan_attention, reference
from lr_kernels.testing import assert_matches

FOLDER = Path(__file__).parent / "cpu"
STEPS = ("1_naive", "2_lanes", "3_packing", "4_lazy_maximum", "5_tiles")
NO_AMX = "not run: this processor has no AMX"
TILES = ("-mamx-tile", "-mamx-bf16")
"""The flags with which step 5 uses the processor's tiles."""


@dataclass
class Inputs:
    """One row of queries and two sources; of the second source a part is visible. Tensors are (1, tokens, heads, d)."""

    query: Tensor
    sources: list[Source]

    def to(self, dtype: torch.dtype) -> "Inputs":
        sources = [s._replace(key=s.key.to(dtype), value=s.value.to(dtype)) for s in self.sources]
        return Inputs(self.query.to(dtype), sources)

    @property
    def operations(self) -> int:
        """Multiplications and additions: two products of queries with all visible keys."""
        keys = sum(s.key.shape[1] if s.key_mask is None else int(s.key_mask.sum()) for s in self.sources)
        return 4 * keys * self.query.numel()


def make_inputs(queries: int, heads: int, d: int, keys: tuple[int, int], visible: float, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    query, *rest = (torch.randn(1, n, heads, d, generator=g) for n in (queries, keys[0], keys[0], keys[1], keys[1]))
    mask = torch.rand(1, keys[1], generator=g) < visible
    return Inputs(query, [Source(*rest[:2]), Source(*rest[2:], key_mask=mask)])


class _Source(ctypes.Structure):
    """`Source` of cpu/problem.h."""

    _fields_ = (
        ("key", ctypes.c_void_p), ("value", ctypes.c_void_p), ("index", ctypes.c_void_p), ("count", ctypes.c_int64)
    )  # fmt: skip


class _Problem(ctypes.Structure):
    """`Problem` of cpu/problem.h."""

    _fields_ = (
        ("query", ctypes.c_void_p), ("out", ctypes.c_void_p), ("source", _Source * 2),
        ("queries", ctypes.c_int64), ("heads", ctypes.c_int64), ("d", ctypes.c_int64), ("scale", ctypes.c_float),
    )  # fmt: skip


def compiler() -> str | None:
    return shutil.which("c++")


@functools.cache
def _build_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="ladder")


@functools.cache
def build(step: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """A step as a shared library, for the processor of this machine."""
    target = Path(_build_folder().name) / f"{step}{''.join(flags)}.so"
    includes = FOLDER.parent.parent.parent / "csrc"  # the vector type of the real kernels
    command = ["c++", "-std=gnu++17", "-O3", "-march=native", *flags, "-Wno-psabi", "-shared", "-fPIC"]
    command += ["-DLR_ISA=ladder", f"-I{includes}", f"-o{target}", str(FOLDER / f"{step}.cpp")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    library.attend.argtypes, library.attend.restype = (ctypes.POINTER(_Problem),), None
    return library


@functools.cache
def instruction_set() -> str:
    """Of this machine, as the compiler sees it, under the names of `LR_KERNELS_ISA`."""
    command = ["c++", "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"]
    macros = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = {"__AVX512BF16__": "avx512bf16", "__AVX512F__": "avx512", "__AVX2__": "avx2"}
    return next((name for macro, name in names.items() if macro in macros), "baseline")


def machine_is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def emulated() -> tuple[str, ...]:
    """The flags with which step 5 emulates its tiles, whatever the processor has."""
    return ("-mno-amx-bf16", "-mno-amx-tile") if machine_is_x86() else ()


@functools.cache
def has_amx() -> bool:
    if not machine_is_x86():
        return False
    runs_here = build("5_tiles", TILES).runs_here
    runs_here.restype = ctypes.c_bool
    return runs_here()


def runner(library: ctypes.CDLL, inputs: Inputs) -> tuple[Callable[[], None], Tensor]:
    """(a call of a step, the tensor it writes)."""
    _, queries, heads, d = inputs.query.shape
    out = torch.full_like(inputs.query, torch.nan)
    lists = [None if s.key_mask is None else s.key_mask[0].nonzero()[:, 0].int() for s in inputs.sources]
    sources = []
    for source, visible in zip(inputs.sources, lists):
        index, count = (None, source.key.shape[1]) if visible is None else (visible.data_ptr(), len(visible))
        sources.append(_Source(source.key.data_ptr(), source.value.data_ptr(), index, count))
    problem = _Problem(inputs.query.data_ptr(), out.data_ptr(), (_Source * 2)(*sources), queries, heads, d, d**-0.5)

    def run(keep: object = (inputs, lists, out)) -> None:
        library.attend(problem)

    return run, out


def dtype_of(step: str) -> torch.dtype:
    return torch.bfloat16 if step == "5_tiles" else torch.float32


@dataclass
class Expected:
    """What the reference computes: in the working dtype, and in float64."""

    low: Tensor
    ref64: Tensor


def expected(inputs: Inputs) -> Expected:
    return Expected(*(reference.multi_source_attention(x.query, x.sources) for x in (inputs, inputs.to(torch.float64))))


def check(step: str, inputs: Inputs, flags: tuple[str, ...] = ()) -> None:
    """Compares a step with the reference in float64: no further from it than the reference in the step's dtype."""
    inputs = inputs.to(dtype_of(step))
    run, out = runner(build(step, flags), inputs)
    run()
    wanted = expected(inputs)
    assert_matches(out, wanted.low, wanted.ref64, step)


def keeps_rule(out: Tensor, wanted: Expected) -> bool:
    try:
        assert_matches(out, wanted.low, wanted.ref64)
    except AssertionError:
        return False
    return True


def library_call(inputs: Inputs) -> Callable[[], object]:
    plan = plan_attention([s.key_mask for s in inputs.sources])
    return lambda: multi_source_attention(inputs.query, inputs.sources, plan=plan, backend="cpu")


def measure(calls: dict[str, Callable[[], object]], rounds: int, few: tuple[str, ...] = ()) -> dict[str, float]:
    """Seconds of each call, the best of several rounds in which all take turns; those named in `few` have four. The
    thread's own processor time, so that other work on the machine is not counted."""
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(rounds):
        for name, call in calls.items():
            if turn < 4 or name not in few:
                start = time.thread_time()
                call()
                best[name] = min(best[name], time.thread_time() - start)
    return best


SHAPE = dict(queries=1024, heads=8, d=64, keys=(1024, 1024), visible=1 / 3)


def table(rounds: int = 15) -> list[str]:
    """Checks and times all steps and the library's kernel, on one thread -> the lines of the page's table."""
    torch.set_num_threads(1)
    small = make_inputs(queries=70, heads=2, d=64, keys=(300, 200), visible=0.5)
    for step in STEPS[:-1]:
        check(step, small)
    check("5_tiles", small, emulated())
    inputs = make_inputs(**SHAPE)
    rounded = inputs.to(torch.bfloat16)
    calls, outs = {}, {}
    for step in STEPS[:-1]:
        calls[step], outs[step] = runner(build(step), inputs)
    if has_amx():
        calls["5_tiles"], outs["5_tiles"] = runner(build("5_tiles", TILES), rounded)
        calls["library, bf16"] = library_call(rounded)
    calls["library, fp32"] = library_call(inputs)
    seconds = measure(calls, rounds, few=("1_naive",))
    wanted = {x.query.dtype: expected(x) for x in (inputs, rounded)}
    lines = [
        "| step | ms | GFLOP/s | times as fast as step 1 | mean error | within the tolerance rule |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys([*STEPS, *sorted(calls)]):
        shown = f"[{name}](cpu/{name}.cpp)" if name in STEPS else f"the {name}"
        if name not in seconds:
            lines.append(f"| {shown} | {NO_AMX} | – | – | – | with emulated tiles, at a small shape |")
            continue
        out = outs[name] if name in outs else calls[name]()
        truth, t = wanted[out.dtype], seconds[name]
        speed = f"{t * 1e3:.1f} | {inputs.operations / t * 1e-9:.1f} | {seconds['1_naive'] / t:.1f}"
        error = (out.double() - truth.ref64).abs().mean().item()
        lines.append(f"| {shown} | {speed} | {error:.1e} | {'yes' if keeps_rule(out, truth) else 'no'} |")
    return [*lines, "", about(rounds)]


def about(rounds: int) -> str:
    version = subprocess.run(["c++", "--version"], check=True, capture_output=True, text=True).stdout.split("\n")[0]
    queries, heads, d, keys = (SHAPE[x] for x in ("queries", "heads", "d", "keys"))
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return (
        f"{model[1] if model else platform.machine()} ({instruction_set()}), 1 thread, {version}, torch "
        f"{torch.__version__}: {queries:,} queries × {heads} heads × {d} channels, {keys[0]:,} keys and a third of "
        f"{keys[1]:,}; step 5 in bf16, all others in fp32; the best of {rounds} interleaved runs (step 1: of 4), "
        "processor time of the thread; errors against float64."
    )
