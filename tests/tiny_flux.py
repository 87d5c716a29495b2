"""A small FluxLayoutRetouchPipeline with random weights, and calls of it that tests share."""

import functools

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
)
from peft import LoraConfig
from tiny_models import CHARACTERS, tiny_text_config, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from lr_kernels.diffusers.dit.flux.pipeline import FluxLayoutRetouchPipeline

STEPS, SIDE, TOKENS = 5, 16, 16
PROMPTS, LAYOUT_PROMPTS = ["a sks ball", "sks ball at sea"], ["a ball", "ball at sea"]
NOISE = torch.randn(2, TOKENS, 16, generator=torch.Generator().manual_seed(6))
IMAGE = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
MASK = np.zeros((32, 32), bool)
MASK[8:24, 8:24] = True
LAYOUT_MASK = torch.zeros(2, SIDE, SIDE)
LAYOUT_MASK[0, 4:12, :8] = LAYOUT_MASK[1, 8:] = 1
SHARED = {"num_inference_steps": STEPS, "output_type": "latent", "max_sequence_length": 16}
REFERENCE = {"reference_mask": MASK, "layout_mask": LAYOUT_MASK}


def t5_tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=24
    )


def transformer(seed=0, **config):
    torch.manual_seed(seed)
    base = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16}
    base |= {"num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    base |= {"guidance_embeds": True, "axes_dims_rope": (4, 4, 8)}
    return lively(FluxTransformer2DModel(**{**base, **config}).eval().requires_grad_(False))


def lively(model):
    """A new Flux whose attention changes something."""
    for name, parameter in model.named_parameters():
        if "norm_q" in name or "norm_added_q" in name:  # else attention is nearly even
            parameter.mul_(3)
        if "linear.weight" in name or "proj_out" in name:  # of the gates and of the end, else blocks change little
            parameter.mul_(2)
    return model


def with_lora(model, *names):
    for i, name in enumerate(names):
        torch.manual_seed(20 + i)
        config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "proj_mlp"], init_lora_weights=False)
        model.add_adapter(config, adapter_name=name)
    model.set_adapters(list(names))
    return model.requires_grad_(False)


@functools.cache
def parts():
    torch.manual_seed(7)
    vae = AutoencoderKL(
        sample_size=SIDE, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    config = T5Config(
        vocab_size=len(CHARACTERS) + 3, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, initializer_factor=5.0
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vae,
        "text_encoder": CLIPTextModel(tiny_text_config(tiny_tokenizer())).eval(),
        "tokenizer": tiny_tokenizer(),
        "text_encoder_2": T5EncoderModel(config).eval(),
        "tokenizer_2": t5_tokenizer(),
    }


def fresh(kind="lora", **changed):
    given = {**parts(), **changed}
    if kind == "lora":
        given = {"transformer": with_lora(transformer(), "subject"), **given}
    else:
        given = {"transformer": transformer(), "personalized_transformer": transformer(1), **given}
    pipe = FluxLayoutRetouchPipeline(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def tiny():
    return fresh()


def whole(pipe, *, image=IMAGE, **kwargs):
    kwargs = {**SHARED, **REFERENCE, "height": SIDE, "width": SIDE, "latents": NOISE, **kwargs}
    return pipe(PROMPTS, LAYOUT_PROMPTS, image, "a sks ball", **kwargs)


def laid_out(pipe, **kwargs):
    kwargs = {**SHARED, "height": SIDE, "width": SIDE, "latents": NOISE, **kwargs}
    return pipe.layout(PROMPTS, LAYOUT_PROMPTS, **kwargs)


def retouched(pipe, layout, *, image=IMAGE, **kwargs):
    return pipe.retouch(PROMPTS, image, "a sks ball", layout=layout, **{**SHARED, **REFERENCE, **kwargs})


def at_pixels(masks):
    return masks.repeat_interleave(4, 1).repeat_interleave(4, 2)
