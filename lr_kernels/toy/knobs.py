"""What the arguments of Layout-and-Retouch do, on the toy model: the same prompts and noise, one argument changed."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from .. import toy
from ..diffusers.pipelines.output import LayoutRetouchOutput
from ..diffusers.subjects.overlay import Row, sheet
from . import world
from .judge import object_masks, scores
from .stages import GUIDANCE, STEPS, Task, on_backgrounds, personalized_pipeline

SEED = 1000


@dataclass(frozen=True)
class Knob:
    """A row of the picture."""

    label: str
    why: str
    """when it is turned, or what it shows"""
    arguments: dict = field(default_factory=dict)


KNOBS = (
    Knob("defaults", "retouch_start=6 of 20 steps"),
    Knob("retouch_start=14", "too late: the subject is lost", {"retouch_start": 14}),
    Knob("retouch_start=3", "earlier: more of the subject", {"retouch_start": 3}),
    Knob("retouch_start=0", "too early: the layout is lost", {"retouch_start": 0}),
    Knob("targets_from='contexts'", "keeps the layout better", {"targets_from": "contexts"}),
    Knob("mask_blending=True", "keeps the layout's background", {"mask_blending": True}),
    Knob("mask_threshold=0.9", "too high: the mask cuts it", {"mask_threshold": 0.9}),
    Knob("layout_mask=…", "one's own mask"),
    Knob("layout_steps=20", "the subject is in no layout", {"layout_steps": 20}),
    Knob("layout_steps=0", "every image like the reference", {"layout_steps": 0}),
)


def run(output: Path, *, subject: str = world.SUBJECT, steps: int = STEPS, seed: int = SEED) -> Path:
    """Draw a row of pictures for every knob and write `knobs.png` into `output`; returns its path."""
    output.mkdir(parents=True, exist_ok=True)
    task = on_backgrounds(subject, per_background=1)
    pipe = personalized_pipeline(toy.load_pipeline(), subject)
    rows: list[Row] = []
    masks = None
    for knob in tqdm(KNOBS, desc="knobs"):
        arguments = {"layout_mask": masks} if knob.label.startswith("layout_mask") else knob.arguments
        found = pipe(
            task.prompts,
            task.layout_prompts,
            *task.reference,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            output_type="pt",
            generator=torch.Generator().manual_seed(seed),
            **arguments,
        )
        assert isinstance(found, LayoutRetouchOutput) and isinstance(found.layout_images, torch.Tensor)
        if not rows:
            masks = object_masks(found.layout_images.float() * 2 - 1) > 0
            rows.append(Row("layout\nand where its subject is", found.layout_images, masks=found.context_masks))
        rows.append(Row(f"{knob.label}\n{knob.why}\n{_measured(found, task)}", found.images, masks=_shown(knob, found)))
    path = output / "knobs.png"
    sheet(rows).save(path, optimize=True)
    return path


def _measured(found: LayoutRetouchOutput, task: Task) -> str:
    assert isinstance(found.images, torch.Tensor) and isinstance(found.layout_images, torch.Tensor)
    pixels, layouts = (x.float() * 2 - 1 for x in (found.images, found.layout_images))
    means = {name: x.mean().item() for name, x in scores(pixels, task.backgrounds, layouts, task.subject).items()}
    return f"identity {means['identity']:.2f}, IoU {means['layout_iou']:.2f}"


def _shown(knob: Knob, found: LayoutRetouchOutput) -> torch.Tensor | None:
    """The masks of a row that is about them."""
    return found.subject_masks if "mask" in knob.label else None
