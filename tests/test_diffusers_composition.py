"""What the pipelines compose with: LoRA and textual inversion as personalization, ControlNets, offloading."""

import copy

import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from peft import get_peft_model_state_dict
from tiny_models import (
    TOLERANCE,
    XL_UNET,
    components,
    components_xl,
    distance,
    tiny_controlnet,
    tiny_unet,
)
from tiny_pipelines import IMAGES, MASK, NOISE, PROMPTS, SHARED, STEPS, fresh, run, seeded, with_lora

from lr_kernels.diffusers import StableDiffusionLayoutRetouchPipeline

pytestmark = pytest.mark.usefixtures("one_thread")


# Personalization by LoRA and by textual inversion


@pytest.mark.parametrize("blend", ["hard", [0.0, 0.3, 0.6, 1.0]], ids=["hard", "soft"])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_a_lora_on_one_unet_is_two_unets(kind, blend):
    config = {} if kind == "sd" else XL_UNET
    unet = with_lora(tiny_unet(0, **config), "subject")
    one = fresh(kind, unet=unet, personalized_unet=None)
    both = fresh(kind, unet=tiny_unet(0, **config), personalized_unet=copy.deepcopy(unet))
    found, expected = (run(p, layout_blend=blend) for p in (one, both))
    assert torch.equal(found.layout_images, expected.layout_images) and torch.equal(found.latents, expected.latents)
    assert distance(found.layout_images, run(one, layout_steps=STEPS).layout_images) > TOLERANCE
    assert unet.active_adapters() == ["subject"] and not any(p.requires_grad for p in unet.parameters())


def test_named_adapters_alone_are_the_personalization():
    unet = with_lora(tiny_unet(0), "style", "subject")
    one = fresh(unet=unet, personalized_unet=None, personalized_adapters=["subject"])
    style = copy.deepcopy(unet)
    style.set_adapters(["style"])
    both = fresh(unet=style, personalized_unet=copy.deepcopy(unet))
    found, expected = (run(p) for p in (one, both))
    assert torch.equal(found.layout_images, expected.layout_images) and torch.equal(found.latents, expected.latents)
    assert unet.active_adapters() == ["style", "subject"]
    missing = fresh(unet=unet, personalized_unet=None, personalized_adapters=["dog"])
    with pytest.raises(ValueError, match=r"adapters: expected some of the active ones, \['style', 'subject'\]"):
        run(missing)


def test_a_lora_file_personalizes(tmp_path):
    trained = with_lora(tiny_unet(0), "subject")
    state = get_peft_model_state_dict(trained, adapter_name="subject")
    StableDiffusionLayoutRetouchPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    pipe = fresh(personalized_unet=None)
    vanilla = run(pipe, layout_steps=STEPS).layout_images
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="subject")
    expected = run(fresh(unet=trained, personalized_unet=None))
    assert torch.equal(run(pipe).latents, expected.latents)
    assert torch.equal(run(pipe, layout_steps=STEPS).layout_images, vanilla)


@pytest.mark.fault(number=36)
def test_adapters_are_on_again_after_an_exception():
    unet = with_lora(tiny_unet(0), "subject")
    pipe = fresh(unet=unet, personalized_unet=None)

    def failing(*args, **kwargs):
        raise InterruptedError

    unet.register_forward_hook(failing)
    with pytest.raises(InterruptedError):
        run(pipe)
    assert unet.active_adapters() == ["subject"]


def test_a_textual_inversion_is_a_personalization():
    pipe = fresh(personalized_unet=None)
    plain = run(pipe).latents
    pipe.load_textual_inversion({"<dog>": torch.randn(2, 16, generator=torch.Generator().manual_seed(3))})
    arguments = {**SHARED, "latents": NOISE, "reference_mask": MASK, "generator": seeded()}
    found = pipe(["a <dog> ball", "<dog> at sea"], "a ball", IMAGES[:1], "a <dog>", "<dog>", **arguments)
    assert found.masks.shape == (2, 8, 8) and distance(found.latents, plain) > TOLERANCE
    out = pipe.layout(["a <dog>"] * 2, "a ball", layout_steps=STEPS, **SHARED, latents=NOISE)
    plain = fresh(personalized_unet=None).layout(["a"] * 2, "a ball", layout_steps=STEPS, **SHARED, latents=NOISE)
    assert torch.equal(out.latents, plain.latents)


# ControlNets and offloading


EDGES = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("personalized", [False, True])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_layout_endpoints_with_a_controlnet_are_the_stock_pipeline(pipes, kind, personalized):
    pipe = pipes[kind]
    net = tiny_controlnet(pipe.unet)
    parts = {
        name: x for name, x in pipe.components.items() if name in (components() if kind == "sd" else components_xl())
    }
    unet = pipe.personalized_unet if personalized else pipe.unet
    stock_class, extra = (
        (StableDiffusionControlNetPipeline, {"requires_safety_checker": False, "safety_checker": None})
        if kind == "sd"
        else (StableDiffusionXLControlNetPipeline, {"add_watermarker": False})
    )
    stock = stock_class(**{**parts, **extra, "unet": unet, "controlnet": net})
    stock.set_progress_bar_config(disable=True)
    prompts = PROMPTS if personalized else ["a ball"] * 2
    expected = stock(
        prompts, image=EDGES, controlnet_conditioning_scale=0.7, latents=NOISE, height=16, width=16, **SHARED
    ).images
    ours = fresh(kind, **{**parts, "personalized_unet": pipe.personalized_unet, "controlnet": net})
    layout = {**SHARED, "latents": NOISE, "layout_steps": 0 if personalized else STEPS}
    found = ours.layout(PROMPTS, "a ball", control_image=EDGES, control_scale=0.7, **layout).latents
    assert distance(found, expected) <= TOLERANCE
    assert distance(found, ours.layout(PROMPTS, "a ball", **layout).latents) > TOLERANCE


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_the_retouch_follows_the_controlnet(pipes, kind):
    parts = pipes[kind].components
    extra = {"requires_safety_checker": False} if kind == "sd" else {"add_watermarker": False}
    pipe = fresh(kind, **{**parts, **extra, "controlnet": tiny_controlnet(parts["unet"])})
    plain = run(pipe).latents
    assert distance(run(pipe, control_image=EDGES, control_scale=0.0).latents, plain) <= TOLERANCE
    assert distance(run(pipe, control_image=EDGES).latents, plain) > TOLERANCE
    each = run(pipe, control_image=EDGES.expand(2, -1, -1, -1)).latents
    assert torch.equal(each, run(pipe, control_image=EDGES).latents)
    twice = run(pipe, control_image=[EDGES, 1 - EDGES], num_images_per_prompt=2, latents=NOISE[[0, 0, 1, 1]])
    once = run(pipe, control_image=[EDGES, 1 - EDGES])
    assert distance(twice.layout_images, once.layout_images[[0, 0, 1, 1]]) <= TOLERANCE


def test_a_control_image_that_does_not_fit_is_named(pipe):
    with pytest.raises(ValueError, match="control_image: expected None, since the pipeline has no controlnet"):
        run(pipe, control_image=EDGES)
    parts = {**pipe.components, "controlnet": tiny_controlnet(pipe.unet), "requires_safety_checker": False}
    with pytest.raises(ValueError, match="control_image: expected 1 or 2 images, as there are prompts, got 3"):
        run(fresh(**parts), control_image=EDGES.expand(3, -1, -1, -1))


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_model_offload_fetches_every_model_and_gives_the_same_bits(kind, monkeypatch):
    pipe = fresh(kind)
    expected = run(pipe).latents
    onto, before = [], CpuOffload.pre_forward
    monkeypatch.setattr(
        CpuOffload, "pre_forward", lambda h, module, *a, **k: onto.append(module) or before(h, module, *a, **k)
    )
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(run(pipe).latents, expected)

    fetched = {name for name, part in pipe.components.items() if any(part is module for module in onto)}
    assert fetched >= {"unet", "personalized_unet", "text_encoder", "vae"}
