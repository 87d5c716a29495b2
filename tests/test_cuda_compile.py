"""The CUDA C++ kernels without a GPU: compiled by nvcc where it is there, their machine code read, their sources
linted."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from lr_kernels.triton.report import _TOOLS

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
SOURCES = [CUDA / "compact_keys.cu", CUDA / "step_blend.cu"]
HOPPER = CUDA / "attention_sm90_kernels.cu"
NVCC = shutil.which("nvcc")


def nvcc(arch: str, source: Path, *options: str) -> str:
    """Compile; returns what ptxas said."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [NVCC, "-std=c++17", "-O3", "-Werror=all-warnings", "-I", str(ROOT / "csrc"), target, *options]
    run = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr + run.stdout
    return run.stderr + run.stdout


@pytest.fixture(scope="module", params=["80", "90a"])
def machine_code(request, tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Per source: (resource usage, disassembly) for one architecture."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    found = {}
    for source in SOURCES:
        cubin = tmp_path_factory.mktemp("cuda") / f"{source.stem}.cubin"
        nvcc(request.param, source, "-cubin", "-o", str(cubin))
        found[source.stem] = tuple(
            subprocess.run([str(_TOOLS / tool), option, str(cubin)], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return found


def functions(sass: str) -> dict[str, str]:
    """Kernel name -> its instructions."""
    parts = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", sass, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def test_all_sources_are_compiled():
    """Those without kernels are host code: the compiler must take them too."""
    host = {CUDA / "attention_sm90.cu", CUDA / "tensor_maps.cu"}
    assert {*SOURCES, HOPPER, *host} == set(CUDA.glob("*.cu"))
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    for source in host:
        nvcc("90a", source, "-c", "-o", "/dev/null")


@pytest.mark.fault(number=24)
def test_nothing_spills(machine_code):
    for name, (usage, _) in machine_code.items():
        numbers = re.findall(r"STACK:(\d+).*?LOCAL:(\d+)", usage)
        assert numbers and all(stack == local == "0" for stack, local in numbers), name


def test_step_blend_moves_16_bytes_at_a_time(machine_code):
    kernels = functions(machine_code["step_blend"][1])
    wide = {name: code for name, code in kernels.items() if re.search(r"(__half|bfloat16)Li8E|IfLi4E", name)}
    assert len(wide) == 6
    for name, code in wide.items():
        loads, stores = (len(re.findall(rf"\b{x}\.E\.(?:CONSTANT\.)?128\b", code)) for x in ("LDG", "STG"))
        if "plain" in name:  # sample and 6 predictions; out and model_input
            assert loads >= 7 and stores >= 2
        else:  # noise, history, background; history_out
            assert loads >= 10 and stores >= 3


@pytest.mark.fault(number=19)
def test_every_launch_is_on_the_device_of_its_tensors():
    """The launchers know no device: the bindings make it current first, in the object that also knows the stream."""
    binding = (ROOT / "bindings" / "cuda.cpp").read_text()
    launchers = re.findall(r"lr::(\w+_cuda)\(p\)", binding)
    assert sorted(launchers) == ["attention_sm90_cuda", "compact_keys_cuda", "step_blend_cuda"]
    for function in re.split(r"\n}\n", binding):
        for call in re.finditer(r"lr::\w+_cuda\(p\)", function):
            before = function[: call.start()]
            assert re.search(r"const OnDevice device\(\w+\);\s+p\.stream = device\.stream\(\);", before) or (
                "p.stream = device.stream();" in before and "const OnDevice device;" in binding  # a Card has one
            )


LAUNCHES = [*SOURCES, CUDA / "sm90" / "device.h"]
"""The files with a launch; all launches of the Hopper attention go through one."""


@pytest.mark.fault(number=20)
def test_every_launch_names_its_stream():
    assert sorted(LAUNCHES) == sorted(path for path in CUDA.rglob("*.*") if "<<<" in path.read_text())
    for source in LAUNCHES:
        launches = re.findall(r"<<<(.+?)>>>", source.read_text(), flags=re.S)
        assert launches and all(launch.rstrip().endswith("p.stream") for launch in launches), source


@pytest.mark.fault(number=21)
def test_every_launch_is_checked():
    for source in LAUNCHES:
        text = source.read_text().replace("  // clang-format on\n", "")
        after = re.findall(r"<<<.+?>>>\(.*?\);\s*(.+)", text, flags=re.S)
        assert after and all(rest.startswith("return launch_error();") for rest in after), source
    binding = (ROOT / "bindings" / "cuda.cpp").read_text()
    checks = re.findall(r'STD_TORCH_CHECK\(!error, "lr_kernels\.(\w+): (\w+): ", error\)', binding)
    assert sorted(checks) == [
        ("compact_keys", "compact_keys_kernel"), ("multi_source_attention", "attention_sm90"),
        ("step_blend", "step_blend_kernel"),
    ]  # fmt: skip


@pytest.mark.fault(number=22)
def test_nothing_synchronizes_or_allocates():
    for source in [*(x for x in CUDA.rglob("*.*")), ROOT / "bindings" / "cuda.cpp"]:
        assert not re.search(r"Synchronize|cudaMalloc|cudaMemcpy|item\(", source.read_text()), source


# ---- The Hopper attention


class Kernel(NamedTuple):
    """What the compiler made of one configuration."""

    ptxas: str
    instructions: list[str]
    """in order; labels end with a colon"""


@pytest.fixture(scope="module", params=[40, 64, 80, 128, 160, 256])
def hopper_kernels(request, tmp_path_factory) -> dict[str, Kernel]:
    """By name, the kernels of one head_dim: bf16 and fp16, plain and general."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    cubin = tmp_path_factory.mktemp("hopper") / "kernels.cubin"
    said = nvcc("90a", HOPPER, f"-DLR_HEAD_DIM={request.param}", "-cubin", "-Xptxas", "-v", "-o", str(cubin))
    sass = subprocess.run([str(_TOOLS / "nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True)
    by_name = dict(part.split("'", 1) for part in said.split("Compiling entry function '")[1:])
    line = re.compile(r"^\s*(\.L_x_\d+:)|^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", flags=re.M)
    found = {}
    for name, code in functions(sass.stdout).items():
        if "attention_kernel" in name:
            found[name] = Kernel(by_name[name], ["".join(match) for match in line.findall(code)])
    assert len(found) == 4
    return found


@pytest.mark.fault(number=24)
def test_hopper_kernels_do_not_spill(hopper_kernels):
    for name, kernel in hopper_kernels.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel.ptxas, name
        assert not any(re.search(r"\b(STL|LDL)\b", x) for x in kernel.instructions), name


def test_hopper_products_are_not_serialized(hopper_kernels):
    """ptxas warns with C75xx where it waits for each wgmma before it issues the next."""
    for name, kernel in hopper_kernels.items():
        assert "C75" not in kernel.ptxas, kernel.ptxas
        loop = main_loop(kernel.instructions)
        assert sum("WARPGROUP.ARRIVE" in x for x in loop) == 1, name


def test_hopper_softmax_runs_beside_the_values(hopper_kernels):
    """In the main loop: all products, the wait for the scores, all exponentials, and only then that for the values."""
    for name, kernel in hopper_kernels.items():
        loop = main_loop(kernel.instructions)
        products = places(loop, "HGMMA")
        exponentials = places(loop, "MUFU.EX2")
        (scores,), (values,) = places(loop, "DEPBAR.LE gsb0, 0x1"), places(loop, "DEPBAR.LE gsb0, 0x0")
        assert products[-1] < scores < exponentials[0] and exponentials[-1] < values, name
        assert len(exponentials) >= 16 + 2, name


@pytest.mark.fault(number=24)
def test_hopper_roles_stay_within_their_registers(hopper_kernels):
    """setmaxnreg leaves the producer fewer registers than the kernel was compiled for; ptxas must have obeyed."""
    for name, kernel in hopper_kernels.items():
        for what in ("DEALLOC", "TRY_ALLOC"):
            (start,) = places(kernel.instructions, f"USETMAXREG.{what}")
            limit = int(re.search(r"0x([0-9a-f]+)", kernel.instructions[start])[1], 16)
            reached = reachable(kernel.instructions, start)
            used = {int(n) for i in reached for n in re.findall(r"\bR(\d+)\b", kernel.instructions[i])}
            assert max(used) < limit, (name, what)
            assert any("HGMMA" in kernel.instructions[i] for i in reached) == (what == "TRY_ALLOC"), name


def reachable(code: list[str], start: int) -> set[int]:
    """The instructions that can follow `start`."""
    labels = {x[:-1]: i for i, x in enumerate(code) if x.endswith(":")}
    seen: set[int] = set()
    todo = [start]
    while todo:
        i = todo.pop()
        while i < len(code) and i not in seen:
            seen.add(i)
            todo += [labels[target] for target in re.findall(r"`\((\.L_x_\d+)\)", code[i])]
            if re.match(r"EXIT|RET|BRA(\.U)? `", code[i]):
                break
            i += 1
    return seen


def places(code: list[str], what: str) -> list[int]:
    return [i for i, x in enumerate(code) if what in x]


def main_loop(code: list[str]) -> list[str]:
    """The shortest loop with products of scores and of values."""
    labels = {x[:-1]: i for i, x in enumerate(code) if x.endswith(":")}
    loops = []
    for i, x in enumerate(code):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", x)
        if target and labels[target[1]] < i:
            body = code[labels[target[1]] : i + 1]
            if len(places(body, "HGMMA")) > 4:
                loops.append(body)
    return min(loops, key=len)
