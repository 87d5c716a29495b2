"""The second stage of an evaluation: metrics of the images, a file for each method, concept and prompt."""

import hashlib
import json
import math
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

from ..diffusers.many.distribute import SpreadReport, process_state, spread
from ..diffusers.many.items import write_whole
from ..diffusers.pipelines.pictures import as_mask, preprocess
from ..runtime.checks import fail, plain_number
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


class ScoreReport(SpreadReport):
    """What became of the groups; skipped are those scored before, from the same images by the same metrics."""

    def summary(self) -> str:
        """As of images, under a title."""
        return f"scores: {super().summary()}"


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
    kept = [kept_scores(run, group) for group in groups]
    wanted = [i for i, scores in enumerate(kept) if scores is None or scores["error"] is not None]
    wanted = broadcast_object_list([wanted])[0]

    def work(place: int) -> str | None:
        return _score(run, groups[wanted[place]], state.device)

    title = "scores"
    found = {wanted[place]: e for place, e in spread(len(wanted), work, state, progress=progress, title=title).items()}
    return ScoreReport.of([group.path for group in groups], found)


def records_of(run: Evaluation, group: Group) -> dict[int, dict[str, Any]]:
    """The records of a group's images that are there with all their files, by sample."""
    found = {}
    for sample in range(run.samples):
        path = run.output / group.path / f"{sample}.json"
        if not path.is_file():
            continue
        try:
            record = json.loads(path.read_bytes())
            names = [*record["images"], *record.get("masks", {}).values()]
        except (ValueError, KeyError, TypeError):
            fail("evaluate", "output", f"the record of an image in {path}", "something else", "remove the file")
        if record.get("error") is None and all((run.output / name).is_file() for name in names):
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
        "metrics": [metric.settings() | {"columns": list(metric.columns)} for metric in run.chosen],
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


def kept_scores(run: Evaluation, group: Group) -> dict[str, Any] | None:
    """The scores of a group, or the error that they ended with; None where there are none, or where they are of other
    metrics or of other files than those that are there."""
    try:
        kept = json.loads((run.output / group.score_path).read_bytes())
    except (FileNotFoundError, ValueError):  # a broken file is one that is to be made again
        return None
    return kept if isinstance(kept, dict) and kept.get("of") == settings_of(run, group) else None


def seen_by_metrics(run: Evaluation, group: Group) -> PromptImages:
    """The images of a group with what metrics may compare them with."""
    concept, records = run.concepts[group.concept], records_of(run, group)
    references = _pictures(tuple((path, digest(path)) for path in concept.images))
    layouts = [layout_path(run, group, sample) for sample in records]
    return PromptImages(
        concept=group.concept,
        noun=concept.noun,
        template=group.template,
        prompt=group.template.replace("{}", concept.words),
        images=[picture(run.output / record["images"][0]) for record in records.values()],
        samples=list(records),
        references=references,
        masks=[_mask(run.output, record) for record in records.values()],
        reference_masks=None if concept.masks is None else [mask(path) for path in concept.masks],
        layouts=[picture(path) if path.is_file() else None for path in layouts],
    )


def picture(path: Path) -> PIL.Image.Image:
    """A picture as metrics see it, in RGB: upright, on white where it is transparent, read as the pipelines read it."""
    try:
        with PIL.Image.open(path) as image:
            upright = PIL.ImageOps.exif_transpose(image)
            pixels = preprocess(upright, upright.height, upright.width, normalize=False)[0]
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: expected a picture, got {error}") from error
    return PIL.Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


@lru_cache(maxsize=1)  # the groups of one concept follow each other, and photos are large
def _pictures(files: tuple[tuple[Path, str], ...]) -> list[PIL.Image.Image]:
    """Pictures of files, which are given with their digests."""
    return [picture(path) for path, _ in files]


def mask(path: Path) -> np.ndarray:
    """A mask, bool (height, width), read as the pipelines read it."""
    with PIL.Image.open(path) as image:
        upright = PIL.ImageOps.exif_transpose(image)
        return as_mask(upright, (upright.height, upright.width), "crop", torch.device("cpu"), "masks")[0].numpy()


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
            entries = getattr(column, "tolist", lambda given=column: given)()
            if not isinstance(entries, list | tuple):
                of_prompt[name] = _number(name, entries)
            elif len(entries) != len(images):
                raise ValueError(f"{name}: expected {len(images)} values, one for each image, got {len(entries)}")
            else:
                for values_of_image, value in zip(images.values(), entries):
                    values_of_image[name] = _number(name, value)
    return {"images": images, "prompt": of_prompt}


def _number(column: str, value: object) -> float | None:
    """A finite number of any type as a float. ValueError for anything else but None."""
    if value is None:
        return None
    number = plain_number(value)
    if number is None or not math.isfinite(number):
        raise ValueError(f"{column}: expected finite numbers, or None where there is nothing to measure, got {value!r}")
    return float(number)
