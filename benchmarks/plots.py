"""`python -m benchmarks.plots`: draws docs/scaling.png from benchmarks/results/scaling.csv and nothing else."""

import argparse
import csv
from pathlib import Path

from lr_kernels.runtime.extras import require

require("bench", "matplotlib")

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .harness import DTYPES, OURS
from .readme import RESULTS, ROOT

PANELS = {
    "tokens": ("tokens, two sources", lambda row: int(row["shape"].split("x")[0])),
    "visible": ("visible share, two sources of 2,048 keys", lambda row: float(row["share"])),
    "sources": ("sources of 1,024 keys", lambda row: int(row["model"].split()[0])),
}
LOGARITHMIC = ("tokens",)
COLOURS = {OURS: "C0", "cat + SDPA": "C1", "SDPA + mask": "C1", "gather + SDPA": "C2"}
LABELS = {"cat + SDPA": "cat (+ mask) + SDPA", "SDPA + mask": "cat (+ mask) + SDPA"}


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """One row of panels per dtype: what varies along x, milliseconds along y."""
    dtypes = [d for d in DTYPES if any(row["dtype"] == d for row in rows)]
    figure, axes = plt.subplots(len(dtypes), len(PANELS), figsize=(12, 3.2 * len(dtypes)), squeeze=False)
    for line, dtype in zip(axes, dtypes):
        for panel, (varies, (title, value)) in zip(line, PANELS.items()):
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                if row["op"] == "sweep" and row["layer"] == varies and row["dtype"] == dtype and row["ms"]:
                    name = row["contender"]
                    lines.setdefault(LABELS.get(name, name), []).append((value(row), float(row["ms"])))
            colours = {LABELS.get(name, name): colour for name, colour in COLOURS.items()}
            for label, points in lines.items():
                panel.plot(*zip(*sorted(points)), marker="o", markersize=3, label=label, color=colours[label])
            if varies in LOGARITHMIC:
                panel.set_xscale("log", base=2)
                panel.set_yscale("log")
            else:
                panel.set_ylim(bottom=0)
            panel.set_title(f"{dtype}: {title}", fontsize=9)
            panel.set_ylabel("ms")
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)
    about = f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}, commit {rows[0]['commit']}"
    figure.suptitle(f"batch 1, 8 heads of 64; {about}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("--csv", type=Path, default=RESULTS / "scaling.csv")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "scaling.png")
    options = parser.parse_args()
    with options.csv.open() as file:
        draw(list(csv.DictReader(file)), options.output)


if __name__ == "__main__":
    main()
