"""Builds the C++ extension with CMake, and where nvcc is there and torch is a CUDA build the CUDA C++ extension too;
without a C++ compiler the pure-Python package is installed and says so once."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parent
TORCH_MINIMUM = "2.10"  # the stable ABI that CMakeLists.txt targets


class CMakeBuild(build_ext):
    def run(self) -> None:
        if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
            print("lr_kernels: no C++ compiler: installing without the compiled CPU kernels", file=sys.stderr)
            return
        target = Path(self.get_ext_fullpath("lr_kernels._C")).parent.resolve()
        build = Path(self.build_temp).resolve()
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = [
            *generator,
            f"-DTORCH_INCLUDE_DIRS={';'.join(include_paths())}",
            f"-DTORCH_LIBRARY_DIRS={';'.join(library_paths())}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DLR_CUDA={'ON' if shutil.which('nvcc') and torch.version.cuda else 'OFF'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *configure], check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install", "--parallel"], check=True)
        record = {"torch": torch.__version__, "torch_minimum": TORCH_MINIMUM, "machine": platform.machine()}
        (target / "_build.json").write_text(json.dumps(record))


setup(ext_modules=[Extension("lr_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
