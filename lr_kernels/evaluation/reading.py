"""Reading the file of an evaluation, in YAML or JSON: checked as a whole before any model is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..diffusers.many.file_checks import parsed
from ..runtime.checks import fail
from .run_checks import complete
from .run_file import OP, Concept, Evaluation, MethodEntry, ReportEntry


def read_evaluation(path: str | Path) -> Evaluation:
    """Read and check a file. Paths in it are relative to its own folder.

    Raises:
        ValueError: what is wrong, each in a line, by the name of its key. FileNotFoundError: no such file.
    """
    path = Path(path)
    if path.is_dir():
        fail(OP, "file", "a file", f"the folder {path}")
    given = parsed(OP, path)
    if not isinstance(given, dict):
        fail(OP, "file", "a mapping", repr(given))
    try:
        found = Evaluation.model_validate(given, context={"folder": path.parent})
    except ValidationError as error:
        raise ValueError("\n".join(dict.fromkeys(_line(x) for x in error.errors(include_url=False)))) from None
    if faults := complete(found, path.parent):
        raise ValueError("\n".join(faults))
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
    elif error["type"] == "too_short":
        text = f"expected at least one entry, got {got}"
    elif error["type"] in ("dict_type", "model_type"):
        text = f"expected a mapping, got {got}"
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
