"""Stage 1 of Layout-and-Retouch (arXiv 2407.09779) with flow matching and Flux, and the steps that both stages share.

Latents are stepped by the scheduler itself, so that what the stages leave unchanged is FluxPipeline's bit for bit.
"""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, SchedulerMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from ....denoising.coefficients import blend_schedule
from ....runtime.checks import fail
from ...pipelines.pictures import Images
from .inputs import Prompt
from .models import PersonalizedFluxPipeline
from .output import FluxLayouts
from .settings import OP, FluxSettings


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """NotImplementedError for a scheduler whose step is not that of deterministic flow matching."""
    if type(scheduler) is not FlowMatchEulerDiscreteScheduler:
        expected = "a FlowMatchEulerDiscreteScheduler"
        fail(OP, "scheduler", expected, type(scheduler).__name__, error=NotImplementedError)
    for name in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config[name]:
            fail(OP, f"scheduler.{name}", "False", True, error=NotImplementedError)


def set_schedule(pipe: PersonalizedFluxPipeline, steps: int, tokens: int) -> Tensor:
    """Set the scheduler's timesteps as FluxPipeline does for images of so many tokens, and return its σ: (steps + 1,)
    on the CPU."""
    config = pipe.scheduler.config
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    shift = calculate_shift(tokens, *(config[name] for name in names))
    sigmas = np.linspace(1.0, 1 / steps, steps)
    pipe.scheduler.set_timesteps(sigmas=sigmas, mu=shift, device=pipe._execution_device)
    return pipe.scheduler.sigmas.cpu()


def lay_out(
    pipe: PersonalizedFluxPipeline,
    settings: FluxSettings,
    vanilla: Prompt,
    personal: Prompt,
    size: tuple[int, int],
    generator: torch.Generator | list[torch.Generator] | None,
    latents: Tensor | None,
) -> tuple[Tensor, FluxLayouts | None]:
    """Stage 1, step-blended denoising: v = (1 - w)·v_vanilla + w·v_personal, where a model of weight 0 does not run.

    Returns:
        The latents, and what the retouch stage reads of them; None where a callback interrupted the stage.
    """
    embeds = personal.embeds
    channels = pipe.transformer.config.in_channels // 4
    place = embeds.dtype, embeds.device
    latents, ids = pipe.prepare_latents(len(embeds), channels, *size, *place, generator, latents)
    sigmas = set_schedule(pipe, settings.num_inference_steps, latents.shape[1])
    assert settings.layout_steps is not None
    weights = blend_schedule(settings.layout_blend, settings.num_inference_steps, settings.layout_steps).tolist()
    prompts = [vanilla, personal]
    trajectory = [latents]

    def velocity(i: int, t: Tensor, latents: Tensor) -> Tensor:
        found = []
        if weights[i] < 1:
            with pipe.as_vanilla():
                found.append(predict(pipe, pipe.transformer, latents, t, prompts[0], ids, "vanilla"))
        if weights[i] > 0:
            found.append(predict(pipe, pipe.personal_transformer, latents, t, prompts[1], ids, "personalized"))
        if len(found) == 1:
            return found[0]
        return torch.lerp(found[0].float(), found[1].float(), weights[i]).to(found[0].dtype)

    def after(i: int, latents: Tensor) -> Tensor:
        main = int(weights[i] >= 0.5)
        latents, prompts[main] = after_step(pipe, settings, i, latents, prompts[main])
        trajectory.append(latents)
        return latents

    latents = walked(pipe, settings, latents, 0, velocity, after)
    return latents, None if pipe.interrupt else FluxLayouts(tuple(trajectory), sigmas, size)


def walked(
    pipe: PersonalizedFluxPipeline,
    settings: FluxSettings,
    latents: Tensor,
    start: int,
    velocity: Callable[[int, Tensor, Tensor], Tensor],
    after: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Latents before step `start` -> those after the last step.

    Args:
        velocity: (step, timestep, latents) -> what the models say. after: (step, latents after it) -> what the next
            step starts from.
    """
    scheduler, steps = pipe.scheduler, settings.num_inference_steps
    pipe._num_timesteps = steps - start
    scheduler.set_begin_index(start)
    with pipe.progress_bar(total=steps - start) as bar:
        for i in range(start, steps):
            if pipe.interrupt:
                continue
            pipe._current_timestep = t = scheduler.timesteps[i]
            latents = after(i, scheduler.step(velocity(i, t, latents), t, latents, return_dict=False)[0])
            bar.update()
    return latents


def predict(
    pipe: PersonalizedFluxPipeline,
    transformer: FluxTransformer2DModel,
    latents: Tensor,
    t: Tensor,
    prompt: Prompt,
    ids: Tensor,
    context: str,
) -> Tensor:
    """A transformer's velocity for latents (B, N, C) at the timestep t, 1000·σ; `context` tells the caches of diffusers
    what the pass is."""
    rows, guidance = len(latents), None
    if transformer.config.guidance_embeds:
        guidance = torch.full([1], pipe.guidance_scale, device=latents.device, dtype=torch.float32).expand(rows)
    with transformer.cache_context(context):
        return transformer(
            hidden_states=latents,
            timestep=t.expand(rows).to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=prompt.pooled,
            encoder_hidden_states=prompt.embeds,
            txt_ids=prompt.ids,
            img_ids=ids,
            return_dict=False,
        )[0]


def after_step(
    pipe: PersonalizedFluxPipeline, settings: FluxSettings, step: int, latents: Tensor, prompt: Prompt
) -> tuple[Tensor, Prompt]:
    """Run callback_on_step_end. What it returns counts from the next step on.

    Raises:
        ValueError: it returns neither a dict nor None, or a tensor of another shape.
    """
    callback = settings.callback_on_step_end
    if callback is None:
        return latents, prompt
    given = {"latents": latents, "prompt_embeds": prompt.embeds}
    names = settings.callback_on_step_end_tensor_inputs
    returned = callback(pipe, step, pipe.scheduler.timesteps[step], {name: given[name] for name in names})
    if returned is None:
        returned = {}
    if not isinstance(returned, dict):
        fail(OP, "callback_on_step_end", "a function that returns a dict or None", type(returned).__name__)
    for name, x in given.items():
        y = returned.get(name, x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = getattr(y, "shape", type(y).__name__)
            fail(OP, "callback_on_step_end", f"{name} of shape {tuple(x.shape)} from it", got)
        given[name] = y.to(x)
    return given["latents"], prompt._replace(embeds=given["prompt_embeds"])


def encode_pixels(pipe: PersonalizedFluxPipeline, pixels: Tensor) -> Tensor:
    """Pixels (n, 3, height, width) in [-1, 1] -> packed latents (n, N, C), the modes of the VAE's distributions."""
    vae = pipe.vae
    out = vae.encode(pixels.to(pipe._execution_device, vae.dtype))
    latents = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents  # tiny ones have no distribution
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return pipe._pack_latents(latents, *latents.shape)


def decode(pipe: PersonalizedFluxPipeline, latents: Tensor, size: tuple[int, int], output_type: str) -> Images:
    """Packed latents -> images of the output type."""
    if output_type == "latent":
        return latents
    unpacked = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    unpacked = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pixels = pipe.vae.decode(unpacked, return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels, output_type=output_type)
