"""Bad input of the Flux pipeline is named before a model runs."""

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0
from tiny_flux import (
    IMAGE,
    MASK,
    NOISE,
    PROMPTS,
    REFERENCE,
    SHARED,
    SIDE,
    STEPS,
    fresh,
    laid_out,
    retouched,
    tiny,
    transformer,
    whole,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def no_model_runs(pipe, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model runs")

    for model in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        monkeypatch.setattr(model, "forward", refuse)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sharing": 1}, "sharing: expected True or False, got 1"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected a positive integer"),
        ({"layout_steps": 0.3}, "layout_steps: expected 0 to 5, got 0.3; a number of steps"),
        ({"retouch_start": STEPS}, "retouch_start: expected 0 to 4, got 5"),
        ({"retouch_start": 3, "retouch_end": 2}, "retouch_end: expected 3 to 5, got 2"),
        ({"layout_blend": "quadratic"}, "layout_blend: expected one of hard, linear, cosine"),
        ({"contexts_from": "inversion"}, "contexts_from: expected one of trajectory, renoise"),
        ({"targets_from": "noise"}, "targets_from: expected one of"),
        ({"output_type": "jpg"}, "output_type: expected one of"),
        ({"reference_offset": (1, 2)}, "reference_offset: expected three numbers"),
        ({"retouch_layers": ["down_blocks"]}, "retouch_layers: expected the beginning of a layer's name"),
        ({"retouch_layers": []}, "retouch_layers: expected beginnings of layer names"),
        ({"max_sequence_length": 600}, "max_sequence_length: expected 1 to 512"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a finite number"),
        ({"height": 18}, "height: expected a multiple of 4, got 18"),
        ({"latents": NOISE[:1]}, r"latents: expected shape \(2, 16, 16\), packed, got \(1, 16, 16\)"),
        ({"latents": NOISE * torch.nan}, "latents: expected finite numbers"),
        ({"generator": [torch.Generator()]}, "generator: expected one, or 2, one per image, got 1"),
        ({"generator": 3}, "generator: expected a torch.Generator"),
        ({"generator": [torch.Generator(), 3]}, "generator: expected a torch.Generator, or a list of them, got int"),
        ({"image": []}, "reference_image: expected at least one image, got none"),
        ({"image": IMAGE * torch.nan}, "reference_image: expected finite numbers, got NaN or Inf"),
        ({"image": 255 * IMAGE}, "reference_image: expected floating numbers in .0, 1., got numbers from"),
        ({"image": IMAGE[:, :2]}, "reference_image: expected shape .height, width., with 1, 3 or 4 channels"),
        ({"image": "dog.png"}, "reference_image: expected a PIL image, an array or a tensor, got str"),
        ({"reference_fit": "stretch"}, "reference_fit: expected one of crop, pad, squeeze, got 'stretch'"),
        ({"reference_mask": MASK & False}, "reference_mask: expected a foreground, got none"),
        ({"reference_mask": [MASK, MASK]}, "reference_mask: expected 1 masks, got 2; several are a list"),
        ({"reference_mask": 3.0 * MASK}, "reference_mask: expected a foreground, got none; .*pass mask > 0"),
        ({"reference_mask": MASK[:, :20]}, "reference_mask: expected the proportions of its picture, 16 x 16"),
        ({"layout_mask": [MASK, MASK & False]}, r"layout_mask\[1\]: expected a foreground, got none"),
        ({"layout_mask": None}, "layout_mask: expected a mask, since there are no subject_tokens"),
        ({"layout_mask": None, "subject_tokens": "dog"}, "subject_tokens: expected words of the prompt 'a sks ball'"),
        ({"subject_tokens": [["ball"], ["sea"]]}, "subject_tokens: expected words of the prompts that stand for"),
        ({"mask_threshold": 2}, "mask_threshold: expected 'otsu' or a number"),
        ({"layout_mask": [MASK] * 3}, "layout_mask: expected 1 or 2 masks, got 3"),
        ({"callback_on_step_end": 1}, "callback_on_step_end: expected a function"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"tensor_inputs: expected names of \['latents'"),
        ({"callback_on_step_end_tensor_inputs": [["latents"]]}, r"tensor_inputs: expected names of \['latents'"),
        ({"backend": "cudnn"}, "backend: expected one of auto, cuda, triton, cpu, reference, got 'cudnn'"),
        ({"sharing": False, "retouch_layers": ["down_blocks"]}, "retouch_layers: expected the beginning of a layer's"),
        ({"steps": 3}, "steps: expected an argument that the method has"),
        ({"true_cfg_scale": 3.0}, "true_cfg_scale: expected None, got float; the models are told guidance_scale"),
        ({"negative_prompt": "ugly"}, "negative_prompt: expected None"),
        ({"ip_adapter_image": IMAGE}, "ip_adapter_image: expected None, got Tensor; the subject comes by"),
        ({"joint_attention_kwargs": {"scale": 1}}, "joint_attention_kwargs: expected None"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
@pytest.mark.fault(number=16)
def test_bad_input_is_named_before_a_model_runs(changed, message, monkeypatch):
    pipe = tiny()
    no_model_runs(pipe, monkeypatch)
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=f"FluxLayoutRetouchPipeline: .*{message}"):
        whole(pipe, **changed)


@pytest.mark.fault(number=16)
def test_prompts_that_do_not_fit_are_named():
    pipe = tiny()
    given = {**SHARED, **REFERENCE, "height": SIDE, "width": SIDE}
    with pytest.raises(ValueError, match="layout_prompt: expected 1 or 2 prompts, got 3"):
        pipe(PROMPTS, ["a ball"] * 3, IMAGE, "a sks ball", **given)
    with pytest.raises(ValueError, match="reference_prompt: expected 1 prompts, got 2"):
        pipe(PROMPTS, "a ball", IMAGE, ["a sks ball"] * 2, **given)
    with pytest.raises(TypeError, match="prompt: expected a prompt, or a list of them, got None"):
        pipe(None, "a ball", IMAGE, "a sks ball", **given)
    embeds = torch.zeros(1, 16, 16), torch.zeros(1, 8)
    with pytest.raises(ValueError, match=r"prompt: expected embeddings \(n, T, 16\) and pooled ones \(n, 16\)"):
        pipe.layout(embeds, "a ball", **SHARED, height=SIDE, width=SIDE)
    longer = torch.zeros(1, 15, 16), torch.zeros(1, 16)
    with pytest.raises(ValueError, match="reference_prompt: expected 16 tokens, as the prompts have, got 15"):
        pipe(PROMPTS, "a ball", IMAGE, longer, **given)
    with pytest.raises(ValueError, match="subject_tokens: expected words among the first 6 tokens, max_sequence_l"):
        pipe("a sks ball", "a ball", IMAGE, "a", **given | {"layout_mask": None, "max_sequence_length": 6},
             subject_tokens="ball")  # fmt: skip
    made = torch.zeros(1, 16, 16), torch.zeros(1, 16)
    with pytest.raises(ValueError, match="prompt: expected text, in which subject_tokens are found, got embeddings"):
        pipe(made, "a ball", IMAGE, "a", **given | {"layout_mask": None}, subject_tokens="ball")
    without = fresh(text_encoder_2=None)
    with pytest.raises(ValueError, match="prompt: expected embeddings, since the pipeline lacks a text encoder"):
        laid_out(without)


@pytest.mark.fault(number=16)
def test_layouts_of_another_schedule_are_refused():
    pipe = tiny()
    layout = laid_out(pipe)
    with pytest.raises(ValueError, match="num_inference_steps: expected 5, as the layouts had, got 4"):
        retouched(pipe, layout, num_inference_steps=4)
    other = fresh(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    with pytest.raises(ValueError, match="scheduler: expected the one that the layouts were made with"):
        retouched(other, layout)
    with pytest.raises(ValueError, match="num_images_per_prompt: expected a divisor of 2"):
        pipe.retouch("a", IMAGE, "a", layout=layout, **SHARED, **REFERENCE, num_images_per_prompt=3)
    with pytest.raises(TypeError, match="layout: expected what layout"):
        retouched(pipe, NOISE)


@pytest.mark.fault(number=16)
def test_components_that_do_not_fit_are_named():
    with pytest.raises(NotImplementedError, match="scheduler: expected a FlowMatchEulerDiscreteScheduler"):
        whole(fresh(scheduler=EulerDiscreteScheduler()))
    stochastic = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(NotImplementedError, match=r"scheduler\.stochastic_sampling: expected False, got True"):
        whole(fresh(scheduler=stochastic))
    pipe = fresh()
    attn = pipe.transformer.transformer_blocks[0].attn
    attn.set_processor(FusedJointAttnProcessor2_0())
    with pytest.raises(NotImplementedError, match="expected a stock attention processor"):
        whole(pipe)
    pipe = fresh()
    pipe.transformer.transformer_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(NotImplementedError, match="FluxLayoutRetouchPipeline: _parallel_config: expected None"):
        whole(pipe)
    with pytest.raises(NotImplementedError, match=r"transformer\.in_channels: expected 16, 4 of the VAE's each"):
        laid_out(fresh(transformer=transformer(in_channels=32)))
    with pytest.raises(ValueError, match=r"personalized_transformer\.joint_attention_dim: expected 16, as the tra"):
        laid_out(fresh("transformer", personalized_transformer=transformer(joint_attention_dim=32)))
    with pytest.raises(NotImplementedError, match="transformer: expected a FluxTransformer2DModel, got Linear"):
        laid_out(fresh(transformer=torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="personalized_adapters: expected None, since personalized_transformer"):
        fresh("transformer", personalized_adapters=["subject"])
    with pytest.raises(ValueError, match="vae: expected an autoencoder whose config has shift_factor, got Autoenc"):
        laid_out(fresh(vae=AutoencoderKL()))
    with pytest.raises(ValueError, match="vae: expected an autoencoder whose config has latent_channels, got NoneT"):
        laid_out(fresh(vae=None))


@pytest.mark.fault(number=16)
def test_models_that_were_changed_are_named_before_one_runs(monkeypatch):
    pipe = fresh()
    pipe.transformer.fuse_lora()
    no_model_runs(pipe, monkeypatch)
    for call in (laid_out, whole):
        with pytest.raises(ValueError, match="personalized_adapters: expected adapters that are not fused, got fused"):
            call(pipe)
    pipe = fresh("transformer")
    pipe.personalized_transformer.fuse_qkv_projections()
    no_model_runs(pipe, monkeypatch)
    with pytest.raises(
        NotImplementedError, match=r"transformer_blocks\.0\.attn: expected separate projections, got fus"
    ):
        whole(pipe)


def test_a_model_whose_adapters_are_off_is_not_used_by_another_call(monkeypatch):
    one = fresh()
    other, layout = fresh(transformer=one.transformer), laid_out(one)
    no_model_runs(other, monkeypatch)
    for call in (whole, laid_out, lambda pipe: retouched(pipe, layout)):
        with one.as_vanilla(), pytest.raises(RuntimeError, match="transformer: expected a model that no other call is"):
            call(other)
    assert one.transformer.active_adapters() == ["subject"]


def test_a_callback_that_returns_something_else_is_named():
    for returned, message in ((3, "a function that returns a dict or None"), ({"latents": 3}, "latents of shape")):
        with pytest.raises(ValueError, match=f"callback_on_step_end: expected {message}"):
            whole(tiny(), callback_on_step_end=lambda *_, returned=returned: returned)
