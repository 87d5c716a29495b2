"""Called as the stock pipelines are: with both models alone the layout stage gives what they give."""

import logging

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from tiny_models import TOLERANCE, XL_UNET, components, components_xl, distance, tiny_unet
from tiny_pipelines import IMAGES, NOISE, PROMPTS, SHARED, STEPS, fresh, run, with_lora
from transformers import CLIPTextModel

from lr_kernels.testing import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = pytest.mark.parametrize("kind", ["sd", "xl"])
MODELS = pytest.mark.parametrize("personalized", [False, True], ids=["vanilla", "personalized"])


def stock_of(pipe, kind, personalized):
    """The stock pipeline of one of the models."""
    names = components() if kind == "sd" else components_xl()
    parts = {name: x for name, x in pipe.components.items() if name in names}
    parts["unet"] = pipe.personal_unet if personalized else pipe.unet
    stock = StableDiffusionPipeline if kind == "sd" else StableDiffusionXLPipeline
    result = stock(**parts, **({"requires_safety_checker": False} if kind == "sd" else {"add_watermarker": False}))
    result.set_progress_bar_config(disable=True)
    return result


def both(pipe, kind, personalized, prompts=PROMPTS, **arguments):
    """Latents of the layout stage with one model alone, and of the stock pipeline."""
    arguments = {**SHARED, "latents": NOISE[: len(prompts)], **arguments}
    texts = prompts if personalized else ["a ball"] * len(prompts)
    expected = stock_of(pipe, kind, personalized)(texts, **arguments).images
    blend = [float(personalized)] * (5 if "timesteps" in arguments or "sigmas" in arguments else STEPS)
    return pipe.layout(prompts, "a ball", layout_blend=blend, **arguments).images, expected


@MODELS
@KINDS
def test_under_autocast(pipes, kind, personalized):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, low = both(pipes[kind], kind, personalized)
        out = run(pipes[kind], mask_blending=True)
    _, exact = both(pipes[kind], kind, personalized)
    assert found.dtype == torch.float32
    assert_matches(found, low, exact, "latents")
    assert out.latents.dtype == torch.float32 and out.latents.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_under_another_default_dtype(scheduler, dtype):
    pipe = fresh(**({} if scheduler is None else {"scheduler": scheduler()}))
    arguments = {"reference_mask": None, "return_maps": True, "latents": NOISE}
    expected = run(pipe, **arguments)
    torch.set_default_dtype(dtype)
    try:
        found = run(pipe, **arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    assert distance(found.layout_images, expected.layout_images) <= TOLERANCE
    assert distance(found.latents, expected.latents) <= TOLERANCE


# Arguments


SIZES = {"original_size": (32, 24), "target_size": (16, 16), "crops_coords_top_left": (2, 1)}
NEGATIVE = {"negative_original_size": (8, 8), "negative_target_size": (4, 4), "negative_crops_coords_top_left": (1, 1)}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("sd", {"guidance_rescale": 0.7}),
        ("xl", {"guidance_rescale": 0.7}),
        ("sd", {"clip_skip": 1, "negative_prompt": ["b"] * 2}),
        ("xl", {"clip_skip": 1, "negative_prompt": ["b"] * 2}),
        ("xl", {**SIZES, **NEGATIVE}),
        ("xl", SIZES),
    ],
    ids=str,
)
@MODELS
def test_arguments_of_the_stock_pipelines(pipes, kind, arguments, personalized, monkeypatch):
    # diffusers 0.42 looks for a part of the text encoder that transformers 5 does not have
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda encoder: encoder), raising=False)
    # with several prompts the stock pipeline gives the negative sizes to every other row
    prompts = PROMPTS[:1] if "negative_original_size" in arguments else PROMPTS
    pipe = pipes[kind]
    found, expected = both(pipe, kind, personalized, prompts, **arguments)
    assert distance(found, expected) <= TOLERANCE
    assert distance(found, both(pipe, kind, personalized, prompts)[0]) > TOLERANCE
    assert run(pipe, **arguments).latents.isfinite().all()


@pytest.mark.parametrize(
    "arguments",
    [{"timesteps": [900, 600, 300, 200, 1]}, {"sigmas": [14.0, 7.0, 3.0, 1.0, 0.2, 0.0]}],
    ids=["t", "sigma"],
)
@MODELS
def test_schedules_of_ones_own(arguments, personalized):
    pipe = fresh(scheduler=EulerDiscreteScheduler(timestep_spacing="trailing"))
    found, expected = both(pipe, "sd", personalized, **arguments)
    assert distance(found, expected) <= TOLERANCE
    assert pipe.num_timesteps == 5 and run(pipe, **arguments).latents.isfinite().all()
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}: expected None, since DDIMScheduler takes none"):
        run(fresh(), **arguments)


@KINDS
def test_the_strength_of_adapters(kind):
    config = {} if kind == "sd" else XL_UNET
    pipe = fresh(kind, unet=with_lora(tiny_unet(0, **config), "subject"), personalized_unet=None)
    arguments = {"cross_attention_kwargs": {"scale": 0.3}}
    found, expected = both(pipe, kind, True, **arguments)
    assert distance(found, expected) <= TOLERANCE
    assert distance(found, both(pipe, kind, True)[0]) > TOLERANCE
    vanilla = (run(pipe, layout_steps=STEPS, **x).layout_images for x in (arguments, {}))
    assert torch.equal(*vanilla)


def embeds_of(pipe, kind, prompts):
    """By name, what the stock pipeline's own method makes of prompts."""
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    negative = ["b"] * len(prompts)
    arguments = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True, "negative_prompt": negative}
    return dict(zip(names, pipe.encode_prompt(prompts, device=torch.device("cpu"), **arguments)))


@MODELS
@KINDS
def test_prompt_embeds(pipes, kind, personalized):
    pipe = pipes[kind]
    given = {name: x * 0.9 for name, x in embeds_of(pipe, kind, PROMPTS).items()}
    layout = {f"layout_{name}": x * 1.1 for name, x in embeds_of(pipe, kind, ["a ball"] * 2).items() if name[0] == "p"}
    arguments = {**SHARED, "latents": NOISE}
    chosen = given if personalized else {**given, **{name[7:]: x for name, x in layout.items()}}
    expected = stock_of(pipe, kind, personalized)(**chosen, **arguments).images
    steps = 0 if personalized else STEPS
    found = pipe.layout(layout_steps=steps, **given, **layout, **arguments).images
    assert distance(found, expected) <= TOLERANCE


@KINDS
def test_embeds_in_both_stages_are_those_of_the_texts(pipes, kind):
    pipe = pipes[kind]
    given = embeds_of(pipe, kind, PROMPTS)
    text = run(pipe, negative_prompt="b")
    assert distance(run(pipe, **given).latents, text.latents) <= TOLERANCE
    twice = {"num_images_per_prompt": 2, "latents": NOISE.repeat_interleave(2, 0)}
    assert distance(run(pipe, **given, **twice).layout_images[::2], text.layout_images) <= TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt_embeds": NOISE}, ValueError, "prompt_embeds: expected a floating tensor of 3 dimensions and 2 rows"),
        ({"prompt_embeds": torch.zeros(1, 24, 16)}, ValueError, "prompt_embeds: expected a floating tensor of 3"),
        (
            {"prompt_embeds": torch.zeros(2, 24, 8)},
            ValueError,
            "prompt_embeds: expected 16 channels, as personalized_un",
        ),
        ({"prompt_embeds": torch.full((2, 24, 16), np.nan)}, ValueError, "prompt_embeds: expected finite numbers"),
        (
            {"prompt_embeds": torch.zeros(2, 30, 16)},
            ValueError,
            "prompt_embeds: expected as many tokens as the negative",
        ),
        ({"pooled_prompt_embeds": NOISE}, ValueError, "pooled_prompt_embeds: expected None, since only SDXL takes it"),
        ({"original_size": (8, 8)}, ValueError, "original_size: expected None, since only SDXL takes it"),
        (
            {"layout_prompt_embeds": torch.zeros(2, 24, 16)},
            ValueError,
            "layout_prompt: expected None, since layout_pro",
        ),
        (
            {"negative_prompt": "b", "negative_prompt_embeds": torch.zeros(2, 24, 16)},
            ValueError,
            "negative_prompt: expected None, since negative_prompt_embeds is given",
        ),
        ({"clip_skip": -1}, ValueError, "clip_skip: expected a number of layers"),
        ({"clip_skip": 99}, ValueError, "clip_skip: expected at most "),
        ({"guess_mode": True}, NotImplementedError, "guess_mode: expected None"),
        ({"guidance_rescale": "a"}, ValueError, "guidance_rescale: expected a finite number, got 'a'"),
        ({"cross_attention_kwargs": {"gligen": 1}}, NotImplementedError, "cross_attention_kwargs: expected {'scale'"),
        ({"ip_adapter_image": IMAGES}, NotImplementedError, "ip_adapter_image: expected None, got Tensor; the subject"),
        ({"prompt_2": "a"}, NotImplementedError, "prompt_2: expected None, got str; pass prompt_embeds"),
        ({"denoising_end": 0.8}, NotImplementedError, "denoising_end: expected None"),
        ({"strength": 0.8}, TypeError, "strength: expected an argument that the method has"),
        ({"latents": NOISE * float("inf")}, ValueError, "latents: expected finite numbers, got NaN or Inf"),
        ({"latents": NOISE.to("meta")}, ValueError, "latents: expected a tensor with data, got one on the device meta"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.fault(number=16)
def test_what_does_not_fit_is_refused_before_any_step(pipe, arguments, error, message):
    steps = []
    with pytest.raises(error) as caught:
        run(pipe, callback_on_step_end=lambda *a: steps.append(a), **arguments)
    assert str(caught.value).startswith(f"lr_kernels.LayoutRetouch: {message}") and not steps


# Models that are told more


@pytest.mark.parametrize(("kind", "config"), [("sd", {}), ("xl", XL_UNET)])
@MODELS
def test_a_unet_that_is_told_the_guidance_scale(kind, config, personalized):
    unets = {"unet": tiny_unet(0, time_cond_proj_dim=8, **config)}
    unets["personalized_unet"] = tiny_unet(1, time_cond_proj_dim=8, **config)
    pipe = fresh(kind, **unets)
    found, expected = both(pipe, kind, personalized, guidance_scale=8.0)
    assert distance(found, expected) <= TOLERANCE
    assert distance(found, both(pipe, kind, personalized, guidance_scale=2.0)[0]) > TOLERANCE
    out = run(pipe, guidance_scale=8.0)
    assert out.latents.isfinite().all() and out.rows["layout"] == 2 * STEPS  # one row per image and step


def test_the_retouch_stage_is_told_its_own_guidance_scale():
    pipe = fresh(unet=tiny_unet(0, time_cond_proj_dim=8), personalized_unet=tiny_unet(1, time_cond_proj_dim=8))
    same, other = run(pipe, guidance_scale=8.0), run(pipe, guidance_scale=8.0, retouch_guidance_scale=2.0)
    assert torch.equal(same.layout_images, other.layout_images) and distance(same.latents, other.latents) > TOLERANCE


@KINDS
def test_prompts_that_are_cut_are_warned_about_as_stock_does(pipes, kind, caplog):
    pipe, long = pipes[kind], "a sks ball" + " x" * 30
    name = type(stock_of(pipe, kind, False)).__module__
    logger = logging.getLogger(name)
    logger.addHandler(caplog.handler)
    try:
        stock_of(pipe, kind, False)(long, **SHARED, latents=NOISE[:1])
        expected = [record.getMessage() for record in caplog.records if record.name == name]
        caplog.clear()
        pipe.layout(long, "a ball", **SHARED, latents=NOISE[:1])
        assert expected and [record.getMessage() for record in caplog.records] == expected
        caplog.clear()
        run(pipe)
        assert not caplog.records
    finally:
        logger.removeHandler(caplog.handler)


# Numbers and entries


@pytest.mark.parametrize("make", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "tensor"])
def test_integers_of_every_kind(pipe, make):
    names = {"num_inference_steps": STEPS, "layout_steps": 1, "retouch_start": 1, "retouch_end": 3, "height": 16}
    names |= {"width": 16, "num_images_per_prompt": 1, "retouch_layers": [2], "context_limit": 10**2, "clip_skip": 1}
    names |= {"reference_subjects": [0]}
    limit = {"context_limit": None} if make is np.uint8 else {"context_limit": make(10**9)}
    given = {name: [make(x) for x in n] if isinstance(n, list) else make(n) for name, n in names.items()}
    plain = {**names, "context_limit": 10**9}
    assert torch.equal(run(pipe, **{**given, **limit}).latents, run(pipe, **plain).latents)


@pytest.mark.parametrize("make", [np.float32, np.float64, torch.tensor], ids=["float32", "float64", "tensor"])
def test_numbers_of_every_kind(pipe, make):
    names = {"guidance_scale": 2.5, "retouch_guidance_scale": 1.5, "eta": 0.5, "mask_threshold": 0.25}
    names |= {"guidance_rescale": 0.5}
    given = {name: make(x) for name, x in names.items()}
    weights = {"layout_blend": [make(x) for x in (0.0, 0.25, 0.5, 1.0)]}
    plain = run(pipe, **names, layout_blend=[0.0, 0.25, 0.5, 1.0])
    assert torch.equal(run(pipe, **given, **weights).latents, plain.latents)


def test_results_are_entries_too(pipe):
    out = run(pipe)
    assert out["layout_images"] is out.layout_images and out["contexts"] is out.contexts
    assert out["seconds"] is out.seconds and set(out.seconds) >= {"layout", "retouch"}
    images, layouts = run(pipe, return_dict=False)
    assert torch.equal(images, out.images) and torch.equal(layouts, out.layout_images)


def test_values_that_change_nothing_are_not_refused(pipe):
    neutral = {"guess_mode": False, "control_guidance_start": 0.0, "control_guidance_end": 1.0}
    alone = {"num_images_per_prompt": 1, "return_dict": True, **neutral}
    assert torch.equal(run(pipe, **neutral).latents, run(pipe).latents)
    layouts = [pipe.layout(PROMPTS, "a ball", **SHARED, latents=NOISE, **given).latents for given in ({}, alone)]
    assert torch.equal(*layouts)
    with pytest.raises(NotImplementedError, match=r"num_images_per_prompt: expected None, .*repeat the prompts"):
        pipe.layout(PROMPTS, "a ball", **SHARED, num_images_per_prompt=2)
