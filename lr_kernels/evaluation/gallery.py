"""The gallery of an evaluation: a page without a server or a network, every prompt a row, every method a column."""

import base64
import urllib.parse
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from .run_file import Evaluation
from .table import Row, Table

Place = tuple[str, str, int]
"""(concept, prompt, sample)"""


def gallery(run: Evaluation, table: Table) -> str:
    """The page. Images are linked relative to the folder of the report, or embedded."""
    embedded = run.report.gallery == "embedded"
    rows: dict[Place, dict[str, Row]] = {}
    for row in table.rows:
        rows.setdefault((row.concept, row.folder, row.sample), {})[row.method] = row
    lines: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    for (concept, _, sample), images in in_order(run, rows):
        cells = [_cell(run, images.get(method), embedded) for method in table.methods]
        prompt = next(iter(images.values())).prompt
        lines.append({"concept": concept, "prompt": prompt, "sample": sample, "cells": cells, "n": len(values)})
        values.append({method: row.values for method, row in images.items()})
    references = {name: source(run.output, concept.images[0], embedded) for name, concept in run.concepts.items()}
    template = resources.files("lr_kernels.evaluation").joinpath("gallery.html.jinja").read_text("utf-8")
    columns = [name for name in table.columns if any(name in row.values for row in table.rows)]
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            lines=lines,
            methods=table.methods,
            columns=columns,
            values=values,
            references=references,
            control=run.report.control if run.report.control in table.methods else None,
            concepts=list(run.concepts),
        )
    )


def in_order(run: Evaluation, rows: dict[Place, dict[str, Row]]) -> Iterator[tuple[Place, dict[str, Row]]]:
    """Rows in the order of the file: by concept, prompt and sample."""
    for name in run.concepts:
        for folder in run.prompts_of(name):
            for sample in range(run.samples):
                if (name, folder, sample) in rows:
                    yield (name, folder, sample), rows[name, folder, sample]


def _cell(run: Evaluation, row: Row | None, embedded: bool) -> dict[str, Any] | None:
    """What a cell shows; None where the image is missing."""
    if row is None:
        return None
    return {
        "image": source(run.output, run.output / row.path, embedded),
        "mask": None if row.mask is None else source(run.output, run.output / row.mask, embedded),
        "values": {name: value for name, value in row.values.items() if value is not None},
    }


def source(output: Path, path: Path, embedded: bool) -> str:
    """The address of a picture: relative to the folder of the report, or the picture itself."""
    if embedded:
        kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else path.suffix[1:].lower()
        return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    relative = Path("..") / path.relative_to(output) if path.is_relative_to(output) else path.resolve()
    return urllib.parse.quote(relative.as_posix()) if not relative.is_absolute() else relative.as_uri()
