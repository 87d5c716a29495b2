"""Latents of a given image at every noise level of the schedule: by DDIM inversion or by adding noise."""

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..coefficients import pack_columns
from ..step_blend import step_blend


def inversion_table(scheduler: DDIMScheduler) -> Tensor:
    """Coefficients of the reversed DDIM steps, fp32 (steps, 1, 10), for one prediction.

    Row k leads to the noise level ᾱ' of the k-th timestep from the end. It starts at the level ᾱ of the row before,
    where the model is evaluated; row 0 starts at the clean image (`final_alpha_cumprod`) with the model at its own
    timestep. With ε the noise in the prediction: x0 = (x - √(1-ᾱ)·ε) / √ᾱ and x' = √ᾱ'·x0 + √(1-ᾱ')·ε.
    """
    levels = scheduler.alphas_cumprod.double().cpu()[scheduler.timesteps.cpu()].flip(0)
    start = torch.as_tensor(scheduler.final_alpha_cumprod, dtype=torch.float64).cpu().reshape(1)
    now, model = torch.cat([start, levels[:-1]]), torch.cat([levels[:1], levels[:-1]])
    if scheduler.config.prediction_type == "epsilon":
        noise_of_sample, noise_of_prediction = torch.zeros_like(model), torch.ones_like(model)
    else:
        noise_of_sample, noise_of_prediction = (1 - model).sqrt(), model.sqrt()
    ratio = (levels / now).sqrt()
    noise_gain = (1 - levels).sqrt() - ratio * (1 - now).sqrt()
    a, e = ratio + noise_gain * noise_of_sample, noise_gain * noise_of_prediction
    return pack_columns(torch.ones_like(now)[:, None], a=a, e=e, s=1.0)


def invert(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    scheduler: DDIMScheduler,
    *,
    start: int = 0,
    backend: str = "auto",
    after_step: Callable[[], object] = lambda: None,
) -> list[Tensor]:
    """DDIM inversion without guidance (arXiv 2010.02502).

    Args:
        predict: (latents, timestep) -> the model's prediction, all (B, C, height, width).
        latents: of the images, (B, C, height, width). scheduler: its timesteps are set.
        start: the first step whose latents are wanted; nothing noisier is computed.

    Returns:
        steps + 1 - start tensors like latents: at timesteps[start], …, timesteps[-1], and the clean ones.
    """
    table = inversion_table(scheduler).to(latents.device)
    times = scheduler.timesteps.flip(0)
    trajectory = [latents]
    for k in range(len(times) - start):
        prediction = predict(trajectory[-1], times[max(k - 1, 0)])
        trajectory.append(step_blend(trajectory[-1], [prediction], table, k, backend=backend))
        after_step()
    return trajectory[::-1]


def add_noise(latents: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """√ᾱ·latents + √(1-ᾱ)·noise, in the latents' dtype."""
    alpha = alpha.to(latents.device, torch.float32)
    return (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).to(latents.dtype)


def renoise(latents: Tensor, noise: Tensor, scheduler: DDIMScheduler, *, start: int = 0) -> list[Tensor]:
    """Like `invert`, by adding the same noise at every level."""
    levels = scheduler.alphas_cumprod[scheduler.timesteps[start:].cpu()]
    return [*(add_noise(latents, noise, alpha) for alpha in levels), latents]
