"""`python -m benchmarks.tiles --out FOLDER`: times the attention kernel with other tiles than those that
lr_kernels/triton/tiles.py has for this GPU, and prints the fastest beside the table's: what to write into the table."""

import argparse
import csv
import functools
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from lr_kernels import Source, multi_source_attention, plan_attention
from lr_kernels.triton import tiles
from lr_kernels.triton.launch import architecture

HEAD_DIMS = (40, 64, 80, 128, 160)
KINDS = {"dense": 1.0, "gathered": 0.3}
"""Visible share."""
CANDIDATES = [
    (BM, BN, warps, stages)
    for BM, BN, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    if BM * BN >= 4096 and (warps == 8 or BM * BN <= 8192)
]


def candidates(tile: tiles.Tile) -> Iterator[tiles.Tile]:
    """The table's tile first."""
    yield tile
    for numbers in CANDIDATES:
        other = tiles.Tile(*numbers, tile.D0, tile.D1)
        if other != tile:
            yield other


def milliseconds(call, dry: bool) -> float:
    if dry:
        call()
        return 0.0
    import triton

    return triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="on a CPU, interpreted, two tiles each, nothing timed")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device, tokens = ("cpu", 64) if args.dry else ("cuda", 4096)
    arch = architecture(torch.device(device, 0))
    with (args.out / "tiles.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arch", "head_dim", "kind", *tiles.Tile._fields, "ms", "not_run"])
        for head_dim, (kind, share) in itertools.product(HEAD_DIMS, KINDS.items()):
            q, k, v = (torch.randn(2, tokens, 8, head_dim, device=device).bfloat16() for _ in range(3))
            mask = None if share == 1 else torch.rand(1, tokens, device=device) < share
            sources, plan = [Source(k, v, key_mask=mask)] * 3, plan_attention([mask] * 3)
            now = tiles.attention_tile(arch, head_dim, torch.bfloat16, kind)
            found = []
            for tile in itertools.islice(candidates(now), 2 if args.dry else None):
                with mock.patch.object(tiles, "attention_tile", lambda *_, tile=tile: tile):
                    try:
                        ms = milliseconds(
                            functools.partial(multi_source_attention, q, sources, plan=plan, backend="triton"), args.dry
                        )
                    except Exception as reason:  # out of shared memory or registers: not for this card
                        writer.writerow([arch, head_dim, kind, *tile, "", str(reason).splitlines()[0]])
                        continue
                found.append((ms, tile))
                writer.writerow([arch, head_dim, kind, *tile, *(("", "dry run") if args.dry else (f"{ms:.4g}", ""))])
            if not args.dry:
                best, tile = min(found)
                table = f", the table's {tuple(now)[:4]}: {found[0][0]:.3f} ms" if found[0][1] == now else ""
                print(f"sm_{arch} D{head_dim} {kind}: {tuple(tile)[:4]}: {best:.3f} ms{table}", flush=True)


if __name__ == "__main__":
    main()
