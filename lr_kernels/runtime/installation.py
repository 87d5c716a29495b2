"""Where this package is imported from, and what to do where its compiled extension is missing."""

import importlib.metadata
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def is_source_folder(folder: Path = PACKAGE) -> bool:
    """Whether the package is imported from a clone, as Python does in a clone's folder, and not from site-packages."""
    return (folder.parent / "csrc").is_dir() and (folder.parent / "setup.py").is_file()


def installed_elsewhere(folder: Path = PACKAGE) -> Path | None:
    """The folder of another, installed lr_kernels that this one hides; None where there is none."""
    for found in importlib.metadata.distributions(name="lr_kernels"):
        package = Path(str(found.locate_file("lr_kernels"))).resolve()
        other = package != folder.resolve() and not is_source_folder(package)  # a build leaves metadata in its clone
        if other and (package / "__init__.py").is_file():
            return package
    return None


def why_not_built(folder: Path = PACKAGE) -> str:
    """Why there is no `_C.so` in `folder`, and what to do."""
    if (folder / "metadata.json").is_file():  # a kernel for Hugging Face's `kernels`
        return f"this variant of the kernel, {folder.name}, is Python alone"
    if not is_source_folder(folder):
        return "the package was installed without its C++ extension (no compiler at build time)"
    installed = installed_elsewhere(folder)
    build = "pip install -e . --no-build-isolation"
    if installed is None:
        return f"the source folder {folder} is in use and not built; build it there: {build}"
    hides = f"it hides the installed {installed}: cd elsewhere"
    return f"the source folder {folder} is in use and not built; {hides}, or {build}"
