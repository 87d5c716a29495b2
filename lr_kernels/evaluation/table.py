"""All values of an evaluation, read from the files of its first two stages."""

from dataclasses import dataclass
from typing import Any

from ..runtime.checks import fail
from .metrics import Column
from .run_file import Evaluation
from .score import Group, groups_of, kept_scores, records_of

Key = tuple[str, str, int | None]
"""(concept, prompt, sample); a value of a whole prompt has no sample"""


@dataclass(frozen=True)
class Row:
    """One image."""

    method: str
    concept: str
    prompt: str
    """the prompt as it was drawn"""
    folder: str
    sample: int
    seed: int
    path: str
    """within the output"""
    mask: str | None
    """the path of the mask that the method found"""
    seconds: float
    values: dict[str, float | None]


@dataclass(frozen=True)
class Table:
    """Every image with its scores, and the scores of whole prompts."""

    methods: list[str]
    columns: dict[str, Column]
    rows: list[Row]
    of_prompts: dict[tuple[str, str, str], dict[str, float | None]]
    """by (method, concept, folder of the prompt)"""
    missing: list[str]
    """images that are not there, by their paths"""
    failed: dict[str, str]
    """groups whose scores failed, with the error"""

    def values(self, method: str, column: str) -> dict[Key, float]:
        """A column of a method; images and prompts without a value are left out."""
        found: dict[Key, float | None] = {}
        for row in self.rows:
            if row.method == method:
                found[row.concept, row.folder, row.sample] = row.values.get(column)
        for (of, concept, folder), values in self.of_prompts.items():
            if of == method and column in values:
                found[concept, folder, None] = values[column]
        return {key: value for key, value in found.items() if value is not None}


def read_table(run: Evaluation) -> Table:
    """The table of an evaluation. ValueError where scores are missing, or are of other metrics or images."""
    rows: list[Row] = []
    of_prompts, failed, missing = {}, {}, []
    groups = {group: kept_scores(run, group) for group in groups_of(run)}
    stale = [group.score_path for group, scores in groups.items() if scores is None]
    if stale:
        expected = f"the scores of {len(groups)} prompts, of these metrics and images"
        got = f"{len(groups) - len(stale)}; without them is {stale[0]}"
        fail("evaluate", "stages", expected, got, "run the stage score")
    for group, scores in groups.items():
        assert scores is not None
        if scores["error"] is not None:
            failed[group.path] = scores["error"]
        records = records_of(run, group)
        missing += [f"{group.path}/{i}.png" for i in range(run.samples) if i not in records]
        values = scores.get("images", {})
        rows += [_row(group, sample, record, values.get(str(sample), {})) for sample, record in records.items()]
        of_prompts[group.method, group.concept, group.folder] = scores.get("prompt", {})
    order = {method: i for i, method in enumerate(run.methods)}
    rows.sort(key=lambda row: order[row.method])
    columns = {name: column for metric in run.chosen for name, column in metric.columns.items()}
    return Table(list(run.methods), columns, rows, of_prompts, missing, failed)


def _row(group: Group, sample: int, record: dict[str, Any], values: dict[str, float | None]) -> Row:
    return Row(
        method=group.method,
        concept=group.concept,
        prompt=record["prompt"],
        folder=group.folder,
        sample=sample,
        seed=record["seed"],
        path=record["images"][0],
        mask=record.get("masks", {}).get("context"),
        seconds=sum(record.get("seconds", {}).values()),
        values=values,
    )
