"""The emulator of the Hopper attention finds faults: each line that hopper_faults.py breaks must show.

The hunt runs in a process of its own, since a process can load one emulator.
"""

import re
import subprocess
import sys
from pathlib import Path

from hopper_faults import FAULTS


def test_every_planted_fault_is_found():
    assert len(FAULTS) >= 40
    assert len({x.name for x in FAULTS}) == len(FAULTS)
    run = subprocess.run([sys.executable, Path(__file__).with_name("hopper_faults.py")], capture_output=True, text=True)
    lines = run.stdout.splitlines()
    missed = [line for line in lines if line.startswith("MISSED")]
    assert not missed and run.returncode == 0, "\n".join([*missed, run.stderr])
    assert len(re.findall("^found", run.stdout, flags=re.M)) == len(FAULTS)
