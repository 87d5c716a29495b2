"""Evaluations on the toy model: the same files from one process and two and after a kill, failures, the report."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from lr_kernels import toy
from lr_kernels.diffusers import StableDiffusionLayoutRetouchPipeline
from lr_kernels.diffusers.methods import masactrl
from lr_kernels.evaluation import evaluate, read_evaluation
from lr_kernels.evaluation.command import command
from lr_kernels.evaluation.generate import items_of
from lr_kernels.evaluation.methods import METHODS
from lr_kernels.statistics import bootstrap_interval, paired_difference
from lr_kernels.toy import world
from lr_kernels.toy.judge import identity
from lr_kernels.toy.metrics import pixels
from lr_kernels.toy.subjects import FOLDER, token

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
}  # fmt: skip
METRICS_OF_TOY = [f"lr_kernels.toy.metrics:{name}" for name in ("Subject", "Prompt", "Layout", "Outline", "Position")]
KILLED = {7: "0.png", 17: "a-on-sand.json", 20: "images.csv"}
"""Which of the files that a process moves to their places it is killed at, and the file's name: the retouched image of
the first sample, after two of the layout and three of the control; the first scores; the report's table."""
FEW = {"num_inference_steps": 2, "guidance_scale": 3.0}


def concept(name):
    files = {key: str(FOLDER / name / file) for key, file in (
        ("images", "images"), ("masks", "masks"), ("lora", "lora.safetensors"),
        ("textual_inversion", "token.safetensors"),
    )}  # fmt: skip
    return {"noun": world.class_word(name), "token": token(name)} | files


def write(folder, output, **changes):
    """An evaluation of two samples by three methods."""
    run = {
        "base": "toy",
        "output": output,
        "concepts": {"ball": concept("ball")},
        "prompts": ["a {} on sand"],
        "samples": 2,
        "methods": {"layout": None, "control": None, "retouch": None},
        "metrics": METRICS_OF_TOY,
        "arguments": FEW,
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(run | changes, sort_keys=False))
    return path


def files(folder):
    """By path, what all files but the logs hold, without the seconds."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith("log/"):
            found[name] = path.read_bytes()
            if path.suffix == ".json":
                found[name] = {key: x for key, x in json.loads(found[name]).items() if key != "seconds"}
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a small evaluation that one process ran without a break."""
    folder = tmp_path_factory.mktemp("small")
    drawn, scored = evaluate(write(folder, "out"), progress=False)
    assert len(drawn.done) == 6 and not drawn.failed and len(scored.done) == 3 and not scored.failed
    return folder / "out"


def test_two_processes_give_the_files_of_one(small, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "lr_kernels", "eval", str(write(tmp_path, "out"))]
    ended = subprocess.run([*launcher, *words], env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert files(tmp_path / "out") == files(small)
    assert ended.stdout.count("6 done, 0 skipped, 0 failed") == 1
    assert {path.name for path in (tmp_path / "out/log").iterdir()} == {"0.jsonl", "1.jsonl"}


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bytes(small, tmp_path):
    """Killed while an image, a file of scores or a table waits for its name."""
    script = [sys.executable, str(ROOT / "tests/evaluation_process.py")]
    running = {}
    for number in KILLED:
        (tmp_path / str(number)).mkdir()
        run = str(write(tmp_path / str(number), "out"))
        running[number] = subprocess.Popen([*script, run, str(number)], env=ENVIRONMENT)
    for number, child in running.items():
        left = tmp_path / str(number) / "out"
        _kill(child, left, KILLED[number])
        drawn, scored = evaluate(left.with_name("out.yaml"), progress=False)
        assert bool(drawn.done) == (number == 7) and bool(scored.done) == (number != 20)
        assert files(left) == files(small)


def _kill(child, folder, name):
    while not list(folder.rglob("hanging")):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    (hanging,) = folder.rglob("hanging")
    assert [path.name for path in hanging.parent.glob("*.partial")] == [f".{name}.partial"]
    hanging.unlink()


def test_what_is_there_is_not_made_again(small):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*.png")}
    drawn, scored = evaluate(small.parent / "out.yaml", ["generate", "score"], progress=False)
    assert len(drawn.skipped) == 6 and not drawn.done and len(scored.skipped) == 3 and not scored.done
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_scores_are_made_again_when_what_they_depend_on_changes(small, tmp_path):
    run = write(small.parent, "out", metrics=METRICS_OF_TOY[:1])
    _, scored = evaluate(run, ["score"], progress=False)
    assert len(scored.done) == 3
    _, scored = evaluate(write(small.parent, "out"), ["score"], progress=False)
    assert len(scored.done) == 3


def test_images_of_other_weights_are_not_taken_for_those_that_are_asked_for(small):
    other = {"ball": concept("ball") | {"lora": concept("star")["lora"]}}
    with pytest.raises(
        ValueError, match=r"folder: expected the record of this item in .*, got one whose arguments.concept.lora is"
    ):
        evaluate(write(small.parent, "out", concepts=other), ["generate"], progress=False)
    write(small.parent, "out")


def test_the_methods_are_those_of_the_pipeline(small):
    """Layout and retouch are the images of one call; the control is the retouch stage without sharing."""
    run = read_evaluation(write(small.parent, "out"))
    pipe = StableDiffusionLayoutRetouchPipeline.from_pipe(toy.load_pipeline(), personalized_adapters=["x"])
    pipe.load_lora_weights(FOLDER / "ball", weight_name="lora.safetensors", adapter_name="x")
    pipe.load_textual_inversion(str(FOLDER / "ball/token.safetensors"), token="<ball>")
    pipe.set_progress_bar_config(disable=True)
    item = next(x for x in items_of(run) if x.path == "retouch/ball/a-on-sand/1.png")
    reference = {
        "reference_image": PIL.Image.open(FOLDER / "ball/images/0.png"),
        "reference_mask": PIL.Image.open(FOLDER / "ball/masks/0.png"),
        "reference_prompt": "a <ball> ball",
        "subject_tokens": "ball",
    }
    call = {"prompt": "a <ball> ball on sand", "layout_prompt": "a ball on sand", **reference, **FEW}
    found = pipe(**call, generator=item_noise(item))
    for name, image in (("layout", found.layout_images[0]), ("retouch", found.images[0])):
        assert np.array_equal(np.asarray(image), shown(small, name))
    control = pipe.retouch(
        "a <ball> ball on sand", **reference, layout=found, retouch_end=1, generator=item_noise(item), **FEW
    )
    assert np.array_equal(np.asarray(control.images[0]), shown(small, "control"))
    assert not np.array_equal(shown(small, "control"), shown(small, "retouch"))
    given = {"retouch_guidance_scale": 2.0, "layout_steps": 0, "reading": "swap", "mask_blending": True}
    other = pipe(**call, **given, generator=item_noise(item))
    methods = {"retouch": {"arguments": given}}
    evaluate(write(small.parent, "other", methods=methods), ["generate"], progress=False)
    assert np.array_equal(np.asarray(other.images[0]), shown(small.parent / "other", "retouch"))
    record = json.loads((small / item.record_path).read_text())
    assert record["arguments"]["arguments"] == FEW and record["seconds"]["retouch"] > 0
    mask = np.asarray(PIL.Image.open(small / record["masks"]["context"]))
    assert np.array_equal(mask > 127, found.context_masks[0, 0].numpy())


def item_noise(item):
    return torch.Generator().manual_seed(item.seed)


def shown(folder, method):
    return np.asarray(PIL.Image.open(folder / method / "ball/a-on-sand/1.png"))


def test_presets_draw_with_the_personalized_model_from_the_same_noise(tmp_path):
    """Every preset makes an image of its own; MasaCtrl's is that of the stock pipeline beside the concept's picture."""
    given = {
        "masactrl": {"arguments": {"layers": ["up_blocks"], "steps": 1}},
        "story_diffusion": {"arguments": {"steps": 1}},
    }
    methods = {name: given.get(name) for name in METHODS if name not in ("layout", "control")}
    run = write(tmp_path, "out", concepts={"ball": concept("ball")}, methods=methods, samples=1, metrics=[])
    drawn, _ = evaluate(run, ["generate"], progress=False)
    assert not drawn.failed
    images = {name: np.asarray(PIL.Image.open(tmp_path / f"out/{name}/ball/a-on-sand/0.png")) for name in methods}
    assert len({image.tobytes() for image in images.values()}) == len(methods) == 8
    pipe = toy.load_pipeline()
    pipe.load_lora_weights(FOLDER / "ball", weight_name="lora.safetensors")
    pipe.load_textual_inversion(str(FOLDER / "ball/token.safetensors"), token="<ball>")
    item = next(x for x in items_of(read_evaluation(run)) if x.path.startswith("masactrl"))
    noise = [torch.Generator().manual_seed(item.seed + 1), item_noise(item)]
    with masactrl(pipe, images=2, layers=["up_blocks"], steps=1):
        found = pipe(["a <ball> ball", "a <ball> ball on sand"], generator=noise, **FEW).images
    assert np.array_equal(np.asarray(found[1]), images["masactrl"])


def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path, capsys):
    """A method that cannot draw, and a prompt that a metric cannot judge."""
    run = write(
        tmp_path, "out", concepts={"ball": concept("ball")}, samples=1, prompts=["a {} on sand", "a {} nowhere"],
        methods={"control": None, "vanilla": None, "broken": {"method": "retouch", "arguments": {"layout_steps": 99}}},
    )  # fmt: skip
    assert command(run, ["generate", "score", "report"]) == 1
    told = capsys.readouterr().out
    assert "4 done, 0 skipped, 2 failed" in told and "scores: 4 done, 0 skipped, 2 failed" in told
    assert "failed: broken/ball/a-on-sand/0.png: ValueError: lr_kernels.LayoutRetouch: layout_steps" in told
    assert "failed: vanilla/ball/a-nowhere: ValueError: prompts: expected the form" in told
    found = json.loads((tmp_path / "out/report/report.json").read_text())
    assert found["missing"] == [f"broken/ball/{prompt}/0.png" for prompt in ("a-on-sand", "a-nowhere")]
    assert set(found["failed"]) == {"control/ball/a-nowhere", "vanilla/ball/a-nowhere"}
    assert found["methods"]["broken"] == {} and found["methods"]["vanilla"]["identity"]["values"] == 1
    page = (tmp_path / "out/report/gallery.html").read_text()
    assert page.count('<span class="missing">missing</span>') == 2
    assert "missing: 2, listed in report.json" in (tmp_path / "out/report/report.md").read_text()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The report of four subjects, three prompts and two seeds, in few steps."""
    folder = tmp_path_factory.mktemp("full")
    run = write(
        folder, "out",
        concepts={name: concept(name) for name in ("ball", "ring", "cross", "die")},
        prompts=["a {} on sand", "a {} on night", "a {} on checker"],
        metrics=[*METRICS_OF_TOY, "lr_kernels.toy.metrics:Encoder", "layout_iou"],
        arguments={"num_inference_steps": 10, "guidance_scale": 3.0},
        report={"gallery": "embedded", "diversity": "outline_diversity"},
    )  # fmt: skip
    drawn, scored = evaluate(run, progress=False)
    assert len(drawn.done) == 72 and len(scored.done) == 36 and not drawn.failed and not scored.failed
    return folder / "out"


def rows(full, method):
    with (full / "report/images.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["method"] == method]


def test_sharing_brings_the_subject_back(full):
    """The paired differences to the control, which is the same without attention sharing. By the judge's measures the
    intervals leave 0 out; the encoder, whose mean rises too, would need more images for that."""
    found = json.loads((full / "report/report.json").read_text())["differences"]["retouch"]
    for column in ("identity", "histogram"):
        assert found[column]["all"]["values"] == 24 and found[column]["all"]["low"] > 0, found[column]
    assert found["encoder"]["all"]["mean"] > 0


def test_the_report_holds_what_the_images_show(full):
    """Scores by the judge itself, means and intervals by the statistics, of the values in the table."""
    found = json.loads((full / "report/report.json").read_text())
    retouch, control = rows(full, "retouch"), rows(full, "control")
    assert len(retouch) == 24
    for row in retouch[::5]:
        image = PIL.Image.open(full / row["path"]).convert("RGB")
        assert float(row["identity"]) == pytest.approx(identity(pixels([image]), row["concept"]).item(), abs=1e-5)
    values = [float(row["identity"]) for row in retouch]
    paths = [(row["concept"], row["prompt"]) for row in retouch]
    entry = found["methods"]["retouch"]["identity"]
    wanted = bootstrap_interval(values, paths)
    assert [entry[name] for name in ("mean", "low", "high")] == pytest.approx(list(wanted), abs=1e-4)
    other = [float(row["identity"]) for row in control]
    entry = found["differences"]["retouch"]["identity"]
    wanted = paired_difference(values, other, paths)
    assert [entry["all"][name] for name in ("mean", "low", "high")] == pytest.approx(list(wanted), abs=1e-4)
    assert set(entry["concepts"]) == {"ball", "ring", "cross", "die"} and entry["concepts"]["die"]["values"] == 6
    assert "layout_diversity" not in found["methods"]["layout"]  # the layout stage records no masks
    assert [row["seed"] for row in retouch] == [row["seed"] for row in control]
    assert all(found["seconds"][method]["median"] > 0 for method in found["methods"])


def test_the_table_is_that_of_the_report(full):
    text, found = (full / "report/report.md").read_text(), json.loads((full / "report/report.json").read_text())
    entry = found["methods"]["retouch"]["identity"]
    assert "| retouch | {mean:.3f} [{low:.3f}, {high:.3f}] |".format(**entry) in text
    assert "| difference to control |" in text
    assert "Concepts: 4; pairs of concept and prompt: 12; images of each by every method: 2." in text


def test_the_gallery_has_every_prompt_and_method_and_needs_no_network(full, small):
    page = (full / "report/gallery.html").read_text()
    assert page.count("<tr data-number=") == 24 and page.count("<figure>") == 72
    assert page.count("data:image/png;base64,") == 4 + 72 + 48  # references once, images, masks of control and retouch
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page) and "http" not in re.sub(r"base64,[^\"]*", "", page)
    linked = (small / "report/gallery.html").read_text()
    addresses = re.findall(r'src="([^"]*)"', linked)
    assert all(address.startswith(("../", "file:///")) for address in addresses)
    assert all((small / "report" / address).is_file() for address in addresses if address.startswith("../"))


def test_the_plot_shows_likeness_against_diversity(full):
    with PIL.Image.open(full / "report/plot.png") as image:
        assert image.width > 600 and np.asarray(image.convert("RGB")).std() > 10
