"""The file of an evaluation: what is wrong in it is told by the name of its key, before a model is loaded."""

import json
import re
import sys
from pathlib import Path

import diffusers
import PIL.Image
import pytest
import yaml
from diffusers import DiffusionPipeline

from lr_kernels import __main__
from lr_kernels.diffusers.many.run_file import METHOD_CLASSES
from lr_kernels.evaluation import METRICS, evaluate, read_evaluation
from lr_kernels.evaluation.methods import METHODS, STAGE_METHODS, known_to, taken_by
from lr_kernels.toy.subjects import FOLDER

PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"
BALL = {
    "noun": "ball",
    "token": "<ball>",
    "images": str(FOLDER / "ball/images"),
    "lora": str(FOLDER / "ball/lora.safetensors"),
    "textual_inversion": str(FOLDER / "ball/token.safetensors"),
}
RUN = {
    "base": "toy",
    "output": "out",
    "concepts": {"ball": BALL},
    "prompts": ["a {} on sand"],
    "methods": {"layout": None, "control": None, "retouch": None},
}


@pytest.fixture
def write(tmp_path):
    """Writes an evaluation, with some keys replaced; ... leaves one out."""
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n\n")

    def written(**changes):
        run = {name: value for name, value in (RUN | changes).items() if value is not ...}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
        return tmp_path / "run.yaml"

    return written


def ball(**changes):
    return {"concepts": {"ball": {name: x for name, x in (BALL | changes).items() if x is not ...}}}


def methods(**entries):
    return {"methods": {"layout": None} | entries}


WRONG = {
    "output: expected a value, got none": {"output": ...},
    "outputs: expected one of the keys base, output, .*, got an unknown key": {"outputs": "x"},
    "base: expected toy, a folder that exists, or a model's id on the hub, got 'no folder'": {"base": "no folder"},
    "base: expected a text that is not empty": {"base": ""},
    "base: expected a valid string, got 1; a number or a word": {"base": 1},
    "output: expected the path of a folder, got .*run.yaml": {"output": "run.yaml"},
    "concepts: expected at least one entry, got {}": {"concepts": {}},
    "concepts: expected a mapping, got \\['ball'\\]": {"concepts": ["ball"]},
    "concepts.a/b: expected a name of files, without /": {"concepts": {"a/b": BALL}},
    "concepts.ball.noun: expected a value, got none": ball(noun=...),
    "concepts.ball.color: expected one of the keys noun, images, .*, got an unknown key": ball(color="red"),
    "concepts.ball.images: expected a value": ball(images=...),
    "concepts.ball.images: expected a list of files, or a folder of them, got .*nowhere": ball(images="nowhere"),
    "concepts.ball.images: expected a file, got .*nowhere.png, which is none": ball(images=["nowhere.png"]),
    "concepts.ball.images: expected a picture that PIL reads, got .*text.png": ball(images=["text.png"]),
    "concepts.ball.images: expected at least one picture, got none": ball(images="empty"),
    "concepts.ball.masks: expected 5, one for each of its images, got 1": ball(masks=["black.png"]),
    "concepts.ball.lora: expected a file, got .*nowhere": ball(lora="nowhere.safetensors"),
    "concepts.ball.lora: expected a file of safetensors, got .*text.png": ball(lora="text.png"),
    "concepts.ball.masks: expected masks of its images, since a metric is masked, got none": {
        "metrics": [{"metric": "dino", "masked": True}],
    },
    "concepts.ball.unet: expected a folder of a UNet, with its config.json, got .*empty": ball(unet="empty"),
    "concepts.ball.token: expected the token of the textual_inversion, got none": ball(token=...),
    "concepts.ball.prompts: expected a file, got .*nowhere.txt": ball(prompts="nowhere.txt"),
    "prompts: expected a list of texts, or a file with one in each line, got \\[\\]": {"prompts": []},
    "prompts: expected a list of texts, or a file .*": {"prompts": "empty.txt"},
    "prompts: expected a file, got .*nowhere.txt, which is none": {"prompts": "nowhere.txt"},
    "prompts\\[1\\]: expected a text with one {}, .*, got 'a ball'": {"prompts": ["a {}", "a ball"]},
    "prompts\\[0\\]: expected a text with one {}, .*, got 'two {}s on sand'": {"prompts": ["two {}s on sand"]},
    "prompts: expected a list of texts, or a file .*, got 'a {} on sand'": {"prompts": "a {} on sand"},
    "prompts\\[1\\]: expected a prompt that differs from the others": {"prompts": ["a {}!", "a {}?"]},
    "methods: expected at least one entry, got {}": {"methods": {}},
    "methods.mine.method: expected one of vanilla, .*, where the name is none of these": methods(mine=None),
    "methods.mine.method: expected one of vanilla, .*, got 'dreambooth'": methods(mine={"method": "dreambooth"}),
    "methods.scores: expected another name than log, scores, report": methods(scores={"method": "retouch"}),
    "methods.retouch.steps: expected one of the keys method, arguments": methods(retouch={"steps": 3}),
    "methods.retouch.arguments.layout_step: expected an argument of the method retouch, got an unknown one": methods(
        retouch={"arguments": {"layout_step": 3}}
    ),
    "methods.retouch.arguments.layout_steps: expected what the file can hold of int": methods(
        retouch={"arguments": {"layout_steps": "six"}}
    ),
    "methods.retouch.arguments: .*num_inference_steps: expected a positive integer, got 0": methods(
        retouch={"arguments": {"num_inference_steps": 0}}
    ),
    "methods.Layout: expected a name that differs from 'layout' in more than capitals": methods(
        Layout={"method": "layout"}
    ),
    "methods.control.arguments.retouch_end: expected an argument of the method control": methods(
        control={"arguments": {"retouch_end": 3}}
    ),
    "methods.masactrl.arguments.images: expected an argument of the method masactrl": methods(
        masactrl={"arguments": {"images": 3}}
    ),
    "arguments.prompt: expected none, since the other keys": {"arguments": {"prompt": "a ball"}},
    "arguments.share: expected an argument of any of the methods": {"arguments": {"share": 0.5}},
    "metrics\\[0\\]: expected one of clip_i, .*, or package.module:Class, got 'clip'": {"metrics": ["clip"]},
    "metrics\\[1\\]: expected package.module:name of what can be imported": {"metrics": ["clip_i", "json:Nothing"]},
    "metrics\\[0\\]: expected a subclass of .*Metric, got 'json:JSONDecoder'": {"metrics": ["json:JSONDecoder"]},
    "metrics\\[0\\].size: expected an argument of the metric dino": {"metrics": [{"metric": "dino", "size": 3}]},
    "metrics\\[0\\].model: expected a folder that exists": {"metrics": [{"metric": "dino", "model": "no folder"}]},
    "metrics\\[0\\]: encoder: expected one of clip, dino, dinov2": {"metrics": [{"metric": "vendi", "encoder": "vit"}]},
    "metrics\\[0\\]: masks: expected package.module:name": {"metrics": [{"metric": "layout_iou", "masks": "yes"}]},
    "metrics\\[0\\]: masked: expected false, since the protocol dreammatcher": {
        "metrics": [{"metric": "dino", "masked": True}], "protocol": "dreammatcher",
    },
    "metrics\\[0\\]: masks: expected 'recorded' where masked is false": {
        "metrics": [{"metric": "dino", "masks": "json:loads"}],
    },
    "metrics\\[0\\]: masks: expected a function, got 'os:sep', which is str": {
        "metrics": [{"metric": "layout_iou", "masks": "os:sep"}],
    },
    "metrics\\[0\\]: expected package.module:name of what can be imported, got '.x:Y'": {"metrics": [".x:Y"]},
    "metrics\\[0\\]: model: expected a folder of a 'vit' of transformers, got 'no config.json'": {
        "metrics": [{"metric": "dino", "model": "empty"}],
    },
    "metrics: expected columns that differ, got 'dino' twice": {"metrics": ["dino", "dino"]},
    "protocol: expected 'standard' or 'dreammatcher', got 'mine'": {"protocol": "mine"},
    "samples: expected greater than or equal to 1, got 0": {"samples": 0},
    "samples: expected a valid integer, got True": {"samples": True},
    "seed: expected greater than or equal to 0, got -1": {"seed": -1},
    "scheduler: expected 'DDIMScheduler', .*, got 'PNDMScheduler'": {"scheduler": "PNDMScheduler"},
    "dtype: expected 'float32', .*, got 'float64'": {"dtype": "float64"},
    "reference_prompt: expected a text with one {}": {"reference_prompt": "a ball"},
    "report.control: expected one of the methods layout, control, retouch, got 'base'": {"report": {"control": "base"}},
    "report.level: expected less than 1, got 95": {"report": {"level": 95}},
    "report.identity: expected one of the columns dino, got 'clip_i'": {
        "metrics": ["dino"], "report": {"identity": "clip_i"},
    },
    "report.gallery: expected 'linked' or 'embedded'": {"report": {"gallery": "both"}},
}  # fmt: skip


@pytest.mark.parametrize(("message", "changes"), WRONG.items(), ids=range(len(WRONG)))
def test_a_wrong_file_is_refused_by_the_name_of_its_key(write, message, changes):
    with pytest.raises(ValueError) as caught:
        read_evaluation(write(**changes))
    lines = str(caught.value).splitlines()
    assert any(re.match(f"lr_kernels.read_evaluation: {message}", line) for line in lines), lines
    assert all(line.startswith("lr_kernels.read_evaluation: ") for line in lines)


def test_all_that_is_wrong_is_told_at_once(write):
    """First of keys and types, then of what they mean together."""
    for wrong, keys in (
        ({"outputs": "x", "samples": 0} | ball(noun=..., lora="nowhere.safetensors"),
         ["concepts.ball.noun", "concepts.ball.lora", "samples", "outputs"]),
        ({"base": "no folder", "reference_prompt": "x", "metrics": ["clip"]} | ball(token=...),
         ["base", "metrics[0]", "concepts.ball.token", "reference_prompt"]),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            read_evaluation(write(**wrong))
        assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == keys


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.yaml", "base: toy\nbase: toy", "file: expected YAML in .*, got the key 'base' twice"),
        ("run.yaml", "base: [", "file: expected YAML in .*"),
        ("run.yaml", "toy", "file: expected a mapping, got 'toy'"),
        ("run.json", '{"base": 1, "base": 2}', "file: expected JSON in .*, got the key 'base' twice"),
        ("run.txt", "base: toy", "file: expected a path that ends in .yaml, .yml or .json"),
    ],
)
def test_a_text_that_is_no_file_of_a_run(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"lr_kernels.read_evaluation: {message}"):
        read_evaluation(tmp_path / name)


def test_a_missing_package_of_a_metric_is_named(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(
        ModuleNotFoundError, match="metrics\\[0\\]: expected the packages dreamsim, got none; pip install"
    ):
        read_evaluation(write(metrics=["dreamsim"]))


def test_nothing_is_loaded_before_the_file_is_right(write, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", load)
    with pytest.raises(ValueError, match="samples"):
        evaluate(write(samples=0))
    with pytest.raises(AssertionError, match="a model is loaded"):
        evaluate(write(), progress=False)


def test_stages_that_are_none_are_refused(write):
    for stages in ("generate", [], ["draw"], [["score"]], 5):
        with pytest.raises(ValueError, match="evaluate: stages: expected some of generate, score, report"):
            evaluate(write(), stages)


def test_a_report_needs_scores(write):
    message = r"stages: expected the scores of 3 prompts, .*, got 0; without them is scores/.*; run the stage score"
    with pytest.raises(ValueError, match=message):
        evaluate(write(), ["report"])


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["lr_kernels", "eval", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    return ended.value.code


def test_the_command_says_what_is_wrong_and_what_it_would_make(write, monkeypatch, capsys):
    assert command(monkeypatch, write(samples=0)) == 2
    assert "samples: expected greater than or equal to 1, got 0" in capsys.readouterr().err
    assert command(monkeypatch, write(), "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0].split("/out/")[1] for line in lines] == [
        f"{method}/ball/a-on-sand/0.png" for method in ("layout", "control", "retouch")
    ]
    assert len({line.split("seed ")[1].split()[0] for line in lines}) == 1  # all methods start from the same noise
    assert command(monkeypatch, write(), "--stages", "draw") == 2


def test_a_file_in_json_and_every_method_and_metric_by_its_name(write, tmp_path):
    """All that a user may write is read; a prompt file has a prompt in each line, which a concept may replace."""
    (tmp_path / "prompts.txt").write_text("a {} on sand\n\na {} on grass\n")
    metrics = [name for name in METRICS if name not in ("lpips", "dreamsim")]
    metrics += [{"metric": "dino", "masked": True}, "lr_kernels.toy.metrics:Subject"]
    own = {"mine": {"method": "retouch", "arguments": {"layout_steps": 4, "reading": "swap"}}}
    given = RUN | {"methods": dict.fromkeys(METHODS) | own, "prompts": "prompts.txt", "metrics": metrics}
    ball = BALL | {"masks": str(FOLDER / "ball/masks")}
    concepts = {"ball": ball, "star": ball | {"prompts": ["a {} at night"]}}
    given |= {"concepts": concepts, "arguments": {"layout_steps": 6}}
    (tmp_path / "run.json").write_text(json.dumps(given))
    run = read_evaluation(tmp_path / "run.json")
    assert dict(run.prompts_of("ball")) == {"a-on-sand": "a {} on sand", "a-on-grass": "a {} on grass"}
    assert dict(run.prompts_of("star")) == {"a-at-night": "a {} at night"}
    assert run.arguments_of("mine") == {"layout_steps": 4, "reading": "swap"}
    assert run.arguments_of("retouch") == {"layout_steps": 6} and run.arguments_of("vanilla") == {}
    assert {"clip_i", "clip_t", "dino", "dino_masked", "vendi", "identity"} <= {
        x for m in run.chosen for x in m.columns
    }


def test_the_file_of_the_papers_protocol_is_one(tmp_path):
    """That of docs/evaluation.md, with stand-ins for what a user downloads and trains."""
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
    (tmp_path / "vico.yaml").write_text(text.replace("CompVis/stable-diffusion-v1-4", "toy"))
    for name in ("barn", "black_cat"):
        (tmp_path / f"DreamMatcher/inputs/{name}").mkdir(parents=True)
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / f"DreamMatcher/inputs/{name}/0.jpg")
        (tmp_path / f"weights/{name}/unet").mkdir(parents=True)
        (tmp_path / f"weights/{name}/unet/config.json").write_text("{}")
    for name in ("nonlive", "live"):
        lines = "\n".join(["a {} in the jungle", "a {} in the snow"])
        (tmp_path / f"DreamMatcher/inputs/prompts_{name}_objects.txt").write_text(lines)
    run = read_evaluation(tmp_path / "vico.yaml")
    assert run.protocol == "dreammatcher" and run.samples == 8 and list(run.methods) == [*STAGE_METHODS]
    assert run.arguments_of("control") == {"num_inference_steps": 50, "guidance_scale": 10.0}
    assert [name for metric in run.chosen for name in metric.columns] == ["dino", "clip_i", "clip_t", "vendi"]


@pytest.mark.parametrize("pipeline", METHOD_CLASSES)
def test_no_argument_that_a_method_takes_is_dropped(pipeline):
    """Each goes to a stage of the pipeline, or is one of the call that stands for a stage's."""
    kind = METHOD_CLASSES[pipeline]
    for method in STAGE_METHODS:
        given = dict.fromkeys(known_to(method, getattr(diffusers, pipeline)))
        stages = [kind.layout, kind.retouch] if method in ("control", "retouch") else [kind.layout]
        taken = {name for stage in stages for name in taken_by(stage, given)}
        assert set(given) - taken <= {"retouch_guidance_scale"}, method
