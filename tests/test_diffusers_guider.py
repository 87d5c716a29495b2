"""StepBlendGuidance in a real modular SDXL pipeline of tiny random models."""

import itertools
import math

import pytest
import tiny_models
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, UNet2DConditionModel
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from lr_kernels.diffusers.guider import StepBlendGuidance

STEPS = 4
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
PROMPTS = ["a sks ball", "sks ball at sea"]
LAYOUT_PROMPTS = ["a ball", "ball at sea"]


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_unet(seed: int) -> UNet2DConditionModel:
    return tiny_models.tiny_unet(seed, **tiny_models.XL_UNET)


def add_lora(unet: UNet2DConditionModel, name: str, seed: int) -> None:
    """An adapter that changes the predictions."""
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]), name)


@pytest.fixture(scope="module")
def parts() -> dict:
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    built = tiny_models.components_xl()
    return {name: built[name] for name in names}


@pytest.fixture(scope="module")
def layout_inputs(parts) -> dict:
    """The embeddings of the prompts without the subject, by the names of SDXL's guider inputs."""
    encode = StableDiffusionXLAutoBlocks().sub_blocks["text_encoder"].init_pipeline()
    encode.update_components(**{name: part for name, part in parts.items() if name != "vae"})
    state = encode(prompt=LAYOUT_PROMPTS)
    return {"prompt_embeds": state.get("prompt_embeds"), "text_embeds": state.get("pooled_prompt_embeds")}


@pytest.fixture
def pipe(parts):
    """Its denoiser is a vanilla UNet, of seed 0, with the adapter "subject"."""
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    unet = tiny_unet(0)
    add_lora(unet, "subject", 1)
    pipe.update_components(**parts, unet=unet, scheduler=EulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, guider, prompt=PROMPTS, steps=STEPS, unet=None) -> torch.Tensor:
    """The latents; a UNet is put in for this run alone."""
    own = pipe.unet
    pipe.update_components(guider=guider, unet=own if unet is None else unet)
    try:
        return pipe(
            prompt=prompt,
            negative_prompt="b",
            num_inference_steps=steps,
            height=16,
            width=16,
            latents=NOISE,
            output_type="latent",
            output="latents",
        )
    finally:
        pipe.update_components(unet=own)


def blending(layout_inputs, **kwargs) -> StepBlendGuidance:
    guider = StepBlendGuidance(**{"guidance_scale": 3.0, **kwargs})
    guider.set_layout_inputs(**layout_inputs)
    return guider


def state_of(unet) -> list:
    """All that a guider may change of the UNet and of its adapter layers."""
    layers = [vars(module).copy() for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    return [vars(unet).copy(), layers, [p.requires_grad for p in unet.parameters()]]


def record(unet) -> list:
    """Grows with each call of the UNet, by (active adapters, prompt embeddings, prediction)."""
    calls = []
    layer = next((module for module in unet.modules() if isinstance(module, BaseTunerLayer)), None)

    def note(module, args, kwargs, out):
        calls.append((() if layer is None else tuple(layer.active_adapters), kwargs["encoder_hidden_states"], out[0]))

    unet.register_forward_hook(note, with_kwargs=True)
    return calls


# The images


@pytest.mark.parametrize("kind", ["lora", "vanilla"])
@pytest.mark.parametrize("guidance", [{"guidance_scale": 1.0}, {"guidance_scale": 3.0, "start": 0.25, "stop": 0.75}])
def test_endpoints_are_classifier_free_guidance_bitwise(pipe, layout_inputs, kind, guidance):
    other = tiny_unet(0 if kind == "lora" else 2)
    vanilla = run(pipe, ClassifierFreeGuidance(**guidance), LAYOUT_PROMPTS, unet=other)
    personalized = run(pipe, ClassifierFreeGuidance(**guidance))
    assert not torch.equal(vanilla, personalized)

    def latents(**kwargs):
        return run(pipe, blending(layout_inputs, vanilla=None if kind == "lora" else other, **guidance, **kwargs))

    assert torch.equal(latents(layout_steps=STEPS), vanilla)
    assert torch.equal(latents(layout_blend=[0.0] * STEPS), vanilla)
    assert torch.equal(latents(layout_steps=0), personalized)
    assert torch.equal(latents(layout_blend=lambda step: 1), personalized)


def test_other_options_of_classifier_free_guidance(pipe, layout_inputs):
    options = {"guidance_scale": 2.0, "guidance_rescale": 0.7, "use_original_formulation": True}
    vanilla = run(pipe, ClassifierFreeGuidance(**options), LAYOUT_PROMPTS, unet=tiny_unet(0))
    assert torch.equal(run(pipe, blending(layout_inputs, layout_steps=STEPS, **options)), vanilla)


def test_soft_blend_is_the_formula(pipe, layout_inputs):
    """One step with a record of its four predictions."""
    guider = blending(layout_inputs, layout_blend=[0.3])
    guided = []
    forward = guider.forward
    guider.forward = lambda **predictions: guided.append(forward(**predictions)) or guided[-1]
    calls = record(pipe.unet)
    run(pipe, guider, steps=1)
    (off, rows, layout), (_, _, layout_un), (on, own_rows, own), (_, _, own_un) = calls
    assert (off, on) == ((), ("subject",))
    assert torch.equal(rows, layout_inputs["prompt_embeds"]) and not torch.equal(rows, own_rows)
    expected = 0.7 * (layout_un + 3 * (layout - layout_un)) + 0.3 * (own_un + 3 * (own - own_un))
    torch.testing.assert_close(guided[0].pred, expected)
    torch.testing.assert_close(guided[0].pred_cond, 0.7 * layout + 0.3 * own)


def test_soft_blend_in_bfloat16_is_rounded_once():
    guider = StepBlendGuidance(guidance_scale=3.0, layout_blend=[0.3])
    guider.set_state(0, 1, torch.tensor(999))
    names = ["layout_cond", "layout_uncond", "pred_cond", "pred_uncond"]
    low = {name: x.bfloat16() for name, x in zip(names, torch.randn(4, 2, 4, 8, 8).unbind())}
    expected = guider.forward(**{name: x.float() for name, x in low.items()}).pred
    assert torch.equal(guider.forward(**low).pred, expected.bfloat16())


def test_a_switch_differs_from_both_models_and_is_deterministic(pipe, layout_inputs):
    latents = [run(pipe, blending(layout_inputs, layout_steps=n)) for n in (0, 1, 2, STEPS)]
    assert all(x.isfinite().all() for x in latents)
    assert all(not torch.equal(x, y) for x, y in itertools.pairwise(latents))
    assert torch.equal(run(pipe, blending(layout_inputs, layout_steps=2)), latents[2])


def test_without_layout_inputs_the_prompt_is_the_pipelines(pipe, layout_inputs):
    guider = blending(layout_inputs, layout_steps=STEPS)
    guider.set_layout_inputs()
    assert torch.equal(run(pipe, guider), run(pipe, ClassifierFreeGuidance(guidance_scale=3.0), unet=tiny_unet(0)))


def test_only_named_adapters_are_switched_off(pipe, layout_inputs):
    style = tiny_unet(0)
    add_lora(style, "style", 3)
    add_lora(pipe.unet, "style", 3)
    pipe.unet.set_adapters(["subject", "style"])
    before = state_of(pipe.unet)
    expected = run(pipe, ClassifierFreeGuidance(guidance_scale=3.0), LAYOUT_PROMPTS, unet=style)
    assert torch.equal(run(pipe, blending(layout_inputs, layout_steps=STEPS, adapters=("subject",))), expected)
    assert state_of(pipe.unet) == before


# What runs


@pytest.mark.parametrize(
    "guidance, calls_of_a_step", [(3.0, [2, 4, 4, 2]), (1.0, [1, 2, 2, 1])], ids=["guided", "not guided"]
)
@pytest.mark.parametrize("kind", ["lora", "vanilla"])
def test_only_the_models_that_a_step_needs_run(pipe, layout_inputs, kind, guidance, calls_of_a_step):
    other = tiny_unet(2)
    guider = blending(
        layout_inputs,
        layout_blend=torch.tensor([0, 0.25, 0.75, 1]),
        guidance_scale=guidance,
        vanilla=None if kind == "lora" else other,
    )
    own_calls, other_calls = record(pipe.unet), record(other)
    counts = []
    forward = guider.forward

    def count(**predictions):
        counts.append(guider.num_conditions)
        return forward(**predictions)

    guider.forward = count
    run(pipe, guider)
    assert counts == calls_of_a_step
    per_model = calls_of_a_step[0]
    if kind == "vanilla":
        assert len(other_calls) == 3 * per_model
    else:
        assert not other_calls
        assert [names for names, _, _ in own_calls] == [
            *[()] * per_model,
            *([()] * per_model + [("subject",)] * per_model) * 2,
            *[("subject",)] * per_model,
        ]
    assert len(own_calls) == 6 * per_model  # hooks of the denoiser run around the other module as well


def test_the_switch_is_after_three_tenths_by_default():
    guider = StepBlendGuidance()
    weights = []
    for step in range(10):
        guider.set_state(step, 10, torch.tensor(0))
        weights.append(guider._weight)
    assert weights == [0.0] * 3 + [1.0] * 7


def test_the_conditional_pass_of_a_model_is_first():
    guider = StepBlendGuidance(layout_blend=[0.5], vanilla=torch.nn.Identity())
    guider.set_state(0, 1, torch.tensor(0))
    denoiser, seen = torch.nn.Identity(), []
    for _ in range(guider.num_conditions):
        guider.prepare_models(denoiser)
        seen.append(guider.is_conditional)
        guider.cleanup_models(denoiser)
    assert seen == [True, False, True, False]


def test_inputs_from_a_block_state(layout_inputs):
    """The other way in which pipelines hand over their inputs."""
    guider = blending({"encoder_hidden_states": torch.zeros(2, 3)}, layout_blend=[0.5])
    guider.set_state(0, 1, torch.tensor(0))
    state = BlockState(prompt_embeds=torch.ones(2, 3), negative_prompt_embeds=torch.full((2, 3), 2.0))
    fields = {"encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds")}
    batches = guider.prepare_inputs_from_block_state(state, fields)
    assert [x.encoder_hidden_states[0, 0].item() for x in batches] == [0, 2, 1, 2]


# The denoiser is given back


@pytest.mark.parametrize("kind", ["lora", "vanilla"])
@pytest.mark.fault(number=36)
def test_the_denoiser_is_back_after_a_run_and_after_an_exception(pipe, layout_inputs, kind):
    other = tiny_unet(2)
    guider = blending(layout_inputs, layout_blend="linear", layout_steps=1, vanilla=None if kind == "lora" else other)
    before = state_of(pipe.unet)
    expected = run(pipe, guider)
    assert state_of(pipe.unet) == before

    def stop(module, args, out):
        raise InterruptedError

    handle = (pipe.unet.mid_block if kind == "lora" else other.mid_block).register_forward_hook(stop)
    with pytest.raises(InterruptedError):
        run(pipe, guider)
    handle.remove()
    assert state_of(pipe.unet) != before
    guider.reset()
    assert state_of(pipe.unet) == before
    assert torch.equal(run(pipe, guider), expected)


@pytest.mark.fault(number=36)
def test_another_guider_restores_what_an_exception_left(pipe):
    before = state_of(pipe.unet)
    first, second = StepBlendGuidance(layout_steps=1), StepBlendGuidance(layout_steps=0)
    for guider in (first, second):
        guider.set_state(0, 1, torch.tensor(999))
        guider.prepare_models(pipe.unet)
    assert state_of(pipe.unet) == before and first is not second


@pytest.mark.parametrize("resume", ["set_state", "prepare_models"])
@pytest.mark.fault(number=36)
def test_the_next_step_restores_what_an_exception_left(pipe, resume):
    guider = StepBlendGuidance(layout_blend=[0.0, 1.0])
    before = state_of(pipe.unet)
    guider.set_state(0, 2, torch.tensor(999))
    guider.prepare_models(pipe.unet)
    assert state_of(pipe.unet) != before
    if resume == "set_state":
        guider.set_state(1, 2, torch.tensor(1))
    else:
        guider._weight = 1.0
        guider.prepare_models(pipe.unet)
    assert state_of(pipe.unet) == before


@pytest.mark.fault(number=36)
def test_a_forward_of_the_instance_is_put_back():
    """Hooks of accelerate and diffusers set one."""
    denoiser, vanilla = torch.nn.Identity(), torch.nn.Tanh()
    denoiser.forward = own = torch.sin
    guider = StepBlendGuidance(layout_steps=1, vanilla=vanilla)
    guider.set_state(0, 1, torch.tensor(0))
    x = torch.linspace(-1, 1, 5)
    guider.prepare_models(denoiser)
    assert torch.equal(denoiser(x), x.tanh())
    assert not list(denoiser.children())
    guider.cleanup_models(denoiser)
    assert denoiser.forward is own


@pytest.mark.parametrize("kind", ["in place", "wrapper"])
def test_a_compiled_denoiser_calls_the_other_module(kind):
    denoiser, vanilla = torch.nn.Linear(3, 3), torch.nn.Tanh()
    if kind == "in place":
        denoiser.compile(backend="eager")
    else:
        denoiser = torch.compile(denoiser, backend="eager")
    guider = StepBlendGuidance(layout_steps=1, vanilla=vanilla)
    guider.set_state(0, 1, torch.tensor(0))
    x = torch.linspace(-1, 1, 3)
    own = denoiser(x)
    guider.prepare_models(denoiser)
    assert torch.equal(denoiser(x), x.tanh())
    guider.cleanup_models(denoiser)
    assert torch.equal(denoiser(x), own)


def test_a_compiled_denoiser_follows_its_adapters(pipe):
    guider = StepBlendGuidance(layout_steps=1)
    guider.set_state(0, 1, torch.tensor(0))
    layer = next(module for module in pipe.unet.modules() if isinstance(module, BaseTunerLayer))
    compiled = torch.compile(layer, backend="eager")
    x = torch.randn(2, layer.in_features)
    own = layer(x)
    assert torch.equal(compiled(x), own)
    guider.prepare_models(compiled)
    assert torch.equal(compiled(x), layer.base_layer(x))
    guider.cleanup_models(compiled)
    assert torch.equal(compiled(x), own)


# Config


def test_config_round_trip(tmp_path):
    settings = {
        "guidance_scale": 2.5,
        "layout_steps": 3,
        "layout_blend": "cosine",
        "adapters": ["subject"],
        "stop": 0.5,
    }
    StepBlendGuidance(**settings).save_pretrained(tmp_path)
    loaded = StepBlendGuidance.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in settings} == settings
    assert (loaded.guidance_scale, loaded.layout_steps, loaded.layout_blend) == (2.5, 3, "cosine")
    assert "cosine" in repr(loaded) and "vanilla" not in loaded.config


@pytest.mark.parametrize("weights", [[0.0, 0.5], (0.0, 0.5), torch.tensor([0.0, 0.5])], ids=["list", "tuple", "tensor"])
def test_weights_are_saved_as_a_list(tmp_path, weights):
    StepBlendGuidance(layout_blend=weights).save_pretrained(tmp_path)
    assert StepBlendGuidance.from_pretrained(tmp_path).layout_blend == [0.0, 0.5]


def test_new_keeps_what_the_config_cannot():
    guider = StepBlendGuidance(layout_steps=3, layout_blend=lambda step: 0.5, vanilla=torch.nn.Identity())
    copy = guider.new(guidance_scale=2.0)
    assert (copy.guidance_scale, copy.layout_steps) == (2.0, 3)
    assert copy.layout_blend is guider.layout_blend and copy.vanilla is guider.vanilla
    assert guider.new(vanilla=None).vanilla is None


def test_a_function_is_asked_for_again(tmp_path):
    StepBlendGuidance(layout_blend=lambda step: 0.5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layout_blend: expected a name, weights or a function, got None"):
        StepBlendGuidance.from_pretrained(tmp_path)
    assert StepBlendGuidance.from_pretrained(tmp_path, layout_blend="linear").layout_blend == "linear"


# Errors


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.5])
@pytest.mark.parametrize("kind", ["list", "function"])
@pytest.mark.fault(number=34)
def test_blend_weight_outside_its_range(pipe, layout_inputs, kind, bad):
    weights = [0, 0, bad, 1]
    calls = record(pipe.unet)
    with pytest.raises(ValueError, match=r"layout_blend\[2\]: expected a weight in \[0, 1\], got"):
        run(pipe, blending(layout_inputs, layout_blend=weights if kind == "list" else weights.__getitem__))
    assert not calls


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"layout_steps": 5}, "layout_steps: expected 0 to 4, got 5"),
        ({"layout_steps": -1}, "layout_steps: expected 0 to 4, got -1"),
        ({"layout_blend": [0, 1]}, "layout_blend: expected 4 weights, one per step, got 2"),
        ({"layout_blend": "sudden"}, "one of hard, linear, cosine, got 'sudden'"),
        ({"adapters": ["style"]}, r"adapters: expected some of the active ones, \['subject'\], got \['style'\]"),
        ({"adapters": []}, r"adapters: expected some of the active ones, \['subject'\], got \[\]"),
    ],
)
@pytest.mark.fault(number=34)
def test_errors_name_the_argument(pipe, layout_inputs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, blending(layout_inputs, **kwargs))


@pytest.mark.fault(number=34)
def test_guidance_scale_is_finite():
    with pytest.raises(ValueError, match="guidance_scale: expected a finite number, got nan"):
        StepBlendGuidance(guidance_scale=math.nan)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"prompt": torch.zeros(2, 24, 32)}, "prompt.*: expected one of prompt_embeds, time_ids, text_embeds, got"),
        ({"image_embeds": torch.zeros(2, 1, 32)}, "image_embeds.*: expected one of prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 24, 32)}, r"\(prompt_embeds\): expected 2 rows, one per image, got 1"),
    ],
    ids=["unknown name", "input that the pipeline lacks", "rows"],
)
@pytest.mark.fault(number=34)
def test_layout_inputs_that_do_not_fit(pipe, inputs, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, blending(inputs))


def test_a_denoiser_without_a_vanilla_model_is_refused(pipe, layout_inputs):
    with pytest.raises(ValueError, match="vanilla: expected a model, or a denoiser that has active adapters"):
        run(pipe, blending(layout_inputs), unet=tiny_unet(0))
    pipe.unet.disable_adapters()
    with pytest.raises(ValueError, match="vanilla: expected a model, or a denoiser that has active adapters"):
        run(pipe, blending(layout_inputs))


def test_fused_adapters_are_refused(pipe, layout_inputs):
    pipe.unet.fuse_lora()
    with pytest.raises(ValueError, match="adapters: expected adapters that are not fused, got fused ones"):
        run(pipe, blending(layout_inputs))


def test_schedulers_of_several_calls_a_step_are_refused(pipe, layout_inputs):
    pipe.update_components(scheduler=HeunDiscreteScheduler())
    with pytest.raises(
        ValueError, match="step: expected 0 to 3, got 4; a scheduler that calls the model more than once"
    ):
        run(pipe, blending(layout_inputs))
