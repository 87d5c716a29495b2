"""The arguments that the stock pipelines' calls take besides those of the method, by their names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ...runtime.checks import check_integer, check_number, fail
from .settings import OP

Size = tuple[int, int]

_SIZES = (
    "original_size",
    "target_size",
    "crops_coords_top_left",
    "negative_original_size",
    "negative_target_size",
    "negative_crops_coords_top_left",
)
_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds", "layout_pooled_prompt_embeds")

_REFUSED = {
    "prompt_2": "pass prompt_embeds and pooled_prompt_embeds",
    "negative_prompt_2": "pass negative_prompt_embeds and negative_pooled_prompt_embeds",
    "ip_adapter_image": "the subject comes by reference_image",
    "ip_adapter_image_embeds": "the subject comes by reference_image",
    "denoising_end": "the retouch stage runs to the end of the schedule",
    "callback": "pass callback_on_step_end",
    "callback_steps": "pass callback_on_step_end",
    "image": "pass reference_image or control_image",
    "controlnet_conditioning_scale": "pass control_scale",
    "control_guidance_start": "the ControlNet acts in every step",
    "control_guidance_end": "the ControlNet acts in every step",
    "guess_mode": "the ControlNet sees the prompts of both halves of the guidance",
    "num_images_per_prompt": "a stage takes one prompt per image: repeat the prompts",
    "return_dict": "a stage returns its output: take .images",
}
"""Arguments of the stock pipelines that are refused, with what to use instead."""
_AS_IF_LEFT_OUT = {
    "control_guidance_start": 0,
    "control_guidance_end": 1,
    "guess_mode": False,
    "num_images_per_prompt": 1,
    "return_dict": True,
}
"""Values of refused arguments that change nothing, and so are let through."""


@dataclass(frozen=True, kw_only=True)
class StockArguments:
    """What the stock pipelines' calls take and do, for both models and in both stages.

    Args:
        prompt_embeds, negative_prompt_embeds: (prompts, L, C) in place of what the text encoders make of the prompts.
            `prompt` then only says where the subject's words are, and is left out in a layout without subject_tokens.
            The negative ones serve both models. References are always text, so that in a retouch stage with
            reference_image L is the tokenizer's length.
        layout_prompt_embeds: likewise in place of layout_prompt, by the vanilla model's text encoder.
        pooled_prompt_embeds, negative_pooled_prompt_embeds, layout_pooled_prompt_embeds: (prompts, P), with SDXL beside
            those without "pooled".
        clip_skip: how many of the text encoders' last layers are left out, for prompts and references.
        guidance_rescale: of arXiv 2305.08891, of each model's guided prediction.
        cross_attention_kwargs: {"scale": …} alone, the strength of the adapters (LoRA).
        timesteps, sigmas: in place of num_inference_steps, where the scheduler takes them.
        original_size, target_size, crops_coords_top_left, and with "negative_" before: SDXL's sizes, (height, width).

    Raises:
        NotImplementedError: one of the other arguments of the stock pipelines, with what to do instead.
        TypeError: an argument that nobody knows.
    """

    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    layout_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    layout_pooled_prompt_embeds: Tensor | None = None
    clip_skip: int | None = None
    guidance_rescale: float = 0.0
    cross_attention_kwargs: Mapping[str, float] | None = None
    timesteps: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None
    original_size: Size | None = None
    target_size: Size | None = None
    crops_coords_top_left: Size | None = None
    negative_original_size: Size | None = None
    negative_target_size: Size | None = None
    negative_crops_coords_top_left: Size | None = None

    @classmethod
    def given(cls, arguments: Mapping[str, Any], *, xl: bool) -> "StockArguments":
        """From a call's further keywords; `xl`: those of SDXL too."""
        known = {field.name for field in fields(cls)}
        for name, x in arguments.items():
            if name in _REFUSED and x is not None and not (name in _AS_IF_LEFT_OUT and x == _AS_IF_LEFT_OUT[name]):
                fail(OP, name, "None", type(x).__name__, _REFUSED[name], NotImplementedError)
            if name not in known and name not in _REFUSED:
                fail(OP, name, "an argument that the method has", "an unknown one", error=TypeError)
            if not xl and name in (*_SIZES, *_POOLED) and x is not None:
                fail(OP, name, "None, since only SDXL takes it", type(x).__name__)
        return cls(**{name: x for name, x in arguments.items() if name in known})

    def __post_init__(self) -> None:
        if self.clip_skip is not None:
            self._set("clip_skip", check_integer(OP, "clip_skip", self.clip_skip, 0, "a number of layers, or None"))
        self._set("guidance_rescale", check_number(OP, "guidance_rescale", self.guidance_rescale))
        kwargs = self.cross_attention_kwargs
        if kwargs is not None:
            if not isinstance(kwargs, Mapping) or set(kwargs) - {"scale"}:
                got = sorted(map(str, kwargs)) if isinstance(kwargs, Mapping) else type(kwargs).__name__
                hint = "the method's attention processors take nothing else"
                fail(OP, "cross_attention_kwargs", "{'scale': a number} or None", got, hint, NotImplementedError)
            checked = {name: check_number(OP, f"cross_attention_kwargs[{name!r}]", x) for name, x in kwargs.items()}
            self._set("cross_attention_kwargs", checked)
        if self.timesteps is not None and self.sigmas is not None:
            fail(OP, "sigmas", "None, since timesteps is given", type(self.sigmas).__name__)
        for name in _SIZES:
            size = getattr(self, name)
            if size is None:
                continue
            if not isinstance(size, (list, tuple)) or len(size) != 2:
                fail(OP, name, "(height, width)", repr(size))
            self._set(name, tuple(check_integer(OP, name, x, 0, "(height, width)") for x in size))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def sizes(self, size: Size, *, negative: bool) -> tuple[Size, Size, Size]:
        """(original size, crop, target size) that SDXL is told; `size` is the images'."""
        if negative and self.negative_original_size is not None and self.negative_target_size is not None:
            crop = self.negative_crops_coords_top_left or (0, 0)
            return self.negative_original_size, crop, self.negative_target_size
        return self.original_size or size, self.crops_coords_top_left or (0, 0), self.target_size or size
