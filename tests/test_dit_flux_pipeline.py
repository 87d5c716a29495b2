"""Layout-and-Retouch on a small Flux with random weights: each stage against a loop of stock calls, bit for bit where
nothing is shared; what sharing changes; masks, batches, pictures."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FluxPipeline
from plain_flux import PlainRetouch, image_ids
from tiny_flux import (
    IMAGE,
    LAYOUT_MASK,
    LAYOUT_PROMPTS,
    MASK,
    NOISE,
    PROMPTS,
    SHARED,
    SIDE,
    STEPS,
    TOKENS,
    at_pixels,
    fresh,
    laid_out,
    parts,
    retouched,
    tiny,
    whole,
)
from tiny_models import TOLERANCE, distance
from torch.nn import functional as F

from lr_kernels.denoising.coefficients import blend_schedule
from lr_kernels.diffusers.pipelines.pictures import FITS
from lr_kernels.diffusers.subjects.foreground import WARM, foreground
from lr_kernels.diffusers.subjects.subject import TargetMasks, find_subjects, stretched

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def by_hand(pipe, latents, weights, start=0):
    """The steps from `start` on by stock calls alone: the transformer with its LoRA on or off, the scheduler's step."""
    model, scheduler, device = pipe.transformer, pipe.scheduler, latents.device
    texts = {}
    for personal, prompts in ((False, LAYOUT_PROMPTS), (True, PROMPTS)):
        texts[personal] = FluxPipeline.encode_prompt(pipe, prompts, max_sequence_length=16, device=device)
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 4, device, latents.dtype)
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    shift = TOKENS * slope + config.base_shift - slope * config.base_image_seq_len
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=shift)
    scheduler.set_begin_index(start)

    def velocity(personal, t):
        chosen = model if personal else pipe.transformer
        if pipe.personalized_transformer is not None:
            chosen = pipe.personalized_transformer if personal else model
        elif not personal:
            chosen.disable_lora()
        embeds, pooled, text_ids = texts[personal]
        try:
            return chosen(
                hidden_states=latents, encoder_hidden_states=embeds, pooled_projections=pooled, txt_ids=text_ids,
                img_ids=ids, timestep=t.expand(2) / 1000, guidance=torch.full([2], 3.5), return_dict=False,
            )[0]  # fmt: skip
        finally:
            if pipe.personalized_transformer is None and not personal:
                chosen.enable_lora()

    for i, t in list(enumerate(scheduler.timesteps))[start:]:
        w = weights[i]
        if w in (0, 1):
            v = velocity(bool(w), t)
        else:
            v = (1 - w) * velocity(False, t) + w * velocity(True, t)
        latents = scheduler.step(v, t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("kind", ["lora", "transformer"])
@pytest.mark.parametrize("switch", [0, 2, STEPS])
def test_a_hard_switch_is_a_loop_of_stock_calls_bit_for_bit(kind, switch):
    pipe = fresh(kind)
    found = laid_out(pipe, layout_steps=switch).latents
    assert torch.equal(found, by_hand(pipe, NOISE, [float(i >= switch) for i in range(STEPS)]))


def test_the_ends_of_the_switch_are_the_stock_pipeline():
    pipe = tiny()
    stock = FluxPipeline(**{**parts(), "transformer": pipe.transformer})
    stock.set_progress_bar_config(disable=True)
    given = {**SHARED, "height": SIDE, "width": SIDE, "latents": NOISE, "output_type": "pt"}
    personal, vanilla = laid_out(pipe, layout_steps=0, **given), laid_out(pipe, layout_steps=STEPS, **given)
    assert torch.equal(personal.images, stock(PROMPTS, **given).images)
    pipe.transformer.disable_lora()
    try:
        assert torch.equal(vanilla.images, stock(LAYOUT_PROMPTS, **given).images)
    finally:
        pipe.transformer.enable_lora()
        pipe.transformer.requires_grad_(False)
    assert distance(personal.images, vanilla.images) > TOLERANCE


@pytest.mark.parametrize("blend", ["linear", "cosine"])
def test_a_soft_blend_mixes_the_two_models_velocities(blend):
    pipe = tiny()
    weights = blend_schedule(blend, STEPS, 2).tolist()
    assert any(0 < w < 1 for w in weights)
    found = laid_out(pipe, layout_steps=2, layout_blend=blend).latents
    assert distance(found, by_hand(pipe, NOISE, weights)) <= TOLERANCE
    assert distance(found, laid_out(pipe, layout_steps=2).latents) > TOLERANCE


@pytest.mark.parametrize("start", [0, 2])
def test_the_control_is_the_plain_personalized_run_and_sharing_is_not(start):
    pipe = tiny()
    layout = laid_out(pipe)
    control = retouched(pipe, layout, retouch_start=start, sharing=False)
    sigma = layout.layouts.sigmas[start].item()
    begun = (1 - sigma) * layout.latents + sigma * NOISE
    assert torch.equal(control.latents, by_hand(pipe, begun, [1.0] * STEPS, start))
    found = retouched(pipe, layout, retouch_start=start)
    assert distance(found.latents, control.latents) > TOLERANCE


def test_from_the_first_step_on_the_control_is_the_stock_pipeline():
    pipe = tiny()
    found = retouched(pipe, laid_out(pipe), retouch_start=0, sharing=False).latents
    stock = FluxPipeline(**{**parts(), "transformer": pipe.transformer})
    stock.set_progress_bar_config(disable=True)
    assert torch.equal(found, stock(PROMPTS, **SHARED, height=SIDE, width=SIDE, latents=NOISE).images)


KEYWORDS = {"retouch_start": "start", "retouch_end": "end", "mask_blending": "blends", "subject_tokens": "adapts"}
"""By name of a setting, that of `retouched_by_hand`."""


@torch.no_grad()
def retouched_by_hand(pipe, layout, targets, *, start=2, end=STEPS, images=IMAGE, blends=False, adapts=False, **choice):
    """The retouch stage by stock calls, with transcribed attention in the steps that share."""
    model, scheduler, vae, sigmas = pipe.transformer, pipe.scheduler, pipe.vae, layout.layouts.sigmas.tolist()
    owns, contexts_from, offset = (choice.get(x) for x in ("own_keys", "contexts_from", "reference_offset"))
    count, grid = len(images), (4, 4)
    references = torch.zeros(count, *grid, dtype=torch.bool)
    references[:, 1:3, 1:3] = True
    words = find_subjects(pipe.tokenizer_2, PROMPTS, [["ball"]], "cpu") if adapts else None
    double, single = (
        PlainRetouch(targets, references, 16, own_keys=owns is not False, offset=offset or (0, 0, 4), words=words)
        for _ in range(2)
    )
    names = list(model.attn_processors)  # one double block, two single ones
    tracker = TargetMasks(targets[None].float(), lambda x: foreground(x, size=grid, warm=WARM), STEPS - start)
    mask = targets
    texts = [pipe.encode_prompt(x, max_sequence_length=16) for x in (PROMPTS, PROMPTS, ["a sks ball"] * count)]
    embeds, pooled = (torch.cat([text[i] for text in texts]) for i in range(2))
    clean = (vae.encode(2 * images - 1).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    clean = pipe._pack_latents(clean, count, 4, 8, 8)
    noise = torch.randn(1, TOKENS, 16, generator=torch.Generator().manual_seed(0))

    def mixed(x, epsilon, i):
        return (1 - sigmas[i]) * x + sigmas[i] * epsilon

    def context(i):
        return mixed(layout.latents, NOISE, i) if contexts_from == "renoise" else layout.layouts.trajectory[i]

    latents = context(start) if choice.get("targets_from") == "contexts" else mixed(layout.latents, NOISE, start)
    scheduler.set_begin_index(start)
    scheduler._step_index = None
    stock = dict(model.attn_processors)
    for i in range(start, STEPS):
        rows = latents
        if i < end:
            rows = torch.cat([latents, context(i), mixed(clean, noise, i)])
        if i < end or adapts:
            double.routes = single.routes = i < end
            double.targets = single.targets = mask
            model.set_attn_processor(dict(zip(names, (double, single, single), strict=True)))
        v = model(
            hidden_states=rows, encoder_hidden_states=embeds[: len(rows)], pooled_projections=pooled[: len(rows)],
            txt_ids=texts[0][2], img_ids=image_ids(*grid), timestep=torch.full([len(rows)], sigmas[i]),
            guidance=torch.full([len(rows)], 3.5), return_dict=False,
        )[0]  # fmt: skip
        model.set_attn_processor(dict(stock))
        latents = scheduler.step(v[:2], scheduler.timesteps[i], latents, return_dict=False)[0]
        if adapts:
            mask = tracker.update(stretched(double.maps.unflatten(1, grid))[None])[0]
        if blends:
            latents = torch.where((mask | targets).flatten(1)[..., None], latents, context(i + 1))
    return latents, mask


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"own_keys": False, "reference_offset": (1, 0, 0)},
        {"contexts_from": "renoise", "retouch_end": 4},
        {"targets_from": "contexts", "image": [IMAGE[0], 1 - IMAGE[0]]},
        {"mask_blending": True, "retouch_start": 0},
        {"mask_blending": True, "subject_tokens": "ball", "retouch_end": 4},
    ],
    ids=lambda choice: "-".join(choice) or "default",
)
@pytest.mark.fault(number=1)
def test_the_retouch_stage_is_its_transcription(choice):
    pipe = tiny()
    layout = laid_out(pipe)
    found = retouched(pipe, layout, **choice)
    targets = F.max_pool2d(LAYOUT_MASK, 4) > 0
    given = dict(choice)
    images = torch.stack(given.pop("image")) if "image" in given else IMAGE
    given = {KEYWORDS.get(name, name): x for name, x in given.items()}
    latents, mask = retouched_by_hand(pipe, layout, targets, images=images, **given)
    assert torch.equal(found.context_masks, targets) and torch.equal(found.masks, mask)
    assert distance(found.latents, latents) <= TOLERANCE


def test_a_call_is_its_two_stages():
    pipe = tiny()
    both = whole(pipe)
    layout = laid_out(pipe)
    found = retouched(pipe, layout)
    assert torch.equal(both.layout_images, layout.images) and torch.equal(both.images, found.images)
    assert both.context_masks.shape == (2, 4, 4) and both.reference_mask.shape == (1, 4, 4)
    assert torch.equal(both.images, whole(pipe).images)
    images, layouts = whole(pipe, return_dict=False)
    assert torch.equal(images, both.images) and torch.equal(layouts, both.layout_images)


@pytest.mark.parametrize(
    "choice",
    [
        {"retouch_end": 3},
        {"retouch_layers": ["transformer_blocks"]},
        {"own_keys": False},
        {"reference_offset": (0, 0, 0)},
        {"contexts_from": "renoise"},
        {"targets_from": "contexts"},
        {"mask_blending": True},
        {"image": [IMAGE[0], 1 - IMAGE[0]]},
        {"reference_mask": ~MASK},
    ],
    ids=lambda choice: next(iter(choice)),
)
def test_every_choice_changes_the_images_but_not_the_layouts(choice):
    pipe = tiny()
    base, found = whole(pipe), whole(pipe, **choice)
    assert torch.equal(found.layout_images, base.layout_images)
    assert found.images.isfinite().all() and distance(found.images, base.images) > TOLERANCE


def test_after_its_end_the_sharing_is_over():
    pipe = tiny()
    layout = laid_out(pipe)
    off = retouched(pipe, layout, sharing=False)
    assert torch.equal(retouched(pipe, layout, retouch_start=2, retouch_end=2).latents, off.latents)
    assert {type(p).__name__ for p in pipe.transformer.attn_processors.values()} == {"FluxAttnProcessor"}


def test_mask_blending_keeps_the_layouts_background():
    pipe = tiny()
    layout = laid_out(pipe)
    found = retouched(pipe, layout, mask_blending=True).latents
    kept = LAYOUT_MASK.unflatten(2, (4, 4)).unflatten(1, (4, 4))[:, :, 0, :, 0].flatten(1) > 0
    assert torch.equal(found[~kept], layout.latents[~kept])
    assert distance(found[kept], layout.latents[kept]) > TOLERANCE


def test_masks_come_from_the_models_attention():
    pipe = tiny()
    found = whole(pipe, reference_mask=None, layout_mask=None, subject_tokens="ball")
    for masks, rows in ((found.context_masks, 2), (found.reference_mask, 1), (found.masks, 2)):
        assert masks.shape == (rows, 4, 4) and masks.dtype == torch.bool and masks.flatten(1).any(1).all()
    assert torch.equal(found.masks, found.context_masks)
    given = {"reference_mask": at_pixels(found.reference_mask), "layout_mask": at_pixels(found.context_masks)}
    assert torch.equal(whole(pipe, **given).images, found.images)
    one = whole(pipe, reference_mask=None, subject_tokens="ball", retouch_layers="single_transformer_blocks")
    assert torch.equal(one.reference_mask, found.reference_mask)
    assert not torch.equal(whole(pipe, subject_tokens="sks", layout_mask=None).context_masks, found.context_masks)


@pytest.mark.parametrize("layers", [None, "single_transformer_blocks"])
def test_with_blending_the_mask_moves_to_the_targets_own(layers):
    pipe = tiny()
    given = {"mask_blending": True, "retouch_layers": layers, "retouch_end": 4}
    fixed, found = whole(pipe, **given), whole(pipe, **given, subject_tokens="ball")
    assert torch.equal(fixed.masks, fixed.context_masks) and torch.equal(found.context_masks, fixed.context_masks)
    assert not torch.equal(found.masks, fixed.masks)
    assert distance(found.images, fixed.images) > TOLERANCE
    outside = ~(found.masks | found.context_masks).flatten(1)
    assert torch.equal(found.images[outside], found.layout_images[outside])
    control = whole(pipe, **given, subject_tokens="ball", sharing=False)
    assert control.images.isfinite().all() and distance(control.images, found.images) > TOLERANCE


def test_each_image_of_a_batch_is_that_of_its_own_call():
    pipe = tiny()
    both = whole(pipe)
    for i in range(2):
        given = {**SHARED, "reference_mask": MASK, "layout_mask": LAYOUT_MASK[i], "latents": NOISE[i : i + 1]}
        alone = pipe(PROMPTS[i], LAYOUT_PROMPTS[i], IMAGE, "a sks ball", height=SIDE, width=SIDE, **given)
        assert distance(alone.images, both.images[i : i + 1]) <= TOLERANCE


def test_images_of_one_prompt_differ_by_their_generators():
    pipe = tiny()
    generators = [torch.Generator().manual_seed(i) for i in (3, 4)]
    given = {**SHARED, "height": SIDE, "width": SIDE, "num_images_per_prompt": 2, "reference_mask": MASK}
    given["layout_mask"] = MASK
    found = pipe("a sks ball", "a ball", IMAGE, "a sks ball", generator=generators, **given).images
    alone = pipe(
        "a sks ball", "a ball", IMAGE, "a sks ball", generator=torch.Generator().manual_seed(4),
        **{**given, "num_images_per_prompt": 1},
    ).images  # fmt: skip
    assert distance(found[1:], alone) <= TOLERANCE and distance(found[0], found[1]) > TOLERANCE
    layout = pipe.layout(
        "a sks ball", "a ball", **{**SHARED, "height": SIDE, "width": SIDE, "num_images_per_prompt": 2}
    )
    again = pipe.retouch(
        "a sks ball", IMAGE, "a sks ball", layout=layout, reference_mask=MASK, layout_mask=MASK,
        **SHARED, num_images_per_prompt=2,
    )  # fmt: skip
    assert again.images.shape == (2, TOKENS, 16)


def test_several_prompts_with_several_images_each_find_their_own_words():
    pipe = tiny()
    given = {"reference_mask": None, "layout_mask": None, "subject_tokens": "ball", "num_images_per_prompt": 2}
    found = whole(pipe, **given, latents=NOISE.repeat_interleave(2, 0))
    alone = whole(pipe, **given | {"num_images_per_prompt": 1})
    assert torch.equal(found.context_masks, alone.context_masks.repeat_interleave(2, 0))
    assert distance(found.images, alone.images.repeat_interleave(2, 0)) <= TOLERANCE


@pytest.mark.parametrize(("output_type", "kind"), [("pil", PIL.Image.Image), ("np", np.ndarray), ("pt", torch.Tensor)])
def test_images_come_in_the_output_type(output_type, kind):
    found = whole(tiny(), output_type=output_type)
    for images in (found.images, found.layout_images):
        assert len(images) == 2 and isinstance(images[0], kind)


def test_pictures_and_masks_of_every_kind_mean_the_same():
    pipe = tiny()
    first = whole(pipe).images
    grey = PIL.Image.fromarray(MASK)
    masks = [PIL.Image.fromarray(x) for x in LAYOUT_MASK.bool().numpy()]
    assert torch.equal(whole(pipe, reference_mask=grey, layout_mask=masks).images, first)
    byte = MASK.astype(np.uint8)
    assert torch.equal(whole(pipe, reference_mask=byte, layout_mask=list(255 * LAYOUT_MASK.byte())).images, first)
    assert torch.equal(whole(pipe, reference_mask=torch.from_numpy(MASK), image=[IMAGE[0]]).images, first)
    array = IMAGE.permute(0, 2, 3, 1).numpy()
    assert torch.equal(whole(pipe, image=array).images, first)
    photo = PIL.Image.fromarray((array[0] * 255).astype(np.uint8))
    of_photo = whole(pipe, image=photo).images
    data = np.asarray(photo)
    for same in (data, data[None], photo.convert("RGBA"), torch.from_numpy(data.copy()).permute(2, 0, 1)):
        assert distance(whole(pipe, image=same).images, of_photo) <= TOLERANCE
    assert torch.equal(whole(pipe, reference_mask=MASK[None, None], layout_mask=LAYOUT_MASK[:, None]).images, first)
    mixed = [photo.resize((32, 24)), IMAGE[0]]
    assert whole(pipe, image=mixed).reference_mask.shape == (2, 4, 4)
    turned = photo.transpose(PIL.Image.Transpose.ROTATE_90)
    turned.getexif()[274] = 6  # "turn by 90° clockwise"
    assert torch.equal(whole(pipe, image=turned).images, of_photo)


def test_a_reference_of_another_aspect_ratio_is_fitted_together_with_its_mask():
    pipe = tiny()
    photo, mask = np.zeros((32, 64, 3), np.uint8), np.zeros((32, 64), bool)
    photo[:, 32:], mask[:, 16:48] = 200, True
    found = {fit: whole(pipe, image=photo, reference_mask=mask, reference_fit=fit) for fit in FITS}
    shares = {fit: result.reference_mask.float().mean().item() for fit, result in found.items()}
    assert shares == {"crop": 1, "pad": 1 / 4, "squeeze": 1 / 2}
    assert torch.equal(found["crop"].images, whole(pipe, image=photo, reference_mask=mask).images)
    for fit in ("pad", "squeeze"):
        assert distance(found[fit].images, found["crop"].images) > TOLERANCE


def test_a_cut_out_is_its_own_mask():
    pipe = tiny()
    colours = np.full((SIDE, SIDE, 3), 90, np.uint8)
    cutout = PIL.Image.fromarray(np.dstack([colours, np.where(MASK[::2, ::2], 255, 0).astype(np.uint8)]))
    on_white = np.where(MASK[::2, ::2, None], colours, 255).astype(np.uint8)
    expected = whole(pipe, image=PIL.Image.fromarray(on_white))
    assert torch.equal(whole(pipe, image=cutout, reference_mask=cutout).images, expected.images)
