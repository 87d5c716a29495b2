"""The first stage of an evaluation: every method draws every concept with every prompt."""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..diffusers.many.distribute import Generate, GenerationReport, generate_many
from ..diffusers.many.items import Drawn, ImageItem, check_items
from ..diffusers.many.run_file import METHOD_CLASSES
from ..diffusers.many.weights import personalized
from .methods import Artist, Wanted
from .run_file import Evaluation

ENDS = 2**20
"""Bytes at each end of a file that its fingerprint covers."""


def items_of(run: Evaluation) -> list[ImageItem]:
    """An item for each image: `<method>/<concept>/<prompt>/<sample>.png`.

    Items of one image by several methods follow each other, so that layouts are shared, and those of one concept, whose
    weights are loaded once. An item's seed depends on its concept, prompt and sample, so that all methods start from
    the same noise.
    """
    items = []
    for name, concept in run.concepts.items():
        given = given_of(run, name)
        for folder, template in run.prompts_of(name).items():
            for sample in range(run.samples):
                for column in run.methods:
                    arguments = {
                        "base": run.base,
                        "dtype": run.dtype,
                        "scheduler": run.scheduler,
                        "concept": given,
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
    found: dict[str, Any] = {"noun": concept.noun, "token": concept.token}
    files = {"image": concept.images[0], "mask": concept.masks[0] if concept.masks else None}
    files |= {key: getattr(concept, key) for key in ("unet", "lora", "textual_inversion")}
    return found | {key: f"{path.name} {fingerprint(path)}" for key, path in files.items() if path is not None}


def fingerprint(path: Path) -> str:
    """A digest of the names, the sizes and the ends of a file, or of all files in a folder: files of weights are too
    large to be read as a whole whenever a run goes on."""
    files = sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]
    found = hashlib.sha256()
    for one in files:
        size = one.stat().st_size
        found.update(f"{one.relative_to(path)} {size}\n".encode())
        with one.open("rb") as file:
            found.update(file.read(ENDS))
            file.seek(max(size - ENDS, 0))
            found.update(file.read())
    return found.hexdigest()[:16]


def generate(run: Evaluation, *, progress: bool = True) -> GenerationReport:
    """Draw what is not drawn yet, in all processes of a launcher; see `generate_many`."""
    return generate_many(items_of(run), lambda device: load(run, device), run.output, progress=progress)


def load(run: Evaluation, device: torch.device) -> Generate:
    """The base model on a device, and what draws items with it: a concept's weights are loaded with its first item."""
    base = run.pipeline.from_pretrained(run.model, dtype=getattr(torch, run.dtype)).to(device)
    if run.scheduler is not None:
        base.scheduler = getattr(diffusers, run.scheduler).from_config(base.scheduler.config)
    kind = METHOD_CLASSES[run.pipeline.__name__]
    loaded = ExitStack()
    artists: dict[str, Artist] = {}  # of the concept whose weights are loaded

    def draw(item: ImageItem, _: torch.Generator) -> Drawn:
        concept = run.concepts[item.subject]
        if item.subject not in artists:
            artists.clear()
            loaded.close()
            pipe = loaded.enter_context(personalized(base, kind, concept))
            mask = None if concept.masks is None else concept.masks[0]
            words = run.reference_prompt.replace("{}", concept.words)
            artists[item.subject] = Artist(pipe, run.pipeline, concept.noun, words, concept.images[0], mask)
        layout_prompt, method, arguments = (item.arguments[key] for key in ("layout_prompt", "method", "arguments"))
        return artists[item.subject].draw(Wanted(item.prompt, layout_prompt, item.seed, method, arguments))

    return draw
