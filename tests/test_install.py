"""The package imports without what is optional, and says once what is missing. The numbers in the `fault` marks
are those of the fault list in DESIGN.md."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lr_kernels
from lr_kernels import __main__, info
from lr_kernels.runtime import backends, extras, installation, ops

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
@pytest.mark.fault(number=42)
def test_imports_and_computes_without(blocked):
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


@pytest.mark.fault(number=42)
def test_without_a_compiler_the_reference_serves_and_one_warning_tells(copied_package):
    printed = run_python(USE, copied_package).stdout
    assert printed.startswith(
        "1 lr_kernels: no compiled CPU kernels: the package was installed without its C++ extension"
    )
    assert "backend: 'cpu' cannot run: the package was installed without its C++ extension" in printed


@pytest.mark.fault(number=43)
def test_extension_built_for_another_torch_names_both_versions(copied_package):
    target = copied_package / "lr_kernels"
    (target / "_C.so").write_bytes(b"")
    (target / "_build.json").write_text(json.dumps({"torch": "99.1.0", "torch_minimum": "99.0"}))
    printed = run_python(USE, copied_package).stdout
    assert (
        printed.startswith("1 ")
        and "built with torch 99.1.0" in printed
        and f"running torch {torch.__version__}" in printed
    )


@pytest.mark.fault(number=43)
def test_broken_library_is_reported_with_its_cause(tmp_path):
    (tmp_path / "_C.so").write_bytes(b"not a library")
    (tmp_path / "_build.json").write_text(json.dumps({"torch": torch.__version__, "torch_minimum": "2.10"}))
    (tmp_path / "_C_cuda.so").write_bytes(b"not a library either")
    reason, cuda_reason = ops._load_extension(tmp_path)
    assert "_C_cuda.so" in cuda_reason and "does not load" in cuda_reason
    assert reason is not None and "does not load" in reason and torch.__version__ in reason


@pytest.mark.fault(number=43)
def test_a_library_that_cannot_register_its_ops_is_reported(tmp_path):
    """As one that was built before this source: here a module of Python's."""
    shutil.copyfile(importlib.util.find_spec("_ctypes").origin, tmp_path / "_C.so")
    (tmp_path / "_build.json").write_text(json.dumps({"torch": torch.__version__, "torch_minimum": "2.10"}))
    reason, _ = ops._load_extension(tmp_path)
    assert reason is not None and "does not load" in reason and "lr_kernels_register" in reason


def make_package(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder / "lr_kernels"


@pytest.mark.fault(number=42)
def test_a_source_folder_that_hides_the_installed_package_says_so(tmp_path, monkeypatch):
    """As `pip install .` and then Python in the clone's folder, which comes first on the path."""
    clone = make_package(tmp_path / "clone", "setup.py", "csrc/params.h", "lr_kernels/__init__.py")
    info_of_build = tmp_path / "clone" / "lr_kernels.egg-info"  # pip's build leaves it: it is no installation
    site = make_package(tmp_path / "site", "lr_kernels/__init__.py")
    for metadata in (info_of_build, tmp_path / "site" / "lr_kernels-0.1.0.dist-info"):
        metadata.mkdir()
        for name in ("PKG-INFO", "METADATA"):
            (metadata / name).write_text("Metadata-Version: 2.1\nName: lr_kernels\nVersion: 0.1.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "clone"), str(tmp_path / "site")])
    assert installation.installed_elsewhere(clone) == site and installation.installed_elsewhere(site) is None
    reason = ops._load_extension(clone)[0]
    assert reason == installation.why_not_built(clone)
    assert f"the source folder {clone} is in use and not built; it hides the installed {site}: cd elsewhere" in reason
    assert "pip install -e . --no-build-isolation" in reason
    assert "without its C++ extension (no compiler at build time)" in ops._load_extension(site)[0]
    monkeypatch.setattr(info, "is_source_folder", lambda: True)
    monkeypatch.setattr(info, "installed_elsewhere", lambda: site)
    assert f"(source folder)\n{'':14}hides the installed {site}" in info.report()


@pytest.mark.fault(number=42)
def test_a_source_folder_alone_says_how_to_build_it(tmp_path, monkeypatch):
    clone = make_package(tmp_path, "setup.py", "csrc/params.h", "lr_kernels/__init__.py")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installation.why_not_built(clone).endswith("build it there: pip install -e . --no-build-isolation")


def test_info_has_a_line_for_each_backend_and_names_what_differs(monkeypatch):
    lines = info.report().splitlines()[-len(backends.BACKENDS) :]
    assert [line.split()[0] for line in lines] == list(backends.BACKENDS)
    assert (
        lines[0].split(maxsplit=1)[1].startswith("of multi_source_attention, step_blend and compact_keys alone: no: ")
    )
    assert lines[-1].split() == ["reference", "available"]
    monkeypatch.setattr(backends, "unavailable", lambda name, op: "too new" if op == "adain" else None)
    assert info.availability("cpu") == "available; adain: no: too new"


EXTRAS = """
import importlib, runpy, sys
def told(call):
    try:
        call()
    except (ModuleNotFoundError, SystemExit) as error:
        print(type(error).__name__, error)
for name in ("lr_kernels.diffusers", "lr_kernels.toy", "benchmarks.toy", "benchmarks.price", "benchmarks.plots",
             "benchmarks.__main__"):
    told(lambda: importlib.import_module(name))
for command in ("demo", "presets", "knobs", "generate run.yaml"):
    sys.argv = ["lr_kernels", *command.split()]
    told(lambda: runpy.run_module("lr_kernels", run_name="__main__"))
from lr_kernels import interop
told(interop.register_with_transformers)
"""


@pytest.mark.fault(number=42)
def test_what_needs_an_extra_says_which():
    extra = ("diffusers", "transformers", "safetensors", "PIL", "tqdm", "rich", "matplotlib")
    root = PACKAGE.parent
    printed = run_python(BLOCKED.format(blocked=extra) + EXTRAS, root).stdout.splitlines()
    missing = "lr_kernels: diffusers, transformers, safetensors, PIL, tqdm are not installed"
    how = 'in the folder of setup.py: pip install --no-build-isolation ".[{}]"'
    of_diffusers = f"{missing}; {how.format('diffusers')}"
    of_bench = f"lr_kernels: {{}} is not installed; {how.format('bench')}"
    modules = [of_diffusers] * 2 + [of_bench.format(name) for name in ("rich", "rich", "matplotlib", "tqdm")]
    expected = [f"ModuleNotFoundError {text}" for text in modules] + [f"SystemExit {of_diffusers}"] * 4
    transformers = f"lr_kernels: transformers is not installed; {how.format('diffusers')}"
    assert printed == [*expected, f"ModuleNotFoundError {transformers}"]


def test_the_extras_are_those_of_pyproject():
    pyproject = (PACKAGE.parent / "pyproject.toml").read_text()
    packages = {"PIL": "pillow"}
    for extra, modules in extras.MODULES.items():
        (line,) = (line for line in pyproject.splitlines() if line.startswith(f"{extra} = "))
        for module in modules:
            assert f'"{packages.get(module, module.replace("_", "-"))}' in line, module


SETUP = """
import importlib.machinery, runpy, shutil, subprocess, sys, types
import setuptools
sys.argv = ["setup.py", "--name"]
torch = types.ModuleType("torch")
torch.__spec__ = importlib.machinery.ModuleSpec("torch", None)
torch.__version__, torch.version = "2.13.0+cpu", types.SimpleNamespace(cuda=None)
extension = types.ModuleType("torch.utils.cpp_extension")
extension.include_paths = extension.library_paths = lambda: []
sys.modules |= {"torch": torch, "torch.utils": types.ModuleType("torch.utils"), "torch.utils.cpp_extension": extension}
def told(call):
    try:
        return call()
    except SystemExit as error:
        print(error)
def run(folder=sys.argv[0]):
    return runpy.run_path("setup.py", run_name="__main__")
def build(*tools):
    shutil.which = lambda name, path=None: f"/bin/{name}" if name in tools else None
    modules = [setuptools.Extension("lr_kernels._C", [])]
    distribution = setuptools.Distribution({"name": "lr_kernels", "ext_modules": modules})
    command = found["CMakeBuild"](distribution)
    command.ensure_finalized()
    told(command.run)
found = run()
build("cmake")
build("g++")
subprocess.run = lambda command: types.SimpleNamespace(returncode=1)
build("g++", "cmake", "ninja")
torch.__version__ = "2.9.1"
told(run)
del sys.modules["torch"]
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find_spec(name, package)
told(run)
setuptools.__version__ = "68.0.0"
told(run)
"""


@pytest.mark.fault(number=42)
def test_what_a_build_lacks_is_told_in_one_line():
    """setup.py without a compiler, without cmake, where cmake fails, and with the wrong torch or setuptools."""
    run = subprocess.run([sys.executable, "-c", SETUP], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("lr_kernels: no C++ compiler: installing without the compiled CPU kernels") == 1
    name, no_cmake, failed, old_torch, no_torch, old_setuptools = run.stdout.splitlines()
    assert name == "lr_kernels"
    assert no_cmake.startswith("lr_kernels: the build needs cmake: pip install cmake ninja")
    assert failed.startswith("lr_kernels: cmake failed, and says above why: /bin/cmake -S")
    assert old_torch == "lr_kernels: torch 2.9.1 is older than 2.10: pip install -U 'torch>=2.10'"
    assert no_torch.startswith("lr_kernels: the build needs torch: pip install 'torch>=2.10' numpy")
    assert old_setuptools.startswith("lr_kernels: setuptools 68.0.0 is older than 77: pip install -U 'setuptools>=77'")


def command_line(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lr_kernels", *words])
    __main__.main()


def test_without_a_command_there_is_help(monkeypatch, capsys):
    command_line(monkeypatch)
    text = capsys.readouterr().out
    assert all(command in text for command in ("info", "demo", "presets", "knobs", "generate"))


WRONG = {
    "nonsense": "invalid choice: 'nonsense'",
    "demo --subject cat": "argument --subject: invalid choice: 'cat'",
    "demo --seeds 0": "argument --seeds: expected a number from 1 on, got '0'",
    "demo --backend cuda": "argument --backend: 'cuda' cannot run: ",
    "demo --backend gpu": "argument --backend: 'gpu' cannot run: no such backend",
    "generate": "the following arguments are required: run",
    "info --output x": "unrecognized arguments: --output x",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_options_give_help_and_the_reason(words, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line(monkeypatch, *words.split())
    told = capsys.readouterr().err
    assert ended.value.code == 2 and WRONG[words] in told and "show this help message" in told


def test_sources_keep_torch_out_of_csrc_and_files_small():
    root = PACKAGE.parent
    folders = ["csrc/**/*.[hc]*", "bindings/*", "lr_kernels/**/*.py", "benchmarks/**/*.py", "tests/*.py"]
    for path in [path for folder in folders for path in root.glob(folder)]:
        text = path.read_text()
        assert len(text.splitlines()) <= 500, path
        if path.is_relative_to(root / "csrc"):
            assert "torch/" not in text and "at::" not in text, path
