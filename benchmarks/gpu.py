"""`python -m benchmarks.gpu PART … --out FOLDER`: the kernels on a GPU against what is used there today.

Parts: attention (a retouch step's self-attention), rows (one reference read by 1, 4 and 16 rows), lse (also returned),
backward, layer, unet (gpu_unet.py), operators (all others), ceilings (what the card's copies and products reach). Each
writes FOLDER/PART.csv, a row per contender; who cannot run is there with the reason. With --dry the same code runs on a
CPU at toy sizes, kernels interpreted, and nothing is timed.

ms is the GPU's own time: the calls are enqueued behind a kernel that waits, so that how long Python takes does not
count; host_us is how long the call itself took.
"""

import argparse
import contextlib
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

DRY = "--dry" in sys.argv
if DRY:  # Triton decides at import whether it interprets
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lr_kernels import Source, multi_source_attention, plan_attention, reference
from lr_kernels.info import versions

from . import attention as layers
from . import gpu_unet, operators
from .harness import OURS, NotRun, checked_error, commit
from .table import write_csv
from .target import Target

DEVICE = "cpu" if DRY else "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TARGET = Target(DEVICE, backend="triton", toy=DRY, compiles=not DRY)
ROUNDS = 15
CHECKED = 64
"""Queries whose results are compared with float64."""
PEERS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FIGURES = ("ms", "tflops", "host_us", "eager_ms", "peak_mib", "ours_is_faster", "error")
FLEX_LAYERS = ("sd64", "xl64", "flux")
"""Each mask compiles anew, for many seconds."""
FLEX_VISIBLE = ("100%", "30%")
WAIT = 2_000_000
"""Clock cycles, 1 ms, in which the host enqueues what is timed."""


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
        for call in calls.values():
            for _ in range(3):
                call()
        for round_ in range(ROUNDS):
            start = round_ % len(order)
            for name in order[start:] + order[:start]:
                self.flush.zero_()
                torch.cuda._sleep(WAIT)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                clock = time.perf_counter()
                calls[name]()
                host = time.perf_counter() - clock
                end.record()
                end.synchronize()
                found[name].append((begin.elapsed_time(end), host * 1e6))
        return {name: tuple(map(statistics.median, zip(*times))) for name, times in found.items()}


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
        except (
            NotRun,
            RuntimeError,
            ImportError,
            AssertionError,
        ) as reason:  # AssertionError: it computes another thing
            rows[name]["not_run"] = (str(reason).strip() or type(reason).__name__).splitlines()[0]
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


def forced(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    with sdpa_kernel(backend):
        return layers.sdpa(query, key, value, mask)


def by_xformers(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    if mask is None:
        return memory_efficient_attention(query, key, value)
    keys = mask.shape[-1]
    bias = query.new_zeros(*query.shape[:1], query.shape[2], query.shape[1], -(-keys // 8) * 8)[..., :keys]
    return memory_efficient_attention(query, key, value, bias.masked_fill_(~mask, -torch.inf))


def attention_case(
    layer: layers.Layer, dtype: str, visible: str, shares: Sequence[float], readers: int, timer: Timer, backward: bool
) -> Iterator[dict[str, str]]:
    """Self, context and reference keys; `readers` batch rows, all of which read the one reference row."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def randn(rows: int) -> Tensor:
        shape = (rows, layer.tokens, layer.heads, layer.head_dim)
        x = torch.randn(shape, generator=generator, device=DEVICE).to(DTYPES[dtype])
        return x.requires_grad_(backward)

    query = randn(readers)
    parts = [(randn(rows), randn(rows)) for rows in (readers, readers, 1)]
    masks = [None if s == 1 else torch.rand(1, layer.tokens, generator=generator, device=DEVICE) < s for s in shares]
    masked = any(m is not None for m in masks)
    sources = [Source(k, v, key_mask=m) for (k, v), m in zip(parts, masks)]
    plan = plan_attention(masks)
    whole = torch.ones(1, layer.tokens, dtype=torch.bool, device=DEVICE)
    dense = torch.cat([whole if m is None else m for m in masks], 1)
    kept = [None if m is None else m[0].nonzero()[:, 0] for m in masks]
    wide = dense[:, None, None].expand(readers, 1, 1, -1) if masked else None

    def joined() -> tuple[Tensor, Tensor, Tensor]:
        return query, *(layers.concatenate([p[i] for p in parts], readers) for i in range(2))

    def gathered(backend: SDPBackend) -> Tensor:
        chosen = [
            layers.concatenate([p[i] if n is None else p[i].index_select(1, n) for p, n in zip(parts, kept)], readers)
            for i in range(2)
        ]
        return forced(backend, query, *chosen)

    contenders: dict[str, Callable[[], object]] = {
        OURS: lambda: multi_source_attention(query, sources, plan=plan, backend="triton")
    }
    for name, backend in PEERS.items():
        if not masked:
            contenders[f"cat + SDPA ({name})"] = lambda b=backend: forced(b, *joined())
        elif name != "flash":  # it takes no mask
            contenders[f"SDPA + mask ({name})"] = lambda b=backend: forced(b, *joined(), wide)
        if masked:
            contenders[f"gather + SDPA ({name})"] = lambda b=backend: gathered(b)
    contenders["xformers"] = lambda: by_xformers(*joined(), wide)
    if not DRY and layer.id in FLEX_LAYERS and visible in FLEX_VISIBLE and readers == 2:
        flex = layers.Flex(layer.tokens, dense if masked else None, dense.shape[1], DEVICE)
        contenders["FlexAttention"] = lambda: flex(*joined())
    if layer.tokens <= 1024:
        contenders["naive"] = lambda: layers.naive(*joined(), wide)

    few = query.detach()[:, :CHECKED]
    plain = [s._replace(key=s.key.detach(), value=s.value.detach()) for s in sources]
    exact = [s._replace(key=s.key.double(), value=s.value.double()) for s in plain]
    truth = reference.multi_source_attention(few.double(), exact)
    low = reference.multi_source_attention(few, plain)

    def error(name: str, result: object) -> float:
        assert isinstance(result, Tensor)
        return checked_error(name, result.detach()[:, :CHECKED], low, truth)

    flops = 4.0 * readers * layer.heads * layer.tokens * int(dense.sum()) * layer.head_dim
    about = {"op": "attention", "layer": layer.id, "model": layer.model, "shape": layer.shape, "dtype": dtype}
    about |= {"visible": visible, "rows": str(readers)}
    if not backward:
        with torch.no_grad():
            yield from compare(about, flops, contenders, error, timer)
        return
    leaves = [query, *(x for pair in parts for x in pair)]
    grad = torch.randn(query.shape, generator=generator, device=DEVICE).to(query)

    def trained(call: Callable[[], object]) -> tuple[Tensor, ...]:
        out = call()
        assert isinstance(out, Tensor)
        return (out, *torch.autograd.grad(out, leaves, grad))

    steps = {name: functools.partial(trained, call) for name, call in contenders.items()}
    about["op"] = "forward + backward"
    yield from compare(about, 3.5 * flops, steps, lambda name, result: error(name, result[0]), timer)


def attention(timer: Timer) -> Iterator[dict[str, str]]:
    for layer in sizes():
        for visible, shares in layers.VISIBLE.items():
            yield from attention_case(layer, "bf16", visible, shares, 2, timer, False)
        yield from attention_case(layer, "fp16", "100%", layers.VISIBLE["100%"], 2, timer, False)


def lse(timer: Timer) -> Iterator[dict[str, str]]:
    """What returning the lse costs."""
    for layer in (x for x in sizes() if x.id in ("xl64", "sd32")):
        shape = (2, layer.tokens, layer.heads, layer.head_dim)
        query, key, value = (torch.randn(shape, device=DEVICE).bfloat16() for _ in range(3))
        sources = [Source(key, value)] * 3
        contenders = {
            OURS: lambda q=query, s=sources: multi_source_attention(q, s, backend="triton"),
            f"{OURS} with lse": lambda q=query, s=sources: multi_source_attention(
                q, s, return_lse=True, backend="triton"
            ),
        }
        about = {"op": "attention with lse", "layer": layer.id, "model": layer.model, "dtype": "bf16"}
        about |= {"shape": layer.shape, "visible": "100%", "rows": "2"}
        flops = 12.0 * 2 * layer.heads * layer.tokens**2 * layer.head_dim
        with torch.no_grad():
            yield from compare(about, flops, contenders, lambda *_: 0.0, timer)


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
    def rows_of(timer: Timer) -> Iterator[dict[str, str]]:
        try:
            import diffusers  # noqa: F401
        except ImportError as reason:
            yield {"op": part.__name__, "contender": OURS, "not_run": str(reason)}
            return
        for row in part(DEVICE, DRY):
            yield {**dict.fromkeys(("layer", "visible", "rows", *FIGURES), ""), **row}

    return rows_of


def rows(timer: Timer) -> Iterator[dict[str, str]]:
    for layer in (x for x in sizes() if x.id in ("sd32", "xl32")):
        for readers in (1, 4, 16):
            yield from attention_case(layer, "bf16", "67%", layers.VISIBLE["67%"], readers, timer, False)


def backward(timer: Timer) -> Iterator[dict[str, str]]:
    for layer in sizes():
        for visible in ("100%", "30%"):
            yield from attention_case(layer, "bf16", visible, layers.VISIBLE[visible], 2, timer, True)


def small_operators(timer: Timer) -> Iterator[dict[str, str]]:
    for problems in operators.SMALL.values():
        for build in problems(("bf16",) if DRY else ("bf16", "fp32"), TARGET):
            for problem in build():
                about = {key: getattr(problem, key) for key in ("op", "layer", "model", "shape", "dtype")}
                about |= {"visible": "", "rows": ""}
                calls = {name: contender.call for name, contender in problem.contenders.items()}
                with torch.no_grad():
                    yield from compare(about, problem.flops, calls, problem.error, timer)


PARTS = {
    "ceilings": ceilings, "attention": attention, "rows": rows, "lse": lse, "backward": backward,
    "layer": of_unet(gpu_unet.layer), "unet": of_unet(gpu_unet.unet), "operators": small_operators,
}  # fmt: skip


def machine() -> dict[str, str]:
    name = "dry run on a CPU" if DRY else torch.cuda.get_device_name()
    return {"device": name, "cuda": torch.version.cuda or "-", "commit": commit(), **versions()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="default: all", metavar="PART", choices=[[], *PARTS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="on a CPU, interpreted, nothing timed")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
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
