"""subject_mask: the foreground of a subject from the cross-attention maps of its text token."""

import torch
from torch import Tensor

from . import backends, reference
from .checks import fail

_OP = "subject_mask"


def subject_mask(
    maps: Tensor,
    *,
    size: tuple[int, int] | None = None,
    threshold: float | str = "otsu",
    smoothing: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Foreground mask of a subject: layer mean -> min-max -> resize -> smoothing -> threshold.

    The mean over L is scaled to [0, 1] per row, resized bilinearly (half-pixel centres), averaged over a square of side
    `smoothing` (edges repeated), and compared: value > threshold. "otsu" takes the threshold that maximizes the
    between-class variance of a 256-bin histogram (N. Otsu, IEEE Trans. SMC 9(1), 1979).

    Args:
        maps: (B, L, h, w), any floating dtype: L layers, heads or tokens, as from `attention_with_token_maps`.
        size: (H, W) of the mask. Default: (h, w).
        threshold: "otsu" or a number in [0, 1].
        smoothing: odd side of the mean filter; 1: none.
        backend: "auto", "cpu", "triton" or "reference". A name never falls back.

    Returns:
        bool (B, H, W). A row whose mean is constant or not finite has no foreground: all False. Not differentiable.

    Raises:
        ValueError: a shape, size, threshold or smoothing that does not fit. TypeError: a dtype that does not fit.
        RuntimeError: the named backend is not available.
    """
    height, width = _check(maps, size, threshold, smoothing)
    name = backends.choose(_OP, backend, maps.device, maps.dtype, argument="maps")
    if name == "reference":
        return reference.subject_mask(maps.detach(), size=(height, width), threshold=threshold, smoothing=smoothing)
    out = torch.empty(maps.shape[0], height, width, dtype=torch.bool, device=maps.device)
    op = torch.ops.lr_kernels.subject_mask_cpu
    if name == "triton":
        from . import triton  # noqa: F401  (registers the Triton implementations)

        op = torch.ops.lr_kernels.subject_mask_triton
    op(maps.detach().float().contiguous(), None if threshold == "otsu" else float(threshold), smoothing, out)
    return out


def _check(maps: Tensor, size: tuple[int, int] | None, threshold: float | str, smoothing: int) -> tuple[int, int]:
    """The arguments, in the order of the signature; returns the size of the mask."""
    if maps.dim() != 4 or 0 in maps.shape[1:]:
        fail(_OP, "maps", "shape (batch, layers, height, width) with at least one map", tuple(maps.shape))
    if not maps.is_floating_point():
        fail(_OP, "maps", "a floating dtype", maps.dtype, error=TypeError)
    height_width = tuple(maps.shape[2:] if size is None else size)
    if len(height_width) != 2 or min(height_width) < 1:
        fail(_OP, "size", "(height, width), each at least 1", height_width)
    if isinstance(threshold, str):
        if threshold != "otsu":
            fail(_OP, "threshold", "'otsu' or a number in [0, 1]", repr(threshold))
    elif not 0 <= threshold <= 1:
        fail(_OP, "threshold", "'otsu' or a number in [0, 1]", threshold)
    if smoothing < 1 or smoothing % 2 == 0:
        fail(_OP, "smoothing", "an odd number, at least 1", smoothing)
    return height_width[0], height_width[1]
