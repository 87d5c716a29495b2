"""The CUDA C++ kernels without a GPU: compiled by nvcc where it is there, their machine code read, their sources
linted."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lr_kernels.triton.report import _TOOLS

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")


@pytest.fixture(scope="module", params=["80", "90a"])
def machine_code(request, tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Per source: (resource usage, disassembly) for one architecture."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    found = {}
    for source in SOURCES:
        cubin = tmp_path_factory.mktemp("cuda") / f"{source.stem}.cubin"
        target = f"-gencode=arch=compute_{request.param},code=sm_{request.param}"
        command = [NVCC, "-std=c++17", "-O3", "-Werror=all-warnings", "-I", str(ROOT / "csrc"), target, "-cubin"]
        run = subprocess.run([*command, "-o", str(cubin), str(source)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr + run.stdout
        found[source.stem] = tuple(
            subprocess.run([str(_TOOLS / tool), option, str(cubin)], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return found


def functions(sass: str) -> dict[str, str]:
    """Kernel name -> its instructions."""
    parts = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", sass, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


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
    assert sorted(launchers) == sorted(f"{source.stem}_cuda" for source in SOURCES)
    for function in re.split(r"\n}\n", binding):
        for call in re.finditer(r"lr::\w+_cuda\(p\)", function):
            before = function[: call.start()]
            assert re.search(r"const OnDevice device\(\w+\);\s+p\.stream = device\.stream\(\);", before)


@pytest.mark.fault(number=20)
def test_every_launch_names_its_stream():
    for source in SOURCES:
        launches = re.findall(r"<<<(.+?)>>>", source.read_text(), flags=re.S)
        assert launches, source
        assert all(launch.rstrip().endswith("p.stream") for launch in launches), source


@pytest.mark.fault(number=21)
def test_every_launch_is_checked():
    for source in SOURCES:
        after = re.findall(r"<<<.+?>>>\(.*?\);\s*(.+)", source.read_text(), flags=re.S)
        assert after and all(rest.startswith("return launch_error();") for rest in after), source
    binding = (ROOT / "bindings" / "cuda.cpp").read_text()
    checks = re.findall(r'STD_TORCH_CHECK\(!error, "lr_kernels\.(\w+): (\w+): ", error\)', binding)
    assert sorted(checks) == sorted((source.stem, f"{source.stem}_kernel") for source in SOURCES)


@pytest.mark.fault(number=22)
def test_nothing_synchronizes_or_allocates():
    for source in [*SOURCES, ROOT / "bindings" / "cuda.cpp"]:
        assert not re.search(r"Synchronize|cudaMalloc|cudaMemcpy|item\(", source.read_text()), source
