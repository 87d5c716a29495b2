"""Stage 2 of Layout-and-Retouch (arXiv 2407.09779): multi-source attention swapping."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..checks import fail
from ..masks import subject_mask
from ..step_blend import step_blend
from .bank import ReferenceBank
from .components import OP, Callback, Generator, GivenImages, Image, as_list, as_negatives, noise_like
from .condition import Condition, predict
from .denoiser import RetouchDenoiser
from .install import install_processors
from .inversion import renoise
from .matching import FeatureRecorder, matcher
from .output import LayoutRetouchOutput, timed
from .request import RetouchRequest, refuse, retouch_request
from .routing import RetouchBatch, Routing, Swap, route, swap
from .schedule import ddim_table
from .subject import TargetMasks, rescaled


class RetouchStage:
    """The methods `retouch` and `reference_bank` of the pipelines; arguments are described at `LayoutRetouch`."""

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
        size = self.latent_size(height, width, None)
        request = retouch_request(
            self,
            [],
            reference_image,
            reference_prompt,
            subject_tokens,
            size,
            reference_mask=reference_mask,
            reference_subjects=reference_subjects,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            retouch_start=retouch_start,
            retouch_end=retouch_end,
            retouch_layers=retouch_layers,
            sources=sources,
        )
        images, prompts, start, end = request.references, request.reference_prompts, request.start, request.end
        if start == end:
            fail(OP, "retouch_end", f"above retouch_start, {start}", end)
        negatives = [None] * len(images) if guidance_scale > 1 else []
        condition = self.embed(negatives + prompts, size, personal=True)
        own = condition.rows(slice(-len(images), None))
        given = self.given_images(None, self._references(images, size, own), own, request.tokens, None)
        to_mask = partial(self._to_mask, size=size, threshold=mask_threshold, backend=backend)
        bank = ReferenceBank(request.timesteps[start:end].tolist(), storage=storage, limit=limit)
        maps = self.subject_maps(given, backend=backend) if request.needs_maps else None
        bank.foreground = self._foreground(request, maps, to_mask, size)
        bank.shows, bank.words = request.shows, request.subjects
        trajectory = self._trajectory(given, sources, start, backend)
        installed = install_processors(request.layers, bank.processors(request.layers))
        with installed, self.progress_bar(total=end - start) as bar:
            for step in range(end - start):
                latents = torch.cat([trajectory[step]] * (2 if guidance_scale > 1 else 1))
                with bank.extract(step):
                    predict(self.personal_unet, latents, request.timesteps[start + step], condition)
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
        has_context, has_bank = context_latents is not None, reference_bank is not None
        if has_context:
            refuse("context_latents are given", height=height, width=width, latents=latents)
            channels = self.unet.config.in_channels
            if not isinstance(context_latents, Tensor) or context_latents.shape[:-2] != (count, channels):
                got = getattr(context_latents, "shape", type(context_latents).__name__)
                fail(OP, "context_latents", f"shape ({count}, {channels}, height, width), one row per prompt", got)
        elif reading == "swap":
            fail(OP, "reading", "'routing' without layouts", "'swap'", error=NotImplementedError)
        size = self.latent_size(height, width, context_latents if has_context else latents)
        request = retouch_request(
            self,
            prompt,
            reference_image,
            reference_prompt,
            subject_tokens,
            size,
            reference_mask=reference_mask,
            reference_subjects=reference_subjects,
            reference_bank=reference_bank,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            retouch_start=retouch_start,
            retouch_end=retouch_end,
            retouch_layers=retouch_layers,
            reading=reading,
            sources=sources,
            negative_prompt=negative_prompt,
            generator=generator,
        )
        start, end, timesteps, references = request.start, request.end, request.timesteps, request.references
        table = ddim_table(self.scheduler, guidance_scale=guidance_scale if guided else 1, eta=eta, device=device)
        batch = RetouchBatch(count, has_context, guided, len(request.shows), banked=has_bank)
        seconds: dict[str, float] = {}

        with timed(seconds, "encode", device):
            copies = 2 if has_context else 1
            conditions = prompt * copies + request.reference_prompts
            negatives = as_negatives(negative_prompt, count) * copies + [None] * len(references)
            condition = self.embed((negatives if guided else []) + conditions, size, personal=True)
            tokens = request.tokens.repeated(count, copies)
            dtype = condition.embeds.dtype
            if has_context:
                latents = context_latents.to(device, dtype)
            else:
                latents = self.initial_latents(count, size, dtype, generator, latents)
            rows = slice(count, None)  # of a half: all but the targets
            own = condition.rows(slice(-batch.half, None)).rows(rows)
            contexts = latents if has_context else None
            clean = self._references(references, size, own)
            given = self.given_images(contexts, clean, own, tokens.rows(rows), generator)
            control = self.control(control_image, control_scale, count, size, dtype)

        to_mask = partial(self._to_mask, size=size, threshold=mask_threshold, backend=backend)
        with timed(seconds, "mask", device):
            features = FeatureRecorder(self.personal_unet) if reading == "swap" else None
            maps = self.subject_maps(given, features, backend=backend) if has_context or request.needs_maps else None
            context_maps = maps[:, :count] if has_context else None
            context_mask = to_mask(context_maps) if has_context else None
            if has_context:
                _warn_of_nothing(context_mask, mask_blending)
            if has_bank:
                seen = reference_bank.foreground
            else:
                reference_maps = None if maps is None else maps[:, -len(references) :]
                seen = self._foreground(request, reference_maps, to_mask, size)
            tracker = None
            if mask_blending or not has_context:
                tracker = TargetMasks(rescaled(context_maps) if has_context else None, to_mask, steps - start)

        begin = start if has_context else 0
        with timed(seconds, "invert", device):
            trajectory = self._trajectory(given, sources, begin, backend)

        matches = None if features is None else matcher(features.features, len(references), backend=backend)

        def read(mask: Tensor, grid: tuple[int, int]) -> Routing | Swap:
            if matches is None:
                return route(batch, mask, seen, grid, request.shows)
            return swap(batch, mask, seen, grid, request.shows, matches(grid))

        denoiser = RetouchDenoiser(
            self.personal_unet,
            batch,
            condition,
            layers=request.layers,
            share=range(start, end),
            reading=read,
            mask=context_mask,
            tracker=tracker,
            tokens=tokens.rows(slice(count)),
            latent_size=size,
            bank=reference_bank,
            bank_steps=request.bank_steps,
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
        self.maybe_free_model_hooks()
        return LayoutRetouchOutput(
            images=images,
            latents=latents,
            masks=None if denoiser.mask is None else denoiser.mask.any(0),
            subject_masks=denoiser.mask,
            reference_mask=seen,
            nsfw_content_detected=nsfw,
            seconds=seconds,
        )

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
        self, request: RetouchRequest, maps: Tensor | None, to_mask: Callable[[Tensor], Tensor], size: tuple[int, int]
    ) -> Tensor:
        """bool (R, *size) of the references: the masks given, else those of the maps (S, R, L, h, w)."""
        found = []
        for r, (mask, subject) in enumerate(zip(request.masks, request.shows)):
            if mask is None:
                seen = to_mask(maps[subject : subject + 1, r : r + 1])[0]
            else:
                seen = mask
            if not seen.any():
                name = "reference_mask" if len(request.masks) == 1 else f"reference_mask[{r}]"
                hint = "check subject_tokens and reference_prompt, or pass a mask"
                fail(OP, name, "a foreground", "none", hint)
            found.append(seen)
        return torch.cat(found)

    def _trajectory(self, given: GivenImages, sources: str, start: int, backend: str) -> list[Tensor]:
        """Latents of the given images from step `start` on, and the clean ones."""
        if sources == "inversion" and len(given.latents):
            return self.invert(given, start=start, backend=backend)
        return renoise(given.latents, given.noise, self.scheduler, start=start)


def _warn_of_nothing(masks: Tensor, may_change: bool) -> None:
    """Say which subjects of which images the references cannot reach."""
    for subject, image in (~masks.flatten(2).any(2)).nonzero().tolist():
        warnings.warn(
            f"lr_kernels.{OP}: no foreground was found for subject {subject} in layout {image}: it takes nothing from "
            f"the references{' unless a later step finds one' if may_change else ''}; see mask_threshold and "
            "subject_tokens",
            RuntimeWarning,
            stacklevel=4,
        )
