"""Every stage of Layout-and-Retouch on the toy model, by the pipeline's defaults, and the second stage's control."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from ..diffusers import StableDiffusionLayoutRetouchPipeline
from ..diffusers.pipelines.output import LayoutRetouchOutput
from ..diffusers.pipelines.schedule import DEFAULT_SWITCH
from . import world
from .judge import Wanted
from .subjects import personalized

STEPS, GUIDANCE = 20, 3.0
"""How the toy model is sampled, with and without the method; everything else is the pipeline's default."""
STAGES = ("vanilla", "personalized", "reference-only", "layout", "control", "retouch")
PAIRS = (("retouch", "control"), ("retouch", "layout"))
"""Whose images are compared one by one."""


@dataclass(frozen=True)
class Task:
    """Images of one subject, each with what its prompt asks for; a reference is given without its mask."""

    subject: str
    wanted: tuple[Wanted, ...]

    @property
    def backgrounds(self) -> list[str | None]:
        """The background of every image."""
        return [wanted.background for wanted in self.wanted]

    @property
    def prompts(self) -> list[str]:
        """As "a sks ball on sand"."""
        return [sentence(world.subject_prompt(self.subject), wanted) for wanted in self.wanted]

    @property
    def layout_prompts(self) -> list[str]:
        """As "a ball on sand"."""
        return [sentence(world.class_prompt(self.subject), wanted) for wanted in self.wanted]

    @property
    def reference(self) -> tuple[Tensor, str, str]:
        """The first reference (1, 3, height, width) in [0, 1], its prompt, and the word that finds the subject."""
        images, _ = world.references(self.subject)
        return images[:1] / 2 + 0.5, world.subject_prompt(self.subject), world.class_word(self.subject)


def on_backgrounds(subject: str, per_background: int = 3) -> Task:
    """The subject alone, so many images on each background."""
    names = (name for name in world.BACKGROUNDS for _ in range(per_background))
    return Task(subject, tuple(Wanted(subject=subject, background=name) for name in names))


def sentence(noun: str, wanted: Wanted) -> str:
    """A prompt in the form of the base model's captions: the noun with the rest of what is wanted."""
    other = "" if wanted.other is None else f" and a {wanted.other.color} {wanted.other.shape}"
    place = "" if wanted.place is None else f" at {wanted.place}"
    return f"{noun}{other}{place} on {wanted.background}"


def personalized_pipeline(base: StableDiffusionPipeline, subject: str) -> StableDiffusionLayoutRetouchPipeline:
    """A Layout-and-Retouch pipeline of the base model and of its copy that was trained on the subject's references."""
    unet, text_encoder = personalized(base, subject)
    pipe = StableDiffusionLayoutRetouchPipeline.from_pipe(
        base, personalized_unet=unet, personalized_text_encoder=text_encoder
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_stages(
    pipe: StableDiffusionLayoutRetouchPipeline,
    task: Task,
    seed: int,
    stages: tuple[str, ...] = STAGES,
    backend: str = "auto",
) -> dict[str, LayoutRetouchOutput]:
    """The outputs of the given stages, and always those of layout and retouch, all from the same noise.

    Images are (n, 3, height, width) in [0, 1]. vanilla: the base model with the class's prompts. personalized: the
    personalized model alone. reference-only: the personalized model, whose subject also attends to the reference.
    layout, retouch: both stages of one call of the pipeline. control: the retouch stage of the same layouts with
    attention sharing off and all else equal, so that the difference of retouch to it is due to attention sharing.
    """
    common: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "output_type": "pt",
        "backend": backend,
    }

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def layout(steps: int) -> LayoutRetouchOutput:
        return pipe.layout(task.prompts, task.layout_prompts, layout_steps=steps, generator=noise(), **common)

    found = {}
    if "vanilla" in stages:
        found["vanilla"] = layout(STEPS)
    if "personalized" in stages:
        found["personalized"] = layout(0)
    if "reference-only" in stages:
        found["reference-only"] = pipe.retouch(task.prompts, *task.reference, generator=noise(), **common)
    both = pipe(task.prompts, task.layout_prompts, *task.reference, generator=noise(), **common)
    assert isinstance(both, LayoutRetouchOutput) and both.contexts is not None and both.layout_images is not None
    found["layout"] = LayoutRetouchOutput(images=both.layout_images, latents=both.contexts.latents)
    if "control" in stages:
        off = round(DEFAULT_SWITCH * STEPS)  # sharing ends where it would start
        found["control"] = pipe.retouch(
            task.prompts, *task.reference, layout=both, retouch_end=off, generator=noise(), **common
        )
    found["retouch"] = both
    return found
