"""Tiny models with random weights, as diffusers builds them, for the tests of pipelines."""

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOLERANCE = 1e-3
"""Of latents after a whole run in float32, where their standard deviation is about 1."""
CHARACTERS = [chr(i) for i in range(33, 127)]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.isfinite().all() and b.isfinite().all()
    return (a - b).abs().max().item()


def tiny_unet(seed: int, **config) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    base = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    unet = UNet2DConditionModel(**{**base, **config}).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn1.to_q" in name:  # else attention is nearly even, and the maps that go through it are rounding
                parameter.mul_(10)
    return unet


def tiny_tokenizer() -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(c + "</w>" for c in CHARACTERS)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=24)


def tiny_scheduler(**config) -> DDIMScheduler:
    base = {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": "v_prediction", "steps_offset": 1}
    return DDIMScheduler(**{**base, **config})


def tiny_text_config(tokenizer: CLIPTokenizer, layers: int = 1) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=24,
        initializer_factor=5.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def components() -> dict:
    """Of a StableDiffusionPipeline."""
    torch.manual_seed(7)
    vae = AutoencoderKL(
        sample_size=16,
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).eval()
    tokenizer = tiny_tokenizer()
    return {
        "vae": vae,
        "text_encoder": CLIPTextModel(tiny_text_config(tokenizer)).eval(),
        "tokenizer": tokenizer,
        "unet": tiny_unet(0),
        "scheduler": tiny_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


XL_UNET = {
    "cross_attention_dim": 32,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}


def components_xl() -> dict:
    """Of a StableDiffusionXLPipeline."""
    parts = components()
    tokenizer = parts["tokenizer"]
    torch.manual_seed(8)
    return {
        "vae": parts["vae"],
        "text_encoder": CLIPTextModel(tiny_text_config(tokenizer, 2)).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(tiny_text_config(tokenizer, 2)).eval(),
        "tokenizer": tokenizer,
        "tokenizer_2": tiny_tokenizer(),
        "unet": tiny_unet(0, **XL_UNET),
        "scheduler": tiny_scheduler(),
        "add_watermarker": False,
    }


def tiny_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """One that changes something: its last layers are zero in a new one."""
    torch.manual_seed(9)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).eval()
    for parameter in (*net.controlnet_down_blocks.parameters(), *net.controlnet_mid_block.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.3)
    return net
