"""Runs described by a file: `python -m lr_kernels generate run.yaml`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from ..processors.bank import ReferenceBank
from .distribute import Generate, GenerationReport, generate_many, process_state
from .items import ImageItem, pending
from .run_file import METHOD_CLASSES, METHODS, Run, Subject, read_run
from .weights import base_pipeline, one_at_a_time


def generate_from_file(path: str | Path) -> GenerationReport:
    """Make the images that a file in YAML or JSON asks for; docs/many-prompts.md says what the file holds.

    Every subject is drawn with every prompt, as often as `samples` says, to `<output>/<subject>/<prompt>/<n>.png`; all
    else is as in `generate_many`.

    Raises:
        ValueError: what is wrong with the file, by the name of its key, before a model is loaded.
        FileNotFoundError: no such file.
    """
    run = read_run(path)
    return generate_many(run.items, lambda device: _load(run, device), run.output)


def command(path: Path, *, dry_run: bool = False) -> int:
    """What `generate` does; the status of the process: 1 if an item failed, 2 if the file is wrong."""
    try:
        run = read_run(path)
        wanted = set(pending(run.items, run.output))
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    if dry_run:
        for i, item in enumerate(run.items):
            print(run.output / item.path, f"seed {item.seed}", repr(item.prompt), "" if i in wanted else "(there)")
        return 0
    state = process_state()
    report = generate_many(run.items, lambda device: _load(run, device), run.output)
    state.destroy_process_group()
    if not state.is_main_process:
        return 0  # the main process's status is that of all: the first one that is not 0 ends the others
    print(report.summary())
    return 1 if report.failed else 0


def _load(run: Run, device: torch.device) -> Generate:
    """The base model on a device, and what draws an item with it: the models of its subject are loaded when an item of
    another subject came before."""
    base = base_pipeline(run.pipeline, run.base, run.dtype, run.scheduler, device)
    kind = METHOD_CLASSES[run.pipeline.__name__] if run.method == METHODS[0] else run.pipeline
    draws_of = one_at_a_time(base, kind, run.subjects, lambda pipe, name: _draws(pipe, run, run.subjects[name]))
    return lambda item, generator: draws_of(item.subject)(item, generator)


def _draws(pipe: Any, run: Run, subject: Subject) -> Callable[..., PIL.Image.Image]:
    """The function that draws items of a subject whose weights are loaded."""
    of_method = run.method == METHODS[0]
    references = _references(run, subject, pipe.device) if of_method else {}

    def draw(item: ImageItem, generator: torch.Generator) -> PIL.Image.Image:
        layout = {"layout_prompt": item.arguments["layout_prompt"]} if of_method else {}
        return pipe(prompt=item.prompt, generator=generator, **layout, **references, **run.arguments).images[0]

    return draw


def _references(run: Run, subject: Subject, device: torch.device) -> dict[str, Any]:
    """The arguments of the method's call by which it knows the subject."""
    found: dict[str, Any] = {"subject_tokens": subject.noun.split()}
    if subject.bank is not None:
        return found | {"reference_bank": ReferenceBank.load(subject.bank, device=device)}
    assert subject.image is not None  # read_run
    found["reference_image"] = PIL.Image.open(subject.image)
    found["reference_prompt"] = run.reference_prompt.replace("{}", subject.words)
    if subject.mask is not None:
        found["reference_mask"] = PIL.Image.open(subject.mask)
    return found
