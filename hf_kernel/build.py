"""Assembles the kernel for Hugging Face's `kernels` from the package's own files.

    python hf_kernel/build.py                     this machine's variants, in hf_kernel/build/
    python hf_kernel/build.py FOLDER              the same in another folder
    python hf_kernel/build.py --project FOLDER    the source that Hugging Face's kernel-builder takes

A variant is a folder that `kernels` loads. `torch-universal` is Python alone: Triton where a GPU is, else the
specification. Where lr_kernels is built here (`_C.so`), another variant brings the compiled CPU kernels; its name says
which machine and which stable ABI of torch they need.
"""

import argparse
import base64
import hashlib
import json
import platform
import re
import shutil
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "lr_kernels"
PARTS = ("source.py", "runtime", "reference", "triton", "attention", "denoising", "interop")
"""What the exported functions import, out of the package."""
COMMANDS = ("triton/report.py", "triton/tune.py")
"""Run by `python -m`, which a kernel is not for."""
COMPILED = ("_C.so", "_build.json")
KERNELS_MINIMUM = "0.17.0"  # of the package `kernels`; it knows variants for torch's stable ABI
UNIVERSAL = "torch-universal"


def compiled_variant() -> str:
    """The name of the variant with the CPU kernels that are built here."""
    abi = json.loads((PACKAGE / "_build.json").read_text())["torch_minimum"].replace(".", "")
    return f"torch-stable-abi{abi}-cpu-{platform.machine()}-{platform.system().lower()}"


def copy_python(target: Path) -> None:
    """The kernel's Python files but `_ops.py`, which differs from build to build."""
    for part in PARTS:
        for path in [PACKAGE / part] if part.endswith(".py") else sorted((PACKAGE / part).rglob("*.py")):
            name = path.relative_to(PACKAGE)
            if name.as_posix() not in COMMANDS:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / name)
    for path in (HERE / "torch-ext/lr_kernels").glob("*.py"):
        shutil.copyfile(path, target / path.name)


def hashes(variant: Path) -> dict[str, str]:
    """The SHA-256 of every file of a variant, in base64."""
    files = sorted(path for path in variant.rglob("*") if path.is_file())
    digests = {path: hashlib.sha256(path.read_bytes()).digest() for path in files}
    return {path.relative_to(variant).as_posix(): base64.b64encode(x).decode() for path, x in digests.items()}


def finish(variant: Path, kind: str) -> None:
    """Add `_ops.py` and metadata.json. The namespace of the ops ends in a hash of all files, so builds that differ have
    different ones."""
    # Only lines of one value are read: Python 3.10 has no reader of TOML.
    general = dict(re.findall(r'^(\w+) = "?([\w.-]+)"?$', (HERE / "build.toml").read_text(), re.M))
    unique = hashlib.sha256(json.dumps(hashes(variant)).encode()).hexdigest()[:8]
    namespace = f"_{general['name'].replace('-', '_')}_{kind}_{unique}"
    code = (PACKAGE / "_ops.py").read_text()
    for of_package, of_build in (("ops.lr_kernels\n", f"ops.{namespace}\n"), ("lr_kernels::", f"{namespace}::")):
        assert of_package in code
        code = code.replace(of_package, of_build)
    (variant / "_ops.py").write_text(code)
    metadata = {
        "id": namespace,
        "name": general["name"],
        "version": int(general["version"]),
        "license": general["license"],
        "kernels-minver": KERNELS_MINIMUM,
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": hashes(variant)},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def assemble(folder: Path) -> list[Path]:
    """Make this machine's variants anew in a folder."""
    variants = [folder / UNIVERSAL]
    if (PACKAGE / COMPILED[0]).exists():
        variants.append(folder / compiled_variant())
    for variant in variants:
        shutil.rmtree(variant, ignore_errors=True)
        copy_python(variant)
        if variant.name == UNIVERSAL:
            finish(variant, "universal")
        else:
            for name in COMPILED:
                shutil.copyfile(PACKAGE / name, variant / name)
            finish(variant, "cpu")
    return variants


def make_project(folder: Path) -> None:
    """Write the source that kernel-builder takes: build.toml, flake.nix, torch-ext/lr_kernels."""
    copy_python(folder / "torch-ext/lr_kernels")
    for name in ("build.toml", "flake.nix"):
        shutil.copyfile(HERE / name, folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "build", help="default: hf_kernel/build")
    parser.add_argument("--project", action="store_true", help="write the source for kernel-builder into FOLDER")
    arguments = parser.parse_args()
    if not arguments.project:
        print(*assemble(arguments.folder), sep="\n")
    elif arguments.folder == HERE / "build":
        parser.error("--project: expected another FOLDER than that of this machine's variants")
    else:
        make_project(arguments.folder)
