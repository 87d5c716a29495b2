"""Banks: keys and values of some rows, computed once and read by later passes, other prompts and other processes."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ...attention.api import multi_source_attention
from ...attention.eight_bit import quantize
from ...attention.plan import AttentionPlan, plan_attention
from ...runtime.checks import check_choice, check_integer, fail
from ...source import Source
from .bank_files import FIELDS, SCALE, open_file, read_field, stored_layers, write_file
from .bank_values import (
    EIGHT_BITS,
    MAX_TIMESTEP,
    as_bias,
    as_foreground,
    as_table,
    as_timestep,
    check_device,
    check_file,
    check_numbers,
)
from .install import layer_grid
from .routing import token_mask
from .unet import AttentionState, StockAttnProcessor, refuse_mask

STORAGES = ("device", "cpu")
SAME_LEVEL = 1e-4
"""The largest difference between shares of signal that count as one noise level. Schedulers compute these shares in
fp32 by different formulas."""


class BankLayer:
    """The buffers of one layer: keys and values of the step that is extracted or read; `dtype`: that of 8-bit ones."""

    def __init__(self, name: str, op: str, dtype: torch.dtype | None = None):
        self.name, self.dtype = name, dtype
        self._op = op
        self.buffers: tuple[Tensor, ...] = ()
        """keys and values (2, rows, tokens, heads, head_dim); in 8 bits also their scales, (2, rows, tokens, heads)"""
        self.written: tuple[Tensor, Tensor] | None = None
        """keys and values of the last pass that extracted"""

    def write(self, key: Tensor, value: Tensor) -> None:
        """Hold keys and values (rows, tokens, heads, head_dim) until `keep`."""
        self.written = key, value

    def keep(self) -> tuple[Tensor, ...]:
        """Copy what was written into the buffers. This happens outside the layer's pass, whose compiled graph would
        otherwise depend on them."""
        assert self.written is not None
        written, self.written = self.written, None
        if self.buffers:
            self.check_fit(written[0], rows=True)
        if self.dtype is not None and any(x.requires_grad for x in written):
            got, hint = "keys and values that require one", "extract under torch.no_grad()"
            fail(self._op, "bank", "a pass without gradients, which 8 bits do not have", got, hint, NotImplementedError)
        key, value = ((x,) if self.dtype is None else quantize(x, self.dtype) for x in written)
        if not self.buffers:
            with torch.inference_mode(False):  # later passes may write where this one is one of inference mode
                self.buffers = tuple(x.new_empty(2, *x.shape) for x in key)
        for buffer, *parts in zip(self.buffers, key, value):
            for half, x in zip(buffer, parts):
                half.copy_(x)
        return self.buffers

    def read(self, key: Tensor) -> Source:
        """The kept keys and values, for a layer whose own keys are these."""
        if not self.buffers:
            fail(self._op, "bank", f"layer {self.name} among those extracted", "nothing of it", "call extract()")
        self.check_fit(key, rows=False)
        kept = self.buffers[0]
        if self.dtype is None:
            return Source(kept[0], kept[1])
        scale = self.buffers[1]
        return Source(kept[0], kept[1], key_scale=scale[0], value_scale=scale[1])

    def check_fit(self, key: Tensor, rows: bool) -> None:
        """Refuse keys of other sizes, precision or device than those that the bank was built for. Keys in 8 bits are
        read in any precision."""
        first, kept = 0 if rows else 1, self.buffers[0][0]
        precision = kept.dtype if self.dtype is None else key.dtype
        built, got = ((*x.shape[first:], y, x.device) for x, y in ((kept, precision), (key, key.dtype)))
        if built != got:
            fail(self._op, "bank", f"built for {built}", f"{got} in {self.name}", "call reset()")


class KeyValueBank:
    """Keys and values of some rows in the self-attention layers, at every step of a part of a schedule.

    The layers touch one buffer each, whose address never changes (it can be captured in a CUDA graph); `extract` copies
    it to the storage after the UNet has run, `read` from it before. (A bank that was loaded for a model on the CPU has
    none: there the layers read the pages of its file.) Bytes: 2 x rows x tokens x channels x element
    size, per layer and step, plus one step of buffers; `nbytes` counts them. With 8 bits the element size is 1, and
    each row, token and head has 2 scales of 4 bytes: of bf16's bytes they take 1/2 + 2 / head_dim. The pass that
    extracts a step holds it once more, in the model's dtype.

    Args:
        timesteps: of the schedule, in its order. signals: how much of the latents is signal at each, see
            `Solver.signals`; None: not known, and timesteps alone say which step a bank has.
        storage: where all steps are: "device", that of the model, or "cpu": pinned memory, copied step by step.
        limit: bytes that the storage may take.
        dtype: torch.int8 or torch.float8_e4m3fn keep keys and values in 8 bits (`lr_kernels.quantize`), which a model
            of any dtype reads. None: in their own dtype.

    Raises:
        ValueError: other timesteps or signals than finite numbers, at least one, from 0 to 1e6 and from 0 to 1; a step
            that is extracted or read while another is; keys that are not finite, where they are kept in 8 bits.
        NotImplementedError: keys in 8 bits that require a gradient.
    """

    def __init__(
        self,
        timesteps: Sequence[float] | Tensor,
        *,
        signals: Sequence[float] | None = None,
        storage: str = "device",
        limit: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice(self._op, "storage", storage, STORAGES)
        check_choice(self._op, "dtype", dtype, (None, *EIGHT_BITS))
        if limit is not None:
            check_integer(self._op, "limit", limit, 0, "a number of bytes, or None")
        numbers = check_numbers(self._op, "timesteps", timesteps, MAX_TIMESTEP)
        self.timesteps = [as_timestep(t) for t in numbers]
        self.signals = None if signals is None else check_numbers(self._op, "signals", signals, 1)
        if self.signals is not None and len(self.signals) != len(numbers):
            fail(self._op, "signals", f"{len(numbers)}, one per timestep", len(self.signals))
        self.storage, self.limit = storage, limit
        self.mode: str | None = None
        """None: the layers are stock; "extract": they write their keys and values; "cached": they read the bank's"""
        self._eight_bits = dtype
        self._layers: dict[str, BankLayer] = {}
        self.reset()

    @property
    def _op(self) -> str:
        return type(self).__name__

    def reset(self) -> None:
        """Forget everything stored."""
        self._stored: dict[str, tuple[Tensor, ...]] = {}  # as the layer's buffers, with the steps first
        self._mapped = False  # whether the layers' buffers are views of the storage, which is a file's pages
        for layer in self._layers.values():
            layer.buffers, layer.written = (), None
        self._filled: set[int] = set()

    def processors(
        self, layers: Mapping[str, Attention], state: AttentionState | None = None
    ) -> dict[str, "BankAttnProcessor"]:
        """A processor for each layer, for `install_processors`; `state` is passed where other processors share it."""
        return {name: BankAttnProcessor(self, self.layer(name), state) for name in layers}

    def layer(self, name: str) -> BankLayer:
        """The buffers of a layer; empty until it is extracted."""
        return self._layers.setdefault(name, BankLayer(name, self._op, self._eight_bits))

    def _buffers(self) -> dict[str, tuple[Tensor, ...]]:
        return {name: layer.buffers for name, layer in self._layers.items() if layer.buffers}

    @property
    def nbytes(self) -> int:
        """The bytes that storage and buffers take, with scales."""
        buffers = () if self._mapped else self._buffers().values()
        return sum(x.nbytes for held in (*self._stored.values(), *buffers) for x in held)

    @property
    def layer_names(self) -> list[str]:
        """The names of the layers that were extracted."""
        return list(self._buffers())

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the keys and values; None while the bank is empty."""
        return next((x.dtype for x, *_ in self._buffers().values()), None)

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether a model that computes its attention in this dtype can read the bank."""
        return self.dtype in (dtype, *EIGHT_BITS)

    @property
    def rows_held(self) -> int:
        """How many rows every layer has; 0 while the bank is empty."""
        return next((x.shape[1] for x, *_ in self._buffers().values()), 0)

    def steps_of(self, timesteps: Sequence[float] | Tensor, signals: Sequence[float] | None = None) -> range:
        """The bank's steps of timesteps that follow each other, at these noise levels where both are known.

        ValueError where the bank was built for others.
        """
        wanted = [as_timestep(t) for t in timesteps]
        at_other_levels = False
        for first in range(len(self.timesteps) - len(wanted) + 1):
            part = slice(first, first + len(wanted))
            if self.timesteps[part] != wanted:
                continue
            if self.signals is None or signals is None:
                return range(part.start, part.stop)
            if all(abs(a - b) < SAME_LEVEL for a, b in zip(self.signals[part], signals)):
                return range(part.start, part.stop)
            at_other_levels = True
        hint = "use the same number of steps and a part of the same range of sharing, or call reset()"
        if at_other_levels:
            fail(self._op, "bank", "the noise levels that it was built at", "others at the same timesteps", hint)
        fail(self._op, "bank", f"built for timesteps {self.timesteps}", wanted, hint)

    @contextlib.contextmanager
    def extract(self, step: int) -> Iterator[None]:
        """While it lasts the UNet runs on the rows that are kept; their keys and values become those of `step`."""
        step = self._check_step(step)
        for layer in self._layers.values():
            layer.written = None  # of a pass that failed
            if self._mapped:
                with torch.inference_mode(False):
                    layer.buffers = tuple(torch.empty_like(x) for x in layer.buffers)
        self._mapped = False
        with self._in_mode("extract"):
            yield
        written = {name: layer for name, layer in self._layers.items() if layer.written is not None}
        for name in written.keys() ^ self._stored.keys() if self._filled else ():
            got = f"it first in step {step}" if name in written else f"a pass without it in step {step}"
            fail(self._op, "bank", f"layer {name} in every step", got, "call reset()")
        for name, layer in written.items():
            buffers = layer.keep()
            if name not in self._stored:
                self._stored[name] = self._allocate(name, buffers)
            for stored, buffer in zip(self._stored[name], buffers):
                stored[step].copy_(buffer, non_blocking=True)
        self._filled.add(step)

    @contextlib.contextmanager
    def read(self, step: int) -> Iterator[None]:
        """While it lasts every self-attention layer also attends to what the bank has of `step`."""
        step = self._check_step(step)
        if step not in self._filled:
            fail(self._op, "step", f"one that was extracted, {sorted(self._filled)}", step, "call extract() first")
        for name, buffers in self._buffers().items():
            if self._mapped:
                self._layers[name].buffers = tuple(x[step] for x in self._stored[name])
                continue
            for stored, buffer in zip(self._stored[name], buffers):
                buffer.copy_(stored[step], non_blocking=True)
        with self._in_mode("cached"):
            yield

    @contextlib.contextmanager
    def _in_mode(self, mode: str) -> Iterator[None]:
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    def _check_step(self, step: int) -> int:
        """The step as an int. ValueError if the bank has no such step, or if another step is being extracted or read:
        all steps share one buffer per layer."""
        last = len(self.timesteps) - 1
        step = check_integer(self._op, "step", step, 0, f"0 to {last}", last)
        if self.mode is not None:
            fail(self._op, "step", "one step at a time", f"{step} within another", "leave the other with block first")
        return step

    def _allocate(self, name: str, buffers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        steps = len(self.timesteps)
        needed = self.nbytes + steps * sum(x.nbytes for x in buffers)
        if self.limit is not None and needed > self.limit:
            fail(self._op, "limit", f"a bank within {self.limit} bytes", f"{needed} with layer {name}",
                 "choose fewer layers or steps, or a lower precision")  # fmt: skip
        with torch.inference_mode(False):
            if self.storage == "device":
                return tuple(x.new_empty(steps, *x.shape) for x in buffers)
            pinned = torch.cuda.is_available()
            return tuple(torch.empty(steps, *x.shape, dtype=x.dtype, pin_memory=pinned) for x in buffers)


class ReferenceBank(KeyValueBank):
    """Keys and values of references, as a `KeyValueBank`, with what readers need to know of them.

    Args:
        timesteps, signals, storage, limit, dtype: of `KeyValueBank`.
    """

    def __init__(
        self,
        timesteps: Sequence[float] | Tensor,
        *,
        signals: Sequence[float] | None = None,
        storage: str = "device",
        limit: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._rows: Tensor | None = None
        self._strength: Tensor | None = None
        self.shows: tuple[int, ...] | None = None
        """the subject that each reference shows; None unless the pipeline made the bank"""
        self.words: list[list[str]] | None = None
        """the words of each subject; None unless the pipeline made the bank"""
        super().__init__(timesteps, signals=signals, storage=storage, limit=limit, dtype=dtype)

    def reset(self) -> None:
        """Forget keys, values, foreground and plans."""
        super().reset()
        self._foreground: Tensor | None = None
        self._plans: dict[tuple[int, int], AttentionPlan] = {}  # by tokens, and rows read at once

    @property
    def rows(self) -> Tensor | None:
        """int32 (B,), or a list: the bank's row that each row reads, -1: none. Default: row b, or the only one. (n, B):
        n of the bank's rows at once, in one softmax."""
        return self._rows

    @rows.setter
    def rows(self, rows: Tensor | Sequence[int] | None) -> None:
        self._rows = None if rows is None else as_table("ReferenceBank", rows, self._device())

    @property
    def strength(self) -> Tensor | None:
        """A number, or a tensor () or (B,); with rows (n, B) also (n, B): added to the logits of the bank's keys."""
        return self._strength

    @strength.setter
    def strength(self, strength: float | Tensor | None) -> None:
        self._strength = None if strength is None else as_bias("ReferenceBank", strength, self._device())

    def _device(self) -> torch.device:
        return next((x.device for x, *_ in self._buffers().values()), torch.device("cpu"))

    @property
    def foreground(self) -> Tensor | None:
        """bool (1 or rows, height, width), also an array: the tokens that are read; None: all."""
        return self._foreground

    @foreground.setter
    def foreground(self, mask: Tensor | np.ndarray | None) -> None:
        mask = None if mask is None else as_foreground("ReferenceBank", mask, self._device())
        self._foreground, self._plans = mask, {}

    @contextlib.contextmanager
    def read(self, step: int) -> Iterator[None]:
        """While it lasts every self-attention layer also reads the foreground of the references at this step."""
        with super().read(step):
            for current, *_ in self._buffers().values():
                tokens, count = current.shape[2], len(self._tables())
                if self._foreground is not None and (tokens, count) not in self._plans:
                    mask = token_mask(self._foreground, self._grid(tokens))
                    self._plans[tokens, count] = plan_attention([None, *[mask] * count])
            yield

    def _tables(self) -> Sequence[Tensor | None]:
        """Tables of the bank's row that each row reads, one for each of the bank's rows that are read together."""
        return (self.rows,) if self.rows is None or self.rows.dim() == 1 else self.rows.unbind()

    def sources(self, layer: BankLayer, key: Tensor) -> tuple[list[Source], AttentionPlan | None]:
        """The bank as sources beside a layer's own keys, and the plan of all."""
        kept, tables = layer.read(key), self._tables()
        strength, biases = self.strength, [self.strength] * len(tables)
        if strength is not None and strength.dim() == 2:
            biases = list(strength.unbind())
            if len(biases) != len(tables):
                fail("ReferenceBank", "strength", f"(), (B,) or ({len(tables)}, B) as rows", tuple(strength.shape))
        found = [kept._replace(rows=rows, logit_bias=bias) for rows, bias in zip(tables, biases)]
        if self._foreground is None:
            return found, None
        if len(self._foreground) not in (1, self.rows_held):
            expected = f"1 or {self.rows_held} masks, one per row that the bank holds"
            fail("ReferenceBank", "foreground", expected, len(self._foreground))
        plan = self._plans[key.shape[1], len(tables)]
        return [source._replace(key_mask=plan.key_masks[1]) for source in found], plan

    def _grid(self, tokens: int) -> tuple[int, int]:
        """(rows, columns) of a layer's tokens: the mask's own at a whole scale, else in its proportions."""
        assert self._foreground is not None
        height, width = self._foreground.shape[1:]
        for scale in range(1, max(height, width) + 1):
            rows, columns = layer_grid(scale, height, width)
            if rows * columns == tokens:
                return rows, columns
        columns = round((tokens * width / height) ** 0.5)
        if columns == 0 or tokens % columns:
            fail("ReferenceBank", "foreground", f"the shape of an image of {tokens} tokens", (height, width))
        return tokens // columns, columns

    def save(self, path: str | PathLike, model: str = "") -> None:
        """Write a safetensors file, whole or not at all. `model` says what made it; `load` can ask for it."""
        if not isinstance(model, str):
            fail("ReferenceBank", "model", "a string", type(model).__name__)
        if len(self._filled) != len(self.timesteps):
            fail("ReferenceBank", "bank", f"all {len(self.timesteps)} steps extracted", sorted(self._filled))
        check_file("ReferenceBank", path)
        if not Path(path).parent.is_dir():
            fail("ReferenceBank", "path", "a file in a folder that exists", str(path))
        if self.timesteps != sorted(self.timesteps, reverse=True):
            fail("ReferenceBank", "timesteps", "falling ones, as of a schedule", self.timesteps)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies into pinned memory may be under way
        tensors = {
            f"{name}{suffix}": x.cpu().contiguous()
            for name, held in self._stored.items()
            for suffix, x in zip(("", SCALE), held)
        }
        if self._foreground is not None:
            tensors["foreground"] = self._foreground.cpu().contiguous()
        about = {name: json.dumps(getattr(self, name)) for name in FIELDS} | {"model": model}
        write_file(path, tensors, about)

    @classmethod
    def load(
        cls,
        path: str | PathLike,
        *,
        device: str | torch.device = "cpu",
        storage: str = "device",
        model: str | None = None,
    ) -> "ReferenceBank":
        """A saved bank. On the CPU keys and values are the file's pages, mapped, which processes of a machine share.

        Raises:
            ValueError: no safetensors file, or one whose fields are not those of a bank, each named, also numbers that
                are not finite; a device that is none; `model` is given and is not what the bank was computed with.
            FileNotFoundError: no such file.
        """
        check_file("ReferenceBank", path)
        check_choice("ReferenceBank", "storage", storage, STORAGES)
        check_device("ReferenceBank", device)
        about, tensors = open_file("ReferenceBank", path)
        if not about:
            fail("ReferenceBank", "path", "a file that save() wrote", f"{path}: one without metadata")
        timesteps, signals, shows, words = (read_field(path, about, name) for name in FIELDS)
        assert timesteps is not None  # FIELDS
        if signals is not None and len(signals) != len(timesteps):
            fail("ReferenceBank", "signals", f"{len(timesteps)} in {path}, one per timestep", len(signals))
        found = about.get("model", "")
        if model not in (None, found):
            fail("ReferenceBank", "model", repr(model), repr(found), "the bank belongs to another model")
        foreground = tensors.pop("foreground", None)
        layers = stored_layers(path, tensors, len(timesteps))
        dtype = next(iter(layers.values()))[0].dtype
        bank = cls(timesteps, signals=signals, storage=storage, dtype=dtype if dtype in EIGHT_BITS else None)
        bank.shows, bank.words = None if shows is None else tuple(shows), words
        if timesteps != sorted(timesteps, reverse=True):
            fail("ReferenceBank", "timesteps", f"falling ones in {path}", timesteps)
        for name, held in layers.items():
            bank._stored[name] = tuple(x.to(device) for x in held) if storage == "device" else held
            bank.layer(name).buffers = tuple(torch.empty(x.shape[1:], dtype=x.dtype, device=device) for x in held)
        bank._mapped = torch.device(device).type == "cpu"
        rows = bank.rows_held
        # A pipeline keeps its references once as the unconditional half and once as the conditional one.
        counts = (rows, rows // 2) if rows % 2 == 0 else (rows,)
        if foreground is not None:
            bank.foreground = foreground.to(device)
            if len(foreground) not in (1, *counts) or foreground.numel() == 0:
                expected = f"1 or {rows} masks in {path}, one per row"
                fail("ReferenceBank", "foreground", expected, tuple(foreground.shape))
        if shows is not None and len(shows) not in counts:
            fail("ReferenceBank", "shows", f"{rows} in {path}, one per row, or half as many with guidance", len(shows))
        if shows is not None and words is not None and max(shows) >= len(words):
            fail("ReferenceBank", "shows", f"subjects 0 to {len(words) - 1} in {path}", max(shows))
        bank._filled = set(range(len(bank.timesteps)))
        return bank


class BankAttnProcessor(StockAttnProcessor):
    """Self-attention that fills a bank, or reads a `ReferenceBank` besides its own keys; AttnProcessor2_0 while the
    bank's mode is None."""

    def __init__(
        self,
        bank: KeyValueBank | None = None,
        layer: BankLayer | None = None,
        state: AttentionState | None = None,
    ):
        super().__init__(state)
        self.bank, self.layer = bank, layer

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, is_cross: bool
    ) -> Tensor:
        """A layer's attention: stock, or kept in the bank, or with the bank's sources beside the own keys."""
        mode = None if self.bank is None or is_cross else self.bank.mode
        if mode is not None and attention_mask is not None:
            refuse_mask(type(self).__name__)
        if mode == "extract":
            assert self.layer is not None
            self.layer.write(key.transpose(1, 2), value.transpose(1, 2))
        if mode != "cached":
            return super().attend(query, key, value, attention_mask, is_cross)
        assert isinstance(self.bank, ReferenceBank) and self.layer is not None
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        sources, plan = self.bank.sources(self.layer, key)
        return multi_source_attention(query, [Source(key, value), *sources], plan=plan).transpose(1, 2)
