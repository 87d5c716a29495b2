"""Stage 1 of Layout-and-Retouch (arXiv 2407.09779): step-blended denoising."""

import torch
from torch import Tensor

from ..step_blend import step_blend
from .components import Callback, Generator, Image, as_list, as_negatives, noise_like
from .condition import Condition, predict
from .output import LayoutRetouchOutput, timed
from .schedule import DEFAULT_SWITCH, Blend, blend_weights, ddim_table, step_in_schedule


class LayoutStage:
    """The method `layout` of the pipelines; arguments are described at `LayoutRetouch`."""

    @torch.no_grad()
    def layout(
        self,
        prompt: str | list[str],
        layout_prompt: str | list[str],
        *,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        layout_steps: int | None = None,
        layout_blend: Blend = "hard",
        control_image: Image | list[Image] | None = None,
        control_scale: float = 1.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        backend: str = "auto",
        output_type: str = "pil",
        callback_on_step_end: Callback = None,
    ) -> LayoutRetouchOutput:
        """Stage 1, step-blended denoising: first the vanilla model with layout_prompt, then the personalized one.

        Arguments as in `__call__`; images and latents of the output are the layouts.
        """
        prompt = as_list(prompt)
        count, steps, guided, device = len(prompt), num_inference_steps, guidance_scale > 1, self._execution_device
        timesteps = self.begin(steps, device)
        switch = step_in_schedule("layout_steps", layout_steps, round(DEFAULT_SWITCH * steps), 0, steps)
        weights = blend_weights(layout_blend, switch, steps)
        table = ddim_table(
            self.scheduler, guidance_scale=guidance_scale if guided else 1, eta=eta, weights=weights, device=device
        )
        seconds: dict[str, float] = {}

        def predictions(unet: torch.nn.Module, condition: Condition, t: Tensor) -> list[Tensor]:
            inputs = torch.cat([latents] * (2 if guided else 1))
            residuals = None if control is None else control.residuals(inputs, t, condition)
            out = predict(unet, inputs, t, condition, residuals)
            return [out[:count], out[-count:]]

        with timed(seconds, "layout", device), self.progress_bar(total=steps) as bar:
            negative = as_negatives(negative_prompt, count) if guided else []
            size = self.latent_size(height, width, latents)
            with self.as_vanilla():
                layout_prompt = as_list(layout_prompt, count, "layout_prompt")
                vanilla = self.embed(negative + layout_prompt, size, personal=False)
            personal = self.embed(negative + prompt, size, personal=True)
            latents = self.initial_latents(count, size, vanilla.embeds.dtype, generator, latents)
            control = self.control(control_image, control_scale, count, size, latents.dtype)
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                by_vanilla = by_personal = None
                if weights[i] < 1:
                    with self.as_vanilla():
                        by_vanilla = predictions(self.unet, vanilla, t)
                if weights[i] > 0:
                    by_personal = predictions(self.personal_unet, personal, t)
                models = [*(by_vanilla or by_personal), *(by_personal or by_vanilla)]  # a stand-in has weight 0
                noise = noise_like(latents, generator) if eta > 0 else None
                latents = step_blend(latents, models, table, i, noise=noise, backend=backend)
                latents = self.after_step(callback_on_step_end, i, t, latents)
                bar.update()
        images, nsfw = self.decode(latents, output_type, seconds)
        self.maybe_free_model_hooks()
        return LayoutRetouchOutput(images=images, latents=latents, nsfw_content_detected=nsfw, seconds=seconds)
