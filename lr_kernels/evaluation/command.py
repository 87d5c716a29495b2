"""`python -m lr_kernels eval run.yaml`: generate, score, report."""

import sys
from collections.abc import Collection
from pathlib import Path

from ..diffusers.many.distribute import GenerationReport, process_state
from ..diffusers.many.items import pending
from ..runtime.checks import fail
from .generate import generate, items_of
from .reading import read_evaluation
from .report import report
from .run_file import Evaluation
from .score import ScoreReport, score

STAGES = ("generate", "score", "report")


def evaluate(
    path: str | Path, stages: Collection[str] = STAGES, *, progress: bool = True
) -> tuple[GenerationReport | None, ScoreReport | None]:
    """Run stages of the evaluation that a file in YAML or JSON describes; docs/evaluation.md says what the file holds.

    Started by `accelerate launch` or `torchrun`, the first two stages are spread over all processes, and the main one
    writes the report. What is there already is not made again.

    Args:
        stages: some of "generate", "score" and "report", which run in this order.
        progress: whether the main process shows bars.

    Returns:
        What became of the images and of the scores; None for a stage that did not run.

    Raises:
        ValueError: what is wrong with the file, by the names of its keys, before a model is loaded; a stage that is
        none; images by other arguments in the output; a report without scores. FileNotFoundError: no such file.
        ModuleNotFoundError: a metric's package is missing.
    """
    names = stages if isinstance(stages, list | tuple | set) else []
    if not names or not all(name in STAGES for name in names):
        fail("evaluate", "stages", f"some of {', '.join(STAGES)}", repr(stages))
    return _run(read_evaluation(path), names, progress=progress)


def _run(
    run: Evaluation, stages: Collection[str], *, progress: bool = True
) -> tuple[GenerationReport | None, ScoreReport | None]:
    drawn = None
    if "generate" in stages:
        drawn = generate(run, progress=progress)
    else:
        pending(items_of(run), run.output)  # refuses images by other arguments, as the stage generate does
    scored = score(run, progress=progress) if "score" in stages else None
    if "report" in stages and process_state().is_main_process:
        report(run)
    return drawn, scored


def command(path: Path, stages: Collection[str], *, dry_run: bool = False) -> int:
    """What `eval` does; the status of the process: 1 if an image or a score failed, 2 if the file is wrong."""
    try:
        run = read_evaluation(path)
        if dry_run:
            items = items_of(run)
            wanted = set(pending(items, run.output))
            for i, item in enumerate(items):
                print(run.output / item.path, f"seed {item.seed}", repr(item.prompt), "" if i in wanted else "(there)")
            return 0
        drawn, scored = _run(run, stages)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    state = process_state()
    state.destroy_process_group()
    if not state.is_main_process:
        return 0  # the main process's status is that of all: the first one that is not 0 ends the others
    made = [x for x in (drawn, scored) if x is not None]
    for part in made:
        print(part.summary())
    if "report" in stages:
        print((run.output / "report" / "report.md").read_text("utf-8"))
        print(f"report in {run.output / 'report'}")
    return 1 if any(part.failed for part in made) else 0
