"""What users do around the Flux pipeline: callbacks, LoRAs, offloading, embeddings, other models and dtypes."""

import copy

import pytest
import torch
from diffusers import AutoencoderTiny, FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from model_changes import OFFLOADS
from peft import LoraConfig, inject_adapter_in_model
from tiny_flux import (
    IMAGE,
    LAYOUT_PROMPTS,
    MASK,
    NOISE,
    PROMPTS,
    SHARED,
    SIDE,
    STEPS,
    fresh,
    laid_out,
    parts,
    retouched,
    tiny,
    transformer,
    whole,
    with_lora,
)
from tiny_models import TOLERANCE, distance

from lr_kernels.diffusers.dit.flux.inputs import subject_places
from lr_kernels.diffusers.dit.flux.models import PersonalizedFluxPipeline
from lr_kernels.diffusers.dit.flux.pipeline import FluxLayoutRetouchPipeline

pytestmark = pytest.mark.usefixtures("one_thread")


def test_embeddings_stand_for_prompts():
    pipe = tiny()
    with torch.no_grad():
        made = {text: pipe.encode_prompt([text], max_sequence_length=16) for text in ("a sks ball", "ball at sea")}
    given = {**SHARED, "height": SIDE, "width": SIDE, "latents": NOISE[:1], "reference_mask": MASK, "layout_mask": MASK}
    texts = "a sks ball", "ball at sea", "a sks ball"
    of_text = pipe(texts[0], texts[1], IMAGE, texts[2], **given)
    pipe.disable_lora()  # of which the text encoders have none
    pipe.enable_lora()
    pipe.transformer.requires_grad_(False)
    found = pipe(made[texts[0]], made[texts[1]][:2], IMAGE, made[texts[2]], **given)
    assert torch.equal(found.images, of_text.images)


def test_a_callback_sees_and_changes_both_stages():
    pipe = tiny()
    seen = []

    def look(pipe, step, t, tensors):
        seen.append((pipe.stage, step, sorted(tensors), len(tensors["latents"]), pipe.num_timesteps))
        return {}

    names = ["latents", "prompt_embeds"]
    found = whole(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names, retouch_start=2)
    assert torch.equal(found.images, whole(pipe, retouch_start=2).images)
    assert seen == [("layout", i, names, 2, STEPS) for i in range(STEPS)] + [
        ("retouch", i, names, 2, STEPS - 2) for i in range(2, STEPS)
    ]
    assert pipe.stage is None

    def zero(pipe, step, t, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else None

    found = whole(pipe, callback_on_step_end=zero)
    assert not found.images.any() and not found.layout_images.any()

    def other_prompt(pipe, step, t, tensors):
        return {"prompt_embeds": -tensors["prompt_embeds"]} if pipe.stage == "retouch" else {}

    changed = whole(pipe, callback_on_step_end=other_prompt, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert distance(changed.images, whole(pipe).images) > TOLERANCE


def test_a_callback_is_told_of_the_prompt_of_the_larger_weight():
    pipe, seen = tiny(), []

    def look(pipe, step, t, tensors):
        seen.append(tensors["prompt_embeds"])

    laid_out(pipe, layout_steps=2, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with torch.no_grad():
        vanilla, personal = (pipe.encode_prompt(x, max_sequence_length=16)[0] for x in (LAYOUT_PROMPTS, PROMPTS))
    assert all(torch.equal(x, y) for x, y in zip(seen, [vanilla] * 2 + [personal] * 3, strict=True))


def test_offloaded_models_are_freed_once_per_call(monkeypatch):
    pipe, freed = tiny(), []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(1))
    layout = laid_out(pipe)
    retouched(pipe, layout)
    whole(pipe)
    assert len(freed) == 3


def test_an_interrupted_layout_is_returned_as_it_is():
    pipe = tiny()

    def stop(pipe, step, t, tensors):
        pipe._interrupt = step == 1
        return tensors

    found = whole(pipe, callback_on_step_end=stop)
    assert torch.equal(found.images, found.layout_images) and found.layouts is None
    with pytest.raises(TypeError, match=r"layout: expected what layout\(\) has returned, got an interrupted one"):
        retouched(pipe, laid_out(pipe, callback_on_step_end=stop))
    assert whole(pipe).layouts is not None


@pytest.mark.fault(number=16)
def test_nothing_in_the_models_is_changed_by_a_call():
    pipe = fresh()
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    layer.lora_A["subject"].weight.requires_grad_(True)
    before = dict(pipe.transformer.attn_processors)
    whole(pipe, layout_blend="linear")

    def breaks(*_):
        raise KeyError("stop")

    def breaks_off_retouching(pipe, *_):
        if pipe.stage == "retouch":
            breaks()

    for callback in (breaks, breaks_off_retouching):
        with pytest.raises(KeyError):
            whole(pipe, callback_on_step_end=callback)
    for switch in (0, STEPS):  # in a pass of the personalized model, and in one with its LoRA off
        hook = pipe.transformer.proj_out.register_forward_hook(breaks)
        with pytest.raises(KeyError):
            whole(pipe, layout_steps=switch)
        hook.remove()
    assert pipe.stage is None and pipe.current_timestep is None
    assert layer.active_adapters == ["subject"] and not layer.disable_adapters
    assert layer.lora_A["subject"].weight.requires_grad and not layer.lora_B["subject"].weight.requires_grad
    assert pipe.transformer.attn_processors == before


def test_processors_replaced_during_a_call_are_warned_of_once():
    pipe = fresh()

    def replace(pipe, step, *_):
        if pipe.stage == "retouch":
            pipe.transformer.set_attn_processor(FluxAttnProcessor())

    with pytest.warns(RuntimeWarning, match="attention processors were replaced") as caught:
        whole(pipe, callback_on_step_end=replace, retouch_start=0)
    assert sum("were replaced" in str(w.message) for w in caught) == 1


def test_only_the_named_adapters_personalize():
    model = with_lora(transformer(), "subject", "style")
    pipe = fresh(transformer=model, personalized_adapters="subject")
    vanilla = laid_out(pipe, layout_steps=STEPS).latents
    model.set_adapters(["style"])
    styled = FluxPipeline(**{**parts(), "transformer": model})
    styled.set_progress_bar_config(disable=True)
    assert torch.equal(vanilla, styled(LAYOUT_PROMPTS, **SHARED, height=SIDE, width=SIDE, latents=NOISE).images)
    with pytest.raises(ValueError, match=r"personalized_adapters: expected some of the active ones, \['style'\]"):
        laid_out(pipe)


def test_adapters_of_a_text_encoder_personalize_too():
    pipe = fresh(text_encoder=copy.deepcopy(parts()["text_encoder"]))
    before = laid_out(pipe)
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, pipe.text_encoder)
    after = laid_out(pipe)
    assert torch.equal(whole(pipe).layout_images, after.images)
    assert torch.equal(after.layouts.trajectory[1], before.layouts.trajectory[1])
    assert distance(after.latents, before.latents) > TOLERANCE


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_transformer_gives_the_same_images(offload):
    pipe, given = fresh(), {"subject_tokens": "ball", "reference_mask": None, "mask_blending": True}
    expected = whole(pipe, **given)
    offload(pipe.transformer)
    assert torch.equal(whole(pipe, **given).images, expected.images)


def test_a_pipeline_comes_from_another_in_its_dtype():
    stock = FluxPipeline(**copy.deepcopy(parts()), transformer=transformer().to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"from_pipe: dtype: expected a dtype, .*encoder torch.float32, .*bfloat16"):
        FluxLayoutRetouchPipeline.from_pipe(stock, personalized_transformer=transformer(1))
    assert stock.text_encoder.dtype == torch.float32
    with pytest.raises(TypeError, match="personalized_transformer: expected a FluxTransformer2DModel or None, got str"):
        FluxLayoutRetouchPipeline.from_pipe(stock, personalized_transformer="x")
    stock.to(torch.bfloat16)
    personal = transformer(1).to(torch.bfloat16)
    pipe = FluxLayoutRetouchPipeline.from_pipe(stock, personalized_transformer=personal)
    assert isinstance(pipe, PersonalizedFluxPipeline)
    assert pipe.transformer.dtype == pipe.personal_transformer.dtype == torch.bfloat16
    pipe.set_progress_bar_config(disable=True)
    found = whole(pipe)
    assert found.images.dtype == torch.bfloat16 and found.images.isfinite().all()
    assert not torch.equal(found.images, whole(pipe, sharing=False).images)


def test_a_tiny_autoencoder_serves_too():
    vae = AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip
    stock = FluxPipeline(**{**parts(), "vae": vae}, transformer=transformer())
    pipe = FluxLayoutRetouchPipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae is vae and whole(pipe, output_type="pt").images.shape == (2, 3, SIDE, SIDE)


def test_words_are_found_behind_an_embedding_of_several_vectors():
    pipe = fresh(tokenizer_2=copy.deepcopy(parts()["tokenizer_2"]))
    before = subject_places(pipe, "prompt", "a <sks> ball", 2, ["ball"], 24)
    pipe.tokenizer_2.add_tokens(["<sks>", "<sks>_1"])
    converted = pipe.maybe_convert_prompt("a <sks> ball", pipe.tokenizer_2)
    assert converted == "a <sks> <sks>_1 ball"
    found = subject_places(pipe, "prompt", "a <sks> ball", 2, ["ball"], 24)
    start = pipe.tokenizer_2(converted).input_ids.index(pipe.tokenizer_2("b", add_special_tokens=False).input_ids[0])
    assert found.indices.tolist() == [list(range(start, start + 4))] * 2 and not found.indices.equal(before.indices)
    of_embedding = subject_places(pipe, "prompt", "a <sks> ball", 1, ["<sks>"], 24)
    assert of_embedding.indices.shape[1] > 1


def test_a_cache_of_the_transformer_stays_in_its_passes():
    """Batches of all sizes go through a model that keeps blocks' results from pass to pass."""
    pipe, given = fresh(), {"subject_tokens": "ball", "reference_mask": None, "layout_mask": None}
    expected = whole(pipe, **given, mask_blending=True, retouch_end=4)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))  # no pass is near enough to another one
    for _ in range(2):
        assert torch.equal(whole(pipe, **given, mask_blending=True, retouch_end=4).images, expected.images)


def test_models_without_guidance_embedding_and_fixed_shift_run():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = fresh(transformer=with_lora(transformer(guidance_embeds=False), "subject"), scheduler=scheduler)
    stock = FluxPipeline(**{**parts(), "transformer": pipe.transformer, "scheduler": scheduler})
    stock.set_progress_bar_config(disable=True)
    found = laid_out(pipe, layout_steps=0)
    assert torch.equal(found.latents, stock(PROMPTS, **SHARED, height=SIDE, width=SIDE, latents=NOISE).images)
    assert retouched(pipe, found).images.isfinite().all()
