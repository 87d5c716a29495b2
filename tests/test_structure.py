"""The import rules of the package: which rooms (its folders and single modules) may import which, as drawn in
DESIGN.md, and that no files import each other in a cycle.

Every import statement counts, also those within functions.
"""

import ast
import importlib
from functools import reduce
from pathlib import Path

import pytest

import lr_kernels

PACKAGE = Path(lr_kernels.__file__).parent

ALLOWED = {
    "_ops": set(),
    "runtime": {"_ops"},
    "source": set(),
    "reference": {"runtime", "source"},
    "triton": {"_ops", "runtime"},
    "attention": {"runtime", "source", "reference"},
    "denoising": {"runtime", "reference"},
    "features": {"runtime", "reference"},
    "testing": {"source", "reference"},
    "info": {"runtime"},
    "block_masks": {"runtime"},
    "statistics": set(),
    "interop": {"runtime", "source", "attention"},
    "presets": {"runtime", "source", "attention", "features"},
    "diffusers.processors": {"runtime", "source", "attention"},
    "diffusers.subjects": {"runtime", "source", "attention", "features", "diffusers.processors"},
    "diffusers.pipelines": {"runtime", "denoising", "diffusers.processors", "diffusers.subjects"},
    "diffusers.dit": {
        "runtime", "source", "attention", "denoising", "features", "diffusers.processors", "diffusers.subjects",
        "diffusers.pipelines",
    },
    "diffusers.methods": {
        "runtime", "attention", "presets", "diffusers.processors", "diffusers.subjects", "diffusers.pipelines",
    },
    "diffusers.many": {"runtime", "diffusers.processors", "diffusers.pipelines"},
    "diffusers.context_parallel": {"runtime", "interop"},
    "diffusers.backend": {"runtime", "interop", "diffusers.context_parallel", "diffusers.processors"},
    "diffusers.guider": {"runtime", "diffusers.pipelines"},
    "evaluation": {
        "runtime", "info", "statistics", "diffusers.pipelines", "diffusers.methods", "diffusers.many",
    },
    "toy": {"", "runtime", "info", "statistics", "features", "presets", "diffusers", "diffusers.methods",
            "diffusers.subjects", "diffusers.pipelines", "evaluation"},
}  # fmt: skip
"""What each room may import beside its own files. The root, "", names the public functions; __main__ the commands."""

DOOR = ("lr_kernels.runtime.ops", "lr_kernels.triton")
"""The one import against these rules: `runtime.ops`, which DESIGN.md calls the door, loads a backend's kernels when
they are first asked for."""

COMMANDS = {"lr_kernels.triton.tune"}
"""Run by `python -m`, imported by no file: these stand above all rooms."""

Imports = dict[str, set[str]]


def imports_of(package: Path) -> Imports:
    """By module, the modules of the package that it imports."""
    files = {module_name(path, package): path for path in package.rglob("*.py")}
    return {module: set(imported(module, path, set(files))) for module, path in files.items()}


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(module: str, path: Path, known: set[str]):
    folder = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                if name in known or base in known:
                    yield name if name in known else base


def room(module: str) -> str:
    """The room of a module: the longest name in ALLOWED that it lies in, or its own name."""
    name = module.removeprefix("lr_kernels").lstrip(".")
    rooms = [x for x in ALLOWED if name == x or name.startswith(x + ".")]
    return max(rooms, key=len, default=name)


def circle(imports: Imports) -> list[str]:
    """Modules that import each other in a ring, the first one again at the end; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(imports[module]):
            found = walk(other, [*path, module])
            if found:
                return found
        done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := walk(module, []))), [])


def forbidden(imports: Imports) -> list[str]:
    """Imports from a room that may not be imported there."""
    found = []
    for module, others in imports.items():
        here = room(module)
        if here not in ALLOWED or module in COMMANDS:
            continue
        for other in others:
            there = room(other)
            if there != here and there not in ALLOWED[here] and (module, other) != DOOR:
                found.append(f"{module} imports {other}: {here} may not import {there or 'the root'}")
    return found


def test_no_files_import_each_other_in_a_circle():
    assert circle(imports_of(PACKAGE)) == []


def test_rooms_import_only_what_they_may():
    assert forbidden(imports_of(PACKAGE)) == []


def test_every_file_is_in_a_room():
    outside = {m for m in imports_of(PACKAGE) if room(m) not in ALLOWED}
    assert outside == {"lr_kernels", "lr_kernels.__main__", "lr_kernels.diffusers"}


def test_commands_are_imported_by_nothing():
    assert not any(COMMANDS & others for others in imports_of(PACKAGE).values())


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("runtime/checks.py", "def f():\n    from . import ops\n", "circle"),
        ("attention/plan.py", "from .api import multi_source_attention\n", "circle"),
        ("triton/launch.py", "from ..attention.plan import AttentionPlan\n", "triton may not import attention"),
        ("diffusers/processors/unet.py", "from ..methods import masactrl\n", "may not import diffusers.methods"),
    ],
)
def test_a_planted_import_is_found(file, line, complaint, tmp_path):
    package = tmp_path / "lr_kernels"
    for path in PACKAGE.rglob("*.py"):
        copy = package / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    planted = package / file
    planted.write_text(planted.read_text() + "\n" + line)
    imports = imports_of(package)
    told = [f"circle: {' -> '.join(circle(imports))}"] if circle(imports) else []
    assert any(complaint in text for text in [*told, *forbidden(imports)])


PUBLIC = ("", ".diffusers", ".diffusers.methods", ".presets", ".interop", ".block_masks", ".evaluation")
"""Where users import from."""


def test_error_prefixes_name_what_users_call():
    """`lr_kernels.<prefix>: …` of every `fail` whose prefix is written out, or a constant of the file."""
    places = [importlib.import_module(f"lr_kernels{place}") for place in PUBLIC]

    def found(name: str) -> bool:
        parts = name.split(".")
        return any(callable(reduce(lambda x, part: getattr(x, part, None), parts, place)) for place in places)

    prefixes = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fail":
                prefix = node.args[0]
                prefixes.add(getattr(prefix, "value", None) or constants.get(getattr(prefix, "id", "")))
    prefixes.discard(None)
    assert len(prefixes) > 20 and [name for name in prefixes if isinstance(name, str) and not found(name)] == []
