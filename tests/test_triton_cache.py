"""Threads that compile at once, and caches that are damaged or somebody else's. Numbers: DESIGN.md's fault list.

Triton compiles for a GPU that need not be here, but not beside the interpreter of the other tests: one subprocess.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lr_kernels.triton.cache import check_cache_folder

ROOT = Path(__file__).parent.parent


def environment(cache: Path) -> dict[str, str]:
    """Of a process that compiles into that folder."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict:
    command = [sys.executable, str(Path(__file__).with_name("triton_cache_process.py"))]
    cache = tmp_path_factory.mktemp("cache")
    cache.chmod(0o700)
    run = subprocess.run(command, env=environment(cache), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.fault(number=38)
def test_sixteen_threads_that_call_first_get_their_own_results(counted):
    assert counted["cpu"]
    assert counted["triton"]["launched"] == counted["triton"]["own"] == 16


@pytest.mark.fault(number=38)
def test_sixteen_threads_compile_and_load_a_kernel_once(counted):
    """Triton alone compiles and loads it sixteen times."""
    assert (counted["triton"]["compiled"], counted["triton"]["found"], counted["triton"]["loaded"]) == (1, 0, 1)


@pytest.mark.fault(number=39)
@pytest.mark.fault(number=40)
def test_a_damaged_cache_is_compiled_again_once_and_is_whole_after_it(counted):
    damage = counted["damage"]
    first, last = damage.pop("first"), damage.pop("last")
    assert first["compiled"] == 1
    assert (last["compiled"], last["found"]) == (0, 1)  # what the calls before left is read
    assert len(damage) == 9
    for kind, call in damage.items():
        assert (call["compiled"], call["loaded"], call["launched"]) == (1, 1, 1), kind


@pytest.mark.fault(number=39)
def test_a_damaged_kernel_is_told(counted):
    """Where Triton itself sees that the entry is incomplete, it compiles without a word."""
    told = {kind for kind, call in counted["damage"].items() if call["told"]}
    names = ("small_kernel.json", "small_kernel.cubin")
    assert told == {f"{name}, {kept} of it left" for name in names for kept in ("none", "half")} | {"other metadata"}
    assert "small_kernel was damaged in Triton's cache" in counted["damage"]["other metadata"]["told"][0]


OTHERS = {0o770: "mode 770", 0o707: "mode 707", 0o777: "mode 777"}


@pytest.mark.parametrize("mode", OTHERS, ids=lambda mode: f"{mode:o}")
@pytest.mark.fault(number=41)
def test_a_cache_that_others_may_write_is_refused(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid)
    tmp_path.chmod(mode)
    if tmp_path.stat().st_gid == tmp_path.stat().st_uid != 0 and mode == 0o770:
        check_cache_folder(tmp_path)  # the user's own group
        return
    with pytest.raises(RuntimeError, match=rf"may be written by others \({OTHERS[mode]}\); chmod go-w"):
        check_cache_folder(tmp_path)


@pytest.mark.fault(number=41)
def test_a_cache_of_another_user_is_refused(tmp_path, monkeypatch):
    check_cache_folder(tmp_path / "not there yet")
    tmp_path.chmod(0o755)
    check_cache_folder(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(RuntimeError, match=r"belongs to user \d+, this process to user \d+; set TRITON_CACHE_DIR"):
        check_cache_folder(tmp_path)


@pytest.mark.fault(number=41)
def test_nothing_of_triton_runs_from_such_a_cache(tmp_path):
    tmp_path.chmod(0o777)
    command = [sys.executable, "-c", "import lr_kernels.triton"]
    run = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert f"lr_kernels.triton: the cache of compiled kernels {tmp_path} may be written by others" in run.stderr
