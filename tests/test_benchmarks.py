"""What the benchmarks measure and write, on work of known size."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import harness, operators, readme, table
from benchmarks.harness import OURS, Contender, NotRun, Problem
from benchmarks.target import FLOOR, Target
from lr_kernels.runtime.schemas import SCHEMAS


def refuse():
    raise NotRun("no such thing here")


def problem(visible="100%", share=1.0):
    contenders = {
        OURS: Contender(lambda: None),
        "peer": Contender(lambda: None, threads=1),
        "absent": Contender(refuse),
    }
    return Problem(
        "op", "layer", "model", "1x1", "fp32", 1e9, contenders, lambda *_: 0.5, visible, share, baseline="peer"
    )


def test_rows_table_and_csv(tmp_path):
    rows = harness.measure([problem(), problem("50%", 0.5)], repeats=3)
    machine = harness.machine()
    harness.finish(rows)
    ours, peer, absent = rows[:3]
    assert float(ours["gflops"]) > 0 and float(ours["percent_of_peak"]) > 0 and ours["error_vs_sdpa"] == "1.00"
    assert peer["threads"] == "1" and float(peer["ours_is_faster"]) > 0
    assert absent["not_run"] == "no such thing here" and absent["ms"] == ""
    assert ours["time_vs_share"] == "" and float(rows[3]["time_vs_share"]) > 0
    text = table.markdown(rows, machine)
    assert "absent: not run: no such thing here" in text and len(text.splitlines()) == 6
    table.write_csv(tmp_path / "rows.csv", rows, machine)
    with (tmp_path / "rows.csv").open() as file:
        assert [r["contender"] for r in csv.DictReader(file)] == [OURS, "peer", "absent"] * 2


def test_captions_of_cpu_tables_name_the_instruction_set_and_say_when_bf16_pays():
    for name in ("attention", "operators", "retouch", "price"):
        assert re.search(r"\((baseline|avx2|avx512|avx512bf16|amx)\), \d+ threads", readme.TABLES[name]()), name
    for text in (readme.attention_table(), readme.retouch_table(), table.markdown(*one_row())):
        assert "bf16 pays where the processor multiplies it (avx512bf16, amx)" in text


def one_row():
    rows, machine = harness.measure([problem()], repeats=1), harness.machine()
    harness.finish(rows)
    return rows, machine


def test_when_ours_does_not_run_the_peers_still_count():
    alone = problem()
    alone.contenders[OURS] = Contender(refuse)
    rows = harness.measure([alone], repeats=1)
    machine = harness.machine()
    harness.finish(rows)
    assert rows[1]["ours_is_faster"] == "" and float(rows[1]["ms"]) > 0
    assert "not run: no such thing here, peer takes" in table.markdown(rows, machine)


def test_peak_memory_leaves_out_the_result_and_counts_kept_scratch():
    """In a fresh process; 64 MiB are needed for a while, 32 MiB are returned. The call before the measured ones, which
    the harness makes too, brings torch's code into memory: megabytes that are none of the call's."""
    code = (
        "import torch\n"
        "from benchmarks.harness import peak_memory\n"
        "call = lambda: torch.ones(2**24).view(2, -1).sum(0)\n"
        "call()\n"
        "for _ in range(2):\n"
        "    print(peak_memory(call))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(60 << 20 < int(line) < 72 << 20 for line in run.stdout.split()), run.stdout


def test_peak_is_that_of_the_threads():
    threads = torch.get_num_threads()
    assert harness.sample_peak("fp32", 1) > 1
    assert torch.get_num_threads() == threads


def test_the_gpu_script_runs_dry(tmp_path):
    """Without a GPU, at toy sizes: every contender is called, nothing is timed, and the CSV says so."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    ran = ("tests", "ceilings", "lse", "layer", "unet", "tiles", "operators", "report")
    command = [str(root / "benchmarks" / "gpu_run.sh"), "--dry", *ran, "sanitizer"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    with (tmp_path / "parts.csv").open() as file:
        parts = {row["part"]: row["status"] for row in csv.DictReader(file)}
    assert parts == {**dict.fromkeys(ran, "ok"), "sanitizer": "not run"}
    table_of_all = (tmp_path / "table.md").read_text()
    assert "## attention\n\nnot run" in table_of_all and "not run: dry run" in table_of_all
    with (tmp_path / "operators.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == set(operators.SMALL)
    assert all(row["ms"] == "" and row["not_run"] for row in rows)
    elsewhere = ("xformers", "scikit-image", "OpenCV", OURS)  # not installed, or without the CUDA C++ extension
    other = {r["op"] + r["contender"]: r["not_run"] for r in rows if r["not_run"] != "dry run"}
    assert all(name.endswith(elsewhere) for name in other), other
    assert {name for name in other if name.endswith(OURS)} <= {"step_blend" + OURS}, other


def test_every_operator_has_problems():
    assert set(operators.OPERATORS) == set(SCHEMAS)


@pytest.mark.parametrize("operator", operators.SMALL)
def test_every_contender_is_right_and_a_wrong_one_is_refused(operator):
    """At toy sizes, uncompiled: what the benchmark checks before it times."""
    for build in operators.SMALL[operator](("fp32", "bf16"), Target(toy=True, compiles=False)):
        for problem in build():
            assert problem.op == operator and next(iter(problem.contenders)) == OURS
            for name, contender in problem.contenders.items():
                try:
                    result = contender.call()
                except NotRun:
                    continue
                assert problem.error(name, result) < 0.1
                if name != "eager" and not name.startswith(FLOOR) and result is not None:
                    with pytest.raises(AssertionError):
                        problem.error(name, wrong(result))


def wrong(result: object) -> object:
    """Every number another one."""
    if isinstance(result, Tensor):
        return ~result if result.dtype == torch.bool else result + 1
    return type(result)(map(wrong, result)) if isinstance(result, (tuple, list)) else result


def test_compiled_peers_are_among_the_contenders_where_wanted():
    """And one that the compiler cannot take is not run, with its reason."""
    line = Target().compiled({"compiled": lambda: torch._dynamo.graph_break()})["compiled"]
    with pytest.raises(NotRun):
        line()
    assert Target(compiles=False).compiled({"compiled": line}) == {}
