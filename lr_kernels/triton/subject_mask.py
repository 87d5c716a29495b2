"""subject_mask: foreground of a subject from its cross-attention maps, in three launches and without a host
synchronization: layer mean and range; resize, smoothing and histogram; threshold. With a quantile, a sort of the
smoothed map takes the place of the third.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.calls import Call
from .launch import check_grid, on_device

_BLOCK = 512  # at 1024 the smoothing kernel spills (2 instructions at sm_90)
_BINS = 256
_INF = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["L", "P"])
def subject_mask_mean_kernel(
    maps,  # (B, L, P), P = h * w
    mean, limits, counts,  # fp32 (B, P), fp32 (B, 2), int32 (B, BINS)
    L, P, weight, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Weighted sum over layers, its smallest and largest value, and an empty histogram. A NaN or Inf makes both limits
    NaN. The weight, which min-max drops, keeps sum and range of the largest floats finite."""
    b = tl.program_id(0).to(tl.int64)
    low = tl.full([BLOCK], _INF, tl.float32)
    high = tl.full([BLOCK], -_INF, tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, P, BLOCK):
        i = start + tl.arange(0, BLOCK)
        ok = i < P
        x = tl.zeros([BLOCK], tl.float32)
        for layer in range(L):
            x += weight * tl.load(maps + (b * L + layer) * P + i, mask=ok, other=0.0).to(tl.float32)
        tl.store(mean + b * P + i, x, mask=ok)
        low = tl.minimum(low, tl.where(ok, x, _INF))
        high = tl.maximum(high, tl.where(ok, x, -_INF))
        broken += tl.where(tl.abs(x) < _INF, 0, 1)
    tl.store(limits + b * 2, tl.where(tl.sum(broken, 0) > 0, float("nan"), tl.min(low, 0)))
    tl.store(limits + b * 2 + 1, tl.where(tl.sum(broken, 0) > 0, float("nan"), tl.max(high, 0)))
    tl.store(counts + b * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))


@triton.jit
def _neighbours(place, ratio, size):
    """Bilinear taps of output places, half-pixel centres: (first index, second index, weight of the second)."""
    source = tl.maximum((place.to(tl.float32) + 0.5) * ratio - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), size - 1)
    return first, tl.minimum(first + 1, size - 1), source - first.to(tl.float32)


@triton.jit(do_not_specialize=["h", "w", "H", "W", "blocks", "smoothing", "out_b", "out_y", "out_x"])
def subject_mask_smooth_kernel(
    mean, limits,  # fp32 (B, h, w), fp32 (B, 2)
    smooth, counts, out,  # fp32 (B, H, W), int32 (B, BINS), bool (B, H, W)
    h, w, H, W, blocks, smoothing, ratio_y, ratio_x, threshold, out_b, out_y, out_x,
    FIXED: tl.constexpr, OTSU: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Resize to (H, W) and mean over a square, edges repeated; then with FIXED the mask, with OTSU the histogram."""
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    i = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = i < H * W
    y = i // W
    x = i % W
    low = tl.load(limits + b * 2)
    high = tl.load(limits + b * 2 + 1)
    span = tl.where(high > low, high - low, 1.0)
    base = mean + b * h * w
    total = tl.zeros([BLOCK], tl.float32)
    for dy in range(smoothing):
        y0, y1, fy = _neighbours(tl.minimum(tl.maximum(y + dy - smoothing // 2, 0), H - 1), ratio_y, h)
        for dx in range(smoothing):
            x0, x1, fx = _neighbours(tl.minimum(tl.maximum(x + dx - smoothing // 2, 0), W - 1), ratio_x, w)
            v00 = tl.load(base + y0 * w + x0, mask=ok, other=0.0) - low
            v01 = tl.load(base + y0 * w + x1, mask=ok, other=0.0) - low
            v10 = tl.load(base + y1 * w + x0, mask=ok, other=0.0) - low
            v11 = tl.load(base + y1 * w + x1, mask=ok, other=0.0) - low
            above = v00 + fx * (v01 - v00)  # exact where both are equal, as a quantile needs
            below = v10 + fx * (v11 - v10)
            total += (above + fy * (below - above)) / span
    value = tl.where(high > low, total / (smoothing * smoothing), 0.0)
    if FIXED:
        tl.store(out + b * out_b + y.to(tl.int64) * out_y + x.to(tl.int64) * out_x, value > threshold, mask=ok)
    else:
        tl.store(smooth + b * H * W + i, value, mask=ok)
    if OTSU:
        bins = tl.minimum(tl.maximum((value * BINS).to(tl.int32), 0), BINS - 1)
        found = tl.histogram(bins, BINS, mask=ok)
        tl.atomic_add(counts + b * BINS + tl.arange(0, BINS), found, mask=found > 0)


@triton.jit(do_not_specialize=["H", "W", "blocks", "out_b", "out_y", "out_x"])
def subject_mask_otsu_kernel(
    smooth, counts,  # fp32 (B, H, W), int32 (B, BINS)
    out,  # bool (B, H, W)
    H, W, blocks, out_b, out_y, out_x, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Threshold at the histogram split with the largest between-class variance, computed from exact integers."""
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    bins = tl.arange(0, BINS)
    count = tl.load(counts + b * BINS + bins).to(tl.int64)
    n_below = tl.cumsum(count, 0)
    s_below = tl.cumsum(count * bins, 0)
    n = tl.sum(count, 0)
    s = tl.sum(count * bins, 0)
    split = n_below * (n - n_below)
    distance = (s * n_below - s_below * n).to(tl.float64)
    variance = tl.where(split > 0, distance * distance / tl.maximum(split, 1).to(tl.float64), -1.0)
    level = (tl.argmax(variance, 0) + 1).to(tl.float32) / BINS
    i = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = i < H * W
    value = tl.load(smooth + b * H * W + i, mask=ok, other=0.0)
    at = out + b * out_b + (i // W).to(tl.int64) * out_y + (i % W).to(tl.int64) * out_x
    tl.store(at, value > level, mask=ok)


def subject_mask_triton(
    maps: Tensor, threshold: float | None, quantile: float | None, smoothing: int, out: Tensor
) -> None:
    """Shapes as in the schema `subject_mask` of runtime/schemas.py."""
    _check(maps, threshold, quantile, smoothing, out)
    # Early return for trivial cases
    if out.numel() == 0:
        return
    launches, smooth = launch_arguments(maps, threshold, quantile, smoothing, out)
    with on_device(maps.device):
        for kernel, arguments, constants, programs in launches:
            kernel[check_grid("subject_mask", programs)](*arguments, **constants)
    if quantile is not None:
        rank = math.floor(quantile * (smooth.shape[1] - 1))
        level = smooth.sort(1).values[:, rank, None, None]
        torch.gt(smooth.view(out.shape), level, out=out)


def launch_arguments(
    maps: Tensor, threshold: float | None, quantile: float | None, smoothing: int, out: Tensor
) -> tuple[list[tuple], Tensor]:
    """(kernel, positional arguments, constants and options, number of programs) of each launch, and the smoothed map
    fp32 (B, H * W) that they leave."""
    B, L, h, w = maps.shape
    H, W = out.shape[1:]
    fixed = threshold is not None
    otsu = not fixed and quantile is None
    blocks = triton.cdiv(H * W, _BLOCK)
    mean = maps.new_empty((B, h * w), dtype=torch.float32)
    limits = maps.new_empty((B, 2), dtype=torch.float32)
    counts = maps.new_empty((B, _BINS), dtype=torch.int32)
    smooth = maps.new_empty((B, 0 if fixed else H * W), dtype=torch.float32)
    shape = {"BLOCK": _BLOCK, "BINS": _BINS, "num_warps": 4, "enable_fp_fusion": True}
    level = 0.0 if threshold is None else float(threshold)
    launches = [
        (subject_mask_mean_kernel, (maps.contiguous(), mean, limits, counts, L, h * w, 0.25 / L), shape, B),
        (
            subject_mask_smooth_kernel,
            (mean, limits, smooth, counts, out, h, w, H, W, blocks, smoothing, h / H, w / W, level, *out.stride()),
            {**shape, "FIXED": fixed, "OTSU": otsu},
            B * blocks,
        ),
    ]
    if otsu:
        arguments = (smooth, counts, out, H, W, blocks, *out.stride())
        launches.append((subject_mask_otsu_kernel, arguments, shape, B * blocks))
    return launches, smooth


def examples(arch: int) -> list[tuple]:
    """(name, kernel, positional arguments, constants and options) of launches whose registers the report tells."""
    layers = torch.empty(2, 20, 32, 32, device="meta")
    mask = torch.empty(2, 64, 64, dtype=torch.bool, device="meta")
    launches, _ = launch_arguments(layers, None, None, 3, mask)
    return [(kernel.fn.__name__.removesuffix("_kernel"), kernel, *rest) for kernel, *rest, _ in launches]


def _check(maps: Tensor, threshold: float | None, quantile: float | None, smoothing: int, out: Tensor) -> None:
    """The arguments of subject_mask."""
    call = Call("subject_mask", maps, "maps", (torch.float32,))
    sizes = call.input("maps", maps, ("batch", "maps", "height", "width"), 0)
    call.require(0 not in sizes[1:], "maps", "at least one map of at least one pixel", tuple(sizes))
    call.output("out", out, (sizes[0], "height", "width"), 0, torch.bool)
    call.require(0 not in out.shape[1:], "out", "at least one pixel", tuple(out.shape))
    for name, x in (("threshold", threshold), ("quantile", quantile)):
        call.require(x is None or 0 <= x <= 1, name, "0 to 1", x)
    call.require(threshold is None or quantile is None, "quantile", "None beside a threshold", quantile)
    longer = max(out.shape[1:])
    fits = smoothing % 2 == 1 and 1 <= smoothing <= longer
    call.require(fits, "smoothing", f"an odd number from 1 to {longer}", smoothing)
