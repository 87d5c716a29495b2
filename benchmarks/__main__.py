"""`python -m benchmarks`: the attention layers of SD1.5 and SDXL against their peers; a table, and a CSV if asked."""

import argparse
import csv
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from . import attention, harness

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(layers: list[attention.Layer], dtypes: list[str], repeats: int, naive: bool) -> list[dict[str, str]]:
    """One row per layer, dtype, visibility and contender."""
    rows = []
    cases = [(layer, dtype, masked) for layer in layers for dtype in dtypes for masked in (False, True)]
    for layer, dtype, masked in track(cases, description="measuring", transient=True):
        problem = attention.problem(layer, DTYPES[dtype], masked, naive)
        attention.check(problem)
        results = harness.measure(problem.contenders, repeats)
        ours = results["lr_kernels"]
        for name, result in results.items():
            rows.append(
                {
                    "layer": layer.id,
                    "model": layer.model,
                    "shape": f"{layer.tokens}x{layer.heads}x{layer.head_dim}",
                    "dtype": dtype,
                    "visible": "67%" if masked else "100%",
                    "contender": name,
                    "ms": f"{result.seconds * 1e3:.2f}",
                    "gflops": f"{problem.flops / result.seconds * 1e-9:.1f}",
                    "peak_mib": f"{result.peak_bytes / 2**20:.1f}",
                    "ours_is_faster": f"{result.seconds / ours.seconds:.2f}",
                }
            )
    return rows


def show(rows: list[dict[str, str]]) -> None:
    columns = ["layer", "dtype", "visible", "contender", "ms", "gflops", "peak_mib", "ours_is_faster"]
    table = Table(*columns, title=f"self-attention of a retouch step, {torch.get_num_threads()} CPU threads")
    for row in rows:
        faster = "" if row["contender"] == "lr_kernels" else row["ours_is_faster"] + "x"
        table.add_row(*(row[c] for c in columns[:-1]), faster, style="bold" if not faster else None)
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [layer.id for layer in attention.LAYERS]
    parser.add_argument("--layers", nargs="+", choices=names, default=names)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=7, help="rounds; the median is reported (default 7)")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--naive", action="store_true", help="also the explicit softmax, which stores all N x M scores")
    parser.add_argument("--quick", action="store_true", help="the three smaller layers, 5 rounds")
    parser.add_argument("--csv", type=Path, help="write the rows there, with machine, versions and commit")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.layers, options.repeats = ["sd32", "sd16", "xl32"], 5
    layers = [layer for layer in attention.LAYERS if layer.id in options.layers]
    rows = run(layers, options.dtypes, options.repeats, options.naive)
    show(rows)
    if options.csv:
        machine = harness.machine()
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *machine])
            writer.writeheader()
            writer.writerows({**row, **machine} for row in rows)
        print(f"wrote {options.csv}")


if __name__ == "__main__":
    main()
