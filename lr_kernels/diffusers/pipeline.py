"""Layout-and-Retouch (arXiv 2407.09779) as a diffusers pipeline for Stable Diffusion 1.x and 2.x."""

from collections.abc import Callable, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..checks import fail
from ..masks import subject_mask
from ..step_blend import step_blend
from .components import (
    OP,
    Callback,
    Generator,
    Image,
    PersonalizedStableDiffusionPipeline,
    as_list,
    as_mask,
    noise_like,
)
from .install import select_layers
from .inversion import renoise
from .output import LayoutRetouchOutput, timed
from .retouch import RetouchDenoiser
from .routing import RetouchBatch
from .schedule import blend_weights, ddim_table, step_in_schedule
from .subject import TargetMasks, rescaled

SOURCES = ("inversion", "renoise")
DEFAULT_SWITCH = 0.3
"""Share of the steps for layout_steps and retouch_start: with 6 of 20, layouts stay and identity comes back."""

Blend = str | Callable[[int], float] | Sequence[float] | Tensor


class StableDiffusionLayoutRetouchPipeline(PersonalizedStableDiffusionPipeline):
    """Personalized text-to-image in two stages: lay out with the vanilla model, retouch with the personalized one.

    `layout` denoises the first steps with `unet` and a prompt without the subject, the rest with `personalized_unet`.
    `retouch` denoises targets in parallel with these layouts and a reference image; in the chosen self-attention layers
    a target's foreground reads the reference's foreground and its background reads the layout. `__call__` runs both.

    Components: those of `PersonalizedStableDiffusionPipeline`. Nothing in the models is changed after a call.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        layout_prompt: str | list[str],
        reference_image: Image,
        reference_prompt: str,
        subject_tokens: str | Sequence[str],
        *,
        reference_mask: Image | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
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
        sources: str = "inversion",
        mask_blending: bool = False,
        mask_threshold: float | str = "otsu",
        generator: Generator = None,
        latents: Tensor | None = None,
        backend: str = "auto",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback = None,
    ) -> LayoutRetouchOutput | tuple:
        """Both stages.

        Args:
            prompt: with the subject's token, as "a sks ball on sand". A list gives several images; one reference serves
                them all.
            layout_prompt: the same scene with the class noun alone, as "a ball on sand"; one for all or one per prompt.
            reference_image: one image of the subject. reference_prompt: as "a sks ball".
            subject_tokens: words that stand for the subject in `prompt` and `reference_prompt`, as ("sks", "ball").
            reference_mask: (height, width) of any size, above half its range on the subject. Default: from
                cross-attention.
            negative_prompt: one for all, or one per prompt. num_images_per_prompt: images of each prompt, in order.
            height, width: pixels, multiples of the VAE's factor. Default: the UNet's sample size.
            guidance_scale: classifier-free guidance in both stages; at most 1: none. eta: η of DDIM, 0 to 1.
            layout_steps: λ1, steps of the vanilla model: all of them give the vanilla image, 0 the personalized one.
                Default: 0.3 of the steps.
            layout_blend: weight of the personalized model at each step, see `blend_weights`: "hard" switches after
                layout_steps, "linear" and "cosine" ramp up from there.
            retouch_start: step at which the targets leave the layouts' latents. Default: 0.3 of the steps.
            retouch_end: step from which the images no longer share attention. Default: the number of steps.
            retouch_layers: self-attention layers that share, by scale (1: tokens as fine as the latents, 2: half as
                fine) or by the beginning of their name, as "up_blocks.2". Default: all.
            sources: latents of layout and reference at each step: by "inversion" (DDIM; keeps the layout better) or
                "renoise" (one noise for all steps; faster, and brings more of the subject back).
            mask_blending: adaptive mask blending. False: the layout's mask throughout. True: it moves to the target's
                own mask, and outside of both masks the latents are the layout's.
            mask_threshold: of `subject_mask`.
            generator: one, or one per image; latents: initial noise (n, C, height/f, width/f).
            backend: of all lr_kernels operators, see `multi_source_attention`.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called in both stages as (pipe, step, timestep, {"latents": …}); may return a dict
                with other latents.

        Returns:
            `LayoutRetouchOutput`, or (images, layout_images) where return_dict is False.

        Raises:
            ValueError: an argument that does not fit, named. NotImplementedError: a scheduler or an attention processor
            that the method cannot use.
        """
        prompt = [p for p in as_list(prompt) for _ in range(num_images_per_prompt)]

        def per_image(texts: str | list[str]) -> list[str]:
            texts = as_list(texts)
            return texts if len(texts) == 1 else [p for p in texts for _ in range(num_images_per_prompt)]

        shared = {
            "negative_prompt": per_image(negative_prompt or ""),
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "eta": eta,
            "generator": generator,
            "backend": backend,
            "output_type": output_type,
            "callback_on_step_end": callback_on_step_end,
        }
        layout = self.layout(
            prompt,
            per_image(layout_prompt),
            height=height,
            width=width,
            layout_steps=layout_steps,
            layout_blend=layout_blend,
            latents=latents,
            **shared,
        )
        output = self.retouch(
            prompt,
            reference_image,
            reference_prompt,
            subject_tokens,
            context_latents=layout.latents,
            reference_mask=reference_mask,
            retouch_start=retouch_start,
            retouch_end=retouch_end,
            retouch_layers=retouch_layers,
            sources=sources,
            mask_blending=mask_blending,
            mask_threshold=mask_threshold,
            **shared,
        )
        output.layout_images = layout.images
        stages = (*layout.seconds, *output.seconds)
        output.seconds = {stage: layout.seconds.get(stage, 0.0) + output.seconds.get(stage, 0.0) for stage in stages}
        self.maybe_free_model_hooks()
        return output if return_dict else (output.images, output.layout_images)

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
        halves = 2 if guided else 1
        seconds: dict[str, float] = {}

        def predictions(unet: UNet2DConditionModel, embeds: Tensor, t: Tensor) -> list[Tensor]:
            out = unet(torch.cat([latents] * halves), t, encoder_hidden_states=embeds, return_dict=False)[0]
            return [out[:count], out[-count:]]

        with timed(seconds, "layout", device), self.progress_bar(total=steps) as bar:
            negative = as_list(negative_prompt or "", count, "negative_prompt") if guided else []
            vanilla = self.embed(self.text_encoder, negative + as_list(layout_prompt, count, "layout_prompt"), device)
            personal = self.embed(self.personal_encoder, negative + prompt, device)
            latents = self.initial_latents(count, height, width, vanilla.dtype, generator, latents)
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                by_vanilla = predictions(self.unet, vanilla, t) if weights[i] < 1 else None
                by_personal = predictions(self.personalized_unet, personal, t) if weights[i] > 0 else None
                models = [*(by_vanilla or by_personal), *(by_personal or by_vanilla)]  # a stand-in has weight 0
                noise = noise_like(latents, generator) if eta > 0 else None
                latents = step_blend(latents, models, table, i, noise=noise, backend=backend)
                latents = self.after_step(callback_on_step_end, i, t, latents)
                bar.update()
        images, nsfw = self.decode(latents, output_type, seconds)
        return LayoutRetouchOutput(images=images, latents=latents, nsfw_content_detected=nsfw, seconds=seconds)

    @torch.no_grad()
    def retouch(
        self,
        prompt: str | list[str],
        reference_image: Image,
        reference_prompt: str,
        subject_tokens: str | Sequence[str],
        *,
        context_latents: Tensor | None,
        reference_mask: Image | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        retouch_start: int | None = None,
        retouch_end: int | None = None,
        retouch_layers: Sequence[int | str] | None = None,
        sources: str = "inversion",
        mask_blending: bool = False,
        mask_threshold: float | str = "otsu",
        generator: Generator = None,
        latents: Tensor | None = None,
        backend: str = "auto",
        output_type: str = "pil",
        callback_on_step_end: Callback = None,
    ) -> LayoutRetouchOutput:
        """Stage 2: targets take their layout from the contexts and their appearance from the reference.

        Arguments as in `__call__`, and

        Args:
            context_latents: (n, C, height/f, width/f), clean latents of the layouts, from `layout` or `encode_images`.
                None: the reference alone. The targets then start from noise; from retouch_start on, their foreground by
                their own cross-attention reads the reference's foreground besides their own row.
            height, width, latents: only without contexts.
        """
        prompt = as_list(prompt)
        words = as_list(subject_tokens)
        count, steps, guided, device = len(prompt), num_inference_steps, guidance_scale > 1, self._execution_device
        if sources not in SOURCES:
            fail(OP, "sources", "one of " + ", ".join(SOURCES), repr(sources))
        timesteps = self.begin(steps, device)
        start = step_in_schedule("retouch_start", retouch_start, round(DEFAULT_SWITCH * steps), 0, steps - 1)
        end = step_in_schedule("retouch_end", retouch_end, steps, start, steps)
        layers = select_layers(self.personalized_unet, "self", retouch_layers)
        table = ddim_table(self.scheduler, guidance_scale=guidance_scale if guided else 1, eta=eta, device=device)
        has_context = context_latents is not None
        if has_context:
            for name, x in (("height", height), ("width", width), ("latents", latents)):
                if x is not None:
                    fail(OP, name, "None, since context_latents are given", type(x).__name__)
            if len(context_latents) != count:
                fail(OP, "context_latents", f"{count} rows, one per prompt", len(context_latents))
        batch = RetouchBatch(count, has_context, guided)
        seconds: dict[str, float] = {}

        with timed(seconds, "encode", device):
            copies = 2 if has_context else 1
            negatives = as_list(negative_prompt or "", count, "negative_prompt") * copies + [""] if guided else []
            conditions = prompt * copies + [reference_prompt]
            embeds = self.embed(self.personal_encoder, negatives + conditions, device)
            tokens = self.subject_tokens(conditions, words, device)
            if has_context:
                latents = context_latents.to(device, embeds.dtype)
            else:
                latents = self.initial_latents(count, height, width, embeds.dtype, generator, latents)
            size = tuple(latents.shape[2:])
            contexts = latents if has_context else None
            given = self.given_images(contexts, reference_image, size, embeds, tokens, generator)

        def to_mask(maps: Tensor) -> Tensor:
            return subject_mask(maps, size=size, threshold=mask_threshold, backend=backend)

        with timed(seconds, "mask", device):
            maps = None
            if has_context or reference_mask is None:
                maps = self.subject_maps(given, backend=backend)
            context_mask = to_mask(maps[:-1]) if has_context else None
            seen = to_mask(maps[-1:]) if reference_mask is None else as_mask(reference_mask, size, device)
            if not seen.any():
                hint = "check subject_tokens and reference_prompt, or pass a mask"
                fail(OP, "reference_mask", "a foreground", "none", hint)
            tracker = None
            if mask_blending or not has_context:
                tracker = TargetMasks(rescaled(maps[:-1]) if has_context else None, to_mask, steps - start)

        begin = start if has_context else 0
        with timed(seconds, "invert", device):
            if sources == "inversion":
                trajectory = self.invert(given, start=begin, backend=backend)
            else:
                trajectory = renoise(given.latents, given.noise, self.scheduler, start=begin)

        denoiser = RetouchDenoiser(
            self.personalized_unet,
            batch,
            embeds,
            layers=layers,
            share=range(start, end),
            reference_mask=seen,
            mask=context_mask,
            tracker=tracker,
            tokens=tokens.rows(slice(count)),
            latent_size=size,
            backend=backend,
        )
        latents = trajectory[0][:count] if has_context else latents
        with timed(seconds, "retouch", device), self.progress_bar(total=steps - begin) as bar, denoiser:
            for i, t in enumerate(timesteps[begin:], begin):
                if self.interrupt:
                    continue
                predictions = denoiser.predict(latents, trajectory[i - begin], i, t)
                keep = mask_blending and has_context
                latents = step_blend(
                    latents,
                    predictions,
                    table,
                    i,
                    mask=denoiser.mask | context_mask if keep else None,
                    background=trajectory[i + 1 - begin][:count] if keep else None,
                    noise=noise_like(latents, generator) if eta > 0 else None,
                    backend=backend,
                )
                latents = self.after_step(callback_on_step_end, i, t, latents)
                bar.update()
        images, nsfw = self.decode(latents, output_type, seconds)
        return LayoutRetouchOutput(
            images=images,
            latents=latents,
            masks=denoiser.mask,
            reference_mask=seen,
            nsfw_content_detected=nsfw,
            seconds=seconds,
        )
