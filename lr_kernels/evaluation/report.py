"""The third stage of an evaluation: a table, a summary, a plot and a gallery of what was drawn and scored."""

import csv
import io
import json
from pathlib import Path

from ..diffusers.many.items import write_whole
from .gallery import gallery
from .plot import axes_of, draw
from .run_file import Evaluation
from .summary import markdown, summarize
from .table import Table, read_table

FOLDER = "report"


def report(run: Evaluation) -> Path:
    """Write images.csv, prompts.csv, report.json, report.md, plot.png and gallery.html; the folder that they are in.

    ValueError where scores are missing or stale.
    """
    folder = run.output / FOLDER
    table = read_table(run)
    summary = summarize(run, table)
    write_whole(folder / "images.csv", images_csv(table).encode())
    write_whole(folder / "prompts.csv", prompts_csv(table).encode())
    write_whole(folder / "report.json", f"{json.dumps(summary, indent=2, ensure_ascii=False)}\n".encode())
    write_whole(folder / "report.md", markdown(summary).encode())
    axes = axes_of(summary, run.report.identity, run.report.diversity)
    if axes is None:
        (folder / "plot.png").unlink(missing_ok=True)
    else:
        write_whole(folder / "plot.png", draw(summary, axes))
    write_whole(folder / "gallery.html", gallery(run, table).encode())
    return folder


def images_csv(table: Table) -> str:
    """A line for each image; `prompt` is the name of the prompt's folder, as in prompts.csv, `text` what was drawn."""
    columns = [name for name in table.columns if any(name in row.values for row in table.rows)]
    lines = [["method", "concept", "prompt", "sample", "text", "seed", "path", *columns]]
    for row in table.rows:
        values = [_text(row.values.get(name)) for name in columns]
        place = [row.method, row.concept, row.folder, str(row.sample)]
        lines.append([*place, row.prompt, str(row.seed), row.path, *values])
    return _csv(lines)


def prompts_csv(table: Table) -> str:
    """A line for each method, concept and prompt, with the columns of whole prompts."""
    columns = [name for name in table.columns if any(name in values for values in table.of_prompts.values())]
    lines = [["method", "concept", "prompt", *columns]]
    for place, values in table.of_prompts.items():
        lines.append([*place, *(_text(values.get(name)) for name in columns)])
    return _csv(lines)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _csv(lines: list[list[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()
