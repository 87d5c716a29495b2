"""subject_mask: the foreground of a subject from the cross-attention maps of its text token."""

import torch
from torch import Tensor

from .. import reference
from ..runtime import backends, modes
from ..runtime.checks import check_integer, check_memory, check_number, check_pair, fail
from ..runtime.ops import kernel
from ..runtime.tensors import resolved

_OP = "subject_mask"


def subject_mask(
    maps: Tensor,
    *,
    size: tuple[int, int] | None = None,
    threshold: float | str = "otsu",
    quantile: float | None = None,
    smoothing: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Foreground mask of a subject: layer mean -> min-max -> resize -> smoothing -> threshold.

    The mean over L is scaled to [0, 1] per row, resized bilinearly (half-pixel centres), averaged over a square of side
    `smoothing` (edges repeated), and compared: value > level. The level is the threshold; with "otsu" the one that
    maximizes the between-class variance of a 256-bin histogram (N. Otsu, IEEE Trans. SMC 9(1), 1979); with a quantile
    the value of rank floor(quantile · (P - 1)), from 0, among the row's P pixels in ascending order. (The linear
    interpolation of `torch.quantile` gives the same mask: no pixel lies between two ranks.)

    Args:
        maps: (B, L, h, w), any floating dtype: L layers, heads or tokens, as from `attention_with_token_maps`.
        size: (H, W) of the mask. Default: (h, w).
        threshold: "otsu" or a number in [0, 1].
        quantile: share of the pixels below the level, in [0, 1]; stands in for threshold.
        smoothing: odd side of the mean filter, at most the longer side of the mask; 1: none.
        backend: "auto", "cpu", "triton" or "reference". A name never falls back.

    Returns:
        bool (B, H, W). A row whose mean is constant or not finite has no foreground: all False. Not differentiable.

    Raises:
        ValueError: a shape, size, threshold or smoothing that does not fit. TypeError: a dtype that does not fit.
        RuntimeError: the named backend is not available.
    """
    if modes.transforms_active():
        modes.refuse_vmap(_OP, {"maps": maps})
    maps = resolved(_OP, "maps", maps)
    height, width = _check(maps, size, threshold, quantile, smoothing)
    as_they_are = maps.dtype == torch.float32 and maps.is_contiguous()
    copied = 0 if as_they_are else 4 * maps.numel()
    check_memory(_OP, "maps", copied + 9 * maps.shape[0] * height * width, maps.device)
    name = backends.choose(_OP, backend, maps.device, maps.dtype, argument="maps")
    if name == "reference":
        check_memory(_OP, "backend 'reference'", 8 * maps.numel() + 64 * maps.shape[0] * height * width, maps.device)
        return reference.subject_mask(
            maps.detach(), size=(height, width), threshold=threshold, quantile=quantile, smoothing=smoothing
        )
    out = torch.empty(maps.shape[0], height, width, dtype=torch.bool, device=maps.device)
    level = None if threshold == "otsu" else float(threshold)
    rank = None if quantile is None else float(quantile)
    kernel(_OP, name)(maps.detach().float().contiguous(), level, rank, int(smoothing), out)
    return out


def _check(
    maps: Tensor, size: tuple[int, int] | None, threshold: float | str, quantile: float | None, smoothing: int
) -> tuple[int, int]:
    """The arguments, in the order of the signature; returns the size of the mask."""
    if maps.dim() != 4 or 0 in maps.shape[1:]:
        fail(_OP, "maps", "shape (batch, layers, height, width) with at least one map", tuple(maps.shape))
    if not maps.is_floating_point():
        fail(_OP, "maps", "a floating dtype", maps.dtype, error=TypeError)
    height_width = check_pair(
        _OP, "size", maps.shape[2:] if size is None else size, 1, "(height, width), each at least 1"
    )
    if isinstance(threshold, str):
        if threshold != "otsu":
            fail(_OP, "threshold", "'otsu' or a number in [0, 1]", repr(threshold))
    else:
        threshold = check_number(_OP, "threshold", threshold, "'otsu' or a number in [0, 1]", 0, 1)
    if quantile is not None:
        if threshold != "otsu":
            fail(_OP, "quantile", "None beside a threshold", quantile, f"threshold is {threshold}: pass one of the two")
        check_number(_OP, "quantile", quantile, "a number in [0, 1]", 0, 1)
    expected = f"an odd number from 1 to {max(height_width)}, the mask's longer side"
    if check_integer(_OP, "smoothing", smoothing, 1, expected, max(height_width)) % 2 == 0:
        fail(_OP, "smoothing", expected, smoothing)
    return height_width
