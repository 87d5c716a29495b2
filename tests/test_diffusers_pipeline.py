"""The pipeline on tiny random models: stages, their equalities, determinism, saving, errors by name."""

import copy
import math

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny_models import TOLERANCE, components, distance, tiny_scheduler, tiny_tokenizer, tiny_unet

from lr_kernels.diffusers import (
    MultiSourceAttnProcessor,
    StableDiffusionLayoutRetouchPipeline,
    TokenMapAttnProcessor,
    find_subjects,
)
from lr_kernels.diffusers.processors import routing

STEPS = 4


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shared_pipe():
    pipe = StableDiffusionLayoutRetouchPipeline(**components(), personalized_unet=tiny_unet(1))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(shared_pipe):
    """The shared models under a pipeline of its own, to be given another scheduler."""
    parts = {**shared_pipe.components, "scheduler": tiny_scheduler()}
    pipe = StableDiffusionLayoutRetouchPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


REFERENCE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
MASK = np.zeros((32, 32), bool)
MASK[8:24, 8:24] = True
PROMPTS = ["a sks ball", "sks ball at sea"]
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))


def shared_arguments() -> dict:
    generator = torch.Generator().manual_seed(0)
    return {"num_inference_steps": STEPS, "output_type": "latent", "reference_mask": MASK, "generator": generator}


def run(pipe, prompt=PROMPTS, **kwargs):
    kwargs = {**shared_arguments(), "latents": NOISE[: len(prompt)], **kwargs}
    return pipe(prompt, "a ball", REFERENCE, "a sks ball", ["sks", "ball"], **kwargs)


def retouch(pipe, prompt=PROMPTS, **kwargs):
    kwargs = {**shared_arguments(), "context_latents": NOISE[: len(prompt)], **kwargs}
    return pipe.retouch(prompt, REFERENCE, "a sks ball", ["sks", "ball"], **kwargs)


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.5])
@pytest.mark.fault(number=34)
def test_blend_weight_outside_its_range(pipe, bad):
    with pytest.raises(ValueError, match=r"layout_blend\[2\]: expected a weight in \[0, 1\], got"):
        run(pipe, layout_blend=[0, 0, bad, 1])


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"layout_steps": 5}, ValueError, "layout_steps: expected 0 to 4, got 5"),
        ({"layout_steps": -1}, ValueError, "layout_steps: expected 0 to 4, got -1"),
        ({"retouch_start": 4}, ValueError, "retouch_start: expected 0 to 3, got 4"),
        ({"retouch_end": 1, "retouch_start": 2}, ValueError, "retouch_end: expected 2 to 4, got 1"),
        ({"layout_blend": [0, 1]}, ValueError, "layout_blend: expected 4 weights, one per step, got 2"),
        ({"layout_blend": "sudden"}, ValueError, "one of hard, linear, cosine, got 'sudden'"),
        ({"contexts_from": "guess"}, ValueError, "contexts_from: expected one of None, trajectory, renoise, inversion"),
        ({"retouch_layers": [16]}, ValueError, r"retouch_layers: expected one of the scales \[1, 2\]"),
        ({"backend": "none"}, ValueError, "backend: expected one of auto"),
        ({"reference_mask": np.zeros((16, 16))}, ValueError, "reference_mask: expected a foreground, got none"),
        ({"reference_mask": np.zeros((2, 16, 16))}, ValueError, r"reference_mask: expected shape \(height, width\)"),
        ({"latents": NOISE[:1]}, ValueError, r"latents: expected shape \(2, 4, 8, 8\), got \(1, 4, 8, 8\)"),
        ({"height": 17}, ValueError, "height: expected a multiple of 2, got 17"),
        ({"negative_prompt": ["a", "b", "c"]}, ValueError, "negative_prompt: expected 1 or 2 strings"),
        ({"eta": 1.5}, ValueError, r"eta: expected a number in \[0, 1\], got 1.5"),
        ({"mask_threshold": 2.0}, ValueError, "threshold"),
    ],
)
@pytest.mark.fault(number=34)
def test_errors_name_the_argument(pipe, kwargs, error, message):
    with pytest.raises(error, match=message):
        run(pipe, **kwargs)


@pytest.mark.parametrize("name", ["height", "width"])
def test_the_contexts_fix_the_size(pipe, name):
    with pytest.raises(ValueError, match=f"{name}: expected None, since the contexts have it"):
        retouch(pipe, **{name: 16})


def test_what_does_not_fit_the_contexts_is_named(pipe):
    with pytest.raises(
        ValueError, match=r"latents: expected shape \(2, 4, 8, 8\), as context_latents, got \(1, 4, 8, 8\)"
    ):
        retouch(pipe, latents=NOISE[:1])
    with pytest.raises(ValueError, match="contexts_from: expected another way, since context_latents have no traj"):
        retouch(pipe, contexts_from="trajectory")
    shared = {"num_inference_steps": STEPS, "latents": NOISE, "output_type": "latent"}
    layout = pipe.layout(PROMPTS, "a ball", ("sks", "ball"), **shared)
    given = {"context_latents": None, "layout": layout}
    with pytest.raises(ValueError, match="num_inference_steps: expected 4, as the layouts had, got 3"):
        retouch(pipe, **given, num_inference_steps=3)
    with pytest.raises(ValueError, match="prompt: expected 2 prompts, as there are layouts, got 1"):
        retouch(pipe, PROMPTS[:1], **given)
    with pytest.raises(ValueError, match="context_latents: expected None, since layout is given"):
        retouch(pipe, layout=layout)
    with pytest.raises(ValueError, match=r"layout: expected the output of layout\(\) with subject_tokens"):
        retouch(pipe, context_latents=None, layout=pipe.layout(PROMPTS, "a ball", **shared))


def test_missing_subject_token_is_named(pipe):
    with pytest.raises(ValueError, match="subject_tokens: expected words of the prompt 'a dog', got 'sks'"):
        retouch(pipe, ["a dog", "a sks"])


@pytest.mark.parametrize(
    "scheduler, name",
    [
        (PNDMScheduler(), "scheduler: expected one of DDIMScheduler, .*, got PNDMScheduler"),
        (DDIMScheduler(clip_sample=True), "scheduler.clip_sample: expected False"),
        (tiny_scheduler(thresholding=True), "scheduler.thresholding: expected False"),
        (tiny_scheduler(prediction_type="sample"), "scheduler.prediction_type: expected one of epsilon, v_prediction"),
    ],
    ids=["pndm", "clip", "threshold", "sample"],
)
def test_nonlinear_schedulers_are_refused(pipe, scheduler, name):
    pipe.scheduler = scheduler
    with pytest.raises(NotImplementedError, match=name):
        run(pipe)


# The layout stage


@pytest.mark.parametrize("model", ["vanilla", "personalized"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_layout_endpoints_are_the_stock_pipeline(pipe, model, guidance):
    parts = components()
    personalized = model == "personalized"
    parts.update({name: getattr(pipe, name) for name in ("vae", "text_encoder", "scheduler")})
    parts["unet"] = pipe.personalized_unet if personalized else pipe.unet
    stock = StableDiffusionPipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    shared = {"num_inference_steps": STEPS, "guidance_scale": guidance, "latents": NOISE, "output_type": "latent"}
    negative = "b" if guidance > 1 else None
    expected = stock(PROMPTS if personalized else ["a ball"] * 2, negative_prompt=["b", "b"], **shared).images
    out = pipe.layout(PROMPTS, "a ball", layout_steps=0 if personalized else STEPS, negative_prompt=negative, **shared)
    assert distance(out.images, expected) <= TOLERANCE


@pytest.mark.fault(number=34)
def test_blend_weights_of_0_and_1_give_the_endpoints_bitwise(pipe):
    shared = {"num_inference_steps": STEPS, "latents": NOISE, "output_type": "latent"}

    def images(**kwargs):
        return pipe.layout(PROMPTS, "a ball", **kwargs, **shared).images

    assert torch.equal(images(layout_blend=[0.0] * STEPS), images(layout_steps=STEPS))
    assert torch.equal(images(layout_blend=torch.tensor([0.0, 0.0, 1.0, 1.0])), images(layout_steps=2))
    assert distance(images(layout_blend=[0.5] * STEPS), images(layout_steps=0)) > TOLERANCE


# The retouch stage


@pytest.mark.parametrize("mask_blending", [False, True])
def test_backends_agree_over_a_whole_run(pipe, mask_blending):
    outs = [run(pipe, mask_blending=mask_blending, backend=name).latents for name in ("auto", "reference")]
    assert distance(*outs) <= TOLERANCE


def test_triton_agrees_over_a_whole_run(pipe, device):
    """The interpreter is slow: four attention layers of 4 tokens."""
    blocks = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 1,
        "sample_size": 4,
    }
    parts = {name: copy.deepcopy(x) for name, x in pipe.components.items()}
    parts |= {"unet": tiny_unet(2, **blocks), "personalized_unet": tiny_unet(3, **blocks)}
    small = StableDiffusionLayoutRetouchPipeline(**parts, requires_safety_checker=False).to(device)
    small.set_progress_bar_config(disable=True)
    kwargs = {"num_inference_steps": 2, "retouch_start": 1, "mask_blending": True, "latents": NOISE[:1, :, :4, :4]}
    outs = [run(small, PROMPTS[:1], backend=name, **kwargs).latents for name in ("triton", "reference")]
    assert distance(*outs) <= TOLERANCE


def test_one_attention_call_per_layer_and_step(pipe, monkeypatch):
    calls, plans = [], []
    attention, plan = routing.multi_source_attention, routing.plan_attention
    monkeypatch.setattr(
        routing, "multi_source_attention", lambda *a, **kw: calls.append(kw["plan"]) or attention(*a, **kw)
    )
    monkeypatch.setattr(routing, "plan_attention", lambda *a, **kw: plans.append(1) or plan(*a, **kw))
    retouch(pipe, retouch_start=1)
    assert len(calls) == 7 * (STEPS - 1)
    assert len(plans) == 2  # one per token count: the mask stays
    calls.clear()
    retouch(pipe, retouch_start=1, retouch_end=3, retouch_layers=[1])
    assert len(calls) == 3 * 2


def test_sharing_changes_the_images_and_no_sharing_does_not(pipe):
    """Without sharing the second stage is plain denoising of the same latents."""
    shared = retouch(pipe, retouch_start=1).latents
    alone = retouch(pipe, retouch_start=1, retouch_end=1).latents
    assert distance(shared, alone) > TOLERANCE
    other = retouch(pipe, retouch_start=1, retouch_end=1, reference_mask=~MASK).latents
    assert torch.equal(alone, other)


def test_reference_only_starts_as_plain_denoising(pipe):
    kwargs = {"context_latents": None, "latents": NOISE, "retouch_start": 2}
    shared = {"num_inference_steps": STEPS, "latents": NOISE, "output_type": "latent"}
    plain = pipe.layout(PROMPTS, "a ball", layout_steps=0, **shared)
    assert distance(retouch(pipe, retouch_end=2, **kwargs).latents, plain.latents) <= TOLERANCE
    shared = retouch(pipe, **kwargs)
    assert distance(shared.latents, plain.latents) > TOLERANCE
    assert shared.masks.shape == (2, 8, 8)


@pytest.mark.parametrize("sources", ["inversion", "renoise"])
def test_mask_blending_keeps_the_background_of_the_layout(pipe, sources):
    fixed = retouch(pipe, contexts_from=sources)
    moving = retouch(pipe, contexts_from=sources, mask_blending=True)
    outside = ~fixed.masks & ~moving.masks
    assert outside.any() and torch.equal(fixed.masks, retouch(pipe, contexts_from=sources).masks)
    kept = (moving.latents == NOISE).all(1)
    assert torch.equal(kept, outside)


def test_prompts_and_generators_of_a_batch_are_independent(pipe):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = run(pipe, latents=None, generator=generators(1, 2), eta=0.5)
    for i in range(2):
        one = run(pipe, PROMPTS[i : i + 1], latents=None, generator=generators(i + 1), eta=0.5)
        assert distance(both.latents[i : i + 1], one.latents) <= TOLERANCE


@pytest.mark.parametrize(
    "kwargs", [{}, {"eta": 0.5, "contexts_from": "renoise", "mask_blending": True}], ids=["ddim", "noisy"]
)
@pytest.mark.fault(number=35)
def test_deterministic_by_generator(pipe, kwargs):
    kwargs["latents"] = None
    torch.manual_seed(1)
    first = run(pipe, **kwargs).latents
    torch.manual_seed(2)
    assert torch.equal(first, run(pipe, **kwargs).latents)
    assert not torch.equal(first, run(pipe, generator=torch.Generator().manual_seed(9), **kwargs).latents)


def test_output(pipe):
    image = PIL.Image.fromarray((REFERENCE[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    out = pipe(
        "a sks ball",
        "a ball",
        image,
        "a sks ball",
        "sks",
        negative_prompt="b",
        num_inference_steps=2,
        num_images_per_prompt=2,
        reference_mask=PIL.Image.fromarray(MASK),
        height=20,
        width=12,
    )
    assert [x.size for x in out.images + out.layout_images] == [(12, 20)] * 4
    assert out.masks.shape == (2, 10, 6) and out.reference_mask.shape == (1, 10, 6)
    assert set(out.seconds) == {"layout", "encode", "mask", "invert", "retouch", "decode"}
    images, layouts = run(pipe, return_dict=False, output_type="np")
    assert images.shape == layouts.shape == (2, 16, 16, 3)


def test_images_per_prompt_repeat_all_prompts(pipe):
    negative = ["x", "y"]
    twice = run(pipe, negative_prompt=negative, num_images_per_prompt=2, latents=NOISE.repeat_interleave(2, 0))
    once = run(pipe, negative_prompt=negative)
    assert distance(twice.layout_images, once.layout_images.repeat_interleave(2, 0)) <= TOLERANCE


def test_bfloat16(pipe):
    parts = {name: copy.deepcopy(x) for name, x in pipe.components.items()}
    low = StableDiffusionLayoutRetouchPipeline(**parts, requires_safety_checker=False).to(torch.bfloat16)
    low.set_progress_bar_config(disable=True)
    out = run(low, mask_blending=True)
    assert out.latents.dtype == torch.bfloat16 and out.latents.isfinite().all()


# The pipeline as an object of diffusers


def stock_processors(pipe) -> dict:
    return {**pipe.personalized_unet.attn_processors, **{f"v.{k}": v for k, v in pipe.unet.attn_processors.items()}}


@pytest.mark.fault(number=36)
def test_processors_are_back_after_a_run_and_after_an_exception(pipe):
    before = stock_processors(pipe)
    run(pipe, mask_blending=True)
    assert all(p is before[name] for name, p in stock_processors(pipe).items())

    def stop(pipe, step, t, tensors):
        installed = {type(p) for p in pipe.personalized_unet.attn_processors.values()}
        if installed >= {MultiSourceAttnProcessor, TokenMapAttnProcessor}:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(pipe, mask_blending=True, callback_on_step_end=stop)
    assert all(p is before[name] for name, p in stock_processors(pipe).items())


def test_processors_replaced_during_a_run_warn_once(pipe):
    def replace(pipe, step, t, tensors):
        pipe.personalized_unet.set_attn_processor(AttnProcessor2_0())

    with pytest.warns(RuntimeWarning, match="7 of 7 attention processors were replaced") as caught:
        retouch(pipe, callback_on_step_end=replace, retouch_start=0)
    assert sum("were replaced" in str(w.message) for w in caught) == 1


def test_callback_replaces_latents(pipe):
    seen = []

    def zero_last(pipe, step, t, tensors):
        seen.append(step)
        return {"latents": tensors["latents"] * 0} if step == STEPS - 1 else {}

    out = run(pipe, callback_on_step_end=zero_last)
    assert not out.latents.any() and not out.layout_images.any()
    assert seen == [0, 1, 2, 3, 1, 2, 3]


def test_save_and_load(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionLayoutRetouchPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.personalized_text_encoder is None
    assert torch.equal(run(loaded).latents, run(pipe).latents)


def test_own_text_encoder_of_the_personalized_model(pipe, tmp_path):
    encoder = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        encoder.get_input_embeddings().weight.mul_(2)
    parts = {**pipe.components, "personalized_text_encoder": encoder}
    own = StableDiffusionLayoutRetouchPipeline(**parts, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    layouts = [run(p, layout_steps=STEPS).layout_images for p in (pipe, own)]
    assert torch.equal(*layouts)
    assert distance(run(own).latents, run(pipe).latents) > TOLERANCE
    own.save_pretrained(tmp_path)
    loaded = StableDiffusionLayoutRetouchPipeline.from_pretrained(tmp_path)
    assert loaded.personalized_text_encoder is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pipe_keeps_the_dtype(dtype):
    stock = StableDiffusionPipeline(**components()).to(dtype)
    unet = tiny_unet(1).to(dtype)
    pipe = StableDiffusionLayoutRetouchPipeline.from_pipe(stock, personalized_unet=unet)
    assert pipe.unet is stock.unet and pipe.personalized_unet is unet
    assert {pipe.unet.dtype, unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {dtype}


def test_from_pipe_asks_where_dtypes_differ():
    stock = StableDiffusionPipeline(**components())
    unet = tiny_unet(1).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype: expected a dtype, since the components have several"):
        StableDiffusionLayoutRetouchPipeline.from_pipe(stock, personalized_unet=unet)
    assert unet.dtype == torch.bfloat16
    pipe = StableDiffusionLayoutRetouchPipeline.from_pipe(stock, personalized_unet=unet, dtype=torch.float32)
    assert unet.dtype == torch.float32 and pipe.personalized_unet is unet


def test_subject_tokens_are_found_in_every_prompt():
    tokenizer = tiny_tokenizer()
    found = find_subjects(tokenizer, ["a ox", "ox b ox"], [["ox"]], "cpu")
    ids = tokenizer(["a ox", "ox b ox"], padding=True, return_tensors="pt").input_ids
    pieces = tokenizer("ox", add_special_tokens=False).input_ids
    picked = ids.gather(1, found.indices.long())
    assert picked[0][:2].tolist() == pieces and picked[1].tolist() == pieces * 2
    assert found.weights[0].tolist() == [[0.5, 0.5, 0, 0], [0.25] * 4]
