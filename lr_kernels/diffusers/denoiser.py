"""The denoiser of the retouch stage: one UNet call for targets, contexts and references, with shared self-attention."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from .bank import ReferenceBank
from .condition import Condition, Control, placed, predict
from .install import Installation, install_processors, layer_grid, layer_scale
from .processors import AttentionState, MultiSourceAttnProcessor
from .routing import RetouchBatch, Routing, Swap
from .subject import SubjectMaps, SubjectTokens, TargetMasks


@dataclass
class RetouchDenoiser:
    """Predictions for the targets of the retouch stage (arXiv 2407.09779); a context manager around the loop.

    Entering it puts processors into the UNet, leaving it restores the previous ones.
    """

    unet: UNet2DConditionModel
    batch: RetouchBatch
    condition: Condition
    """of batch.size rows"""
    layers: Mapping[str, Attention]
    """the self-attention layers that share"""
    share: range
    """the steps in which they do"""
    reading: Callable[[Tensor, tuple[int, int]], Routing | Swap]
    """(masks, grid) -> what layers with that many tokens read"""
    mask: Tensor | None
    """bool (subjects, n, h, w): the targets' foreground, None while unknown: nothing is shared until then"""
    tracker: TargetMasks | None
    """makes the mask of the next step; None: the mask stays"""
    tokens: SubjectTokens
    """of the targets' prompts, n"""
    latent_size: tuple[int, int]
    bank: ReferenceBank | None = None
    """has the references, which are then not in the batch"""
    bank_steps: Mapping[int, int] = field(default_factory=dict)
    """the bank's step of each of the steps that share"""
    control: Control | None = None
    """of the targets"""
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
            buffers = {name: None if self.bank is None else self.bank.layer(name) for name in self.layers}
            processors = {name: MultiSourceAttnProcessor(self._state, buffer) for name, buffer in buffers.items()}
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
            latents: (n, C, h, w) of the targets. sources: of the batch's contexts and references, at the same noise
                level.
        """
        for installation in self._installed:
            installation.verify()
        sharing = step in self.share and self.mask is not None
        self._state.sharing = sharing
        if sharing and self.mask is not self._routed:
            self._state.routings = self._route()
            self._routed = self.mask
        inputs = torch.cat([latents, sources] * self.batch.halves)
        banked = self.bank.read(self.bank_steps[step]) if sharing and self.bank is not None else nullcontext()
        with banked:
            out = predict(self.unet, inputs, t, self.condition, self._controlled(latents, t))
        if self._recorder is not None:
            start = self.batch.size - self.batch.half  # the conditional half
            maps = self._recorder.collect(slice(start, start + self.batch.images), self.tokens.weights)
            self.mask = self.tracker.update(maps)
        targets = self.batch.targets(out)
        return [targets[0], targets[-1]]

    def _controlled(self, latents: Tensor, t: Tensor) -> dict | None:
        if self.control is None:
            return None
        rows = torch.cat(self.batch.targets(torch.arange(self.batch.size, device=latents.device)))
        repeated = latents.repeat(self.batch.halves, 1, 1, 1)
        residuals = self.control.residuals(repeated, t, self.condition.rows(rows))
        return placed(residuals, rows, self.batch.size)

    def _route(self) -> dict[int, Routing | Swap]:
        grids = {layer_grid(layer_scale(self.unet, name), *self.latent_size) for name in self.layers}
        return {math.prod(grid): self.reading(self.mask, grid) for grid in grids}
