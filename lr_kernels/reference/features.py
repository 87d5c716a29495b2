"""subject_mask, adain and correspondence."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import compute_dtype, without_autocast

__all__ = ["adain", "correspondence", "cosine_similarity", "otsu_threshold", "subject_map", "subject_mask"]

OTSU_BINS = 256


def subject_mask(
    maps: Tensor,
    *,
    size: tuple[int, int] | None = None,
    threshold: float | str = "otsu",
    quantile: float | None = None,
    smoothing: int = 1,
) -> Tensor:
    """Foreground mask of a subject from its cross-attention maps.

    maps (B, L, h, w): L layers or tokens. The values of `subject_map` above a level are foreground. The level is
    `threshold`; or with "otsu" the threshold that maximizes the between-class variance of a 256-bin histogram of
    [0, 1]; or with `quantile` the pixel value of rank floor(quantile · (P - 1)) among a row's P pixels in ascending
    order. Returns bool (B, *size). A constant map has no foreground: all False.
    """
    x = subject_map(maps, size=size, smoothing=smoothing)
    if quantile is not None:
        pixels = x.flatten(1).sort(1).values
        level = pixels[:, math.floor(quantile * (pixels.shape[1] - 1))]
    else:
        level = otsu_threshold(x) if isinstance(threshold, str) else x.new_full((len(x),), threshold)
    return x > level[:, None, None]


def subject_map(maps: Tensor, *, size: tuple[int, int] | None = None, smoothing: int = 1) -> Tensor:
    """(B, L, h, w) -> (B, *size): layer mean -> min-max to [0, 1] -> bilinear resize to `size` (half-pixel centres) ->
    mean over a square of side `smoothing` (odd, edges repeated). Rows without a finite range are 0."""
    x = maps.to(compute_dtype(maps.dtype))
    x = (x / (4 * x.shape[1])).sum(1)  # min-max drops the factor 4; without it a sum or a range could overflow
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    x = torch.where(high > low, (x - low) / (high - low), 0)
    if size is not None and tuple(size) != tuple(x.shape[1:]):
        x = F.interpolate(x[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    if smoothing > 1:
        half = smoothing // 2
        x = F.avg_pool2d(F.pad(x[:, None], (half,) * 4, mode="replicate"), smoothing, stride=1)[:, 0]
    return x


def otsu_threshold(x: Tensor) -> Tensor:
    """(B, h, w) in [0, 1] -> (B,): upper edge of the histogram bin that maximizes between-class variance (the first
    one).

    Between-class variance of a split after bin k: (μ·n_k - s_k)² / (n_k · (n - n_k)) up to a constant, with n_k the
    count and s_k the sum of bin indices of bins 0..k, μ = s/n. N. Otsu, IEEE Trans. SMC 9(1), 1979.
    """
    bins = (x.flatten(1) * OTSU_BINS).long().clamp(0, OTSU_BINS - 1)
    counts = torch.zeros(len(x), OTSU_BINS, dtype=x.dtype, device=x.device)
    counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=x.dtype))
    n_below = counts.cumsum(1)
    s_below = (counts * torch.arange(OTSU_BINS, dtype=x.dtype, device=x.device)).cumsum(1)
    n, s = n_below[:, -1:], s_below[:, -1:]
    split = n_below * (n - n_below)
    variance = torch.where(split > 0, (s * n_below - s_below * n) ** 2 / split.clamp(min=1), -1)
    return (variance.argmax(1) + 1).to(x.dtype) / OTSU_BINS


def adain(
    x: Tensor,
    reference: Tensor,
    *,
    mask: Tensor | None = None,
    reference_mask: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Give x (B, N, H, D) the token mean and deviation of reference (B or 1, M, H, D), per row, head and channel:

        out = (x - μ_x) / sqrt(var_x + eps) · sqrt(var_r + eps) + μ_r

    mask (B or 1, N) and reference_mask (B or 1, M) choose the tokens that the statistics are of. Tokens of x outside
    the mask are unchanged; so are rows where either choice is empty.
    """
    dtype = compute_dtype(x.dtype)
    x_count, x_mean, x_std = _token_statistics(x.to(dtype), mask, eps)
    r_count, r_mean, r_std = _token_statistics(reference.to(dtype), reference_mask, eps)
    out = (x.to(dtype) - x_mean) / x_std * r_std + r_mean
    changed = (x_count > 0) & (r_count > 0)
    if mask is not None:
        changed = changed & mask[:, :, None, None]
    return torch.where(changed, out.to(x.dtype), x)


def _token_statistics(x: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and deviation of the chosen tokens: (R or 1, 1, 1, 1), (R, 1, H, D), (R, 1, H, D)."""
    mask = torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device) if mask is None else mask
    chosen = mask[:, :, None, None]
    count = chosen.sum(1, keepdim=True)
    mean = torch.where(chosen, x, 0).sum(1, keepdim=True) / count.clamp(min=1)
    variance = torch.where(chosen, x - mean, 0).square().sum(1, keepdim=True) / count.clamp(min=1)
    return count, mean, (variance + eps).sqrt()


@without_autocast
def cosine_similarity(target: Tensor, reference: Tensor) -> Tensor:
    """target (B, N, C), reference (B or 1, M, C) -> (B, N, M).

    A zero vector has similarity 0 to all; a vector with a NaN or Inf has -inf, so that it is never chosen.
    """
    similarity = _unit_vectors(target) @ _unit_vectors(reference).mT
    return torch.where(similarity.isnan(), -math.inf, similarity)


def _unit_vectors(x: Tensor) -> Tensor:
    """x / |x| along the last dimension. The division by the largest element keeps squares from over- or underflow."""
    x = x.to(compute_dtype(x.dtype))
    largest = x.abs().amax(-1, keepdim=True)
    x = torch.where(largest == 0, 0, x / largest)
    return torch.where(largest == 0, 0, x / x.norm(dim=-1, keepdim=True))


@without_autocast
def correspondence(
    target: Tensor,
    reference: Tensor,
    *,
    radius: float | Sequence[float] | Tensor = 0.0,
    grid: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Two-way nearest neighbour in cosine similarity.

    target (B, N, C), reference (B or 1, M, C) -> index int64 (B, N): the reference token most like each target token,
    and consistent bool (B, N): going back from it ends within `radius` grid cells of the start (radius: scalar or (B,);
    grid: (rows, columns) of the target; radius 0 asks for the very token). Of equal similarities the lowest index
    counts. A target token without any similarity above -inf gets index 0 and consistent False.
    """
    similarity = cosine_similarity(target, reference)
    best, index = similarity.max(2)
    if index.numel() == 0:
        return index, index.bool()
    back = similarity.argmax(1).gather(1, index)
    start = torch.arange(target.shape[1], device=target.device)
    columns = 1 if grid is None else max(1, grid[1])
    dy, dx = back // columns - start // columns, back % columns - start % columns
    cells = torch.as_tensor(radius, dtype=torch.float64, device=target.device).reshape(-1, 1)
    return index, (dy**2 + dx**2 <= cells**2) & (best > -math.inf)
