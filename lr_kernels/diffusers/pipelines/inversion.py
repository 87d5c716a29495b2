"""Latents of a given image at every noise level of the schedule: by DDIM inversion or by adding noise."""

from collections.abc import Callable

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ...denoising.coefficients import pack_columns
from ...denoising.step_blend import step_blend
from .schedule import Solver, solver_of


def inversion_table(solver: Solver) -> tuple[Tensor, list[float]]:
    """Coefficients of the reversed DDIM steps, fp32 (steps, 1, 10), for one prediction, and the scale of its input.

    Row k leads from the level (α, σ) of the row before to (α', σ') of the k-th timestep from the end; row 0 starts at
    the clean image. The model is told the timestep of the level that it is at, row 0 that of the level it goes to, and
    x/√(α² + σ²). With ε the noise in the prediction: x0 = (x - σ·ε)/α and x' = α'·x0 + σ'·ε.

    In latents scaled that way a step is the same for all solvers: that of DDIM between those noise levels.
    """
    alphas, sigmas = solver.alphas.flip(0), solver.sigmas.flip(0)
    norms = (alphas**2 + sigmas**2).sqrt()
    at = torch.arange(solver.steps).clamp(min=1)  # of the levels, the one whose timestep the model is told
    if solver.prediction_type == "epsilon":
        noise_of_input, noise_of_prediction = torch.zeros_like(alphas[at]), torch.ones_like(alphas[at])
    else:
        noise_of_input, noise_of_prediction = sigmas[at] / norms[at], alphas[at] / norms[at]
    scale = 1 / norms[:-1]
    ratio = alphas[1:] / alphas[:-1]
    noise_gain = sigmas[1:] - ratio * sigmas[:-1]
    a, e = ratio + noise_gain * noise_of_input * scale, noise_gain * noise_of_prediction
    return pack_columns(torch.ones_like(ratio)[:, None], a=a, e=e, s=1.0), scale.tolist()


def invert(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    solver: Solver | SchedulerMixin,
    *,
    start: int = 0,
    backend: str = "auto",
    after_step: Callable[[], object] = lambda: None,
) -> list[Tensor]:
    """DDIM inversion without guidance (arXiv 2010.02502), to the noise levels of the solver.

    Args:
        predict: (the model's input, timestep) -> its prediction, all (B, C, height, width). The input is scaled as the
            scheduler's `scale_model_input` does it.
        latents: of the images, (B, C, height, width). solver: or a scheduler whose timesteps are set.
        start: the first step whose latents are wanted; nothing noisier is computed.

    Returns:
        steps + 1 - start tensors like latents: before the steps start, …, steps - 1, and the clean ones.

    Raises:
        NotImplementedError: a scheduler that is refused, see `solver_of`.
    """
    solver = solver_of(solver)
    table, scales = inversion_table(solver)
    table, times = table.to(latents.device), solver.timesteps.flip(0)
    trajectory = [latents]
    for k in range(len(times) - start):
        prediction = predict(trajectory[-1] * scales[k], times[max(k - 1, 0)])
        trajectory.append(step_blend(trajectory[-1], [prediction], table, k, backend=backend))
        after_step()
    return trajectory[::-1]


def add_noise(latents: Tensor, noise: Tensor, solver: Solver, i: int) -> Tensor:
    """alphas[i]·latents + sigmas[i]·noise: clean latents at the level before step i, in their dtype."""
    alpha, sigma = solver.alphas[i].item(), solver.sigmas[i].item()
    return (alpha * latents + sigma * noise).to(latents.dtype)


def renoise(latents: Tensor, noise: Tensor, solver: Solver | SchedulerMixin, *, start: int = 0) -> list[Tensor]:
    """Like `invert`, by adding the same noise at every level."""
    solver = solver_of(solver)
    return [*(add_noise(latents, noise, solver, i) for i in range(start, solver.steps)), latents]
