"""A call's arguments are checked before anything is computed, each by its name."""

import numpy as np
import pytest
import torch
from tiny_pipelines import IMAGES, NOISE, PROMPTS, run, seeded

TWO = [["sks"], ["ball"]]
HALF = torch.zeros(8, 8, dtype=torch.bool)
HALF[:, :4] = True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_threshold": None}, "mask_threshold: expected 'otsu' or a number in [0, 1], got None"),
        ({"mask_threshold": float("nan")}, "mask_threshold: expected 'otsu' or a number in [0, 1], got nan"),
        ({"retouch_guidance_scale": "3"}, "retouch_guidance_scale: expected a finite number, got '3'"),
        ({"guidance_scale": True}, "guidance_scale: expected a finite number, got True"),
        ({"guidance_scale": float("inf")}, "guidance_scale: expected a finite number, got inf"),
        ({"control_scale": None}, "control_scale: expected a finite number, got None"),
        ({"eta": "0"}, "eta: expected a finite number, got '0'"),
        ({"num_inference_steps": 4.0}, "num_inference_steps: expected a positive integer, got 4.0"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected a positive integer, got 0"),
        ({"context_limit": "5"}, "context_limit: expected a number of bytes, or None, got '5'"),
        ({"output_type": "jpeg"}, "output_type: expected one of pil, np, pt, latent, got 'jpeg'"),
        ({"callback_on_step_end": 3}, "callback_on_step_end: expected a function, or None, got int"),
        ({"generator": (seeded(), seeded())}, "generator: expected a torch.Generator, or a list of them, got tuple"),
        ({"generator": [seeded(), 3]}, "generator: expected a torch.Generator, or a list of them, got int"),
        ({"generator": [seeded()]}, "generator: expected one, or 2, one per image, got 1"),
        ({"height": 16.0}, "height: expected a multiple of 2, got 16.0"),
        ({"width": 15}, "width: expected a multiple of 2, got 15"),
        ({"latents": NOISE.numpy()}, "latents: expected a tensor (n, C, height, width), got (2, 4, 8, 8)"),
        ({"latents": NOISE[0]}, "latents: expected a tensor (n, C, height, width), got torch.Size([4, 8, 8])"),
        ({"reference_subjects": 0}, "reference_subjects: expected a list of numbers, got 0"),
        ({"reference_subjects": [1]}, "reference_subjects: expected 1 numbers, among them each of 0 to 0, got [1]"),
        ({"layout_mask": [HALF] * 3}, "layout_mask: expected 1 or 2 masks, as there are images, got 3"),
        ({"layout_mask": HALF[None, None].expand(3, 1, 8, 8)}, "layout_mask: expected 1 or 2 masks"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_by_name(pipe, arguments, message):
    with pytest.raises(ValueError) as caught:
        run(pipe, **arguments)
    assert str(caught.value).startswith(f"lr_kernels.layout_retouch: {message}")


@pytest.mark.parametrize("tokens", [3, (), None, [[]], ["ball", 3], [["ball"], 3], [["ball"], []]])
def test_subject_tokens_are_words(pipe, tokens):
    with pytest.raises(ValueError, match="subject_tokens: expected words of the prompts"):
        pipe(PROMPTS, "a ball", IMAGES[:1], "a sks ball", tokens, latents=NOISE, num_inference_steps=2)


@pytest.mark.parametrize("masks", [HALF, HALF.numpy(), [HALF], [HALF] * 3, HALF[None].expand(3, 8, 8)])
def test_several_subjects_have_a_list_of_layout_masks(pipe, masks):
    got = "1" if isinstance(masks, list) and len(masks) == 1 else "3|8|ndarray|Tensor"
    with pytest.raises(
        ValueError, match=rf"layout_mask: expected a list of the masks of each of 2 subjects, got ({got})"
    ):
        pipe(PROMPTS, "a ball", IMAGES[:2], "a sks ball", TWO, latents=NOISE, num_inference_steps=2, layout_mask=masks)


COLOURS = np.repeat(HALF.numpy()[..., None], 3, -1).astype(np.uint8) * 255


@pytest.mark.parametrize(
    "masks",
    [
        HALF, HALF.numpy(), COLOURS, COLOURS[None], [HALF, HALF], [COLOURS], HALF.expand(2, 8, 8),
        HALF.expand(2, 1, 8, 8),
    ],
    ids=["tensor", "array", "picture", "pictures", "list", "list of pictures", "per image", "with a channel"],
)  # fmt: skip
def test_a_layout_mask_comes_in_any_form(pipe, masks):
    out = run(pipe, layout_mask=masks, output_type="latent")
    assert torch.equal(out.context_masks[0], HALF.expand(2, 8, 8))


@pytest.mark.parametrize("returned", [[], 3, {"latents": None}, {"latents": NOISE[:1]}, {"latents": NOISE.numpy()}])
@pytest.mark.parametrize("stage", ["layout", "retouch"])
def test_what_a_callback_returns_is_checked_in_both_stages(pipe, returned, stage):
    def callback(pipe, step, t, tensors):
        return returned if pipe.stage == stage else None

    with pytest.raises(ValueError, match=r"callback_on_step_end: expected (a function that returns a dict|latents of)"):
        run(pipe, callback_on_step_end=callback)


def test_a_callbacks_latents_are_taken_in_any_precision(pipe):
    def rounded(pipe, step, t, tensors):
        return {"latents": tensors["latents"].to(torch.bfloat16).double()}

    def as_given(pipe, step, t, tensors):
        return {"latents": tensors["latents"].to(torch.bfloat16).float()}

    first, second = (run(pipe, callback_on_step_end=f, output_type="latent") for f in (rounded, as_given))
    assert first.images.dtype == torch.float32 and torch.equal(first.images, second.images)
