"""`python -m benchmarks.gpu_report FOLDER`: table.md and attention.png from the CSV files of a run on a GPU, put there.

What did not run is in the table with its reason. A folder without a timed row (a dry run) gets the table alone.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .harness import OURS

PARTS = ("ceilings", "attention", "rows", "lse", "backward", "references", "masks", "layer", "unet", "operators")
COLUMNS = ("ms", "tflops", "host_us", "eager_ms", "peak_mib", "ours_is_faster", "error")
ACROSS = 4
"""Panels in a line."""
SHARES = ("100%", "67%", "30%", "10%")
KINDS = {
    OURS: OURS,
    "cat + ": "cat, or SDPA + mask",
    "SDPA + mask": "cat, or SDPA + mask",
    "gather + ": "gather",
    "per source + ": "per source, merged",
}
"""The line of a contender by what its name begins with."""


def rows_of(folder: Path, part: str) -> list[dict[str, str]]:
    path = folder / f"{part}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def case_of(row: dict[str, str]) -> str:
    names = ("op", "layer", "model", "shape", "dtype", "visible", "rows")
    return ", ".join(dict.fromkeys(row[n] for n in names if row.get(n)))


def table(folder: Path) -> str:
    lines = [f"# {folder.name}", ""]
    for part in PARTS:
        rows = rows_of(folder, part)
        if not rows:
            lines += [f"## {part}", "", "not run", ""]
            continue
        about = ", ".join(f"{rows[0][k]}" for k in ("device", "commit") if rows[0].get(k))
        lines += [f"## {part}", "", f"{about}, torch {rows[0]['torch']}, triton {rows[0]['triton']}", ""]
        lines += ["| case | contender | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
        for row in rows:
            cells = [row.get(c) or "" for c in COLUMNS]
            if row["not_run"]:
                cells[0] = f"not run: {row['not_run']}"
            lines.append("| " + " | ".join([case_of(row), row["contender"], *cells]) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """One panel per layer: milliseconds over the visible share, the fastest of each kind of peer."""
    rows = [r for r in rows if r["dtype"] == "bf16" and r["ms"]]
    layers = list(dict.fromkeys(r["layer"] for r in rows))
    down = -(-len(layers) // ACROSS)
    figure, axes = plt.subplots(down, ACROSS, figsize=(3 * ACROSS, 2.6 * down), squeeze=False)
    for panel in axes.flat[len(layers) :]:
        panel.axis("off")
    for panel, layer in zip(axes.flat, layers):
        lines: dict[str, list[tuple[float, float]]] = {}
        for share in SHARES:
            here = [r for r in rows if r["layer"] == layer and r["visible"] == share]
            for start, label in KINDS.items():
                times = [float(r["ms"]) for r in here if r["contender"].startswith(start)]
                if times:
                    lines.setdefault(label, []).append((float(share.rstrip("%")), min(times)))
        for label, points in lines.items():
            panel.plot(*zip(*points), marker="o", markersize=3, label=label)
        panel.set_title(f"{layer}: {next(r['shape'] for r in rows if r['layer'] == layer)}", fontsize=8)
        panel.set_xlabel("% of the keys visible", fontsize=7)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms", fontsize=7)
    axes[0][0].legend(fontsize=6)
    figure.suptitle(f"{rows[0]['device']}, batch 2, three sources, bf16; the fastest of each kind", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (folder / "table.md").write_text(table(folder))
    rows = rows_of(folder, "attention")
    if any(r["ms"] for r in rows):
        draw(rows, folder / "attention.png")
    print(folder / "table.md")


if __name__ == "__main__":
    main()
