"""The first stage of an evaluation: every method draws every concept with every prompt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..diffusers.many.distribute import Generate, GenerationReport, generate_many
from ..diffusers.many.file_checks import fingerprint
from ..diffusers.many.items import Drawn, ImageItem, check_items
from ..diffusers.many.run_file import METHOD_CLASSES
from ..diffusers.many.weights import base_pipeline, one_at_a_time
from ..diffusers.pipelines.pipeline import LayoutRetouch
from .methods import Artist, Wanted
from .run_file import Evaluation

READ_PICTURES = ("control", "retouch", "reference_only")
"""The methods whose images depend on the concept's first picture."""


def items_of(run: Evaluation) -> list[ImageItem]:
    """An item for each image: `<method>/<concept>/<prompt>/<sample>.png`.

    Items of one image by several methods follow each other, so that layouts are shared, and those of one concept, whose
    weights are loaded once. An item's seed depends on its concept, prompt and sample, so that all methods start from
    the same noise.
    """
    items = []
    base = f"{run.base} {fingerprint(Path(run.model))}" if Path(run.model).is_dir() else run.base
    for name, concept in run.concepts.items():
        given, shown = given_of(run, name), pictures_of(run, name)
        for folder, template in run.prompts_of(name).items():
            for sample in range(run.samples):
                for column in run.methods:
                    arguments = {
                        "base": base,
                        "dtype": run.dtype,
                        "scheduler": run.scheduler,
                        "concept": given | (shown if run.method_of(column) in READ_PICTURES else {}),
                        "layout_prompt": template.replace("{}", concept.noun),
                        "reference_prompt": run.reference_prompt.replace("{}", concept.words),
                        "method": run.method_of(column),
                        "arguments": run.arguments_of(column),
                    }
                    path = f"{column}/{name}/{folder}/{sample}.png"
                    prompt = template.replace("{}", concept.words)
                    items.append(ImageItem(path, prompt, name, sample, run.seed, arguments))
    return check_items(items)


def given_of(run: Evaluation, name: str) -> dict[str, Any]:
    """What of a concept makes its images what they are, as JSON holds it; files by name and fingerprint."""
    concept = run.concepts[name]
    weights = {key: getattr(concept, key) for key in ("unet", "lora", "textual_inversion")}
    return {"noun": concept.noun, "token": concept.token} | _named(weights)


def pictures_of(run: Evaluation, name: str) -> dict[str, str]:
    """Likewise the pictures that the methods of READ_PICTURES read."""
    concept = run.concepts[name]
    return _named({"image": concept.images[0], "mask": concept.masks[0] if concept.masks else None})


def _named(files: Mapping[str, Path | None]) -> dict[str, str]:
    return {key: f"{path.name} {fingerprint(path)}" for key, path in files.items() if path is not None}


def generate(run: Evaluation, *, progress: bool = True) -> GenerationReport:
    """Draw what is not drawn yet, in all processes of a launcher; see `generate_many`."""
    return generate_many(items_of(run), lambda device: load(run, device), run.output, progress=progress)


def load(run: Evaluation, device: torch.device) -> Generate:
    """The base model on a device, and what draws items with it: a concept's weights are loaded with its first item."""
    base = base_pipeline(run.pipeline, run.model, run.dtype, run.scheduler, device)

    def artist(pipe: LayoutRetouch, name: str) -> Artist:
        concept = run.concepts[name]
        mask = None if concept.masks is None else concept.masks[0]
        words = run.reference_prompt.replace("{}", concept.words)
        return Artist(pipe, run.pipeline, concept.noun, words, concept.images[0], mask)

    artist_of = one_at_a_time(base, METHOD_CLASSES[run.pipeline.__name__], run.concepts, artist)

    def draw(item: ImageItem, _: torch.Generator) -> Drawn:
        layout_prompt, method, arguments = (item.arguments[key] for key in ("layout_prompt", "method", "arguments"))
        return artist_of(item.subject).draw(Wanted(item.prompt, layout_prompt, item.seed, method, arguments))

    return draw
