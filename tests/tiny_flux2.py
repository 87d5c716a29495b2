"""A tiny Flux2KleinKVPipeline with random weights, as diffusers builds it; prompts are given as embeddings."""

import matplotlib.cbook
import PIL.Image
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline, Flux2Transformer2DModel

WIDTH = 24
"""Channels of a prompt's embedding"""


def transformer(dtype=torch.float32) -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name:  # else gates are nearly 0 and attention changes nothing
                parameter.mul_(4)
    return model.to(dtype).eval()


def pipeline(dtype=torch.float32) -> Flux2KleinKVPipeline:
    model = transformer(dtype)
    torch.manual_seed(1)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
    ).to(dtype).eval()  # fmt: skip
    pipe = Flux2KleinKVPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None, transformer=model
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def references(count=2, side=64):
    """A photograph in slightly different sizes."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        found = PIL.Image.open(file).convert("RGB")
    return [found.resize((side + 8 * i, side)) for i in range(count)]


def embeddings(prompt: int, rows=1, tokens=7, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(prompt)).to(dtype)


def generate(pipe, prompt=3, image=None, seed=5, rows=1, steps=3, side=64, **arguments) -> torch.Tensor:
    """Latents of a call of the pipeline."""
    return pipe(
        prompt_embeds=embeddings(prompt, rows, dtype=pipe.transformer.dtype), image=image, height=side, width=side,
        num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), output_type="latent", **arguments,
    ).images  # fmt: skip
