"""Builds the C++ extension with CMake, and where nvcc is there and torch is a CUDA build the CUDA C++ extension too;
without a C++ compiler the pure-Python package is installed and says so once."""

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_MINIMUM = "2.10"  # the stable ABI that CMakeLists.txt targets
SETUPTOOLS_MINIMUM = "77"  # reads pyproject.toml's license
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
"""The folders where cmake and ninja are looked for. The folder of this Python is one of them, since it need not be in
PATH: pip may be run by its path."""


def stop(message: str) -> NoReturn:
    """End the build with one line, which pip prints as it is."""
    raise SystemExit(f"lr_kernels: {message}")


def older(version: str, minimum: str) -> bool:
    numbers = [int(x) for x in version.split("+")[0].split(".")[:2] if x.isdecimal()]
    return numbers < [int(x) for x in minimum.split(".")]


def check_environment() -> None:
    """Without build isolation pip installs no build requirements. Name what is missing before setuptools fails without
    saying so."""
    isolated = "or let pip bring what the build needs: pip install ."
    if older(setuptools.__version__, SETUPTOOLS_MINIMUM):
        stop(f"setuptools {setuptools.__version__} is older than {SETUPTOOLS_MINIMUM}: "
             f"pip install -U 'setuptools>={SETUPTOOLS_MINIMUM}', {isolated}")  # fmt: skip
    if importlib.util.find_spec("torch") is None:
        stop(f"the build needs torch: pip install 'torch>={TORCH_MINIMUM}' numpy, {isolated}")
    import torch

    if older(torch.__version__, TORCH_MINIMUM):
        stop(f"torch {torch.__version__} is older than {TORCH_MINIMUM}: pip install -U 'torch>={TORCH_MINIMUM}'")


class CMakeBuild(build_ext):
    def run(self) -> None:
        if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
            print("lr_kernels: no C++ compiler: installing without the compiled CPU kernels", file=sys.stderr)
            return
        cmake = shutil.which("cmake", path=TOOLS)
        if cmake is None:
            stop("the build needs cmake: pip install cmake ninja, or let pip bring it: pip install .")
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        target = Path(self.get_ext_fullpath("lr_kernels._C")).parent.resolve()
        build = Path(self.build_temp).resolve()
        ninja = shutil.which("ninja", path=TOOLS)
        configure = [
            *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            f"-DTORCH_INCLUDE_DIRS={';'.join(include_paths())}",
            f"-DTORCH_LIBRARY_DIRS={';'.join(library_paths())}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DLR_CUDA={'ON' if shutil.which('nvcc') and torch.version.cuda else 'OFF'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(build), *configure],
            [cmake, "--build", str(build), "--target", "install", "--parallel"],
        ):
            if subprocess.run(command).returncode:
                stop(f"cmake failed, and says above why: {shlex.join(command[:5])}")
        record = {"torch": torch.__version__, "torch_minimum": TORCH_MINIMUM, "machine": platform.machine()}
        (target / "_build.json").write_text(json.dumps(record))


check_environment()
setup(ext_modules=[Extension("lr_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
