"""What the pipeline and its stages return."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class LayoutRetouchOutput(BaseOutput):
    """Result of `StableDiffusionLayoutRetouchPipeline` or of one of its stages.

    Entries that a stage does not make are None.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    """n images in the requested output type"""
    latents: Tensor
    """(n, C, h, w): the latents of `images`"""
    layout_images: list[PIL.Image.Image] | np.ndarray | Tensor | None = None
    """n layout (context) images of the first stage"""
    masks: Tensor | None = None
    """bool (n, h, w): the targets' foreground in the last step, in latent pixels"""
    subject_masks: Tensor | None = None
    """bool (subjects, n, h, w): that of each subject"""
    reference_mask: Tensor | None = None
    """bool (references, h, w): their foreground"""
    nsfw_content_detected: list[bool] | None = None
    layout_nsfw_content_detected: list[bool] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """wall-clock time per stage: layout, encode, invert, mask, retouch, decode"""


@contextmanager
def timed(seconds: dict[str, float], stage: str, device: torch.device) -> Iterator[None]:
    """Add the time of a block to seconds[stage]; waits for a GPU at the end of the block, not within it."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
