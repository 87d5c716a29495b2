"""What banks in 8 bits change in the pictures, on the toy model: `python -m benchmarks.eight_bit_method`.

For every subject and seed the retouch stage runs on the same layouts from the same noise: with banks of references and
contexts in the model's own dtype ("retouch"), with both banks in 8 bits (by the dtype's name), and with attention
sharing off ("control"). Images are judged by `lr_kernels.toy`, and differences are paired, image by image. A
measure has moved where the interval of its paired difference, to the four digits that are written, leaves 0 out. Writes
per-image scores (CSV) and a summary (JSON).
"""

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lr_kernels.runtime.extras import require

require("bench", "rich")
require("diffusers")

from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import harness
from benchmarks.eight_bit import EIGHT_BITS
from lr_kernels import toy
from lr_kernels.diffusers import StableDiffusionLayoutRetouchPipeline
from lr_kernels.diffusers.pipelines.output import LayoutRetouchOutput
from lr_kernels.diffusers.pipelines.schedule import DEFAULT_SWITCH
from lr_kernels.statistics import bootstrap_interval, paired_difference
from lr_kernels.toy import world
from lr_kernels.toy.encoder import similarity
from lr_kernels.toy.judge import object_masks, overlap, scores, spread
from lr_kernels.toy.stages import GUIDANCE, STEPS, Task, on_backgrounds, personalized_pipeline

PLAIN, CONTROL = "retouch", "control"
SEEDS = (1000, 2000, 3000)
SETS = {"tuning": tuple(world.TUNING_SUBJECTS), "unseen": tuple(world.UNSEEN_SUBJECTS)}


def run(
    pipe: StableDiffusionLayoutRetouchPipeline, task: Task, seed: int, dtypes: Iterable[str], steps: int = STEPS
) -> tuple[dict[str, LayoutRetouchOutput], dict[str, int]]:
    """The outputs "layout", CONTROL, PLAIN and of each dtype; and the bytes of both banks, by the latter names."""
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": GUIDANCE}
    found, nbytes = {}, {}
    *_, word = task.reference
    for name in (PLAIN, *dtypes):
        dtype = EIGHT_BITS.get(name)
        bank = pipe.reference_bank(*task.reference, dtype=dtype, **settings)
        common = {**settings, "output_type": "pt", "generator": torch.Generator().manual_seed(seed)}
        kept = {"context_storage": "device", "context_dtype": dtype}
        layout = pipe.layout(task.prompts, task.layout_prompts, word, **kept, **common)
        found[name] = pipe.retouch(task.prompts, None, None, word, layout=layout, reference_bank=bank, **common)
        nbytes[name] = bank.nbytes + layout.contexts.bank.nbytes
        found.setdefault("layout", layout)
        assert torch.equal(layout.latents, found["layout"].latents)
    off = round(DEFAULT_SWITCH * steps)  # sharing ends where it would start
    found[CONTROL] = pipe.retouch(task.prompts, *task.reference, layout=found["layout"], retouch_end=off, **common)
    return found, nbytes


def judged(outputs: dict, task: Task) -> tuple[list[dict], dict]:
    """Per-image scores of every stage, and what only a set of images has."""
    images = {name: torch.as_tensor(out.images).float() * 2 - 1 for name, out in outputs.items()}
    rows = [{"background": name, "image": i} for i, name in enumerate(task.backgrounds)]
    of_sets = {}
    for stage, pixels in images.items():
        for name, values in scores(pixels, task.backgrounds, images["layout"], task.subject).items():
            for row, value in zip(rows, values.tolist()):
                row[f"{stage} {name}"] = round(value, 5)
        similar = _similarity(pixels, task.subject)
        for row, value in zip(rows, similar):
            row[f"{stage} encoder"] = value
        of_sets[stage] = spread(pixels, task.backgrounds)
    found = outputs["retouch"].context_masks[0].float()
    true = F.adaptive_avg_pool2d(object_masks(images["layout"])[:, None], found.shape[1:])[:, 0] >= 0.5
    for row, value in zip(rows, overlap(found, true.float()).tolist()):
        row["mask iou"] = round(value, 5)
    return rows, of_sets


def _similarity(pixels: torch.Tensor, subject: str) -> list[float]:
    """By an encoder that was trained on photographs, see `lr_kernels.toy.encoder`."""
    return [round(x, 5) for x in similarity(pixels, world.references(subject)[0]).tolist()]


def summary(
    rows: list[dict], of_sets: list[dict], subjects: tuple[str, ...], pairs: tuple[tuple[str, str], ...]
) -> dict:
    """Means with intervals per stage, paired differences of `pairs` in all and per subject."""
    paths = [(row["subject"], row["seed"]) for row in rows]

    def column(name: str, subject: str | None = None) -> list[float]:
        return [row[name] for row in rows if subject in (None, row["subject"])]

    measures = sorted({key.split(" ", 1)[1] for key in rows[0] if " " in key and key != "mask iou"})
    stages = {}
    for stage in of_sets[0]["stages"]:
        found = {name: bootstrap_interval(column(f"{stage} {name}"), paths) for name in measures}
        for name in ("position_std", "diversity"):
            values = [entry["stages"][stage][name] for entry in of_sets]
            found[name] = bootstrap_interval(values)
        stages[stage] = {name: _rounded(values) for name, values in found.items()}
    differences = {}
    for first, second in pairs:
        for name in measures:
            both = [f"{first} {name}", f"{second} {name}"]
            entry = {"all": _rounded(paired_difference(*map(column, both), paths))}
            for subject in subjects:
                pair = [column(key, subject) for key in both]
                seeds = [(row["seed"],) for row in rows if row["subject"] == subject]
                entry[subject] = _rounded(paired_difference(*pair, seeds))
            differences[f"{first} - {second} {name}"] = entry
    return {
        "stages": stages,
        "differences": differences,
        "mask_iou": {subject: _rounded(bootstrap_interval(column("mask iou", subject))) for subject in subjects},
    }


def _rounded(values: tuple[float, ...]) -> list[float]:
    return [round(x, 4) for x in values]


def pixel_differences(outputs: dict[str, LayoutRetouchOutput]) -> dict[str, dict[str, float]]:
    """How far each run's images are from those of PLAIN, in 1/255: the mean, and the mean of the images' largest."""

    def images(name: str) -> Tensor:
        return torch.as_tensor(outputs[name].images).float()

    found = {}
    for name in outputs.keys() - {PLAIN, "layout"}:
        apart = 255 * (images(name) - images(PLAIN)).abs().flatten(1)
        found[name] = {"mean": apart.mean().item(), "largest": apart.amax(1).mean().item()}
    return found


def report(rows: list[dict], of_sets: list[dict], pixels: list[dict], subjects: tuple[str, ...]) -> dict:
    """The summary: means with intervals, paired differences to PLAIN, what has moved, differences of pixels."""
    others = [name for name in of_sets[0]["stages"] if name not in (PLAIN, "layout")]
    found = summary(rows, of_sets, subjects, tuple((name, PLAIN) for name in others))
    found["moved"] = {name: [] for name in others}
    for pair, entry in found["differences"].items():
        name, _, _, measure = pair.split(" ")
        _, low, high = entry["all"]
        if not low <= 0 <= high:
            found["moved"][name].append(measure)
    found["pixels_of_255"] = {
        name: {key: round(sum(x[name][key] for x in pixels) / len(pixels), 3) for key in ("mean", "largest")}
        for name in others
    }
    return found


def show(found: dict) -> Table:
    """Paired differences to the banks in the model's dtype."""
    names = list(found["moved"])
    shown = Table("measure", PLAIN, *(f"{name} - {PLAIN}" for name in names))
    for measure in sorted({pair.split(" ")[-1] for pair in found["differences"]}):
        differences = (found["differences"][f"{name} - {PLAIN} {measure}"]["all"] for name in names)
        cells = ["{:+.4f} [{:+.4f}, {:+.4f}]".format(*x) for x in differences]
        shown.add_row(measure, "{:.3f} [{:.3f}, {:.3f}]".format(*found["stages"][PLAIN][measure]), *cells)
    cells = (f"{x['mean']:.2f}, largest {x['largest']:.1f}" for x in found["pixels_of_255"].values())
    shown.add_row("pixels, of 255", "", *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=["unseen"], help="names, or tuning, or unseen (default)")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--per-background", type=int, default=2, help="images on each background and seed, 2 or more")
    parser.add_argument("--dtypes", nargs="+", choices=list(EIGHT_BITS), default=list(EIGHT_BITS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/method"), help="folder of the files")
    options = parser.parse_args()
    if options.per_background < 2:
        parser.error("--per-background: expected 2 or more, whose diversity can be measured")
    subjects = tuple(name for given in options.subjects for name in SETS.get(given, (given,)))
    rows, of_sets, pixels, nbytes = [], [], [], {}
    for subject in subjects:
        pipe, task = (
            personalized_pipeline(toy.load_pipeline(), subject),
            on_backgrounds(subject, options.per_background),
        )
        for seed in options.seeds:
            outputs, nbytes = run(pipe, task, seed, options.dtypes)
            found, sets = judged(outputs, task)
            rows += [{"subject": subject, "seed": seed, **row} for row in found]
            of_sets.append({"subject": subject, "seed": seed, "stages": sets})
            pixels.append(pixel_differences(outputs))
    result = report(rows, of_sets, pixels, subjects)
    result["bytes"] = nbytes
    result["of"] = {"subjects": subjects, "seeds": list(options.seeds), "images": len(rows), **harness.machine()}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "eight_bit.json").write_text(json.dumps(result, indent=2) + "\n")
    with (options.output / "eight_bit.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    console = Console(width=160)
    console.print(show(result))
    console.print(f"moved: {result['moved']}; bytes of both banks: {nbytes}")


if __name__ == "__main__":
    main()
