"""The second stage of an evaluation: metrics of the images, a file for each method, concept and prompt."""

import hashlib
import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from ..diffusers.many.distribute import process_state, spread
from ..diffusers.many.items import write_whole
from .metrics import Metric, PromptImages
from .run_file import Evaluation

FORMAT = 1
"""of the files of scores"""


@dataclass(frozen=True)
class Group:
    """The images of one method, concept and prompt."""

    method: str
    concept: str
    folder: str
    """of the prompt"""
    template: str

    @property
    def path(self) -> str:
        """Of the folder of its images within the output."""
        return f"{self.method}/{self.concept}/{self.folder}"

    @property
    def score_path(self) -> str:
        """Of its scores within the output."""
        return f"scores/{self.path}.json"


@dataclass(frozen=True)
class ScoreReport:
    """What became of the groups, by their paths; the same in all processes."""

    done: list[str]
    skipped: list[str]
    """scored before, from the same images by the same metrics"""
    failed: dict[str, str]

    def summary(self) -> str:
        """The numbers in a line, and a line for each failure."""
        counts = f"scores: {len(self.done)} done, {len(self.skipped)} skipped, {len(self.failed)} failed"
        return "\n".join([counts, *(f"failed: {path}: {error}" for path, error in self.failed.items())])


def groups_of(run: Evaluation) -> list[Group]:
    """All groups, those of one concept one after another."""
    return [
        Group(method, concept, folder, template)
        for concept in run.concepts
        for folder, template in run.prompts_of(concept).items()
        for method in run.methods
    ]


def score(run: Evaluation, *, progress: bool = True) -> ScoreReport:
    """Compute the metrics of all groups whose scores are not there yet, in all processes of a launcher.

    A group that raises an error gets a file with it, and the others go on. Images that are missing are left out; the
    report counts them.
    """
    state = process_state()
    from accelerate.utils import broadcast_object_list

    groups = groups_of(run)
    wanted = [i for i, group in enumerate(groups) if not is_scored(run, group)]
    wanted = broadcast_object_list([wanted])[0]

    def work(place: int) -> str | None:
        return _score(run, groups[wanted[place]], state.device)

    title = "scores"
    found = {wanted[place]: e for place, e in spread(len(wanted), work, state, progress=progress, title=title).items()}
    return ScoreReport(
        done=[group.path for i, group in enumerate(groups) if i in found and found[i] is None],
        skipped=[group.path for i, group in enumerate(groups) if i not in found],
        failed={group.path: error for i, group in enumerate(groups) if (error := found.get(i)) is not None},
    )


def records_of(run: Evaluation, group: Group) -> dict[int, dict[str, Any]]:
    """The records of a group's images that are there, by sample."""
    found = {}
    for sample in range(run.samples):
        path = run.output / group.path / f"{sample}.json"
        if path.is_file() and (record := json.loads(path.read_bytes())).get("error") is None:
            found[sample] = record
    return found


def settings_of(run: Evaluation, group: Group) -> dict[str, Any]:
    """What the scores of a group depend on: metrics, images by their digests, what they are compared with."""
    concept = run.concepts[group.concept]
    files: dict[str, str] = {}
    for record in records_of(run, group).values():
        files |= {path: digest(run.output / path) for path in (*record["images"], *record.get("masks", {}).values())}
    layouts = [layout_path(run, group, sample) for sample in range(run.samples)]
    return {
        "format": FORMAT,
        "metrics": [metric.settings() for metric in run.chosen],
        "files": files,
        "layouts": [digest(path) for path in layouts if path.is_file()],
        "references": [digest(path) for path in (*concept.images, *(concept.masks or ()))],
        "noun": concept.noun,
        "words": concept.words,
        "template": group.template,
    }


def layout_path(run: Evaluation, group: Group, sample: int) -> Path:
    """Where the image of the method "layout" is, if it is one of the methods."""
    return run.output / "layout" / group.concept / group.folder / f"{sample}.png"


@lru_cache(maxsize=100_000)
def _digest(path: Path, changed: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    status = path.stat()
    return _digest(path, status.st_mtime_ns, status.st_size)


def is_scored(run: Evaluation, group: Group) -> bool:
    """Whether the scores of a group are there, made by the same metrics from the same files."""
    path = run.output / group.score_path
    if not path.is_file():
        return False
    kept = json.loads(path.read_bytes())
    return kept.get("error") is None and kept["of"] == settings_of(run, group)


def seen_by_metrics(run: Evaluation, group: Group) -> PromptImages:
    """The images of a group with what metrics may compare them with."""
    concept, records = run.concepts[group.concept], records_of(run, group)
    layouts = [layout_path(run, group, sample) for sample in records]
    return PromptImages(
        concept=group.concept,
        noun=concept.noun,
        template=group.template,
        prompt=group.template.replace("{}", concept.words),
        images=[picture(run.output / record["images"][0]) for record in records.values()],
        samples=list(records),
        references=[picture(path) for path in concept.images],
        masks=[_mask(run.output, record) for record in records.values()],
        reference_masks=None if concept.masks is None else [mask(path) for path in concept.masks],
        layouts=[picture(path) if path.is_file() else None for path in layouts],
    )


def picture(path: Path) -> PIL.Image.Image:
    """A picture as metrics see it: upright, on white where it is transparent, in RGB."""
    with PIL.Image.open(path) as image:
        upright = PIL.ImageOps.exif_transpose(image)
        if "A" in upright.getbands() or "transparency" in upright.info:
            upright = upright.convert("RGBA")
            upright = PIL.Image.alpha_composite(PIL.Image.new("RGBA", upright.size, "white"), upright)
        return upright.convert("RGB")


def mask(path: Path) -> np.ndarray:
    """A mask, bool (height, width): where the picture is brighter than half."""
    with PIL.Image.open(path) as image:
        return np.asarray(PIL.ImageOps.exif_transpose(image).convert("L")) > 127


def _mask(folder: Path, record: Mapping[str, Any]) -> np.ndarray | None:
    """Where the method has found the concept, in the picture's size."""
    paths = record.get("masks", {})
    if "context" not in paths:
        return None
    with PIL.Image.open(folder / record["images"][0]) as image:
        size = image.size
    with PIL.Image.open(folder / paths["context"]) as found:
        return np.asarray(found.resize(size, PIL.Image.Resampling.NEAREST)) > 127


def _score(run: Evaluation, group: Group, device: torch.device) -> str | None:
    """Score a group and write its file; the error, if it failed."""
    found: dict[str, Any] = {"of": settings_of(run, group), "error": None}
    try:
        shown = seen_by_metrics(run, group)
        found |= columns_of(run.chosen, shown, device)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        found |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    write_whole(run.output / group.score_path, f"{json.dumps(found, indent=2)}\n".encode())
    return found["error"]


def columns_of(metrics: Sequence[Metric], shown: PromptImages, device: torch.device) -> dict[str, Any]:
    """The columns of metrics: those of each image by its sample, and those of the prompt."""
    images: dict[str, dict[str, float | None]] = {str(sample): {} for sample in shown.samples}
    of_prompt: dict[str, float | None] = {}
    for metric in metrics if shown.images else ():
        values = metric.score(shown, device)
        if set(values) != set(metric.columns):
            raise ValueError(f"{type(metric).__name__}: expected the columns {set(metric.columns)}, got {set(values)}")
        for name, column in values.items():
            if column is None or isinstance(column, float | int):
                of_prompt[name] = column
            elif len(column) == len(images):
                for values_of_image, value in zip(images.values(), column):
                    values_of_image[name] = value
            else:
                raise ValueError(f"{name}: expected {len(images)} values, one for each image, got {len(column)}")
    return {"images": images, "prompt": of_prompt}
