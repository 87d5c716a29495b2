"""Layout-and-Retouch on the toy model: run every stage, write a comparison PNG and a JSON of metrics."""

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .. import toy
from ..info import instruction_set, versions
from ..statistics import paired_difference
from .judge import scores, spread
from .stages import GUIDANCE, PAIRS, STEPS, on_backgrounds, personalized_pipeline, run_stages

SEED = 1000

COLUMNS = {
    "identity": "identity ↑",
    "histogram": "colour histogram ↑",
    "background": "background right ↑",
    "position_std": "position spread ↑",
    "diversity": "1 - mIoU ↑",
    "layout_iou": "IoU with layout ↑",
}


def run(output: Path, *, subject: str = "ball", seeds: int = 3, backend: str = "auto") -> dict:
    """Run the demo and write `comparison.png`, `masks.png` and `metrics.json` into `output`.

    Args:
        subject: one of `lr_kernels.toy.world.SUBJECTS`.
        seeds: images per background; 6 backgrounds. backend: of all operators.

    Returns:
        What metrics.json holds: per stage the metrics of `lr_kernels.toy.judge.evaluate` and the seconds it took, and
        the paired differences of identity with their 95 % intervals.
    """
    output.mkdir(parents=True, exist_ok=True)
    task = on_backgrounds(subject, seeds)
    pipe = personalized_pipeline(toy.load_pipeline(), subject)
    results = run_stages(pipe, task, SEED, backend=backend)
    images = {name: torch.as_tensor(result.images).float() for name, result in results.items()}
    layouts = images["layout"] * 2 - 1
    stages, identity = {}, {}
    for name, result in results.items():
        pixels = images[name] * 2 - 1
        found = scores(pixels, task.backgrounds, layouts, subject)
        identity[name] = found["identity"]
        means = {measure: round(values.mean().item(), 4) for measure, values in found.items()}
        stages[name] = {**means, **spread(pixels, task.backgrounds), "seconds": round(sum(result.seconds.values()), 2)}
    both = results["retouch"]
    stages["layout"]["seconds"] = round(both.seconds["layout"], 2)  # of one call, which did both
    stages["retouch"]["seconds"] = round(sum(both.seconds.values()) - both.seconds["layout"], 2)

    report = {
        "subject": subject,
        "images": len(task.prompts),
        "seeds": seeds,
        "settings": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "backend": backend},
        "stages": stages,
        "identity_differences": {
            f"{first} - {second}": [round(x, 4) for x in paired_difference(identity[first], identity[second])]
            for first, second in PAIRS
        },
        "instruction_set": instruction_set(),
        "versions": versions(),
    }
    (output / "metrics.json").write_text(json.dumps(report, indent=2))
    comparison(images, task.reference[0], [f"on {name}" for name in task.backgrounds], seeds).save(
        output / "comparison.png"
    )
    both.draw().save(output / "masks.png")
    _print(report, output)
    return report


def comparison(rows: dict[str, Tensor], reference: Tensor, texts: list[str], seeds: int, scale: int = 2) -> Image.Image:
    """A labelled picture: a row per stage, a column per image, the reference at the top left.

    rows: per stage (n, 3, h, w) in [0, 1]; texts: what n images show, `seeds` of each text next to each other.
    """
    side = reference.shape[-1] * scale
    gap, label, header = 6, 130, side + 34
    font = ImageFont.load_default(15)
    width = label + len(texts) * (side + gap)
    canvas = Image.new("RGB", (width, header + len(rows) * (side + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    canvas.paste(_picture(reference[0], side), (label, 4))
    draw.text((8, side // 2), "reference", fill="black", font=font)
    for column, text in enumerate(texts):
        if column % seeds == 0:
            draw.text((label + column * (side + gap), header - 4), text, fill="black", font=font, anchor="ld")
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
    print(f"Layout-and-Retouch of the {report['subject']}, {report['images']} images a stage")
    rows = [("stage", *COLUMNS.values(), "seconds")]
    for name, metrics in report["stages"].items():
        rows.append((name, *(f"{metrics[column]:.3f}" for column in COLUMNS), f"{metrics['seconds']:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *rest in rows:
        print(first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:])), sep="  ")
    for pair, (mean, low, high) in report["identity_differences"].items():
        print(f"identity, {pair}: {mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")
    print(f"pictures in {output}")
