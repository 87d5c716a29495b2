"""Means of every method with their intervals, and paired differences to the control."""

import statistics
from collections.abc import Mapping
from typing import Any

from ..info import versions
from ..statistics import bootstrap_interval, paired_difference
from .run_file import Evaluation
from .table import Key, Table

DIGITS = 5


def summarize(run: Evaluation, table: Table) -> dict[str, Any]:
    """What report.json holds.

    `methods`: by method and column the mean, the ends of its interval and the number of values; intervals are
    bootstrapped over concepts, their prompts and the prompts' samples. `differences`: by method and column the same of
    the differences to the control, image by image, in `all` and by concept. `seconds`: by method the median over images
    and their number.
    """
    control = run.report.control if run.report.control in table.methods else None
    others = [] if control is None else [method for method in table.methods if method != control]
    return {
        "protocol": run.protocol,
        "control": control,
        "concepts": list(run.concepts),
        "prompts": {name: list(run.prompts_of(name).values()) for name in run.concepts},
        "samples": run.samples,
        "columns": {name: {"about": x.about, "better": x.better} for name, x in table.columns.items()},
        "metrics": [metric.settings() for metric in run.chosen],
        "level": run.report.level,
        "methods": {
            method: _present({name: _mean(run, table.values(method, name)) for name in table.columns})
            for method in table.methods
        },
        "differences": {
            method: _present({name: _difference(run, table, method, control, name) for name in table.columns})
            for method in others
        },
        "missing": table.missing,
        "failed": table.failed,
        "seconds": {method: _seconds(table, method) for method in table.methods},
        "versions": versions(),
    }


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in values.items() if x is not None}


def _mean(run: Evaluation, values: Mapping[Key, float]) -> dict[str, Any] | None:
    """The mean, its interval and the number of values."""
    if not values:
        return None
    found = bootstrap_interval(
        list(values.values()), [_groups(key) for key in values], run.report.level, run.report.resamples
    )
    return _entry(found, len(values))


def _entry(found: tuple[float, float, float], count: int) -> dict[str, Any]:
    mean, low, high = (round(x, DIGITS) for x in found)
    return {"mean": mean, "low": low, "high": high, "values": count}


def _groups(key: Key) -> tuple[str, ...]:
    """The groups that a value is in: its concept and prompt; of a prompt's value the concept."""
    concept, folder, sample = key
    return (concept,) if sample is None else (concept, folder)


def _difference(run: Evaluation, table: Table, method: str, control: str | None, column: str) -> dict[str, Any] | None:
    """Of all concepts, and of each."""
    assert control is not None
    one, other = table.values(method, column), table.values(control, column)
    both = [key for key in one if key in other]
    if not both:
        return None

    def entry(keys: list[Key], without: int) -> dict[str, Any]:
        first, second = ([values[key] for key in keys] for values in (one, other))
        paths = [_groups(key)[without:] for key in keys]
        return _entry(paired_difference(first, second, paths, run.report.level, run.report.resamples), len(keys))

    of_concepts = {name: [key for key in both if key[0] == name] for name in run.concepts}
    return {"all": entry(both, 0), "concepts": {name: entry(keys, 1) for name, keys in of_concepts.items() if keys}}


def _seconds(table: Table, method: str) -> dict[str, Any]:
    found = [row.seconds for row in table.rows if row.method == method]
    return {"median": round(statistics.median(found), 3) if found else None, "images": len(found)}


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables of report.md."""
    columns = summary["columns"]
    arrows = {"higher": " ↑", "lower": " ↓", "": ""}
    heads = [f"{name}{arrows[column['better']]}" for name, column in columns.items()]
    lines = [_line(["method", *heads]), _line(["---"] * (len(columns) + 1))]
    for method, found in summary["methods"].items():
        lines.append(_line([method, *(_cell(found.get(name)) for name in columns)]))
    text = "\n".join(lines)
    if summary["differences"]:
        lines = [_line([f"difference to {summary['control']}", *heads]), _line(["---"] * (len(columns) + 1))]
        for method, found in summary["differences"].items():
            lines.append(_line([method, *(_cell(found.get(name, {}).get("all"), "+") for name in columns)]))
        text += "\n\n" + "\n".join(lines)
    for problem in ("missing", "failed"):
        if summary[problem]:
            text += f"\n\n{problem}: {len(summary[problem])}, listed in report.json"
    samples, level = summary["samples"], round(100 * summary["level"])
    prompts = sum(len(x) for x in summary["prompts"].values())
    text += (
        f"\n\nConcepts: {len(summary['concepts'])}; pairs of concept and prompt: {prompts}; images of each by every "
        f"method: {samples}. Protocol {summary['protocol']}. A mean is that of the concepts' means, each of its "
        f"prompts' means. In brackets are {level} % intervals, bootstrapped over concepts, prompts and images; "
        "differences are paired, image by image, or prompt by prompt where a metric has one value for a prompt.\n"
    )
    return text


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(entry: Mapping[str, float] | None, sign: str = "") -> str:
    return (
        "–"
        if entry is None
        else " ".join([f"{entry['mean']:{sign}.3f}", f"[{entry['low']:{sign}.3f}, {entry['high']:{sign}.3f}]"])
    )
