"""The methods of an evaluation: how each draws an image of a concept, all from the same noise."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..diffusers.many.file_checks import SET_BY_THE_RUN, Known, known_arguments
from ..diffusers.many.items import Drawn
from ..diffusers.many.run_file import METHOD_CLASSES
from ..diffusers.methods import recipes as presets
from ..diffusers.pipelines.output import Costs, LayoutRetouchOutput
from ..diffusers.pipelines.pictures import preprocess
from ..diffusers.pipelines.pipeline import LayoutRetouch
from ..diffusers.pipelines.schedule import DEFAULT_SWITCH
from ..diffusers.pipelines.stock import StockArguments

STAGE_METHODS = ("vanilla", "personalized", "layout", "control", "retouch")
PRESETS: dict[str, Callable[..., Any]] = {
    "masactrl": presets.masactrl,
    "style_aligned": presets.style_aligned,
    "reference_only": presets.reference_only,
    "consistory": presets.consistory,
    "story_diffusion": presets.story_diffusion,
}
"""Presets of `lr_kernels.diffusers.methods`. Each draws a picture of the concept beside the image, or reads the
concept's first image; the image reads it."""
METHODS = (*STAGE_METHODS, *PRESETS)
_OF_STAGES = {"layout_steps", "layout_blend", "context_storage", "context_limit", "context_dtype"}
_OF_SHARING = {"retouch_start", "retouch_end", "retouch_layers"}
_OF_PRESETS = {
    "pipe", "images", "picture", "prompts", "subject_tokens", "masks", "halves", "source", "reference", "anchors",
}  # fmt: skip
"""Arguments of presets that follow from how an evaluation uses them."""


@dataclass(frozen=True)
class Wanted:
    """What is to be drawn."""

    prompt: str
    """as "a sks ball on sand" """
    layout_prompt: str
    """as "a ball on sand" """
    seed: int
    method: str
    """one of METHODS"""
    arguments: Mapping[str, Any]
    """of the method's call"""

    def noise(self) -> torch.Generator:
        """Where every method starts."""
        return torch.Generator().manual_seed(self.seed)


def known_to(method: str, pipeline: type[DiffusionPipeline]) -> Known:
    """The arguments that a method takes with a base model of this class."""
    if method in PRESETS:
        known = known_arguments([pipeline.__call__, PRESETS[method]])
        return {name: x for name, x in known.items() if name not in _OF_PRESETS | SET_BY_THE_RUN}
    kind = METHOD_CLASSES[pipeline.__name__]
    calls = [kind.layout, StockArguments.__init__]
    alone = _OF_STAGES | _OF_SHARING
    without = {"vanilla": alone, "personalized": alone, "control": {"retouch_end"}}
    if method in ("control", "retouch"):
        calls = [kind.__call__, *calls]
    left_out = without.get(method, set()) | SET_BY_THE_RUN
    return {name: x for name, x in known_arguments(calls).items() if name not in left_out}


class Artist:
    """Draws one concept by any method, while the concept's weights are loaded.

    The layouts of an image are kept until the next image, since layout, control and retouch have them in common.

    Args:
        pipe: the pipeline of the method, with the concept's weights.
        stock: the class of the base model's own pipeline, which the presets run in.
        noun, reference_prompt: of the concept, as "ball" and "a sks ball". image, mask: its first image.
    """

    def __init__(
        self,
        pipe: LayoutRetouch,
        stock: type[DiffusionPipeline],
        noun: str,
        reference_prompt: str,
        image: Path,
        mask: Path | None,
    ):
        self.pipe, self.words, self.reference_prompt = pipe, noun.split(), reference_prompt
        self.image = PIL.Image.open(image)
        self.mask = None if mask is None else PIL.Image.open(mask)
        self.stock: Any = stock.from_pipe(pipe, dtype=pipe.dtype, unet=pipe.personal_unet, vae=pipe.vae)
        self.stock.set_progress_bar_config(disable=True)
        self._layout: tuple[Any, LayoutRetouchOutput] | None = None

    def draw(self, wanted: Wanted) -> Drawn:
        """The image, where its method found the concept, and the seconds of each stage."""
        steps = wanted.arguments.get("num_inference_steps", 50)
        if wanted.method == "vanilla":
            return drawn(self.laid_out(wanted, {"layout_steps": steps}, find=False))
        if wanted.method == "personalized":
            return drawn(self.laid_out(wanted, {"layout_steps": 0}, find=False))
        if wanted.method == "layout":
            return drawn(self.layout(wanted))
        if wanted.method in PRESETS:
            return self.by_preset(wanted, PRESETS[wanted.method])
        return self.retouched(wanted, steps)

    def laid_out(self, wanted: Wanted, more: Mapping[str, Any], *, find: bool) -> LayoutRetouchOutput:
        """The layout stage; with `find` it keeps what the retouch stage reads."""
        given = {"context_storage": "device"} | dict(wanted.arguments) if find else wanted.arguments
        arguments = taken_by(self.pipe.layout, given) | dict(more)
        words = self.words if find else ()
        return self.pipe.layout(wanted.prompt, wanted.layout_prompt, words, generator=wanted.noise(), **arguments)

    def layout(self, wanted: Wanted) -> LayoutRetouchOutput:
        """The layout stage of an image, once for the methods that share its arguments."""
        key = wanted.prompt, wanted.layout_prompt, wanted.seed, repr(taken_by(self.pipe.layout, wanted.arguments))
        if self._layout is None or self._layout[0] != key:
            self._layout = None  # its memory is free before the next one is made
            self._layout = key, self.laid_out(wanted, {}, find=True)
        return self._layout[1]

    def retouched(self, wanted: Wanted, steps: int) -> Drawn:
        """The retouch stage; as the control without attention sharing."""
        layout = self.layout(wanted)
        arguments = taken_by(self.pipe.retouch, wanted.arguments)
        arguments = {name: x for name, x in arguments.items() if name not in ("height", "width")}  # the layout has it
        if wanted.arguments.get("retouch_guidance_scale") is not None:
            arguments["guidance_scale"] = wanted.arguments["retouch_guidance_scale"]
        if wanted.method == "control":
            start = arguments.get("retouch_start")
            arguments["retouch_end"] = round(DEFAULT_SWITCH * steps) if start is None else start
        found = self.pipe.retouch(
            wanted.prompt,
            self.image,
            self.reference_prompt,
            self.words,
            layout=layout,
            reference_mask=self.mask,
            generator=wanted.noise(),
            **{"contexts_from": "trajectory"} | arguments,
        )
        seconds = {"layout": layout.seconds["layout"], **found.seconds}
        return drawn(found, masks={"context": found.context_masks}, seconds=seconds)

    def by_preset(self, wanted: Wanted, preset: Callable[..., Any]) -> Drawn:
        """A preset in the stock pipeline with the personalized model, for two images: the concept's and the one that is
        wanted, or the latter beside the concept's first image."""
        call = known_arguments([self.stock.__call__])
        of_call = {name: x for name, x in wanted.arguments.items() if name in call}
        settings = {name: x for name, x in wanted.arguments.items() if name not in call}
        scale = of_call.get("guidance_scale")
        settings["halves"] = 2 if (call["guidance_scale"][1] if scale is None else scale) > 1 else 1
        beside = torch.Generator().manual_seed((wanted.seed + 1) % 2**63)
        prompts, generators = [self.reference_prompt, wanted.prompt], [beside, wanted.noise()]
        place, expected = 1, inspect.signature(preset).parameters
        if "picture" in expected:  # it takes the last row
            place, prompts, generators = 0, prompts[::-1], generators[::-1]
            settings |= {"picture": self.fitted(of_call), "generator": wanted.noise(), "images": 1}
        elif "prompts" in expected:
            settings |= {"prompts": prompts, "subject_tokens": self.words, "anchors": (0,)}
        else:
            settings["images"] = 2
        costs = Costs(self.stock._execution_device)
        with costs.of("preset"), preset(self.stock, **settings):
            images = self.stock(prompts, generator=generators, **of_call).images
        return Drawn(images[place], seconds=costs.seconds)

    def fitted(self, call: Mapping[str, Any]) -> Tensor:
        """The concept's first image in the size of the images, (1, 3, height, width) in [0, 1]."""
        sides = self.pipe.latent_size(call.get("height"), call.get("width"), None)
        height, width = (side * self.pipe.vae_scale_factor for side in sides)
        return preprocess(self.image, height, width, normalize=False)


def taken_by(call: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that a stage takes: its own and those of the stock pipelines."""
    known = {*inspect.signature(call).parameters, *(field.name for field in fields(StockArguments))}
    return {name: x for name, x in arguments.items() if name in known}


def drawn(
    output: LayoutRetouchOutput,
    masks: Mapping[str, Tensor | None] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Drawn:
    """The one image of an output, and its masks bool (1, 1, h, w)."""
    given = {name: mask for name, mask in (masks or {}).items() if mask is not None}
    pictures = {name: PIL.Image.fromarray(np.uint8(255) * mask[0, 0].cpu().numpy()) for name, mask in given.items()}
    image: Any = output.images[0]
    return Drawn(image, pictures, output.seconds if seconds is None else seconds)
