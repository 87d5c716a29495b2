"""Between what an autoencoder makes and the latents that a UNet reads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


@contextmanager
def upcast(vae: ModelMixin) -> Iterator[None]:
    """While it lasts a VAE whose float16 would overflow, as SDXL's, is in float32."""
    overflows = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if overflows:
        vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if overflows:
            vae.to(dtype=torch.float16)


def latent_statistics(vae: ModelMixin, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(mean, scale) of a VAE: latents are (encoded - mean) * scale."""
    config = vae.config
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or deviation is None:
        return 0.0, config.scaling_factor
    mean, deviation = (like.new_tensor(x).view(1, -1, 1, 1) for x in (mean, deviation))
    return mean, config.scaling_factor / deviation


def encoded(vae: ModelMixin, pixels: Tensor, choose: Callable[[DiagonalGaussianDistribution], Tensor]) -> Tensor:
    """Pixels (n, 3, height, width) in [-1, 1] -> latents; `choose` takes them from the encoder's distribution, which
    tiny autoencoders do not have."""
    out = vae.encode(pixels)
    made = choose(out.latent_dist) if hasattr(out, "latent_dist") else out.latents
    mean, scale = latent_statistics(vae, made)
    return (made - mean) * scale
