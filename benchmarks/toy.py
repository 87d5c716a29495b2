"""The full evaluation of the toy world: `python -m benchmarks.toy`, a process for each core.

Runs benchmarks/evaluation/toy.yaml, whose images go to outputs/evaluation, and writes the report's summary, table and
plot into benchmarks/results/evaluation. README's table of the method is made of them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from lr_kernels.runtime.extras import require

require("bench", "rich")
require("diffusers")
require("evaluation")

from benchmarks import harness
from lr_kernels.evaluation import read_evaluation

RUN = Path(__file__).parent / "evaluation" / "toy.yaml"
RESULTS = Path(__file__).parent / "results" / "evaluation"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUN, help="another evaluation's file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="each with one thread (default: cores)")
    options = parser.parse_args()
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
    command = [sys.executable, "-m", *launcher, "-m", "lr_kernels", "eval", str(options.run)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    write(read_evaluation(options.run).output / "report", options.results)


def write(report: Path, results: Path) -> None:
    """Keep what of a report README and its readers need, with the machine that made it."""
    results.mkdir(parents=True, exist_ok=True)
    found = json.loads((report / "report.json").read_text()) | {"machine": harness.machine()}
    (results / "report.json").write_text(json.dumps(found, indent=2) + "\n")
    for name in ("images.csv", "plot.png"):
        shutil.copyfile(report / name, results / name)


if __name__ == "__main__":
    main()
