"""The code of README's first example and of the pages under docs/ runs, block after block as a reader would."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

ROOT = Path(__file__).parent.parent
PAGES = [
    "docs/attention-backend.md",
    "docs/references.md",
    "docs/own-method.md",
    "docs/layout-and-retouch.md",
    "docs/many-prompts.md",
    "docs/evaluation.md",
    "hf_kernel/README.md",
]


def page_text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page_text(page), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.startswith("hf_kernel"):  # that page loads what the command above its first block makes
        subprocess.run([sys.executable, ROOT / "hf_kernel/build.py", tmp_path / "hf_kernel/build"], check=True)
    active = _AttentionBackendRegistry._active_backend  # a page sets diffusers' default for all models
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", active)
    found = blocks(page)
    assert found
    names: dict = {"__name__": "page"}
    for block in found:
        exec(compile(block, page, "exec"), names)


def test_the_first_example_of_the_readme_runs():
    names: dict = {}
    exec(compile(blocks("README.md")[0], "README.md", "exec"), names)
    assert names["out"].shape == names["query"].shape


def test_links_between_the_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("hf_kernel/*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_files_that_contributing_names_exist():
    text = page_text("CONTRIBUTING.md")
    named = [x for x in re.findall(r"`([\w./{},-]+\.(?:py|md|h|cpp|cu|sh|txt))`", text) if "<" not in x]
    assert len(named) > 40
    for name in named:
        start, options, end = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", name).groups()
        for option in (options or "").split(","):
            path = f"{start}{option}{end}"
            places = [
                ROOT,
                ROOT / "lr_kernels",
                *(ROOT / "lr_kernels").rglob("*/"),
                ROOT / "tests",
                ROOT / "benchmarks",
                ROOT / "csrc/cpu",
            ]
            assert any((place / path).exists() for place in places), path
