"""DreamBooth-like personalization of the toy pipeline. It is quick and has no prior-preservation loss, so the model
learns the references' pose together with the subject."""

import copy

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from . import world
from .models import build_pipeline, stratified_timesteps, token_ids, training_precision, velocity_target


@torch.no_grad()
def encode_references(pipeline: StableDiffusionPipeline, references: Tensor) -> Tensor:
    """References [R, 3, 64, 64] in [-1, 1] as scaled latents [R, C, 16, 16]."""
    vae = pipeline.vae
    return vae.encode(references.to(vae.dtype)).latent_dist.mean.float() * vae.config.scaling_factor


@torch.no_grad()
def start_token(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, token: str) -> Tensor:
    """Start a token's embedding at the mean of the colour words; returns a mask [V, 1] that selects its row."""
    weight = text_encoder.get_input_embeddings().weight
    row = tokenizer.convert_tokens_to_ids(token + "</w>")
    colors = [tokenizer.convert_tokens_to_ids(name + "</w>") for name in world.COLOR_NAMES]
    weight[row] = weight[colors].mean(0)
    return F.one_hot(torch.tensor(row), len(weight)).to(weight)[:, None]


def personalize(
    pipeline: StableDiffusionPipeline,
    references: torch.Tensor,
    *,
    prompt: str = world.SUBJECT_PROMPT,
    token: str = world.SUBJECT_TOKEN,
    steps: int = 280,
    learning_rate: float = 4e-4,
    batch: int = 8,
    prompt_dropout: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> StableDiffusionPipeline:
    """Teach a copy of the pipeline's UNet, and one token embedding, a subject.

    The text encoder of the result differs from the given one in the row of `token` only, so it serves both UNets.

    Args:
        pipeline: fp32 toy pipeline; left as it is.
        references: [R, 3, 64, 64] in [-1, 1].
        steps, learning_rate, batch, prompt_dropout: of the fine-tuning; dropped prompts keep guidance working.
        seed: makes the result reproducible on one machine; the global random state is not touched.
        progress: show a progress bar.

    Returns:
        A pipeline that shares the given one's VAE and tokenizer. Its scheduler is a new one of the toy model.
    """
    generator = torch.Generator().manual_seed(seed)
    unet, text_encoder = copy.deepcopy(pipeline.unet).train(), copy.deepcopy(pipeline.text_encoder)
    unet.set_attn_processor(AttnProcessor())  # plain batched products: on a CPU faster to train than fused attention
    only_token = start_token(text_encoder, pipeline.tokenizer, token)
    embedding = text_encoder.requires_grad_(False).get_input_embeddings().weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([*unet.parameters(), embedding], learning_rate, weight_decay=0.0, fused=True)

    latents = encode_references(pipeline, references)
    ids, no_ids = token_ids(pipeline.tokenizer, [prompt, ""])
    alphas_cumprod = pipeline.scheduler.alphas_cumprod
    for _ in tqdm(range(steps), desc="personalize", disable=not progress):
        clean = latents[torch.randint(len(latents), (batch,), generator=generator)]
        dropped = torch.rand(batch, 1, generator=generator) < prompt_dropout
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = stratified_timesteps(batch, generator)
        noisy, target = velocity_target(clean, noise, timesteps, alphas_cumprod)
        with training_precision():
            context = text_encoder(torch.where(dropped, no_ids, ids)).last_hidden_state
            velocity = unet(noisy, timesteps, context).sample
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(velocity.float(), target).backward()
        embedding.grad *= only_token
        optimizer.step()

    unet.set_attn_processor(AttnProcessor2_0())
    for part in (unet, text_encoder):
        part.eval().requires_grad_(False)
    return build_pipeline(pipeline.vae, unet, text_encoder, pipeline.tokenizer)
