"""What the retouch stage is asked for: its arguments, checked before anything is computed."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from diffusers.models.attention_processor import Attention
from torch import Tensor

from ..attention_checks import MAX_SOURCES
from ..checks import fail
from .bank import ReferenceBank
from .components import OP, Generator, Image, PersonalizedPipeline, as_list, as_mask, as_negatives
from .install import check_stock, select_layers
from .routing import MAX_SUBJECTS
from .schedule import DEFAULT_SWITCH, step_in_schedule
from .subject import SubjectTokens, as_subjects, shown_subjects

SOURCES = ("inversion", "renoise")
READINGS = ("routing", "swap")


class RetouchRequest(NamedTuple):
    """What `retouch` is asked for, checked: made by `retouch_request`."""

    timesteps: Tensor
    start: int
    end: int
    layers: dict[str, Attention]
    references: list[Image]
    """none where a bank has them"""
    reference_prompts: list[str]
    masks: list[Tensor | None]
    """bool (1, *size); None: from cross-attention"""
    subjects: list[list[str]]
    """the words of each"""
    shows: tuple[int, ...]
    """the subject of each reference, also of a bank's"""
    tokens: SubjectTokens
    """of the prompts, then of the reference_prompts"""
    bank_steps: dict[int, int]

    @property
    def needs_maps(self) -> bool:
        """Whether a reference has no mask."""
        return any(mask is None for mask in self.masks)


def retouch_request(
    pipe: PersonalizedPipeline,
    prompt: list[str],
    reference_image: Image | list[Image] | None,
    reference_prompt: str | list[str] | None,
    subject_tokens: str | Sequence[str] | Sequence[Sequence[str]],
    size: tuple[int, int],
    *,
    reference_mask: Image | list[Image | None] | None,
    reference_subjects: Sequence[int] | None,
    num_inference_steps: int,
    guidance_scale: float,
    retouch_start: int | None,
    retouch_end: int | None,
    retouch_layers: Sequence[int | str] | None,
    sources: str,
    reading: str = "routing",
    negative_prompt: str | list[str] | None = None,
    reference_bank: ReferenceBank | None = None,
    generator: Generator = None,
) -> RetouchRequest:
    """Arguments of the stage as it uses them; raises what does not fit, before anything is computed."""
    if sources not in SOURCES:
        fail(OP, "sources", "one of " + ", ".join(SOURCES), repr(sources))
    if reading not in READINGS:
        fail(OP, "reading", "one of " + ", ".join(READINGS), repr(reading))
    if not math.isfinite(guidance_scale):
        fail(OP, "guidance_scale", "a finite number", guidance_scale)
    if isinstance(generator, list) and len(generator) != len(prompt):
        fail(OP, "generator", f"one, or {len(prompt)}, one per image", len(generator))
    device = pipe._execution_device
    timesteps = pipe.begin(num_inference_steps, device)
    start = step_in_schedule(
        "retouch_start", retouch_start, round(DEFAULT_SWITCH * num_inference_steps), 0, num_inference_steps - 1
    )
    end = step_in_schedule("retouch_end", retouch_end, num_inference_steps, start, num_inference_steps)
    layers = select_layers(pipe.personal_unet, "self", retouch_layers)
    check_stock(layers)
    subjects = as_subjects(subject_tokens)
    if len(subjects) > MAX_SUBJECTS:
        fail(OP, "subject_tokens", f"at most {MAX_SUBJECTS} subjects", len(subjects))
    as_negatives(negative_prompt, len(prompt))
    if reference_bank is None:
        references = _as_images(reference_image)
        count = len(references)
        prompts = as_list(reference_prompt, count, "reference_prompt")
        masks, bank_steps = [m if m is None else as_mask(m, size, device) for m in _masks(reference_mask, count)], {}
        shows = shown_subjects(reference_subjects, count, len(subjects))
    else:
        refuse(
            "the reference_bank has it",
            reference_image=reference_image,
            reference_prompt=reference_prompt,
            reference_mask=reference_mask,
        )
        if reading == "swap":
            expected = "'routing' with a reference_bank, which has no features to match"
            fail(OP, "reading", expected, "'swap'", error=NotImplementedError)
        if not isinstance(reference_bank, ReferenceBank):
            fail(OP, "reference_bank", "a ReferenceBank", type(reference_bank).__name__, "see its load()", TypeError)
        references, prompts, masks = [], [], []
        count = _banked_references(reference_bank, guidance_scale > 1, size, layers)
        given = reference_bank.shows if reference_subjects is None else tuple(reference_subjects)
        if reference_bank.shows not in (None, given):
            fail(OP, "reference_subjects", f"{list(reference_bank.shows)}, as the bank was built", list(given))
        if reference_bank.words not in (None, subjects):
            fail(OP, "subject_tokens", f"{reference_bank.words}, as the bank was built", subjects)
        shows = shown_subjects(given, count, len(subjects))
        steps = pipe.scheduler.timesteps[start:end]
        bank_steps = {i: reference_bank.step_of(t) for i, t in enumerate(steps, start)}
    most = (MAX_SOURCES - 1) // (2 if reading == "swap" and guidance_scale > 1 else 1)
    if count > most:
        fail(OP, "reference_image", f"at most {most} references", count)
    shown = [None] * len(prompt) + list(shows[: len(prompts)])
    tokens = pipe.subject_tokens([*prompt, *prompts], subjects, shown)
    return RetouchRequest(
        timesteps, start, end, layers, references, prompts, masks, subjects, shows, tokens, bank_steps
    )


def refuse(reason: str, **arguments: object) -> None:
    for name, x in arguments.items():
        if x is not None:
            fail(OP, name, f"None, since {reason}", type(x).__name__)


def _banked_references(
    bank: ReferenceBank, guided: bool, size: tuple[int, int], layers: Mapping[str, Attention]
) -> int:
    """How many references a bank has, whose rows are theirs for each half of the guidance. ValueError where it was
    built for something else."""

    def stale(expected: object, got: object) -> None:
        fail(OP, "reference_bank", f"built for {expected}", got, "build it again with the pipeline's reference_bank")

    if bank.foreground is None:
        fail(OP, "reference_bank", "one with a foreground, as the pipeline's reference_bank makes it", "none")
    count = len(bank.foreground)
    wanted = count * (2 if guided else 1)
    if bank.rows_held != wanted:
        stale(f"{wanted} rows, {'with' if guided else 'without'} guidance", bank.rows_held)
    if tuple(bank.foreground.shape[1:]) != tuple(size):
        stale(f"latents of {tuple(size)}", tuple(bank.foreground.shape[1:]))
    if missing := [name for name in layers if name not in bank.layer_names]:
        stale(f"layer {missing[0]}", f"{len(bank.layer_names)} layers without it")
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
