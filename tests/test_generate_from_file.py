"""`python -m lr_kernels generate`: what a file asks for is what the pipelines compute; files that are wrong are refused
by the name of the key before a model is loaded."""

import json
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from lr_kernels import __main__, toy
from lr_kernels.diffusers import (
    ReferenceBank,
    StableDiffusionLayoutRetouchPipeline,
    StableDiffusionXLLayoutRetouchPipeline,
    generate_from_file,
)
from lr_kernels.diffusers.many.command import command
from lr_kernels.diffusers.many.run_file import read_run
from lr_kernels.toy.models import build_xl_pipeline

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 3.0}
BALL = {"noun": "ball", "token": "sks", "image": "ball.png"}
RUN = {
    "base": "toy",
    "output": "out",
    "subjects": {"ball": BALL},
    "prompts": ["a {} on sand"],
    "arguments": SETTINGS,
}
CALL = {"prompt": "a sks ball on sand", "layout_prompt": "a ball on sand", "subject_tokens": "ball"} | SETTINGS


@pytest.fixture
def write(tmp_path):
    """Writes a run, with some keys replaced; None leaves one out."""
    PIL.Image.fromarray(pixels()).save(tmp_path / "ball.png")
    mask = toy.references()[1][0].numpy() > 0.5
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")

    def written(**changes):
        run = {name: value for name, value in (RUN | changes).items() if value is not None}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
        return tmp_path / "run.yaml"

    return written


def pixels():
    return (toy.references()[0][0].permute(1, 2, 0) * 127.5 + 127.5).byte().numpy()


def references(folder):
    return {"reference_image": PIL.Image.open(folder / "ball.png"), "reference_prompt": "a sks ball"}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(run):
    """Runs it: images by path, and the items."""
    report = generate_from_file(run)
    assert not report.failed, report.failed
    read = read_run(run)
    return {path: np.asarray(PIL.Image.open(read.output / path)) for path in report.done}, read.items


def of_pipeline(pipe, item, **call):
    return np.asarray(pipe(**call, generator=torch.Generator().manual_seed(item.seed)).images[0])


@pytest.mark.parametrize("mask", [False, True])
def test_the_method_is_the_pipelines_call(write, tmp_path, mask):
    subject = BALL | {"mask": "mask.png"} if mask else BALL
    found, (item, second) = images(write(subjects={"ball": subject}, samples=2, seed=3))
    assert list(found) == ["ball/a-on-sand/0.png", "ball/a-on-sand/1.png"]
    assert not np.array_equal(found[item.path], found[second.path])
    pipe = quiet(StableDiffusionLayoutRetouchPipeline.from_pipe(toy.load_pipeline()))
    call = CALL | references(tmp_path) | ({"reference_mask": PIL.Image.open(tmp_path / "mask.png")} if mask else {})
    assert np.array_equal(found[item.path], of_pipeline(pipe, item, **call))


def test_plain_is_the_stock_pipeline(write):
    subjects = {"ball": {"noun": "red ball", "unet": str(toy.BASE / "unet")}}
    found, (item,) = images(write(method="plain", subjects=subjects, scheduler="EulerDiscreteScheduler"))
    pipe = toy.load_pipeline()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert np.array_equal(found[item.path], of_pipeline(pipe, item, prompt="a red ball on sand", **SETTINGS))


def test_a_bank_stands_in_for_the_image(write, tmp_path):
    pipe = quiet(StableDiffusionLayoutRetouchPipeline.from_pipe(toy.load_pipeline()))
    bank = pipe.reference_bank(*references(tmp_path).values(), "ball", **SETTINGS)
    bank.save(tmp_path / "ball.safetensors")
    found, (item,) = images(write(subjects={"ball": {"noun": "ball", "token": "sks", "bank": "ball.safetensors"}}))
    loaded = ReferenceBank.load(tmp_path / "ball.safetensors")
    assert np.array_equal(found[item.path], of_pipeline(pipe, item, **CALL, reference_bank=loaded))


@pytest.mark.parametrize("method", ["layout-and-retouch", "plain"])
def test_weights_are_those_of_their_subject_alone(write, tmp_path, method):
    """A LoRA and a textual inversion with the words of the next subject, which has neither."""
    base = toy.load_pipeline()
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    base.unet.add_adapter(config, adapter_name="x")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(base.unet, adapter_name="x"))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    save_file({"<cat>": torch.randn(64)}, tmp_path / "cat.safetensors")
    of_method = {"image": "ball.png"} if method != "plain" else {}
    bare = {"noun": "ball"} | of_method
    lora = bare | {"lora": "lora/pytorch_lora_weights.safetensors"}
    cat = bare | {"textual_inversion": "cat.safetensors", "token": "<cat>"}
    together, _ = images(write(method=method, subjects={"lora": lora, "cat": cat, "bare": bare}))
    for name, subject in (("cat", cat), ("bare", bare)):
        alone, _ = images(write(method=method, subjects={name: subject}, output=f"alone-{name}"))
        path = f"{name}/a-on-sand/0.png"
        assert np.array_equal(alone[path], together[path])
    assert len({x.tobytes() for x in together.values()}) == 3
    if method == "plain":
        item = read_run(write(method=method, subjects={"lora": lora})).items[0]
        pipe = toy.load_pipeline()
        pipe.load_lora_weights(tmp_path / "lora")
        found = of_pipeline(pipe, item, prompt="a ball on sand", **SETTINGS)
        assert np.array_equal(together["lora/a-on-sand/0.png"], found)


def test_a_folder_of_sdxl_is_a_base(write, tmp_path):
    build_xl_pipeline().save_pretrained(tmp_path / "xl")
    found, (item,) = images(write(base="xl", scheduler="DDIMScheduler"))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "xl")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe = quiet(StableDiffusionXLLayoutRetouchPipeline.from_pipe(pipe))
    assert np.array_equal(found[item.path], of_pipeline(pipe, item, **CALL, **references(tmp_path)))


def run_command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["lr_kernels", "generate", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    return ended.value.code


def test_the_command_lists_makes_and_skips(write, monkeypatch, capsys, tmp_path):
    run = write(prompts=["a {} on sand", "A {}, on: grass!"])
    assert run_command(monkeypatch, run, "--dry-run") == 0 and not (tmp_path / "out").exists()
    first, second = capsys.readouterr().out.splitlines()
    item = read_run(run).items[0]
    assert first.split() == [
        str(tmp_path / "out" / item.path),
        "seed",
        str(item.seed),
        "'a",
        "sks",
        "ball",
        "on",
        "sand'",
    ]
    assert "out/ball/a-on-grass/0.png" in second
    assert run_command(monkeypatch, run) == 0
    assert capsys.readouterr().out == "2 done, 0 skipped, 0 failed\n"
    assert run_command(monkeypatch, run, "--dry-run") == 0 and capsys.readouterr().out.count("(there)") == 2
    json_run = tmp_path / "run.json"
    json_run.write_text(json.dumps(yaml.safe_load(run.read_text())))
    assert run_command(monkeypatch, json_run) == 0
    assert capsys.readouterr().out == "0 done, 2 skipped, 0 failed\n"
    assert run_command(monkeypatch, write(seed=1)) == 2
    assert "lr_kernels.generate_many: folder: expected the record of this item" in capsys.readouterr().err


def test_the_command_ends_with_1_where_an_item_failed(write, monkeypatch, capsys):
    run = write(subjects={"other": BALL | {"noun": "box"}, "ball": BALL}, prompts=["a {} on sand"],
                arguments=SETTINGS | {"retouch_start": 5})  # fmt: skip
    assert run_command(monkeypatch, run) == 1
    assert capsys.readouterr().out.startswith(
        "0 done, 0 skipped, 2 failed\nfailed: other/a-on-sand/0.png: ValueError: lr_k"
    )


def of_ball(**changes):
    return {"subjects": {"ball": {name: x for name, x in (BALL | changes).items() if x is not None}}}


def arguments(**changes):
    return {"arguments": SETTINGS | changes}


PLAIN = {"method": "plain", "subjects": {"ball": {"noun": "ball"}}}
WRONG = [
    ("bases: expected one of the keys base, output, .*got an unknown key", {"bases": "toy"}),
    *((f"{key}: expected a value, got none", {key: None}) for key in ("base", "output", "subjects", "prompts")),
    ("base: expected toy, a folder that exists, or a model's id on the hub, got 'nowhere'", {"base": "nowhere"}),
    ("base: expected a text, got 5", {"base": 5}),
    ("base: expected a pipeline with a model_index.json, got .*empty", {"base": "empty"}),
    ("base: expected one of StableDiffusionPipeline, StableDiffusionXLPipeline, got 'DiTPipeline'", {"base": "dit"}),
    ("base: expected a pipeline of diffusers that makes images of prompts, got 'DiTPipeline'", {"base": "dit"} | PLAIN),
    ("method: expected one of layout-and-retouch, plain, got 'fast'", {"method": "fast"}),
    ("scheduler: expected one of None, DDIMScheduler.*got 'PNDMScheduler'", {"scheduler": "PNDMScheduler"}),
    ("dtype: expected one of float32, float16, bfloat16, got 'half'", {"dtype": "half"}),
    ("output: expected the path of a folder, got .*ball.png", {"output": "ball.png"}),
    ("samples: expected an integer from 1 on, got 0", {"samples": 0}),
    ("samples: expected an integer from 1 on, got 'two'", {"samples": "two"}),
    ("seed: expected an integer from 0 to .*, got True", {"seed": True}),
    ("reference_prompt: expected a text with one {}", {"reference_prompt": "a ball"}),
    ("prompts: expected a list of texts, got 'a {} on sand'", {"prompts": "a {} on sand"}),
    (r"prompts\[1\]: expected a text with one {}, .*got 'on sand'", {"prompts": ["a {}", "on sand"]}),
    (r"prompts\[1\]: expected a prompt that differs .*'a {}!', whose folder 'a' is that of 'a {}'",
     {"prompts": ["a {}", "a {}!"]}),
    (r"prompts\[0\]: expected letters beside {}, which make a folder's name, not empty", {"prompts": ["{}"]}),
    (r"prompts\[0\]: expected letters .* of at most 200 bytes", {"prompts": ["{}" + 90 * " sand"]}),
    ("subjects: expected a mapping from names to subjects", {"subjects": ["ball"]}),
    ("subjects.a/b: expected a name of files, without / ", {"subjects": {"a/b": BALL}}),
    (r"subjects.\.\.: expected a name of files, not empty, and without dots", {"subjects": {"..": BALL}}),
    ("subjects.False: expected a name of files, a text, in quotes if need be", {"subjects": {False: BALL}}),
    ("subjects.ball: expected a mapping, got 'ball.png'", {"subjects": {"ball": "ball.png"}}),
    ("subjects.ball.picture: expected one of the keys noun, ", of_ball(picture="x.png")),
    ("subjects.ball.noun: expected a value, got none", of_ball(noun=None)),
    ("subjects.ball.token: expected a text, got 7", of_ball(token=7)),
    ("subjects.ball.image: expected a file, got .*none.png", of_ball(image="none.png")),
    ("subjects.ball.image: expected a picture that PIL reads, got .*run.yaml", of_ball(image="run.yaml")),
    ("subjects.ball.image: expected an image, or a bank in its place, got none", of_ball(image=None)),
    ("subjects.ball.image: expected an image, or a bank in its place, got both", of_ball(bank="ball.png")),
    ("subjects.ball.mask: expected none, since the bank has it", of_ball(image=None, bank="ball.png", mask="mask.png")),
    ("subjects.ball.unet: expected a folder of a UNet, with its config.json", of_ball(unet="empty")),
    ("subjects.ball.lora: expected a file", of_ball(lora="empty")),
    ("subjects.ball.token: expected the token of the textual_inversion",
     of_ball(token=None, textual_inversion="ball.png")),
    ("subjects.ball.image: expected none, since the method is 'plain'", {"method": "plain"}),
    ("arguments: expected a mapping, got 'fast'", {"arguments": "fast"}),
    ("arguments.steps: expected an argument of LayoutRetouch.__call__, got an unknown one", arguments(steps=5)),
    ("arguments.steps: expected an argument of StableDiffusionPipeline.__call__", arguments(steps=5) | PLAIN),
    ("arguments.prompt: expected none, since the other keys of the file set it", arguments(prompt="a dog")),
    ("arguments.num_inference_steps: expected .* int, got '4'", arguments(num_inference_steps="4")),
    ("arguments.num_inference_steps: expected .* int, got '4'", arguments(num_inference_steps="4") | PLAIN),
    ("arguments.num_inference_steps: expected .* int, got 2.5", arguments(num_inference_steps=2.5)),
    ("arguments.guidance_scale: expected .* float, got True", arguments(guidance_scale=True)),
    ("arguments.reading: expected .* str, got 5", arguments(reading=5)),
    ("arguments.retouch_layers: expected .*, got 2", arguments(retouch_layers=2)),
    ("arguments.generator: expected none", arguments(generator=5)),
    ("arguments.prompt_embeds: expected what the file can hold", arguments(prompt_embeds=[[0.5]])),
]  # fmt: skip


@pytest.mark.parametrize(("message", "changes"), WRONG)
def test_a_wrong_file_is_refused_by_name_before_a_model_is_loaded(
    message, changes, write, tmp_path, monkeypatch, capsys
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit/model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    run = write(**changes)
    with pytest.raises(ValueError, match=f"lr_kernels.generate_from_file: {message}"):
        generate_from_file(run)
    assert command(run) == 2 and "lr_kernels.generate_from_file: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sizes_of_sdxl_are_refused_for_other_models(write):
    with pytest.raises(ValueError, match=r"lr_kernels.LayoutRetouch: original_size: expected None, since only SDXL"):
        read_run(write(**arguments(original_size=[64, 64])))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.yaml", "base: [", "file: expected YAML in .*run.yaml, got while parsing"),
        ("run.yaml", "base: toy\nbase: x", "file: expected YAML in .*, got the key 'base' twice"),
        ("run.yaml", "subjects: {a: {}, a: {}}", "file: expected YAML in .*, got the key 'a' twice"),
        ("run.yaml", "base: !!python/object/apply:os.getcwd []", "file: expected YAML in .*could not determine"),
        ("run.yaml", "[1, 2]", r"file: expected a mapping, got \[1, 2\]"),
        ("run.yaml", "", "file: expected a mapping, got None"),
        ("run.json", "{", "file: expected JSON in .*run.json"),
        ("run.json", '{"base": "toy", "base": "x"}', "file: expected JSON in .*, got the key 'base' twice"),
        ("run.toml", "", "file: expected a path that ends in .yaml, .yml or .json"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"lr_kernels.generate_from_file: {message}"):
        read_run(tmp_path / name)


def test_keys_of_yaml_may_be_merged(write, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "base: toy\noutput: out\nprompts: ['a {} on sand']\nsubjects:\n"
        "  ball: &it {noun: ball, token: sks, image: ball.png}\n  box: {<<: *it, noun: box}\n"
    )
    assert [subject.noun for subject in read_run(tmp_path / "run.yaml").subjects.values()] == ["ball", "box"]


def test_a_missing_file_is_named(tmp_path, capsys):
    assert command(tmp_path / "run.yaml") == 2 and "run.yaml" in capsys.readouterr().err
