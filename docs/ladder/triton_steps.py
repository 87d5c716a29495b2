"""The steps of the Triton ladder: run in Triton's interpreter, checked by the tolerance rule, and counted.

The interpreter's seconds say how many NumPy calls a step makes, which is nothing that a GPU does. So the table shows
what a GPU would have to do as well: tiles, bytes, products. Import after TRITON_INTERPRET=1 is set.
"""

import contextlib
import functools
import importlib.util
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import triton
from torch import Tensor
from triton.runtime import interpreter
from triton_problem import concatenated, make_inputs

from lr_kernels import Source, reference
from lr_kernels.testing import assert_matches

FOLDER = Path(__file__).parent / "triton"
STEPS = ("1_one_query", "2_tiles", "3_sources", "4_lists", "5_ahead")
TILES = ((16, 16), (32, 16), (32, 32), (64, 32), (64, 64))


@functools.cache
def load(step: str) -> ModuleType:
    """A step as a module."""
    spec = importlib.util.spec_from_file_location(f"ladder_{step}", FOLDER / f"{step}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(out: Tensor, query: Tensor, sources: list[Source], what: str) -> None:
    """Compares with the reference in float64: no further from it than the reference in fp32."""
    exact = [s._replace(key=s.key.double(), value=s.value.double()) for s in sources]
    low = reference.multi_source_attention(query, sources)
    assert_matches(out, low, reference.multi_source_attention(query.double(), exact), what)


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """What interpreted kernels do: bytes loaded per argument, key tiles, products, exponentials, masked scores."""
    counts: Counter = Counter()
    ranges: list[tuple[str, int, int]] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    names = ("create_masked_load", "create_dot", "create_fmul", "create_exp", "create_exp2", "create_select")
    originals = {name: getattr(builder, name) for name in names}
    host_arguments = executor._init_args_hst

    def with_ranges(self, args, kwargs):
        hosted = host_arguments(self, args, kwargs)
        ranges[:] = [x for name, value in zip(self.arg_names, hosted[0]) for x in _byte_ranges(name, value)]
        return hosted

    def count(name: str, arguments: tuple, result) -> None:
        match name:
            case "create_masked_load":
                pointers, mask = arguments[0].data, arguments[1].data
                if not mask.any():
                    return
                first = int(pointers[mask].flat[0])
                argument = next(argument for argument, start, end in ranges if start <= first < end)
                counts[f"bytes of {argument}"] += int(mask.sum()) * result.data.itemsize
                counts["key tiles"] += argument == "key"
            case "create_dot":
                counts["products in tl.dot"] += arguments[0].data.size * arguments[1].data.shape[-1]
            case "create_fmul":
                counts["products outside"] += result.data.size
            case "create_exp" | "create_exp2":
                counts[name.removeprefix("create_")] += result.data.size
            case "create_select":
                counts["masked scores"] += result.data.size if result.data.dtype == np.float32 else 0

    def wrapped(name: str):
        def run(self, *arguments):
            result = originals[name](self, *arguments)
            count(name, arguments, result)
            return result

        return run

    executor._init_args_hst = with_ranges
    for name in names:
        setattr(builder, name, wrapped(name))
    try:
        yield counts
    finally:
        executor._init_args_hst = host_arguments
        for name, original in originals.items():
            setattr(builder, name, original)


def _byte_ranges(name: str, argument) -> list[tuple[str, int, int]]:
    """(name, first byte, end) of each tensor in an argument; all are contiguous."""
    if isinstance(argument, tuple):
        return [x for part in argument for x in _byte_ranges(name, part)]
    if isinstance(argument, Tensor):
        return [(name, argument.data_ptr(), argument.data_ptr() + argument.numel() * argument.element_size())]
    return []


def copied_bytes(step: str, query: Tensor, sources: list[Source]) -> int:
    """What a step writes on the host's side before its kernel starts: the concatenation and the dense mask."""
    if step not in STEPS[:2]:
        return 0
    return sum(x.numel() * x.element_size() for x in concatenated(len(query), sources))


def count(step: str, query: Tensor, sources: list[Source], **tile: int) -> Counter:
    """Runs a step, checks it and returns its counts, with bytes copied before the launch and seconds."""
    attend = load(step).attend
    with counted() as counts:
        start = time.thread_time()
        out = attend(query, sources, **tile)
        counts["seconds"] = time.thread_time() - start
    check(out, query, sources, step)
    counts["copied"] = copied_bytes(step, query, sources)
    counts["key bytes"] = counts["bytes of key"] + counts["bytes of value"]
    return counts


def table() -> list[str]:
    """Counts of all steps -> the lines of the page's table."""
    query, sources = make_inputs()
    counts = [count(step, query, sources) for step in STEPS]
    rows = (
        ("keys, values and masks copied before the launch, KiB", "copied", 1024, ".1f"),
        ("keys and values loaded by the kernel, KiB", "key bytes", 1024, ".1f"),
        ("tiles of keys", "key tiles", 1, ",.0f"),
        ("products in `tl.dot`, thousands", "products in tl.dot", 1000, ",.0f"),
        ("products outside of it, thousands", "products outside", 1000, ",.0f"),
        ("`exp`, thousands", "exp", 1000, ",.0f"),
        ("`exp2`, thousands", "exp2", 1000, ",.0f"),
        ("scores compared with a mask, thousands", "masked scores", 1000, ",.0f"),
        ("seconds in the interpreter", "seconds", 1, ".2f"),
    )
    lines = ["| | " + " | ".join(f"[{s}](triton/{s}.py)" for s in STEPS) + " |", "|---" * (len(STEPS) + 1) + "|"]
    for title, name, unit, form in rows:
        lines.append(f"| {title} | " + " | ".join(format(c[name] / unit, form) for c in counts) + " |")
    B, N, H, D = query.shape
    keys, visible = [s.key.shape[1] for s in sources], int(sources[1].key_mask.sum())
    needed = 2 * N * H * D * (B * keys[0] + (B - 1) * visible)
    about = (
        f"{B} rows of {N} queries, {H} heads of {D} channels, fp32; sources of {keys[0]} and {keys[1]} keys; of the "
        f"second {visible} are visible, and the first row of queries does not read it. Tiles of 32 queries and 32 keys "
        f"(step 1: 1 query and all keys). The visible keys need {needed / 1000:,.0f} thousand products. "
        f"Triton {triton.__version__}, interpreter."
    )
    return [*lines, "", about]


def tile_table() -> list[str]:
    """Counts of the last step with several tile sizes -> the lines of the page's second table."""
    query, sources = make_inputs()
    D = query.shape[-1]
    lines = [
        "| queries × keys of a tile | keys and values loaded, KiB | tiles of keys | products in `tl.dot`, thousands "
        "| programs | numbers a program keeps: queries, sums, scores |",
        "|---|---|---|---|---|---|",
    ]
    for BM, BN in TILES:
        c = count(STEPS[-1], query, sources, BM=BM, BN=BN)
        programs = query.shape[0] * query.shape[2] * triton.cdiv(query.shape[1], BM)
        lines.append(
            f"| {BM} × {BN} | {c['key bytes'] / 1024:.1f} | {c['key tiles']} | {c['products in tl.dot'] / 1000:,.0f} "
            f"| {programs} | {2 * BM * D + BM * BN:,} |"
        )
    return lines
