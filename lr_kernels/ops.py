"""The torch ops: one schema per operator, one op per implementation of it, and the loading of the compiled extension.

Every op writes into preallocated outputs and returns nothing, so one no-op fake serves all of them. Names are
`lr_kernels::<operator>_<backend>`; the C++ extension implements `_cpu`, `lr_kernels.triton` implements `_triton`.
"""

import json
import warnings
from pathlib import Path

import torch

SCHEMAS = {
    # B queries rows of N tokens, S sources of R rows and M keys, C query classes (see plan.py)
    "multi_source_attention": "("
    "Tensor query, Tensor[] key, Tensor[] value, "  # (B, N, H, D), S x (R, M, H, D)
    "Tensor?[] rows, "  # int32 (B,)
    "Tensor?[] key_index, Tensor?[] key_count, "  # int32 (C or 1, R or 1, M), (C or 1, R or 1)
    "Tensor?[] key_bias, "  # fp32 (R or 1, M)
    "Tensor?[] logit_scale, Tensor?[] logit_bias, "  # fp32 (B, H), strides free
    "Tensor? query_order, Tensor? class_start, "  # int32 (B or 1, N), (B or 1, C + 1)
    "float scale, Tensor(a!) out, Tensor(b!)? lse) -> ()",  # (B, N, H, D), fp32 (B, N, H)
    "attention_with_token_maps": "("
    "Tensor query, Tensor key, Tensor value, Tensor token_indices, "  # (B, N, H, D), (B, M, H, D) x 2, int32 (B, T)
    "float scale, Tensor(a!) out, Tensor(b!) maps) -> ()",  # (B, N, H, D), fp32 (B, N, T)
    "subject_mask": "("
    "Tensor maps, float? threshold, int smoothing, "  # fp32 (B, L, h, w), None: Otsu
    "Tensor(a!) out) -> ()",  # bool (B, H, W)
    "step_blend": "("
    "Tensor sample, Tensor[] predictions, "  # (B, C, h, w) each
    "Tensor coefficients, Tensor step, "  # fp32 (steps, B or 1, K + 4), int32 (1,)
    "Tensor? mask, Tensor? background, Tensor? noise, "  # fp32 (B or 1, h, w), (B, C, h, w) x 2
    "Tensor(a!) out) -> ()",
}

_library = torch.library.Library("lr_kernels", "DEF")


def _define(name: str, schema: str) -> None:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"lr_kernels::{name}", lambda *args: None, lib=_library)


for _operator, _schema in SCHEMAS.items():
    for _backend in ("cpu", "triton"):
        _define(f"{_operator}_{_backend}", _schema)


def _load_extension(folder: Path) -> str | None:
    """Load `_C.so` from `folder`. Returns None, or why the compiled kernels are not available."""
    library, record = folder / "_C.so", folder / "_build.json"
    if not library.exists():
        return "the package was installed without its C++ extension (no compiler at build time)"
    build = json.loads(record.read_text())
    running, minimum = torch.__version__, build["torch_minimum"]
    built_for = f"built with torch {build['torch']} for torch >= {minimum}, running torch {running}"
    if tuple(int(x) for x in running.split(".")[:2]) < tuple(int(x) for x in minimum.split(".")):
        return f"the C++ extension does not fit: {built_for}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the C++ extension does not load ({error}): {built_for}"
    return None


extension_error: str | None = _load_extension(Path(__file__).parent)
"""None where the compiled CPU kernels are loaded, else the reason."""

if extension_error is not None:
    warnings.warn(f"lr_kernels: no compiled CPU kernels: {extension_error}", RuntimeWarning, stacklevel=2)
