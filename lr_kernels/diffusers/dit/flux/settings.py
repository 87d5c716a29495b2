"""How a call of the Flux pipeline denoises: its numbers and choices as one frozen object that the stages share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from ....denoising.coefficients import SCHEDULES
from ....runtime.backends import BACKENDS
from ....runtime.checks import check_choice, check_integer, check_number, entries_of, fail
from ...pipelines.pictures import FITS
from ...pipelines.schedule import DEFAULT_SWITCH
from ...pipelines.settings import OUTPUT_TYPES, TARGETS_FROM

OP = "FluxLayoutRetouchPipeline"
CONTEXTS_FROM = ("trajectory", "renoise")
LONGEST_TEXT = 512

Callback = Callable[[DiffusionPipeline, int, Tensor, dict], dict | None] | None

_EMBEDS = "pass (prompt_embeds, pooled_prompt_embeds) in place of a prompt"
_GUIDANCE = "the models are told guidance_scale; negative prompts would need a second pass"
_SUBJECT = "the subject comes by reference_image"
_REFUSED = {
    "prompt_2": _EMBEDS,
    "prompt_embeds": _EMBEDS,
    "pooled_prompt_embeds": _EMBEDS,
    "negative_prompt": _GUIDANCE,
    "negative_prompt_2": _GUIDANCE,
    "negative_prompt_embeds": _GUIDANCE,
    "negative_pooled_prompt_embeds": _GUIDANCE,
    "true_cfg_scale": _GUIDANCE,
    "ip_adapter_image": _SUBJECT,
    "ip_adapter_image_embeds": _SUBJECT,
    "negative_ip_adapter_image": _SUBJECT,
    "negative_ip_adapter_image_embeds": _SUBJECT,
    "joint_attention_kwargs": "pipe.set_adapters(name, weight) sets the strength of a LoRA",
    "sigmas": "pass num_inference_steps",
}
"""Arguments of `FluxPipeline` that are refused, with what to use instead."""


@dataclass(frozen=True, kw_only=True)
class FluxSettings:
    """The arguments of `FluxLayoutRetouchPipeline` that are numbers and choices, passed by keyword.

    `layout` and `retouch` take all of them, so that one dict serves both; each uses those that its stage has.

    Args:
        num_inference_steps: of the schedule, which both stages share. Default: 28.
        guidance_scale: what guidance-distilled models are told; others, as FLUX.1-schnell, do not read it.
        num_images_per_prompt: images of each prompt, in order.
        max_sequence_length: of T5's tokens, at most 512.
        layout_steps: λ1, steps of the vanilla model: all of them give the vanilla image, 0 the personalized one.
            Default: 0.3 of the steps.
        layout_blend: weight of the personalized model at each step, see `blend_schedule`: "hard" switches after
            layout_steps, "linear" and "cosine" ramp up from there, with a pass of each model in the steps between.
        retouch_start: step at which the targets leave the layouts' latents. Default: 0.3 of the steps.
        retouch_end: step from which the images no longer share attention. Default: the number of steps.
        retouch_layers: attention layers that share, by the beginnings of their names, as "transformer_blocks" (text and
            image apart), "single_transformer_blocks" (one stream) or "transformer_blocks.3". Default: all.
        sharing: False is the control: the same run, in which the targets read nothing but themselves.
        own_keys: whether a target's image also reads itself, see `JointRouting`. False: as in the UNets, the references
            or the layout alone, besides the text.
        reference_offset: how far from the target the references stand: index of the picture, row and column, in tokens
            of 16 pixels; reference r by r + 1 times as much. Default: (0, 0, columns), to its right, as in the pictures
            of several panels that Flux knows. FLUX.1-Kontext is trained with (1, 0, 0). (0, 0, 0) leaves them at the
            target's own positions, where DiTs copy places instead of parts (arXiv 2503.12590).
        subject_tokens: the words by which the model finds the subject in `prompt` and `reference_prompt`, best the
            class noun alone, as "dog". Needed where a mask is not given.
        mask_threshold: of `subject_mask`, for masks from the model's attention.
        reference_fit: how references of another aspect ratio are fitted: "crop", "pad" or "squeeze".
        contexts_from: latents of the layouts at each step: "trajectory", as the layout stage went through them, or
            "renoise", the finished layouts with the noise that they started from. References are re-noised.
        targets_from: where the targets start: "renoise" or "contexts", the latents of the layouts at that step.
        mask_blending: adaptive mask blending. False: the layout's mask throughout. True: outside of the masks the
            latents are the layout's after each step, and with subject_tokens the mask moves from the layout's to the
            target's own.
        backend: of the attention that shares, see `multi_source_attention`.
        output_type: "pil", "np", "pt" or "latent" (packed, as FluxPipeline's).
        callback_on_step_end: called in both stages as (pipe, step, timestep, tensors), with a step's number in the
            schedule. `pipe.stage` is "layout" or "retouch". What it returns in a dict counts from the next step on, and
            so does `pipe._interrupt`.
        callback_on_step_end_tensor_inputs: "latents" and "prompt_embeds", of the model with the larger weight in this
            step; in the retouch stage of the targets, whose contexts have the same.

    Raises:
        ValueError: a value that does not fit. NotImplementedError: another argument of FluxPipeline, with what to do
        instead. TypeError: an argument that nobody knows.
    """

    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    num_images_per_prompt: int = 1
    max_sequence_length: int = LONGEST_TEXT
    layout_steps: int | None = None
    layout_blend: str = "hard"
    retouch_start: int | None = None
    retouch_end: int | None = None
    retouch_layers: str | Sequence[str] | None = None
    sharing: bool = True
    own_keys: bool = True
    reference_offset: Sequence[float] | None = None
    subject_tokens: str | Sequence[str] = ()
    mask_threshold: float | str = "otsu"
    reference_fit: str = "crop"
    contexts_from: str = "trajectory"
    targets_from: str = "renoise"
    mask_blending: bool = False
    backend: str = "auto"
    output_type: str = "pil"
    callback_on_step_end: Callback = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)

    @classmethod
    def given(cls, arguments: Mapping[str, Any], tensor_inputs: Sequence[str]) -> "FluxSettings":
        """From a call's keywords; `tensor_inputs` are the names that a callback may ask for."""
        known = {field.name for field in fields(cls)}
        for name, x in arguments.items():
            if name in _REFUSED and x is not None and not (name == "true_cfg_scale" and x == 1):
                fail(OP, name, "None", type(x).__name__, _REFUSED[name], NotImplementedError)
            if name not in known and name not in _REFUSED:
                fail(OP, name, "an argument that the method has", "an unknown one", error=TypeError)
        settings = cls(**{name: x for name, x in arguments.items() if name in known})
        names = settings.callback_on_step_end_tensor_inputs
        if isinstance(names, str) or not isinstance(names, Sequence) or any(x not in tensor_inputs for x in names):
            fail(OP, "callback_on_step_end_tensor_inputs", f"names of {list(tensor_inputs)}", repr(names))
        return settings

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        words = [self.subject_tokens] if isinstance(self.subject_tokens, str) else self.subject_tokens
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word for word in words):
            fail(OP, "subject_tokens", "words of the prompts that stand for the one subject", repr(words))
        self._set("subject_tokens", list(words))
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            fail(OP, "callback_on_step_end", "a function, or None", type(self.callback_on_step_end).__name__)

    def _check_choices(self) -> None:
        check_choice(OP, "layout_blend", self.layout_blend, SCHEDULES)
        check_choice(OP, "contexts_from", self.contexts_from, CONTEXTS_FROM)
        check_choice(OP, "targets_from", self.targets_from, TARGETS_FROM)
        check_choice(OP, "reference_fit", self.reference_fit, FITS)
        check_choice(OP, "backend", self.backend, ("auto", *BACKENDS))
        check_choice(OP, "output_type", self.output_type, OUTPUT_TYPES)
        for name in ("sharing", "own_keys", "mask_blending"):
            if not isinstance(getattr(self, name), bool):
                fail(OP, name, "True or False", repr(getattr(self, name)))

    def _check_numbers(self) -> None:
        for name in ("num_inference_steps", "num_images_per_prompt"):
            self._set(name, check_integer(OP, name, getattr(self, name), 1, "a positive integer"))
        name, expected = "max_sequence_length", f"1 to {LONGEST_TEXT}"
        self._set(name, check_integer(OP, name, self.max_sequence_length, 1, expected, LONGEST_TEXT))
        self._set("guidance_scale", check_number(OP, "guidance_scale", self.guidance_scale))
        steps = self.num_inference_steps
        default = round(DEFAULT_SWITCH * steps)
        self._set_step("layout_steps", default, 0, steps)
        self._set_step("retouch_start", min(default, steps - 1), 0, steps - 1)
        assert self.retouch_start is not None
        self._set_step("retouch_end", steps, self.retouch_start, steps)
        if self.reference_offset is not None:
            offset = entries_of(self.reference_offset)
            expected = "three numbers: index of the picture, row, column"
            if offset is None or len(offset) != 3:
                fail(OP, "reference_offset", expected, repr(self.reference_offset))
            self._set("reference_offset", tuple(check_number(OP, "reference_offset", x, expected) for x in offset))
        if self.mask_threshold != "otsu":
            expected = "'otsu' or a number in [0, 1]"
            self._set("mask_threshold", check_number(OP, "mask_threshold", self.mask_threshold, expected, 0, 1))

    def _set_step(self, name: str, default: int, lowest: int, highest: int) -> None:
        value, hint = getattr(self, name), "a number of steps, not a share of them"
        value = default if value is None else value
        self._set(name, check_integer(OP, name, value, lowest, f"{lowest} to {highest}", highest, hint))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def share(self) -> range:
        """The steps in which the images share attention."""
        assert self.retouch_start is not None and self.retouch_end is not None
        return range(self.retouch_start, self.retouch_end if self.sharing else self.retouch_start)
