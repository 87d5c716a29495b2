"""One of the processes of tests/test_context_parallel.py, a card each: runs the cases of its group on gloo and saves
what it found. Arguments: rank, number of processes, folder."""

import datetime
import os
import sys
import traceback
from pathlib import Path

import torch
from parallel_cases import CASES, REFUSALS
from torch import distributed

from lr_kernels.diffusers import register_attention_backend


def what_it_finds(run) -> dict:
    """The tensors of a case, or its error."""
    try:
        return run()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    register_attention_backend()
    if not torch.accelerator.is_available():  # `enable_parallelism` divides by it
        torch.accelerator.device_count = lambda: world
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    patience = datetime.timedelta(seconds=60)
    meeting = f"file://{folder / f'meeting-{world}'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=patience)
    found = {}
    for name, case in {**CASES, **REFUSALS}.items():
        if case.world == world:
            found[name] = what_it_finds(case.here)
            distributed.barrier()
    torch.save(found, folder / f"found-{world}-{rank}")
    distributed.destroy_process_group()
