"""What the types of an evaluation's file do not say: whether its parts fit each other."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

from ..diffusers.many.file_checks import (
    base_model,
    check_arguments,
    check_peft,
    known_arguments,
    model_name,
    pipeline_class,
)
from ..diffusers.many.run_file import METHOD_CLASSES
from ..diffusers.pipelines.settings import Settings
from ..diffusers.pipelines.stock import StockArguments
from ..runtime.checks import fail
from .methods import METHODS, STAGE_METHODS, known_to
from .metrics import metric_class
from .metrics.metric import Column, Metric
from .run_file import OP, Concept, Evaluation

RESERVED = ("log", "scores", "report")
"""Folders within the output that are not those of methods."""


class Faults:
    """A context manager that collects what its blocks refuse, so that a file is told all its faults at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __enter__(self) -> "Faults":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, ValueError):
            return False
        self.lines += str(error).splitlines()
        return True


def complete(run: Evaluation, folder: Path) -> list[str]:
    """Give an evaluation its base model's class and its metrics, and check what the types do not say; what is wrong, a
    line for each fault.

    Args:
        folder: of the file, to which the paths in it are relative.
    """
    faults = Faults()
    with faults:
        run._model = base_model(OP, run.base, folder)
        run._pipeline = pipeline_class(OP, run._model, tuple(METHOD_CLASSES))
    run._metrics = metrics_of(run, folder, faults)
    check(run, faults)
    return faults.lines


def check(run: Evaluation, faults: Faults) -> None:
    """Everything but the base model and the metrics' own options."""
    with faults:
        if run.output.exists() and not run.output.is_dir():
            fail(OP, "output", "the path of a folder", str(run.output))
    for name, concept in run.concepts.items():
        with faults:
            _check_concept(f"concepts.{name}", concept, run.chosen)
    with faults:
        if run.reference_prompt.count("{}") != 1:
            expected = "a text with one {}, where the concept's words go"
            fail(OP, "reference_prompt", expected, repr(run.reference_prompt))
    if run.has_pipeline:
        _check_methods(run, faults)
    with faults:
        if "control" in run.report.model_fields_set and run.report.control not in run.methods:
            fail(OP, "report.control", f"one of the methods {', '.join(run.methods)}", repr(run.report.control))
    columns = [name for metric in run.chosen for name in metric.columns]
    for name in sorted({name for name in columns if columns.count(name) > 1}):
        with faults:
            fail(OP, "metrics", "columns that differ", f"{name!r} twice", "give one of the metrics another `name`")
    for axis in ("identity", "diversity"):
        with faults:
            if (column := getattr(run.report, axis)) is not None and column not in columns:
                fail(OP, f"report.{axis}", f"one of the columns {', '.join(columns)}", repr(column))


def _check_concept(where: str, concept: Concept, metrics: Sequence[Metric]) -> None:
    if concept.masks is not None and len(concept.masks) != len(concept.images):
        fail(OP, f"{where}.masks", f"{len(concept.images)}, one for each of its images", len(concept.masks))
    if concept.masks is None and any(metric.needs_masks for metric in metrics):
        fail(OP, f"{where}.masks", "masks of its images, since a metric is masked", "none")
    if concept.textual_inversion is not None and concept.token is None:
        fail(OP, f"{where}.token", "the token of the textual_inversion", "none")
    if concept.lora is not None:
        check_peft(OP, f"{where}.lora")


def _check_methods(run: Evaluation, faults: Faults) -> None:
    together: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for name, entry in run.methods.items():
        where = f"methods.{name}"
        with faults:
            if name.casefold() in RESERVED:
                fail(OP, where, f"another name than {', '.join(RESERVED)}, which are folders of the output", repr(name))
            if seen.setdefault(name.casefold(), name) != name:
                fail(OP, where, f"a name that differs from {seen[name.casefold()]!r} in more than capitals", repr(name))
            if entry.method is None and name not in METHODS:
                fail(OP, f"{where}.method", f"one of {', '.join(METHODS)}, where the name is none of these", "none")
            known = known_to(run.method_of(name), run.pipeline)
            together |= known
            check_arguments(OP, f"{where}.arguments", entry.arguments, known, f"the method {run.method_of(name)}")
            if run.method_of(name) in STAGE_METHODS:
                _check_call(where, run.arguments_of(name), METHOD_CLASSES[run.pipeline.__name__].pools)
    with faults:
        if not faults.lines:
            check_arguments(OP, "arguments", run.arguments, together, "any of the methods")


def _check_call(where: str, arguments: dict[str, Any], xl: bool) -> None:
    """What a call of the stages refuses before it does anything."""
    try:
        Settings.given(arguments)
        StockArguments.given(
            {field.name: arguments[field.name] for field in fields(StockArguments) if field.name in arguments}, xl=xl
        )
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"lr_kernels.{OP}: {where}.arguments: {error}") from None


def metrics_of(run: Evaluation, folder: Path, faults: Faults) -> list[Metric]:
    """The file's metrics, without their models."""
    found: list[Metric] = []
    for i in range(len(run.metrics)):
        with faults:
            found.append(_made(run, i, folder))
    return found


def _made(run: Evaluation, i: int, folder: Path) -> Metric:
    where, entry = f"metrics[{i}]", run.metrics[i]
    kind = metric_class(OP, where, entry.metric)
    options = entry.options
    try:
        known = {key: x for key, x in known_arguments([kind.__init__]).items() if key != "protocol"}
    except Exception as error:  # of annotations that cannot be read, whatever it is
        fail(OP, where, "a class whose __init__ has annotations", f"{type(error).__name__}: {error}")
    check_arguments(OP, where, options, known, f"the metric {entry.metric}")
    if options.get("model") is not None:
        options["model"] = model_name(OP, f"{where}.model", options["model"], folder)
    try:
        made = kind(protocol=run.protocol, **options)
        columns = made.columns
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"lr_kernels.{OP}: {where}: {error}", name=error.name) from None
    except Exception as error:  # of a class of the user's, whatever it is
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"lr_kernels.{OP}: {where}: {text}") from None
    if not isinstance(columns, dict) or not columns or not all(isinstance(x, Column) for x in columns.values()):
        fail(OP, where, "columns, a mapping from names to Column", repr(columns))
    for name in columns:
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or "|" in name:
            fail(OP, where, "columns whose names are texts without |", repr(name))
    return made
