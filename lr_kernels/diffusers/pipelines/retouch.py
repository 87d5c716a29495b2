"""Stage 2 of Layout-and-Retouch (arXiv 2407.09779): multi-source attention swapping."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...runtime.checks import fail
from ..processors.bank import ReferenceBank
from ..processors.install import install_processors
from ..processors.routing import RetouchBatch, Routing, Swap, route, swap
from ..subjects.foreground import WARM, foreground, warn_of_implausible
from ..subjects.matching import matcher
from ..subjects.subject import TargetMasks
from .components import MAP_TIMES, PersonalizedPipeline, noise_like
from .condition import Condition, predict
from .contexts import Contexts
from .denoiser import RetouchDenoiser
from .guidance import GuidedStepper
from .inversion import invert, renoise
from .output import Costs, LayoutRetouchOutput
from .pictures import Image
from .prompts import Prompts, read_prompts
from .request import Request, build_request, check_contexts, given_contexts
from .settings import OP, Callback, Generator, Settings, refuse
from .step_end import Told, after_step
from .stock import StockArguments
from .text import Embeds

REFERENCE_SEED = 0
"""The seed of the references' noise. It is fixed, so that their masks and latents are the same for every image."""


class RetouchStage(PersonalizedPipeline):
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
        reference_fit: str = "crop",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        retouch_start: int | None = None,
        retouch_end: int | None = None,
        retouch_layers: Sequence[int | str] | None = None,
        mask_threshold: float | str = "otsu",
        storage: str = "device",
        limit: int | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        **stock: object,
    ) -> ReferenceBank:
        """What the references contribute to the retouch stage: keys and values of every layer and step that shares.

        Pass it as `reference_bank` to any number of calls with the same size, number of steps and use of guidance, the
        same range of steps and layers or a part of them, and with the same `stock` as here; `save` keeps it for other
        processes. Arguments as in `__call__`, and storage, limit, dtype as in `ReferenceBank`.
        """
        request = build_request(
            self,
            Settings.given(locals()),
            StockArguments.given(stock, xl=self.pools),
            Prompts([], [], []),
            self.latent_size(height, width, None),
            subject_tokens=subject_tokens,
            reference_image=reference_image,
            reference_prompt=reference_prompt,
            reference_mask=reference_mask,
            reference_subjects=reference_subjects,
            with_layout=False,
        )
        bank = fill_bank(self, request, storage=storage, limit=limit, dtype=dtype)
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
        layout: LayoutRetouchOutput | None = None,
        context_latents: Tensor | None = None,
        layout_mask: Image | list | Tensor | None = None,
        reference_mask: Image | list[Image | None] | None = None,
        reference_subjects: Sequence[int] | None = None,
        reference_bank: ReferenceBank | None = None,
        reference_fit: str = "crop",
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
        contexts_from: str | None = None,
        targets_from: str = "renoise",
        mask_blending: bool = False,
        mask_threshold: float | str = "otsu",
        return_maps: bool = False,
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
        """Stage 2: targets take their layout from the contexts and their appearance from the references.

        Arguments as in `__call__`, and

        Args:
            layout: what `layout`, called with subject_tokens, has returned.
            context_latents: (n, C, height/f, width/f), clean latents of layouts from elsewhere, as `encode_images`
                makes them. Neither: the references alone. The targets then start from noise; from retouch_start on,
                and after a first step that finds them, their subjects read the references' besides their own row.
            height, width: only without contexts. latents: noise; with context_latents that which they are re-noised
                with.
        """
        arguments = StockArguments.given(stock, xl=self.pools)
        prompts = read_prompts(self, arguments, prompt, negative_prompt=negative_prompt, lays_out=False)
        contexts = given_contexts(self, prompts.images, layout, context_latents, latents, generator)
        if contexts is not None:
            refuse("the contexts have it", height=height, width=width)
        request = build_request(
            self,
            Settings.given(locals()),
            arguments,
            prompts,
            self.latent_size(height, width, latents if contexts is None else contexts.latents),
            latents=latents,
            control_image=control_image,
            subject_tokens=subject_tokens,
            layout_mask=layout_mask,
            reference_image=reference_image,
            reference_prompt=reference_prompt,
            reference_mask=reference_mask,
            reference_subjects=reference_subjects,
            reference_bank=reference_bank,
            with_layout=False,
        )
        output = retouch(self, request, contexts)
        self.maybe_free_model_hooks()
        return output


@dataclass(frozen=True)
class Rows:
    """What the stage knows of every row of its batch before the first step."""

    batch: RetouchBatch
    """the rows of the batch while attention is shared"""
    condition: Condition
    """the condition of these rows"""
    noise: Tensor | None
    """(n, C, h, w), the noise of the contexts"""
    references: Tensor
    """(R, C, h, w), clean latents; empty with a bank"""
    reference_noise: Tensor

    @property
    def prompt_condition(self) -> Condition:
        """The condition of the images' prompts, which contexts share with targets."""
        first = self.batch.size - self.batch.half
        return self.condition.rows(slice(first, first + self.batch.images))

    @property
    def reference_condition(self) -> Condition:
        """The condition of the references' prompts."""
        return self.condition.rows(slice(self.batch.size - len(self.references), None))


@dataclass(frozen=True)
class Masks:
    """The foregrounds, bool (…, h, w) in latent pixels."""

    contexts: Tensor | None
    """(S, n, h, w), the foreground of each subject in the contexts"""
    maps: Tensor | None
    """fp32 (S, n, rows, columns) in [0, 1]: what they were made from"""
    references: Tensor
    """(R, h, w), the foreground of each reference"""


def retouch(pipe: PersonalizedPipeline, request: Request, contexts: Contexts | None) -> LayoutRetouchOutput:
    """Run the retouch stage."""
    check_contexts(request, contexts)
    with pipe.in_stage("retouch", request.settings.retouch_guidance):
        return _retouched(pipe, request, contexts)


def _retouched(pipe: PersonalizedPipeline, request: Request, contexts: Contexts | None) -> LayoutRetouchOutput:
    settings, solver = request.settings, request.solver
    costs = Costs(pipe._execution_device)
    with costs.of("encode"):
        rows = _rows(pipe, request, contexts)
        control = pipe.control(
            request.control_image,
            settings.control_scale,
            request.prompts.images,
            request.size,
            rows.condition.embeds.dtype,
        )
    with costs.of("mask"):
        masks = _masks(pipe, request, contexts, rows, costs)
        matches = _matches(pipe, request, contexts, rows)
    start = request.share.start if contexts is not None else 0
    with costs.of("invert"):
        of_contexts = _trajectory_of_contexts(pipe, request, contexts, rows, start)
        of_references = renoise(rows.references, rows.reference_noise, solver, start=start)

    def read(batch: RetouchBatch, mask: Tensor, grid: tuple[int, int]) -> Routing | Swap:
        if settings.reading == "swap":
            assert matches is not None
            return swap(batch, mask, masks.references, grid, request.references.shows, matches(grid))
        return route(batch, mask, masks.references, grid, request.references.shows)

    denoiser = RetouchDenoiser(
        pipe.personal_unet,
        rows.batch,
        rows.condition,
        request,
        reading=read,
        mask=masks.contexts,
        tracker=_tracker(request, masks, solver.steps - start),
        contexts=contexts if rows.batch.context_banked else None,
        control=control,
    )
    latents = _targets(pipe, request, contexts, rows, of_contexts)
    stepper = GuidedStepper(pipe, request)
    kept = masks.contexts if settings.mask_blending else None  # all else stays the contexts'
    with costs.of("retouch"), pipe.stage_bar("retouch", solver.steps - start) as bar, denoiser:
        for k, (i, t) in enumerate(zip(range(start, solver.steps), solver.timesteps[start:])):
            if pipe.interrupt:
                continue
            in_batch = [of_contexts[k]] if rows.batch.context_rows else []
            predictions = denoiser.predict(latents, [*in_batch, of_references[k]], i, costs)
            latents = stepper.step(
                i,
                latents,
                [predictions],
                mask=None if kept is None or denoiser.mask is None else (denoiser.mask | kept).any(0),
                background=None if kept is None else of_contexts[k + 1],
                noise=noise_like(latents, settings.generator) if settings.eta > 0 else None,
            )
            told = Told(latents, denoiser.told, denoiser.control)
            told = after_step(pipe, settings.callback_on_step_end, request.tensor_inputs, i, t, told)
            latents, denoiser.control = told.latents, told.control
            denoiser.tell(told.condition)
            bar.update()
    images, nsfw = pipe.decode(latents, settings.output_type, costs, settings.generator)
    pixels = request.references.pixels
    return LayoutRetouchOutput(
        images=images,
        latents=latents,
        reference_images=None if pixels is None else (pixels / 2 + 0.5).clamp(0, 1),
        masks=None if denoiser.mask is None else denoiser.mask.any(0),
        subject_masks=denoiser.mask,
        context_masks=masks.contexts,
        reference_mask=masks.references,
        reference_subjects=request.references.shows,
        maps=masks.maps if settings.return_maps else None,
        matches=[(*match, request.size) for match in matches(request.size)]
        if settings.return_maps and matches
        else None,
        nsfw_content_detected=nsfw,
        seconds=costs.seconds,
        rows=costs.rows,
    )


def fill_bank(pipe: PersonalizedPipeline, request: Request, **options: Any) -> ReferenceBank:
    """Run the references alone through every step that shares; options are those of `ReferenceBank`."""
    share, settings = request.share, request.settings
    if not len(share):
        fail(OP, "retouch_end", f"above retouch_start, {share.start}", share.stop)
    with pipe.in_stage("references", settings.retouch_guidance):
        return _filled_bank(pipe, request, options)


def _filled_bank(pipe: PersonalizedPipeline, request: Request, options: dict[str, Any]) -> ReferenceBank:
    share, references = request.share, request.references
    steps = slice(share.start, share.stop)
    signals = request.solver.signals[steps]
    bank = ReferenceBank(request.solver.timesteps[steps], signals=signals, **options)
    costs = Costs(pipe._execution_device)
    rows = _rows(pipe, request, None)
    bank.foreground = _masks(pipe, request, None, rows, costs).references
    bank.shows, bank.words = references.shows, request.subjects
    trajectory = renoise(rows.references, rows.reference_noise, request.solver, start=share.start)
    halves = 2 if request.retouch_guided else 1
    installed = install_processors(request.layers, bank.processors(request.layers))
    with installed, pipe.stage_bar("references", len(share)) as bar:
        for k, i in enumerate(share):
            latents = torch.cat([trajectory[k]] * halves) * request.solver.input_scales[i]
            with bank.extract(k):
                predict(pipe.personal_unet, latents, request.solver.timesteps[i], rows.condition)
            bar.update()
    return bank


def _rows(pipe: PersonalizedPipeline, request: Request, contexts: Contexts | None) -> Rows:
    """The batch, its conditions, and clean latents and noise of contexts and references."""
    references, guided = request.references, request.retouch_guided
    banked = contexts is not None and _serves(contexts, request, pipe.attention_dtype)
    batch = RetouchBatch(
        request.prompts.images,
        contexts is not None,
        guided,
        len(references.shows),
        banked=references.bank is not None,
        context_banked=banked,
    )
    copies = 2 if batch.context_rows else 1
    negatives: list[Embeds] = []  # of targets, contexts and references
    prompts: list[Embeds] = []
    if batch.images:
        negative, own = request.prompts.embedded(pipe, personal=True, guided=guided)
        negatives, prompts = [] if negative is None else [negative] * copies, [own] * copies
    if references.prompts:
        prompts.append(pipe.embed(references.prompts, personal=True, clip_skip=pipe.clip_skip))
        if guided:
            none = [None] * len(references.prompts)
            negatives.append(pipe.embed_negatives(none, prompts[-1], personal=True))
    condition = pipe.condition(Embeds.join(prompts), request.size, request.stock)
    if guided:
        unconditional = pipe.condition(Embeds.join(negatives), request.size, request.stock, negative=True)
        condition = Condition.join([unconditional, condition])
    dtype, device = condition.embeds.dtype, pipe._execution_device
    clean = torch.empty(0, pipe.unet.config.in_channels, *request.size, dtype=dtype, device=device)
    if references.pixels is not None:
        clean = pipe.encode_pixels(references.pixels).to(dtype)
    seeded = torch.Generator(device).manual_seed(REFERENCE_SEED)
    noise = noise_like(clean[:1], seeded).expand_as(clean)
    return Rows(batch, condition, None if contexts is None else contexts.noise, clean, noise)


def _serves(contexts: Contexts, request: Request, dtype: torch.dtype) -> bool:
    """Whether the retouch stage reads the contexts' keys and values as the layout stage kept them."""
    settings, bank = request.settings, contexts.bank
    if bank is None or settings.reading == "swap" or settings.contexts_from not in (None, "trajectory"):
        return False
    first, kept = contexts.bank_start, len(bank.timesteps)
    rows = len(contexts.latents) * (2 if request.retouch_guided else 1)
    steps = request.share.start >= first and request.share.stop <= first + kept
    steps = steps and bank.serves(dtype)
    return steps and set(request.layers) <= set(bank.layer_names) and bank.rows_held == rows


def _masks(pipe: PersonalizedPipeline, request: Request, contexts: Contexts | None, rows: Rows, costs: Costs) -> Masks:
    """Foregrounds of contexts and references: those given, else by the model's attention."""
    settings, references, count = request.settings, request.references, request.prompts.images
    to_mask = _to_mask(request, WARM)
    of_contexts = None if contexts is None else request.layout_masks
    maps = None if contexts is None else contexts.maps
    if of_contexts is not None:
        maps = of_contexts.float()
    of_references = None
    unmapped = contexts if maps is None else None
    if unmapped is not None or references.needs_maps:
        latents, noise, texts = [rows.references], [rows.reference_noise], [rows.reference_condition]
        tokens = [references.tokens]
        if unmapped is not None and request.tokens is not None:
            latents, noise = [unmapped.latents, *latents], [unmapped.noise, *noise]
            texts, tokens = [rows.prompt_condition, *texts], [request.tokens, *tokens]
        clean = torch.cat(latents).to(rows.condition.embeds.dtype)
        of_references = pipe.subject_maps(
            clean, torch.cat(noise).to(clean), Condition.join(texts), tokens[0].joined(*tokens[1:]),
            backend=settings.backend,
        )  # fmt: skip
        costs.count("mask", len(MAP_TIMES) * len(clean))
        if unmapped is not None:
            maps, of_references = of_references[:, :count], of_references[:, count:]
    if contexts is not None and of_contexts is None:
        assert maps is not None
        of_contexts = to_mask(maps)
        hint = "see mask_threshold and subject_tokens, or pass layout_mask"
        warn_of_implausible(of_contexts, "layout", hint)
    return Masks(of_contexts, maps, _foreground_of_references(request, of_references, _to_mask(request)))


def _foreground_of_references(request: Request, maps: Tensor | None, to_mask: Callable[[Tensor], Tensor]) -> Tensor:
    """The references' foreground, bool (R, *size): a bank's, the given masks, or masks made from maps (S, R, h, w)."""
    references = request.references
    if references.bank is not None:
        assert references.bank.foreground is not None
        return references.bank.foreground
    found = []
    for r, (mask, subject) in enumerate(zip(references.masks, references.shows)):
        seen = mask
        if seen is None:
            assert maps is not None
            seen = to_mask(maps[subject : subject + 1, r : r + 1])[0]
        if not seen.any():
            name = "reference_mask" if len(references.masks) == 1 else f"reference_mask[{r}]"
            hint = "check subject_tokens, reference_prompt and mask_threshold, or pass a mask"
            fail(OP, name, "a foreground", "none", hint)
        if mask is None:
            warn_of_implausible(seen[None], "reference", "pass reference_mask")
        found.append(seen)
    return torch.cat(found)


def _to_mask(request: Request, warm: float | None = None) -> Callable[[Tensor], Tensor]:
    """A function that makes masks, bool (S, n, *size), of maps (S, n, h, w); see `foreground`."""
    settings = request.settings
    return partial(
        foreground, size=request.size, threshold=settings.mask_threshold, warm=warm, backend=settings.backend
    )


def _matches(pipe: PersonalizedPipeline, request: Request, contexts: Contexts | None, rows: Rows) -> Callable | None:
    """A function of a grid that matches the contexts' tokens with the references', for "swap" and on request; else
    None."""
    settings, references = request.settings, rows.references
    wanted = settings.reading == "swap" or (settings.return_maps and len(references))
    if contexts is None or not wanted:
        return None
    condition = Condition.join([rows.prompt_condition, rows.reference_condition])
    latents = torch.cat([contexts.latents.to(references), references])
    noise = torch.cat([contexts.noise.to(references), rows.reference_noise])
    return matcher(pipe.features(latents, noise, condition), len(references), backend=settings.backend)


def _trajectory_of_contexts(
    pipe: PersonalizedPipeline, request: Request, contexts: Contexts | None, rows: Rows, start: int
) -> list[Tensor]:
    """The contexts' latents before every step from `start` on, and the clean ones."""
    if contexts is None:
        return []
    solver, way = request.solver, request.settings.contexts_from
    if way in (None, "trajectory") and contexts.trajectory is not None:
        return [x.to(rows.condition.embeds.dtype) for x in contexts.trajectory[start:]]
    latents = contexts.latents.to(rows.condition.embeds.dtype)
    if way != "inversion":
        return renoise(latents, contexts.noise, solver, start=start)
    with pipe.stage_bar("inversion", solver.steps - start) as bar:
        return invert(
            lambda x, t: predict(pipe.personal_unet, x, t, rows.prompt_condition),
            latents,
            solver,
            start=start,
            backend=request.settings.backend,
            after_step=bar.update,
        )


def _targets(
    pipe: PersonalizedPipeline, request: Request, contexts: Contexts | None, rows: Rows, of_contexts: list[Tensor]
) -> Tensor:
    """The latents with which the targets start."""
    settings, dtype = request.settings, rows.condition.embeds.dtype
    if contexts is None:
        count = request.prompts.images
        return pipe.initial_latents(count, request.size, dtype, settings.generator, request.latents)
    if settings.targets_from == "contexts":
        return of_contexts[0]
    clean = contexts.latents.to(dtype)
    return renoise(clean, contexts.noise, request.solver, start=request.share.start)[0]


def _tracker(request: Request, masks: Masks, steps: int) -> TargetMasks | None:
    """What makes the targets' masks during the stage; None: they stay those of the contexts."""
    if not request.settings.mask_blending and masks.contexts is not None:
        return None
    return TargetMasks(masks.maps, _to_mask(request, WARM), steps)
