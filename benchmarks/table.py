"""The rows of a run as a CSV file, a row per contender, and as a Markdown table, a line per case."""

import csv
from pathlib import Path

from .harness import OURS

BF16_PAYS = (
    "bf16 pays where the processor multiplies it (avx512bf16, amx); elsewhere it is widened to fp32 and takes as long."
)
HEAD = ("case", "ms", "GFLOP/s", "% of peak", "extra MiB", "error ÷ SDPA's", "time ÷ share", "× as fast as (extra MiB)")


def write_csv(path: Path, rows: list[dict[str, str]], machine: dict[str, str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine])
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)


def markdown(rows: list[dict[str, str]], machine: dict[str, str]) -> str:
    """One line per case: our figures, then how many times as fast as each peer ours is."""
    cases: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        key = (row["op"], row["layer"], row["shape"], row["model"], row["dtype"], row["visible"])
        cases.setdefault(key, []).append(row)
    lines = [HEAD, *(_line(key, found) for key, found in cases.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    lines.insert(1, tuple("-" * width for width in widths))
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    peaks = ", ".join(f"{machine[f'peak_gflops_{dtype}']} GFLOP/s {dtype}" for dtype in ("fp32", "bf16"))
    about = f"{machine['device']} ({machine['isa']}), {rows[0]['threads']} threads, measured peak {peaks}, "
    about += f"torch {machine['torch']}, commit {machine['commit']}. "
    about += "Medians of interleaved rounds, and of the ratios of each round. "
    about += "Extra MiB: peak memory beyond inputs and result. "
    about += f"Time ÷ share: time ÷ (visible share × time with every key visible). {BF16_PAYS}"
    return "\n".join([*text, "", about])


def _line(key: tuple[str, ...], rows: list[dict[str, str]]) -> tuple[str, ...]:
    op, layer, shape, model, dtype, visible = key
    ours, peers = rows[0], rows[1:]
    assert ours["contender"] == OURS
    name = f"{op} {layer}" + (f" {shape}, {model}" if layer not in (shape, "") else f" ({model})")
    shown = visible != "100%" or op in ("attention", "attention backend", "sweep")
    case = f"{name}, {dtype}, {visible}" if shown else f"{name}, {dtype}"
    figures = [ours[c] for c in ("ms", "gflops", "percent_of_peak", "peak_mib", "error_vs_sdpa", "time_vs_share")]
    notes = [f"not run: {ours['not_run']}"] if ours["not_run"] else []
    for row in peers:
        if row["not_run"]:
            notes.append(f"{row['contender']}: not run: {row['not_run']}")
        elif row["ours_is_faster"]:
            notes.append(f"{row['ours_is_faster']}× {row['contender']} ({row['peak_mib']})")
        else:
            notes.append(f"{row['contender']} takes {row['ms']} ms ({row['peak_mib']})")
    return (case, *figures, ", ".join(notes))
