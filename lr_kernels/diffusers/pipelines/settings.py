"""Settings: how a call denoises, as one frozen object that the stages share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ...runtime.checks import check_choice, check_integer, check_number, fail, plain_number
from ..processors.bank import STORAGES
from ..processors.bank_values import EIGHT_BITS
from .pictures import FITS
from .schedule import Blend

OP = "LayoutRetouch"
READINGS = ("routing", "swap")
CONTEXTS_FROM = ("trajectory", "renoise", "inversion")
TARGETS_FROM = ("renoise", "contexts")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Generator = torch.Generator | list[torch.Generator] | None
Callback = Callable[[DiffusionPipeline, int, Tensor, dict], dict] | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of a call that are numbers and choices; `LayoutRetouch.__call__` says what they mean."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    retouch_guidance_scale: float | None = None
    eta: float = 0.0
    layout_steps: int | None = None
    layout_blend: Blend = "hard"
    retouch_start: int | None = None
    retouch_end: int | None = None
    retouch_layers: Sequence[int | str] | None = None
    reading: str = "routing"
    contexts_from: str | None = None
    targets_from: str = "renoise"
    context_storage: str | None = "device"
    context_limit: int | None = None
    context_dtype: torch.dtype | None = None
    mask_blending: bool = False
    mask_threshold: float | str = "otsu"
    reference_fit: str = "crop"
    return_maps: bool = False
    control_scale: float = 1.0
    generator: Generator = None
    backend: str = "auto"
    output_type: str = "pil"
    callback_on_step_end: Callback = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)

    @classmethod
    def given(cls, arguments: Mapping[str, Any]) -> "Settings":
        """From a method's arguments by name, as `locals()` at its start has them; others are left out."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def __post_init__(self) -> None:
        check_choice(OP, "reading", self.reading, READINGS)
        check_choice(OP, "contexts_from", self.contexts_from, (None, *CONTEXTS_FROM))
        check_choice(OP, "targets_from", self.targets_from, TARGETS_FROM)
        check_choice(OP, "context_storage", self.context_storage, (None, *STORAGES))
        check_choice(OP, "context_dtype", self.context_dtype, (None, *EIGHT_BITS))
        if self.context_dtype is not None and self.context_storage is None:
            fail(OP, "context_dtype", "None without a context_storage", self.context_dtype)
        check_choice(OP, "reference_fit", self.reference_fit, FITS)
        check_choice(OP, "output_type", self.output_type, OUTPUT_TYPES)
        steps = check_integer(OP, "num_inference_steps", self.num_inference_steps, 1, "a positive integer")
        self._set("num_inference_steps", steps)
        for name in ("guidance_scale", "retouch_guidance_scale", "eta", "control_scale"):
            if name != "retouch_guidance_scale" or self.retouch_guidance_scale is not None:
                self._set(name, check_number(OP, name, getattr(self, name)))
        check_number(OP, "eta", self.eta, "a number in [0, 1]", 0, 1)
        if self.context_limit is not None:
            limit = check_integer(OP, "context_limit", self.context_limit, 0, "a number of bytes, or None")
            self._set("context_limit", limit)
            if self.context_storage is None:
                fail(OP, "context_limit", "None without a context_storage", limit)
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            fail(OP, "callback_on_step_end", "a function, or None", type(self.callback_on_step_end).__name__)
        if isinstance(self.mask_threshold, str):
            check_choice(OP, "mask_threshold", self.mask_threshold, ("otsu",))
        else:
            expected = "'otsu' or a number in [0, 1]"
            self._set("mask_threshold", check_number(OP, "mask_threshold", self.mask_threshold, expected, 0, 1))
        layers: Any = self.retouch_layers
        if plain_number(layers) is not None:
            layers = [layers]
        if isinstance(layers, (list, tuple)):  # scales of any integer type
            self._set("retouch_layers", [x if plain_number(x) is None else plain_number(x) for x in layers])

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def retouch_guidance(self) -> float:
        """The guidance scale of the retouch stage."""
        return self.guidance_scale if self.retouch_guidance_scale is None else self.retouch_guidance_scale

    def check_generators(self, images: int) -> None:
        """Refuse generators that are neither one nor a list of one per image."""
        several = self.generator if isinstance(self.generator, list) else [self.generator]
        for generator in several:
            if not isinstance(generator, torch.Generator) and self.generator is not None:
                fail(OP, "generator", "a torch.Generator, or a list of them", type(generator).__name__)
        if isinstance(self.generator, list) and len(several) != images:
            fail(OP, "generator", f"one, or {images}, one per image", len(several))


def refuse(reason: str, **arguments: object) -> None:
    """ValueError for an argument that is given although there is a reason against it."""
    for name, x in arguments.items():
        if x is not None:
            fail(OP, name, f"None, since {reason}", type(x).__name__)


def one_or(count: int) -> str:
    """How many there may be where one serves all, in words: 1, or 1 or `count`."""
    return "1" if count == 1 else f"1 or {count}"


def check_numbers(argument: str, x: Tensor) -> None:
    """ValueError for a tensor without data or with numbers that are not finite."""
    if x.device.type == "meta":
        fail(OP, argument, "a tensor with data", "one on the device meta")
    if not bool(x.isfinite().all()):
        fail(OP, argument, "finite numbers", "NaN or Inf")
