"""A process of tests/test_mapped_banks.py: loads and reads banks, and tells what memory of its own that took."""

import json
import sys
from pathlib import Path

import torch

from lr_kernels import Source, multi_source_attention
from lr_kernels.diffusers import ReferenceBank, TransformerReferenceBank


def memory(path):
    """KiB: of the file's mapping, what is resident and what belongs to this process alone; of memory without a file,
    what is resident."""
    found = {"resident": 0, "private": 0, "anonymous": 0}
    mapped = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            field, *values = line.split()
            if not field.endswith(":"):
                mapped = line.rstrip().endswith(path)
            elif field == "Anonymous:":
                found["anonymous"] += int(values[0])
            elif mapped and field == "Rss:":
                found["resident"] += int(values[0])
            elif mapped and field in ("Private_Clean:", "Private_Dirty:"):
                found["private"] += int(values[0])
    return found


def use(path, kind):
    """Attention to the whole bank. The result keeps the bank loaded."""
    if kind == "transformer":
        bank = TransformerReferenceBank.load(path)
        for source in bank.sources.values():
            attend(source)
        return bank
    bank = ReferenceBank.load(path)
    for step in range(len(bank.timesteps)):
        with bank.read(step):
            for name in bank.layer_names:
                layer = bank.layer(name)
                sources, _ = bank.sources(layer, layer.buffers[0][0])
                attend(*sources)
    return bank


def attend(source):
    query = torch.ones(1, 64, *source.key.shape[2:])
    multi_source_attention(query, [Source(query, query), source])


if __name__ == "__main__":
    for folder in sys.argv[1:]:  # named for the kind of bank
        use(f"{folder}/small", Path(folder).name)  # whatever is made once is made here
        large = f"{folder}/large"
        before = memory(large)
        bank = use(large, Path(folder).name)
        print("used", flush=True)
        sys.stdin.readline()  # until the other process has used it too
        after = memory(large)
        print(json.dumps(after | {"grown": after["anonymous"] - before["anonymous"]}), flush=True)
        sys.stdin.readline()
