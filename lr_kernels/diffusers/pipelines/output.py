"""The output of the pipeline and of its stages, and the counting of what they cost."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import PIL.Image
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from ..subjects.overlay import draw
from .contexts import Contexts
from .pictures import Images

Match = tuple[Tensor, Tensor, tuple[int, int]]
"""index and consistent, (images, tokens) each, see `correspondence`; and the grid of the tokens"""


@dataclass
class LayoutRetouchOutput(BaseOutput):
    """Result of `StableDiffusionLayoutRetouchPipeline` or of one of its stages.

    Entries that a stage does not make are None.
    """

    images: Images
    """n images in the requested output type"""
    latents: Tensor
    """(n, C, h, w): the latents of `images`"""
    layout_images: Images | None = None
    """n layout (context) images of the first stage"""
    reference_images: Tensor | None = None
    """(references, 3, height, width) in [0, 1], as the model saw them"""
    masks: Tensor | None = None
    """bool (n, h, w): the targets' foreground in the last step, in latent pixels"""
    subject_masks: Tensor | None = None
    """bool (subjects, n, h, w): the targets' foreground of each subject"""
    context_masks: Tensor | None = None
    """bool (subjects, n, h, w): the layouts' foreground"""
    reference_mask: Tensor | None = None
    """bool (references, h, w): the references' foreground"""
    reference_subjects: tuple[int, ...] | None = None
    """the subject that each reference shows"""
    maps: Tensor | None = None
    """fp32 (subjects, n, rows, columns) in [0, 1], with return_maps: where the subjects are in the layouts"""
    matches: list[Match] | None = None
    """per reference, with return_maps: its token that looks most like each token of the layouts"""
    contexts: Contexts | None = None
    """what the retouch stage reads of the layouts; None where the layout stage did not know the subjects"""
    nsfw_content_detected: list[bool] | None = None
    layout_nsfw_content_detected: list[bool] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """wall-clock time per stage: layout, encode, mask, invert, retouch, decode"""
    rows: dict[str, int] = field(default_factory=dict)
    """images that the UNets have seen in each stage, over all steps; two per step and image with guidance"""

    def draw(self, scale: float | None = None) -> PIL.Image.Image:
        """One sheet of references, layouts and results with their masks, see `overlay.draw`."""
        return draw(self, scale=scale, reference_subjects=self.reference_subjects)


@dataclass
class Costs:
    """Seconds and UNet rows of each stage."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage; waits for a GPU at the end of the block, not within it."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def count(self, stage: str, rows: int) -> None:
        """Add rows that a UNet has seen."""
        self.rows[stage] = self.rows.get(stage, 0) + rows
