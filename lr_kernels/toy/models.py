"""Architectures of the toy pipeline: the components of a genuine StableDiffusionPipeline, small enough for a CPU."""

import string
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..info import instruction_set
from .world import SIDE, WORDS

DOWNSAMPLING = 4
LATENT_SIDE = SIDE // DOWNSAMPLING
LATENT_CHANNELS = 4
TEXT_WIDTH = 64
TEXT_LENGTH = 12
START, END = "<|startoftext|>", "<|endoftext|>"


def training_precision() -> AbstractContextManager:
    """bf16 autocast on a processor that multiplies bf16; elsewhere it would cost several times fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=instruction_set() in ("avx512bf16", "amx"))


def merge_pair(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every adjacent occurrence of pair in a list of word pieces."""
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def word_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges under which each of the given words becomes a single token."""
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            pieces = merge_pair(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token per word of the world; other words fall apart into letters."""
    merges = word_merges(WORDS)
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    pieces = dict.fromkeys([START, END, *letters, *(left + right for left, right in merges)])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Token ids [B, TEXT_LENGTH] -> hidden states [B, TEXT_LENGTH, TEXT_WIDTH]."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=1.0,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """Velocity of latents [B, LATENT_CHANNELS, 16, 16]; self- and cross-attention at 16x16 and 8x8."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4),  # heads per level: diffusers keeps this name for the head count
        norm_num_groups=8,
    )


def build_vae() -> AutoencoderKL:
    """Images [B, 3, SIDE, SIDE] in [-1, 1] <-> latents [B, LATENT_CHANNELS, 16, 16]."""
    return AutoencoderKL(
        sample_size=SIDE,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,  # training folds the measured standard deviation into the 1x1 convolutions
    )


def build_scheduler() -> DDIMScheduler:
    """DDIM with a cosine schedule and v-prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,  # without effect under trailing spacing; the pipeline asks for it
    )


def build_pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The components as one pipeline without a safety checker."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_xl_pipeline() -> StableDiffusionXLPipeline:
    """A StableDiffusionXLPipeline with random weights: it runs as SDXL does, and draws nothing."""
    tokenizer = build_tokenizer()
    text = build_text_encoder(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * TEXT_WIDTH,
        attention_head_dim=(1, 2),
        norm_num_groups=8,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,  # pooled text and six sizes
    )
    return StableDiffusionXLPipeline(
        vae=build_vae(),
        unet=unet,
        text_encoder=text,
        text_encoder_2=CLIPTextModelWithProjection(text.config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=build_scheduler(),
        add_watermarker=False,
    )


def token_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Prompts, N strings, as padded token ids [N, TEXT_LENGTH]."""
    encoded = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
    )
    return encoded.input_ids


def velocity_target(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Noised latents and their velocities, both [B, C, h, w], at timesteps [B]."""
    signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1).sqrt()
    spread = (1 - alphas_cumprod[timesteps]).view(-1, 1, 1, 1).sqrt()
    return signal * latents + spread * noise, signal * noise - spread * latents


def stratified_timesteps(count: int, generator: torch.Generator | None = None) -> Tensor:
    """One uniform timestep out of each of `count` equal parts of the schedule, in order: [count] int64."""
    return ((torch.arange(count) + torch.rand(count, generator=generator)) / count * 1000).long().clamp(max=999)
