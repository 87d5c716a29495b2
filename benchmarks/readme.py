"""`python -m benchmarks.readme`: rewrites README's tables from the CSV and JSON files under benchmarks/results."""

import csv
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LAYERS = ("sd64", "sd32", "sd16", "xl64", "xl32")


def attention_table() -> str:
    """How much faster lr_kernels is than the strongest ways of today, per layer and dtype."""
    with (RESULTS / "cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    # A file of before the other cases has no column `op`, nor the measured peak
    rows = [r for r in rows if r.get("op", "attention") == "attention"]
    found = {(r["layer"], r["dtype"], r["visible"], r["contender"]): r for r in rows}
    lines = [
        "| layer (tokens × heads × head_dim) | dtype | vs cat + SDPA | % of FMA peak | 67 % visible: vs SDPA + mask "
        "| vs gather + SDPA | extra memory vs cat + SDPA |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in LAYERS:
        for dtype in ("fp32", "bf16"):
            ours, cat = (found[layer, dtype, "100%", name] for name in ("lr_kernels", "cat + SDPA"))
            mask, gather = (found[layer, dtype, "67%", name] for name in ("SDPA + mask", "gather + SDPA"))
            lines.append(
                f"| {ours['model']} ({ours['shape'].replace('x', ' × ')}) | {dtype} | {cat['ours_is_faster']}× "
                f"| {ours.get('percent_of_peak', '–')} | {mask['ours_is_faster']}× | {gather['ours_is_faster']}× "
                f"| {ours['peak_mib']} / {cat['peak_mib']} MiB |"
            )
    m = rows[0]
    lines += ["", f"{m['device']}, {m['threads']} threads, torch {m['torch']}, commit {m['commit']}: "]
    lines[-1] += "batch 2, three sources, medians of interleaved runs, memory beyond inputs and result; "
    lines[-1] += "`make bench` writes the file behind this table."
    return "\n".join(lines)


def demo_table() -> str:
    """The toy model's metrics per stage."""
    report = json.loads((RESULTS / "demo.json").read_text())
    lines = [
        "| stage | identity ↑ | colour histogram ↑ | background right ↑ | position spread ↑ | 1 − mIoU ↑ |",
        "|---|---|---|---|---|---|",
    ]
    for name, m in report["stages"].items():
        mark = "**" if name == "retouch" else ""
        values = (m[k] for k in ("identity", "histogram", "background", "position_std", "diversity"))
        lines.append(f"| {mark}{name}{mark} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    return "\n".join(lines)


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    for name, table in (("attention", attention_table()), ("demo", demo_table())):
        marked = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(marked, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md: expected one place marked 'table: {name}', found {count}")
    path.write_text(text)


if __name__ == "__main__":
    main()
