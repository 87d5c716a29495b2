"""What files that describe runs have in common: YAML or JSON, prompts, pictures, base models, arguments of calls."""

import hashlib
import importlib.util
import inspect
import json
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

import diffusers
import PIL.Image
import yaml
from diffusers import DiffusionPipeline

from ...runtime.checks import check_choice, fail
from .items import why_no_name

Known = Mapping[str, tuple[Any, Any]]
"""Arguments by name: annotation and default of each."""
TOY = Path(__file__).parents[2] / "toy" / "base"
ENDS = 2**20
"""Bytes at each end of a file that its fingerprint covers."""
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
DTYPES = ("float32", "float16", "bfloat16")
SET_BY_THE_RUN = {
    "prompt", "generator", "output_type", "return_dict", "num_images_per_prompt", "layout_prompt", "reference_image",
    "reference_prompt", "subject_tokens", "reference_mask", "reference_bank", "reference_subjects",
}  # fmt: skip
"""Arguments of a pipeline's call that follow from a file's other keys."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; a key that stands twice in a mapping is an error, and not the last one's value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        if doubled := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {doubled[0]!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parsed(op: str, path: Path) -> object:
    """What a file in YAML or JSON holds."""
    if path.suffix not in (".yaml", ".yml", ".json"):
        fail(op, "file", "a path that ends in .yaml, .yml or .json", str(path))
    text = path.read_bytes()
    try:
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_without_doubles)
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        fail(op, "file", f"{path.suffix[1:].upper()} in {path}", " ".join(str(error).split()))


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for key, _ in pairs:
        if [name for name, _ in pairs].count(key) > 1:
            raise ValueError(f"the key {key!r} twice")
    return found


def by_folder(op: str, where: str, prompts: Sequence[str]) -> dict[str, str]:
    """Prompts by the names of their folders, which differ."""
    found: dict[str, str] = {}
    for i, prompt in enumerate(prompts):
        name = prompt_folder(prompt)
        if name in found:
            got = f"{prompt!r}, whose folder {name!r} is that of {found[name]!r}"
            fail(op, f"{where}[{i}]", "a prompt that differs from the others in a letter or digit", got)
        if reason := why_no_name(name):
            fail(op, f"{where}[{i}]", f"letters beside {{}}, which make a folder's name, {reason}", repr(prompt))
        found[name] = prompt
    return found


def prompt_folder(prompt: str) -> str:
    """The name of a prompt's folder: its letters and digits, as "a-on-sand" of "a {} on sand"."""
    return "-".join(re.findall(r"\w+", prompt.replace("{}", " ").lower()))


def check_picture(op: str, where: str, path: Path) -> None:
    """ValueError unless a file is a picture that PIL reads."""
    try:
        with PIL.Image.open(path) as image:
            image.load()
    except Exception as error:  # of damaged files PIL raises many kinds
        fail(op, where, "a picture that PIL reads", f"{path}: {error}")


def check_peft(op: str, where: str) -> None:
    """ValueError without the package that loads a LoRA."""
    if importlib.util.find_spec("peft") is None:
        fail(op, where, "the package peft, which loads it", "none", "pip install peft")


def base_model(op: str, given: str, folder: Path) -> str:
    """The folder or the id of a base model; folders are relative to that of the file."""
    return str(TOY) if given == "toy" else model_name(op, "base", given, folder, "toy, a folder that exists")


def model_name(op: str, where: str, given: str, folder: Path, expected: str = "a folder that exists") -> str:
    """The folder or the id of a model."""
    if (folder / given).is_dir():
        return str(folder / given)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given):
        fail(op, where, f"{expected}, or a model's id on the hub", repr(given))
    return given


def pipeline_class(op: str, base: str, allowed: Sequence[str] | None = None) -> type[DiffusionPipeline]:
    """The class of the pipeline that a base model's model_index.json names, one of those allowed."""
    try:
        name = DiffusionPipeline.load_config(base).get("_class_name")
    except (OSError, ValueError) as error:
        fail(op, "base", "a pipeline with a model_index.json", f"{base}: {' '.join(str(error).split())}")
    if allowed is not None:
        check_choice(op, "base", name, allowed)
    found = getattr(diffusers, str(name), None)
    if not inspect.isclass(found) or not {"prompt", "generator"} <= set(inspect.signature(found.__call__).parameters):
        fail(op, "base", "a pipeline of diffusers that makes images of prompts", repr(name))
    return found


def known_arguments(calls: Sequence[Any]) -> Known:
    """The arguments that functions take by name."""
    known: dict[str, tuple[Any, Any]] = {}
    for call in calls:
        hints = typing.get_type_hints(call)
        known |= {
            name: (hints.get(name, Any), parameter.default)
            for name, parameter in inspect.signature(call).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != "self"
        }
    return known


def check_arguments(
    op: str, where: str, given: Mapping[str, Any], known: Mapping[str, tuple[Any, Any]], of: str
) -> None:
    """ValueError unless arguments have names and types of those that are known; `of`: the call that takes them."""
    for name, value in given.items():
        if name in SET_BY_THE_RUN:
            fail(op, f"{where}.{name}", "none, since the other keys of the file set it", repr(value))
        if name not in known:
            fail(op, f"{where}.{name}", f"an argument of {of}", "an unknown one")
        annotation, default = known[name]
        if not (value is None and default is None) and not _fits(value, annotation):
            fail(op, f"{where}.{name}", f"what the file can hold of {_shown(annotation)}", repr(value))


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
        return kind in (list, tuple, Sequence, Collection)
    return kind in ((str,) if isinstance(value, str) else (dict, Mapping)) and isinstance(value, str | dict)


def _shown(annotation: Any) -> str:
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation).replace("typing.", "")


def fingerprint(path: Path) -> str:
    """A digest of the names, the sizes and the ends of a file, or of all files in a folder: files of weights are too
    large to be read as a whole whenever a run goes on."""
    files = sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]
    found = hashlib.sha256()
    for one in files:
        size = one.stat().st_size
        found.update(f"{one.relative_to(path)} {size}\n".encode())
        with one.open("rb") as file:
            found.update(file.read(ENDS))
            file.seek(max(size - ENDS, 0))
            found.update(file.read())
    return found.hexdigest()[:16]
