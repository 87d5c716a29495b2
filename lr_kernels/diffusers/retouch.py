"""Stage 2 of Layout-and-Retouch (arXiv 2407.09779): multi-source attention swapping."""

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
from .denoiser import RetouchDenoiser
from .install import install_processors, select_layers
from .inversion import renoise
from .matching import FeatureRecorder, matcher
from .output import LayoutRetouchOutput, timed
from .routing import RetouchBatch, Routing, Swap, route, swap
from .schedule import DEFAULT_SWITCH, ddim_table, step_in_schedule
from .subject import TargetMasks, as_subjects, rescaled, shown_subjects

SOURCES = ("inversion", "renoise")
READINGS = ("routing", "swap")


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
        has_context, has_bank = context_latents is not None, reference_bank is not None
        if has_context:
            _refuse("context_latents are given", height=height, width=width, latents=latents)
            if len(context_latents) != count:
                fail(OP, "context_latents", f"{count} rows, one per prompt", len(context_latents))
        if has_bank:
            _refuse(
                "the reference_bank has it",
                reference_image=reference_image,
                reference_prompt=reference_prompt,
                reference_mask=reference_mask,
            )
        if reading == "swap" and (has_bank or not has_context):
            expected = "'routing' with a reference_bank, which has no features to match, or without layouts"
            fail(OP, "reading", expected, "'swap'", error=NotImplementedError)
        timesteps = self.begin(steps, device)
        start, end = self._range(retouch_start, retouch_end, steps)
        layers = select_layers(self.personal_unet, "self", retouch_layers)
        table = ddim_table(self.scheduler, guidance_scale=guidance_scale if guided else 1, eta=eta, device=device)
        subjects = as_subjects(subject_tokens)
        references = [] if has_bank else _as_images(reference_image)
        count_references = _banked_references(reference_bank, guided) if has_bank else len(references)
        shows = shown_subjects(reference_subjects, count_references, len(subjects))
        batch = RetouchBatch(count, has_context, guided, count_references, banked=has_bank)
        bank_steps = {}
        if has_bank:
            bank_steps = {i: reference_bank.step_of(self.scheduler.timesteps[i]) for i in range(start, end)}
        size = self.latent_size(height, width, context_latents if has_context else latents)
        seconds: dict[str, float] = {}

        with timed(seconds, "encode", device):
            copies = 2 if has_context else 1
            conditions = prompt * copies
            if references:
                conditions += as_list(reference_prompt, len(references), "reference_prompt")
            negatives = as_list(negative_prompt, count, "negative_prompt") * copies + [None] * len(references)
            condition = self.embed((negatives if guided else []) + conditions, size, personal=True)
            shown = [None] * (count * copies) + list(shows[: len(references)])
            tokens = self.subject_tokens(conditions, subjects, shown)
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
            masks = _masks(reference_mask, len(references))
            maps = None
            if has_context or any(mask is None for mask in masks):
                maps = self.subject_maps(given, features, backend=backend)
            context_maps = maps[:, :count] if has_context else None
            context_mask = to_mask(context_maps) if has_context else None
            if has_bank:
                seen = reference_bank.foreground
            else:
                reference_maps = None if maps is None else maps[:, -len(references) :]
                seen = self._foreground(masks, reference_maps, shows, to_mask, size)
            tracker = None
            if mask_blending or not has_context:
                tracker = TargetMasks(rescaled(context_maps) if has_context else None, to_mask, steps - start)

        begin = start if has_context else 0
        with timed(seconds, "invert", device):
            trajectory = self._trajectory(given, sources, begin, backend)

        matches = None if features is None else matcher(features.features, len(references), backend=backend)

        def read(mask: Tensor, grid: tuple[int, int]) -> Routing | Swap:
            if matches is None:
                return route(batch, mask, seen, grid, shows)
            return swap(batch, mask, seen, grid, shows, matches(grid))

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


def _refuse(reason: str, **arguments: object) -> None:
    for name, x in arguments.items():
        if x is not None:
            fail(OP, name, f"None, since {reason}", type(x).__name__)


def _banked_references(bank: ReferenceBank, guided: bool) -> int:
    """How many references a bank has, whose rows are theirs for each half of the guidance."""
    if bank.foreground is None:
        fail(OP, "reference_bank", "one with a foreground, as the pipeline's reference_bank makes it", "none")
    count = len(bank.foreground)
    if bank.rows_held != count * (2 if guided else 1):
        expected = f"{count * (2 if guided else 1)} rows, built {'with' if guided else 'without'} guidance"
        fail(OP, "reference_bank", expected, bank.rows_held)
    return count


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
