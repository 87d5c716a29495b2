"""Arguments of `methods` and of the parts beside attention: what does not fit is named before the pipeline runs, and
what stock pipelines take is taken."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from tiny_models import components, distance

from lr_kernels.diffusers import methods, noised_rows, reference_adain, shared_group_norms
from lr_kernels.diffusers.methods.recipes import _encoded

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a ball", "a star"]
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
MASKS = torch.zeros(2, 16, 16, dtype=torch.bool)
MASKS[:, 2:10, 3:11] = True


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline(**components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    given = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 2.0}
    return pipe(PROMPTS, latents=NOISE, **given).images


NAN = float("nan")
REFUSED = [
    (partial(methods.masactrl, images=2, source=-1), "masactrl: source: expected an image, 0 to 1, got -1"),
    (partial(methods.masactrl, images=2, source=0.5), "masactrl: source: expected an image, 0 to 1, got 0.5"),
    (partial(methods.masactrl, images=2, source=None), "masactrl: source: expected an image"),
    (partial(methods.masactrl, images="2"), "masactrl: images: expected at least 1, got '2'"),
    (partial(methods.masactrl, images=2.0), "masactrl: images: expected at least 1, got 2.0"),
    (partial(methods.masactrl, images=2, masks=MASKS.float()), r"masactrl: masks: expected bool \(2, height, width\)"),
    (partial(methods.masactrl, images=2, masks=[MASKS[0], MASKS[0, :9]]), "masactrl: masks: expected bool .*one size"),
    (partial(methods.masactrl, images=2, masks=[1, 2]), r"masactrl: masks: expected bool"),
    (partial(methods.masactrl, images=2, masks="ab"), r"masactrl: masks: expected bool .*got str"),
    (partial(methods.style_aligned, images=2, reference=-1), "style_aligned: reference: expected an image, 0 to 1"),
    (partial(methods.style_aligned, images=2, shift=NAN), "style_aligned: shift: expected a number .*got nan"),
    (partial(methods.style_aligned, images=2, scale=torch.tensor(NAN)), "style_aligned: scale: expected finite"),
    (partial(methods.style_aligned, images=2, scale="a"), "style_aligned: scale: expected a number"),
    (partial(methods.reference_only, picture=PICTURES, images=1), "picture: expected one picture, got 2"),
    (partial(methods.story_diffusion, images=16), "story_diffusion: images: expected 1 to 15 images, got 16"),
    *((partial(methods.story_diffusion, images=2, seed=seed), "story_diffusion: seed: expected an integer")
      for seed in ("a", None, 2**63, 0.5)),
    *((partial(methods.consistory, prompts=PROMPTS, subject_tokens="a", anchors=anchors), "consistory: anchors: expec")
      for anchors in ((0, 5), 0, (0.5,), (), (1, 1))),
    (partial(methods.consistory, prompts=PROMPTS[:1], subject_tokens="a"), "consistory: anchors: expected .*0 to 0"),
    *((partial(methods.consistory, prompts=PROMPTS, subject_tokens="a", steps=steps), "consistory: steps: expected st")
      for steps in (0, None, [0, 1])),
    (partial(methods.consistory, prompts="a ball", subject_tokens="a"), "consistory: prompts: expected a list"),
    *((partial(methods.ip_adapter, scales=scales), r"ip_adapter: scales(\[0\])?: expected a ")
      for scales in (1, None, "a", [None], torch.tensor(1.0), [NAN])),
    (partial(methods.ip_adapter, scales=[1.0], masks=[MASKS, MASKS]), "ip_adapter: masks: expected a list of 1"),
    (partial(methods.ip_adapter, scales=[1.0], masks=["a"]), r"ip_adapter: masks\[0\]: expected bool or float"),
    *((partial(method, backend="foo"), "backend: expected one of auto, ")
      for method in (
          partial(methods.masactrl, images=2), partial(methods.style_aligned, images=2),
          partial(methods.reference_only, picture=PICTURES[:1], images=1), partial(methods.ip_adapter, scales=[1.0]),
          partial(methods.story_diffusion, images=2), partial(methods.consistory, prompts=PROMPTS, subject_tokens="a"),
      )),
]  # fmt: skip


@pytest.mark.parametrize(("method", "message"), REFUSED)
def test_what_does_not_fit_is_named_at_the_with(pipe, method, message):
    before = pipe.unet.attn_processors
    with pytest.raises(ValueError, match=message):
        with method(pipe):
            pytest.fail("the block began")
    assert pipe.unet.attn_processors == before


@pytest.mark.parametrize("masks", [list(MASKS), MASKS.numpy(), list(MASKS.numpy())], ids=["list", "array", "arrays"])
def test_masks_may_be_lists_and_arrays(pipe, masks):
    with methods.masactrl(pipe, images=2, masks=MASKS, layers=3, steps=1):
        expected = draw(pipe)
    with methods.masactrl(pipe, images=np.int64(2), masks=masks, layers=3, steps=1):
        assert torch.equal(draw(pipe), expected)


def test_a_picture_is_encoded_as_image_to_image_does():
    """An autoencoder may have its latents' mean and deviation, as Playground's has; a tiny one has no distribution."""
    parts = components()
    parts["vae"].register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0, 3.0, 4.0, 5.0])
    pipe = StableDiffusionPipeline(**parts)
    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    found = _encoded(pipe, PICTURES[:1], torch.device("cpu"), seeded[0])
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(PICTURES[:1])
        made = pipe.vae.encode(pixels).latent_dist.sample(seeded[1])
    config = pipe.vae.config
    mean, deviation = (torch.tensor(x).view(1, 4, 1, 1) for x in (config.latents_mean, config.latents_std))
    torch.testing.assert_close(found, (made - mean) * config.scaling_factor / deviation)
    sides = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny = AutoencoderTiny(**sides, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
    pipe = StableDiffusionPipeline(**{**components(), "vae": tiny})
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(PICTURES[:1])
        expected = tiny.encode(pixels).latents * tiny.config.scaling_factor
    found = _encoded(pipe, PICTURES[:1], torch.device("cpu"), None)
    torch.testing.assert_close(found, expected)
    pipe.vae = None
    with pytest.raises(ValueError, match="reference_only: pipe: expected a pipeline with an autoencoder"):
        _encoded(pipe, PICTURES[:1], torch.device("cpu"), None)


SAMPLE = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(2))


def predict(pipe, context):
    pipe.scheduler.set_timesteps(4)
    with context, torch.no_grad():
        return pipe.unet(SAMPLE, pipe.scheduler.timesteps[0], encoder_hidden_states=TEXT).sample


@pytest.mark.parametrize(
    "rows", [[0, 0, 1.5, 2], torch.tensor([0.0, 0, 1.5, 2]), [-7, 0, 2, 2], [0, 0, 9, 2], torch.tensor([0, 9]), 5, "ab"]
)
@pytest.mark.parametrize("part", [shared_group_norms, reference_adain])
def test_tables_of_features_are_checked(pipe, part, rows):
    with pytest.raises(ValueError, match=rf"lr_kernels.{part.__name__}: rows: expected "):
        predict(pipe, part(pipe.unet, rows))


@pytest.mark.parametrize("part", [shared_group_norms, reference_adain])
def test_a_table_of_features_may_be_a_list(pipe, part):
    expected = predict(pipe, part(pipe.unet, torch.tensor([0, 0, -1, 2])))
    assert distance(predict(pipe, part(pipe.unet, [0, 0, -1, 2])), expected) == 0


@pytest.mark.parametrize("uncond", [torch.tensor([True, False]), torch.tensor([1, 1, 0, 0]), [True] * 4])
def test_unconditional_rows_of_features_are_checked(pipe, uncond):
    with pytest.raises(ValueError, match=r"reference_adain: uncond: expected bool \(4,\)"):
        predict(pipe, reference_adain(pipe.unet, torch.tensor([0, 0, 2, 2]), uncond))


@pytest.mark.parametrize(
    ("latents", "rows", "message"),
    [
        *((SAMPLE[:1], rows, "rows: expected a list of") for rows in ([-1, 1, -1, 1], [-5, 0, -1, 0], [-1, 0.5], 5)),
        (SAMPLE[:1, :2], [-1, 0, -1, 0], "latents: expected 4 channels"),
        (SAMPLE[:1] * NAN, [-1, 0, -1, 0], "latents: expected finite numbers"),
        ([SAMPLE[0]], [-1, 0, -1, 0], "latents: expected floating .*got list"),
        (SAMPLE[0], [-1, 0, -1, 0], "latents: expected floating"),
    ],
)
def test_noised_rows_are_checked(pipe, latents, rows, message):
    with pytest.raises(ValueError, match=f"lr_kernels.noised_rows: {message}"):
        with noised_rows(pipe, latents, rows):
            pytest.fail("the block began")


def test_noised_rows_may_be_a_tensor(pipe):
    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    expected = predict(pipe, noised_rows(pipe, SAMPLE[:1], [-1, 0, -1, 0], seeded[0]))
    found = predict(pipe, noised_rows(pipe, SAMPLE[:1], torch.tensor([-1, 0, -1, 0]), seeded[1]))
    assert torch.equal(found, expected)
