"""The two stages of Layout-and-Retouch (arXiv 2407.09779), for pipelines with a vanilla and a personalized model."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..checks import fail
from ..masks import subject_mask
from ..step_blend import step_blend
from .bank import ReferenceBank
from .components import OP, Callback, Generator, GivenImages, Image, as_list, as_mask, noise_like
from .condition import Condition, predict
from .install import install_processors, select_layers
from .inversion import renoise
from .matching import FeatureRecorder, matcher
from .output import LayoutRetouchOutput, timed
from .retouch import RetouchDenoiser
from .routing import RetouchBatch, route, swap
from .schedule import blend_weights, ddim_table, step_in_schedule
from .subject import TargetMasks, as_subjects, rescaled, shown_subjects

SOURCES = ("inversion", "renoise")
READINGS = ("routing", "swap")
DEFAULT_SWITCH = 0.3
"""Share of the steps for layout_steps and retouch_start: with 6 of 20, layouts stay and identity comes back."""

Blend = str | Callable[[int], float] | Sequence[float] | Tensor


class LayoutRetouch:
    """Personalized text-to-image in two stages: lay out with the vanilla model, retouch with the personalized one.

    `layout` denoises the first steps with the vanilla model and a prompt without the subject, the rest with the
    personalized one. `retouch` denoises targets in parallel with these layouts and with reference images; in the chosen
    self-attention layers a target's subject reads its references and its background reads the layout. `__call__` runs
    both. `reference_bank` computes what the references contribute, once for many prompts.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        layout_prompt: str | list[str],
        reference_image: Image | list[Image] | None = None,
        reference_prompt: str | list[str] | None = None,
        subject_tokens: str | Sequence[str] | Sequence[Sequence[str]] = (),
        *,
        reference_mask: Image | list[Image | None] | None = None,
        reference_subjects: Sequence[int] | None = None,
        reference_bank: ReferenceBank | None = None,
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
        reading: str = "routing",
        sources: str = "inversion",
        mask_blending: bool = False,
        mask_threshold: float | str = "otsu",
        control_image: Image | list[Image] | None = None,
        control_scale: float = 1.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        backend: str = "auto",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback = None,
    ) -> LayoutRetouchOutput | tuple:
        """Both stages.

        Args:
            prompt: with the subject's token, as "a sks ball on sand". A list gives several images; the references serve
                them all.
            layout_prompt: the same scene with the class noun alone, as "a ball on sand"; one for all or one per prompt.
            reference_image: an image of the subject, or several. reference_prompt: as "a sks ball"; one for all or one
                per reference.
            subject_tokens: words that stand for the subject in `prompt` and `reference_prompt`, as ("sks", "ball"). Of
                several subjects a list of such lists, as [("sks", "dog"), ("abc", "cat")], up to 6; the prompts have
                them all, a reference's prompt that of its own.
            reference_mask: (height, width) of any size, above half its range on the subject; of several references a
                list. None: from cross-attention.
            reference_subjects: which subject each reference shows. Default: the only one, or one reference for each.
            reference_bank: from the method of that name, in place of reference_image, reference_prompt, reference_mask.
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
            reading: of the paper's attention swapping. "routing": the target's queries attend to the references'
                subject or to the layout, by the mask. "swap": the layout's queries and keys, with values of the
                references where their tokens match the layout's (appearance matching, arXiv 2402.09812).
            sources: latents of layout and references at each step: by "inversion" (DDIM; keeps the layout better) or
                "renoise" (one noise for all steps; faster, and brings more of the subject back).
            mask_blending: adaptive mask blending. False: the layout's mask throughout. True: it moves to the target's
                own mask, and outside of both masks the latents are the layout's.
            mask_threshold: of `subject_mask`.
            control_image: what the pipeline's `controlnet` follows in both stages, for layouts and targets: one image
                for all or one per image. control_scale: its strength.
            generator: one, or one per image; latents: initial noise (n, C, height/f, width/f).
            backend: of all lr_kernels operators, see `multi_source_attention`.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called in both stages as (pipe, step, timestep, {"latents": …}); may return a dict
                with other latents.

        Returns:
            `LayoutRetouchOutput`, or (images, layout_images) where return_dict is False.

        Raises:
            ValueError: an argument that does not fit, named; a bank built for something else. NotImplementedError: a
            scheduler or an attention processor that the method cannot use; "swap" without layouts or with a bank.
        """
        prompt = [p for p in as_list(prompt) for _ in range(num_images_per_prompt)]

        def per_image(texts: str | list[str] | None) -> list[str | None]:
            texts = as_list(texts)
            return texts if len(texts) == 1 else [p for p in texts for _ in range(num_images_per_prompt)]

        shared = {
            "negative_prompt": per_image(negative_prompt),
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "eta": eta,
            "control_image": control_image,
            "control_scale": control_scale,
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
            reference_subjects=reference_subjects,
            reference_bank=reference_bank,
            retouch_start=retouch_start,
            retouch_end=retouch_end,
            retouch_layers=retouch_layers,
            reading=reading,
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
            negative = as_list(negative_prompt, count, "negative_prompt") if guided else []
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
        return LayoutRetouchOutput(images=images, latents=latents, nsfw_content_detected=nsfw, seconds=seconds)

    @torch.no_grad()
    def reference_bank(
        self,
        reference_image: Image | list[Image],
        reference_prompt: str | list[str],
        subject_tokens: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        reference_mask: Image | list[Image | None] | None = None,
        reference_subjects: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        retouch_start: int | None = None,
        retouch_end: int | None = None,
        retouch_layers: Sequence[int | str] | None = None,
        sources: str = "inversion",
        mask_threshold: float | str = "otsu",
        storage: str = "device",
        limit: int | None = None,
        backend: str = "auto",
    ) -> ReferenceBank:
        """What the references contribute to the retouch stage: keys and values of every layer and step that shares.

        Pass it as `reference_bank` to any number of calls with the same size, steps, range of steps, layers (or fewer)
        and with or without guidance as here; `save` keeps it for other processes. Arguments as in `__call__`, and
        storage, limit as in `ReferenceBank`.
        """
        device = self._execution_device
        self._check_sources(sources)
        timesteps = self.begin(num_inference_steps, device)
        start, end = self._range(retouch_start, retouch_end, num_inference_steps)
        layers = select_layers(self.personal_unet, "self", retouch_layers)
        subjects = as_subjects(subject_tokens)
        images = _as_images(reference_image)
        shows = shown_subjects(reference_subjects, len(images), len(subjects))
        size = self.latent_size(height, width, None)
        prompts = as_list(reference_prompt, len(images), "reference_prompt")
        negatives = [None] * len(images) if guidance_scale > 1 else []
        condition = self.embed(negatives + prompts, size, personal=True)
        tokens = self.subject_tokens(prompts, subjects, shows)
        own = condition.rows(slice(-len(images), None))
        given = self.given_images(None, self._references(images, size, own), own, tokens, None)
        to_mask = partial(self._to_mask, size=size, threshold=mask_threshold, backend=backend)
        bank = ReferenceBank(timesteps[start:end].tolist(), storage=storage, limit=limit)
        masks = _masks(reference_mask, len(images))
        maps = self.subject_maps(given, backend=backend) if any(mask is None for mask in masks) else None
        bank.foreground = self._foreground(masks, maps, shows, to_mask, size)
        trajectory = self._trajectory(given, sources, start, backend)
        with install_processors(layers, bank.processors(layers)), self.progress_bar(total=end - start) as bar:
            for step in range(end - start):
                latents = torch.cat([trajectory[step]] * (2 if guidance_scale > 1 else 1))
                with bank.extract(step):
                    predict(self.personal_unet, latents, timesteps[start + step], condition)
                bar.update()
        self.maybe_free_model_hooks()
        return bank

    @torch.no_grad()
    def retouch(
        self,
        prompt: str | list[str],
        reference_image: Image | list[Image] | None = None,
        reference_prompt: str | list[str] | None = None,
        subject_tokens: str | Sequence[str] | Sequence[Sequence[str]] = (),
        *,
        context_latents: Tensor | None,
        reference_mask: Image | list[Image | None] | None = None,
        reference_subjects: Sequence[int] | None = None,
        reference_bank: ReferenceBank | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        retouch_start: int | None = None,
        retouch_end: int | None = None,
        retouch_layers: Sequence[int | str] | None = None,
        reading: str = "routing",
        sources: str = "inversion",
        mask_blending: bool = False,
        mask_threshold: float | str = "otsu",
        control_image: Image | list[Image] | None = None,
        control_scale: float = 1.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        backend: str = "auto",
        output_type: str = "pil",
        callback_on_step_end: Callback = None,
    ) -> LayoutRetouchOutput:
        """Stage 2: targets take their layout from the contexts and their appearance from the references.

        Arguments as in `__call__`, and

        Args:
            context_latents: (n, C, height/f, width/f), clean latents of the layouts, from `layout` or `encode_images`.
                None: the references alone. The targets then start from noise; from retouch_start on, their subjects by
                their own cross-attention read the references' besides their own row.
            height, width, latents: only without contexts.
        """
        prompt = as_list(prompt)
        count, steps, guided, device = len(prompt), num_inference_steps, guidance_scale > 1, self._execution_device
        self._check_sources(sources)
        if reading not in READINGS:
            fail(OP, "reading", "one of " + ", ".join(READINGS), repr(reading))
        has_context = context_latents is not None
        if has_context:
            for name, x in (("height", height), ("width", width), ("latents", latents)):
                if x is not None:
                    fail(OP, name, "None, since context_latents are given", type(x).__name__)
            if len(context_latents) != count:
                fail(OP, "context_latents", f"{count} rows, one per prompt", len(context_latents))
        if reading == "swap" and (reference_bank is not None or not has_context):
            expected = "'routing' with a reference_bank, which has no features to match, or without layouts"
            fail(OP, "reading", expected, "'swap'", error=NotImplementedError)
        timesteps = self.begin(steps, device)
        start, end = self._range(retouch_start, retouch_end, steps)
        layers = select_layers(self.personal_unet, "self", retouch_layers)
        table = ddim_table(self.scheduler, guidance_scale=guidance_scale if guided else 1, eta=eta, device=device)
        subjects = as_subjects(subject_tokens)
        bank_steps = {}
        if reference_bank is None:
            images = _as_images(reference_image)
            references = len(images)
        else:
            for name, x in (("reference_image", reference_image), ("reference_prompt", reference_prompt),
                            ("reference_mask", reference_mask)):  # fmt: skip
                if x is not None:
                    fail(OP, name, "None, since the reference_bank has it", type(x).__name__)
            images, references = [], len(reference_bank.foreground)
            bank_steps = {i: reference_bank.step_of(self.scheduler.timesteps[i]) for i in range(start, end)}
        shows = shown_subjects(reference_subjects, references, len(subjects))
        batch = RetouchBatch(count, has_context, guided, references, banked=reference_bank is not None)
        if reference_bank is not None and reference_bank.rows_held != references * batch.halves:
            built = "with guidance" if guided else "without guidance"
            fail(OP, "reference_bank", f"built {built}: {references * batch.halves} rows", reference_bank.rows_held)
        size = self.latent_size(height, width, context_latents if has_context else latents)
        seconds: dict[str, float] = {}

        with timed(seconds, "encode", device):
            copies = 2 if has_context else 1
            reference_prompts = as_list(reference_prompt, references, "reference_prompt") if images else []
            conditions = prompt * copies + reference_prompts
            negatives = as_list(negative_prompt, count, "negative_prompt") * copies + [None] * len(images)
            condition = self.embed((negatives if guided else []) + conditions, size, personal=True)
            tokens = self.subject_tokens(conditions, subjects, [None] * (count * copies) + list(shows)[: len(images)])
            dtype = condition.embeds.dtype
            if has_context:
                latents = context_latents.to(device, dtype)
            else:
                latents = self.initial_latents(count, size, dtype, generator, latents)
            rows = slice(count, None)  # of a half: all but the targets
            own = condition.rows(slice(-batch.half, None)).rows(rows)
            contexts = latents if has_context else None
            given = self.given_images(contexts, self._references(images, size, own), own, tokens.rows(rows), generator)
            control = self.control(control_image, control_scale, count, size, dtype)

        to_mask = partial(self._to_mask, size=size, threshold=mask_threshold, backend=backend)
        with timed(seconds, "mask", device):
            features = FeatureRecorder(self.personal_unet) if reading == "swap" else None
            masks = _masks(reference_mask, len(images))
            maps = None
            if has_context or any(mask is None for mask in masks):
                maps = self.subject_maps(given, features, backend=backend)
            context_maps = maps[:, :count] if has_context else None
            context_mask = to_mask(context_maps) if has_context else None
            if reference_bank is None:
                seen = self._foreground(masks, None if maps is None else maps[:, -references:], shows, to_mask, size)
            else:
                seen = reference_bank.foreground
            tracker = None
            if mask_blending or not has_context:
                tracker = TargetMasks(rescaled(context_maps) if has_context else None, to_mask, steps - start)

        begin = start if has_context else 0
        with timed(seconds, "invert", device):
            trajectory = self._trajectory(given, sources, begin, backend)

        if reading == "swap":
            matches = matcher(features.features, references, backend=backend)

            def read(mask: Tensor, grid: tuple[int, int]) -> object:
                return swap(batch, mask, seen, grid, shows, matches(grid))
        else:

            def read(mask: Tensor, grid: tuple[int, int]) -> object:
                return route(batch, mask, seen, grid, shows)

        denoiser = RetouchDenoiser(
            self.personal_unet,
            batch,
            condition,
            layers=layers,
            share=range(start, end),
            reading=read,
            mask=context_mask,
            tracker=tracker,
            tokens=tokens.rows(slice(count)),
            latent_size=size,
            bank=reference_bank,
            bank_steps=bank_steps,
            control=control,
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
                    mask=(denoiser.mask | context_mask).any(0) if keep else None,
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
            masks=denoiser.mask.any(0),
            subject_masks=denoiser.mask,
            reference_mask=seen,
            nsfw_content_detected=nsfw,
            seconds=seconds,
        )

    def _check_sources(self, sources: str) -> None:
        if sources not in SOURCES:
            fail(OP, "sources", "one of " + ", ".join(SOURCES), repr(sources))

    def _range(self, start: int | None, end: int | None, steps: int) -> tuple[int, int]:
        """The steps that share, from and to."""
        start = step_in_schedule("retouch_start", start, round(DEFAULT_SWITCH * steps), 0, steps - 1)
        return start, step_in_schedule("retouch_end", end, steps, start, steps)

    def _references(self, images: list[Image], size: tuple[int, int], condition: Condition) -> Tensor:
        """Latents (R, C, *size) of the references; R may be 0."""
        if not images:
            return condition.embeds.new_empty(0, self.unet.config.in_channels, *size)
        return self.encode_images(images, *(x * self.vae_scale_factor for x in size)).to(condition.embeds.dtype)

    def _to_mask(self, maps: Tensor, *, size: tuple[int, int], threshold: float | str, backend: str) -> Tensor:
        """Maps (S, n, L, h, w) -> bool (S, n, *size)."""
        masks = subject_mask(maps.flatten(0, 1), size=size, threshold=threshold, backend=backend)
        return masks.unflatten(0, maps.shape[:2])

    def _foreground(
        self, masks: list[Image | None], maps: Tensor | None, shows: Sequence[int], to_mask: Callable, size: tuple
    ) -> Tensor:
        """bool (R, *size) of the references: the masks given, else those of the maps (S, R, L, h, w)."""
        found = []
        for r, (mask, subject) in enumerate(zip(masks, shows)):
            if mask is None:
                seen = to_mask(maps[subject : subject + 1, r : r + 1])[0]
            else:
                seen = as_mask(mask, size, self._execution_device)
            if not seen.any():
                name = "reference_mask" if len(masks) == 1 else f"reference_mask[{r}]"
                hint = "check subject_tokens and reference_prompt, or pass a mask"
                fail(OP, name, "a foreground", "none", hint)
            found.append(seen)
        return torch.cat(found)

    def _trajectory(self, given: GivenImages, sources: str, start: int, backend: str) -> list[Tensor]:
        """Latents of the given images from step `start` on, and the clean ones."""
        if sources == "inversion" and len(given.latents):
            return self.invert(given, start=start, backend=backend)
        return renoise(given.latents, given.noise, self.scheduler, start=start)


def _as_images(images: Image | list[Image] | None) -> list[Image]:
    """One image, several, or a batch (R, ...) -> a list."""
    if images is None:
        fail(OP, "reference_image", "an image, several, or a reference_bank", None)
    if isinstance(images, (list, tuple)):
        found = list(images)
    elif getattr(images, "ndim", 0) == 4:
        found = [images[r : r + 1] for r in range(len(images))]
    else:
        found = [images]
    if not found:
        fail(OP, "reference_image", "at least one image", 0)
    return found


def _masks(masks: Image | list[Image | None] | None, references: int) -> list[Image | None]:
    """One entry per reference."""
    found = list(masks) if isinstance(masks, (list, tuple)) else [masks] * (references if masks is None else 1)
    if len(found) != references:
        fail(OP, "reference_mask", f"{references} masks, one per reference", len(found))
    return found
