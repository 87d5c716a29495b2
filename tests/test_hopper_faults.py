"""The emulator of the Hopper attention finds faults: each line that hopper_faults.py breaks must show.

A fault takes seconds to compile, so an eighth of them is planted here, from every part of the kernel; `make faults`
plants all. The hunt runs in a process of its own, since a process can load one emulator.
"""

import re
import subprocess
import sys
from pathlib import Path

from hopper_faults import CSRC, FAULTS


def test_every_fault_has_its_line_and_its_name():
    assert len(FAULTS) >= 40
    assert len({x.name for x in FAULTS}) == len(FAULTS)
    assert all(x.old in (CSRC / x.file).read_text() for x in FAULTS)


def test_planted_faults_are_found():
    parts = [x.name for x in FAULTS[::8]]
    planted = [x for x in FAULTS if any(part in x.name for part in parts)]
    command = [sys.executable, Path(__file__).with_name("hopper_faults.py"), *parts]
    run = subprocess.run(command, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    missed = [line for line in lines if line.startswith("MISSED")]
    assert not missed and run.returncode == 0, "\n".join([*missed, run.stderr])
    assert len(re.findall("^found", run.stdout, flags=re.M)) == len(planted)
