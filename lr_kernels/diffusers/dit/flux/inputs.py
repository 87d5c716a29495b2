"""What a call of the Flux pipeline is given: prompts, pictures and masks, checked and as the transformer reads them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import FluxPipeline
from torch import Tensor

from ....runtime.checks import check_integer, fail
from ...pipelines.pictures import Image, as_mask, masks_one_by_one, one_by_one, preprocess
from ...pipelines.settings import one_or
from ...subjects.subject import SubjectTokens, find_subjects
from .settings import OP

Text = str | list[str] | tuple[Tensor, ...]
"""A prompt, a list of them, or what `encode_prompt` returns of them: embeddings and pooled embeddings."""


class Prompt(NamedTuple):
    """What a transformer is told about n rows."""

    embeds: Tensor
    """(n, T, C)"""
    pooled: Tensor
    """(n, P)"""
    ids: Tensor
    """(T, 3), the positions of the text's tokens, for all rows"""

    def joined(self, *others: "Prompt") -> "Prompt":
        """The prompts of further rows after these."""
        parts = (self, *others)
        return Prompt(torch.cat([x.embeds for x in parts]), torch.cat([x.pooled for x in parts]), self.ids)


def count_prompts(pipe: FluxPipeline, name: str, text: Text, allowed: tuple[int, ...] | None = None) -> int:
    """How many prompts a call's argument has. ValueError, TypeError: neither text nor embeddings that fit; a number of
    them that is not allowed."""
    if isinstance(text, tuple):
        config = pipe.transformer.config
        widths = config.joint_attention_dim, config.pooled_projection_dim
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in text[:2]]
        fits = len(shapes) == 2 and all(isinstance(x, Tensor) for x in text[:2])
        fits = fits and text[0].dim() == 3 and text[1].dim() == 2 and len(text[0]) == len(text[1]) > 0
        if not fits or (text[0].shape[2], text[1].shape[1]) != widths:
            fail(OP, name, f"embeddings (n, T, {widths[0]}) and pooled ones (n, {widths[1]})", shapes)
        count = len(text[0])
    else:
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list) or not texts or not all(isinstance(x, str) for x in texts):
            hint = "a tuple holds embeddings and pooled embeddings"
            fail(OP, name, "a prompt, or a list of them", repr(text), hint, TypeError)
        if pipe.text_encoder is None or pipe.text_encoder_2 is None:
            fail(OP, name, "embeddings, since the pipeline lacks a text encoder", "text")
        count = len(texts)
    if allowed is not None and count not in allowed:
        fail(OP, name, " or ".join(map(str, sorted(set(allowed)))) + " prompts", count)
    return count


def encoded(pipe: FluxPipeline, text: Text, rows: int, max_sequence_length: int) -> Prompt:
    """The embeddings of text for a number of rows, a multiple of the prompts: each is repeated, in order."""
    given = isinstance(text, tuple)
    embeds, pooled, ids = pipe.encode_prompt(
        prompt=None if given else text,
        prompt_embeds=text[0] if given else None,
        pooled_prompt_embeds=text[1] if given else None,
        max_sequence_length=max_sequence_length,
        device=pipe._execution_device,
    )
    copies = rows // len(embeds)
    embeds, pooled = (x.to(pipe._execution_device).repeat_interleave(copies, 0) for x in (embeds, pooled))
    return Prompt(embeds, pooled, ids)


def subject_places(
    pipe: FluxPipeline, name: str, text: Text, rows: int, words: Sequence[str], max_sequence_length: int
) -> SubjectTokens:
    """The places of the subject's words among T5's tokens, in the prompts of a number of rows as `encoded` makes them.

    Raises:
        ValueError: embeddings in place of text; a prompt without one of the words, or with it beyond the length.
    """
    if isinstance(text, tuple):
        fail(OP, name, "text, in which subject_tokens are found", "embeddings", "or pass masks and no subject_tokens")
    tokenizer = pipe.tokenizer_2
    texts, words = (  # an embedding of several vectors (textual inversion) is several words
        pipe.maybe_convert_prompt(list(x), tokenizer) for x in ([text] if isinstance(text, str) else text, words)
    )
    found = find_subjects(tokenizer, texts, [words], pipe._execution_device, op=OP)
    if int(found.indices.max()) >= max_sequence_length:
        expected = f"words among the first {max_sequence_length} tokens, max_sequence_length"
        fail(OP, "subject_tokens", expected, int(found.indices.max()) + 1)
    copies = rows // len(texts)
    return SubjectTokens(found.indices.repeat_interleave(copies, 0), found.weights.repeat_interleave(copies, 1))


def image_size(pipe: FluxPipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels. Default: those of FluxPipeline."""
    step, default = 2 * pipe.vae_scale_factor, pipe.default_sample_size * pipe.vae_scale_factor
    found = []
    for name, x in (("height", height), ("width", width)):
        side = check_integer(OP, name, default if x is None else x, step, f"a multiple of {step}")
        if side % step:
            fail(OP, name, f"a multiple of {step}", side, "a token is two latent pixels wide")
        found.append(side)
    return found[0], found[1]


def token_grid(pipe: FluxPipeline, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the image's tokens, for a size in pixels."""
    step = 2 * pipe.vae_scale_factor
    return size[0] // step, size[1] // step


def read_pictures(pictures: Image | list[Image], size: tuple[int, int], fit: str) -> tuple[list[Image], Tensor]:
    """The reference pictures one by one, and as fp32 (R, 3, *size) in [-1, 1]; see `preprocess`."""
    several = one_by_one(pictures)
    return several, preprocess(several, *size, fit, name="reference_image", op=OP)


def read_masks(
    pipe: FluxPipeline,
    name: str,
    masks: Image | list[Image],
    size: tuple[int, int],
    count: int,
    fit: str,
    pictures: Sequence[Image] | None = None,
) -> Tensor:
    """Masks of any kind and size, see `as_mask`, one for all or one each -> bool (count, rows, columns), in tokens.

    Args:
        name: the argument. size: of the images in pixels. fit: as for the pictures that the masks belong to; None of
            those: not compared.

    Raises:
        ValueError: another number of masks, one without a foreground, what `as_mask` refuses.
    """
    several = masks_one_by_one(masks)
    if len(several) not in (1, count):
        fail(OP, name, f"{one_or(count)} masks", len(several), "several are a list")
    names = [name] if len(several) == 1 else [f"{name}[{i}]" for i in range(count)]
    if len(several) < count:
        several, names = several * count, names * count
    found = []
    for i, mask in enumerate(several):
        picture = None if pictures is None else pictures[i]
        read = as_mask(mask, token_grid(pipe, size), fit, pipe._execution_device, names[i], picture, OP)
        if not bool(read.any()):
            hint = "what is above half of the range of the numbers is the subject; of other numbers pass mask > 0"
            fail(OP, names[i], "a foreground", "none", hint + ("; see reference_fit" if fit == "crop" else ""))
        found.append(read)
    return torch.cat(found)
