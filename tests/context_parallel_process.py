"""The processes of tests/test_context_parallel.py, a card each: groups of two and of four run their cases on gloo, and
each saves what it found. Argument: a folder for that.

Importing takes longer than all cases, so one process imports and is forked before it computes anything.
"""

import datetime
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import torch
from parallel_cases import CASES, REFUSALS, SCRIPT
from torch import distributed

from lr_kernels.diffusers import register_attention_backend

PATIENCE = 100
"""Seconds after which a group of processes counts as hanging; half of it: a single exchange."""


def what_it_finds(run) -> dict:
    """The tensors of a case, or its error."""
    try:
        return run()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}


def work(rank: int, world: int, folder: Path) -> None:
    """All cases of one card."""
    torch.set_num_threads(1)
    register_attention_backend()
    if not torch.accelerator.is_available():  # `enable_parallelism` divides by it
        torch.accelerator.device_count = lambda: world
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / f'meeting-{world}'}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=PATIENCE // 2),
    )  # fmt: skip
    os.chdir(folder)
    found = {}
    for name, case in {**CASES, **REFUSALS, "script": SCRIPT}.items():
        if case.world == world:
            found[name] = what_it_finds(case.here)
            distributed.barrier()
    torch.save(found, folder / f"found-{world}-{rank}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    for world in (2, 4):
        group = [fork.Process(target=work, args=(rank, world, Path(sys.argv[1]))) for rank in range(world)]
        for process in group:
            process.start()
        for process in group:
            process.join(PATIENCE)
        if any(process.exitcode != 0 for process in group):
            for process in group:
                process.kill()
            sys.exit(f"of {world} processes these ended: {[process.exitcode for process in group]}")
