"""The file that describes an evaluation, in YAML or JSON: read and checked as a whole before any model is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from diffusers import DiffusionPipeline
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
)

from ..diffusers.many.file_checks import (
    base_model,
    by_folder,
    check_arguments,
    check_peft,
    check_picture,
    known_arguments,
    model_name,
    parsed,
    pipeline_class,
)
from ..diffusers.many.items import why_no_name
from ..diffusers.many.run_file import METHOD_CLASSES
from ..diffusers.pipelines.stock import StockArguments
from ..runtime.checks import fail
from .methods import METHODS, STAGES, known_to
from .metrics import metric_class
from .metrics.metric import Metric

OP = "read_evaluation"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""The files of a folder of images that count."""


def _expected(expected: str, got: object) -> ValueError:
    return ValueError(f"expected {expected}, got {got}")


def _placed(given: object, info: ValidationInfo) -> Path:
    """A path of the file, which is relative to its folder."""
    if not isinstance(given, str) or not given.strip():
        raise _expected("the path of a file or folder", repr(given))
    context: Any = info.context
    return context["folder"] / given


def _file(given: object, info: ValidationInfo) -> Path:
    path = _placed(given, info)
    if not path.is_file():
        raise _expected("a file", f"{path}, which is none")
    return path


def _pictures(given: object, info: ValidationInfo) -> list[Path]:
    """Pictures, given as a list of files or as a folder."""
    if isinstance(given, list):
        paths = [_file(x, info) for x in given]
    else:
        folder = _placed(given, info)
        if not folder.is_dir():
            raise _expected("a list of files, or a folder of them", str(folder))
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not paths:
        raise _expected("at least one picture", "none")
    for path in paths:
        check_picture(OP, str(info.field_name), path)
    return paths


def _unet(given: object, info: ValidationInfo) -> Path:
    path = _placed(given, info)
    if not (path / "config.json").is_file():
        raise _expected("a folder of a UNet, with its config.json", str(path))
    return path


def _prompts(given: object, info: ValidationInfo) -> dict[str, str]:
    """Prompts by the names of their folders, given as a list or as a file with one in each line."""
    name = str(info.field_name)
    if isinstance(given, str):
        given = [line.strip() for line in _file(given, info).read_text("utf-8").splitlines() if line.strip()]
    if not isinstance(given, list) or not given:
        raise _expected("a list of texts, or a file with one in each line", repr(given))
    for i, prompt in enumerate(given):
        if not isinstance(prompt, str) or prompt.count("{}") != 1:
            fail(OP, f"{name}[{i}]", "a text with one {}, where the concept's words go", repr(prompt))
    return by_folder(OP, name, given)


def _name(given: str) -> str:
    if reason := why_no_name(given):
        raise _expected(f"a name of files, {reason}", repr(given))
    return given


def _method(given: str) -> str:
    if given not in METHODS:
        raise _expected(f"one of {', '.join(METHODS)}", repr(given))
    return given


def _metric(given: object) -> object:
    return {"metric": given} if isinstance(given, str) else given


def _empty(given: object) -> object:
    """In YAML a key without a value is a mapping without keys."""
    return {} if given is None else given


Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
Name = Annotated[str, AfterValidator(_name)]
File = Annotated[Path, BeforeValidator(_file)]
Pictures = Annotated[list[Path], BeforeValidator(_pictures)]
Prompts = Annotated[dict[str, str], BeforeValidator(_prompts)]


class _Part(BaseModel):
    """A mapping of the file: no unknown keys, no values of other types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Concept(_Part):
    """What is drawn, and by which weights the personalized model knows it."""

    noun: Text
    """of its class, as "ball" """
    images: Pictures
    """of the concept: metrics compare with all of them, methods read the first"""
    token: Text | None = None
    masks: Pictures | None = None
    """where the concept is in the images: as many, in their order"""
    prompts: Prompts | None = None
    """in place of the evaluation's, as for living things"""
    unet: Annotated[Path, BeforeValidator(_unet)] | None = None
    lora: File | None = None
    textual_inversion: File | None = None

    @property
    def words(self) -> str:
        """What stands for the concept in a prompt, as "sks ball"."""
        return f"{self.token} {self.noun}" if self.token else self.noun


class MethodEntry(_Part):
    """A column of the evaluation."""

    method: Annotated[str, AfterValidator(_method)] | None = None
    """one of METHODS; default: its name"""
    arguments: Annotated[dict[str, Any], BeforeValidator(_empty)] = Field(default_factory=dict)
    """of the method's call, before those of the evaluation"""


class MetricEntry(BaseModel):
    """A metric, and its options as further keys."""

    model_config = ConfigDict(extra="allow", frozen=True)
    metric: Text
    """one of `lr_kernels.evaluation.metrics.METRICS`, or a class of one's own, as "package.module:Class" """

    @property
    def options(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})


class ReportEntry(_Part):
    """How the report is made."""

    control: Text = "control"
    """the method with which the others are compared"""
    identity: Text | None = None
    """the metric on the plot's vertical axis. Default: the first one of likeness"""
    diversity: Text | None = None
    """the metric on its horizontal axis. Default: the first one of diversity"""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """of the intervals"""
    resamples: Annotated[int, Field(ge=1)] = 2000
    gallery: Literal["linked", "embedded"] = "linked"
    """whether the page has the images in itself; linked, it has to lie in the output folder"""


class Evaluation(_Part):
    """A file that was checked. Its keys are described in docs/evaluation.md."""

    base: Text
    output: Annotated[Path, BeforeValidator(_placed)]
    concepts: Annotated[dict[Name, Concept], Field(min_length=1)]
    prompts: Prompts
    methods: Annotated[dict[Name, Annotated[MethodEntry, BeforeValidator(_empty)]], Field(min_length=1)]
    metrics: list[Annotated[MetricEntry, BeforeValidator(_metric)]] = Field(default_factory=list)
    protocol: Literal["standard", "dreammatcher"] = "standard"
    samples: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    scheduler: Literal["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"] | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    reference_prompt: Text = "a {}"
    arguments: Annotated[dict[str, Any], BeforeValidator(_empty)] = Field(default_factory=dict)
    """of the calls of all methods; each takes those that it knows"""
    report: Annotated[ReportEntry, BeforeValidator(_empty)] = Field(default_factory=ReportEntry)
    _model: str = PrivateAttr()
    _pipeline: type[DiffusionPipeline] = PrivateAttr()
    _metrics: list[Metric] = PrivateAttr()

    @property
    def model(self) -> str:
        """The folder or id of the base model."""
        return self._model

    @property
    def pipeline(self) -> type[DiffusionPipeline]:
        """The class of the base model's own pipeline."""
        return self._pipeline

    @property
    def chosen(self) -> list[Metric]:
        """The metrics, which load their models when they first compute."""
        return self._metrics

    def prompts_of(self, concept: str) -> Mapping[str, str]:
        """A concept's prompts by the names of their folders."""
        return self.concepts[concept].prompts or self.prompts

    def method_of(self, name: str) -> str:
        """Which of METHODS a column is."""
        return self.methods[name].method or name

    def arguments_of(self, name: str) -> dict[str, Any]:
        """The arguments of a column's call."""
        known = known_to(self.method_of(name), self.pipeline)
        return {key: x for key, x in self.arguments.items() if key in known} | self.methods[name].arguments


def read_evaluation(path: str | Path) -> Evaluation:
    """Read and check a file. Paths in it are relative to its own folder.

    Raises:
        ValueError: what is wrong, each in a line, by the name of its key. FileNotFoundError: no such file.
    """
    path = Path(path)
    given = parsed(OP, path)
    if not isinstance(given, dict):
        fail(OP, "file", "a mapping", repr(given))
    try:
        found = Evaluation.model_validate(given, context={"folder": path.parent})
    except ValidationError as error:
        raise ValueError("\n".join(dict.fromkeys(_line(x) for x in error.errors(include_url=False)))) from None
    _check(found, given, path.parent)
    return found


def _line(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in the library's form."""
    places = [str(x) if isinstance(x, str) else f"[{x}]" for x in error["loc"] if x != "[key]"]
    text, got = error["msg"], repr(error["input"])
    own = f"lr_kernels.{OP}: "
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        if text.startswith(own):  # of a check that names the last key by itself
            return own + _path([*places[:-1], text.removeprefix(own)])
    elif error["type"] == "missing":
        text = "expected a value, got none"
    elif error["type"] == "extra_forbidden":
        text = f"expected one of the keys {', '.join(_keys_beside(error['loc']))}, got an unknown key"
    else:
        text = f"expected {text.partition(' should be ')[2] or 'a text that is not empty'}, got {got}"
        if error["type"] == "string_type":
            text += "; a number or a word as yes or null is a text in quotes"
    return f"{own}{_path(places)}: {text}"


def _path(places: Sequence[str]) -> str:
    """As "concepts.ball.images[0]"."""
    return ".".join(places).replace(".[", "[")


def _keys_beside(place: Sequence[int | str]) -> list[str]:
    """The keys that the mapping around a key may have."""
    parts: dict[str, type[BaseModel]] = {"concepts": Concept, "methods": MethodEntry, "report": ReportEntry}
    part = parts[str(place[0])] if len(place) > 1 else Evaluation
    return list(part.model_fields)


RESERVED = ("log", "scores", "report")
"""Folders within the output that are not those of methods."""


def _check(run: Evaluation, given: Mapping[str, Any], folder: Path) -> None:
    """What the types do not say."""
    if run.output.exists() and not run.output.is_dir():
        fail(OP, "output", "the path of a folder", str(run.output))
    for name, concept in run.concepts.items():
        where = f"concepts.{name}"
        if concept.masks is not None and len(concept.masks) != len(concept.images):
            fail(OP, f"{where}.masks", f"{len(concept.images)}, one for each of its images", len(concept.masks))
        if concept.textual_inversion is not None and concept.token is None:
            fail(OP, f"{where}.token", "the token of the textual_inversion", "none")
        if concept.lora is not None:
            check_peft(OP, f"{where}.lora")
    if run.reference_prompt.count("{}") != 1:
        fail(OP, "reference_prompt", "a text with one {}, where the concept's words go", repr(run.reference_prompt))
    run._model = base_model(OP, run.base, folder)
    run._pipeline = pipeline_class(OP, run._model, tuple(METHOD_CLASSES))
    _check_methods(run)
    if "control" in (given.get("report") or {}) and run.report.control not in run.methods:
        fail(OP, "report.control", f"one of the methods {', '.join(run.methods)}", repr(run.report.control))
    run._metrics = [_made(run, i, folder) for i in range(len(run.metrics))]
    columns = [name for metric in run._metrics for name in metric.columns]
    for name in columns:
        if columns.count(name) > 1:
            fail(OP, "metrics", "columns that differ", f"{name!r} twice", "give one of the metrics another `name`")
    for axis in ("identity", "diversity"):
        if (column := getattr(run.report, axis)) is not None and column not in columns:
            fail(OP, f"report.{axis}", f"one of the columns {', '.join(columns)}", repr(column))


def _check_methods(run: Evaluation) -> None:
    known = {}
    for name, entry in run.methods.items():
        where = f"methods.{name}"
        if name in RESERVED:
            fail(OP, where, f"another name than {', '.join(RESERVED)}, which are folders of the output", repr(name))
        if entry.method is None and name not in METHODS:
            fail(OP, f"{where}.method", f"one of {', '.join(METHODS)}, where the name is none of these", "none")
        known[name] = known_to(run.method_of(name), run.pipeline)
        check_arguments(OP, f"{where}.arguments", entry.arguments, known[name], f"the method {run.method_of(name)}")
    together = {key: x for taken in known.values() for key, x in taken.items()}
    check_arguments(OP, "arguments", run.arguments, together, "any of the methods")
    for name in run.methods:
        arguments = run.arguments_of(name)
        of_stock = {field.name for field in fields(StockArguments)} & set(arguments)
        if run.method_of(name) in STAGES:
            of_stage = {key: arguments[key] for key in of_stock}
            StockArguments.given(of_stage, xl=METHOD_CLASSES[run.pipeline.__name__].pools)


def _made(run: Evaluation, i: int, folder: Path) -> Metric:
    """A metric of the file, without its models."""
    where, entry = f"metrics[{i}]", run.metrics[i]
    kind = metric_class(OP, where, entry.metric)
    options = entry.options
    known = {key: x for key, x in known_arguments([kind.__init__]).items() if key != "protocol"}
    check_arguments(OP, where, options, known, f"the metric {entry.metric}")
    if "model" in options:
        options["model"] = model_name(OP, f"{where}.model", options["model"], folder)
    try:
        return kind(protocol=run.protocol, **options)
    except (ValueError, ModuleNotFoundError) as error:
        raise type(error)(f"lr_kernels.{OP}: {where}: {error}") from None
