"""Which token of a reference belongs to which token of a context, by the features of the UNet (arXiv 2306.03881)."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from ...features.correspondence import correspondence

RADIUS = 1.5
"""How far, in cells of a layer's grid, the way there and back may end from its start."""

Match = tuple[Tensor, Tensor]
"""(index, consistent), (images, tokens) each, as `correspondence` returns them"""

_lock = threading.Lock()
_stance = ExitStack()
_recorders = 0


def _record_eagerly(change: int) -> None:
    """Compiled models do not look for new hooks. The setting is the process's: the first recorder makes it, the last
    one undoes it."""
    global _recorders
    with _lock:
        if _recorders == 0:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _recorders += change
        if _recorders == 0:
            _stance.close()


class FeatureRecorder:
    """Keeps the features that the middle up block of a UNet makes; a context manager around a forward pass."""

    def __init__(self, unet: UNet2DConditionModel):
        blocks = getattr(unet, "_orig_mod", unet).up_blocks
        self.block = blocks[max(len(blocks) // 2 - 1, 0)]
        self.features: Tensor | None = None
        """the features, (B, C, h, w)"""

    def __enter__(self) -> "FeatureRecorder":
        def keep(module: object, inputs: object, output: Tensor) -> None:
            self.features = output

        self._hook = self.block.register_forward_hook(keep)
        _record_eagerly(1)
        return self

    def __exit__(self, *exception: object) -> None:
        _record_eagerly(-1)
        self._hook.remove()


def matcher(features: Tensor, references: int, *, backend: str = "auto") -> Callable[[tuple[int, int]], list[Match]]:
    """Features (m, C, h, w) of contexts, then references -> grid -> the matches of each reference, computed once."""

    @cache
    def matches(grid: tuple[int, int]) -> list[Match]:
        shrinks = grid[0] < features.shape[2]
        resized = F.interpolate(features.float(), grid, mode="area" if shrinks else "bilinear")
        tokens = resized.flatten(2).mT.contiguous()
        contexts, others = tokens[:-references], tokens[-references:].split(1)
        return [correspondence(contexts, other, radius=RADIUS, grid=grid, backend=backend) for other in others]

    return matches
