"""What a transformer's bank holds, as layers and in a file, and the checks of both."""

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor

from ....runtime.checks import fail
from ....runtime.platform import KERNEL_DTYPES
from ....source import Source
from ...processors.bank_files import are_scales, is_finite, open_file
from ...processors.bank_values import EIGHT_BITS

FORMAT = "lr_kernels.TransformerReferenceBank 1"
DTYPES = (*KERNEL_DTYPES, torch.float64, *EIGHT_BITS)
_FIELDS = ("key", "value", "key_scale", "value_scale")
_ABOUT = ("format", "model", "rotated")
_LONGEST = 200
"""Characters of a layer's or a model's name"""


def tensors_of(source: Source) -> dict[str, Tensor]:
    """The tensors of a bank's source by their field."""
    return {field: x for field in _FIELDS if (x := getattr(source, field)) is not None}


def check_sources(op: str, sources: Mapping[str, Source], ids: Tensor, where: str = "") -> None:
    """ValueError, which names layer and field, unless all layers hold the same rows and tokens in the same dtype.

    Args:
        where: the file, for messages.
    """
    where = f" in {where}" if where else ""
    if not isinstance(sources, Mapping):
        fail(op, "sources", f"a mapping from layers to their Source{where}", type(sources).__name__)
    if not sources:
        fail(op, "layers", f"keys and values of at least one layer{where}", "none")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.float32 or ids.numel() == 0:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        fail(op, "ids", f"fp32 (tokens, axes){where}", got)
    if not bool(ids.isfinite().all()):
        fail(op, "ids", f"finite positions{where}", "NaN or infinity")
    for layer, source in sources.items():
        if not _is_layer(layer):
            fail(op, "layers", f"names of modules, up to {_LONGEST} characters{where}", _short(str(layer)))
        if not isinstance(source, Source):
            fail(op, layer, f"a Source{where}", type(source).__name__)
        for field in _FIELDS:
            x = getattr(source, field)
            if not isinstance(x, Tensor) and (x is not None or not field.endswith("_scale")):
                fail(op, f"{layer}.{field}", f"a tensor{where}", type(x).__name__)
    first = next(iter(sources.values())).key
    rows, dtype, device = first.shape[0] if first.dim() == 4 else 1, first.dtype, first.device
    tokens = len(ids)
    for layer, source in sources.items():
        for field in source._fields:
            if field not in _FIELDS and getattr(source, field) != source._field_defaults[field]:
                expected = f"none{where}, since a bank keeps keys, values and scales"
                fail(op, f"{layer}.{field}", expected, type(getattr(source, field)).__name__)
        for field, x in tensors_of(source).items():
            name = f"{layer}.{field}"
            if field.endswith("_scale"):
                _check_scale(op, name, x, getattr(source, field.removesuffix("_scale")), where)
                continue
            if x.dim() != 4 or tuple(x.shape[:2]) != (rows, tokens) or x.shape != source.key.shape or x.numel() == 0:
                fail(op, name, f"({rows} rows, {tokens} tokens, heads, head_dim){where}", tuple(x.shape))
            if x.dtype not in DTYPES:
                fail(op, name, f"one of {', '.join(map(str, DTYPES))}{where}", x.dtype)
            if x.dtype != dtype or x.device != device:
                fail(op, name, f"{dtype} on {device} as the other layers{where}", f"{x.dtype} on {x.device}")
            if getattr(source, f"{field}_scale") is None and dtype in EIGHT_BITS:
                fail(op, f"{name}_scale", f"the scales of keys and values in 8 bits{where}", "none")
            if not is_finite(x):
                fail(op, name, f"finite keys and values{where}", "NaN or infinity")


def _check_scale(op: str, name: str, scale: Tensor, of: Tensor, where: str) -> None:
    if of.dtype not in EIGHT_BITS:
        fail(op, name, f"none, since keys and values are {of.dtype}{where}", tuple(scale.shape))
    if scale.dtype != torch.float32 or scale.shape != of.shape[:3] or scale.device != of.device:
        expected = f"torch.float32 {tuple(of.shape[:3])} on {of.device}{where}"
        fail(op, name, expected, f"{scale.dtype} {tuple(scale.shape)} on {scale.device}")
    if not are_scales(scale):
        fail(op, name, f"finite scales of 0 or more{where}", "others")


def read_bank(path: str | PathLike) -> tuple[dict[str, Source], dict[str, str], Tensor]:
    """(sources, metadata, ids) of a file that is a bank's, each field of it checked; tensors are mapped."""
    op = "TransformerReferenceBank.load"
    about, tensors = open_file(op, path)
    _check_about(op, path, about)
    ids = tensors.pop("ids", None)
    if ids is None:
        fail(op, "ids", f"positions of the tokens in {path}", "none")
    layers: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        layer, _, field = name.rpartition(".")
        if field not in _FIELDS or not _is_layer(layer):
            fail(op, _short(name), f"<layer>.key, .value, .key_scale or .value_scale in {path}", "another name")
        layers.setdefault(layer, {})[field] = x
    for layer, fields in layers.items():
        for field in ("key", "value"):
            if field not in fields:
                fail(op, f"{layer}.{field}", f"a tensor in {path}", "none")
    sources = {layer: Source(**cast(dict[str, Any], fields)) for layer, fields in layers.items()}
    check_sources(op, sources, ids, str(path))
    return sources, about, ids


def _is_layer(name: object) -> bool:
    """Whether it can be the name of a module in a model."""
    return isinstance(name, str) and 0 < len(name) <= _LONGEST and name.replace(".", "_").isidentifier()


def is_model(name: object) -> bool:
    """Whether it can say which transformer a bank belongs to."""
    return isinstance(name, str) and 0 < len(name) <= _LONGEST and name.isprintable()


def _check_about(op: str, path: str | PathLike, about: Mapping[str, str]) -> None:
    """ValueError unless the metadata is that of a bank."""
    if about.get("format") != FORMAT:
        got = _short(about["format"]) if "format" in about else "none"
        fail(op, "format", f"{FORMAT!r} in {path}", got, "load a file that save() wrote")
    for name in sorted({*about, *_ABOUT}):
        if name not in about or name not in _ABOUT:
            fail(op, _short(name), f"{', '.join(_ABOUT)} in {path}", "another field" if name in about else "none")
    if not is_model(about["model"]):
        fail(op, "model", f"a transformer's class and digest in {path}", _short(about["model"]))
    if about["rotated"] not in (json.dumps(True), json.dumps(False)):
        fail(op, "rotated", f"true or false in {path}", _short(about["rotated"]))


def _short(text: str) -> str:
    """A text of a file, for a message: one printable line."""
    shown = repr(text)
    return shown if len(shown) < 80 else shown[:80] + "…"
