"""Layout-and-Retouch on the toy model: personalize, run every stage, write a comparison PNG and a JSON of metrics."""

import json
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import blend_schedule, toy
from .diffusers import StableDiffusionLayoutRetouchPipeline
from .diffusers.output import LayoutRetouchOutput
from .info import versions
from .toy.judge import evaluate
from .toy.personalize import personalize

STEPS, GUIDANCE = 20, 3.0
LAYOUT_STEPS = 6
LAYOUT_BLEND = blend_schedule("linear", STEPS, LAYOUT_STEPS, ramp_steps=1)
"""Six steps of the vanilla model, one half and half, then the personalized one."""
RETOUCH = {"retouch_start": 3, "retouch_layers": [2], "sources": "renoise", "guidance_scale": 2.0}
"""The 8x8 layers carry the subject, less guidance leaves the reference more say, an early start lets it take hold."""
SEED = 1000

COLUMNS = {
    "identity": "identity ↑",
    "histogram": "colour histogram ↑",
    "background": "background right ↑",
    "position_std": "position spread ↑",
    "diversity": "1 - mIoU ↑",
}


def run(output: Path, *, seeds: int = 3, backend: str = "auto") -> dict:
    """Run the demo and write `comparison.png` and `metrics.json` into `output`.

    Args:
        seeds: images per background; 6 backgrounds. backend: of all operators.

    Returns:
        What metrics.json holds: per stage the metrics of `lr_kernels.toy.judge.evaluate` and the seconds it took.
    """
    output.mkdir(parents=True, exist_ok=True)
    names = [name for name in toy.BACKGROUNDS for _ in range(seeds)]
    prompts = [f"{toy.SUBJECT_PROMPT} on {name}" for name in names]
    class_prompts = [f"{toy.CLASS_PROMPT} on {name}" for name in names]
    references, reference_masks = toy.references()

    seconds: dict[str, float] = {}
    start = time.perf_counter()
    base = toy.load_pipeline()
    personal = personalize(base, references)
    seconds["personalize"] = time.perf_counter() - start
    pipe = StableDiffusionLayoutRetouchPipeline.from_pipe(
        base, personalized_unet=personal.unet, personalized_text_encoder=personal.text_encoder
    )
    common = {"num_inference_steps": STEPS, "output_type": "pt", "backend": backend}

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(SEED)  # every stage starts from the same latents

    def layout(name: str, blend: str | Tensor, layout_steps: int) -> LayoutRetouchOutput:
        pipe.set_progress_bar_config(desc=name)
        return pipe.layout(
            prompts,
            class_prompts,
            layout_blend=blend,
            layout_steps=layout_steps,
            guidance_scale=GUIDANCE,
            generator=noise(),
            **common,
        )

    def retouch(name: str, context: Tensor | None) -> LayoutRetouchOutput:
        pipe.set_progress_bar_config(desc=name)
        return pipe.retouch(
            prompts,
            references[:1] / 2 + 0.5,
            toy.SUBJECT_PROMPT,
            toy.SUBJECT_PROMPT.split()[1:],
            context_latents=context,
            reference_mask=reference_masks[0],
            generator=noise(),
            **RETOUCH,
            **common,
        )

    results = {
        "vanilla": layout("vanilla", "hard", STEPS),
        "personalized": layout("personalized", "hard", 0),
        "reference-only": retouch("reference-only", None),
        "layout": layout("layout", LAYOUT_BLEND, LAYOUT_STEPS),
    }
    results["retouch"] = retouch("retouch", results["layout"].latents)
    stages = {}
    for name, result in results.items():
        images = torch.as_tensor(result.images).float() * 2 - 1
        seconds[name] = sum(result.seconds.values())
        stages[name] = {**evaluate(images, names), "seconds": round(seconds[name], 2)}

    report = {
        "images": len(names),
        "seeds": seeds,
        "personalize_seconds": round(seconds["personalize"], 2),
        "settings": {
            "steps": STEPS,
            "guidance": GUIDANCE,
            "layout_steps": LAYOUT_STEPS,
            "layout_blend": LAYOUT_BLEND.tolist(),
            "retouch": RETOUCH,
            "backend": backend,
        },
        "stages": stages,
        "versions": versions(),
    }
    (output / "metrics.json").write_text(json.dumps(report, indent=2))
    rows = {name: torch.as_tensor(result.images).float() for name, result in results.items()}
    comparison(rows, references[:1] / 2 + 0.5, names, seeds).save(output / "comparison.png")
    _print(report, output)
    return report


def comparison(rows: dict[str, Tensor], reference: Tensor, names: list[str], seeds: int, scale: int = 2) -> Image.Image:
    """A labelled picture: a row per stage, a column per image, the reference at the top left.

    rows: per stage (n, 3, h, w) in [0, 1]; names: n backgrounds, `seeds` columns of each are next to each other.
    """
    side = reference.shape[-1] * scale
    gap, label, header = 6, 130, side + 34
    font = ImageFont.load_default(15)
    width = label + len(names) * (side + gap)
    canvas = Image.new("RGB", (width, header + len(rows) * (side + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    canvas.paste(_picture(reference[0], side), (label, 4))
    draw.text((8, side // 2), "reference", fill="black", font=font)
    for column, name in enumerate(names):
        if column % seeds == 0:
            draw.text((label + column * (side + gap), side + 12), f"on {name}", fill="black", font=font)
    for row, (stage, images) in enumerate(rows.items()):
        top = header + row * (side + gap)
        draw.text((8, top + side // 2 - 8), stage, fill="black", font=font)
        for column, image in enumerate(images):
            canvas.paste(_picture(image, side), (label + column * (side + gap), top))
    return canvas


def _picture(image: Tensor, side: int) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def _print(report: dict, output: Path) -> None:
    table = Table("stage", *COLUMNS.values(), "seconds", title=f"Layout-and-Retouch, {report['images']} images a stage")
    for name, metrics in report["stages"].items():
        values = [f"{metrics[column]:.3f}" for column in COLUMNS]
        table.add_row(name, *values, f"{metrics['seconds']:.1f}", style="bold" if name == "retouch" else None)
    console = Console(width=120)
    console.print(table)
    console.print(
        f"personalization took {report['personalize_seconds']:.1f} s; pictures in {output / 'comparison.png'}"
    )
