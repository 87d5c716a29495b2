"""How images become inputs of encoders, by two protocols.

`standard`: as the encoders' authors do. The shorter side is resized by PIL's bicubic filter, the middle is cut out, and
the colours are normalized with the encoder's own mean and deviation.

`dreammatcher`: as the code of DreamMatcher (arXiv 2402.09812, github.com/KU-CVLAB/DreamMatcher) computes the figures
that papers on its benchmark compare, oddities included:

- every image is squashed to 256 x 256, whatever its aspect ratio, by PIL's bicubic filter, and scaled to [-1, 1];
- CLIP gets it resized to 224 x 224 as a tensor, by a bicubic filter without antialiasing whose overshoots stay;
- DINO gets the 256 x 256 pixels in [-1, 1] as they are, without ImageNet's mean and deviation, and its positional
  embeddings are interpolated by a scale of (16 + 0.1) / 14, as the authors of DINO do;
- the text that CLIP compares with is the line of the prompt file with its literal "{}".
"""

import math
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

PROTOCOLS = ("standard", "dreammatcher")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SQUASHED = 256
GREY = 127


def standard(image: PIL.Image.Image, shorter: int, side: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An RGB image as an encoder's input: fp32 (3, side, side).

    Args:
        shorter: to which the shorter side is resized; the longer one is rounded down.
        side: of the square that is cut out of the middle.
        mean, std: of the colours in [0, 1].
    """
    scale = shorter / min(image.size)
    width, height = (shorter if x == min(image.size) else int(x * scale) for x in image.size)
    resized = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    pixels = pixels_of(resized.crop((left, top, left + side, top + side))) / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def squashed(image: PIL.Image.Image) -> Tensor:
    """An RGB image as DreamMatcher loads it: fp32 (3, 256, 256) in [-1, 1]."""
    return pixels_of(image.resize((SQUASHED, SQUASHED), PIL.Image.Resampling.BICUBIC)) / 127.5 - 1


def squashed_for_clip(image: PIL.Image.Image, side: int) -> Tensor:
    """An RGB image as DreamMatcher gives it to CLIP: fp32 (3, side, side)."""
    pixels = (squashed(image) + 1) / 2
    pixels = F.interpolate(pixels[None], (side, side), mode="bicubic", align_corners=False, antialias=False)[0]
    return (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def hub_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positional embeddings (1, 1 + n, C) of a square of n patches for a grid (rows, columns) of them, as the authors
    of DINO interpolate them: by a scale that is a tenth of a patch too large."""
    side = math.isqrt(positions.shape[1] - 1)
    if grid == (side, side):
        return positions
    patches = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scales = tuple((count + 0.1) / side for count in grid)
    patches = F.interpolate(patches, scale_factor=scales, mode="bicubic")
    return torch.cat([positions[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def without_background(image: PIL.Image.Image, mask: np.ndarray) -> PIL.Image.Image:
    """An RGB image that is grey outside of a mask, bool (h, w) at any size."""
    shown = PIL.Image.fromarray(np.uint8(255) * mask).resize(image.size, PIL.Image.Resampling.NEAREST)
    return PIL.Image.composite(image, PIL.Image.new("RGB", image.size, (GREY, GREY, GREY)), shown)


def pixels_of(image: PIL.Image.Image) -> Tensor:
    """The pixels of an RGB image: fp32 (3, height, width), 0 to 255."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
