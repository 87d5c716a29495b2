"""The file that describes a run, in YAML or JSON: read and checked as a whole before any model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ...runtime.checks import check_choice, check_integer, fail
from ..pipelines.pipeline import (
    LayoutRetouch,
    StableDiffusionLayoutRetouchPipeline,
    StableDiffusionXLLayoutRetouchPipeline,
)
from ..pipelines.stock import StockArguments
from .file_checks import (
    DTYPES,
    SCHEDULERS,
    base_model,
    by_folder,
    check_arguments,
    check_peft,
    check_picture,
    known_arguments,
    parsed,
    pipeline_class,
)
from .items import ImageItem, check_items, why_no_name

OP = "generate_from_file"
METHODS = ("layout-and-retouch", "plain")
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


def read_run(path: str | Path) -> Run:
    """Read and check a file. Paths in it are relative to its own folder.

    Raises:
        ValueError: what is wrong, by the name of its key. FileNotFoundError: no such file.
    """
    path = Path(path)
    given = _mapping("file", parsed(OP, path), _KEYS)
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
    base = base_model(OP, _text("base", given["base"]), path.parent)
    pipeline = pipeline_class(OP, base, tuple(METHOD_CLASSES) if method == METHODS[0] else None)
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
    return by_folder(OP, "prompts", [_template(f"prompts[{i}]", prompt) for i, prompt in enumerate(given)])


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
            check_picture(OP, key, path)
    if method == METHODS[0]:
        if ("image" in values) == ("bank" in values):
            fail(OP, f"{where}.image", "an image, or a bank in its place", "both" if "image" in values else "none")
        if "mask" in values and "image" not in values:
            fail(OP, f"{where}.mask", "none, since the bank has it", str(values["mask"]))
    if "textual_inversion" in values and "token" not in values:
        fail(OP, f"{where}.token", "the token of the textual_inversion", "none")
    if "lora" in values:
        check_peft(OP, f"{where}.lora")
    return Subject(**values)


def _arguments(given: object, pipeline: type[DiffusionPipeline], method: str) -> dict[str, Any]:
    """The arguments of the pipeline's call, whose names and types are those of its signature."""
    if not isinstance(given, dict):
        fail(OP, "arguments", "a mapping", repr(given))
    calls = _calls(pipeline, method)
    check_arguments(OP, "arguments", given, known_arguments(calls), calls[0].__qualname__)
    if method == METHODS[0]:
        of_stock = {field.name for field in fields(StockArguments)} & set(given)
        StockArguments.given({name: given[name] for name in of_stock}, xl=METHOD_CLASSES[pipeline.__name__].pools)
    return given


def _calls(pipeline: type[DiffusionPipeline], method: str) -> list[Any]:
    """What has the arguments of the call in its signature."""
    if method != METHODS[0]:
        return [pipeline.__call__]
    return [METHOD_CLASSES[pipeline.__name__].__call__, StockArguments.__init__]
