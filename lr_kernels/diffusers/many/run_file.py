"""The file that describes a run, in YAML or JSON: read and checked as a whole before any model is loaded."""

import importlib.util
import inspect
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any

import diffusers
import PIL.Image
import yaml
from diffusers import DiffusionPipeline

from ...runtime.checks import check_choice, check_integer, fail
from ..pipelines.pipeline import (
    LayoutRetouch,
    StableDiffusionLayoutRetouchPipeline,
    StableDiffusionXLLayoutRetouchPipeline,
)
from ..pipelines.stock import StockArguments
from .items import ImageItem, check_items, why_no_name

OP = "generate_from_file"
TOY = Path(__file__).parents[2] / "toy" / "base"
METHODS = ("layout-and-retouch", "plain")
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
DTYPES = ("float32", "float16", "bfloat16")
METHOD_CLASSES: dict[str, type[LayoutRetouch]] = {
    "StableDiffusionPipeline": StableDiffusionLayoutRetouchPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLLayoutRetouchPipeline,
}
"""The pipeline of the method for the class that a base model names."""
_KEYS = {
    "base": True, "output": True, "subjects": True, "prompts": True, "method": False, "scheduler": False,
    "dtype": False, "reference_prompt": False, "samples": False, "seed": False, "arguments": False,
}  # fmt: skip
"""The keys of the file, and whether it must have them."""
_SUBJECT_KEYS = {
    "noun": True, "token": False, "image": False, "mask": False, "bank": False, "unet": False, "lora": False,
    "textual_inversion": False,
}  # fmt: skip
_OF_THE_METHOD = ("image", "mask", "bank")
_SET_BY_THE_RUN = {
    "prompt", "generator", "output_type", "return_dict", "num_images_per_prompt", "layout_prompt", "reference_image",
    "reference_prompt", "subject_tokens", "reference_mask", "reference_bank", "reference_subjects",
}  # fmt: skip
"""Arguments of a pipeline's call that follow from the file's other keys."""


@dataclass(frozen=True)
class Subject:
    """A subject of the file; its files are there."""

    noun: str
    token: str | None = None
    image: Path | None = None
    mask: Path | None = None
    bank: Path | None = None
    unet: Path | None = None
    lora: Path | None = None
    textual_inversion: Path | None = None

    @property
    def words(self) -> str:
        """What stands for the subject in a prompt, as "sks ball"."""
        return f"{self.token} {self.noun}" if self.token else self.noun


@dataclass(frozen=True)
class Run:
    """A file that was checked."""

    base: str
    """a folder, or the id of a model on the hub"""
    pipeline: type[DiffusionPipeline]
    """the class of the base model's own pipeline"""
    method: str
    scheduler: str | None
    dtype: str
    subjects: dict[str, Subject]
    reference_prompt: str
    arguments: dict[str, Any]
    """of the pipeline's call"""
    output: Path
    items: list[ImageItem]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; a key that stands twice in a mapping is an error, and not the last one's value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        if doubled := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {doubled[0]!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_run(path: str | Path) -> Run:
    """Read and check a file. Paths in it are relative to its own folder.

    Raises:
        ValueError: what is wrong, by the name of its key. FileNotFoundError: no such file.
    """
    path = Path(path)
    given = _mapping("file", _parsed(path), _KEYS)
    method = given.get("method", METHODS[0])
    check_choice(OP, "method", method, METHODS)
    check_choice(OP, "scheduler", given.get("scheduler"), (None, *SCHEDULERS))
    check_choice(OP, "dtype", given.get("dtype", DTYPES[0]), DTYPES)
    subjects = _subjects(given["subjects"], method, path.parent)
    prompts = _prompts(given["prompts"])
    reference_prompt = _template("reference_prompt", given.get("reference_prompt", "a {}"))
    samples = check_integer(OP, "samples", given.get("samples", 1), 1, "an integer from 1 on")
    seed = check_integer(OP, "seed", given.get("seed", 0), 0, "an integer from 0 to 2^63 - 1", 2**63 - 1)
    output = path.parent / _text("output", given["output"])
    if output.exists() and not output.is_dir():
        fail(OP, "output", "the path of a folder", str(output))
    base = _base(given["base"], path.parent)
    pipeline = _pipeline(base, method)
    arguments = _arguments(given.get("arguments") or {}, pipeline, method)
    settings = {
        "base": given["base"],
        "method": method,
        "scheduler": given.get("scheduler"),
        "dtype": given.get("dtype", DTYPES[0]),
        "arguments": arguments,
    }
    items = []
    for name, subject in subjects.items():
        of_subject = settings | {"subject": given["subjects"][name]}
        if method == METHODS[0]:
            of_subject |= {"reference_prompt": reference_prompt.replace("{}", subject.words)}
        for folder, prompt in prompts.items():
            if method == METHODS[0]:
                of_subject = of_subject | {"layout_prompt": prompt.replace("{}", subject.noun)}
            for sample in range(samples):
                where = f"{name}/{folder}/{sample}.png"
                items.append(ImageItem(where, prompt.replace("{}", subject.words), name, sample, seed, of_subject))
    return Run(
        base=base,
        pipeline=pipeline,
        method=method,
        scheduler=given.get("scheduler"),
        dtype=settings["dtype"],
        subjects=subjects,
        reference_prompt=reference_prompt,
        arguments=arguments,
        output=output,
        items=check_items(items),
    )


def _parsed(path: Path) -> object:
    """What a file in YAML or JSON holds."""
    if path.suffix not in (".yaml", ".yml", ".json"):
        fail(OP, "file", "a path that ends in .yaml, .yml or .json", str(path))
    text = path.read_bytes()
    try:
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_without_doubles)
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        fail(OP, "file", f"{path.suffix[1:].upper()} in {path}", " ".join(str(error).split()))


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for key, _ in pairs:
        if [name for name, _ in pairs].count(key) > 1:
            raise ValueError(f"the key {key!r} twice")
    return found


def _mapping(where: str, given: object, keys: Mapping[str, bool]) -> dict[str, Any]:
    """A mapping that has no other keys than these, and all that it must have."""
    if not isinstance(given, dict):
        fail(OP, where, "a mapping", repr(given))
    inside = "" if where == "file" else f"{where}."
    for name in given:
        if name not in keys:
            fail(OP, f"{inside}{name}", f"one of the keys {', '.join(keys)}", "an unknown key")
    for name, needed in keys.items():
        if needed and given.get(name) is None:
            fail(OP, f"{inside}{name}", "a value", "none")
    return given


def _text(where: str, given: object) -> str:
    if not isinstance(given, str) or not given.strip():
        fail(OP, where, "a text", repr(given), "a number or a word as yes or null is a text in quotes")
    return given


def _template(where: str, given: object) -> str:
    text = _text(where, given)
    if text.count("{}") != 1:
        fail(OP, where, "a text with one {}, where the subject's words go", repr(given))
    return text


def _prompts(given: object) -> dict[str, str]:
    """The prompts by the names of their folders."""
    if not isinstance(given, list) or not given:
        fail(OP, "prompts", "a list of texts", repr(given))
    found: dict[str, str] = {}
    for i, prompt in enumerate(given):
        name = prompt_folder(_template(f"prompts[{i}]", prompt))
        if name in found:
            got = f"{prompt!r}, whose folder {name!r} is that of {found[name]!r}"
            fail(OP, f"prompts[{i}]", "a prompt that differs from the others in a letter or digit", got)
        if reason := why_no_name(name):
            fail(OP, f"prompts[{i}]", f"letters beside {{}}, which make a folder's name, {reason}", repr(prompt))
        found[name] = prompt
    return found


def prompt_folder(prompt: str) -> str:
    """The name of a prompt's folder: its letters and digits, as "a-on-sand" of "a {} on sand"."""
    return "-".join(re.findall(r"\w+", prompt.replace("{}", " ").lower()))


def _subjects(given: object, method: str, folder: Path) -> dict[str, Subject]:
    if not isinstance(given, dict) or not given:
        fail(OP, "subjects", "a mapping from names to subjects", repr(given))
    found = {}
    for name, entry in given.items():
        where = f"subjects.{name}"
        if not isinstance(name, str) or why_no_name(name):
            reason = why_no_name(name) if isinstance(name, str) else "a text, in quotes if need be"
            fail(OP, where, f"a name of files, {reason}", repr(name))
        found[name] = _subject(where, _mapping(where, entry, _SUBJECT_KEYS), method, folder)
    return found


def _subject(where: str, given: dict[str, Any], method: str, folder: Path) -> Subject:
    values: dict[str, Any] = {"noun": _text(f"{where}.noun", given["noun"])}
    if given.get("token") is not None:
        values["token"] = _text(f"{where}.token", given["token"])
    for field in fields(Subject):
        if field.name in ("noun", "token") or given.get(field.name) is None:
            continue
        key = f"{where}.{field.name}"
        if field.name in _OF_THE_METHOD and method != METHODS[0]:
            fail(OP, key, f"none, since the method is {method!r}", repr(given[field.name]))
        values[field.name] = path = folder / _text(key, given[field.name])
        if field.name == "unet" and not (path / "config.json").is_file():
            fail(OP, key, "a folder of a UNet, with its config.json", str(path))
        if field.name != "unet" and not path.is_file():
            fail(OP, key, "a file", f"{path}, which is none")
        if field.name in ("image", "mask"):
            _check_picture(key, path)
    if method == METHODS[0]:
        if ("image" in values) == ("bank" in values):
            fail(OP, f"{where}.image", "an image, or a bank in its place", "both" if "image" in values else "none")
        if "mask" in values and "image" not in values:
            fail(OP, f"{where}.mask", "none, since the bank has it", str(values["mask"]))
    if "textual_inversion" in values and "token" not in values:
        fail(OP, f"{where}.token", "the token of the textual_inversion", "none")
    if "lora" in values and importlib.util.find_spec("peft") is None:
        fail(OP, f"{where}.lora", "the package peft, which loads it", "none", "pip install peft")
    return Subject(**values)


def _check_picture(where: str, path: Path) -> None:
    try:
        with PIL.Image.open(path) as image:
            image.verify()
    except Exception as error:  # of damaged files PIL raises many kinds
        fail(OP, where, "a picture that PIL reads", f"{path}: {error}")


def _base(given: object, folder: Path) -> str:
    """The folder or the id of the base model."""
    name = _text("base", given)
    if name == "toy":
        return str(TOY)
    if (folder / name).is_dir():
        return str(folder / name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        fail(OP, "base", "toy, a folder that exists, or a model's id on the hub", repr(given))
    return name


def _pipeline(base: str, method: str) -> type[DiffusionPipeline]:
    """The class of the pipeline that the base model's model_index.json names."""
    try:
        name = DiffusionPipeline.load_config(base).get("_class_name")
    except (OSError, ValueError) as error:
        fail(OP, "base", "a pipeline with a model_index.json", f"{base}: {' '.join(str(error).split())}")
    if method == METHODS[0]:
        check_choice(OP, "base", name, tuple(METHOD_CLASSES))
    found = getattr(diffusers, str(name), None)
    if not inspect.isclass(found) or not {"prompt", "generator"} <= set(inspect.signature(found.__call__).parameters):
        fail(OP, "base", "a pipeline of diffusers that makes images of prompts", repr(name))
    return found


def _arguments(given: object, pipeline: type[DiffusionPipeline], method: str) -> dict[str, Any]:
    """The arguments of the pipeline's call, whose names and types are those of its signature."""
    if not isinstance(given, dict):
        fail(OP, "arguments", "a mapping", repr(given))
    known: dict[str, tuple[Any, Any]] = {}  # annotation and default
    for call in _calls(pipeline, method):
        hints = typing.get_type_hints(call)
        known |= {
            name: (hints.get(name, Any), parameter.default)
            for name, parameter in inspect.signature(call).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != "self"
        }
    for name, value in given.items():
        where = f"arguments.{name}"
        if name in _SET_BY_THE_RUN:
            fail(OP, where, "none, since the other keys of the file set it", repr(value))
        if name not in known:
            fail(OP, where, f"an argument of {_calls(pipeline, method)[0].__qualname__}", "an unknown one")
        annotation, default = known[name]
        if not (value is None and default is None) and not _fits(value, annotation):
            fail(OP, where, f"what the file can hold of {_shown(annotation)}", repr(value))
    if method == METHODS[0]:
        of_stock = {field.name for field in fields(StockArguments)} & set(given)
        StockArguments.given({name: given[name] for name in of_stock}, xl=METHOD_CLASSES[pipeline.__name__].pools)
    return given


def _calls(pipeline: type[DiffusionPipeline], method: str) -> list[Any]:
    """What has the arguments of the call in its signature."""
    if method != METHODS[0]:
        return [pipeline.__call__]
    return [METHOD_CLASSES[pipeline.__name__].__call__, StockArguments.__init__]


def _fits(value: object, annotation: Any) -> bool:
    """Whether a number, truth value, text, list or mapping is one of those that an annotation allows."""
    origin = typing.get_origin(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, UnionType):
        return any(_fits(value, option) for option in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    kind = origin or annotation
    if isinstance(value, bool) or value is None:
        return kind in (bool, type(None)) and isinstance(value, kind)
    if isinstance(value, int | float):
        return kind is float or (kind is int and isinstance(value, int))
    if isinstance(value, list):
        return kind in (list, tuple, Sequence)
    return kind in ((str,) if isinstance(value, str) else (dict, Mapping)) and isinstance(value, str | dict)


def _shown(annotation: Any) -> str:
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation).replace("typing.", "")
