"""A bank of references for diffusion transformers: keys and values that all rows, prompts and steps share."""

import copy
import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from ....attention.eight_bit import quantize
from ....runtime.checks import check_choice, fail
from ....runtime.platform import KERNEL_DTYPES
from ....source import Source
from ...processors.bank_files import write_file
from ...processors.bank_values import EIGHT_BITS, check_device
from .bank_files import FORMAT, check_sources, is_model, read_bank, tensors_of

_OP = "TransformerReferenceBank"


class TransformerReferenceBank:
    """Keys and values of references in the attention layers of a transformer.

    References that see only themselves, at a fixed timestep, have the same keys in every step, and with every prompt
    and seed: one row of them serves all rows of a batch. `extract_references` makes a bank,
    `use_cached_references(transformer, bank)` lets a model read it.

    Args:
        sources: by the name of the layer, its keys and values (rows, tokens, heads, head_dim), in 8 bits with scales
            (`quantized`).
        model: what `model_of` says of the transformer that they were computed with.
        ids: fp32 (tokens, axes): the positions of the references' tokens, as the transformer takes them (`img_ids`).
        rotated: whether RoPE has been applied to the keys. A bank of keys before RoPE is placed before it is read.

    Raises:
        ValueError: layers that do not fit each other, each field named; a model or `rotated` of another type.
    """

    def __init__(self, sources: Mapping[str, Source], *, model: str, ids: Tensor, rotated: bool = True):
        if not is_model(model):
            fail(_OP, "model", "what model_of() says of the transformer", repr(model))
        check_choice(_OP, "rotated", rotated, (True, False))
        check_sources(_OP, sources, ids)
        self._hold(sources, model, ids, rotated)

    def _hold(
        self, sources: Mapping[str, Source], model: str, ids: Tensor, rotated: bool
    ) -> "TransformerReferenceBank":
        """Take over sources that were looked at: that reads all of them."""
        self.sources = dict(sources)
        self.model, self.ids, self.rotated = model, ids, rotated
        return self

    @property
    def nbytes(self) -> int:
        """The bytes of keys, values and scales."""
        return sum(x.nbytes for source in self.sources.values() for x in tensors_of(source).values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return next(iter(self.sources.values())).key.dtype

    @property
    def tokens(self) -> int:
        """The number of the references' tokens."""
        return next(iter(self.sources.values())).key.shape[1]

    def to(self, device: str | torch.device) -> "TransformerReferenceBank":
        """The bank on another device. ValueError: a device that is none."""
        check_device(f"{_OP}.to", device)
        moved = {
            name: source._replace(**cast(dict[str, Any], {k: x.to(device) for k, x in tensors_of(source).items()}))
            for name, source in self.sources.items()
        }
        return copy.copy(self)._hold(moved, self.model, self.ids, self.rotated)

    def quantized(self, dtype: torch.dtype = torch.int8) -> "TransformerReferenceBank":
        """The bank in 8 bits, with a scale per token and head: about half the bytes of bf16, see `lr_kernels.quantize`.

        Args:
            dtype: torch.int8, or torch.float8_e4m3fn, whose error is four times as large.
        """
        check_choice(f"{_OP}.quantized", "dtype", dtype, EIGHT_BITS)
        found = {}
        for name, source in self.sources.items():
            (key, key_scale), (value, value_scale) = (quantize(x, dtype) for x in _floats(source))
            found[name] = source._replace(key=key, value=value, key_scale=key_scale, value_scale=value_scale)
        return self._with(found)

    def dequantized(self, dtype: torch.dtype = torch.bfloat16) -> "TransformerReferenceBank":
        """The bank in a floating dtype that kernels take."""
        check_choice(f"{_OP}.dequantized", "dtype", dtype, KERNEL_DTYPES)
        found = {}
        for name, source in self.sources.items():
            key, value = (x.to(dtype) for x in _floats(source))
            found[name] = source._replace(key=key, value=value, key_scale=None, value_scale=None)
        return self._with(found)

    def place(self, model: nn.Module, ids: Tensor | None = None) -> "TransformerReferenceBank":
        """Keys before RoPE rotated to positions, once; the bank that a model can read.

        Where all references move alike, by the same ids on every token, the result is what the model would compute
        there, to rounding: its references see only each other, and RoPE depends on distances alone. Other positions,
        such as those of another size, are approximate: within the references the distances were those of `ids`.

        Args:
            model: the transformer, whose `pos_embed` says how positions rotate. ids: (tokens, axes); default: those
                that the references had.

        Raises:
            ValueError: keys that are rotated; ids of another shape; another model.
        """
        op = f"{_OP}.place"
        if self.rotated:
            fail(op, "bank", "keys before RoPE", "rotated ones", "extract_references(…, rotated=False)")
        if not isinstance(getattr(model, "_orig_mod", model), ConfigMixin):
            fail(op, "model", f"a transformer, {self.model}", type(model).__name__)
        if model_of(model) != self.model:
            fail(op, "model", f"one of {self.model}", f"one of {model_of(model)}", "place the bank for its own model")
        rope: Any = getattr(model, "_orig_mod", model).pos_embed
        ids = self.ids if ids is None else ids
        expected = len(self.ids), len(rope.axes_dim)
        if not isinstance(ids, Tensor) or tuple(ids.shape) != expected:
            fail(op, "ids", f"a tensor {expected}", tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__)
        ids = ids.float()
        found = {}
        for name, source in self.sources.items():
            key = _floats(source)[0]
            rotated = apply_rotary_emb(key.float(), rope(ids.to(key.device)), sequence_dim=1).to(key.dtype)
            if source.key_scale is None:
                found[name] = source._replace(key=rotated)
            else:
                rotated, scale = quantize(rotated, source.key.dtype)
                found[name] = source._replace(key=rotated, key_scale=scale)
        return TransformerReferenceBank(found, model=self.model, ids=ids, rotated=True)

    def save(self, path: str | PathLike) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            ValueError: a path that is a folder or lies in none.
        """
        if not isinstance(path, str | PathLike):
            fail(f"{_OP}.save", "path", "the path of a file", type(path).__name__)
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            fail(f"{_OP}.save", "path", "a file in a folder that exists", str(path))
        tensors = {
            f"{name}.{field}": x.cpu().contiguous()
            for name, source in self.sources.items()
            for field, x in tensors_of(source).items()
        }
        about = {"format": FORMAT, "model": self.model, "rotated": json.dumps(self.rotated)}
        write_file(path, tensors | {"ids": self.ids.cpu().contiguous()}, about)

    @classmethod
    def load(cls, path: str | PathLike, *, device: str | torch.device = "cpu") -> "TransformerReferenceBank":
        """A saved bank. On the CPU its tensors are the file's pages, mapped, which processes of a machine share.

        Raises:
            ValueError: no safetensors file, or one whose fields are not those of a bank, each named, also numbers that
                are not finite; a device that is none.
            FileNotFoundError: no such file.
        """
        sources, about, ids = read_bank(path)
        check_device(f"{_OP}.load", device)
        bank = cls.__new__(cls)._hold(sources, about["model"], ids, json.loads(about["rotated"]))
        return bank if torch.device(device).type == "cpu" else bank.to(device)

    def _with(self, sources: Mapping[str, Source]) -> "TransformerReferenceBank":
        return TransformerReferenceBank(sources, model=self.model, ids=self.ids, rotated=self.rotated)


def _floats(source: Source) -> tuple[Tensor, Tensor]:
    """Keys and values as they are, or in fp32 where they are in 8 bits."""
    if source.key_scale is None or source.value_scale is None:
        return source.key, source.value
    return source.key.float() * source.key_scale[..., None], source.value.float() * source.value_scale[..., None]


def model_of(model: nn.Module) -> str:
    """Which architecture a bank belongs to: the transformer's class, and a digest of its configuration."""
    model = getattr(model, "_orig_mod", model)
    config = {name: x for name, x in dict(cast(ConfigMixin, model).config).items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    return f"{type(model).__name__} {digest[:16]}"
