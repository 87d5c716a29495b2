"""What the retouch stage takes from the layout stage: trajectories, keys, values, masks; solvers; costs; callbacks."""

import io
import itertools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from tiny_models import TOLERANCE, components, components_xl, distance, tiny_controlnet, tiny_scheduler
from tiny_pipelines import IMAGES, MASK, NOISE, PROMPTS, SHARED, STEPS, attention, banked, fresh, run, seeded
from torch.nn import functional as F

from lr_kernels import Source
from lr_kernels.diffusers import MultiSourceAttnProcessor, RetouchBatch, route
from lr_kernels.diffusers.processors.unet import AttentionState
from lr_kernels.diffusers.subjects.foreground import foreground, grown, without_specks
from lr_kernels.diffusers.subjects.subject import mean_of_layers, propagated

pytestmark = pytest.mark.usefixtures("one_thread")


# Keys and values of the layouts


@pytest.mark.parametrize(("banked_references", "guided"), list(itertools.product([True, False], repeat=2)))
def test_contexts_in_a_bank_are_read_by_hand(banked_references, guided):
    torch.manual_seed(0)
    batch = RetouchBatch(2, True, guided, references=1, banked=banked_references, context_banked=True)
    masks, seen = torch.rand(1, 2, 4, 6) < 0.4, torch.rand(1, 4, 6) < 0.5
    q, k, v = torch.randn(3, batch.size, 2, 24, 8)
    contexts, references = (torch.randn(2, 2 * batch.halves, 24, 2, 8), torch.randn(2, batch.halves, 24, 2, 8))

    class Held:
        def __init__(self, x):
            self.x = x

        def read(self, key):
            return Source(*self.x)

    state = AttentionState(sharing=True, routings={24: route(batch, masks, seen, (4, 6))})
    processor = MultiSourceAttnProcessor(state, Held(references) if banked_references else None, Held(contexts))
    found = processor.attend(q, k, v, None, False)
    expected = F.scaled_dot_product_attention(q, k, v)
    masks, seen = masks.flatten(2)[0], seen.flatten(1)[0]
    for half, image in itertools.product(range(batch.halves), range(2)):
        row = half * batch.half + image
        context = contexts[:, half * 2 + image].transpose(1, 2)
        if banked_references:
            reference = references[:, half].transpose(1, 2)
        else:
            reference = torch.stack([k[row - image + 2], v[row - image + 2]])
        keys, values = (torch.cat(pair, 1) for pair in zip(context, reference))
        visible = torch.cat([~masks[image][:, None].expand(24, 24), masks[image][:, None] & seen[None]], 1)
        expected[row] = attention(q[row], keys, values, visible)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}, {"retouch_start": 0, "layout_steps": 2}], ids=str)
@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize("with_bank", [False, True])
def test_kept_keys_and_values_give_what_the_layouts_in_the_batch_give(pipes, kind, settings, with_bank):
    pipe, kwargs = pipes[kind], dict(settings)
    if with_bank:
        own = {name: x for name, x in settings.items() if name != "layout_steps"}
        bank = banked(pipe, **own)
        kwargs |= {"reference_bank": bank, "reference_mask": None}

    def both(**more):
        arguments = {**SHARED, "latents": NOISE, "reference_mask": MASK, "generator": seeded(), **kwargs, **more}
        reference = (None, None) if with_bank else (IMAGES[:1], "a sks ball")
        return pipe(PROMPTS, "a ball", *reference, ("sks", "ball"), **arguments)

    kept, again, on_cpu = both(), both(context_storage=None), both(context_storage="cpu")
    assert distance(kept.latents, again.latents) <= TOLERANCE
    assert torch.equal(kept.latents, on_cpu.latents)
    assert kept.rows["retouch"] < again.rows["retouch"]
    assert kept.contexts.bank is None  # an output does not hold it


def test_the_retouch_batch_is_the_targets_alone_with_a_bank(pipe):
    out = run(pipe)
    start = round(0.3 * STEPS)
    halves = 2 * len(PROMPTS)
    assert out.rows == {"layout": STEPS * halves, "retouch": (STEPS - start) * (halves + 2)}
    bank = banked(pipe)
    arguments = {**SHARED, "latents": NOISE}
    out = pipe(PROMPTS, "a ball", None, None, ("sks", "ball"), reference_bank=bank, **arguments)
    assert out.rows == {"layout": STEPS * halves, "retouch": (STEPS - start) * halves}
    assert set(out.seconds) == {"layout", "encode", "mask", "invert", "retouch"}


@pytest.mark.parametrize("contexts_from", ["trajectory", "renoise", "inversion"])
@pytest.mark.parametrize("targets_from", ["renoise", "contexts"])
def test_where_latents_come_from(pipe, contexts_from, targets_from):
    first = run(pipe, contexts_from=contexts_from, targets_from=targets_from)
    stages = pipe.layout(PROMPTS, "a ball", ("sks", "ball"), latents=NOISE, context_storage="cpu", **SHARED)
    arguments = {**SHARED, "contexts_from": contexts_from, "targets_from": targets_from, "reference_mask": MASK}
    second = pipe.retouch(PROMPTS, IMAGES[:1], "a sks ball", ("sks", "ball"), layout=stages, **arguments)
    assert distance(first.latents, second.latents) <= TOLERANCE
    reference = run(pipe, contexts_from=contexts_from, targets_from=targets_from, backend="reference")
    assert distance(first.latents, reference.latents) <= TOLERANCE


def test_layouts_of_another_scheduler_or_other_subjects_are_refused(pipe):
    stages = pipe.layout(PROMPTS, "a ball", [["sks"], ["ball"]], latents=NOISE, **SHARED)
    arguments = {**SHARED, "layout": stages, "reference_mask": MASK}
    with pytest.raises(ValueError, match=r"subject_tokens: expected \[\[.sks.\], \[.ball.\]\], as the layouts had"):
        pipe.retouch(PROMPTS, IMAGES[:1], "a sks ball", ("sks", "ball"), **arguments)
    euler = fresh("sd", **{**pipe.components, "scheduler": EulerDiscreteScheduler(), "requires_safety_checker": False})
    with pytest.raises(ValueError, match="scheduler: expected the one that the layouts were made with"):
        euler.retouch(PROMPTS, IMAGES[:1], "a sks ball", ("sks", "ball"), **arguments)


def test_targets_without_sharing_on_the_trajectory_are_the_layouts(pipe):
    out = run(pipe, retouch_start=1, retouch_end=1, targets_from="contexts", layout_steps=1)
    assert distance(out.latents, out.layout_images) <= TOLERANCE


@pytest.mark.fault(number=44)
def test_keys_and_values_beyond_the_limit_are_refused_before_any_step(pipe):
    steps = []
    with pytest.raises(ValueError, match=r"context_limit: expected at least [0-9]+ bytes, which .* got 1000"):
        run(pipe, context_limit=1000, callback_on_step_end=lambda *a: steps.append(a) or {})
    assert not steps
    layers = 3 * 64 * 16 + 4 * 16 * 32  # tokens and channels
    needed = 2 * 4 * (3 + 1) * 4 * layers  # key and value, rows, steps and the buffer of one, bytes
    assert torch.equal(run(pipe, context_limit=needed).latents, run(pipe).latents)
    with pytest.raises(ValueError, match=f"context_limit: expected at least {needed} bytes"):
        run(pipe, context_limit=needed - 1)


def test_a_controlnet_acts_on_contexts_alike_in_and_out_of_the_batch(pipe):
    parts = {**pipe.components, "requires_safety_checker": False, "controlnet": tiny_controlnet(pipe.unet)}
    controlled = fresh("sd", **parts)
    edges = torch.rand(1, 3, 16, 16, generator=seeded(4))
    kept, again = (run(controlled, control_image=edges, context_storage=where).latents for where in ("device", None))
    assert distance(kept, again) <= TOLERANCE


# Solvers


SCHEDULERS = {
    "ddim zero snr": tiny_scheduler(rescale_betas_zero_snr=True),
    "ddim linspace": DDIMScheduler(clip_sample=False, timestep_spacing="linspace"),
    "euler": EulerDiscreteScheduler(),
    "euler karras v": EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
    "dpm++": DPMSolverMultistepScheduler(),
    "dpm++ karras": DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "dpm++ v zero snr": DPMSolverMultistepScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
}


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [*(("sd", name) for name in SCHEDULERS), *(("xl", name) for name in ("ddim zero snr", "euler", "dpm++ karras"))],
)
def test_endpoints_are_the_stock_pipeline_with_the_same_scheduler(pipes, kind, scheduler):
    extra = {"sd": {"requires_safety_checker": False}, "xl": {"add_watermarker": False}}[kind]
    parts = {
        name: x for name, x in pipes[kind].components.items() if name in {"sd": components, "xl": components_xl}[kind]()
    }
    parts |= extra | {"scheduler": SCHEDULERS[scheduler]}
    pipe = fresh(kind, **parts, personalized_unet=pipes[kind].personalized_unet)
    shared = {**SHARED, "num_inference_steps": 7, "latents": NOISE}
    stock_class = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}[kind]

    def stock(unet, prompts):
        stock = stock_class(**{**parts, "unet": unet})
        stock.set_progress_bar_config(disable=True)
        return stock(prompts, **shared).images

    def close(found, expected):  # latents of random models grow where noise is what they predict
        return distance(found, expected) <= TOLERANCE * max(1, expected.abs().max())

    vanilla = pipe.layout(PROMPTS, "a ball", layout_steps=7, **shared).latents
    assert close(vanilla, stock(pipe.unet, ["a ball"] * 2))
    expected = stock(pipe.personalized_unet, PROMPTS)
    assert close(pipe.layout(PROMPTS, "a ball", layout_steps=0, **shared).latents, expected)
    alone = {"retouch_start": 1, "retouch_end": 1, "reference_mask": MASK}
    second = pipe.retouch(PROMPTS, IMAGES[:1], "a sks ball", ("sks", "ball"), **alone, **shared).latents
    assert close(second, expected)
    both = run(pipe, num_inference_steps=7)
    assert close(run(pipe, num_inference_steps=7, context_storage=None).latents, both.latents)


@pytest.mark.fault(number=16)
def test_eta_is_refused_where_the_scheduler_adds_no_noise(pipe):
    euler = fresh("sd", **{**pipe.components, "scheduler": EulerDiscreteScheduler(), "requires_safety_checker": False})
    with pytest.raises(NotImplementedError, match=r"eta: expected 0 for this scheduler, got 0\.5"):
        run(euler, eta=0.5)


# Where the subject is


def test_propagated_maps_are_the_dense_product():
    torch.manual_seed(0)
    maps = torch.rand(2, 3, 4, 5)
    layers = [torch.randn(2, 3, 20, 2, 8).unbind() for _ in range(2)]
    probabilities = [(torch.einsum("bnhd,bmhd->bhnm", q, k) * 8**-0.5).softmax(-1).mean(1) for q, k in layers]
    spread = torch.stack(probabilities).mean(0)
    expected = torch.einsum("bnm,bmk,sbk->sbn", spread, spread, maps.flatten(2)).unflatten(2, (4, 5))
    torch.testing.assert_close(propagated(maps, layers), expected)
    assert propagated(maps, []) is maps


def picture(rows):
    return torch.tensor([[x == "#" for x in row] for row in rows])


def test_specks_go_small_holes_are_filled_and_a_ring_keeps_its_own():
    found = picture(
        [
            "............",
            ".######.....",
            ".#....#...#.",
            ".#....#.....",
            ".#....#..###",
            ".######..#.#",
            ".........###",
        ]
    )
    ring, block = found.clone(), torch.zeros(12, 12, dtype=torch.bool)
    ring[:, 7:] = False
    block[1:9, 1:9] = True
    holed = block.clone()
    holed[3, 3] = False
    cleaned = without_specks(torch.stack([F.pad(found, (0, 0, 0, 5)), holed]))
    assert torch.equal(cleaned[0, :7], ring) and torch.equal(cleaned[1], block)


def test_regions_of_any_form_are_whole():
    """A snake through the picture is one region however long."""
    snake = torch.zeros(1, 17, 17, dtype=torch.bool)
    snake[0, ::2] = True
    snake[0, 1::4, -1] = snake[0, 3::4, 0] = True
    assert torch.equal(without_specks(snake), snake)


def test_grown_masks():
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    mask[0, 2, 2] = True
    assert grown(mask, 0) is mask and grown(mask, 1).sum() == 5 and grown(mask, 2).sum() == 13


def test_a_foreground_is_the_region_of_the_highest_values():
    maps = torch.zeros(1, 1, 8, 8)
    maps[0, 0, 2:5, 2:6] = 1.0
    maps[0, 0, 7, 7] = 0.9
    maps[0, 0, 5, 2:6] = 0.3  # warm, so the margin takes it
    maps[0, 0, 6, 2:6] = 0.3  # warm but beyond the margin
    expected = maps[0] == 1
    expected[0, 5, 2:6] = True
    assert torch.equal(foreground(maps, (8, 8), warm=0.2)[0], expected)
    assert torch.equal(foreground(maps, (8, 8))[0], grown(maps[0] == 1, 1))


def test_layers_whose_background_has_the_subjects_token_are_left_out():
    shown, missed = torch.zeros(1, 1, 6, 6), torch.ones(1, 1, 6, 6)
    shown[..., 2:4, 2:4], missed[..., 2:4, 2:4] = 1, 0
    assert torch.equal(mean_of_layers(torch.stack([shown, missed, shown])), shown)
    assert torch.equal(mean_of_layers(torch.stack([missed, missed])), missed)  # nothing else is known
    images = torch.stack([torch.cat([shown, missed], 1), torch.cat([missed, missed], 1)])
    assert torch.equal(mean_of_layers(images), torch.cat([shown, missed], 1))


def test_implausible_areas_are_warned_about(pipe):
    full, nothing = torch.ones(2, 8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)
    nothing[0, 0] = True
    with pytest.warns(RuntimeWarning, match=r"subject 0 is nowhere in layout 0; see mask_threshold"):
        run(pipe, mask_threshold=1.0)
    out = run(pipe, layout_mask=full)  # one's own is not doubted
    assert out.masks.all() and torch.equal(out.context_masks[0], full)
    with pytest.warns(RuntimeWarning, match=r"subject 0 is nowhere in layout 1; so says layout_mask"):
        run(pipe, layout_mask=[full[0], torch.zeros_like(full[0])])
    with pytest.raises(ValueError, match=r"layout_mask: expected 1 or 2 masks, as there are images, got 3"):
        run(pipe, layout_mask=[nothing] * 3)


# What is seen from outside


def test_maps_matches_and_a_sheet_on_request(pipe):
    out = run(pipe, return_maps=True, output_type="pt")
    assert out.maps.shape == (1, 2, 8, 8) and 0 <= out.maps.min() and out.maps.max() <= 1
    ((index, consistent, grid),) = out.matches
    assert index.shape == consistent.shape == (2, 64) and grid == (8, 8) and index.max() < 64
    assert torch.equal(out.reference_images, IMAGES[:1])
    sheet = out.draw()
    assert sheet.width > 2 * 192 and sheet.height > 5 * 192
    plain = run(pipe, output_type="pt")
    assert plain.maps is None and plain.matches is None and torch.equal(plain.latents, out.latents)


def test_callbacks_know_the_stage_and_bars_have_its_name(pipe):
    seen = []
    run(pipe, callback_on_step_end=lambda pipe, step, t, tensors: seen.append((pipe.stage, step)) or {})
    assert seen == [("layout", i) for i in range(STEPS)] + [("retouch", i) for i in range(1, STEPS)]
    text = io.StringIO()
    pipe.set_progress_bar_config(file=text, mininterval=0)
    try:
        run(pipe, reference_mask=None, contexts_from="inversion")
        banked(pipe)
    finally:
        pipe.set_progress_bar_config(disable=True)
    for stage in ("layout", "masks", "inversion", "retouch", "references"):
        assert f"{stage}: 100%" in text.getvalue()


def test_references_keep_their_aspect_ratio(pipe):
    wide = torch.rand(1, 3, 16, 32, generator=seeded(3))
    mask = torch.zeros(16, 32)
    mask[4:12, 12:20] = 1
    cropped = run(pipe, image=wide, reference_mask=mask)
    assert torch.equal(cropped.reference_images, wide[..., 8:24])
    assert cropped.reference_mask[0].nonzero().tolist() == [[i, j] for i in range(2, 6) for j in range(2, 6)]
    padded = run(pipe, image=wide, reference_mask=mask, reference_fit="pad")
    assert not padded.reference_mask[0, :2].any() and padded.reference_mask.sum() < cropped.reference_mask.sum()
    with pytest.raises(ValueError, match="reference_fit: expected one of crop, pad, squeeze, got 'stretch'"):
        run(pipe, reference_fit="stretch")
