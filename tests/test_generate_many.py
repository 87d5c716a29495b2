"""Items over processes: the same files from one process and two, after a kill, in any order; failures and skips."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import generate_many_process as process
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from torch.distributed import HashStore

from lr_kernels import toy
from lr_kernels.diffusers import ImageItem, generate_many
from lr_kernels.diffusers.many.command import command
from lr_kernels.diffusers.many.distribute import _claimed
from lr_kernels.toy import world

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
ITEM = ImageItem("ball/0.png", "a ball on sand", "ball")


def files(folder):
    """By path, the bytes of all files but the log."""
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {str(path): data for path, data in found.items() if path.parts[0] != "log"}


def run_file(folder, output):
    """Two subjects, two prompts, by the method on the toy model."""
    for name in ("ball", "star"):
        pixels = world.references(name)[0][0].permute(1, 2, 0) * 127.5 + 127.5
        PIL.Image.fromarray(pixels.byte().numpy()).save(folder / f"{name}.png")
    run = {
        "base": "toy",
        "output": output,
        "subjects": {x: {"noun": x, "token": "sks", "image": f"{x}.png"} for x in ("ball", "star")},
        "prompts": ["a {} on sand", "a {} on grass"],
        "arguments": {"num_inference_steps": 2, "guidance_scale": 3.0},
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """(folder, report) of the items in this process."""
    folder = tmp_path_factory.mktemp("one") / "out"
    return folder, generate_many(process.items(), process.load, folder, progress=False)


def test_two_processes_give_the_files_of_one(one_process, tmp_path, capsys):
    """The function, and the command after it, each byte for byte; all processes get the same report."""
    folder, report = one_process
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "tests/generate_many_process.py"), str(tmp_path / "out"), str(run_file(tmp_path, "two"))]
    ended = subprocess.run([*launcher, *script], env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert files(tmp_path / "out") == files(folder)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"report-{rank}.json").read_text()) == asdict(report)
    assert ended.stdout.count("4 done, 0 skipped, 0 failed") == 1
    for output, count in (("out", 7), ("two", 4)):
        lines = [line for path in (tmp_path / output / "log").iterdir() for line in path.read_text().splitlines()]
        assert len(lines) == len({json.loads(line)["path"] for line in lines}) == count  # each was made once
    assert command(run_file(tmp_path, "alone")) == 0
    assert files(tmp_path / "alone") == files(tmp_path / "two")


def test_a_killed_run_goes_on(one_process, tmp_path):
    """Killed while a record, or the second of an item's two pictures, waits for its name."""
    folder, report = one_process
    script = [sys.executable, str(ROOT / "tests/generate_many_process.py")]
    running = {n: subprocess.Popen([*script, str(tmp_path / str(n)), str(n)], env=ENVIRONMENT) for n in (4, 9)}
    for n, child in running.items():
        while not list((tmp_path / str(n)).rglob("hanging")):
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        left = tmp_path / str(n)
        next(left.rglob("hanging")).unlink()
        assert len(list(left.rglob("*.partial"))) == 1
        again = generate_many(process.items(), process.load, left, progress=False)
        assert files(left) == files(folder)
        assert again.skipped and sorted(again.skipped + again.done) == sorted(report.done)
        assert again.failed == report.failed


def test_a_failure_is_recorded_and_the_others_go_on(one_process):
    folder, report = one_process
    assert report.failed == {process.FAILS: "RuntimeError: no such subject"} and not report.skipped
    assert report.done == [item.path for item in process.items() if item.path != process.FAILS]
    assert report.summary() == f"6 done, 0 skipped, 1 failed\nfailed: {process.FAILS}: RuntimeError: no such subject"
    record = json.loads((folder / process.FAILS).with_suffix(".json").read_text())
    assert record["error"] == "RuntimeError: no such subject" and record["images"] == []
    assert record["traceback"].startswith("Traceback") and "in generate" in record["traceback"]
    logged = [json.loads(line) for line in (folder / "log/0.jsonl").read_text().splitlines()]
    assert [line["path"] for line in logged] == [item.path for item in process.items()]
    assert all(line["seconds"] >= 0 for line in logged)


def test_images_are_those_of_the_pipeline_with_the_items_seed(one_process):
    folder, _ = one_process
    for item in (process.items()[0], process.items()[-1]):
        expected = process.load("cpu")(item, torch.Generator().manual_seed(item.seed))
        record = json.loads((folder / item.record_path).read_text())
        assert record == item.record() | {"images": record["images"], "error": None, "traceback": None}
        assert len(record["images"]) == len(expected) == item.arguments["pictures"]
        for path, image in zip(record["images"], expected):
            assert np.array_equal(PIL.Image.open(folder / path), image)
    assert record["images"] == ["box/on-snow/0.0.png", "box/on-snow/0.1.png"]


def test_what_is_there_is_skipped_and_no_model_is_loaded(one_process):
    folder, report = one_process
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    complete = [item for item in process.items() if item.path != process.FAILS]
    again = generate_many(complete, lambda device: pytest.fail("load() is called"), folder, progress=False)
    assert (again.done, again.skipped, again.failed) == ([], report.done, {})
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == before


def test_an_image_that_was_removed_is_made_again(one_process, tmp_path):
    expected = generate_many([process.items()[0]], process.load, tmp_path, progress=False)
    image = tmp_path / expected.done[0]
    before = image.read_bytes()
    image.unlink()
    assert generate_many([process.items()[0]], process.load, tmp_path, progress=False).done == expected.done
    assert image.read_bytes() == before


def test_order_changes_no_file(one_process, tmp_path):
    generate_many(process.items()[::-1], process.load, tmp_path, progress=False)
    assert files(tmp_path) == files(one_process[0])


def test_the_seed_is_the_hash_that_the_docstring_says():
    item = ImageItem("a.png", 'ein "Bär" 🐻', "bär", 7, -3)
    text = r'[-3,"b\u00e4r","ein \"B\u00e4r\" \ud83d\udc3b",7]'
    assert item.seed == int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) // 2
    assert ITEM.seed == replace(ITEM, path="other.png", arguments={"x": 1}).seed
    others = [replace(ITEM, **x) for x in ({"sample": 1}, {"base_seed": 1}, {"subject": "box"}, {"prompt": "a ball"})]
    assert len({ITEM.seed, *(item.seed for item in others)}) == 5


@pytest.mark.parametrize(("count", "processes"), [(0, 2), (1, 3), (7, 1), (10, 3), (100, 7)])
def test_every_item_is_taken_once_and_the_own_ones_first(count, processes):
    draw, store = random.Random(count), HashStore()
    takers = {p: _claimed(store, count, p, processes) for p in range(processes)}
    taken = {p: [] for p in takers}
    while takers:
        p = draw.choice(list(takers))
        place = next(takers[p], None)
        takers.pop(p) if place is None else taken[p].append(place)
    assert sorted(place for places in taken.values() for place in places) == list(range(count))
    for p, places in taken.items():
        own = [place for place in places if count * p // processes <= place < count * (p + 1) // processes]
        assert places[: len(own)] == sorted(own)


def test_a_quick_process_takes_what_is_left_of_a_slow_ones_part():
    store = HashStore()
    slow = _claimed(store, 10, 1, 2)
    assert next(slow) == 5
    assert list(_claimed(store, 10, 0, 2)) == [0, 1, 2, 3, 4, 6, 7, 8, 9] and next(slow, None) is None


def test_a_device_that_computes_no_more_ends_the_run(tmp_path):
    def generate(item, generator):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        generate_many([ITEM], lambda device: generate, tmp_path, progress=False)
    assert files(tmp_path) == {}


def test_what_load_raises_ends_the_run(tmp_path):
    def load(device):
        raise OSError("no weights")

    with pytest.raises(OSError, match="no weights"):
        generate_many([ITEM], load, tmp_path, progress=False)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("made", [None, [], np.zeros((8, 8, 3)), ["image"]], ids=["none", "empty", "array", "text"])
def test_what_is_no_image_is_the_items_failure(made, tmp_path):
    report = generate_many([ITEM], lambda device: lambda item, generator: made, tmp_path, progress=False)
    expected = "ValueError: lr_kernels.generate_many: generate: expected a function that returns a PIL image"
    assert report.failed[ITEM.path].startswith(expected)


def at(**changes):
    return [replace(ITEM, **changes)]


WRONG = [
    ("items: expected a sequence of ImageItem, got dict", {}),
    ("items: expected a sequence of ImageItem, got str", "ball"),
    (r"items\[1\]: expected an ImageItem, got dict", [ITEM, {"path": "a.png"}]),
    (r"items\[1\].path: expected a path of its own, got 'ball/0.png', as items\[0\] has it", [ITEM, ITEM]),
    (r"items\[1\].path: expected a path of its own, got 'Ball/0.png'", [ITEM, *at(path="Ball/0.png")]),
    (r"items\[0\].prompt: expected a string, got None", at(prompt=None)),
    (r"items\[0\].sample: expected an integer from 0 on, got -1", at(sample=-1)),
    (r"items\[0\].base_seed: expected an integer of 64 bits, got 1.5", at(base_seed=1.5)),
    (r"items\[0\].arguments: expected what JSON holds", at(arguments={"x": (1, 2)})),
    (r"items\[0\].arguments: expected what JSON holds", at(arguments={1: 2})),
    (r"items\[0\].arguments: expected what JSON holds", at(arguments={"x": float("nan")})),
    (r"items\[0\].path: expected a name that ends in .png", at(path="ball/0.jpg")),
    (r"items\[0\].path: expected folders whose names end neither in", at(path="ball.png/0.png")),
    (r"items\[0\].path: expected a name without a dot before its last number", at(path="ball/0.1.png")),
    *(
        (r"items\[0\].path: expected names of files", at(path=path))
        for path in ("", "/a.png", "../a.png", "a/../b.png", "a//b.png", "a\\b.png", "a\0.png", ".png", "a?.png",
                     "a/", " a.png", "x" * 300 + ".png")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("message", "items"), WRONG)
def test_bad_items_are_refused_before_anything_is_loaded(message, items, tmp_path):
    with pytest.raises((TypeError, ValueError), match=f"lr_kernels.generate_many: {message}"):
        generate_many(items, lambda device: pytest.fail("load() is called"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_item_is_refused(tmp_path):
    image = PIL.Image.new("RGB", (8, 8))
    generate_many([ITEM], lambda device: lambda item, generator: image, tmp_path, progress=False)
    for changes, message in (({"base_seed": 5}, "base_seed is 0 instead of 5"), ({"arguments": {"x": 1}}, "arguments")):
        with pytest.raises(ValueError, match=f"lr_kernels.generate_many: folder: expected the record.*{message}"):
            generate_many(at(**changes), lambda device: pytest.fail("load() is called"), tmp_path)
    (tmp_path / ITEM.record_path).write_text("[]")
    with pytest.raises(ValueError, match=r"folder: expected the record of an item in .*ball/0.json, got something"):
        generate_many([ITEM], lambda device: pytest.fail("load() is called"), tmp_path)


def test_a_failed_item_may_be_another_the_next_time(tmp_path):
    image = PIL.Image.new("RGB", (8, 8))
    assert generate_many([ITEM], lambda device: lambda *_: None, tmp_path, progress=False).failed
    done = generate_many(at(arguments={"x": 1}), lambda device: lambda *_: image, tmp_path, progress=False).done
    assert done == [ITEM.path] and json.loads((tmp_path / ITEM.record_path).read_text())["error"] is None


def test_wrong_arguments_are_named(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="generate_many: load: expected a function of a device"):
        generate_many([ITEM], toy.BASE, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="generate_many: folder: expected the path of a folder"):
        generate_many([ITEM], process.load, tmp_path / "file")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="processes: expected 2, as WORLD_SIZE says, got 1 by PartialState; set ACC"):
        generate_many([ITEM], process.load, tmp_path)
