"""What each stage of Layout-and-Retouch does for a subject, on the toy model: `python -m benchmarks.method`.

For every subject and seed the stages run by the pipeline's defaults through one call, the control of the second stage
beside them. Every image is judged; differences between stages are paired, image by image, and their intervals are
bootstrapped over (subject, seed) and over images. Defaults were chosen on the tuning subjects; the unseen ones were
not looked at. A second, smaller set of prompts asks for a place or a second object, and every attribute is judged by
itself. Writes per-image scores (two CSV files) and a summary (JSON).
"""

import argparse
import csv
import json
from pathlib import Path

import torch

from lr_kernels.runtime.extras import require

require("bench", "rich")
require("diffusers")

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from benchmarks import harness
from lr_kernels import toy
from lr_kernels.diffusers import StableDiffusionLayoutRetouchPipeline
from lr_kernels.toy import world
from lr_kernels.toy.judge import fidelity, object_masks, overlap, scores, spread
from lr_kernels.toy.stages import PAIRS, STAGES, Task, composed, on_backgrounds, personalized_pipeline, run_stages
from lr_kernels.toy.statistics import bootstrap_interval, paired_difference

SEEDS = (1000, 2000, 3000)
ATTRIBUTES = ("present", "identity", "place", "other_shape", "other_color", "background")
"""Of what the second set of prompts asks for, see `lr_kernels.toy.judge.fidelity`."""
SETS = {"tuning": tuple(world.TUNING_SUBJECTS), "unseen": tuple(world.UNSEEN_SUBJECTS)}


def pipeline_of(subject: str, folder: Path | None) -> StableDiffusionLayoutRetouchPipeline:
    """A personalized pipeline; with a folder, its weights are read from there where they were written before."""
    base = toy.load_pipeline()
    path = None if folder is None else folder / f"{subject}.safetensors"
    if path is None or not path.exists():
        pipe = personalized_pipeline(base, subject)
        if path is not None:
            folder.mkdir(parents=True, exist_ok=True)
            parts = {"unet": pipe.personalized_unet, "text_encoder": pipe.personalized_text_encoder}
            save_file({f"{p}:{k}": v.contiguous() for p, m in parts.items() for k, v in m.state_dict().items()}, path)
    else:
        personal, state = toy.load_pipeline(), load_file(path)
        for name in ("unet", "text_encoder"):
            own = {key.removeprefix(f"{name}:"): x for key, x in state.items() if key.startswith(f"{name}:")}
            getattr(personal, name).load_state_dict(own)
        pipe = StableDiffusionLayoutRetouchPipeline.from_pipe(
            base, personalized_unet=personal.unet.eval(), personalized_text_encoder=personal.text_encoder.eval()
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
    from lr_kernels.toy.encoder import similarity

    return [round(x, 5) for x in similarity(pixels, world.references(subject)[0]).tolist()]


def judged_by_attribute(outputs: dict, task: Task) -> list[dict]:
    """Per image and stage how well it shows what its prompt asks for; None what it does not ask for."""
    rows = []
    for stage, out in outputs.items():
        pixels = torch.as_tensor(out.images).float() * 2 - 1
        for i, (prompt, wanted) in enumerate(zip(task.prompts, task.wanted)):
            found = {name: round(x.item(), 5) for name, x in fidelity(pixels[i : i + 1], wanted).items()}
            rows.append({"stage": stage, "prompt": prompt, **{name: found.get(name) for name in ATTRIBUTES}})
    return rows


def summary_by_attribute(rows: list[dict]) -> dict:
    """Per stage the mean of each attribute over the images that were asked for it, with its interval."""
    report: dict[str, dict] = {}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        report[stage] = {}
        for name in ATTRIBUTES:
            asked = [row for row in rows if row["stage"] == stage and row[name] is not None]
            groups = [(row["subject"], row["seed"]) for row in asked]
            report[stage][name] = _rounded(bootstrap_interval([row[name] for row in asked], groups))
    return report


def summary(
    rows: list[dict], of_sets: list[dict], subjects: tuple[str, ...], pairs: tuple[tuple[str, str], ...] = PAIRS
) -> dict:
    """Means with intervals per stage, paired differences of `pairs` in all and per subject."""
    groups = [(row["subject"], row["seed"]) for row in rows]

    def column(name: str, subject: str | None = None) -> list[float]:
        return [row[name] for row in rows if subject in (None, row["subject"])]

    measures = sorted({key.split(" ", 1)[1] for key in rows[0] if key.split(" ")[0] in STAGES})
    stages = {}
    for stage in of_sets[0]["stages"]:
        found = {name: bootstrap_interval(column(f"{stage} {name}"), groups) for name in measures}
        for name in ("position_std", "diversity"):
            values = [entry["stages"][stage][name] for entry in of_sets]
            found[name] = bootstrap_interval(values)
        stages[stage] = {name: _rounded(values) for name, values in found.items()}
    differences = {}
    for first, second in pairs:
        for name in measures:
            both = [f"{first} {name}", f"{second} {name}"]
            entry = {"all": _rounded(paired_difference(*map(column, both), groups))}
            for subject in subjects:
                pair = [column(key, subject) for key in both]
                seeds = [row["seed"] for row in rows if row["subject"] == subject]
                entry[subject] = _rounded(paired_difference(*pair, seeds))
            differences[f"{first} - {second} {name}"] = entry
    return {
        "stages": stages,
        "differences": differences,
        "mask_iou": {subject: _rounded(bootstrap_interval(column("mask iou", subject))) for subject in subjects},
    }


def _rounded(values: tuple[float, ...]) -> list[float]:
    return [round(x, 4) for x in values]


def print_summary(report: dict, title: str) -> None:
    console = Console(width=160)
    names = ("identity", "histogram", "encoder", "background", "layout_iou", "position_std", "diversity")
    table = Table("stage", *names, title=title)
    for stage, found in report["stages"].items():
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*found[name]) for name in names if name in found]
        table.add_row(stage, *cells, style="bold" if stage == "retouch" else None)
    console.print(table)
    table = Table("stage", *ATTRIBUTES, title="prompts that ask for a place or a second object")
    for stage, found in report["by_attribute"].items():
        table.add_row(stage, *("{:.3f} [{:.3f}, {:.3f}]".format(*found[name]) for name in ATTRIBUTES))
    console.print(table)
    for pair, entry in report["differences"].items():
        if pair.split(" ")[-1] in ("identity", "encoder"):
            text = "; ".join("{} {:+.3f} [{:+.3f}, {:+.3f}]".format(subject, *x) for subject, x in entry.items())
            console.print(f"{pair}: {text}")
    console.print("mask IoU: " + "; ".join(f"{subject} {x[0]:.3f}" for subject, x in report["mask_iou"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=["unseen"], help="names, or tuning, or unseen (default)")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--per-background", type=int, default=3, help="images on each background and seed")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/method"), help="folder for CSV and JSON"
    )
    parser.add_argument("--weights", type=Path, help="folder that keeps personalized weights between runs")
    parser.add_argument("--pictures", type=Path, help="folder for a comparison of each subject and seed")
    options = parser.parse_args()
    subjects = tuple(name for given in options.subjects for name in SETS.get(given, (given,)))
    rows, of_sets, attributes = [], [], []
    for subject in subjects:
        pipe, task = pipeline_of(subject, options.weights), on_backgrounds(subject, options.per_background)
        for seed in options.seeds:
            outputs = run_stages(pipe, task, seed, tuple(options.stages))
            found, sets = judged(outputs, task)
            rows += [{"subject": subject, "seed": seed, **row} for row in found]
            of_sets.append({"subject": subject, "seed": seed, "stages": sets})
            if options.pictures:
                _draw(outputs, task, options.pictures / f"{subject}_{seed}.png")
            more = composed(subject)
            outputs = run_stages(pipe, more, seed, tuple(options.stages))
            attributes += [{"subject": subject, "seed": seed, **x} for x in judged_by_attribute(outputs, more)]
            if options.pictures:
                _draw(outputs, more, options.pictures / f"{subject}_{seed}_composed.png")
    name = "-".join(options.subjects)
    report = summary(rows, of_sets, subjects)
    report["by_attribute"] = summary_by_attribute(attributes)
    report["of"] = {"subjects": subjects, "seeds": list(options.seeds), "images": len(rows), **harness.machine()}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    for path, table in ((f"{name}.csv", rows), (f"{name}-attributes.csv", attributes)):
        with (options.output / path).open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    print_summary(report, f"{len(rows)} images of {', '.join(subjects)}")


def _draw(outputs: dict, task: Task, path: Path) -> None:
    from lr_kernels.toy.demo import comparison

    path.parent.mkdir(parents=True, exist_ok=True)
    images = {name: torch.as_tensor(out.images).float() for name, out in outputs.items()}
    noun = world.subject_prompt(task.subject)
    texts = [prompt.removeprefix(f"{noun} ").replace(" on ", "\non ") for prompt in task.prompts]
    comparison(images, task.reference[0], texts, task.backgrounds.count(task.backgrounds[0])).save(path)
    outputs["retouch"].draw().save(path.with_name(f"{path.stem}_masks.png"))


if __name__ == "__main__":
    main()
