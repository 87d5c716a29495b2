"""Masks of a subject for a stock pipeline, from the cross-attention maps of its words in the steps so far."""

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ...features.subject_mask import subject_mask
from ...runtime.checks import check_integer, fail
from ..processors.install import (
    attention_layers,
    check_not_compiled,
    install_processors,
    layer_grid,
    layer_scale,
    pass_inputs,
)
from ..processors.unet import AttentionState, TokenMapAttnProcessor
from .subject import as_subjects, find_subjects

MAP_SCALE = 4
"""Maps of layers at this scale: 16 x 16 tokens in Stable Diffusion 1 and 2, 32 x 32 in SDXL."""
STEPS_KEPT = 20
"""The maps of this many last passes are averaged, as ConsiStory does."""


class SubjectMasks:
    """A context manager around a pipeline's call; `masks` gives the subject of every image as the steps so far show it.

    The maps of the subject's words in the conditional half are averaged over words, layers and the last 20 passes,
    stretched to the grid that is asked for and compared with Otsu's threshold (`lr_kernels.subject_mask`).

    Args:
        pipe: StableDiffusionPipeline, SDXL's, their relatives.
        prompts: of the images of a half, one for each. subject_tokens: a word or the words of the subject, which every
            prompt has.
        halves: of the guidance: 2, or 1 without it.
        layers: cross-attention layers of one scale, from `select_layers`. Default: those at a scale of 4 latent pixels,
            of a UNet without such the coarsest.

    Raises:
        ValueError: a prompt without the words; layers of different scales; in a pass: another batch; masks before the
            first step has ended.
        NotImplementedError: layers with a processor that is not stock.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        subject_tokens: str | Sequence[str],
        *,
        halves: int = 2,
        layers: Mapping[str, Attention] | None = None,
    ):
        check_integer("SubjectMasks", "halves", halves, 1, "2 with guidance, 1 without")
        check_not_compiled("SubjectMasks", pipe.unet)
        self._pipe, self._images = pipe, len(prompts)
        self._rows = halves * self._images
        words = as_subjects(subject_tokens)
        device = pipe._execution_device
        tokens = find_subjects(pipe.tokenizer, list(prompts) * halves, words, device, op="SubjectMasks")
        self._weights = tokens.weights.mean(0)[-self._images :, None]  # (images, 1, T)
        state = AttentionState(capturing=True, token_indices=tokens.indices)
        every = attention_layers(pipe.unet, "cross") if layers is None else layers
        scales = {name: layer_scale(pipe.unet, name) for name in every}
        wanted = set(scales.values())
        if layers is None:
            wanted = {MAP_SCALE if MAP_SCALE in wanted else max(wanted)}
        if len(wanted) != 1:
            fail("SubjectMasks", "layers", "layers of one scale, at least one", sorted(wanted))
        self._scale = wanted.pop()
        self._layers = {name: layer for name, layer in every.items() if scales[name] == self._scale}
        self._recorders = {name: TokenMapAttnProcessor(state) for name in self._layers}
        self._maps: deque[Tensor] = deque(maxlen=STEPS_KEPT)
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._schedule: Tensor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "SubjectMasks":
        with ExitStack() as stack:
            stack.enter_context(install_processors(self._layers, self._recorders))
            stack.callback(self._pipe.unet.register_forward_pre_hook(self._before_pass, with_kwargs=True).remove)
            stack.callback(self._pipe.unet.register_forward_hook(self._after_pass, with_kwargs=True).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def masks(self, grid: tuple[int, int]) -> Tensor:
        """bool (images, rows · columns), the same tensor until the next pass has ended."""
        if grid not in self._masks:
            if not self._maps:
                fail("SubjectMasks", "masks", "a pass that has ended", "none yet", "share from step 1 on")
            mean = torch.stack(list(self._maps)).mean(0)
            self._masks[grid] = subject_mask(mean[:, None], size=grid).flatten(1)
        return self._masks[grid]

    def _before_pass(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._pipe.scheduler.timesteps is not self._schedule:  # another run has begun
            self._schedule = self._pipe.scheduler.timesteps
            self._maps.clear()
            self._masks.clear()
        rows = pass_inputs(args, kwargs)[0].shape[0]
        if rows != self._rows:
            hint = "without guidance say halves=1"
            fail("SubjectMasks", "prompts", f"a UNet's batch of {self._rows} rows", rows, hint)

    def _after_pass(self, unet: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
        height, width = pass_inputs(args, kwargs)[0].shape[2:]
        recorded = [x.maps[-self._images :] for x in self._recorders.values() if x.maps is not None]
        maps = torch.stack(recorded).mean(0)
        maps = (maps * self._weights).sum(2).unflatten(1, layer_grid(self._scale, height, width))
        self._maps.append(maps)
        self._masks.clear()
