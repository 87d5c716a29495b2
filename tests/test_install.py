"""The package imports without what is optional, and says once what is missing. Numbers are rows of the fault list."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lr_kernels
from lr_kernels import ops

PACKAGE = Path(lr_kernels.__file__).parent

BLOCKED = """
import importlib.abc, importlib.util, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {blocked!r} else found(name, package)
"""


def run_python(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd)


@pytest.mark.parametrize(
    "blocked", [("triton",), ("diffusers", "transformers"), ("triton", "diffusers", "rich", "PIL")]
)
def test_42_imports_and_computes_without(blocked):
    code = BLOCKED.format(blocked=blocked) + (
        "import torch, lr_kernels as lr\n"
        "x = torch.randn(1, 4, 1, 8)\n"
        "lr.multi_source_attention(x, [lr.Source(x, x)], backend='cpu')\n"
        "try:\n    lr.multi_source_attention(x, [lr.Source(x, x)], backend='triton')\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    printed = run_python(code).stdout
    if "triton" in blocked:
        assert "backend: 'triton' cannot run: the package triton is not installed" in printed


@pytest.fixture
def copied_package(tmp_path):
    """The pure-Python part of the package, without its extension."""
    ignore = shutil.ignore_patterns("*.so", "_build.json", "toy", "diffusers", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "lr_kernels", ignore=ignore)
    return tmp_path


USE = (
    "import warnings\n"
    "with warnings.catch_warnings(record=True) as seen:\n"
    "    warnings.simplefilter('always')\n"
    "    import torch, lr_kernels as lr\n"
    "    x = torch.randn(1, 4, 1, 8)\n"
    "    for _ in range(3): lr.multi_source_attention(x, [lr.Source(x, x)])\n"
    "print(len([w for w in seen if 'lr_kernels' in str(w.message)]), *[w.message for w in seen])\n"
    "try:\n    lr.multi_source_attention(x, [lr.Source(x, x)], backend='cpu')\n"
    "except RuntimeError as error:\n    print(error)\n"
)


def test_42_without_a_compiler_the_reference_serves_and_one_warning_tells(copied_package):
    printed = run_python(USE, copied_package).stdout
    assert printed.startswith(
        "1 lr_kernels: no compiled CPU kernels: the package was installed without its C++ extension"
    )
    assert "backend: 'cpu' cannot run: the package was installed without its C++ extension" in printed


def test_43_extension_built_for_another_torch_names_both_versions(copied_package):
    target = copied_package / "lr_kernels"
    (target / "_C.so").write_bytes(b"")
    (target / "_build.json").write_text(json.dumps({"torch": "99.1.0", "torch_minimum": "99.0"}))
    printed = run_python(USE, copied_package).stdout
    assert (
        printed.startswith("1 ")
        and "built with torch 99.1.0" in printed
        and f"running torch {torch.__version__}" in printed
    )


def test_43_broken_library_is_reported_with_its_cause(tmp_path):
    (tmp_path / "_C.so").write_bytes(b"not a library")
    (tmp_path / "_build.json").write_text(json.dumps({"torch": torch.__version__, "torch_minimum": "2.10"}))
    (tmp_path / "_C_cuda.so").write_bytes(b"not a library either")
    reason, cuda_reason = ops._load_extension(tmp_path)
    assert "_C_cuda.so" in cuda_reason and "does not load" in cuda_reason
    assert reason is not None and "does not load" in reason and torch.__version__ in reason


def test_sources_keep_torch_out_of_csrc_and_files_small():
    root = PACKAGE.parent
    for path in [*root.glob("csrc/**/*.[hc]*"), *root.glob("bindings/*"), *root.glob("lr_kernels/**/*.py")]:
        text = path.read_text()
        assert len(text.splitlines()) <= 500, path
        if path.is_relative_to(root / "csrc"):
            assert "torch/" not in text and "at::" not in text, path
