"""`python -m benchmarks.many`: a run of `python -m lr_kernels generate` by one process and by two of `torchrun`.

The toy model draws its subjects with both stages of the method, each process on one thread. Rounds take turns. Seconds
of drawing are those from the first item's start to the last one's end; those of the command are from its start to its
end, with Python, the models and the launcher. All runs must write the same files, byte for byte.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lr_kernels.runtime.extras import require

require("bench", "rich")
require("diffusers")

import PIL.Image
import yaml
from rich.console import Console
from rich.table import Table

from lr_kernels.toy import world

from . import harness, table

PROCESSES = (1, 2)
PLACES = ("sand", "grass", "snow", "wood")


def write_run(folder: Path, output: str, subjects: list[str], samples: int, steps: int) -> Path:
    """A file for `generate` whose images go to folder/output; the number of images is subjects x PLACES x samples."""
    for name in subjects:
        pixels = world.references(name)[0][0].permute(1, 2, 0) * 127.5 + 127.5
        PIL.Image.fromarray(pixels.byte().numpy()).save(folder / f"{name}.png")
    run = {
        "base": "toy",
        "output": output,
        "subjects": {x: {"noun": x, "token": "sks", "image": f"{x}.png"} for x in subjects},
        "prompts": [f"a {{}} on {place}" for place in PLACES],
        "samples": samples,
        "arguments": {"num_inference_steps": steps, "guidance_scale": 3.0},
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


def timed(run: Path, output: Path, processes: int) -> tuple[float, float]:
    """Seconds of drawing, and of the whole command."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, "-m", "lr_kernels", "generate", str(run)]
    start = time.perf_counter()
    ended = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    whole = time.perf_counter() - start
    if ended.returncode != 0:
        raise SystemExit(ended.stderr)
    lines = [json.loads(line) for log in (output / "log").iterdir() for line in log.read_text().splitlines()]
    return max(x["ended"] for x in lines) - min(x["ended"] - x["seconds"] for x in lines), whole


def files(folder: Path) -> dict[str, bytes]:
    """By path, the bytes of all files but the logs, which hold seconds."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if name.parts[0] != "log"}


def measure(subjects: list[str], samples: int, steps: int, rounds: int) -> list[dict[str, str]]:
    """A row per number of processes; an error where two runs differ in a file."""
    found: dict[int, list[tuple[float, float]]] = {n: [] for n in PROCESSES}
    first: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for round_ in range(rounds):
            for n in PROCESSES:
                output = f"{n}-processes-{round_}"
                found[n].append(timed(write_run(folder, output, subjects, samples, steps), folder / output, n))
                made = files(folder / output)
                first = first or made
                if made != first:
                    differ = sorted(x for x in made.keys() | first.keys() if made.get(x) != first.get(x))
                    raise SystemExit(f"{n} processes, round {round_}: other files than at first: {', '.join(differ)}")
    images = str(sum(path.endswith(".png") for path in first))
    about = {"images": images, "steps": str(steps), "threads": "1", "rounds": str(rounds)}
    rows = []
    for n, times in found.items():
        row = {**about, "processes": str(n), "byte_identical": "yes"}
        for i, part in enumerate(("drawing", "command")):
            row[f"seconds_{part}"] = f"{statistics.median(x[i] for x in times):.2f}"
            ratios = (one[i] / x[i] for one, x in zip(found[PROCESSES[0]], times))
            row[f"{part}_as_fast"] = f"{statistics.median(ratios):.2f}"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.many", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", nargs="+", default=["ball", "star"], help="of the toy world")
    parser.add_argument("--samples", type=int, default=2, help="images of each subject and prompt (default 2)")
    parser.add_argument("--steps", type=int, default=10, help="default 10")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--csv", type=Path, help="write the rows there, with machine, versions and commit")
    options = parser.parse_args()
    rows = measure(options.subjects, options.samples, options.steps, options.rounds)
    shown = Table("processes", "images", "seconds of drawing", "of the command", "drawing, times as fast", "command")
    for r in rows:
        times = (f"{r[name]}×" for name in ("drawing_as_fast", "command_as_fast"))
        shown.add_row(r["processes"], r["images"], r["seconds_drawing"], r["seconds_command"], *times)
    console = Console(width=120)
    console.print(shown)
    console.print(f"All files of all {len(rows) * options.rounds} runs are byte-identical.")
    if options.csv:
        table.write_csv(options.csv, rows, harness.machine())


if __name__ == "__main__":
    main()
