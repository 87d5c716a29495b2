"""Compile the kernels for GPUs that are not here and read registers, spills and shared memory out of the machine code.

`python -m lr_kernels.triton.report > docs/registers.md` writes the table, `--json` its rows. Needs the compiler, so
TRITON_INTERPRET must not be set.
"""

import argparse
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..runtime.schemas import SCHEMAS, AttentionTables
from . import attention, attention_backward, file_of

ARCHITECTURES = (80, 90, 100)
"""The architectures for which every kernel is compiled: one per family of tiles."""
RELATED = (86, 120)
"""Architectures that take the tiles of sm_80; attention alone is compiled for them. sm_89 gets the same code as
sm_86."""
HEAD_DIMS = (40, 64, 80, 128, 160)
EIGHT_BIT = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
"""Of all sources but the first, where their names are among the features."""
EIGHT_BIT_KINDS = ("gathered e4m3", "gathered biased int8 e4m3", "grouped int8")
PROCESSES = 2

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.bool: "i1"}
_TYPES |= {torch.int64: "i64", torch.uint8: "u8", torch.float64: "fp64", torch.int8: "i8"}


class Row(NamedTuple):
    """One compiled kernel."""

    kernel: str
    arch: int
    tile: str
    """BM x BN, warps, stages"""
    shared: int
    registers: int
    stack: int
    """bytes of stack and local memory"""
    spills: int
    """instructions that touch local memory (STL, LDL)"""
    loop_spills: int
    """those of them in an inner loop, which costs time; outside they are paid once per source or program"""
    async_copies: int
    """LDGSTS"""
    wgmma: int
    """HGMMA"""
    instructions: int


def rows(head_dims: Sequence[int], architectures: Sequence[int]) -> list[Row]:
    """Every kernel on these architectures, compiled by PROCESSES processes; those of attention at these head dims."""
    bf16 = torch.bfloat16
    jobs: list[tuple] = []
    for arch in (x for x in ARCHITECTURES if x in architectures):
        jobs += [(attention_row, arch, D, bf16, kind) for D in head_dims for kind in ("dense", "gathered", "grouped")]
        jobs += [(attention_row, arch, 64, dtype, "gathered") for dtype in (torch.float16, torch.float32)]
        jobs += [(attention_row, arch, D, bf16, "gathered biased") for D in (40, 64)]
        jobs += [(attention_row, arch, 64, bf16, "gathered warped")]
        jobs += [(attention_row, arch, D, bf16, kind) for D in (64, 128) for kind in ("ranged", "blocks shared")]
        jobs += [(attention_row, arch, D, bf16, "dense int8") for D in head_dims]
        jobs += [(attention_row, arch, 64, bf16, kind) for kind in EIGHT_BIT_KINDS]
        jobs += [(backward_rows, arch, D, bf16) for D in head_dims]
        jobs += [(backward_rows, arch, 64, bf16, kind) for kind in ("ranged", "blocks shared")]
        jobs += [(example_rows, arch)]
    for arch in (x for x in RELATED if x in architectures):
        jobs += [(attention_row, arch, D, bf16, kind) for D in head_dims for kind in ("dense", "gathered")]
    if 90 in architectures:
        jobs += [(attention_row, 90, D, bf16, "few") for D in (64, 80)]
    with ProcessPoolExecutor(PROCESSES) as pool:
        futures = [pool.submit(*job) for job in jobs]
        found = [future.result() for future in futures]
    return [row for x in found for row in (x if isinstance(x, list) else [x])]


def attention_row(arch: int, head_dim: int, dtype: torch.dtype, features: str) -> Row:
    """The attention kernel with 3 sources that have row tables and what `features` names."""
    like, tables = attention_case(head_dim, dtype, features)
    if "few" in features:
        like = like[:, :1024]
        tables = tables._replace(key=[like] * len(tables.key), value=[like] * len(tables.value))
    arguments, constants, _ = attention.launch_arguments(like, tables, like, like[..., 0].float(), arch)
    name = f"attention D{head_dim} {_TYPES[dtype]} {features}"
    return measure(name, arch, attention.multi_source_attention_forward_kernel, arguments, constants)


def attention_case(head_dim: int, dtype: torch.dtype, features: str) -> tuple[Tensor, AttentionTables]:
    """(a query, the tables of a call with what `features` names)"""
    B, N, H, S = 2, 4096, 8, 3
    like = torch.empty(B, N, H, head_dim, dtype=dtype, device="meta")
    lists = torch.empty(2, 2, 1, N, dtype=torch.int32, device="meta")
    blocks = torch.empty(N // 128, 1, H, N // 64, dtype=torch.int32, device="meta")
    ranges = torch.empty(1, N, 2, dtype=torch.int32, device="meta")
    per_head = torch.empty(B, H, device="meta")
    per_token = torch.empty(B, N, device="meta")

    def where(feature: str, x: Tensor) -> list[Tensor | None]:
        return [x if feature in features else None] * S

    gathered, grouped = "gathered" in features, "grouped" in features
    blocked = "blocks" in features
    key = [like[:, :, :2] if "shared" in features else like]
    key += [like.to(EIGHT_BIT[x]) for x in features.split() if x in EIGHT_BIT]
    key += [key[-1]] * (S - len(key))
    scale = [None if x.dtype == dtype else torch.empty(B, N, H, device="meta") for x in key]
    return like, AttentionTables(
        key=key,
        value=key,
        rows=[lists[0, 0, 0, :B]] * S,
        key_index=where("blocks", blocks) if blocked else where("gathered", lists),
        key_count=where("blocks", blocks[..., 0]) if blocked else where("gathered", lists[..., 0]),
        key_block=[64 if blocked else 1] * S,
        key_range=where("ranged", ranges),
        value_index=where("warped", lists[0, 0]),
        key_bias=where("biased", per_token),
        logit_scale=where("biased", per_head),
        logit_bias=where("biased", per_head),
        query_order=lists[0, 0] if gathered else None,
        class_start=lists[0, 0] if gathered else None,
        query_block=128 if blocked else 0,
        softmax_group=[0, 0, 1] if grouped else [0] * S,
        weight=[per_token] * 2 if grouped else [None],
        key_scale=scale,
        value_scale=scale,
        scale=head_dim**-0.5,
    )


def backward_rows(arch: int, head_dim: int, dtype: torch.dtype, features: str = "gathered biased") -> list[Row]:
    """Both backward kernels with what `features` names and a gradient of lse; by default with every argument of plain
    masks that takes registers."""
    like, tables = attention_case(head_dim, dtype, features)
    lse = like[..., 0].double()
    single, sums = lse.float(), like.float()
    name = f"D{head_dim} {_TYPES[dtype]}" + ("" if features == "gathered biased" else f" {features}")
    arguments, constants, _ = attention_backward.query_launch(like, single, like, tables, like, lse, like, sums, arch)
    query = measure(
        f"backward query {name}", arch, attention_backward.attention_backward_query_kernel, arguments, constants
    )
    arguments, constants, _ = attention_backward.source_launch(
        like, single, like, tables, 0, sums, sums, sums, single, arch
    )
    source = measure(
        f"backward source {name}", arch, attention_backward.attention_backward_source_kernel, arguments, constants
    )
    return [query, source]


def example_rows(arch: int) -> list[Row]:
    """The kernels of the other operators, at the sizes that their files give."""
    files = [file_of(operator) for operator in SCHEMAS if not operator.startswith("multi_source_attention")]
    examples = [example for file in files for example in file.examples(arch)]
    return [measure(name, arch, kernel, arguments, constants) for name, kernel, arguments, constants in examples]


def measure(name: str, arch: int, kernel, arguments: tuple, constants: dict) -> Row:
    """Compile for an architecture (tensors stand for 16-byte aligned pointers) and read the cubin."""
    names = kernel.arg_names
    given = dict(zip(names, arguments))
    signature: dict = {}
    constexprs: dict = {}
    attributes: dict = {}
    for place, argument in enumerate(names):
        if argument in constants:
            signature[argument], constexprs[(place,)] = "constexpr", constants[argument]
        else:
            aligned = argument not in kernel.do_not_specialize
            signature[argument] = _signature(given[argument], (place,), aligned, constexprs, attributes)
    options = {k: v for k, v in constants.items() if k not in names}
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", arch, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    lines = sass.splitlines()
    numbers = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    count = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("STL", "LDL", "LDGSTS", "HGMMA")}
    tile = " x ".join(str(constants[x]) for x in ("BM", "BN", "BLOCK") if x in constants)
    return Row(
        kernel=name,
        arch=arch,
        tile=f"{tile}, {options['num_warps']} warps, {options.get('num_stages', 1)}",
        shared=compiled.metadata.shared,
        registers=numbers["REG"],
        stack=numbers["STACK"] + numbers["LOCAL"],
        spills=count["STL"] + count["LDL"],
        loop_spills=sum(bool(re.search(r"\b(STL|LDL)\b", lines[i])) for loop in _inner_loops(lines) for i in loop),
        async_copies=count["LDGSTS"],
        wgmma=count["HGMMA"],
        instructions=len(re.findall(r"/\*[0-9a-f]{4,5}\*/", sass)),
    )


def _inner_loops(lines: list[str]) -> list[range]:
    """Line ranges from a label to a branch back to it that hold no other such range."""
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith(".L_")}
    loops = []
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA[^`]*`\((\.L_\w+)\)", line)
        if target and labels.get(target[1], i) < i:
            loops.append(range(labels[target[1]], i + 1))
    return [x for x in loops if not any(x.start <= y.start and y.stop <= x.stop and x != y for y in loops)]


def _signature(x, path: tuple[int, ...], aligned: bool, constexprs: dict, attributes: dict):
    """Type of an argument, with what Triton would specialize it on."""
    if isinstance(x, tuple):
        return tuple(_signature(y, (*path, i), True, constexprs, attributes) for i, y in enumerate(x))
    if x is None:
        constexprs[path] = None
        return "constexpr"
    if isinstance(x, float):
        return "fp32"
    if isinstance(x, Tensor) or (aligned and x % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    return "*" + _TYPES[x.dtype] if isinstance(x, Tensor) else "i32" if abs(x) < 2**31 else "i64"


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def digest() -> str:
    """What identifies the code of the kernels and their tiles: a table holds for one such code."""
    others = {"report.py", "tune.py", "cache.py", "replay.py", "attention_replay.py"}
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if path.name not in others)
    return hashlib.sha256("".join(path.read_text() for path in files).encode()).hexdigest()[:16]


def head() -> str:
    """What stands above the table."""
    return f"""# What each Triton kernel takes

Written by `python -m lr_kernels.triton.report` with Triton {triton.__version__} for code {digest()}; do not edit.
Compiled for cards that need not be there. spills: instructions that touch local memory; loop_spills: those of them in
an inner loop; async_copies, wgmma: copies to shared memory that do not pass registers, products of a warpgroup.
"""


def read(page: str) -> list[Row]:
    """The rows of a page that this module wrote."""
    lines = [x.strip("| ").split(" | ") for x in page.splitlines() if x.startswith("| ")]
    return [Row(kernel, int(arch), tile, *map(int, numbers)) for kernel, arch, tile, *numbers in lines[1:]]


def markdown(table: list[Row]) -> str:
    """The rows as a table."""
    lines = ["| " + " | ".join(Row._fields) + " |", "|---" * len(Row._fields) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in table])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON and not as a table")
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS, help="of the attention kernels")
    everywhere = (*ARCHITECTURES, *RELATED)
    parser.add_argument("--architectures", type=int, nargs="+", default=everywhere, choices=everywhere)
    options = parser.parse_args()
    measured = rows(options.head_dims, options.architectures)
    print(json.dumps([row._asdict() for row in measured]) if options.json else head() + "\n" + markdown(measured))
