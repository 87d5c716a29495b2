"""Each method for a whole generation with a stock pipeline and its authors' settings, against a plain transcription of
their code: the latents are equal, to rounding."""

import inspect
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from plain_methods import (
    ConsiStory,
    Editor,
    ReferenceOnly,
    StoryDiffusion,
    adapter_attention,
    masactrl,
    norm_with_the_first,
    style_aligned,
)
from safetensors.torch import save_file
from tiny_models import TOLERANCE, components, components_xl, distance, tiny_unet
from torch import nn

from lr_kernels.diffusers import attention_layers, methods

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 7
SD_UNET = {
    "block_out_channels": (16,) * 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
"""The blocks of Stable Diffusion 1: 16 self-attention layers."""
PROMPTS = ["a ball", "a ball at sea", "the ball"]
NOISE = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(6))
CALL = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 2.0}
MASKS = torch.zeros(3, 16, 16, dtype=torch.bool)
MASKS[0, 2:10, 3:11] = MASKS[1, 5:15, 4:14] = MASKS[2, :8] = True


@pytest.fixture(scope="module")
def pipes():
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type="v_prediction")
    found = {
        "sd": StableDiffusionPipeline(**{**components(), "unet": tiny_unet(0, **SD_UNET), "scheduler": scheduler}),
        "xl": StableDiffusionXLPipeline(**{**components_xl(), "scheduler": scheduler}),
    }
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
        pipe.stock = draw(pipe)
        for name, layer in attention_layers(pipe.unet, "cross").items():
            layer.place = name
    return found


def draw(pipe, prompts=PROMPTS, noise=NOISE, **kwargs):
    return pipe(prompts, latents=noise[: len(prompts)], **{**CALL, **kwargs}).images


def check(pipe, found, expected, read=()):
    """Assert that `found` equals the transcription's result and differs from the stock pipeline's in all images except
    those in `read`, which are equal to it."""
    assert distance(found, expected) < TOLERANCE
    change = (found - pipe.stock[: len(found)]).abs().amax((1, 2, 3))
    for i in range(len(change)):
        assert (change[i] < TOLERANCE) if i in read else (change[i] > 10 * TOLERANCE), change


def settings(pipe):
    """The layer at which the method starts: the authors' value for Stable Diffusion, a smaller one for the tiny SDXL,
    which has few layers."""
    return {} if len(attention_layers(pipe.unet, "self")) == 16 else {"layers": 3}


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize("masks", [None, MASKS], ids=["plain", "masked"])
def test_masactrl(pipes, kind, masks):
    pipe = pipes[kind]
    with methods.masactrl(pipe, images=3, masks=masks, **settings(pipe)):
        found = draw(pipe)
    layer = settings(pipe).get("layers", 10)
    with Editor(pipe.unet, partial(masactrl, masks), 4, layer):
        expected = draw(pipe)
    check(pipe, found, expected, read=[0])


def test_masactrl_where_a_coarse_layer_has_no_token_of_a_side(pipes):
    """The mask covers the source: nothing is background, and the authors' code gives the mean of its values."""
    pipe, masks = pipes["sd"], MASKS.clone()
    masks[0] = True
    with methods.masactrl(pipe, images=3, masks=masks):
        found = draw(pipe)
    with Editor(pipe.unet, partial(masactrl, masks), 4, 10):
        expected = draw(pipe)
    check(pipe, found, expected, read=[0])


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize("group_norms", [True, False])
def test_style_aligned(pipes, kind, group_norms, monkeypatch):
    pipe = pipes[kind]
    with methods.style_aligned(pipe, images=3, group_norms=group_norms):
        found = draw(pipe)
    with Editor(pipe.unet, style_aligned), monkeypatch.context() as patch:
        for norm in pipe.unet.modules():
            if group_norms and isinstance(norm, nn.GroupNorm):
                patch.setattr(norm, "forward", norm_with_the_first(norm), raising=False)
        expected = draw(pipe)
    check(pipe, found, expected, read=[0])


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_story_diffusion(pipes, kind):
    pipe = pipes[kind]
    with methods.story_diffusion(pipe, images=3):
        found = draw(pipe)
    names = list(attention_layers(pipe.unet, "self"))
    first = next(i for i, name in enumerate(names) if name.startswith("up_blocks"))
    plain = StoryDiffusion()
    plain.editor = Editor(pipe.unet, plain, 5, first)
    with plain.editor:
        expected = draw(pipe)
    check(pipe, found, expected)


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_consistory(pipes, kind):
    pipe = pipes[kind]
    with methods.consistory(pipe, PROMPTS, "ball"):
        found = draw(pipe)
    names = list(attention_layers(pipe.unet, "self"))
    first = next(i for i, name in enumerate(names) if name.startswith("up_blocks"))
    ids = [pipe.tokenizer(prompt).input_ids for prompt in PROMPTS]
    word = pipe.tokenizer("ball", add_special_tokens=False).input_ids
    starts = [next(i for i in range(len(x)) if x[i : i + len(word)] == word) for x in ids]
    tokens_of = [list(range(start, start + len(word))) for start in starts]
    plain = ConsiStory(tokens_of, 3, (0, 1), map_tokens=4 if kind == "sd" else 16)
    plain.editor = Editor(pipe.unet, plain, 1, first, cross=plain.record)
    with plain.editor:
        expected = draw(pipe)
    check(pipe, found, expected)


@pytest.mark.parametrize("fidelity", [0.5, 1.0])
def test_reference_only(pipes, fidelity):
    pipe = pipes["sd"]
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    with methods.reference_only(pipe, picture, images=1, fidelity=fidelity, generator=generators[0]):
        found = draw(pipe, [PROMPTS[0]] * 2)[:1]
    expected = ReferenceOnly(pipe, fidelity).draw(picture, PROMPTS[0], NOISE[:1], STEPS, 2.0, generators[1])
    check(pipe, found, expected)


@pytest.fixture
def adapted(tmp_path):
    """A pipeline with an IP-Adapter, and embeddings of two pictures, unconditional and conditional."""
    pipe = StableDiffusionPipeline(**components())
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(2)
    tensors = {"image_proj.proj.weight": torch.randn(4 * 16, 8, generator=g), "image_proj.proj.bias": torch.zeros(64)}
    tensors |= {"image_proj.norm.weight": torch.ones(16), "image_proj.norm.bias": torch.zeros(16)}
    for i, name in enumerate(pipe.unet.attn_processors):
        if ".attn2." in name:
            channels = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for which in "kv":
                tensors[f"ip_adapter.{i}.to_{which}_ip.weight"] = torch.randn(channels, 16, generator=g)
    save_file(tensors, tmp_path / "ip.safetensors")
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="ip.safetensors", image_encoder_folder=None)
    for name, layer in attention_layers(pipe.unet, "cross").items():
        layer.place = name
    return pipe, torch.randn(2, 2, 8, generator=g)


def test_ip_adapter_is_diffusers_own_for_one_image(adapted):
    pipe, embeddings = adapted
    given = {"ip_adapter_image_embeds": [embeddings[:, :1]]}
    pipe.set_ip_adapter_scale(0.7)
    expected = draw(pipe, PROMPTS[:2], **given)
    before = pipe.unet.attn_processors
    with methods.ip_adapter(pipe, scales=[0.7]):
        found = draw(pipe, PROMPTS[:2], **given)
    assert distance(found, expected) < TOLERANCE and pipe.unet.attn_processors == before
    pipe.set_ip_adapter_scale(0.0)
    assert distance(found, draw(pipe, PROMPTS[:2], **given)) > 10 * TOLERANCE
    pipe.set_ip_adapter_scale(0.7)
    with methods.ip_adapter(pipe, scales=[0.3], steps=10):  # steps that an interrupted run does not come to
        stop = {
            "num_inference_steps": 12,
            "callback_on_step_end": lambda p, i, *_: setattr(p, "_interrupt", i > 5) or {},
        }
        found = draw(pipe, PROMPTS[:2], **given, **stop)
    assert torch.equal(found, draw(pipe, PROMPTS[:2], **given, **stop))  # the adapter as it is


def test_ip_adapter_with_masks(adapted):
    pipe, embeddings = adapted
    left = torch.zeros(16, 16, dtype=torch.bool)
    left[:, :9] = True
    given = {"ip_adapter_image_embeds": [embeddings]}
    with methods.ip_adapter(pipe, scales=[0.6, 0.8], masks=[left, ~left]):
        found = draw(pipe, PROMPTS[:2], **given)
    own = {name: layer.processor for name, layer in attention_layers(pipe.unet, "cross").items()}
    with Editor(pipe.unet, lambda *_: None, cross=adapter_attention(own, [0.6, 0.8], [left, ~left])):
        expected = draw(pipe, PROMPTS[:2], **given)
    assert distance(found, expected) < TOLERANCE
    with pytest.raises(ValueError, match=r"ip_adapter: scales: expected a list of 2, one per image, got 1"):
        with methods.ip_adapter(pipe, scales=[0.6]):
            draw(pipe, PROMPTS[:2], **given)


BATCH = {
    "masactrl": lambda pipe: methods.masactrl(pipe, images=3),
    "style_aligned": lambda pipe: methods.style_aligned(pipe, images=3),
    "reference_only": lambda pipe: methods.reference_only(pipe, torch.rand(1, 3, 16, 16), images=2),
    "consistory": lambda pipe: methods.consistory(pipe, PROMPTS, "ball"),
    "story_diffusion": lambda pipe: methods.story_diffusion(pipe, images=3),
}


@pytest.mark.parametrize("name", BATCH)
def test_another_batch_is_named_and_everything_restored(pipes, name):
    pipe = pipes["sd"]
    before, hooks = pipe.unet.attn_processors, hooks_of(pipe.unet)
    for images, guidance, got in ((2, 2.0, 4), (3, 1.0, 3)):
        with pytest.raises(
            ValueError, match=rf"(rows|prompts): expected a UNet's batch of 6 rows, got {got}; .*halves=1"
        ):
            with BATCH[name](pipe):
                draw(pipe, PROMPTS[:images], guidance_scale=guidance)
        assert pipe.unet.attn_processors == before and hooks_of(pipe.unet) == hooks == 0
    assert torch.equal(draw(pipe), pipe.stock)


def hooks_of(unet):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in unet.modules())


def test_without_guidance_there_is_one_half(pipes):
    pipe = pipes["xl"]
    with methods.masactrl(pipe, images=2, halves=1, layers=3, steps=1):
        alone = draw(pipe, PROMPTS[:2], guidance_scale=1.0)
    with methods.masactrl(pipe, images=2, layers=3, steps=1):
        unconditional_too = draw(pipe, PROMPTS[:2], guidance_scale=1.0 + 1e-6)
    assert distance(alone, unconditional_too) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["masactrl", "style_aligned", "reference_only", "ip_adapter", "consistory", "story_diffusion"]
)
def test_every_method_takes_layers_steps_and_a_backend(name):
    parameters = inspect.signature(getattr(methods, name)).parameters
    assert {"layers", "steps", "backend"} <= parameters.keys()
