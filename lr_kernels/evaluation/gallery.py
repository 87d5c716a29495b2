"""The gallery of an evaluation: a page without a server or a network, every prompt a row, every method a column."""

import base64
import io
import urllib.parse
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from .run_file import Evaluation
from .score import picture
from .table import Row, Table

THUMBNAIL = 128
"""Pixels of the longer side of a concept's picture."""
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
        shown = {method: _values(table, row) for method, row in images.items()}
        cells = [_cell(run, images.get(method), shown.get(method, {}), embedded) for method in table.methods]
        prompt = next(iter(images.values())).prompt
        lines.append({"concept": concept, "prompt": prompt, "sample": sample, "cells": cells, "n": len(values)})
        values.append(shown)
    template = resources.files("lr_kernels.evaluation").joinpath("gallery.html.jinja").read_text("utf-8")
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            lines=lines,
            methods=table.methods,
            columns=list(table.columns),
            values=values,
            references=[thumbnail(concept.images[0]) for concept in run.concepts.values()],
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


def _values(table: Table, row: Row) -> dict[str, float]:
    """What is known of an image, its own columns and those of its prompt."""
    found = row.values | table.of_prompts[row.method, row.concept, row.folder]
    return {name: value for name in table.columns if (value := found.get(name)) is not None}


def _cell(run: Evaluation, row: Row | None, values: dict[str, float], embedded: bool) -> dict[str, Any] | None:
    """What a cell shows; None where the image is missing."""
    if row is None:
        return None
    return {
        "image": source(run.output / row.path, row.path, embedded),
        "mask": None if row.mask is None else source(run.output / row.mask, row.mask, embedded),
        "values": values,
    }


def source(file: Path, path: str, embedded: bool) -> str:
    """The address of a PNG: relative to the folder of the report, or the picture itself."""
    return _data(file.read_bytes()) if embedded else "../" + urllib.parse.quote(path)


def thumbnail(path: Path) -> str:
    """A small copy of a concept's picture, of any format, as an address; the page has it once for all rows."""
    image = picture(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return _data(encoded.getvalue())


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
