"""From the subject's maps to its foreground: threshold, cleaning, and what cannot be a subject."""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from ...features.subject_mask import subject_mask

SPECK = 0.5
"""Regions smaller than this share of the largest one are left out of a foreground."""
FILLED_HOLE = 0.1
"""Holes smaller than this share of the subject are filled. The hole of a ring is larger and stays."""
MARGIN, WARM = 0.6, 0.2
"""A foreground grows by MARGIN cells of the maps, that of an image to be made only into what is above WARM on the
stretched maps: a mask that cuts the subject does more harm than one that lets some background in."""
PLAUSIBLE = (0.005, 0.8)
"""Shares of the picture that a subject may cover without a warning."""


def foreground(
    maps: Tensor, size: tuple[int, int], *, threshold: float | str = "otsu", warm: float | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Maps (S, n, h, w) -> masks, bool (S, n, *size): above the threshold, without specks, a little larger.

    warm: the masks grow only where the stretched maps are above it. None: on all sides.
    """
    rows = maps.flatten(0, 1)[:, None]
    cleaned = without_specks(subject_mask(rows, size=size, threshold=threshold, backend=backend))
    masks = grown(cleaned, round(MARGIN * max(side / cells for side, cells in zip(size, maps.shape[2:]))))
    if warm is not None:
        masks = cleaned | (masks & subject_mask(rows, size=size, threshold=warm, backend=backend))
    return masks.unflatten(0, maps.shape[:2])


def without_specks(masks: Tensor) -> Tensor:
    """Masks, bool (B, h, w), without regions that are small beside the largest one and without small holes."""
    sizes = _region_sizes(masks, diagonal=True)
    kept = masks & (sizes >= SPECK * sizes.amax((1, 2), keepdim=True))
    area = kept.sum((1, 2), keepdim=True)
    outside = F.pad(~kept, (1, 1, 1, 1), value=True)  # one region with all background that reaches the border
    holes = _region_sizes(outside, diagonal=False)[:, 1:-1, 1:-1]
    return kept | (~kept & (holes < FILLED_HOLE * area))


def grown(masks: Tensor, radius: int) -> Tensor:
    """Masks, bool (B, h, w), and what is nearer to them than `radius` pixels along rows and columns."""
    if radius == 0:
        return masks
    grown = masks[:, None].float()
    for _ in range(radius):
        grown = _neighbours(grown, diagonal=False)
    return grown[:, 0] > 0


def warn_of_implausible(
    masks: Tensor, what: str, hint: str, plausible: tuple[float, float] = PLAUSIBLE, op: str = "LayoutRetouch"
) -> None:
    """Warn of masks, bool (S, n, h, w), that are empty or cover a share of the picture that is not plausible."""
    low, high = plausible
    for subject, images in enumerate(masks.float().mean((2, 3)).tolist()):
        for image, share in enumerate(images):
            if not share or not low <= share <= high:
                found = f"covers {share:.1%} of" if share else "is nowhere in"
                warnings.warn(
                    f"lr_kernels.{op}: subject {subject} {found} {what} {image}; {hint}",
                    RuntimeWarning,
                    stacklevel=2,
                )


def _region_sizes(masks: Tensor, *, diagonal: bool) -> Tensor:
    """Pixels of the connected region that each pixel of masks, bool (B, h, w), is in; 0 outside: int64 (B, h, w).

    Every pixel takes the largest label among its neighbours and then that label's own, so that labels travel in leaps.
    """
    batch, height, width = masks.shape
    flat = masks.flatten(1)
    labels = torch.arange(1, height * width + 1, device=masks.device).expand(batch, -1) * flat
    for _ in range(height + width):  # far fewer are needed, but counting them would synchronize with a GPU
        seen = _neighbours(labels.view(batch, 1, height, width).double(), diagonal=diagonal).flatten(1).long() * flat
        labels = torch.where(flat, seen.gather(1, (seen - 1).clamp(min=0)), 0)
    counts = torch.zeros(batch, height * width + 1, dtype=torch.int64, device=masks.device)
    counts.scatter_add_(1, labels, flat.long())
    return (counts.gather(1, labels) * flat).unflatten(1, (height, width))


def _neighbours(x: Tensor, *, diagonal: bool) -> Tensor:
    """The largest of each pixel and its neighbours, (B, 1, h, w)."""
    if diagonal:
        return F.max_pool2d(x, 3, 1, 1)
    return torch.maximum(F.max_pool2d(x, (3, 1), 1, (1, 0)), F.max_pool2d(x, (1, 3), 1, (0, 1)))
