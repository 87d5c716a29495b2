"""`python -m benchmarks`: the kernels against their peers; one Markdown table, and a CSV if asked.

Cases: attention (self-attention of a retouch step in the layers of SD1.5 and SDXL), backward (training through it),
each other operator by its name, or all of them as "operators", references (cached references of a transformer),
backend (diffusers' attention backend, alone and in whole models), masks (causal order, a window, blocks, padding,
grouped heads), retouch (all self-attention of a retouch step of SD1.5), unet (that whole step: ten minutes), sweep
(time over tokens, visible share and sources, for the plot).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from lr_kernels.runtime.extras import require

require("bench", "tqdm")

from tqdm import tqdm

from . import attention, backend, backward, harness, masks, operators, references, retouch, sweep, table
from .target import Target

CASES = ("attention", "backward", *operators.SMALL, "references", "backend", "masks", "retouch", "unet", "sweep")
FLEX_LAYERS = ("sd32", "xl32")
SMALL_LAYERS = ("sd32", "sd16", "xl32")
SWEEP_REPEATS = 3
"""At most so many rounds of the cases whose calls take seconds each."""
ERROR_LIMIT = 1.5
"""How large our error may be, as a multiple of SDPA's."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [layer.id for layer in attention.LAYERS]
    parser.add_argument("--cases", nargs="+", choices=(*CASES, "operators"), default=CASES, help="default: all")
    parser.add_argument("--layers", nargs="+", choices=names, default=names, help="of attention and backward")
    parser.add_argument("--dtypes", nargs="+", choices=list(harness.DTYPES), default=list(harness.DTYPES))
    shares = list(attention.VISIBLE)
    parser.add_argument("--visible", nargs="+", choices=shares, default=shares, help="of attention")
    parser.add_argument("--repeats", type=int, default=7, help="median of so many rounds (3 where calls take seconds)")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--naive", action="store_true", help="also the explicit softmax, which stores all N x M scores")
    parser.add_argument("--flex", action="store_true", help=f"also FlexAttention, in {', '.join(FLEX_LAYERS)}")
    parser.add_argument("--flex-layers", nargs="+", choices=names, help="FlexAttention in these; it compiles slowly")
    parser.add_argument("--scaling", action="store_true", help="also our kernel on one thread, with every key visible")
    quick = "attention in the smaller layers, every other operator in its smallest case, nothing compiled, 5 rounds"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--csv", type=Path, help="write the rows there, with machine, versions and commit")
    parser.add_argument("--markdown", type=Path, help="write the table there instead of printing it")
    options = parser.parse_args()
    if options.quick:
        options.cases, options.layers, options.repeats = ("attention", "operators"), SMALL_LAYERS, 5
        options.visible = ["100%", "67%", "10%"]
    if options.flex_layers is None:
        options.flex_layers = FLEX_LAYERS if options.flex else ()
    return options


def groups(options: argparse.Namespace) -> list[tuple[Callable[[], list[harness.Problem]], int]]:
    """Builders of problems that are measured together, with their rounds, in the order of the table."""
    layers = [layer for layer in attention.LAYERS if layer.id in options.layers]
    found = []
    if "attention" in options.cases:
        extra = dict(with_naive=options.naive, flex_layers=options.flex_layers, scaling=options.scaling)
        found += attention.problems(layers, options.dtypes, options.visible, **extra)
    if "backward" in options.cases:
        found += backward.problems(layers)
    for name, problems in operators.SMALL.items():
        if name in options.cases or "operators" in options.cases:
            if options.quick:
                found += problems(options.dtypes[:1], Target(compiles=False))[:1]
            else:
                found += problems(options.dtypes)
    rounds = [(build, options.repeats) for build in found]
    if "references" in options.cases:
        rounds += [(build, options.repeats) for build in references.problems(options.dtypes)]
    if "backend" in options.cases:
        rounds += [(build, options.repeats) for build in backend.problems(options.dtypes)]
    if "masks" in options.cases:
        rounds += [(build, options.repeats) for build in masks.problems(options.dtypes)]
    if "retouch" in options.cases:
        rounds += [(build, min(SWEEP_REPEATS, options.repeats)) for build in retouch.problems(options.dtypes)]
    if "unet" in options.cases:
        rounds += [(build, min(SWEEP_REPEATS, options.repeats)) for build in retouch.whole_steps(options.dtypes)]
    if "sweep" in options.cases:
        rounds += [(build, min(SWEEP_REPEATS, options.repeats)) for build in sweep.problems(options.dtypes)]
    return rounds


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, str]] = []
    for build, repeats in tqdm(groups(options), "measuring", leave=False):
        rows += harness.measure(build(), repeats)
    machine = harness.machine()
    harness.finish(rows)
    if options.csv:
        table.write_csv(options.csv, rows, machine)
    text = table.markdown(rows, machine)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    else:
        print(text)
    over = [r for r in rows if r["contender"] == harness.OURS and float(r["error_vs_sdpa"] or 0) > ERROR_LIMIT]
    if over:
        names = ", ".join(f"{r['op']} {r['layer']} {r['dtype']} {r['visible']}" for r in over)
        raise SystemExit(f"error more than {ERROR_LIMIT} times SDPA's: {names}")


if __name__ == "__main__":
    main()
