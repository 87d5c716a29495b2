"""`python -m benchmarks.gpu PART … --out FOLDER`: the kernels on a GPU against what is used there today.

Parts: attention (a retouch step's self-attention), rows (one reference read by 1, 4 and 16 rows), lse (also returned),
backward, references (cached ones of a transformer), masks (causal order, windows, blocks, padding, grouped heads),
layer, unet (gpu_unet.py), operators (all others), ceilings (what the card's copies and products reach). Each writes
FOLDER/PART.csv, a row per contender; who cannot run is there with the reason. With --dry the same code runs on a CPU at
toy sizes, kernels interpreted, and nothing is timed.

ms is the GPU's own time: the calls are enqueued behind a kernel that waits, so that how long Python takes does not
count; host_us is how long the call itself took. ours_is_faster is relative to the row of the contender lr_kernels, in
attention the kernel that backend="auto" takes; those of named backends stand beside it.
"""

import argparse
import contextlib
import functools
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DRY = "--dry" in sys.argv
if DRY:  # Triton decides at import whether it interprets
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from lr_kernels import Source, multi_source_attention
from lr_kernels.info import versions

from . import attention as layers
from . import gpu_masks, gpu_peers, gpu_unet, operators
from . import references as cached
from .gpu_attention import BACKENDS, ONE_CALL, Case, contenders
from .harness import OURS, NotRun, Problem, commit
from .table import write_csv
from .target import Target

DEVICE = "cpu" if DRY else "cuda"
TARGET = Target(DEVICE, backend="triton", toy=DRY, compiles=not DRY)
ROUNDS = 15
FIGURES = ("ms", "tflops", "host_us", "eager_ms", "peak_mib", "ours_is_faster", "error")
FLEX_LAYERS = ("sd64", "xl64", "flux")
"""Of FlexAttention, which compiles anew for each mask."""
FLEX_VISIBLE = ("100%", "30%")
REFUSALS = (NotRun, RuntimeError, ImportError, AssertionError)
"""How contenders say that they cannot run, or that a result is wrong (AssertionError)."""
WAIT = 2_000_000
"""Clock cycles, 1 ms, in which the host enqueues what is timed; twice what a call takes it, where that is more."""
CLOCK = 2e9
"""Clock cycles per second, at most."""


class Timer:
    """Medians by device events, contenders in turn, the L2 cache overwritten before every call."""

    def __init__(self) -> None:
        self.flush = torch.empty(0 if DRY else 256 << 20, dtype=torch.uint8, device=DEVICE)

    def medians(self, calls: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float]]:
        """(milliseconds on the GPU, microseconds on the host) per call."""
        if DRY or not calls:
            return {}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        order = list(calls)
        waits = {name: self._warm_up(call) for name, call in calls.items()}
        for round_ in range(ROUNDS):
            start = round_ % len(order)
            for name in order[start:] + order[:start]:
                self.flush.zero_()
                torch.cuda._sleep(waits[name])
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                clock = time.perf_counter()
                calls[name]()
                host = time.perf_counter() - clock
                end.record()
                end.synchronize()
                found[name].append((begin.elapsed_time(end), host * 1e6))
        return {name: tuple(map(statistics.median, zip(*times))) for name, times in found.items()}

    def _warm_up(self, call: Callable[[], object]) -> int:
        """Call it a few times; returns the cycles in which the host has enqueued it."""
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        clock = time.perf_counter()
        call()
        return max(WAIT, round(2 * CLOCK * (time.perf_counter() - clock)))


def peak_mib(call: Callable[[], object]) -> float:
    """Device memory that a call takes at its peak beyond what it returns."""
    if DRY:
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    kept = torch.cuda.memory_allocated() - before
    del result
    return (torch.cuda.max_memory_allocated() - before - kept) / 2**20


def reason_of(refusal: Exception) -> str:
    text = (str(refusal).strip() or type(refusal).__name__).splitlines()[0]
    return text if isinstance(refusal, REFUSALS) else f"{type(refusal).__name__}: {text}"


def end_if_broken(name: str) -> None:
    """After a kernel's bad access every later call of the process fails, so the run ends and says whose it was."""
    if DRY:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise SystemExit(f"{name} broke the process's CUDA context: {error}") from error


def compare(
    about: dict[str, str],
    flops: float,
    contenders: dict[str, Callable[[], object]],
    error: Callable[[str, object], float],
    timer: Timer,
) -> Iterator[dict[str, str]]:
    """Rows of one case: every contender checked, then those that ran timed in turn."""
    rows, calls = {}, {}
    for name, call in contenders.items():
        rows[name] = {**about, "contender": name, "not_run": "", **dict.fromkeys(FIGURES, "")}
        try:
            rows[name]["error"] = f"{error(name, call()):.2e}"
            rows[name]["peak_mib"] = f"{peak_mib(call):.1f}"
            calls[name] = call
        except Exception as refusal:
            if name.startswith(OURS) and not isinstance(refusal, REFUSALS):
                raise  # peers have exceptions of their own; of ours these are all
            rows[name]["not_run"] = reason_of(refusal)
            end_if_broken(name)
    found = timer.medians(calls)
    for name in calls:
        if DRY:
            rows[name]["not_run"] = "dry run"
            continue
        ms, host = found[name]
        rows[name] |= {"ms": f"{ms:.4g}", "tflops": f"{flops / ms * 1e-9:.1f}", "host_us": f"{host:.0f}"}
        if OURS in found:
            rows[name]["ours_is_faster"] = f"{ms / found[OURS][0]:.2f}"
    yield from rows.values()


LAYERS = (
    *layers.LAYERS,
    layers.Layer("sd3", "SD3 64²", 4429, 24, 64),  # image and text tokens together
    layers.Layer("flux", "Flux 64²", 4608, 24, 128),
)


def sizes() -> tuple[layers.Layer, ...]:
    return tuple(map(TARGET.layer, LAYERS))


def attention_case(
    layer: layers.Layer, dtype: str, visible: str, readers: int, timer: Timer, training: bool = False
) -> Iterator[dict[str, str]]:
    case = Case(layer, dtype, layers.VISIBLE[visible], readers, DEVICE, training)
    flex = not DRY and layer.id in FLEX_LAYERS and visible in FLEX_VISIBLE and readers == 2
    calls = contenders(case, with_flex=flex)
    about = {"op": "attention", "layer": layer.id, "model": layer.model, "shape": layer.shape, "dtype": dtype}
    about |= {"visible": visible, "rows": str(readers)}
    if not training:
        with torch.no_grad():
            yield from compare(about, case.flops, calls, case.error, timer)
        return
    about["op"] = "forward + backward"
    steps = {name: functools.partial(case.trained, call) for name, call in calls.items()}
    yield from compare(about, case.flops, steps, lambda name, _: case.error_of_gradients(name, calls[name]), timer)


def attention(timer: Timer) -> Iterator[dict[str, str]]:
    for layer in sizes():
        for visible in layers.VISIBLE:
            yield from attention_case(layer, "bf16", visible, 2, timer)
        yield from attention_case(layer, "fp16", "100%", 2, timer)


def lse(timer: Timer) -> Iterator[dict[str, str]]:
    """What returning the lse costs."""
    for layer in (x for x in sizes() if x.id in ("xl64", "sd32")):
        shape = (2, layer.tokens, layer.heads, layer.head_dim)
        query, key, value = (torch.randn(shape, device=DEVICE).bfloat16() for _ in range(3))
        sources = [Source(key, value)] * 3
        calls = {
            f"{name} with lse" if lse else name: functools.partial(
                multi_source_attention, query, sources, return_lse=lse, backend=backend
            )
            for name, backend in BACKENDS.items()
            for lse in (False, True)
        }
        about = {"op": "attention with lse", "layer": layer.id, "model": layer.model, "dtype": "bf16"}
        about |= {"shape": layer.shape, "visible": "100%", "rows": "2"}
        flops = 12.0 * 2 * layer.heads * layer.tokens**2 * layer.head_dim
        with torch.no_grad():
            yield from compare(about, flops, calls, lambda *_: 0.0, timer)


def ceilings(timer: Timer) -> Iterator[dict[str, str]]:
    """A copy of 4 GiB (read and written) and a product of 8192² matrices on random data."""
    n = 64 if DRY else 8192
    x = torch.randn(n, n, device=DEVICE).bfloat16()
    source = torch.randn(16 * n, n, device=DEVICE).bfloat16()
    target = torch.empty_like(source)
    calls = {"copy, TB/s": lambda: target.copy_(source), "product, TFLOP/s": lambda: x @ x}
    work = {"copy, TB/s": 2.0 * source.nbytes, "product, TFLOP/s": 2.0 * n**3}
    found = timer.medians(calls)
    for name in calls:
        row = {"op": "ceiling", "contender": name, "not_run": "dry run" if DRY else ""}
        if not DRY:
            row |= {"ms": f"{found[name][0]:.4g}", "tflops": f"{work[name] / found[name][0] * 1e-9:.4g}"}
        yield row


def of_unet(part: Callable[[str, bool], Iterator[dict[str, str]]]) -> Callable[[Timer], Iterator[dict[str, str]]]:
    def found(timer: Timer) -> Iterator[dict[str, str]]:
        try:
            import diffusers  # noqa: F401
        except ImportError as reason:
            yield {"op": part.__name__, "contender": OURS, "not_run": str(reason)}
            return
        for row in part(DEVICE, DRY):
            yield {**dict.fromkeys(("layer", "visible", "rows", *FIGURES), ""), **row}

    return found


def rows(timer: Timer) -> Iterator[dict[str, str]]:
    for layer in (x for x in sizes() if x.id in ("sd32", "xl32")):
        for readers in (1, 4, 16):
            yield from attention_case(layer, "bf16", "67%", readers, timer)


def backward(timer: Timer) -> Iterator[dict[str, str]]:
    for layer in sizes():
        for visible in ("100%", "30%"):
            yield from attention_case(layer, "bf16", visible, 2, timer, training=True)


def rows_of(problem: Problem, timer: Timer, visible: str = "") -> Iterator[dict[str, str]]:
    about = {key: getattr(problem, key) for key in ("op", "layer", "model", "shape", "dtype")}
    about |= {"visible": visible, "rows": ""}
    calls = {name: contender.call for name, contender in problem.contenders.items()}
    with torch.no_grad():
        yield from compare(about, problem.flops, calls, problem.error, timer)


def small_operators(timer: Timer) -> Iterator[dict[str, str]]:
    for problems in operators.SMALL.values():
        for build in problems(("bf16",) if DRY else ("bf16", "fp32"), TARGET):
            for problem in build():
                yield from rows_of(problem, timer)


def references(timer: Timer) -> Iterator[dict[str, str]]:
    backend, part = ("triton", cached.TEXT) if DRY else ("auto", 1)
    for count in cached.REFERENCES:
        yield from rows_of(cached.layer(count, "bf16", ONE_CALL, part=part, device=DEVICE, backend=backend), timer)


def masks(timer: Timer) -> Iterator[dict[str, str]]:
    for build in gpu_masks.builders(TARGET):
        problem = build()
        yield from rows_of(problem, timer, problem.visible)


PARTS = {
    "ceilings": ceilings, "attention": attention, "rows": rows, "lse": lse, "backward": backward,
    "references": references, "masks": masks,
    "layer": of_unet(gpu_unet.layer), "unet": of_unet(gpu_unet.unet), "operators": small_operators,
}  # fmt: skip


def machine() -> dict[str, str]:
    name = "dry run on a CPU" if DRY else torch.cuda.get_device_name()
    return {"device": name, "cuda": torch.version.cuda or "-", "commit": commit(), **versions(), **gpu_peers.versions()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="default: all", metavar="PART", choices=[[], *PARTS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="on a CPU, interpreted, nothing timed")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # what is measured by then is written
    about, timer = machine(), Timer()
    for part in args.parts or PARTS:
        found = []
        with contextlib.ExitStack() as stack:
            stack.callback(lambda part=part, found=found: found and write_csv(args.out / f"{part}.csv", found, about))
            for row in PARTS[part](timer):
                found.append(row)
                print(" ".join(filter(None, row.values())), flush=True)


if __name__ == "__main__":
    main()
