"""The file that describes an evaluation: its keys and their types, which pydantic checks."""

import re
from collections.abc import Mapping
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
    ValidationInfo,
)
from safetensors import safe_open

from ..diffusers.many.file_checks import by_folder, check_picture
from ..diffusers.many.items import why_no_name
from ..runtime.checks import fail
from .methods import METHODS, known_to
from .metrics.metric import Metric

OP = "read_evaluation"

PLACE = re.compile(r"(?<!\w)\{\}(?!\w)")
"""Where a concept's words go."""
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


def _lora(given: object, info: ValidationInfo) -> Path:
    path = _file(given, info)
    try:
        with safe_open(path, "pt"):
            return path
    except Exception as error:  # of damaged files it raises many kinds
        raise _expected("a file of safetensors", f"{path}: {error}") from None


def _unet(given: object, info: ValidationInfo) -> Path:
    path = _placed(given, info)
    if not (path / "config.json").is_file():
        raise _expected("a folder of a UNet, with its config.json", str(path))
    return path


def _prompts(given: object, info: ValidationInfo) -> dict[str, str]:
    """Prompts by the names of their folders, given as a list or as a file with one in each line."""
    name = str(info.field_name)
    if isinstance(given, str) and "{}" not in given:
        path = _file(given, info)
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _expected("a text in UTF-8", f"{path}: {error}") from None
        given = [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(given, list) or not given:
        raise _expected("a list of texts, or a file with one in each line", repr(given))
    for i, prompt in enumerate(given):
        if not isinstance(prompt, str) or prompt.count("{}") != 1 or not PLACE.search(prompt):
            expected = "a text with one {}, where the concept's words go, and no letter beside it"
            fail(OP, f"{name}[{i}]", expected, repr(prompt))
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
    lora: Annotated[Path, BeforeValidator(_lora)] | None = None
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
    metrics: Annotated[
        list[Annotated[MetricEntry, BeforeValidator(_metric)]], BeforeValidator(lambda x: [] if x is None else x)
    ] = Field(default_factory=list)
    protocol: Literal["standard", "dreammatcher"] = "standard"
    samples: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    scheduler: Literal["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"] | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    reference_prompt: Text = "a {}"
    arguments: Annotated[dict[str, Any], BeforeValidator(_empty)] = Field(default_factory=dict)
    """of the calls of all methods; each takes those that it knows"""
    report: Annotated[ReportEntry, BeforeValidator(_empty)] = Field(default_factory=ReportEntry)
    _model: str = PrivateAttr("")
    _pipeline: type[DiffusionPipeline] | None = PrivateAttr(None)
    _metrics: list[Metric] = PrivateAttr(default_factory=list)

    @property
    def model(self) -> str:
        """The folder or id of the base model."""
        return self._model

    @property
    def pipeline(self) -> type[DiffusionPipeline]:
        """The class of the base model's own pipeline."""
        assert self._pipeline is not None  # complete
        return self._pipeline

    @property
    def has_pipeline(self) -> bool:
        """Whether the base model is known."""
        return self._pipeline is not None

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
