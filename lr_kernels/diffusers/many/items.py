"""What `generate_many` is asked for, an item an image, and the files that it leaves: pictures, and a record of each."""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import PIL.Image

from ...runtime.checks import check_integer, fail

OP = "generate_many"
SUFFIX = ".png"
_FORBIDDEN = '<>:"|?*\\'
"""Characters that file names of some systems cannot have. "/" separates names."""
_LONGEST = 200
"""Bytes of a name in a path: systems allow 255, and the file that is being written has a longer name."""


@dataclass(frozen=True)
class ImageItem:
    """One image to be made, or several by one call.

    Args:
        path: of the image within the output folder, with "/" between names, as "ball/on-sand/0.png".
        prompt: the prompt.
        subject: the name of the subject.
        sample: which of the images of this subject and prompt it is, from 0 on.
        base_seed: an integer; another one gives other images of the same prompts.
        arguments: what else makes the image what it is: what JSON holds, under string keys. It is kept in the record.
    """

    path: str
    prompt: str
    subject: str
    sample: int = 0
    base_seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The seed of the item's generator, from 0 to 2^63 - 1: the first 8 bytes of SHA-256 of the JSON list
        [base_seed, subject, prompt, sample] (ASCII, no spaces), big-endian, without the lowest bit."""
        identity = json.dumps([self.base_seed, self.subject, self.prompt, self.sample], separators=(",", ":"))
        return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") >> 1

    @property
    def record_path(self) -> str:
        """The path of the item's record: the image's with .json in place of .png."""
        return self.path.removesuffix(SUFFIX) + ".json"

    def image_paths(self, count: int) -> list[str]:
        """The paths of `count` images: the item's own, or of several numbered ones, as "ball/on-sand/0.1.png"."""
        if count == 1:
            return [self.path]
        return [f"{self.path.removesuffix(SUFFIX)}.{number}{SUFFIX}" for number in range(count)]

    def record(self) -> dict[str, Any]:
        """The item and its seed, as its record holds them."""
        return asdict(self) | {"seed": self.seed}


@dataclass(frozen=True)
class Drawn:
    """What a function that makes an item may return where more than its image is to be kept.

    Args:
        image: of the item.
        masks: pictures that lie beside it, by name: that of "context" is "0.context.png" beside "0.png".
        seconds: what it took, by part. The item's record has them, so records of two runs differ in them.
    """

    image: PIL.Image.Image
    masks: Mapping[str, PIL.Image.Image] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def check_items(items: Sequence[ImageItem]) -> list[ImageItem]:
    """The items as a list. ValueError or TypeError, which names item and field, unless each has files of its own."""
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        fail(OP, "items", "a sequence of ImageItem", type(items).__name__, error=TypeError)
    seen: dict[str, int] = {}
    for i, item in enumerate(items):
        where = f"items[{i}]"
        if not isinstance(item, ImageItem):
            fail(OP, where, "an ImageItem", type(item).__name__, error=TypeError)
        for name in ("path", "prompt", "subject"):
            if not isinstance(getattr(item, name), str):
                fail(OP, f"{where}.{name}", "a string", repr(getattr(item, name)), error=TypeError)
        _check_path(f"{where}.path", item.path)
        check_integer(OP, f"{where}.sample", item.sample, 0, "an integer from 0 on")
        check_integer(OP, f"{where}.base_seed", item.base_seed, -(2**63), "an integer of 64 bits", 2**63 - 1)
        if not _is_json(item.arguments):
            fail(OP, f"{where}.arguments", "what JSON holds, under string keys", repr(item.arguments))
        first = seen.setdefault(item.path.casefold(), i)  # some systems do not tell capitals
        if first != i:
            fail(OP, f"{where}.path", "a path of its own", f"{item.path!r}, as items[{first}] has it")
    return list(items)


def _check_path(where: str, path: str) -> None:
    """ValueError unless the path is names with "/" between them, the last one that of a picture."""
    names = path.split("/")
    for name in names:
        if reason := why_no_name(name):
            fail(OP, where, f"names of files with '/' between them, each {reason}", repr(path))
    for name in names[:-1]:
        if name.lower().endswith((SUFFIX, ".json")):
            fail(OP, where, f"folders whose names end neither in {SUFFIX} nor in .json, as files do", repr(path))
    stem, suffix = PurePosixPath(names[-1]).stem, PurePosixPath(names[-1]).suffix
    if suffix != SUFFIX:
        fail(OP, where, f"a name that ends in {SUFFIX}", repr(path))
    if stem.rpartition(".")[2].isdecimal() and "." in stem:
        hint = "names that end in a dot and a number belong to items of several images"
        fail(OP, where, "a name without a dot before its last number", repr(path), hint)


def why_no_name(name: str) -> str:
    """What a text would have to be to be the name of a file on every system; empty where it is one."""
    if not name or name.strip() != name or name.startswith(".") or name.endswith("."):
        return "not empty, and without dots and spaces at its ends"
    if "/" in name or not name.isprintable() or set(name) & set(_FORBIDDEN):
        return f"without / {' '.join(_FORBIDDEN)} and control characters"
    return "" if len(name.encode()) <= _LONGEST else f"of at most {_LONGEST} bytes"


def _is_json(arguments: object) -> bool:
    """Whether JSON gives the arguments back as they are; tuples would become lists, other keys strings."""
    try:
        return isinstance(arguments, Mapping) and json.loads(json.dumps(arguments, allow_nan=False)) == arguments
    except (TypeError, ValueError, RecursionError):
        return False


def pending(items: Sequence[ImageItem], folder: Path) -> list[int]:
    """Which items are still to be made: those without a record, or with the record of a failure.

    ValueError where a record without an error is that of another item, whose files are not overwritten.
    """
    return [i for i, item in enumerate(items) if not _is_complete(item, folder)]


def _is_complete(item: ImageItem, folder: Path) -> bool:
    path = folder / item.record_path
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return False
    except ValueError:
        record = None
    hint = "choose another folder, or remove the file"
    if not isinstance(record, dict) or not isinstance(record.get("images"), list):
        fail(OP, "folder", f"the record of an item in {path}", "something else", hint)
    if record.get("error") is not None:
        return False
    for name, value in item.record().items():
        if record.get(name) != value:
            place, found, wanted = _first_difference(name, record.get(name), value)
            got = f"one whose {place} is {found!r} instead of {wanted!r}"
            fail(OP, "folder", f"the record of this item in {path}", got, hint)
    return all((folder / name).is_file() for name in (*record["images"], *record.get("masks", {}).values()))


def _first_difference(place: str, found: object, wanted: object) -> tuple[str, object, object]:
    """The first place in which two values differ, with keys after dots, and what is there."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            if found.get(key) != wanted.get(key) or (key in found) != (key in wanted):
                return _first_difference(f"{place}.{key}", found.get(key), wanted.get(key))
    return place, found, wanted


def write_made(item: ImageItem, made: object, folder: Path) -> dict[str, Any]:
    """Write what `generate` has returned; what the item's record says of it, with paths within the folder."""
    if isinstance(made, Drawn):
        masks = {name: f"{item.path.removesuffix(SUFFIX)}.{name}{SUFFIX}" for name in made.masks}
        for name, path in masks.items():
            _write_picture(folder / path, made.masks[name])
        _write_picture(folder / item.path, made.image)
        seconds = {name: round(x, 3) for name, x in made.seconds.items()}
        return {"images": [item.path], "masks": masks, "seconds": seconds}
    images = [made] if isinstance(made, PIL.Image.Image) else made
    if not isinstance(images, list | tuple) or not images or not all(isinstance(x, PIL.Image.Image) for x in images):
        fail(OP, "generate", "a function that returns a PIL image, or a list of them", type(made).__name__)
    paths = item.image_paths(len(images))
    for path, image in zip(paths, images):
        _write_picture(folder / path, image)
    return {"images": paths}


def _write_picture(path: Path, image: PIL.Image.Image) -> None:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    write_whole(path, encoded.getvalue())


def write_record(item: ImageItem, folder: Path, of_run: Mapping[str, Any]) -> None:
    """Write the item's record, last of its files: who finds one without an error finds all images."""
    text = json.dumps(item.record() | dict(of_run), indent=2, ensure_ascii=False)
    write_whole(folder / item.record_path, f"{text}\n".encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all. A partial file that a killed run leaves is overwritten by the next one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
