"""The callbacks of diffusers in both stages: what they get and what they return, as the stock pipelines use it."""

import pytest
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    PipelineCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
    SDXLControlnetCFGCutoffCallback,
)
from tiny_models import TOLERANCE, components, components_xl, distance, tiny_controlnet
from tiny_pipelines import IMAGES, MASK, NOISE, PROMPTS, SHARED, STEPS, banked, fresh, run

pytestmark = pytest.mark.usefixtures("one_thread")

CUTOFF = {"sd": SDCFGCutoffCallback, "xl": SDXLCFGCutoffCallback}
KINDS = pytest.mark.parametrize("kind", ["sd", "xl"])
ONE = {**SHARED, "latents": NOISE[:1]}
EDGES = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def stock_of(pipe, kind, *, personalized, controlnet=None):
    """The stock pipeline of one of the models."""
    names = components() if kind == "sd" else components_xl()
    parts = {name: x for name, x in pipe.components.items() if name in names}
    parts["unet"] = pipe.personalized_unet if personalized else pipe.unet
    if controlnet is not None:
        parts["controlnet"] = controlnet
    if kind == "sd":
        stock = StableDiffusionPipeline if controlnet is None else StableDiffusionControlNetPipeline
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    else:
        stock = StableDiffusionXLPipeline if controlnet is None else StableDiffusionXLControlNetPipeline
        parts |= {"add_watermarker": False}
    result = stock(**parts)
    result.set_progress_bar_config(disable=True)
    return result


def as_stock(pipe, kind, callback, *, personalized, prompts=PROMPTS, **arguments):
    """(latents of the layout stage with one model alone, those of the stock pipeline) with a callback in both."""
    arguments = {**SHARED, "latents": NOISE[: len(prompts)], "callback_on_step_end": callback, **arguments}
    texts = prompts if personalized else ["a ball"] * len(prompts)
    expected = stock_of(pipe, kind, personalized=personalized)(texts, **arguments).images
    steps = 0 if personalized else STEPS
    return pipe.layout(prompts, "a ball", layout_steps=steps, **arguments).latents, expected


class Changing(PipelineCallback):
    """Replaces tensors and attributes in the middle of a run."""

    tensor_inputs = ("latents", "prompt_embeds")

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == 1:
            pipeline._guidance_scale = 3.5
            pipeline._guidance_rescale = 0.5
            callback_kwargs["prompt_embeds"] = callback_kwargs["prompt_embeds"].flip(1)
        callback_kwargs["latents"] = callback_kwargs["latents"] * 0.9
        return callback_kwargs


@pytest.mark.parametrize("personalized", [False, True])
@KINDS
def test_what_a_callback_changes_counts_as_in_the_stock_pipeline(pipes, kind, personalized):
    found, expected = as_stock(pipes[kind], kind, Changing(), personalized=personalized)
    assert distance(found, expected) <= TOLERANCE
    plain, _ = as_stock(pipes[kind], kind, None, personalized=personalized)
    assert distance(found, plain) > TOLERANCE


@pytest.mark.parametrize("personalized", [False, True])
@KINDS
def test_cutoff_callbacks_are_those_of_the_stock_pipeline(pipes, kind, personalized):
    """For one image: with several the stock pipelines fail, since the callback keeps the last prompt alone."""
    callback = CUTOFF[kind](cutoff_step_ratio=0.5)
    found, expected = as_stock(pipes[kind], kind, callback, personalized=personalized, prompts=PROMPTS[:1])
    assert distance(found, expected) <= TOLERANCE
    multiple = MultiPipelineCallbacks([callback, IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.5)])
    again, _ = as_stock(pipes[kind], kind, multiple, personalized=personalized, prompts=PROMPTS[:1])
    assert torch.equal(again, found)


@KINDS
def test_a_cutoff_keeps_every_images_prompt(pipes, kind):
    callback = CUTOFF[kind](cutoff_step_ratio=0.5)
    arguments = {**SHARED, "callback_on_step_end": callback, "layout_steps": 1}
    both = pipes[kind].layout(PROMPTS, "a ball", latents=NOISE, **arguments).latents
    for i, prompt in enumerate(PROMPTS):
        one = pipes[kind].layout(prompt, "a ball", latents=NOISE[i : i + 1], **arguments).latents
        assert distance(both[i : i + 1], one) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("sd", {}), ("xl", {}), ("sd", {"context_storage": None}), ("sd", {"reading": "swap"})],
    ids=str,
)
def test_guidance_ends_in_the_retouch_stage(pipes, kind, arguments):
    """The same as a scale of 1, for which the unconditional predictions are made and have no weight."""
    pipe = pipes[kind]

    def cut(pipe, step, t, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0

    def one(pipe, step, t, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0 + 1e-12  # the conditional prediction, by way of both

    ended, going_on = (run(pipe, callback_on_step_end=f, **arguments) for f in (cut, one))
    assert distance(ended.layout_images, going_on.layout_images) <= TOLERANCE
    assert distance(ended.latents, going_on.latents) <= TOLERANCE
    assert ended.rows["layout"] < going_on.rows["layout"]
    assert distance(ended.latents, run(pipe, **arguments).latents) > TOLERANCE


def test_a_reference_bank_serves_on_after_the_cut(pipe):
    def cut(pipe, step, t, tensors):
        if step == 2:
            pipe._guidance_scale = 0.0

    arguments = {**SHARED, "latents": NOISE, "callback_on_step_end": cut}
    words = PROMPTS, "a ball"
    found = pipe(*words, subject_tokens=("sks", "ball"), reference_bank=banked(pipe), **arguments)
    expected = pipe(*words, IMAGES[:1], "a sks ball", ("sks", "ball"), reference_mask=MASK, **arguments)
    assert distance(found.latents, expected.latents) <= TOLERANCE


@pytest.mark.parametrize("personalized", [False, True])
def test_the_cutoff_of_controlnets(pipes, personalized):
    pipe, net = pipes["xl"], tiny_controlnet(pipes["xl"].unet)
    callback = SDXLControlnetCFGCutoffCallback(cutoff_step_ratio=0.5)
    stock = stock_of(pipe, "xl", personalized=personalized, controlnet=net)
    arguments = {**ONE, "callback_on_step_end": callback}
    text = PROMPTS[0] if personalized else "a ball"
    expected = stock(text, image=EDGES, height=16, width=16, **arguments).images
    ours = fresh("xl", **{**pipe.components, "controlnet": net, "add_watermarker": False})
    steps = 0 if personalized else STEPS
    found = ours.layout(PROMPTS[0], "a ball", control_image=EDGES, layout_steps=steps, **arguments).latents
    assert distance(found, expected) <= TOLERANCE


@KINDS
def test_a_callback_gets_the_tensors_that_it_asks_for(pipes, kind):
    names = ["latents", "prompt_embeds", *(["add_text_embeds", "add_time_ids"] if kind == "xl" else [])]
    seen = {}

    def look(pipe, step, t, tensors):
        seen[pipe.stage, step] = {name: tuple(x.shape) for name, x in tensors.items()}
        assert pipe.guidance_scale == 2.0 and pipe.do_classifier_free_guidance and pipe.num_timesteps == STEPS

    run(pipes[kind], callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    shapes = {"latents": (2, 4, 8, 8), "prompt_embeds": (4, 24, 16 if kind == "sd" else 32)}
    shapes |= {"add_text_embeds": (4, 16), "add_time_ids": (4, 6)} if kind == "xl" else {}
    assert set(seen) == {("layout", i) for i in range(4)} | {("retouch", i) for i in range(1, 4)}
    assert all(x == shapes for x in seen.values())


@KINDS
def test_other_prompts_in_the_retouch_stage_change_the_image(pipes, kind):
    def forget(pipe, step, t, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * (0 if pipe.stage == "retouch" else 1)}

    plain = run(pipes[kind])
    out = run(pipes[kind], callback_on_step_end=forget, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert torch.equal(out.layout_images, plain.layout_images)
    assert distance(out.latents, plain.latents) > TOLERANCE


@KINDS
def test_an_unknown_tensor_is_the_stock_pipelines_error(pipes, kind):
    for names in (["latents", "noise"], ["image"]):
        with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs` has to be in"):
            run(pipes[kind], callback_on_step_end_tensor_inputs=names)
        with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs` has to be in"):
            stock_of(pipes[kind], kind, personalized=False)("a", callback_on_step_end_tensor_inputs=names)


@pytest.mark.parametrize("returned", [NOISE, None, torch.zeros(3, 24, 16)], ids=["latents", "none", "rows"])
def test_what_does_not_fit_is_named(pipe, returned):
    with pytest.raises(ValueError, match="callback_on_step_end: expected prompt_embeds of 4 rows from it"):
        run(pipe, callback_on_step_end=lambda *a: {"prompt_embeds": returned})


def test_guidance_that_begins_is_refused(pipe):
    def begin(pipe, step, t, tensors):
        pipe._guidance_scale = 5.0
        return {"prompt_embeds": tensors["prompt_embeds"].repeat(2, 1, 1)}

    with pytest.raises(ValueError, match="callback_on_step_end: expected guidance that ends, or stays"):
        run(pipe, guidance_scale=1.0, callback_on_step_end=begin, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_the_stage_is_none_after_a_call_and_after_an_exception(pipe):
    def stop_in(stage):
        def stop(pipe, step, t, tensors):
            if pipe.stage == stage:
                raise InterruptedError

        return stop

    assert pipe.stage is None
    run(pipe)
    assert pipe.stage is None
    for stage in ("layout", "retouch"):
        with pytest.raises(InterruptedError):
            run(pipe, callback_on_step_end=stop_in(stage))
        assert pipe.stage is None
    banked(pipe)
    assert pipe.stage is None
