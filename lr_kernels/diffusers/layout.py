"""Stage 1 of Layout-and-Retouch (arXiv 2407.09779): step-blended denoising."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from .components import PersonalizedPipeline, as_list, noise_like
from .condition import Condition, predict
from .contexts import ContextRecorder
from .output import Costs, LayoutRetouchOutput
from .pictures import Image
from .request import Request, build_request, refuse
from .schedule import Blend, Stepper
from .settings import Callback, Generator, Settings


class LayoutStage:
    """The method `layout` of the pipelines; arguments are described at `LayoutRetouch`."""

    @torch.no_grad()
    def layout(
        self,
        prompt: str | list[str],
        layout_prompt: str | list[str],
        subject_tokens: str | Sequence[str] | Sequence[Sequence[str]] = (),
        *,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        layout_steps: int | None = None,
        layout_blend: Blend = "hard",
        retouch_start: int | None = None,
        retouch_end: int | None = None,
        retouch_layers: Sequence[int | str] | None = None,
        context_storage: str | None = None,
        context_limit: int | None = None,
        control_image: Image | list[Image] | None = None,
        control_scale: float = 1.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        backend: str = "auto",
        output_type: str = "pil",
        callback_on_step_end: Callback = None,
    ) -> LayoutRetouchOutput:
        """Stage 1, step-blended denoising: first the vanilla model with layout_prompt, then the personalized one.

        Arguments as in `__call__`; images and latents of the output are the layouts. With subject_tokens the output's
        `contexts` are kept for `retouch(layout=output)`: the latents of every step and where the subjects are, and
        with a context_storage also the keys and values of the steps and layers that `retouch` will share.
        """
        settings = Settings.given(locals())
        request = build_request(
            self,
            settings,
            as_list(prompt),
            self.latent_size(height, width, latents),
            negative_prompt=negative_prompt,
            latents=latents,
            control_image=control_image,
            layout_prompt=as_list(layout_prompt, name="layout_prompt"),
            subject_tokens=subject_tokens,
            with_references=False,
        )
        if request.tokens is None:
            refuse("there are no subject_tokens", context_storage=context_storage, context_limit=context_limit)
        output = lay_out(self, request)
        self.maybe_free_model_hooks()
        return output


def lay_out(pipe: PersonalizedPipeline, request: Request) -> LayoutRetouchOutput:
    """Run the stage."""
    settings, solver, weights, count = request.settings, request.solver, request.weights, len(request.prompts)
    device, guided = pipe._execution_device, settings.guidance_scale > 1
    pipe.stage = "layout"
    costs = Costs(device)
    with costs.of("layout"), pipe.stage_bar("layout", solver.steps) as bar:
        negatives = request.negatives if guided else []
        with pipe.as_vanilla():
            vanilla = pipe.embed(negatives + request.layout_prompts, request.size, personal=False)
        personal = pipe.embed(negatives + request.prompts, request.size, personal=True)
        latents = pipe.initial_latents(count, request.size, vanilla.embeds.dtype, settings.generator, request.latents)
        noise = latents / pipe.scheduler.init_noise_sigma
        control = pipe.control(request.control_image, settings.control_scale, count, request.size, latents.dtype)
        table = solver.table(guidance_scale=settings.guidance_scale if guided else 1, eta=settings.eta, weights=weights)
        stepper = Stepper(solver, table, backend=settings.backend)
        recorder = _recorder(pipe, request, len(personal.embeds))

        def predictions(unet: torch.nn.Module, condition: Condition, i: int) -> list[Tensor]:
            inputs = torch.cat([latents] * (2 if guided else 1)) * solver.input_scales[i]
            t = solver.timesteps[i]
            residuals = None if control is None else control.residuals(inputs, t, condition)
            out = predict(unet, inputs, t, condition, residuals)
            costs.count("layout", len(inputs))
            return [out[:count], out[-count:]]

        with recorder or nullcontext():
            for i, t in enumerate(solver.timesteps):
                if pipe.interrupt:
                    continue
                by_vanilla = by_personal = None
                if weights[i] < 1:
                    with pipe.as_vanilla():
                        by_vanilla = predictions(pipe.unet, vanilla, i)
                if weights[i] > 0 or (recorder is not None and recorder.needs(i)):
                    with recorder.personal(i) if recorder is not None else nullcontext():
                        by_personal = predictions(pipe.personal_unet, personal, i)
                models = [*(by_vanilla or by_personal), *(by_personal or by_vanilla)]  # a stand-in has weight 0
                noise_of_step = noise_like(latents, settings.generator) if settings.eta > 0 else None
                if recorder is not None:
                    recorder.trajectory.append(latents)
                latents = stepper.step(i, latents, models, noise=noise_of_step)
                latents = pipe.after_step(settings.callback_on_step_end, i, t, latents)
                bar.update()
    images, nsfw = pipe.decode(latents, settings.output_type, costs)
    contexts = None
    if recorder is not None and not pipe.interrupt:
        contexts = replace(recorder.contexts(latents, noise), walk=solver.walk, words=request.subjects)
    return LayoutRetouchOutput(
        images=images,
        latents=latents,
        contexts=contexts,
        nsfw_content_detected=nsfw,
        seconds=costs.seconds,
        rows=costs.rows,
    )


def _recorder(pipe: PersonalizedPipeline, request: Request, rows: int) -> ContextRecorder | None:
    """Of a layout stage whose images the retouch stage will read."""
    if request.tokens is None:
        return None
    settings = request.settings
    cached = settings.reading == "routing" and settings.contexts_from in (None, "trajectory")
    same_rows = (settings.guidance_scale > 1) == (settings.retouch_guidance > 1)
    return ContextRecorder(
        pipe.personal_unet,
        request.solver.timesteps.tolist(),
        request.weights,
        request.tokens,
        request.size,
        request.layers,
        request.share,
        rows,
        storage=settings.context_storage if cached and same_rows else None,
        limit=settings.context_limit,
        backend=settings.backend,
    )
