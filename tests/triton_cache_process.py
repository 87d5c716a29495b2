"""Run by test_triton_cache.py in a process of its own, without the interpreter: Triton compiles for a GPU that is not
here, as for one that is; only the driver, which would load and launch, is a stand-in. Prints what was counted."""

import json
import os
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import lr_kernels as lr
from lr_kernels.triton import cache, merge

THREADS = 16
counted = {"compiled": 0, "found": 0, "loaded": 0, "launched": []}


class Utils:
    """The driver's functions. The real loader gives up the interpreter's lock too."""

    @staticmethod
    def load_binary(name, image, shared, device):
        time.sleep(0.05)
        counted["loaded"] += 1
        return "module", "function", 32, 0, 1024

    @staticmethod
    def unload_module(module):
        pass

    @staticmethod
    def get_device_properties(device):
        return {"max_shared_mem": 232_448}


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        assert function == "function"
        counted["launched"].append(arguments)


class Driver:
    utils, launcher_cls = Utils, Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def listener(*, src, metadata, metadata_group, times, cache_hit):
    counted["found" if cache_hit else "compiled"] += 1


def at_once(call) -> list:
    """The results of `call(i)` in 16 threads that start together."""
    start, results = threading.Barrier(THREADS), [None] * THREADS

    def run(i):
        start.wait()
        results[i] = call(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@triton.jit
def small_kernel(x, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x + at, tl.load(x + at) + 1)


def race_cpu() -> bool:
    x = [torch.randn(2, 9, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(THREADS)]
    found = at_once(lambda i: lr.multi_source_attention(x[i], [lr.Source(x[i], x[i])], backend="cpu"))
    alone = [lr.multi_source_attention(y, [lr.Source(y, y)], backend="cpu") for y in x]
    return all(y is not None and torch.equal(y, z) for y, z in zip(found, alone))


def race_triton() -> dict:
    outs, lses = ([torch.randn(1, 4, 1, n) for _ in range(2)] for n in (16, 1))
    results = [(torch.empty(1, 4, 1, 16), torch.empty(1, 4, 1)) for _ in range(THREADS)]
    at_once(lambda i: merge.merge_attention_states_triton(outs, [x[..., 0] for x in lses], *results[i]))
    pointers = [{y.data_ptr() for y in x if isinstance(y, torch.Tensor)} for x in counted["launched"]]
    own = sum(any(out.data_ptr() in x for x in pointers) for out, _ in results)
    return {**counted, "launched": len(counted["launched"]), "own": own}


def call_anew() -> dict:
    """The kernel's next call in a process that has not called it yet."""
    small_kernel.device_caches.clear()
    counted.update(compiled=0, found=0, loaded=0, launched=[])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        small_kernel[(1,)](torch.zeros(16), 16)
    told = [str(w.message) for w in seen if "lr_kernels" in str(w.message)]
    return {**counted, "launched": len(counted["launched"]), "told": told}


def damage(folder: Path) -> dict:
    """What the call after each kind of damage did, and the call after that one."""
    before, found = set(folder.iterdir()), {}
    found["first"] = call_anew()
    (entry,) = set(folder.iterdir()) - before
    group = entry / "__grp__small_kernel.json"
    for name in ("small_kernel.json", "small_kernel.cubin", group.name):
        path = entry / name
        for kept in ("none", "half"):
            path.write_bytes(path.read_bytes()[: 0 if kept == "none" else path.stat().st_size // 2])
            found[f"{name}, {kept} of it left"] = call_anew()
    (entry / "small_kernel.json").write_text("{}")
    found["other metadata"] = call_anew()
    (entry / "small_kernel.cubin").unlink()
    found["no binary"] = call_anew()
    group.unlink()  # what a process leaves that is killed: files, a folder of its own, no list
    (entry / "tmp.pid_1_killed").mkdir()
    (entry / "tmp.pid_1_killed" / "small_kernel.json").write_text("{")
    (entry / "lock").write_text("1")
    found["killed, and a lock of another version"] = call_anew()
    found["last"] = call_anew()
    return found


if __name__ == "__main__":
    driver.set_active(Driver())
    knobs.compilation.listener = listener
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    report = {"cpu": race_cpu(), "triton": race_triton()}
    cache.compile_once(small_kernel)
    json.dump({**report, "damage": damage(folder)}, sys.stdout)
