"""The kernel that hf_kernel/build.py assembles: what it consists of, and that it needs no lr_kernels. Each variant runs
in an environment of its own where that package is not installed."""

import ast
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from hf_kernel_process import COEFFICIENTS, inputs
from kernels import get_local_kernel
from kernels._rust import Backend, Build, Digest, DigestAlgorithm, Metadata
from kernels.variants import get_variants_local, parse_variant, resolve_variant
from torch.nn import functional as F

import lr_kernels
from lr_kernels.runtime import ops
from lr_kernels.testing import assert_matches

ROOT = Path(lr_kernels.__file__).parents[1]
SCRIPT = ROOT / "hf_kernel/build.py"
SITE = Path(torch.__file__).parents[1]
UNIVERSAL = "torch-universal"


def build(*arguments: str | Path) -> list[Path]:
    run = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=True)
    return [Path(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """The variants by name."""
    return {path.name: path for path in build(tmp_path_factory.mktemp("kernel") / "build")}


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory):
    """A Python that has the installed packages, but not lr_kernels; pip's links to clones (.pth) are left out."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for path in SITE.iterdir():
        if "lr_kernels" not in path.name and path.suffix != ".pth" and path.name != "__pycache__":
            (site / path.name).symlink_to(path)
    return folder / "bin/python"


def own_variants() -> list[tuple[str, str]]:
    """Which variant runs with which backend: the compiled one, and Python's own two."""
    compiled = [] if ops.extension_error is not None else [("compiled", "cpu")]
    return [*compiled, (UNIVERSAL, "reference"), (UNIVERSAL, "triton")]


@pytest.mark.parametrize(("variant", "backend"), own_variants())
def test_a_variant_computes_where_lr_kernels_is_not_installed(variant, backend, variants, clean_python, tmp_path):
    path = variants[UNIVERSAL] if variant == UNIVERSAL else variants[compiled_name(variants)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON"))}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if backend == "triton":
        environment["TRITON_INTERPRET"] = "1"
    out = tmp_path / "results.pt"
    command = [clean_python, "-I", ROOT / "tests/hf_kernel_process.py", path, backend, out]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert ("no compiled CPU kernels" in run.stderr) == (variant == UNIVERSAL)
    found, low, exact = torch.load(out), expected(torch.float32), expected(torch.float64)
    for name in ("attention", "compiled", "merged"):
        assert_matches(found[name], low["attention"], exact["attention"], name)
    for name in ("gradients", "compiled gradients"):
        for one, stock, oracle in zip(found[name], low["gradients"], exact["gradients"], strict=True):
            assert_matches(one, stock, oracle, name)
    for one in found["one source"]:
        assert_matches(one, low["one source"], exact["one source"])
    assert_matches(found["step"], low["step"], exact["step"])


def compiled_name(variants: dict[str, Path]) -> str:
    (name,) = set(variants) - {UNIVERSAL}
    return name


def expected(dtype: torch.dtype) -> dict:
    """PyTorch's results of what hf_kernel_process.py computes."""
    given = {name: [x.to(dtype) for x in tensors] for name, tensors in inputs().items()}

    def attention(query, *keys_and_values):
        key, value = (torch.cat(keys_and_values[i::2], dim=1) for i in (0, 1))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    leaves = [x.clone().requires_grad_() for x in given["attention"]]
    first, second, a, e = COEFFICIENTS[0, 0, :4].to(dtype)
    sample, *predictions = given["latents"]
    return {
        "attention": attention(*given["attention"]),
        "gradients": torch.autograd.grad(attention(*leaves).square().sum(), leaves),
        "one source": attention(*given["attention"][:3]),
        "step": a * sample + e * (first * predictions[0] + second * predictions[1]),
    }


def test_the_variants_and_the_installed_package_share_a_process(variants):
    query, key, value, *_ = inputs()["attention"]
    namespaces = {"lr_kernels"}
    for name, path in variants.items():
        kernel = get_local_kernel(path)
        namespaces.add(kernel.__name__)
        assert kernel.multi_source_attention is not lr_kernels.multi_source_attention
        backend = "reference" if name == UNIVERSAL else "cpu"
        found = kernel.multi_source_attention(query, [kernel.Source(key, value)], backend=backend)
        installed = lr_kernels.multi_source_attention(query, [lr_kernels.Source(key, value)], backend=backend)
        assert torch.equal(found, installed)
    registered = {name.split("::")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert len(namespaces) == 1 + len(variants) and namespaces <= registered


def test_kernels_prefers_the_compiled_variant(variants):
    folder = variants[UNIVERSAL].parent
    chosen, _ = resolve_variant(get_variants_local(folder), backend="cpu")
    names = set(variants)
    assert names == {UNIVERSAL} or len(names) == 2
    assert chosen == parse_variant(UNIVERSAL if names == {UNIVERSAL} else compiled_name(variants))


def test_the_metadata_is_that_of_the_build_file(variants):
    for path in variants.values():
        metadata = Metadata.read_from_file(path / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, path))
        assert metadata.id.isidentifier() and metadata.id.startswith("_lr_kernels_")
        assert f"ops = torch.ops.{metadata.id}\n" in (path / "_ops.py").read_text()
        assert metadata.name.python_name == "lr_kernels" and metadata.license == "Apache-2.0" and metadata.version == 1


def test_builds_that_differ_have_namespaces_of_their_own(variants, tmp_path):
    again = {path.name: path for path in build(tmp_path)}
    ids = {json.loads((path / "metadata.json").read_text())["id"] for path in [*variants.values(), *again.values()]}
    assert len(ids) == len(variants)  # the same files give the same namespace, other files another


def test_the_project_is_what_kernel_builder_takes(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):  # without a folder of its own
        build("--project")
    build("--project", tmp_path)
    config = Build.open(tmp_path)
    assert config.general.backends == [Backend.CPU, Backend.CUDA]
    source = tmp_path / "torch-ext/lr_kernels"
    assert (source / "__init__.py").exists() and (tmp_path / "flake.nix").exists()
    assert not (source / "_ops.py").exists() and not (source / "lr_kernels").exists()  # the builder adds both


def test_all_imports_of_the_kernel_itself_are_relative(variants):
    """Others are Python's, torch's and Triton's; the last is named where transformers' users ask for it."""
    allowed = {*sys.stdlib_module_names, "torch", "triton", "transformers"}
    for path in variants[UNIVERSAL].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = {node.module.split(".")[0]}
            else:
                continue
            assert names <= allowed, f"{path.name}: {names - allowed}"
