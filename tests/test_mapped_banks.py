"""Banks that several processes of a machine load are in its memory once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lr_kernels import Source
from lr_kernels.diffusers import ReferenceBank, TransformerReferenceBank

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
LAYERS, STEPS = 16, 4
KINDS = ("reference", "transformer")


def write_bank(kind, path, tokens):
    """32 KiB of keys and values for each token."""
    if kind == "reference":
        stored = torch.randn(STEPS, 2, 1, tokens, 2, 32)
        about = {"timesteps": json.dumps([900, 700, 500, 300])}
        return save_file({f"layer{i}": stored.clone() for i in range(LAYERS)}, path, about)
    key = torch.randn(1, STEPS * tokens, 2, 32)
    sources = {f"layer{i}": Source(key.clone(), key.clone()) for i in range(LAYERS)}
    ids = torch.zeros(STEPS * tokens, 4)
    return TransformerReferenceBank(sources, model="Transformer 0", ids=ids, rotated=True).save(path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_processes_share_the_pages_of_a_bank(tmp_path):
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        for name, tokens in (("small", 64), ("large", 1024)):
            write_bank(kind, tmp_path / kind / name, tokens)
    command = [sys.executable, str(ROOT / "tests/mapped_bank_process.py"), *(str(tmp_path / kind) for kind in KINDS)]
    children = [
        subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for kind in KINDS:
        size = (tmp_path / kind / "large").stat().st_size / 1024
        assert [child.stdout.readline() for child in children] == ["used\n"] * 2
        tell(children)
        found = [json.loads(child.stdout.readline()) for child in children]
        tell(children)
        for memory in found:
            assert memory["resident"] >= 0.95 * size  # all of it has been read
            assert memory["private"] <= 0.05 * size and memory["grown"] <= 0.1 * size, (kind, memory, size)
    assert [child.wait() for child in children] == [0, 0]


def tell(children):
    for child in children:
        child.stdin.write("go on\n")
        child.stdin.flush()


def test_extracting_into_a_loaded_bank_leaves_its_file_and_the_other_steps(tmp_path):
    path = tmp_path / "bank"
    write_bank("reference", path, 16)
    before, bank, other = path.read_bytes(), ReferenceBank.load(path), ReferenceBank.load(path)
    key = torch.randn(1, 16, 2, 32)

    def kept(bank, step):
        with bank.read(step):
            return {name: bank.layer(name).read(key).key.clone() for name in bank.layer_names}

    expected = [kept(bank, step) for step in range(STEPS)]
    with bank.extract(2):
        for name in bank.layer_names:
            bank.layer(name).write(key, key)
    for step in (3, 2, 1, 0):
        for name, found in kept(bank, step).items():
            assert torch.equal(found, key if step == 2 else expected[step][name])
            assert torch.equal(kept(other, step)[name], expected[step][name])
    assert path.read_bytes() == before


def test_saving_over_a_mapped_file_leaves_what_was_loaded(tmp_path):
    path = tmp_path / "bank"
    write_bank("reference", path, 16)
    bank, again = ReferenceBank.load(path), ReferenceBank.load(path)
    with again.extract(0):
        for name in again.layer_names:
            again.layer(name).write(*torch.zeros(2, 1, 16, 2, 32))
    again.save(path)
    for loaded, zero in ((bank, False), (ReferenceBank.load(path), True)):
        with loaded.read(0):
            source = loaded.layer("layer0").read(torch.zeros(1, 16, 2, 32))
            assert bool((source.key == 0).all()) == zero
    assert list(tmp_path.iterdir()) == [path]
