"""Compiles the steps of the Triton ladder for a GPU that need not be there and prints the lines of a table.

A process of its own, without TRITON_INTERPRET: the compiler cannot run beside the interpreter.
"""

import re

import triton
import triton_steps
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_problem import make_inputs

ARCHITECTURE = 90
STAGES = 3


class Recorder:
    """Stands for a kernel and keeps the arguments of its launch."""

    def __getitem__(self, grid: tuple):
        def keep(*arguments, **constants) -> None:
            self.arguments, self.constants = arguments, constants

        return keep


def signature_of(x):
    """Triton's type of an argument."""
    if isinstance(x, tuple):
        return tuple(signature_of(y) for y in x)
    if isinstance(x, Tensor):
        return {"torch.float32": "*fp32", "torch.int32": "*i32", "torch.bool": "*i1"}[str(x.dtype)]
    return "fp32" if isinstance(x, float) else "i32"


def paths_of(x, path: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Where tensors stand in an argument."""
    if isinstance(x, tuple):
        return [found for i, y in enumerate(x) for found in paths_of(y, (*path, i))]
    return [path] if isinstance(x, Tensor) else []


def compiled(step: str):
    """The compiled kernel of a step, its tensors aligned to 16 bytes."""
    module, recorder = triton_steps.load(step), Recorder()
    kernel, module.attention_kernel = module.attention_kernel, recorder
    module.attend(*make_inputs())
    names = kernel.arg_names
    signature = dict(zip(names, map(signature_of, recorder.arguments))) | dict.fromkeys(recorder.constants, "constexpr")
    constants = {(names.index(name),): value for name, value in recorder.constants.items()}
    aligned = [path for i, x in enumerate(recorder.arguments) for path in paths_of(x, (i,))]
    source = ASTSource(kernel, signature, constants, {path: [["tt.divisibility", 16]] for path in aligned})
    options = {"num_warps": 4, "num_stages": STAGES, "enable_fp_fusion": True}
    return triton.compile(source, GPUTarget("cuda", ARCHITECTURE, 32), options)


def table() -> list[str]:
    """How far ahead each step copies keys and values, read from its compiled code -> the lines of the page's table."""
    lines = ["| | " + " | ".join(triton_steps.STEPS) + " |", "|---" * (len(triton_steps.STEPS) + 1) + "|"]
    kernels = [compiled(step) for step in triton_steps.STEPS]
    waits = [re.findall(r"cp\.async\.wait_group\s+(\d+)", kernel.asm["ptx"]) for kernel in kernels]
    under_way = ["–" if not found else max(found, key=int) for found in waits]
    lines.append("| groups of copies still under way where the loop waits for one | " + " | ".join(under_way) + " |")
    shared = [f"{kernel.metadata.shared / 1024:.1f}" for kernel in kernels]
    lines.append("| shared memory of a program, KiB | " + " | ".join(shared) + " |")
    about = f"Compiled for sm_{ARCHITECTURE} by Triton {triton.__version__}, {STAGES} stages, 4 warps; nothing was run."
    return [*lines, "", about]


if __name__ == "__main__":
    print("\n".join(table()))
