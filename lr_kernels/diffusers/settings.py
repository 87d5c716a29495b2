"""Settings: how a call denoises, as one frozen object that the stages share."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..checks import check_choice, fail
from .bank import STORAGES
from .pictures import FITS
from .schedule import Blend

OP = "layout_retouch"
READINGS = ("routing", "swap")
CONTEXTS_FROM = ("trajectory", "renoise", "inversion")
TARGETS_FROM = ("renoise", "contexts")

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
    mask_blending: bool = False
    mask_threshold: float | str = "otsu"
    reference_fit: str = "crop"
    return_maps: bool = False
    control_scale: float = 1.0
    generator: Generator = None
    backend: str = "auto"
    output_type: str = "pil"
    callback_on_step_end: Callback = None

    @classmethod
    def given(cls, arguments: Mapping[str, object]) -> "Settings":
        """From a method's arguments by name, as `locals()` at its start has them; others are left out."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def __post_init__(self) -> None:
        check_choice(OP, "reading", self.reading, READINGS)
        check_choice(OP, "contexts_from", self.contexts_from, (None, *CONTEXTS_FROM))
        check_choice(OP, "targets_from", self.targets_from, TARGETS_FROM)
        check_choice(OP, "context_storage", self.context_storage, (None, *STORAGES))
        check_choice(OP, "reference_fit", self.reference_fit, FITS)
        for name in ("guidance_scale", "retouch_guidance_scale"):
            scale = getattr(self, name)
            if scale is not None and not math.isfinite(scale):
                fail(OP, name, "a finite number", scale)
        if isinstance(self.mask_threshold, str):
            check_choice(OP, "mask_threshold", self.mask_threshold, ("otsu",))
        elif not 0 <= self.mask_threshold <= 1:
            fail(OP, "mask_threshold", "'otsu' or a number in [0, 1]", self.mask_threshold)

    @property
    def retouch_guidance(self) -> float:
        """The guidance scale of the retouch stage."""
        return self.guidance_scale if self.retouch_guidance_scale is None else self.retouch_guidance_scale

    def check_generators(self, images: int) -> None:
        """One generator, or one per image."""
        if isinstance(self.generator, list) and len(self.generator) != images:
            fail(OP, "generator", f"one, or {images}, one per image", len(self.generator))
