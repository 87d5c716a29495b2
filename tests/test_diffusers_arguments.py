"""A call's arguments are checked before anything is computed, each by its name."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from tiny_models import tiny_controlnet, tiny_scheduler, tiny_unet
from tiny_pipelines import IMAGES, MASK, NOISE, PROMPTS, SHARED, banked, fresh, run, seeded

from lr_kernels.diffusers import ReferenceBank

pytestmark = pytest.mark.usefixtures("one_thread")

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
        ({"latents": NOISE.numpy()}, "latents: expected a floating tensor (n, C, height, width), got (2, 4, 8, 8)"),
        ({"latents": NOISE[0]}, "latents: expected a floating tensor (n, C, height, width), got torch.float32 (4, 8, "),
        ({"reference_subjects": 0}, "reference_subjects: expected a list of numbers, got 0"),
        ({"reference_subjects": [1]}, "reference_subjects: expected 1 numbers, among them each of 0 to 0, got [1]"),
        ({"layout_mask": [HALF] * 3}, "layout_mask: expected 1 or 2 masks, as there are images, got 3"),
        ({"layout_mask": HALF[None, None].expand(3, 1, 8, 8)}, "layout_mask: expected 1 or 2 masks"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_by_name(pipe, arguments, message):
    with pytest.raises(ValueError) as caught:
        run(pipe, **arguments)
    assert str(caught.value).startswith(f"lr_kernels.LayoutRetouch: {message}")


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


# Found before the first step


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": "dog.png"}, "reference_image: expected a PIL image"),
        ({"image": torch.full((1, 3, 16, 16), float("nan"))}, "reference_image: expected finite numbers"),
        ({"image": 255 * IMAGES[:1]}, "reference_image: expected floating numbers in [0, 1]"),
        ({"image": [IMAGES]}, "reference_mask: expected 2 masks"),
        ({"reference_mask": torch.zeros(16, 16)}, "reference_mask: expected a foreground, got none"),
        ({"reference_subjects": [0.0]}, "reference_subjects: expected 1 numbers"),
        ({"reference_subjects": [[0]]}, "reference_subjects: expected 1 numbers"),
        ({"layout_blend": 5}, "layout_blend: expected one of hard, linear, cosine, a function or 4 weights, got 5"),
        ({"layout_blend": "soft"}, "layout_blend: expected one of hard, linear, cosine, got 'soft'"),
        ({"layout_blend": ["a"] * 4}, "layout_blend[0]: expected a weight in [0, 1], got 'a'"),
        ({"layout_blend": lambda i: None}, "layout_blend[0]: expected a weight in [0, 1], got None"),
        ({"num_inference_steps": 2000}, "num_inference_steps: expected at most 1000"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt: expected a positive integer, got True"),
        ({"reference_fit": np.array(["a", "b"])}, "reference_fit: expected one of crop, pad, squeeze"),
        ({"negative_prompt": 5}, "negative_prompt: expected a string or several, got 5"),
        ({"eta": 3.0}, "eta: expected a number in [0, 1], got 3.0"),
        ({"context_limit": 5, "context_storage": None}, "context_limit: expected None without a context_storage"),
    ],
)  # fmt: skip
def test_nothing_is_computed_before_a_wrong_argument_is_refused(pipe, arguments, message):
    steps = []
    with pytest.raises((ValueError, TypeError)) as caught:
        run(pipe, callback_on_step_end=lambda pipe, step, t, tensors: steps.append(step), **arguments)
    assert str(caught.value).startswith(f"lr_kernels.LayoutRetouch: {message}") and not steps


def test_layers_are_refused_by_the_arguments_name(pipe):
    for layers in (3.5, [3], [None], []):
        with pytest.raises(ValueError, match="retouch_layers: expected"):
            run(pipe, retouch_layers=layers)


def test_a_batch_in_a_list_of_references_is_several(pipe):
    masks = [MASK, MASK]
    out = run(pipe, image=[IMAGES[:2]], reference_mask=masks, output_type="latent")
    again = run(pipe, image=[IMAGES[0], IMAGES[1]], reference_mask=masks, output_type="latent")
    assert torch.equal(out.images, again.images) and len(out.reference_mask) == 2


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"targets_from": "contexts"}, "targets_from"), ({"mask_blending": True}, "mask_blending"),
     ({"return_maps": True}, "return_maps"), ({"retouch_start": 0, "retouch_end": 1}, "retouch_end")],
)  # fmt: skip
def test_what_only_layouts_have_is_refused_without_them(pipe, arguments, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        pipe.retouch(PROMPTS, IMAGES[:1], "a sks ball", "ball", latents=NOISE, num_inference_steps=4, **arguments)


def test_a_layout_stage_by_itself_refuses_what_it_would_drop(pipe):
    with pytest.raises(ValueError, match="layout_prompt: expected a string or several, got None"):
        pipe.layout(PROMPTS, None)
    with pytest.raises(ValueError, match="context_storage: expected None, since there are no subject_tokens"):
        pipe.layout(PROMPTS, "a ball", context_storage="device")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": NOISE}, r"layout: expected what layout\(\) has returned, got Tensor"),
        ({"context_latents": NOISE, "latents": [1]}, "latents: expected shape"),
        ({"context_latents": NOISE.long()}, "context_latents: expected finite floating numbers"),
        ({"context_latents": NOISE * float("nan")}, "context_latents: expected finite floating numbers"),
        ({"context_latents": NOISE[..., :0]}, "context_latents: expected shape"),
    ],
)
def test_contexts_are_checked(pipe, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipe.retouch(PROMPTS, IMAGES[:1], "a sks ball", "ball", **arguments)


# Layouts and banks of something else


@pytest.mark.parametrize(
    "change", [{"use_karras_sigmas": True}, {"beta_end": 0.03}, {"prediction_type": "v_prediction"}]
)
def test_layouts_of_another_schedule_are_refused(change):
    pipe = fresh(scheduler=EulerDiscreteScheduler())
    common = {**SHARED, "latents": None}
    layout = pipe.layout(PROMPTS, "a ball", "ball", **common)
    pipe.scheduler = EulerDiscreteScheduler(**change)
    with pytest.raises(ValueError, match="scheduler: expected the one that the layouts were made with"):
        pipe.retouch(PROMPTS, IMAGES[:1], "a sks ball", "ball", layout=layout, **common)


def test_layouts_of_other_subjects_are_refused_unless_masks_are_given(pipe):
    layout = pipe.layout(PROMPTS, "a ball", "sks", **SHARED)
    common = {**SHARED, "layout": layout, "reference_mask": MASK}
    with pytest.raises(
        ValueError, match=r"subject_tokens: expected \[\['sks'\]\], as the layouts had, got \[\['ball'\]\]"
    ):
        pipe.retouch(PROMPTS, IMAGES[:1], "a sks ball", "ball", **common)
    out = pipe.retouch(PROMPTS, IMAGES[:1], "a sks ball", "ball", layout_mask=HALF, **common)
    assert torch.equal(out.context_masks[0, 0], HALF)


def test_layouts_renoised_take_another_number_of_steps(pipe):
    layout = pipe.layout(PROMPTS, "a ball", "ball", **{**SHARED, "num_inference_steps": 2})
    common = {**SHARED, "layout": layout, "reference_mask": MASK}
    with pytest.raises(ValueError, match="num_inference_steps: expected 2, as the layouts had"):
        pipe.retouch(PROMPTS, IMAGES[:1], "a sks ball", "ball", **common)
    out = pipe.retouch(PROMPTS, IMAGES[:1], "a sks ball", "ball", contexts_from="renoise", **common)
    assert out.latents.isfinite().all()


def test_layouts_of_another_precision_are_converted():
    pipe = fresh()
    layout = pipe.layout(PROMPTS, "a ball", "ball", context_storage="device", **SHARED)
    common = {**SHARED, "layout": layout, "reference_mask": MASK, "output_type": "latent"}
    exact = pipe.retouch(PROMPTS, IMAGES[:1], "a sks ball", "ball", **common).latents
    out = pipe.to(torch.bfloat16).retouch(PROMPTS, IMAGES[:1], "a sks ball", "ball", **common).latents
    assert out.dtype == torch.bfloat16 and (out.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_a_bank_of_other_noise_levels_or_precision_is_refused(pipe):
    bank = banked(pipe)
    arguments = {**SHARED, "latents": NOISE, "reference_bank": bank}
    other = fresh(scheduler=tiny_scheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))
    with pytest.raises(ValueError, match="bank: expected the noise levels that it was built at"):
        other(PROMPTS, "a ball", subject_tokens=("sks", "ball"), **arguments)
    half = fresh().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"reference_bank: expected built for torch.bfloat16, got torch.float32"):
        half(PROMPTS, "a ball", subject_tokens=("sks", "ball"), **arguments)


def test_steps_at_the_same_timestep_are_told_apart_by_their_levels():
    bank = ReferenceBank([6, 4, 1, 1, 1], signals=[0.1, 0.2, 0.3, 0.4, 0.5])
    assert bank.steps_of([1, 1], [0.4, 0.5]) == range(3, 5) and bank.steps_of([1, 1]) == range(2, 4)


@pytest.mark.parametrize(("height", "width"), [(6, 20), (10, 34)])
def test_a_bank_serves_sizes_that_no_layer_divides(pipe, height, width):
    common = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": height, "width": width}
    bank = pipe.reference_bank(IMAGES[:1], "a sks ball", "ball", reference_mask=MASK, **common)
    words = PROMPTS, "a ball"
    out = pipe(*words, subject_tokens="ball", reference_bank=bank, generator=seeded(), **common, output_type="latent")
    plain = pipe(*words, IMAGES[:1], "a sks ball", "ball", reference_mask=MASK, generator=seeded(), **common)
    assert (out.latents - plain.latents).abs().max() < 1e-3


@pytest.mark.parametrize("as_batch", [list, torch.Tensor.clone])
def test_control_images_are_one_for_all_or_one_per_prompt(as_batch):
    pipe = fresh(controlnet=tiny_controlnet(tiny_unet(0)))
    edges = torch.rand(2, 3, 16, 16, generator=seeded(5))
    common = {"num_images_per_prompt": 2, "latents": NOISE[[0, 0, 1, 1]]}
    out = run(pipe, control_image=as_batch(edges), **common)
    once = run(pipe, control_image=list(edges))
    assert (out.latents - once.latents[[0, 0, 1, 1]]).abs().max() < 1e-3
    with pytest.raises(ValueError, match="control_image: expected 1 or 2 images, as there are prompts, got 4"):
        run(pipe, control_image=torch.cat([edges, edges]), **common)
