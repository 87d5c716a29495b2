"""The denoiser of the retouch stage: one UNet call for targets, contexts and reference, with shared self-attention."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from .install import Installation, install_processors, layer_grid, layer_scale
from .processors import AttentionState, MultiSourceAttnProcessor
from .routing import RetouchBatch, Routing, route
from .subject import SubjectMaps, SubjectTokens, TargetMasks


@dataclass
class RetouchDenoiser:
    """Predictions for the targets of the retouch stage (arXiv 2407.09779); a context manager around the loop.

    Entering it puts processors into the UNet, leaving it restores the previous ones.
    """

    unet: UNet2DConditionModel
    batch: RetouchBatch
    embeds: Tensor
    """(batch.size, L, C)"""
    layers: Mapping[str, Attention]
    """the self-attention layers that share"""
    share: range
    """the steps in which they do"""
    reference_mask: Tensor
    """bool (1, h, w)"""
    mask: Tensor | None
    """bool (n, h, w): the targets' foreground, None while unknown: nothing is shared until then"""
    tracker: TargetMasks | None
    """makes the mask of the next step; None: the mask stays"""
    tokens: SubjectTokens
    """of the targets' prompts, (n, T)"""
    latent_size: tuple[int, int]
    backend: str = "auto"
    _state: AttentionState = field(init=False)
    _stack: ExitStack = field(default_factory=ExitStack, init=False)
    _installed: list[Installation] = field(default_factory=list, init=False)
    _recorder: SubjectMaps | None = field(default=None, init=False)
    _routed: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._state = AttentionState(backend=self.backend)

    def __enter__(self) -> "RetouchDenoiser":
        with ExitStack() as stack:
            processors = {name: MultiSourceAttnProcessor(self._state) for name in self.layers}
            self._installed.append(stack.enter_context(install_processors(self.layers, processors)))
            if self.tracker is not None:
                self._recorder = stack.enter_context(SubjectMaps(self.unet, self._state, self.latent_size))
                self._installed.append(self._recorder.installation)
                rows = torch.arange(self.batch.size, device=self.tokens.indices.device) % self.batch.half
                self._state.token_indices = self.tokens.indices[rows % self.batch.images]  # only the targets' are used
                self._state.capturing = True
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def predict(self, latents: Tensor, sources: Tensor, step: int, t: Tensor) -> list[Tensor]:
        """(unconditional, conditional) predictions, each (n, C, h, w); the same one twice without guidance.

        Args:
            latents: (n, C, h, w) of the targets. sources: of contexts, if any, and reference, at the same noise level.
        """
        for installation in self._installed:
            installation.verify()
        self._state.sharing = step in self.share and self.mask is not None
        if self._state.sharing and self.mask is not self._routed:
            self._state.routings = self._route()
            self._routed = self.mask
        inputs = torch.cat([latents, sources] * self.batch.halves)
        out = self.unet(inputs, t, encoder_hidden_states=self.embeds, return_dict=False)[0]
        if self._recorder is not None:
            start = self.batch.size - self.batch.half  # the conditional half
            maps = self._recorder.collect(slice(start, start + self.batch.images), self.tokens.weights)
            self.mask = self.tracker.update(maps)
        targets = self.batch.targets(out)
        return [targets[0], targets[-1]]

    def _route(self) -> dict[int, Routing]:
        grids = {layer_grid(layer_scale(self.unet, name), *self.latent_size) for name in self.layers}
        return {math.prod(grid): route(self.batch, self.mask, self.reference_mask, grid) for grid in grids}
