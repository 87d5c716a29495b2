"""Where a subject is: its tokens in prompts, and its attention maps in a UNet."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ...attention.api import multi_source_attention
from ...runtime.checks import fail, plain_number
from ...source import Source
from ..processors.install import Installation, attention_layers, install_processors, layer_grid, layer_scale
from ..processors.unet import AttentionState, StockAttnProcessor, TokenMapAttnProcessor

MAP_TOKENS = 256
"""Maps have the grid of the layers nearest to this many tokens: 16 x 16."""
FINEST_MAP = 1024
"""The most tokens of a cross-attention layer that adds to the maps. Finer layers are noisy."""
PROPAGATIONS = 2
"""How often the maps go through self-attention."""
PROPAGATING_LAYERS = 6
"""At most so many self-attention layers spread the maps; their queries and keys are kept for a pass."""
MAP_MEMORY = 0.6
"""How much of a target's running maps a step keeps, since the maps of single steps are noisy."""


class SubjectTokens(NamedTuple):
    """The tokens of S subjects in B prompts, padded to the longest list with entries of weight 0."""

    indices: Tensor
    """int32 (B, T)"""
    weights: Tensor
    """fp32 (S, B, T), of sum 1 where a prompt has the subject, else 0"""

    def joined(self, *others: "SubjectTokens") -> "SubjectTokens":
        """The tokens of several lists of prompts, one after the other."""
        parts = [self, *others]
        longest = max(part.indices.shape[1] for part in parts)
        indices = [F.pad(part.indices, (0, longest - part.indices.shape[1])) for part in parts]
        weights = [F.pad(part.weights, (0, longest - part.weights.shape[2])) for part in parts]
        return SubjectTokens(torch.cat(indices), torch.cat(weights, 1))


def as_subjects(subject_tokens: str | Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """A word, the words of one subject, or a list of such lists -> the words of each subject."""
    words: Any = [subject_tokens] if isinstance(subject_tokens, str) else subject_tokens
    subjects = [words] if _are_words(words) else [[x] if isinstance(x, str) else x for x in _listed(words)]
    if not subjects or not all(_are_words(x) and len(x) for x in subjects):
        fail("LayoutRetouch", "subject_tokens", "words of the prompts that stand for the subject", repr(subject_tokens))
    return [list(x) for x in subjects]


def _listed(x: object) -> list:
    return list(x) if isinstance(x, (list, tuple)) else []


def _are_words(x: object) -> bool:
    return isinstance(x, (list, tuple)) and all(isinstance(word, str) for word in x)


def as_numbers(shows: Sequence[int]) -> tuple[Any, ...]:
    """The given numbers of subjects as a tuple. ValueError for a number that is not in a list."""
    if not isinstance(shows, Iterable) or getattr(shows, "ndim", 1) == 0:
        fail("LayoutRetouch", "reference_subjects", "a list of numbers", repr(shows))
    return tuple(x if plain_number(x) is None else plain_number(x) for x in shows)


def shown_subjects(shows: Sequence[int] | None, references: int, subjects: int) -> tuple[int, ...]:
    """The subject of each reference. Default: the only one, or one reference for each in their order.

    Raises:
        ValueError: a subject that no reference shows, a number that is none.
    """
    if shows is None and subjects not in (1, references):
        fail("LayoutRetouch", "reference_subjects", f"the subject of each of {references} references", None)
    found = tuple([0] * references if subjects == 1 else range(references)) if shows is None else as_numbers(shows)
    numbers = all(type(s) is int for s in found)
    if len(found) != references or not numbers or set(found) != set(range(subjects)):
        expected = f"{references} numbers, among them each of 0 to {subjects - 1}"
        hint = "one for each reference: the subject that it shows"
        fail("LayoutRetouch", "reference_subjects", expected, list(found), hint)
    return found


def find_subjects(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    subjects: Sequence[Sequence[str]],
    device: torch.device | str,
    shows: Sequence[int | None] | None = None,
    op: str = "LayoutRetouch",
) -> SubjectTokens:
    """Places of the subjects' words in tokenized prompts, every occurrence and every token of a word.

    Args:
        subjects: the words of each.
        shows: per prompt the one subject that it has, or None: all of them. Default: None for every prompt.
        op: the function that messages name.

    Raises:
        ValueError: a prompt without one of the words, or with it beyond the tokenizer's maximal length.
    """
    found = []
    for prompt, only in zip(prompts, shows or [None] * len(prompts), strict=True):
        ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
        here = [subject if only in (None, s) else [] for s, subject in enumerate(subjects)]
        found.append([_places(op, tokenizer, prompt, ids, subject) for subject in here])
    longest = max(sum(len(p) for p in places) for places in found)
    indices = torch.zeros(len(found), longest, dtype=torch.int32)
    weights = torch.zeros(len(subjects), len(found), longest, dtype=torch.float32)
    for b, places in enumerate(found):
        start = 0
        for s, some in enumerate(places):
            indices[b, start : start + len(some)] = torch.tensor(some, dtype=torch.int32)
            weights[s, b, start : start + len(some)] = 1 / max(len(some), 1)
            start += len(some)
    return SubjectTokens(indices.to(device), weights.to(device))


def _places(
    op: str, tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int], words: Sequence[str]
) -> list[int]:
    """Positions in ids of every token of every occurrence of the words."""
    found = set()
    for word in words:
        pieces = tokenizer(word, add_special_tokens=False).input_ids
        starts = [i for i in range(len(ids) - len(pieces) + 1) if pieces and ids[i : i + len(pieces)] == pieces]
        if not starts:
            fail(op, "subject_tokens", f"words of the prompt {prompt!r}", repr(word),
                 f"the tokenizer reads the first {len(ids)} tokens")  # fmt: skip
        found |= {start + i for start in starts for i in range(len(pieces))}
    return sorted(found)


class SubjectMaps:
    """Records where the subject is from a UNet's attention; a context manager around the passes that need it.

    The cross-attention maps of the subject's tokens are sparse and blurred. Self-attention knows which tokens belong
    together, so the maps are sent through it: each token takes the mean of the maps of the tokens that it attends to.

    Args:
        state: shared with other processors of this UNet. latent_size: (height, width) of the latents.
        processors: those of this package that are in self-attention layers already, or will be, by name.
    """

    def __init__(
        self,
        unet: nn.Module,
        state: AttentionState,
        latent_size: tuple[int, int],
        processors: Mapping[str, StockAttnProcessor],
    ):
        cross, self_attention = (attention_layers(unet, kind) for kind in ("cross", "self"))
        scales = {name: layer_scale(unet, name) for name in (*cross, *self_attention)}
        tokens = {scale: math.prod(layer_grid(scale, *latent_size)) for scale in scales.values()}
        scale = min(tokens, key=lambda scale: abs(math.log(tokens[scale] / MAP_TOKENS)))
        self.grid = layer_grid(scale, *latent_size)
        self._size = latent_size
        self._recorders = {
            name: TokenMapAttnProcessor(state)
            for name in cross
            if scales[name] == scale or tokens[scales[name]] <= FINEST_MAP
        }
        self._scales = scales
        there = [name for name in self_attention if scales[name] == scale]
        there = there[:: -(-len(there) // PROPAGATING_LAYERS)]
        own = {name: StockAttnProcessor(state) for name in there if name not in processors}
        self._spreaders = [own[name] if name in own else processors[name] for name in there]
        self._new = self._recorders | own
        self._layers = {name: layer for name, layer in (cross | self_attention).items() if name in self._new}
        self.installation: Installation | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "SubjectMaps":
        self.installation = self._stack.enter_context(install_processors(self._layers, self._new))
        for processor in self._spreaders:
            processor.captures = True
        return self

    def __exit__(self, *exception: object) -> None:
        for processor in self._spreaders:
            processor.captures, processor.captured = False, None
        self._stack.close()

    def collect(self, rows: slice, weights: Tensor, *, backend: str = "auto") -> Tensor:
        """The maps of the last pass: fp32 (S, rows, h, w) on `self.grid`, tokens averaged by weights (S, rows, T).

        Each layer's map is stretched to [0, 1] before the mean over layers, see `mean_of_layers`. Self-attention
        spreads the mean.
        """
        found = []
        for name, recorder in self._recorders.items():
            if recorder.maps is None:
                continue
            grid = layer_grid(self._scales[name], *self._size)
            _check_tokens(recorder.maps.shape[1], grid)
            # a sum and not a product of matrices, which autocast would round
            maps = (recorder.maps[None, rows] * weights[:, :, None]).sum(3).unflatten(2, grid)
            if maps.shape[2:] != self.grid:
                maps = F.interpolate(maps, self.grid, mode="bilinear", antialias=True)
            found.append(stretched(maps))
        if not found:
            fail("SubjectMaps", "processors", "in place during the last pass", "all replaced", error=RuntimeError)
        captured = [p.captured for p in self._spreaders if p.captured is not None]
        for query, _ in captured:
            _check_tokens(query.shape[1], self.grid)
        maps = mean_of_layers(torch.stack(found))
        return propagated(maps, [(q[rows], k[rows]) for q, k in captured], backend=backend)


def _check_tokens(tokens: int, grid: tuple[int, int]) -> None:
    """NotImplementedError where a layer has another number of tokens than the latents' size gives it."""
    if tokens != math.prod(grid):
        hint = "remove what merges tokens from the UNet, as tomesd.remove_patch() does"
        fail("SubjectMaps", "unet", f"{math.prod(grid)} tokens in a layer, {grid}", tokens, hint, NotImplementedError)


def mean_of_layers(maps: Tensor) -> Tensor:
    """Maps (L, S, n, h, w) in [0, 1] of L layers -> (S, n, h, w), the mean of those that show the subject.

    In some layers the background attends to the subject's token, as to one that says nothing there. Subjects are rather
    inside a picture than all along its border, so a map that is higher along the border than inside is left out, unless
    all are.
    """
    border = torch.ones(maps.shape[-2:], dtype=torch.bool, device=maps.device)
    border[1:-1, 1:-1] = False
    inside = (maps * ~border).sum((-2, -1)) / (~border).sum().clamp(min=1)
    shows = inside > (maps * border).sum((-2, -1)) / border.sum()
    shows |= ~shows.any(0)
    return (maps * shows[..., None, None]).sum(0) / shows.sum(0)[..., None, None]


def propagated(
    maps: Tensor, layers: Sequence[tuple[Tensor, Tensor]], times: int = PROPAGATIONS, *, backend: str = "auto"
) -> Tensor:
    """P^times · maps, with P the mean over layers and heads of self-attention's probabilities.

    One attention call for all rows and layers each time, whose values are the maps.

    Args:
        maps: (S, n, h, w). layers: queries and keys (n, h·w, H, D) of each layer.

    Returns:
        (S, n, h, w) like maps.
    """
    if not layers:
        return maps
    query, key = (torch.cat(parts) for parts in zip(*layers))
    subjects, images, height, width = maps.shape
    if subjects > query.shape[3]:
        fail("SubjectMaps", "maps", f"at most {query.shape[3]} subjects, the head_dim", subjects)
    for _ in range(times):
        value = query.new_zeros(images, height * width, 1, query.shape[3])
        value[..., 0, :subjects] = maps.flatten(2).permute(1, 2, 0)
        value = value.repeat(len(layers), 1, 1, 1).expand(-1, -1, query.shape[2], -1)
        out = multi_source_attention(query, [Source(key, value)], backend=backend)[..., :subjects]
        maps = out.float().mean(2).unflatten(0, (len(layers), images)).mean(0).permute(2, 0, 1)
        maps = maps.unflatten(2, (height, width))
    return maps


def stretched(maps: Tensor) -> Tensor:
    """Maps (..., h, w), each stretched to [0, 1]; 0 where one is constant."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0)


class TargetMasks:
    """The targets' foreground during denoising: from the contexts' maps to the targets' own running maps.

        maps_i = (1 - u)·context + u·running,  u = 0 before the first update and 1 in the last step

    Args:
        context: maps (S, n, h, w) in [0, 1], or None where there are no contexts: then u = 1 throughout.
        to_mask: maps (S, n, h, w) -> bool (S, n, height, width).
        steps: how many updates there will be.
    """

    def __init__(self, context: Tensor | None, to_mask: Callable[[Tensor], Tensor], steps: int):
        self.context, self.to_mask, self.steps = context, to_mask, steps
        self.updates = 0
        self.running: Tensor | None = None

    def update(self, maps: Tensor) -> Tensor:
        """Masks for the next step, from the maps (S, n, h, w) of this one."""
        own = stretched(maps)
        self.running = own if self.running is None else torch.lerp(own, self.running, MAP_MEMORY)
        self.updates += 1
        share = 1 if self.context is None else self.updates / self.steps
        context = self.running if self.context is None else self.context
        return self.to_mask(torch.lerp(context, self.running, share))
