"""Stage 2 of Layout-and-Retouch (arXiv 2407.09779) with Flux: multi-source attention over targets, layouts and
references, and the masks that route it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ....runtime.checks import fail
from ...processors.install import Installation, install_processors
from ...subjects.foreground import WARM, foreground, warn_of_implausible
from ...subjects.subject import SubjectTokens, TargetMasks
from .attention import JointRouting, offset_rotary, retouch_layers, retouch_processors, route_joint, take_maps
from .inputs import Prompt, token_grid
from .maps import DOUBLE_BLOCKS, WordMaps
from .models import PersonalizedFluxPipeline
from .output import FluxLayouts, noised
from .settings import OP, FluxSettings
from .stages import after_step, encode_pixels, predict, set_schedule, walked

REFERENCE_SEED = 0
"""The seed of the references' noise. It is fixed, so that their masks and latents are the same for every image."""
MAP_SIGMAS = (0.2, 0.4, 0.6)
"""The σ at which the maps of layouts and references are taken. (Not tuned: no trained model was at hand.)"""


@dataclass(frozen=True)
class References:
    """What the retouch stage is given beside the layouts, for n images and R references."""

    pixels: Tensor
    """fp32 (R, 3, height, width) in [-1, 1]"""
    prompt: Prompt
    """of R rows"""
    masks: Tensor | None
    """bool (R, rows, columns), in tokens; None: by the model's attention"""
    context_masks: Tensor | None
    """bool (n, rows, columns), of the layouts; None: by the model's attention"""
    tokens: SubjectTokens | None
    """the subject's words in the prompts of the images; None: not named"""
    own_tokens: SubjectTokens | None
    """the same in the prompts of the references"""


class Retouched(NamedTuple):
    """What the retouch stage makes; masks are bool (…, rows, columns), in tokens."""

    latents: Tensor
    masks: Tensor
    context_masks: Tensor
    reference_masks: Tensor


def retouch(
    pipe: PersonalizedFluxPipeline,
    settings: FluxSettings,
    prompt: Prompt,
    layouts: FluxLayouts,
    references: References,
) -> Retouched:
    """Stage 2: targets take their layout from the contexts, their appearance from the references.

    While attention is shared, one pass has the targets, the contexts (with the targets' prompts) and the references as
    rows; in the other steps the targets alone.
    """
    start = settings.retouch_start
    assert start is not None
    latents = encode_pixels(pipe, references.pixels).to(layouts.latents)
    clean = _Clean(latents, _reference_noise(latents), references.prompt)
    ids = pipe._prepare_latent_image_ids(1, *token_grid(pipe, layouts.size), latents.device, latents.dtype)
    masks = _masks(pipe, settings, prompt, layouts, references, clean, ids)
    set_schedule(pipe, settings.num_inference_steps, latents.shape[1])
    targets = _Targets(pipe, settings, prompt, layouts, clean, masks, references.tokens, ids)
    begun = layouts.at(start, "renoise" if settings.targets_from == "renoise" else settings.contexts_from)
    with targets.installed():
        found = walked(pipe, settings, begun, start, targets.velocity, targets.after)
    return Retouched(found, targets.mask, masks.contexts, masks.references)


class _Clean(NamedTuple):
    """The references' latents and what goes with them."""

    latents: Tensor
    """(R, N, C)"""
    noise: Tensor
    """(1, N, C), of all of them"""
    prompt: Prompt
    """of R rows"""


def _reference_noise(latents: Tensor) -> Tensor:
    generator = torch.Generator(latents.device).manual_seed(REFERENCE_SEED)
    return randn_tensor(latents[:1].shape, generator, latents.device, latents.dtype)


class _Targets:
    """The targets of a retouch stage: what their next pass reads, and their foreground so far."""

    def __init__(
        self,
        pipe: PersonalizedFluxPipeline,
        settings: FluxSettings,
        prompt: Prompt,
        layouts: FluxLayouts,
        references: _Clean,
        masks: "_Masks",
        tokens: SubjectTokens | None,
        ids: Tensor,
    ):
        self._pipe, self._settings, self._prompt, self._layouts = pipe, settings, prompt, layouts
        self._references, self._ids = references, ids
        self._grid = token_grid(pipe, layouts.size)
        self._contexts_mask = self.mask = masks.contexts
        """bool (n, rows, columns), the foreground"""
        transformer = pipe.personal_transformer
        self._words = self._tracker = None
        if settings.mask_blending and tokens is not None:
            assert settings.retouch_start is not None
            self._words = WordMaps(tokens, self._grid, settings.backend)
            to_mask = partial(_to_mask, settings, self._grid, warm=WARM)
            self._tracker = TargetMasks(masks.maps, to_mask, layouts.steps - settings.retouch_start)
        self._sharing = retouch_layers(transformer, settings.retouch_layers, OP) if settings.share else {}
        self._mapped = retouch_layers(transformer, DOUBLE_BLOCKS, OP) if self._words is not None else {}
        self._processors = retouch_processors(self._sharing | self._mapped)
        self._installation: Installation | None = None
        self._routing = self._route(masks.references) if settings.share else None

    def _route(self, references: Tensor) -> JointRouting:
        settings, device = self._settings, references.device
        offset = (0, 0, self._grid[1]) if settings.reference_offset is None else settings.reference_offset
        return route_joint(
            self.mask,
            references,
            self._grid,
            self._prompt.embeds.shape[1],
            own_keys=settings.own_keys,
            rotary=offset_rotary(self._pipe.personal_transformer, offset, len(references), device),
            backend=settings.backend,
        )

    def installed(self) -> AbstractContextManager:
        """While it lasts, the layers that share or are recorded have processors that do so."""
        layers = self._sharing | self._mapped
        if not layers:
            return nullcontext()
        self._installation = install_processors(layers, self._processors)
        return self._installation

    def velocity(self, i: int, t: Tensor, latents: Tensor) -> Tensor:
        """What the model says in step i."""
        if self._installation is not None:
            self._installation.verify()
        shares = i in self._settings.share
        for name, processor in self._processors.items():
            routing = self._routing if shares and name in self._sharing else None
            processor.share(routing, self._words if name in self._mapped else None)
        transformer = self._pipe.personal_transformer
        if not shares:
            return predict(self._pipe, transformer, latents, t, self._prompt, self._ids, "retouch")
        clean, noise, prompt = self._references
        context = self._layouts.at(i, self._settings.contexts_from)
        rows = torch.cat([latents, context, noised(clean, noise, self._layouts.sigmas[i].item())])
        prompts = self._prompt.joined(self._prompt, prompt)
        return predict(self._pipe, transformer, rows, t, prompts, self._ids, "shared retouch")[: len(latents)]

    def after(self, i: int, latents: Tensor) -> Tensor:
        """The latents that step i + 1 starts from, for those that the scheduler made in step i."""
        settings = self._settings
        if self._tracker is not None and self._words is not None:
            self.mask = self._tracker.update(take_maps(self._words, self._processors.values()))[0]
            if self._routing is not None and i + 1 in settings.share:
                self._routing = self._routing.for_targets(self.mask, self._grid)
        if settings.mask_blending:
            kept = (self.mask | self._contexts_mask).flatten(1)[..., None]
            latents = torch.where(kept, latents, self._layouts.at(i + 1, settings.contexts_from))
        latents, self._prompt = after_step(self._pipe, settings, i, latents, self._prompt)
        return latents


class _Masks(NamedTuple):
    contexts: Tensor
    """bool (n, rows, columns)"""
    references: Tensor
    """bool (R, rows, columns)"""
    maps: Tensor
    """fp32 (1, n, rows, columns) in [0, 1], of the contexts"""


def _masks(
    pipe: PersonalizedFluxPipeline,
    settings: FluxSettings,
    prompt: Prompt,
    layouts: FluxLayouts,
    references: References,
    clean: _Clean,
    ids: Tensor,
) -> _Masks:
    """Foregrounds of contexts and references: those given, else by the model's attention."""
    grid = token_grid(pipe, layouts.size)

    def maps_of(what: str, latents: Tensor, noise: Tensor, prompt: Prompt, tokens: SubjectTokens | None) -> Tensor:
        assert tokens is not None, "named where no mask is given"
        words = WordMaps(tokens, grid, settings.backend)
        return _maps(pipe, words, latents, noise, prompt, ids, f"{what} maps")

    of_contexts, of_references = references.context_masks, references.masks
    if of_references is None:
        maps = maps_of("reference", clean.latents, clean.noise, clean.prompt, references.own_tokens)
        of_references = _to_mask(settings, grid, maps)[0]
        if not bool(of_references.flatten(1).any(1).all()):
            hint = "check subject_tokens, reference_prompt and mask_threshold, or pass a mask"
            fail(OP, "reference_mask", "a foreground in each reference", "none", hint)
        warn_of_implausible(of_references[None], "reference", "pass reference_mask", op=OP)
    if of_contexts is not None:
        return _Masks(of_contexts, of_references, of_contexts[None].float())
    maps = maps_of("layout", layouts.latents, layouts.noise, prompt, references.tokens)
    masks = _to_mask(settings, grid, maps, warm=WARM)
    warn_of_implausible(masks, "layout", "see mask_threshold and subject_tokens, or pass layout_mask", op=OP)
    return _Masks(masks[0], of_references, maps)


def _maps(
    pipe: PersonalizedFluxPipeline,
    words: WordMaps,
    clean: Tensor,
    noise: Tensor,
    prompt: Prompt,
    ids: Tensor,
    context: str,
) -> Tensor:
    """Where the subject is in images (n, N, C): fp32 (1, n, rows, columns), the mean over some noise levels."""
    transformer, found = pipe.personal_transformer, []
    layers = retouch_layers(transformer, DOUBLE_BLOCKS, OP)
    processors = retouch_processors(layers)
    for processor in processors.values():
        processor.share(None, words)
    with install_processors(layers, processors):
        for sigma in MAP_SIGMAS:
            t = torch.tensor(1000 * sigma, device=clean.device)
            predict(pipe, transformer, noised(clean, noise, sigma), t, prompt, ids, context)
            found.append(take_maps(words, processors.values()))
    return torch.stack(found).mean(0)


def _to_mask(settings: FluxSettings, grid: tuple[int, int], maps: Tensor, *, warm: float | None = None) -> Tensor:
    """Maps (1, n, rows, columns) -> masks of the same shape, see `foreground`."""
    return foreground(maps, size=grid, threshold=settings.mask_threshold, warm=warm, backend=settings.backend)
