"""The pipelines on tiny models, and calls of them that tests share."""

import numpy as np
import torch
from peft import LoraConfig
from tiny_models import XL_UNET, components, components_xl, tiny_unet
from torch.nn import functional as F

from lr_kernels.diffusers import StableDiffusionLayoutRetouchPipeline, StableDiffusionXLLayoutRetouchPipeline

STEPS = 4
PROMPTS = ["a sks ball", "sks ball at sea"]
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
MASK = np.zeros((32, 32), bool)
MASK[8:24, 8:24] = True
SHARED = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 2.0}


def fresh(kind="sd", **parts):
    if kind == "sd":
        parts = {**components(), "personalized_unet": tiny_unet(1), **parts}
        pipe = StableDiffusionLayoutRetouchPipeline(**parts)
    else:
        parts = {**components_xl(), "personalized_unet": tiny_unet(1, **XL_UNET), **parts}
        pipe = StableDiffusionXLLayoutRetouchPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(pipe, image=IMAGES[:1], **kwargs):
    kwargs = {**SHARED, "latents": NOISE, "reference_mask": MASK, "generator": seeded(), **kwargs}
    return pipe(PROMPTS, "a ball", image, "a sks ball", ("sks", "ball"), **kwargs)


def banked(pipe, **kwargs):
    kwargs = {"reference_mask": MASK, "num_inference_steps": STEPS, "guidance_scale": 2.0, **kwargs}
    return pipe.reference_bank(IMAGES[:1], "a sks ball", ("sks", "ball"), **kwargs)


def attention(q, k, v, visible):
    """(H, N, D) x (H, M, D), visible (N, M)."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible[None, None])[0]


def with_lora(unet, *names):
    for i, name in enumerate(names):
        torch.manual_seed(20 + i)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"]), adapter_name=name)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    unet.set_adapters(list(names))
    return unet.requires_grad_(False)
