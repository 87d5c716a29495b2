"""Stage 1 of Layout-and-Retouch (arXiv 2407.09779): step-blended denoising."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from ...runtime.checks import fail
from .components import PersonalizedPipeline, noise_like
from .condition import Condition, predict
from .contexts import ContextRecorder, Contexts
from .guidance import GuidedStepper
from .output import Costs, LayoutRetouchOutput
from .pictures import Image
from .prompts import read_prompts
from .request import Request, build_request
from .schedule import Blend
from .settings import OP, Callback, Generator, Settings, refuse
from .step_end import Told, after_step
from .stock import StockArguments


class LayoutStage(PersonalizedPipeline):
    """The method `layout` of the pipelines; arguments are described at `LayoutRetouch`."""

    @torch.no_grad()
    def layout(
        self,
        prompt: str | list[str] | None = None,
        layout_prompt: str | list[str] | None = None,
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
        context_dtype: torch.dtype | None = None,
        control_image: Image | list[Image] | None = None,
        control_scale: float = 1.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        backend: str = "auto",
        output_type: str = "pil",
        callback_on_step_end: Callback = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **stock: object,
    ) -> LayoutRetouchOutput:
        """Stage 1, step-blended denoising: first the vanilla model with layout_prompt, then the personalized one.

        Arguments as in `__call__`; images and latents of the output are the layouts. With subject_tokens the output's
        `contexts` are kept for `retouch(layout=output)`: the latents of every step and where the subjects are, and
        with a context_storage also the keys and values of the steps and layers that `retouch` will share. Without
        subject_tokens either prompt may be left out where its embeddings are given.
        """
        settings = Settings.given(locals())
        arguments = StockArguments.given(stock, xl=self.pools)
        unnamed = isinstance(subject_tokens, (list, tuple)) and not len(subject_tokens)
        prompts = read_prompts(self, arguments, prompt, layout_prompt, negative_prompt, finds_subjects=not unnamed)
        request = build_request(
            self,
            settings,
            arguments,
            prompts,
            self.latent_size(height, width, latents),
            latents=latents,
            control_image=control_image,
            subject_tokens=subject_tokens,
            with_references=False,
        )
        if request.tokens is None:
            given = {"context_limit": context_limit, "context_dtype": context_dtype}
            refuse("there are no subject_tokens", context_storage=context_storage, **given)
        output = lay_out(self, request)
        self.maybe_free_model_hooks()
        return output


def lay_out(pipe: PersonalizedPipeline, request: Request) -> LayoutRetouchOutput:
    """Run the layout stage."""
    costs = Costs(pipe._execution_device)
    with pipe.in_stage("layout", request.settings.guidance_scale):
        with costs.of("layout"):
            latents, contexts = _denoised(pipe, request, costs)
        images, nsfw = pipe.decode(latents, request.settings.output_type, costs, request.settings.generator)
    return LayoutRetouchOutput(
        images=images,
        latents=latents,
        contexts=contexts,
        nsfw_content_detected=nsfw,
        seconds=costs.seconds,
        rows=costs.rows,
    )


def _denoised(pipe: PersonalizedPipeline, request: Request, costs: Costs) -> tuple[Tensor, Contexts | None]:
    """The latents of the layouts, and what the retouch stage reads of them."""
    settings, solver, weights, count = request.settings, request.solver, request.weights, request.prompts.images
    with pipe.as_vanilla():
        vanilla = _condition(pipe, request, personal=False)
    conditions = [vanilla, _condition(pipe, request, personal=True)]  # of the vanilla and of the personalized model
    latents = pipe.initial_latents(count, request.size, pipe.prompt_dtype, settings.generator, request.latents)
    noise = latents / pipe.scheduler.init_noise_sigma
    control = pipe.control(request.control_image, settings.control_scale, count, request.size, latents.dtype)
    stepper = GuidedStepper(pipe, request, weights)
    recorder = _recorder(pipe, request, len(vanilla.embeds))

    def predictions(unet: torch.nn.Module, condition: Condition, i: int) -> list[Tensor]:
        inputs = torch.cat([latents] * (len(condition.embeds) // count)) * solver.input_scales[i]
        t = solver.timesteps[i]
        residuals = None if control is None else control.residuals(inputs, t, condition)
        out = predict(unet, inputs, t, condition, residuals)
        costs.count("layout", len(inputs))
        return [out[:count], out[-count:]]

    with recorder or nullcontext(), pipe.stage_bar("layout", solver.steps) as bar:
        for i, t in enumerate(solver.timesteps):
            if pipe.interrupt:
                continue
            by_vanilla = by_personal = None
            if weights[i] < 1:
                with pipe.as_vanilla():
                    by_vanilla = predictions(pipe.unet, conditions[0], i)
            if weights[i] > 0 or (recorder is not None and recorder.needs(i)):
                rows = len(conditions[1].embeds)
                with recorder.personal(i, rows) if recorder is not None else nullcontext():
                    by_personal = predictions(pipe.personal_unet, conditions[1], i)
            models = [x for x in (by_vanilla or by_personal, by_personal or by_vanilla) if x]  # a stand-in has weight 0
            noise_of_step = noise_like(latents, settings.generator) if settings.eta > 0 else None
            if recorder is not None:
                recorder.trajectory.append(latents)
            latents = stepper.step(i, latents, models, noise=noise_of_step)
            main = int(weights[i] >= 0.5)
            told = Told(latents, conditions[main], control)
            told = after_step(pipe, settings.callback_on_step_end, request.tensor_inputs, i, t, told)
            latents, conditions[main], control = told
            conditions[1 - main] = _as_many(conditions[1 - main], len(told.condition.embeds))
            bar.update()
    if recorder is None or pipe.interrupt:
        return latents, None
    return latents, replace(recorder.contexts(latents, noise), walk=solver.walk, words=request.subjects)


def _condition(pipe: PersonalizedPipeline, request: Request, *, personal: bool) -> Condition:
    """The condition of the prompts as one of the models reads them, with guidance the negative prompts before them."""
    guided = pipe.do_classifier_free_guidance
    negatives, prompts = request.prompts.embedded(pipe, personal=personal, guided=guided)
    condition = pipe.condition(prompts, request.size, request.stock)
    if negatives is None:
        return condition
    return Condition.join([pipe.condition(negatives, request.size, request.stock, negative=True), condition])


def _as_many(condition: Condition, rows: int) -> Condition:
    """The condition of one model with as many rows as that of the other, whose guidance a callback may have ended."""
    if len(condition.embeds) < rows:
        expected = "guidance that ends, or stays, between steps"
        fail(OP, "callback_on_step_end", expected, "guidance that begins", "both models' prompts would be needed")
    return condition if len(condition.embeds) == rows else condition.rows(slice(-rows, None))


def _recorder(pipe: PersonalizedPipeline, request: Request, rows: int) -> ContextRecorder | None:
    """The recorder of a layout stage whose images the retouch stage will read; None for others."""
    if request.tokens is None:
        return None
    settings = request.settings
    cached = settings.reading == "routing" and settings.contexts_from in (None, "trajectory")
    same_rows = pipe.guides(settings.guidance_scale) == request.retouch_guided
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
        dtype=settings.context_dtype,
        backend=settings.backend,
    )
