"""What the layout stage leaves for the retouch stage: latents, maps, keys and values of its images."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ...runtime.checks import fail
from ..processors.bank import KeyValueBank
from ..processors.install import install_processors, layer_grid, layer_scale
from ..processors.unet import AttentionState
from ..subjects.subject import SubjectMaps, SubjectTokens, stretched
from .settings import OP

MAP_SHARE = 0.3
"""Share of the layout stage's steps, the last ones, whose maps say where the subject is."""


@dataclass(frozen=True)
class Contexts:
    """The layouts as the retouch stage reads them."""

    latents: Tensor
    """(n, C, h, w), clean"""
    noise: Tensor
    """(n, C, h, w), of deviation 1: the noise that they started from"""
    trajectory: list[Tensor] | None = None
    """their latents before every step, and the clean ones"""
    maps: Tensor | None = None
    """fp32 (S, n, rows, columns) in [0, 1]: where the subjects are"""
    bank: KeyValueBank | None = None
    """keys and values of the steps that share; rows (unconditional, conditional) of every image"""
    bank_start: int = 0
    """the step of the schedule that is the bank's first"""
    walk: tuple | None = None
    """the walk of the solver that made the trajectory, see `Solver.walk`"""
    words: list[list[str]] | None = None
    """the words of each subject in `maps`"""


class ContextRecorder:
    """Keeps what becomes `Contexts` while the layout stage runs; a context manager around its loop.

    Args:
        timesteps: of the schedule. weights: (steps,) of the personalized model.
        tokens: the subjects in the n prompts. latent_size: (height, width).
        layers: whose keys and values are kept at the steps `share`; storage None: none are. dtype: of `KeyValueBank`.
        rows: of the model's batch: n, with guidance 2n.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        timesteps: list[float],
        weights: Tensor,
        tokens: SubjectTokens,
        latent_size: tuple[int, int],
        layers: Mapping[str, Attention],
        share: range,
        rows: int,
        *,
        storage: str | None,
        limit: int | None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ):
        self.share, self.tokens = share, tokens
        last = range(round((1 - MAP_SHARE) * len(timesteps)), len(timesteps))
        self._mapped = [i for i in last if weights[i] > 0] or list(last)  # of a vanilla layout in passes of their own
        self.bank: KeyValueBank | None = None
        self._state = AttentionState(backend=backend)
        self._images, self._rows = tokens.indices.shape[0], rows
        self._state.token_indices = tokens.indices.repeat(rows // self._images, 1)
        self._layers, self._processors = {}, {}
        if storage is not None and len(share):
            if limit is not None:
                _check_limit(unet, layers, latent_size, rows * (len(share) + 1), dtype, limit)
            steps = timesteps[share.start : share.stop]
            self.bank = KeyValueBank(steps, storage=storage, limit=limit, dtype=dtype)
            self._layers, self._processors = dict(layers), self.bank.processors(layers, self._state)
        self._maps = SubjectMaps(unet, self._state, latent_size, self._processors)
        self._found: list[Tensor] = []
        self._stack = ExitStack()
        self.trajectory: list[Tensor] = []

    def __enter__(self) -> "ContextRecorder":
        with ExitStack() as stack:
            if self._layers:
                stack.enter_context(install_processors(self._layers, self._processors))
            stack.enter_context(self._maps)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def needs(self, step: int) -> bool:
        """Whether the personalized model has to run at a step even where its weight is 0."""
        return (self.bank is not None and step in self.share) or step in self._mapped

    @contextmanager
    def personal(self, step: int, rows: int) -> Iterator[None]:
        """Around the personalized model's prediction of so many rows at a step."""
        if rows != self._rows:  # guidance has ended, and a bank has the same rows in all steps
            self.bank, self._rows = None, rows
            self._state.token_indices = self.tokens.indices.repeat(rows // self._images, 1)
        bank = self.bank if step in self.share else None
        self._state.capturing = step in self._mapped
        try:
            with nullcontext() if bank is None else bank.extract(step - self.share.start):
                yield
            if self._state.capturing:
                images = slice(-self._images, None)
                found = self._maps.collect(images, self.tokens.weights, backend=self._state.backend)
                self._found.append(stretched(found))
        finally:
            self._state.capturing = False

    def contexts(self, latents: Tensor, noise: Tensor) -> Contexts:
        """The contexts, after the last step."""
        maps = torch.stack(self._found).mean(0) if self._found else None
        return Contexts(latents, noise, [*self.trajectory, latents], maps, self.bank, self.share.start)


def _check_limit(
    unet: UNet2DConditionModel,
    layers: Mapping[str, Attention],
    size: tuple[int, int],
    rows: int,
    dtype: torch.dtype | None,
    limit: int,
) -> None:
    """Refuse a bank that holds so many rows, over all steps and in its buffers, before any step runs."""
    needed = 0
    for name, layer in layers.items():
        tokens = math.prod(layer_grid(layer_scale(unet, name), *size))
        scales = 0 if dtype is None else layer.heads * torch.float32.itemsize
        needed += 2 * rows * tokens * (layer.inner_kv_dim * (dtype or unet.dtype).itemsize + scales)
    if needed > limit:
        hint = "choose fewer retouch_layers, a lower precision or context_storage=None, which computes them again"
        fail(OP, "context_limit", f"at least {needed} bytes, which the contexts' keys and values take", limit, hint)
