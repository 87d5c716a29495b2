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
    """The subject's tokens in B prompts, padded to the longest list with entries of weight 0."""

    indices: Tensor
    """int32 (B, T)"""
    weights: Tensor
    """fp32 (B, T), of sum 1 in each row"""

    def rows(self, rows: slice) -> "SubjectTokens":
        """Those of some of the prompts."""
        return SubjectTokens(self.indices[rows], self.weights[rows])


def find_subject(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], words: Sequence[str], device: torch.device | str
) -> SubjectTokens:
    """Places of the subject's words in tokenized prompts, every occurrence and every token of a word.

    Raises:
        ValueError: a prompt without one of the words, or with it beyond the tokenizer's maximal length.
    """
    places = []
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
        found = []
        for word in words:
            pieces = tokenizer(word, add_special_tokens=False).input_ids
            starts = [i for i in range(len(ids) - len(pieces) + 1) if pieces and ids[i : i + len(pieces)] == pieces]
            if not starts:
                fail("layout_retouch", "subject_tokens", f"words of the prompt {prompt!r}", repr(word))
            found += [start + i for start in starts for i in range(len(pieces))]
        places.append(sorted(set(found)))
    longest = max(len(p) for p in places)
    indices = torch.tensor([p + [p[-1]] * (longest - len(p)) for p in places], dtype=torch.int32)
    weights = torch.tensor([[1 / len(p)] * len(p) + [0.0] * (longest - len(p)) for p in places])
    return SubjectTokens(indices.to(device), weights.to(device))


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
        """The last pass: fp32 (rows, layers, h, w) on `self.grid`, tokens averaged by weights (rows, T)."""
        kept = [p.maps[rows] for p in self.processors.values() if p.maps is not None]
        if not kept:
            fail("SubjectMaps", "processors", "in place during the last pass", "all replaced", error=RuntimeError)
        maps = torch.stack([(x * weights[:, None]).sum(-1) for x in kept], 1)
        return maps.unflatten(2, self.grid)


def rescaled(maps: Tensor) -> Tensor:
    """Layer mean of maps (B, L, h, w), each image stretched to [0, 1]: (B, h, w)."""
    mean = maps.mean(1)
    low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
    return torch.where(high > low, (mean - low) / (high - low), 0)


class TargetMasks:
    """The targets' foreground during denoising: from the contexts' maps to the targets' own running maps.

        maps_i = (1 - u)·context + u·running,  u = 0 before the first update and 1 in the last step

    Args:
        context: maps (n, h, w) in [0, 1], or None where there are no contexts: then u = 1 throughout.
        to_mask: maps (n, 1, h, w) -> bool (n, height, width).
        steps: how many updates there will be.
    """

    def __init__(self, context: Tensor | None, to_mask: Callable[[Tensor], Tensor], steps: int):
        self.context, self.to_mask, self.steps = context, to_mask, steps
        self.updates = 0
        self.running: Tensor | None = None

    def update(self, maps: Tensor) -> Tensor:
        """Masks for the next step, from the maps (n, L, h, w) of this one."""
        own = rescaled(maps)
        self.running = own if self.running is None else torch.lerp(own, self.running, MAP_MEMORY)
        self.updates += 1
        if self.context is None:
            return self.to_mask(self.running[:, None])
        return self.to_mask(torch.lerp(self.context, self.running, self.updates / self.steps)[:, None])
