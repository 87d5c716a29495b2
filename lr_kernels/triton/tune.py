"""`python -m lr_kernels.triton.tune`: time the attention kernels with many tiles on this GPU, print the best beside
those of tiles.py and write all times as CSV. tiles.py is data: what is found here is written there by hand, once per
architecture, and never searched for at import or in a call.

Tiles are compiled first by many processes into Triton's cache, then timed alone by one.
"""

import argparse
import csv
import functools
import itertools
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import Source, plan_attention, reference
from ..attention.grad import group_gradients
from ..attention.tables import lay_out
from ..runtime.ops import kernel
from ..testing import assert_matches
from . import tiles
from .launch import INTERPRETED, architecture

HEAD_DIMS = (40, 64, 80, 128, 160)
KINDS = ("dense", "gathered", "biased", "grouped", "query", "source")
"""Rows of `Tiles` and of `BackwardTiles`."""
BATCH, HEADS = 2, 8
TOKENS = (1024, 4096)
"""A tile has to serve both: it is ranked by the product of its times."""
VISIBLE = 0.3
FORWARD = tuple(
    (BM, BN, warps, stages)
    for BM, BN, warps in ((64, 64, 4), (128, 64, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8), (256, 64, 8))
    for stages in (2, 3, 4)
    if BN < 128 or stages < 4
)
BACKWARD = tuple(
    (BM, BN, warps, stages)
    for BM, BN, warps in itertools.product((32, 64, 128), (32, 64, 128), (4, 8))
    for stages in (1, 2, 3)
    if 1024 <= BM * BN <= 8192
)


class Case(NamedTuple):
    """One row of a table: what to call, and which tile to replace."""

    head_dim: int
    kind: str
    dtype: torch.dtype = torch.bfloat16


def candidates(case: Case, now: tiles.Tile) -> list[tiles.Tile]:
    """The table's tile first, then others, with the columns of the table and up to 128 with one part of them."""
    columns = [(now.D0, now.D1)]
    if now.D1 and now.D0 + now.D1 <= 128:
        columns.append((2 * now.D0, 0))
    numbers = BACKWARD if case.kind in ("query", "source") else FORWARD
    found = [now, *(tiles.Tile(*n, *c) for c in columns for n in numbers)]
    return list(dict.fromkeys(found))


def table_tile(case: Case, arch: int) -> tiles.Tile:
    """What tiles.py says."""
    if case.kind in ("query", "source"):
        return tiles.backward_tile(arch, case.head_dim, case.dtype, case.kind)
    return tiles.attention_tile(arch, case.head_dim, case.dtype, case.kind, BATCH * HEADS * max(TOKENS))


@contextmanager
def with_tile(case: Case, tile: tiles.Tile) -> Iterator[None]:
    """While it lasts, the launcher of this case takes `tile`."""
    tiles.FORCED[case.kind] = tile
    try:
        yield
    finally:
        del tiles.FORCED[case.kind]


class Problem(NamedTuple):
    """Inputs of a case, and a call into `out` (or new tensors) whose time the tile decides."""

    query: Tensor
    sources: list[Source]
    out: Tensor
    call: Callable[[], object]


def problem(case: Case, tokens: int, device: str) -> Problem:
    """Random inputs of a case, laid out once."""
    batch, heads = (1, 1) if INTERPRETED else (BATCH, HEADS)  # the interpreter takes half a second a program
    shape = (batch, tokens, heads, case.head_dim)
    backward = case.kind in ("query", "source")
    query, key, value, grad = (torch.randn(shape, device=device).to(case.dtype) for _ in range(4))
    mask = None if case.kind == "dense" or backward else torch.rand(1, tokens, device=device) < VISIBLE
    bias = torch.randn(1, tokens, device=device) if case.kind == "biased" else None
    groups = (0, 0, 1) if case.kind == "grouped" else (0, 0, 0)
    sources = [Source(key, value, key_mask=mask, key_bias=bias, softmax_group=g) for g in groups]
    tables = lay_out(query, sources, plan_attention([mask] * 3), None)
    out = torch.full_like(query, torch.nan)  # the op, not the public function: that replays the tile it recorded
    forward = functools.partial(kernel("multi_source_attention", "triton"), query, *tables, out)
    if not backward:
        return Problem(query, sources, out, functools.partial(forward, None))
    lse = torch.empty(shape[:3], dtype=torch.float64, device=device)
    forward(lse)
    gradients = functools.partial(group_gradients, "triton", query, tables, out, lse, grad, None, (False,) * 3)
    return Problem(query, sources, out, gradients)


def compile_tile(job: tuple[Case, tiles.Tile, str]) -> str:
    """Run a tile once, at few tokens, whole tiles of keys and rests: its code lands in the cache. A forward tile's
    result is compared with the reference; those of the backward kernels are left to the tests. Returns why it cannot
    be used here, or nothing: a tile too large for the card, or one that the compiler gets wrong."""
    case, tile, device = job
    torch.manual_seed(0)
    try:
        with with_tile(case, tile):
            query, sources, out, call = problem(case, 269 if device == "cuda" else 33, device)
            call()
            if case.kind not in ("query", "source"):
                exact = [s._replace(key=s.key.double(), value=s.value.double()) for s in sources]
                truth = reference.multi_source_attention(query.double(), exact)
                assert_matches(out, reference.multi_source_attention(query, sources), truth)
        return ""
    except Exception as reason:
        return f"{type(reason).__name__}: {(str(reason) or '-').splitlines()[0]}"


def milliseconds(case: Case, tile: tiles.Tile, call: Callable[[], object]) -> float:
    """The time of a call with this tile, from a CUDA graph of many."""
    from triton.testing import do_bench_cudagraph  # without a GPU its import fails in the interpreter

    with with_tile(case, tile):
        return do_bench_cudagraph(call, rep=4, return_mode="median")


def tune(
    head_dims: Sequence[int] = HEAD_DIMS,
    kinds: Sequence[str] = KINDS,
    *,
    processes: int = 12,
    few: int | None = None,
) -> list[dict[str, object]]:
    """Times of every candidate, a dict each: arch, head_dim, kind, the tile, ms at each of TOKENS, not_run.

    `few`: only so many candidates of each case. Interpreted, nothing is timed and not_run says so.
    """
    device = "cpu" if INTERPRETED else "cuda"
    arch = architecture(torch.device(device, 0))
    cases = [Case(head_dim, kind) for head_dim in head_dims for kind in kinds]
    jobs = [(case, tile, device) for case in cases for tile in candidates(case, table_tile(case, arch))[:few]]
    if INTERPRETED:
        reasons = [compile_tile(job) or "interpreted" for job in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            reasons = pool.map(compile_tile, jobs, chunksize=1)
    rows: list[dict[str, object]] = []
    for case in cases:
        here = [(tile, reason) for (c, tile, _), reason in zip(jobs, reasons) if c == case]
        calls = {} if INTERPRETED else {n: problem(case, n, device).call for n in TOKENS}
        for tile, reason in here:
            times = {} if reason else {n: milliseconds(case, tile, call) for n, call in calls.items()}
            about = {"arch": arch, "head_dim": case.head_dim, "kind": case.kind, **tile._asdict()}
            rows.append({**about, **{f"ms_{n}": f"{times[n]:.4g}" if times else "" for n in TOKENS}, "not_run": reason})
    return rows


def best_of(rows: Sequence[dict[str, object]]) -> list[str]:
    """A line per case: the fastest tile and the table's, which is the first."""
    lines = []
    for (head_dim, kind), group in itertools.groupby(rows, lambda r: (r["head_dim"], r["kind"])):
        timed = [r for r in group if not r["not_run"]]
        if not timed:
            lines.append(f"D{head_dim} {kind}: nothing ran")
            continue

        def described(r: dict[str, object]) -> str:
            numbers = " ".join(str(r[field]) for field in tiles.Tile._fields)
            return f"({numbers}) " + " / ".join(str(r[f"ms_{n}"]) for n in TOKENS)

        best = min(timed, key=lambda r: math.prod(float(str(r[f"ms_{n}"])) for n in TOKENS))
        lines.append(f"D{head_dim} {kind}: best {described(best)} ms, first {described(timed[0])} ms")
    return lines


def main() -> None:
    """Time the tiles of this GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for tiles.csv")
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--kind", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--processes", type=int, default=12, help="that compile at the same time")
    parser.add_argument("--few", type=int, help="candidates of each case; default: all")
    args = parser.parse_args()
    if args.few is not None and args.few < 1:
        parser.error("--few: expected 1 or more")
    if not INTERPRETED and not torch.cuda.is_available():
        sys.exit("lr_kernels.triton.tune: no CUDA device; TRITON_INTERPRET=1 --few 2 runs it without one, untimed")
    rows = tune(args.head_dim, args.kind, processes=args.processes, few=args.few)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "tiles.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    print("\n".join(best_of(rows)))


if __name__ == "__main__":
    main()
