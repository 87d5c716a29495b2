"""Where the subject is: its tokens in prompts, and its cross-attention maps in a UNet."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..checks import fail
from .install import Installation, attention_layers, install_processors, layer_grid, layer_scale
from .processors import AttentionState, TokenMapAttnProcessor

MAP_TOKENS = 256
"""Masks come from the cross-attention layers nearest to this many tokens: 16 x 16."""
MAP_MEMORY = 0.6
"""How much of a target's running maps a step keeps, since the maps of single steps are noisy."""


class SubjectTokens(NamedTuple):
    """The tokens of S subjects in B prompts, padded to the longest list with entries of weight 0."""

    indices: Tensor
    """int32 (B, T)"""
    weights: Tensor
    """fp32 (S, B, T), of sum 1 where a prompt has the subject, else 0"""

    def rows(self, rows: slice) -> "SubjectTokens":
        """Those of some of the prompts."""
        return SubjectTokens(self.indices[rows], self.weights[:, rows])

    def repeated(self, count: int, copies: int) -> "SubjectTokens":
        """The first `count` prompts as often as `copies` says, then the others."""
        order = [*range(count)] * copies + [*range(count, len(self.indices))]
        return SubjectTokens(self.indices[order], self.weights[:, order])


def as_subjects(subject_tokens: str | Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """A word, the words of one subject, or a list of such lists -> the words of each subject."""
    words = [subject_tokens] if isinstance(subject_tokens, str) else list(subject_tokens)
    subjects = [words] if all(isinstance(x, str) for x in words) else [as_subjects(x)[0] for x in words]
    if not all(subjects):
        fail("layout_retouch", "subject_tokens", "words of the prompts that stand for the subject", subject_tokens)
    return subjects


def shown_subjects(shows: Sequence[int] | None, references: int, subjects: int) -> tuple[int, ...]:
    """The subject of each reference. Default: the only one, or one reference for each in their order.

    Raises:
        ValueError: a subject that no reference shows, a number that is none.
    """
    if shows is None and subjects not in (1, references):
        fail("layout_retouch", "reference_subjects", f"the subject of each of {references} references", None)
    found = tuple([0] * references if subjects == 1 else range(references)) if shows is None else tuple(shows)
    if len(found) != references or set(found) != set(range(subjects)):
        expected = f"{references} numbers, among them each of 0 to {subjects - 1}"
        fail("layout_retouch", "reference_subjects", expected, list(found))
    return found


def find_subjects(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    subjects: Sequence[Sequence[str]],
    device: torch.device | str,
    shows: Sequence[int | None] | None = None,
) -> SubjectTokens:
    """Places of the subjects' words in tokenized prompts, every occurrence and every token of a word.

    Args:
        subjects: the words of each.
        shows: per prompt the one subject that it has, or None: all of them. Default: None for every prompt.

    Raises:
        ValueError: a prompt without one of the words, or with it beyond the tokenizer's maximal length.
    """
    found = []
    for prompt, only in zip(prompts, shows or [None] * len(prompts), strict=True):
        ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
        places = [[] if only not in (None, s) else _places(tokenizer, prompt, ids, w) for s, w in enumerate(subjects)]
        found.append(places)
    longest = max(sum(len(p) for p in places) for places in found)
    indices = torch.zeros(len(found), longest, dtype=torch.int32)
    weights = torch.zeros(len(subjects), len(found), longest)
    for b, places in enumerate(found):
        start = 0
        for s, some in enumerate(places):
            indices[b, start : start + len(some)] = torch.tensor(some, dtype=torch.int32)
            weights[s, b, start : start + len(some)] = 1 / max(len(some), 1)
            start += len(some)
    return SubjectTokens(indices.to(device), weights.to(device))


def _places(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int], words: Sequence[str]) -> list[int]:
    """Positions in ids of every token of every occurrence of the words."""
    found = set()
    for word in words:
        pieces = tokenizer(word, add_special_tokens=False).input_ids
        starts = [i for i in range(len(ids) - len(pieces) + 1) if pieces and ids[i : i + len(pieces)] == pieces]
        if not starts:
            fail("layout_retouch", "subject_tokens", f"words of the prompt {prompt!r}", repr(word),
                 f"the tokenizer reads the first {len(ids)} tokens")  # fmt: skip
        found |= {start + i for start in starts for i in range(len(pieces))}
    return sorted(found)


class SubjectMaps:
    """Records the subject's maps from a UNet's cross-attention; a context manager around the passes that need it.

    Args:
        state: shared with other processors of this UNet. latent_size: (height, width) of the latents.
    """

    def __init__(self, unet: nn.Module, state: AttentionState, latent_size: tuple[int, int]):
        layers = attention_layers(unet, "cross")
        scales = {name: layer_scale(unet, name) for name in layers}

        def distance(scale: int) -> float:
            return abs(math.log(math.prod(layer_grid(scale, *latent_size)) / MAP_TOKENS))

        self.scale = min(set(scales.values()), key=distance)
        self.grid = layer_grid(self.scale, *latent_size)
        self.processors = {name: TokenMapAttnProcessor(state) for name in layers if scales[name] == self.scale}
        self._layers = {name: layers[name] for name in self.processors}
        self.installation: Installation | None = None

    def __enter__(self) -> "SubjectMaps":
        self.installation = install_processors(self._layers, self.processors)
        return self

    def __exit__(self, *exception: object) -> None:
        self.installation.remove()

    def collect(self, rows: slice, weights: Tensor) -> Tensor:
        """The last pass: fp32 (S, rows, layers, h, w) on `self.grid`, tokens averaged by weights (S, rows, T)."""
        kept = [p.maps[rows] for p in self.processors.values() if p.maps is not None]
        if not kept:
            fail("SubjectMaps", "processors", "in place during the last pass", "all replaced", error=RuntimeError)
        maps = torch.stack([torch.einsum("bnt,sbt->sbn", x, weights) for x in kept], 2)
        return maps.unflatten(3, self.grid)


def rescaled(maps: Tensor) -> Tensor:
    """Layer mean of maps (..., L, h, w), each image stretched to [0, 1]: (..., h, w)."""
    mean = maps.mean(-3)
    low, high = mean.amin((-2, -1), keepdim=True), mean.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (mean - low) / (high - low), 0)


class TargetMasks:
    """The targets' foreground during denoising: from the contexts' maps to the targets' own running maps.

        maps_i = (1 - u)·context + u·running,  u = 0 before the first update and 1 in the last step

    Args:
        context: maps (S, n, h, w) in [0, 1], or None where there are no contexts: then u = 1 throughout.
        to_mask: maps (S, n, 1, h, w) -> bool (S, n, height, width).
        steps: how many updates there will be.
    """

    def __init__(self, context: Tensor | None, to_mask: Callable[[Tensor], Tensor], steps: int):
        self.context, self.to_mask, self.steps = context, to_mask, steps
        self.updates = 0
        self.running: Tensor | None = None

    def update(self, maps: Tensor) -> Tensor:
        """Masks for the next step, from the maps (S, n, L, h, w) of this one."""
        own = rescaled(maps)
        self.running = own if self.running is None else torch.lerp(own, self.running, MAP_MEMORY)
        self.updates += 1
        share = 1 if self.context is None else self.updates / self.steps
        context = self.running if self.context is None else self.context
        return self.to_mask(torch.lerp(context, self.running, share).unsqueeze(-3))
