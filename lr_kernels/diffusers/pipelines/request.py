"""Request: the arguments of a call as the stages use them, checked before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ...runtime.checks import fail
from ...runtime.schemas import MAX_SOURCES
from ..processors.bank import ReferenceBank
from ..processors.install import check_stock, select_layers
from ..processors.routing import MAX_SUBJECTS
from ..subjects.foreground import warn_of_implausible
from ..subjects.subject import SubjectTokens, as_numbers, as_subjects, shown_subjects
from .adapters import check_free
from .component_checks import check_controlnet, check_models, check_vae
from .components import PersonalizedPipeline, noise_like
from .contexts import Contexts
from .output import LayoutRetouchOutput
from .pictures import Image, as_mask, masks_one_by_one, one_by_one, preprocess
from .prompts import Prompts, as_list, check_prompts
from .schedule import DEFAULT_SWITCH, Solver, blend_weights, check_scheduler, step_in_schedule
from .settings import OP, Generator, Settings, one_or, refuse
from .step_end import tensor_inputs
from .stock import StockArguments


@dataclass(frozen=True)
class References:
    """The images of the subjects, or a bank that has them."""

    pixels: Tensor | None
    """(R, 3, height, width) in [-1, 1]; None where a bank has them"""
    prompts: list[str]
    masks: list[Tensor | None]
    """bool (1, *size); None: from the model's attention"""
    shows: tuple[int, ...]
    """the subject of each reference, also of a bank's"""
    tokens: SubjectTokens
    """the subjects' tokens in the prompts"""
    bank: ReferenceBank | None = None
    bank_steps: Mapping[int, int] | None = None
    """the bank's step of each step that shares"""

    @property
    def needs_maps(self) -> bool:
        """Whether a reference has no mask."""
        return any(mask is None for mask in self.masks)


@dataclass(frozen=True)
class Request:
    """A call as its stages use it; made by `build_request`."""

    settings: Settings
    stock: StockArguments
    solver: Solver
    size: tuple[int, int]
    """(height, width) of the latents"""
    prompts: Prompts
    retouch_guided: bool
    """whether the retouch stage has unconditional predictions"""
    tensor_inputs: tuple[str, ...]
    """names of the tensors that callback_on_step_end gets"""
    latents: Tensor | None
    """given noise (n, C, *size)"""
    control_image: Image | list[Image] | None
    weights: Tensor
    """(steps,) of the personalized model in the layout stage"""
    share: range
    """the steps that share attention"""
    layers: dict[str, Attention]
    """the self-attention layers that share attention"""
    subjects: list[list[str]]
    """the words of each subject; empty in a layout stage by itself"""
    tokens: SubjectTokens | None
    """the subjects' tokens in the prompts"""
    layout_masks: Tensor | None
    """bool (S, n, *size); None: not given"""
    references: References
    """empty in a layout stage by itself"""


def build_request(
    pipe: PersonalizedPipeline,
    settings: Settings,
    stock: StockArguments,
    prompts: Prompts,
    size: tuple[int, int],
    *,
    latents: Tensor | None = None,
    control_image: Image | list[Image] | None = None,
    subject_tokens: str | Sequence[str] | Sequence[Sequence[str]] = (),
    layout_mask: Image | list | Tensor | None = None,
    reference_image: Image | list[Image] | None = None,
    reference_prompt: str | list[str] | None = None,
    reference_mask: Image | list[Image | None] | None = None,
    reference_subjects: Sequence[int] | None = None,
    reference_bank: ReferenceBank | None = None,
    with_layout: bool = True,
    with_references: bool = True,
) -> Request:
    """The arguments as the stages use them; raises what does not fit, before anything is computed."""
    device, count = pipe._execution_device, prompts.images
    settings.check_generators(count)
    check_scheduler(pipe.scheduler)
    check_models(pipe)
    check_free(OP, [pipe.unet, pipe.personal_unet])
    solver = pipe.begin(settings, stock)
    names = settings.callback_on_step_end_tensor_inputs
    names = tensor_inputs(pipe, settings.callback_on_step_end, names, control_image is not None)
    guided = pipe.guides(settings.retouch_guidance)
    solver.table(guidance_scale=1, eta=settings.eta)  # refuses an eta that the scheduler does not take
    steps = solver.steps
    switch = step_in_schedule("layout_steps", settings.layout_steps, round(DEFAULT_SWITCH * steps), 0, steps)
    start = step_in_schedule("retouch_start", settings.retouch_start, round(DEFAULT_SWITCH * steps), 0, steps - 1)
    end = step_in_schedule("retouch_end", settings.retouch_end, steps, start, steps)
    layers = select_layers(pipe.personal_unet, "self", settings.retouch_layers, "retouch_layers")
    subjects: list[list[str]] = []
    tokens = layout_masks = None
    references = References(None, [], [], (), _no_tokens(0))
    unnamed = isinstance(subject_tokens, (list, tuple)) and not len(subject_tokens)
    if with_references or not unnamed:
        check_stock(layers)
        subjects = as_subjects(subject_tokens)
        if len(subjects) > MAX_SUBJECTS:
            fail(OP, "subject_tokens", f"at most {MAX_SUBJECTS} subjects", len(subjects))
        if count:
            tokens = pipe.subject_tokens(prompts.texts, subjects, [None] * count)
        if layout_mask is not None:
            layout_masks = _layout_masks(layout_mask, len(subjects), count, size, device)
    if with_references and reference_bank is None:
        references = _given_references(
            pipe, settings, size, subjects, reference_image, reference_prompt, reference_mask, reference_subjects
        )
    elif with_references:
        refuse(
            "the reference_bank has it",
            reference_image=reference_image,
            reference_prompt=reference_prompt,
            reference_mask=reference_mask,
            reference_fit=None if settings.reference_fit == Settings.reference_fit else settings.reference_fit,
        )
        references = _banked_references(
            pipe, settings, size, subjects, layers, solver, range(start, end), reference_bank, reference_subjects
        )
    check_prompts(
        pipe, prompts, references.prompts, lays_out=with_layout, guided=guided or pipe.guides(settings.guidance_scale)
    )
    if settings.output_type != "latent" or references.pixels is not None:
        check_vae(pipe)
    if control_image is not None and pipe.controlnet is not None:
        check_controlnet(pipe)
    most = (MAX_SOURCES - 2) // (2 if settings.reading == "swap" and guided else 1)
    if len(references.shows) > most:
        fail(OP, "reference_image", f"at most {most} references", len(references.shows))
    return Request(
        settings=settings,
        stock=stock,
        solver=solver,
        size=size,
        prompts=prompts,
        retouch_guided=guided,
        tensor_inputs=names,
        latents=latents,
        control_image=control_image,
        weights=blend_weights(settings.layout_blend, switch, steps),
        share=range(start, end),
        layers=layers,
        subjects=subjects,
        tokens=tokens,
        layout_masks=layout_masks,
        references=references,
    )


def given_contexts(
    pipe: PersonalizedPipeline,
    prompts: int,
    layout: LayoutRetouchOutput | None,
    latents: Tensor | None,
    noise: Tensor | None,
    generator: Generator,
) -> Contexts | None:
    """The contexts from one of the two arguments that bring them, or None."""
    if layout is not None and not isinstance(layout, LayoutRetouchOutput):
        fail(OP, "layout", "what layout() has returned", type(layout).__name__, error=TypeError)
    if layout is not None:
        refuse("layout is given", context_latents=latents, latents=noise)
        contexts = layout.contexts
        if contexts is None:
            fail(OP, "layout", "the output of layout() with subject_tokens", "one without contexts")
        if len(contexts.latents) != prompts:
            fail(OP, "prompt", f"{len(contexts.latents)} prompts, as there are layouts", prompts)
        return contexts
    if latents is None:
        return None
    expected = (prompts, pipe.unet.config.in_channels)
    if not isinstance(latents, Tensor) or latents.dim() != 4 or latents.shape[:-2] != expected or 0 in latents.shape:
        got = getattr(latents, "shape", type(latents).__name__)
        fail(OP, "context_latents", f"shape ({expected[0]}, {expected[1]}, height, width), one row per prompt", got)
    if not latents.is_floating_point() or not bool(latents.isfinite().all()):
        fail(OP, "context_latents", "finite floating numbers", f"{latents.dtype}, or NaN or Inf")
    if noise is not None and getattr(noise, "shape", None) != latents.shape:
        got = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        fail(OP, "latents", f"shape {tuple(latents.shape)}, as context_latents", got)
    latents = latents.to(pipe._execution_device)
    return Contexts(latents, noise_like(latents, generator) if noise is None else noise.to(latents))


def check_contexts(request: Request, contexts: Contexts | None) -> None:
    """Refuse contexts that lack what the settings ask for."""
    settings = request.settings
    if contexts is None:
        if settings.reading == "swap":
            fail(OP, "reading", "'routing' without layouts", "'swap'", error=NotImplementedError)
        only_with_layouts = {"targets_from": "renoise", "mask_blending": False, "return_maps": False}
        for name, default in only_with_layouts.items():
            if getattr(settings, name) != default:
                fail(OP, name, f"{default!r}, since there are no layouts", repr(getattr(settings, name)))
        refuse("there are no layouts", layout_mask=request.layout_masks, contexts_from=settings.contexts_from)
        if len(request.share) and request.share.stop == 1:
            fail(OP, "retouch_end", "at least 2 without layouts, where a first step finds the subjects", 1)
        return
    if settings.contexts_from == "trajectory" and contexts.trajectory is None:
        hint = "pass layout=, or contexts_from='renoise' or 'inversion'"
        fail(OP, "contexts_from", "another way, since context_latents have no trajectory", "'trajectory'", hint)
    if contexts.trajectory is not None and settings.contexts_from in (None, "trajectory"):
        steps, walk = len(contexts.trajectory) - 1, request.solver.walk
        if steps != request.solver.steps:
            fail(OP, "num_inference_steps", f"{steps}, as the layouts had", request.solver.steps)
        if contexts.walk not in (None, walk):
            fail(OP, "scheduler", "the one that the layouts were made with", "another one, or set otherwise")
    if request.layout_masks is None and contexts.words not in (None, request.subjects):
        hint = "pass layout() the same subject_tokens, or a layout_mask"
        fail(OP, "subject_tokens", f"{contexts.words}, as the layouts had", request.subjects, hint)


def _given_references(
    pipe: PersonalizedPipeline,
    settings: Settings,
    size: tuple[int, int],
    subjects: list[list[str]],
    images: Image | list[Image] | None,
    prompts: str | list[str] | None,
    masks: Image | list[Image | None] | None,
    shows: Sequence[int] | None,
) -> References:
    if images is None:
        fail(OP, "reference_image", "an image, several, or a reference_bank", None)
    height, width = (x * pipe.vae_scale_factor for x in size)
    images = one_by_one(images)
    pixels = preprocess(images, height, width, settings.reference_fit, name="reference_image")
    count, device = len(images), pipe._execution_device
    prompts = as_list(prompts, count, "reference_prompt", "references")
    found: list[Tensor | None] = []
    for r, mask in enumerate(_masks(masks, count)):
        name = "reference_mask" if count == 1 else f"reference_mask[{r}]"
        read = None if mask is None else as_mask(mask, size, settings.reference_fit, device, name, images[r])
        found.append(read)
        if read is not None and not read.any():
            hint = "what is above half of the range of the numbers is the subject; of other numbers pass mask > 0"
            if settings.reference_fit == "crop":
                hint += "; a subject at the border of a long picture is cut off: see reference_fit"
            fail(OP, name, "a foreground", "none", hint)
    shows = shown_subjects(shows, count, len(subjects))
    return References(pixels, prompts, found, shows, pipe.subject_tokens(prompts, subjects, list(shows)))


def _banked_references(
    pipe: PersonalizedPipeline,
    settings: Settings,
    size: tuple[int, int],
    subjects: list[list[str]],
    layers: Mapping[str, Attention],
    solver: Solver,
    share: range,
    bank: ReferenceBank | None,
    shows: Sequence[int] | None,
) -> References:
    """The references that a bank holds. ValueError where the bank was built for something else."""
    if settings.reading == "swap":
        expected = "'routing' with a reference_bank, which has no features to match"
        fail(OP, "reading", expected, "'swap'", error=NotImplementedError)
    if not isinstance(bank, ReferenceBank):
        fail(OP, "reference_bank", "a ReferenceBank", type(bank).__name__, "see its load()", TypeError)

    def stale(expected: object, got: object) -> None:
        fail(OP, "reference_bank", f"built for {expected}", got, "build it again with the pipeline's reference_bank")

    if bank.foreground is None:
        fail(OP, "reference_bank", "one with a foreground, as the pipeline's reference_bank makes it", "none")
    count, guided = len(bank.foreground), pipe.guides(settings.retouch_guidance)
    wanted = count * (2 if guided else 1)
    if bank.rows_held != wanted:
        stale(f"{wanted} rows, {'with' if guided else 'without'} guidance", bank.rows_held)
    if not bank.serves(pipe.attention_dtype):
        stale(pipe.attention_dtype, bank.dtype)
    if tuple(bank.foreground.shape[1:]) != tuple(size):
        stale(f"latents of {tuple(size)}", tuple(bank.foreground.shape[1:]))
    if missing := [name for name in layers if name not in bank.layer_names]:
        stale(f"layer {missing[0]}", f"{len(bank.layer_names)} layers without it")
    given = bank.shows if shows is None else as_numbers(shows)
    if bank.shows is not None and given is not None and bank.shows != given:
        fail(OP, "reference_subjects", f"{list(bank.shows)}, as the bank was built", list(given))
    if bank.words not in (None, subjects):
        fail(OP, "subject_tokens", f"{bank.words}, as the bank was built", subjects)
    part = slice(share.start, share.stop)
    steps = dict(enumerate(bank.steps_of(solver.timesteps[part], solver.signals[part]), share.start))
    shown = shown_subjects(given, count, len(subjects))
    return References(None, [], [], shown, _no_tokens(len(subjects)), bank, steps)


def _no_tokens(subjects: int) -> SubjectTokens:
    """Tokens of no prompt."""
    return SubjectTokens(torch.empty(0, 0, dtype=torch.int32), torch.empty(subjects, 0, 0))


def _layout_masks(
    masks: Image | list | Tensor, subjects: int, images: int, size: tuple[int, int], device: torch.device
) -> Tensor:
    """One mask for all images, or one per image; of several subjects a list of such -> bool (S, n, *size)."""
    per_subject = [masks] if subjects == 1 else masks
    if not isinstance(per_subject, (list, tuple, Tensor)) or len(per_subject) != subjects:
        got = len(masks) if isinstance(masks, (list, tuple, Tensor)) else type(masks).__name__
        fail(OP, "layout_mask", f"a list of the masks of each of {subjects} subjects", got)
    found = []
    for given in per_subject:
        given = masks_one_by_one(given)
        if len(given) not in (1, images):
            fail(OP, "layout_mask", f"{one_or(images)} masks, as there are images", len(given))
        names = ["layout_mask"] if len(given) == 1 else [f"layout_mask[{i}]" for i in range(len(given))]
        rows = [as_mask(mask, size, "squeeze", device, name) for mask, name in zip(given, names)]
        found.append(torch.cat(rows).expand(images, -1, -1))
    stacked = torch.stack(found)
    empty_only = 0, 1  # a given mask is not doubted
    warn_of_implausible(stacked, "layout", "so says layout_mask", empty_only)
    return stacked


def _masks(masks: Image | list[Image | None] | None, references: int) -> list[Image | None]:
    """The masks as a list with one entry per reference."""
    found: list[Any] = [None] * references if masks is None else one_by_one(masks)
    if len(found) != references:
        fail(OP, "reference_mask", f"{references} masks, one per reference", len(found), "several are a list")
    return found
