"""The torch ops: one schema per operator, one op per implementation of it, and the loading of the compiled extension.

Every op writes into preallocated outputs and returns nothing, so one no-op fake serves all of them. Names are
`lr_kernels::<operator>_<backend>`; the C++ extension implements `_cpu`, its CUDA part `_cuda`, `lr_kernels.triton`
`_triton`.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .installation import why_not_built

# B query rows of N tokens, S sources of R rows and M keys, C query classes (see plan.py), G softmax groups
_ATTENTION_INPUTS = (
    "Tensor query, Tensor[] key, Tensor[] value, "  # (B, N, H, D), S x (R, M, H, D)
    "Tensor?[] rows, "  # int32 (B,)
    "Tensor?[] key_index, Tensor?[] key_count, "  # int32 (C or 1, R or 1, M), (C or 1, R or 1)
    "Tensor?[] value_index, "  # int32 (R or B or 1, M)
    "Tensor?[] key_bias, "  # fp32 (R or 1, M)
    "Tensor?[] logit_scale, Tensor?[] logit_bias, "  # fp32 (B, H), strides free
    "Tensor? query_order, Tensor? class_start, "  # int32 (B or 1, N), (B or 1, C + 1)
)

SCHEMAS = {
    "multi_source_attention": f"({_ATTENTION_INPUTS}"
    "int[] softmax_group, Tensor?[] weight, "  # S numbers that ascend from 0 to G - 1, G x fp32 (B, N), strides free
    "float scale, Tensor(a!) out, Tensor(b!)? lse) -> ()",  # (B, N, H, D), fp32 or fp64 (B, N, H), which needs G = 1
    # of one softmax group without weight; out and lse (fp64) are those of the forward pass
    "multi_source_attention_backward": "(Tensor grad_out, Tensor? grad_lse, "  # (B, N, H, D), fp32 (B, N, H)
    f"{_ATTENTION_INPUTS}float scale, Tensor out, Tensor lse, "
    "Tensor(a!) grad_query, "  # (B, N, H, D) contiguous
    "Tensor(b!)[] grad_key, Tensor(c!)[] grad_value, "  # S x fp32 (R, M, H, D) contiguous, added to
    "Tensor(d!)[] grad_key_bias) -> ()",  # S x fp32 (H, R or 1, M) contiguous, added to; empty: not wanted
    "attention_with_token_maps": "("
    "Tensor query, Tensor key, Tensor value, Tensor token_indices, "  # (B, N, H, D), (B, M, H, D) x 2, int32 (B, T)
    "float scale, Tensor(a!) out, Tensor(b!) maps) -> ()",  # (B, N, H, D), fp32 (B, N, T)
    "subject_mask": "("
    "Tensor maps, float? threshold, float? quantile, int smoothing, "  # fp32 (B, L, h, w), both None: Otsu
    "Tensor(a!) out) -> ()",  # bool (B, H, W)
    "step_blend": "("
    "Tensor sample, Tensor[] predictions, "  # (B, C, h, w) each
    "Tensor coefficients, Tensor? step, int row, "  # fp32 (steps, B or 1, K + 9), int32 (1,); None: step is `row`
    "Tensor? mask, Tensor? background, Tensor? noise, Tensor? history, "  # fp32 (B or 1, h, w), (B, C, h, w) x 3
    "Tensor? keep_rows, Tensor(a!) out, "  # bool (B,), (B, C, h, w)
    "Tensor(b!)? model_input, Tensor(c!)? history_out) -> ()",  # (n * B, C, h, w), (B, C, h, w)
    "compact_keys": "("
    "Tensor? mask, Tensor? groups, int[] classes, "  # bool (R or 1, M), uint8 (R or 1, M), C query group bytes
    "Tensor(a!) index, Tensor(b!) count) -> ()",  # int32 (C, R, M), (C, R)
    "merge_attention_states": "("
    "Tensor[] outs, Tensor[] lses, "  # K x (B, N, H, D), K x fp32 (B, N, H)
    "Tensor(a!) out, Tensor(b!) lse) -> ()",
    "adain": "("
    "Tensor x, Tensor reference, "  # (B, N, H, D), (B or 1, M, H, D)
    "Tensor? mask, Tensor? reference_mask, "  # bool (B or 1, N), (B or 1, M), tokens contiguous
    "float eps, Tensor(a!) out) -> ()",
    "correspondence": "("
    "Tensor target, Tensor reference, "  # (B, N, C), (B or 1, M, C)
    "int columns, Tensor radius_squared, "  # of the target's grid; int64 (B,) or (1,), in its cells
    "Tensor(a!) index, Tensor(b!) consistent) -> ()",  # int64 (B, N), bool (B, N)
}

ERRORS_REACH_PYTHON = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 13)
"""Whether an error raised by the C++ extension does: with torch 2.11 it crashes the process in torch's boxed kernel.
There the checks in Python always come first."""

_library = torch.library.Library("lr_kernels", "DEF")


def _define(name: str, schema: str) -> None:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"lr_kernels::{name}", lambda *args: None, lib=_library)


OPERATORS_WITH_CUDA = frozenset({"step_blend", "compact_keys"})
"""Those with a CUDA C++ kernel: small ones, whose time on a GPU is that of the launch."""

for _operator, _schema in SCHEMAS.items():
    for _backend in ("cpu", "triton"):
        _define(f"{_operator}_{_backend}", _schema)
    if _operator in OPERATORS_WITH_CUDA:
        _define(f"{_operator}_cuda", _schema)


class AttentionTables(NamedTuple):
    """The arguments of multi_source_attention between query and out, in the order of its schema."""

    key: Sequence[Tensor]
    value: Sequence[Tensor]
    rows: Sequence[Tensor | None]
    key_index: Sequence[Tensor | None]
    key_count: Sequence[Tensor | None]
    value_index: Sequence[Tensor | None]
    key_bias: Sequence[Tensor | None]
    logit_scale: Sequence[Tensor | None]
    logit_bias: Sequence[Tensor | None]
    query_order: Tensor | None
    class_start: Tensor | None
    softmax_group: Sequence[int]
    weight: Sequence[Tensor | None]
    scale: float


def attention_op(backend: str) -> Callable[..., None]:
    """multi_source_attention of a kernel backend."""
    return _kernel("multi_source_attention", backend)


def attention_backward_op(backend: str) -> Callable[..., None]:
    """multi_source_attention_backward of a kernel backend."""
    return _kernel("multi_source_attention_backward", backend)


def _kernel(operator: str, backend: str) -> Callable[..., None]:
    if backend == "triton":
        from . import triton  # noqa: F401  (registers the Triton implementations)
    return getattr(torch.ops.lr_kernels, f"{operator}_{backend}")


def _load_extension(folder: Path) -> tuple[str | None, str | None]:
    """Load `_C.so` and `_C_cuda.so` from `folder`. Returns None, or why they are not available, of each."""
    library, cuda, record = folder / "_C.so", folder / "_C_cuda.so", folder / "_build.json"
    if not library.exists():
        reason = why_not_built(folder)
        return reason, reason
    build = json.loads(record.read_text())
    running, minimum = torch.__version__, build["torch_minimum"]
    built_for = f"built with torch {build['torch']} for torch >= {minimum}, running torch {running}"
    if tuple(int(x) for x in running.split(".")[:2]) < tuple(int(x) for x in minimum.split(".")):
        reason = f"the C++ extension does not fit: {built_for}"
        return reason, reason
    reasons: list[str | None] = []
    for path in (library, cuda):
        try:
            if not path.exists():
                reasons.append("the package was installed without its CUDA C++ extension (no nvcc at build time)")
                continue
            torch.ops.load_library(str(path))
            reasons.append(None)
        except OSError as error:
            reasons.append(f"the C++ extension does not load ({error}): {built_for}")
    return reasons[0], reasons[1]


extension_error, cuda_extension_error = _load_extension(Path(__file__).parent)
"""None where the compiled kernels, of the CPU and CUDA C++, are loaded, else the reason."""

if extension_error is not None:
    warnings.warn(f"lr_kernels: no compiled CPU kernels: {extension_error}", RuntimeWarning, stacklevel=2)
