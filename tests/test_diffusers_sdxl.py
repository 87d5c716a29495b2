"""The SDXL pipeline: its stages are stock's where they do nothing of their own; as an object of diffusers."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from tiny_models import TOLERANCE, XL_UNET, components_xl, distance, tiny_unet

from lr_kernels.diffusers import StableDiffusionXLLayoutRetouchPipeline

STEPS = 4
PROMPTS = ["a sks ball", "sks ball at sea"]
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
REFERENCE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
SHARED = {"num_inference_steps": STEPS, "output_type": "latent"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionXLLayoutRetouchPipeline(**components_xl(), personalized_unet=tiny_unet(1, **XL_UNET))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, **kwargs):
    kwargs = {**SHARED, "latents": NOISE, "generator": torch.Generator().manual_seed(0), **kwargs}
    return pipe(PROMPTS, "a ball", REFERENCE, "a sks ball", ["sks", "ball"], **kwargs)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (3.0, None), (3.0, "b")])
@pytest.mark.parametrize("model", ["vanilla", "personalized"])
def test_layout_endpoints_are_the_stock_pipeline(pipe, model, guidance, negative, zeros):
    parts = {name: x for name, x in pipe.components.items() if name in components_xl()}
    personalized = model == "personalized"
    parts["unet"] = pipe.personalized_unet if personalized else pipe.unet
    stock = StableDiffusionXLPipeline(**parts, add_watermarker=False, force_zeros_for_empty_prompt=zeros)
    stock.set_progress_bar_config(disable=True)
    shared = {**SHARED, "guidance_scale": guidance, "latents": NOISE, "negative_prompt": negative}
    expected = stock(
        PROMPTS if personalized else ["a ball"] * 2, **{**shared, "negative_prompt": negative and ["b"] * 2}
    )
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    out = pipe.layout(PROMPTS, "a ball", layout_steps=0 if personalized else STEPS, **shared)
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    assert distance(out.images, expected.images) <= TOLERANCE


@pytest.mark.parametrize("reading", ["routing", "swap"])
def test_backends_agree_over_a_whole_run(pipe, reading):
    kwargs = {"reading": reading, "mask_blending": True, "guidance_scale": 2.0}
    outs = [run(pipe, backend=name, **kwargs).latents for name in ("auto", "reference")]
    assert distance(*outs) <= TOLERANCE


def test_sizes_and_images(pipe):
    out = run(pipe, latents=None, height=20, width=12, output_type="pil")
    assert [x.size for x in out.images + out.layout_images] == [(12, 20)] * 4
    assert out.masks.shape == (2, 10, 6) and out.seconds.keys() >= {"layout", "invert", "retouch", "decode"}


@pytest.mark.fault(number=36)
def test_the_models_are_as_before_after_a_run_and_after_an_exception(pipe):
    before = [dict(unet.attn_processors) for unet in (pipe.unet, pipe.personalized_unet)]

    def stop(pipe, step, t, tensors):
        if pipe.personalized_unet.attn_processors != before[1]:
            raise InterruptedError

    run(pipe)
    with pytest.raises(InterruptedError):
        run(pipe, callback_on_step_end=stop)
    assert [unet.attn_processors for unet in (pipe.unet, pipe.personalized_unet)] == before


@pytest.mark.fault(number=35)
def test_deterministic_by_generator(pipe):
    def latents(seed):
        return run(pipe, latents=None, eta=0.5, generator=torch.Generator().manual_seed(seed)).latents

    first = latents(1)
    assert torch.equal(first, latents(1)) and not torch.equal(first, latents(2))


def test_save_and_load(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionXLLayoutRetouchPipeline.from_pretrained(tmp_path, add_watermarker=False)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded).latents, run(pipe).latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pipe_keeps_the_dtype_and_runs(dtype):
    stock = StableDiffusionXLPipeline(**components_xl()).to(dtype)
    unet = tiny_unet(1, **XL_UNET).to(dtype)
    pipe = StableDiffusionXLLayoutRetouchPipeline.from_pipe(stock, personalized_unet=unet)
    pipe.set_progress_bar_config(disable=True)
    out = run(pipe, output_type="pt")
    assert out.latents.dtype == dtype and torch.as_tensor(out.images).isfinite().all()


def test_a_vae_that_overflows_in_float16_runs_in_float32():
    parts = components_xl()
    parts["vae"].register_to_config(force_upcast=True)
    pipe = StableDiffusionXLLayoutRetouchPipeline(**parts).to(torch.float16)
    with pipe.vae_precision():
        assert pipe.vae.dtype == torch.float32
    assert pipe.vae.dtype == torch.float16
