"""A subject's mask from its token maps by layer mean, min-max, resize, mean filter and Otsu: subject_mask against the
same computation in PyTorch, and with the Otsu threshold of scikit-image or OpenCV."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lr_kernels import reference, subject_mask

from ..harness import DTYPES, Contender, NotRun, Problem
from ..target import CPU, Target

SMOOTHING, BINS = 3, 256
COARSE = {"scikit-image": 2 / BINS, "OpenCV": 2 / (BINS - 1)}
"""How far from the level a pixel may lie on the other side: scikit-image's bins begin at the smallest value and its
level is a bin's middle, OpenCV rounds the map to 255 steps."""


class Case(NamedTuple):
    id: str
    model: str
    images: int
    layers: int
    side: int
    size: int


CASES = (
    Case("16² to 64²", "SD1.5", 2, 5, 16, 64),
    Case("32² to 128²", "SDXL", 2, 60, 32, 128),
    Case("32² to 128², 8 images", "SDXL", 8, 60, 32, 128),
)


def stretched(maps: Tensor, side: int) -> Tensor:
    """(B, L, h, w) -> (B, side, side) in [0, 1]"""
    x = maps.float().mean(1, keepdim=True)
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    x = F.interpolate((x - low) / (high - low), (side, side), mode="bilinear", align_corners=False)
    half = SMOOTHING // 2
    return F.avg_pool2d(F.pad(x, (half,) * 4, mode="replicate"), SMOOTHING, stride=1)[:, 0]


def otsu(x: Tensor) -> Tensor:
    """(B, h, w) in [0, 1] -> (B,): the upper edge of the bin that maximizes the between-class variance."""
    bins = (x.flatten(1) * BINS).long().clamp(0, BINS - 1)
    counts = torch.zeros(len(x), BINS, device=x.device).scatter_add_(1, bins, torch.ones_like(bins, dtype=x.dtype))
    below = counts.cumsum(1)
    weighted = (counts * torch.arange(BINS, device=x.device)).cumsum(1)
    every, total = below[:, -1:], weighted[:, -1:]
    split = below * (every - below)
    variance = torch.where(split > 0, (total * below - weighted * every) ** 2 / split.clamp(min=1), -1)
    return (variance.argmax(1) + 1) / BINS


def by_lines(maps: Tensor, side: int) -> Tensor:
    x = stretched(maps, side)
    return x > otsu(x)[:, None, None]


def by_scikit_image(maps: Tensor, side: int) -> Tensor:
    try:
        from skimage.filters import threshold_otsu
    except ImportError as error:
        raise NotRun(str(error)) from error
    x = stretched(maps, side).cpu()
    return torch.stack([row > float(threshold_otsu(row.numpy(), nbins=BINS)) for row in x]).to(maps.device)


def by_opencv(maps: Tensor, side: int) -> Tensor:
    try:
        import cv2
    except ImportError as error:
        raise NotRun(str(error)) from error
    x = (stretched(maps, side) * (BINS - 1)).round().byte().cpu()
    masks = [cv2.threshold(row.numpy(), 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1] for row in x]
    return torch.stack([torch.from_numpy(mask).bool() for mask in masks]).to(maps.device)


def problems(dtypes: Sequence[str], target: Target = CPU) -> list[Callable[[], list[Problem]]]:
    """One builder per case and dtype."""
    return [functools.partial(_build, case, dtype, target) for case in CASES for dtype in dtypes]


def inputs_of(case: Case, dtype: str, target: Target) -> Tensor:
    """Noise with a bright square, (B, L, h, w)."""
    generator = torch.Generator().manual_seed(0)
    images, layers, side = (2, 2, 8) if target.toy else (case.images, case.layers, case.side)
    x = torch.rand(images, layers, side, side, generator=generator)
    x[..., side // 4 : side // 2, side // 4 : side // 2] += 1.5
    return x.to(target.device, DTYPES[dtype])


def _build(case: Case, dtype: str, target: Target) -> list[Problem]:
    side = 16 if target.toy else case.size
    maps = inputs_of(case, dtype, target)
    options = {"size": (side, side), "smoothing": SMOOTHING}
    exact, low = (reference.subject_map(x, **options) for x in (maps.double(), maps.float()))
    level = reference.otsu_threshold(exact)[:, None, None]
    rounding = float(2 * ((low - exact).abs().max() + torch.finfo(torch.float32).eps * exact.max()))

    def ours(backend: str) -> Tensor:
        return subject_mask(maps, **options, backend=backend)

    def error(name: str, result: Tensor) -> float:
        """The share of the pixels that differ from float64's, all of which lie on the level but for rounding."""
        differs = result != (exact > level)
        distance = (exact - level).abs()[differs]
        assert result.dtype == torch.bool and (distance <= COARSE.get(name, rounding)).all(), f"{name}: another mask"
        return differs.double().mean().item()

    peers = {
        "eager": by_lines,
        **target.compiled({"torch.compile": by_lines}),
        "scikit-image": by_scikit_image,
        "OpenCV": by_opencv,
    }
    return [
        Problem(
            op="subject_mask",
            layer=case.id,
            model=case.model,
            shape="x".join(map(str, maps.shape)),
            dtype=dtype,
            flops=float(maps.numel() + exact.numel() * (8 + SMOOTHING**2)),
            contenders={
                **target.ours(ours),
                **{name: Contender(functools.partial(f, maps, side)) for name, f in peers.items()},
            },
            error=error,
        )
    ]
