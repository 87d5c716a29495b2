"""Tiny transformers with text and image tokens in one attention, as diffusers builds them, and a call's inputs."""

import functools

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from peft import LoraConfig

GRID = (4, 4)
"""Rows and columns of the image's tokens"""


def _lively(model, dtype):
    """Attention that changes something: gates and logits of a new model are nearly 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(x in name for x in ("modulation", "mod.1", "norm1.linear", "norm1_context.linear", "norm.linear")):
                parameter.mul_(3)
    return model.to(dtype).eval().requires_grad_(False)


@functools.cache
def flux(dtype=torch.float32):
    torch.manual_seed(0)
    return _lively(FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ), dtype)  # fmt: skip


@functools.cache
def flux2(dtype=torch.float32):
    torch.manual_seed(0)
    return _lively(Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    ), dtype)  # fmt: skip


@functools.cache
def sd3(dtype=torch.float32):
    """The first layer attends to the image alone besides; the last one drops the text."""
    torch.manual_seed(0)
    return _lively(SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    ), dtype)  # fmt: skip


@functools.cache
def qwen_image(dtype=torch.float32):
    torch.manual_seed(0)
    return _lively(QwenImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    ), dtype)  # fmt: skip


BUILDS = [flux, flux2, sd3, qwen_image]


def inputs(build, dtype=torch.float32, text=7, padded=True):
    """Of a call with two rows; padded: the second prompt of Qwen-Image is two tokens shorter."""
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    rows, columns = GRID
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    found = {"encoder_hidden_states": randn(2, text, 32), "timestep": torch.tensor([1.0, 0.5])}
    image = {"hidden_states": randn(2, rows * columns, 4)}
    if build is flux:
        ids = {"img_ids": torch.cat([torch.zeros(16, 1), places], 1), "txt_ids": torch.zeros(text, 3)}
        return found | image | ids | {"pooled_projections": randn(2, 32)}
    if build is flux2:
        zeros = torch.zeros(16, 1)
        txt_ids = torch.nn.functional.pad(torch.arange(text)[:, None].float(), (3, 0))
        return found | image | {"img_ids": torch.cat([zeros, places, zeros], 1), "txt_ids": txt_ids}
    if build is sd3:
        found["timestep"] = torch.tensor([500, 300])
        return found | {"hidden_states": randn(2, 4, 2 * rows, 2 * columns), "pooled_projections": randn(2, 64)}
    mask = torch.ones(2, text)
    mask[1, text - 2 :] = 0
    return found | image | {
        "img_shapes": [[(1, rows, columns)]] * 2, "encoder_hidden_states_mask": mask if padded else None,
    }  # fmt: skip


@torch.no_grad()
def predict(model, arguments):
    return model(**arguments, return_dict=False)[0]


def add_lora(model):
    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj"]
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def flux_pipeline(transformer):
    """With latents of one channel, for a transformer of 4. Prompts and an IP-Adapter's images come as embeddings."""
    torch.manual_seed(1)
    vae = AutoencoderKL(
        sample_size=32, latent_channels=1, block_out_channels=(4,) * 4, norm_num_groups=1, shift_factor=0.0,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe
