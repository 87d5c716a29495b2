"""The ladder under docs/ladder: every step compiles and is right, and its pages show and name what is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
LADDER = ROOT / "docs" / "ladder"
PAGES = {"cpu.md": "cpu", "triton.md": "triton"}
CPU_STEPS = sorted(x.stem for x in (LADDER / "cpu").glob("[0-9]*.cpp"))
TRITON_STEPS = sorted(x.stem for x in (LADDER / "triton").glob("[0-9]*.py"))


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(LADDER))
    import cpu_steps

    if cpu_steps.compiler() is None:
        pytest.skip("no C++ compiler")
    return cpu_steps


@pytest.fixture
def interpreted(monkeypatch, device):
    if device != "cpu":
        pytest.skip("the steps are counted in Triton's interpreter")
    monkeypatch.syspath_prepend(str(LADDER))
    import triton_steps

    return triton_steps


def flags(cpu, step: str) -> tuple[str, ...]:
    return cpu.emulated() if step == "5_tiles" else ()


@pytest.mark.parametrize("step", CPU_STEPS)
def test_a_cpu_step_matches_the_reference(cpu, step):
    for queries, d, keys, visible in ((70, 40, (100, 90), 0.5), (33, 37, (1, 300), 0.3), (1, 64, (7, 5), 0.0)):
        cpu.check(step, cpu.make_inputs(queries, 2, d, keys, visible), flags(cpu, step))


@pytest.mark.parametrize("step", CPU_STEPS)
def test_a_cpu_step_takes_logits_far_above_its_first(cpu, step):
    inputs = cpu.make_inputs(queries=40, heads=1, d=40, keys=(300, 40), visible=0.5)
    inputs.query *= 80
    cpu.check(step, inputs, flags(cpu, step))


def test_the_tiles_of_the_processor_compile_and_are_right_where_there_are_some(cpu):
    if not cpu.machine_is_x86():
        pytest.skip("AMX is an extension of x86-64")
    if cpu.has_amx():
        cpu.check("5_tiles", cpu.make_inputs(70, 2, 40, (100, 90), 0.5), cpu.TILES)
    else:
        assert hasattr(cpu.build("5_tiles", cpu.TILES), "attend")


@pytest.mark.parametrize("step", TRITON_STEPS)
def test_a_triton_step_matches_the_reference(interpreted, step):
    from triton_problem import make_inputs

    tile = {} if step == "1_one_query" else {"BM": 16, "BN": 16}
    interpreted.count(step, *make_inputs(queries=20, keys=120, heads=2, d=16), **tile)


def test_what_a_triton_step_changes_is_counted(interpreted):
    from triton_problem import make_inputs

    query, sources = make_inputs(queries=32, keys=160, heads=1, d=16)
    _, tiles, joined, lists, ahead = (interpreted.count(step, query, sources) for step in TRITON_STEPS)
    visible = -(-int(sources[1].key_mask.sum()) // 32)
    assert tiles["copied"] and not joined["copied"]
    assert [c["key tiles"] for c in (tiles, joined, lists, ahead)] == [3 * 6, 3 + 2 * 5, *[3 + 2 * visible] * 2]
    assert lists["products in tl.dot"] == 2 * lists["key tiles"] * 32 * 32 * 16
    assert ahead["masked scores"] < lists["masked scores"] and not ahead["exp"]


def test_the_triton_steps_compile_for_a_gpu_that_is_not_here():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", str(LADDER / "compile_steps.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(step in run.stdout for step in TRITON_STEPS)


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("page", PAGES)
def test_every_excerpt_of_a_page_is_in_a_step(page):
    files = [words(x.read_text()) for x in (LADDER / PAGES[page]).iterdir() if x.is_file()]
    excerpts = re.findall(r"^```(?:cpp|python)\n(.*?)^```", (LADDER / page).read_text(), flags=re.M | re.S)
    assert len(excerpts) >= 5
    for excerpt in excerpts:
        assert any(words(excerpt) in file for file in files), excerpt


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_the_library_on_a_page_is_in_the_file_it_is_named_beside(page):
    text = (LADDER / page).read_text()
    lists = re.findall(r"`((?:csrc|lr_kernels)/[\w/.]+)`((?:: |, )?(?:`\w+`(?:, )?)*)", text)
    assert len(lists) >= 8
    for path, names in lists:
        assert (ROOT / path).is_file(), path
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{path}: {name}"


def test_links_of_the_ladder_lead_somewhere():
    for page in LADDER.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_every_step_is_in_the_table_that_run_py_writes(page):
    tables = re.findall(r"<!-- \w+ -->\n(.*?)<!-- end -->", (LADDER / page).read_text(), flags=re.S)
    for step in CPU_STEPS if page == "cpu.md" else TRITON_STEPS:
        assert f"[{step}](" in tables[0]


def test_the_steps_of_both_ladders_are_those_of_their_runners(cpu, interpreted):
    assert list(cpu.STEPS) == CPU_STEPS and list(interpreted.STEPS) == TRITON_STEPS
    assert cpu.dtype_of("5_tiles") == torch.bfloat16
