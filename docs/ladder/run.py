"""`python docs/ladder/run.py`: compiles, runs, checks and times all steps of both ladders and prints their tables.

With --write the tables of the pages beside this file are replaced.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent.parent)]

import cpu_steps  # noqa: E402
import triton_steps  # noqa: E402


def compiled_table() -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(FOLDER.parent.parent)
    command = [sys.executable, "-W", "ignore", str(FOLDER / "compile_steps.py")]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


TABLES = {
    "cpu.md": {"ladder": cpu_steps.table},
    "triton.md": {"ladder": triton_steps.table, "compiled": compiled_table, "tiles": triton_steps.tile_table},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the tables of cpu.md and triton.md")
    write = parser.parse_args().write
    if cpu_steps.compiler() is None:
        sys.exit("docs/ladder/run.py: no C++ compiler: c++ is not on PATH")
    for page, tables in TABLES.items():
        text = (FOLDER / page).read_text()
        for name, table in tables.items():
            lines = "\n".join(table())
            print(f"{page}: {name}\n\n{lines}\n")
            pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
            text = re.sub(pattern, lambda found, lines=lines: f"{found[1]}{lines}\n{found[2]}", text, flags=re.S)
        if write:
            (FOLDER / page).write_text(text)


if __name__ == "__main__":
    main()
