"""The Triton kernels compiled for GPUs that need not be here: resources fit, nothing spills, the right instructions.

The compiler cannot run beside the interpreter of the other tests, so one subprocess measures everything.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from lr_kernels.runtime.schemas import SCHEMAS
from lr_kernels.triton import file_of
from lr_kernels.triton.report import ARCHITECTURES, EIGHT_BIT_KINDS, HEAD_DIMS, RELATED, Row, digest, read
from lr_kernels.triton.tiles import SHARED_MEMORY

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/registers.md").read_text()
NEWEST = f"with Triton {triton.__version__} " in PAGE
TESTED = HEAD_DIMS if NEWEST else (HEAD_DIMS[0], HEAD_DIMS[-1])
"""The head dims in the table. To compile all takes minutes. So with the Triton of docs/registers.md the rows are read
from there, and a few are compiled to compare; with another Triton the smallest and the largest are compiled."""
SMALL = [x for x in SCHEMAS if not x.startswith("multi_source_attention")]


def compiled(*options: object) -> list[Row]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-m", "lr_kernels.triton.report", "--json", *map(str, options)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [Row(**row) for row in json.loads(run.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def table() -> list[Row]:
    return read(PAGE) if NEWEST else compiled("--head-dims", *TESTED)


@pytest.mark.skipif(not NEWEST, reason="docs/registers.md was written with another Triton")
def test_the_table_is_of_this_code(table):
    """All of it was compiled when the code was last changed: python -m lr_kernels.triton.report > docs/registers.md"""
    assert f"for code {digest()};" in PAGE
    again = compiled("--head-dims", HEAD_DIMS[0], HEAD_DIMS[-1], "--architectures", 90)
    assert len(again) > 30 and set(again) <= set(table)


def attention(table: list[Row], arch: int) -> list[Row]:
    return [row for row in table if row.kernel.startswith("attention") and row.arch == arch]


@pytest.mark.fault(number=24)
def test_every_kernel_was_compiled_for_every_architecture(table):
    for arch in ARCHITECTURES:
        names = {row.kernel for row in table if row.arch == arch}
        expected = {f"attention D{D} bf16 {kind}" for D in TESTED for kind in ("dense", "gathered", "grouped")}
        expected |= {"attention D64 fp16 gathered", "attention D64 fp32 gathered", "attention D64 bf16 gathered warped"}
        expected |= {f"attention D{D} bf16 gathered biased" for D in (40, 64)}
        kinds = ("ranged", "blocks shared")
        expected |= {f"attention D{D} bf16 {kind}" for D in (64, 128) for kind in kinds}
        expected |= {f"backward {part} D64 bf16 {kind}" for part in ("query", "source") for kind in kinds}
        expected |= {f"attention D{D} bf16 dense int8" for D in TESTED}
        expected |= {f"attention D64 bf16 {kind}" for kind in EIGHT_BIT_KINDS}
        expected |= {f"backward {part} D{D} bf16" for part in ("query", "source") for D in TESTED}
        expected |= {"token maps D40 bf16", "token maps D160 bf16", "step_blend K4 bf16", "step_blend K6 bf16 full"}
        expected |= {f"subject_mask_{part}" for part in ("mean", "smooth", "otsu")}
        expected |= {f"merge_attention_states K{parts} bf16" for parts in (3, 16)}
        expected |= {f"adain_{part}{kind}" for part in ("statistics", "apply") for kind in ("", " latents")}
        expected |= {f"correspondence_{x} {y}" for x in ("prepare", "best", "check") for y in ("bf16", "fp32")}
        if arch == 90:
            expected |= {f"attention D{D} bf16 few" for D in (64, 80)}
        assert names == expected | {example[0] for operator in SMALL for example in file_of(operator).examples(arch)}
    for arch in RELATED:
        names = {row.kernel for row in table if row.arch == arch}
        assert names == {f"attention D{D} bf16 {kind}" for D in TESTED for kind in ("dense", "gathered")}


@pytest.mark.fault(number=24)
@pytest.mark.parametrize("operator", SMALL)
def test_every_kernel_of_an_operator_is_among_its_examples(operator):
    file = file_of(operator)
    kernels = {name for name in vars(file) if name.endswith("_kernel")}
    assert kernels and {kernel.fn.__name__ for _, kernel, *_ in file.examples(80)} == kernels


@pytest.mark.fault(number=24)
def test_shared_memory_fits(table):
    assert [row for row in table if row.shared > SHARED_MEMORY[row.arch]] == []


@pytest.mark.fault(number=24)
def test_the_mma_tiles_also_fit_the_small_cards(table):
    rows = [row for row in table if row.arch == 80 and row.kernel.startswith(("attention", "backward"))]
    assert [row for row in rows if row.shared > SHARED_MEMORY[89]] == []


@pytest.mark.fault(number=24)
def test_no_inner_loop_touches_local_memory(table):
    """What spills outside them is paid once per source or program."""
    assert [row for row in table if row.loop_spills] == []
    assert [row for row in table if row.stack > 128 or row.registers > 255] == []


def test_hopper_uses_warpgroup_products(table):
    rows = [row for row in table if row.arch == 90 and row.kernel.startswith(("attention", "backward query"))]
    rows = [row for row in rows if "fp32" not in row.kernel]
    assert rows and all(row.wgmma > 0 for row in rows)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_keys_and_values_arrive_by_asynchronous_copies(table, arch):
    rows = attention(table, arch)
    assert rows and all(row.async_copies > 0 for row in rows)
