"""What an autoencoder makes, as latents that a UNet reads."""

from diffusers import ModelMixin
from torch import Tensor


def latent_statistics(vae: ModelMixin, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean of what the VAE makes, and what it is multiplied by: (made - mean) * scale are latents."""
    config = vae.config
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or deviation is None:
        return 0.0, config.scaling_factor
    mean, deviation = (like.new_tensor(x).view(1, -1, 1, 1) for x in (mean, deviation))
    return mean, config.scaling_factor / deviation


def as_latents(vae: ModelMixin, made: Tensor) -> Tensor:
    """What the VAE's encoder made, (n, C, h, w) -> latents."""
    mean, scale = latent_statistics(vae, made)
    return (made - mean) * scale
