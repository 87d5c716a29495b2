"""`python -m benchmarks.roofline`: writes docs/roofline.md, what a Hopper GPU needs at least for each layer, beside
what was measured there (benchmarks/results/gpu-*/attention.csv, the newest; "not run" where there is none)."""

from pathlib import Path

from .attention import BATCH, LAYERS, VISIBLE, Layer
from .harness import OURS
from .readme import ROOT, newest_gpu

MATRIX = 790e12
"""FLOP/s of dense bf16 products on random data, measured on one H200."""
COPY = 4.3e12
"""Bytes/s of a device-to-device copy there, reads and writes counted."""
EXPONENTIALS = 1 / 0.27e-12
"""Exponentials per second: 16 per clock and multiprocessor."""
OVERLAP = 1.155
"""FlashAttention-3's published times fit (products + exponentials) / 1.155."""
READERS = (1, 4, 16)

HEAD = """# What a GPU needs at least

Written by `python -m benchmarks.roofline`; do not edit. Batch {batch}, three sources of as many keys as queries, the
third shared by all rows, bf16, forward.

A pair of a query and a visible key costs 4·D floating-point operations and one exponential. With {matrix:.0f} TFLOP/s,
{exps:.1f} T exponentials/s and {copy:.1f} TB/s (an H200, on random data):

- **products** = 4·D·pairs ÷ rate, **exp** = pairs ÷ rate, **bytes** = every input and output once ÷ bandwidth;
- **floor** = the largest of the three: all of them perfectly overlapped;
- **expected** = (products + exp) ÷ {overlap}, the overlap that FlashAttention-3 reaches, or the floor where that is
  more;
- **measured**, and its **gap** over the floor: from the newest folder `benchmarks/results/gpu-*`.

"""

TAIL = """
## How the cost grows

- **Tokens.** Pairs grow with the square of the tokens (every source has as many keys as there are queries): 4 times
  the time
  from 32² to 64². Bytes grow linearly and never decide: their share is below {bytes_share:.0%} of the floor at 32²
  and above.
- **Head dim.** Below D {even:.0f} the exponentials take longer than the products, whatever the kernel: at D 40 the
  matrix units idle a quarter of the time at best.
- **Sources.** Each one adds its visible keys and nothing else. A concatenation adds one read and one write of all
  keys and values, {concat:.0f} MiB at 64² of SDXL with two rows, and that much memory.
- **Visible share.** Hidden keys are not read: pairs, and time, follow the share. The fixed part (queries, outputs,
  one launch) stays; at 10 % of 16² it is most of the time.
- **Rows.** The reference's keys and values are stored once however many rows read them. One subject's bank serving many
  prompts:

| rows that read one reference (SDXL 64², per layer) | keys and values of the reference, here | expanded for each row |
|---|---|---|
"""


def milliseconds(layer: Layer, share: float) -> tuple[float, float, float]:
    """(products, exponentials, bytes) of one layer at a visible share of the keys."""
    queries = BATCH * layer.heads * layer.tokens
    pairs = queries * 3 * layer.tokens * share
    row = layer.heads * layer.tokens * layer.head_dim * 2
    moved = 2 * BATCH * row + 2 * (2 * BATCH + 1) * row * share
    return 4e3 * layer.head_dim * pairs / MATRIX, 1e3 * pairs / EXPONENTIALS, 1e3 * moved / COPY


def measured() -> dict[tuple[str, str], float]:
    """Our milliseconds by (layer, visible) of the newest GPU run; empty without one."""
    rows = [r for r in newest_gpu("attention") if r["contender"] == OURS and r["dtype"] == "bf16" and r["ms"]]
    return {(r["layer"], r["visible"]): float(r["ms"]) for r in rows}


def page() -> str:
    found = measured()
    exps = EXPONENTIALS * 1e-12
    text = HEAD.format(batch=BATCH, matrix=MATRIX * 1e-12, exps=exps, copy=COPY * 1e-12, overlap=OVERLAP)
    text += "| layer | visible | products, ms | exp, ms | bytes, ms | floor, ms | expected, ms | measured, ms | gap |\n"
    text += "|---|---|---|---|---|---|---|---|---|\n"
    bytes_share = 0.0
    for layer in LAYERS:
        for visible, shares in VISIBLE.items():
            products, exp, moved = milliseconds(layer, sum(shares) / 3)
            floor, ms = max(products, exp, moved), found.get((layer.id, visible))
            if layer.tokens >= 1024:
                bytes_share = max(bytes_share, moved / floor)
            cells = [f"{x:.4f}" for x in (products, exp, moved, floor, max(floor, (products + exp) / OVERLAP))]
            cells += ["not run", ""] if ms is None else [f"{ms:.4f}", f"{ms / floor:.2f}×"]
            text += f"| {layer.model}, {layer.shape.replace('x', ' × ')} | {visible} | {' | '.join(cells)} |\n"
    wide = next(x for x in LAYERS if x.id == "xl64")
    mib = 2 * wide.heads * wide.tokens * wide.head_dim * 2 / 2**20
    even = MATRIX / EXPONENTIALS / 4
    text += TAIL.format(bytes_share=bytes_share, even=even, concat=BATCH * 3 * mib)
    text += "".join(f"| {n} | {mib:.0f} MiB | {n * mib:.0f} MiB |\n" for n in READERS)
    return text


def main() -> None:
    path: Path = ROOT / "docs" / "roofline.md"
    path.write_text(page())
    print(path)


if __name__ == "__main__":
    main()
