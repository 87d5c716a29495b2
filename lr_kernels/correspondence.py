"""correspondence: which reference token is most like each target token, and whether the way back agrees."""

import math

import torch
from torch import Tensor

from . import backends
from . import reference as specification
from .checks import check_memory, fail, one_of
from .tensors import resolved

_OP = "correspondence"


def correspondence(
    target: Tensor,
    reference: Tensor,
    *,
    radius: float = 0.0,
    grid: tuple[int, int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Two-way nearest neighbours in cosine similarity, without ever storing the N × M similarities.

    Each target token takes the reference token most like it, and that one the target token most like itself; the match
    is consistent where this way there and back ends at most `radius` grid cells from its start.

    Args:
        target: (B, N, C) features, fp32, fp16 or bf16 (the reference backend also float64).
        reference: (B or 1, M, C), at least one token; one row is shared by the batch. Strided views are read in place;
            only the last dimension must be contiguous.
        radius: in cells of `grid`, Euclidean; 0: the very token.
        grid: (rows, columns) of the target's N tokens; needed for a radius above 0.
        backend: "auto", "cpu", "triton" or "reference". A name never falls back.

    Returns:
        index int64 (B, N) in [0, M) and consistent bool (B, N). Not differentiable. Of equal similarities the lowest
        index counts, both ways. A zero vector has similarity 0 to all. A token with a NaN or Inf is never chosen; as a
        target it has no match: index 0, consistent False, as have all targets where no reference token is finite.
        Similarities are computed in fp32, by Triton in TF32 where PyTorch allows it. Workspace: on the CPU
        8·B·M + 8·R·M bytes, R the reference's rows, and below 1 MiB per thread up to C = 2048; with Triton a copy of
        both inputs.

    Raises:
        ValueError: a shape, device, stride, radius or grid that does not fit. TypeError: a dtype that does not fit.
        RuntimeError: the named backend is not available.

    Features of a diffusion UNet as correspondences: L. Tang et al., arXiv 2306.03881.
    """
    target, reference = resolved(_OP, "target", target), resolved(_OP, "reference", reference)
    columns, radius_squared = _check(target, reference, radius, grid)
    target, reference = target.detach(), reference.detach()
    name = backends.choose(_OP, backend, target.device, target.dtype, argument="target")
    _check_size(target, reference, name)
    if name == "reference":
        return specification.correspondence(target, reference, radius=radius, grid=grid)
    index = target.new_empty(target.shape[:2], dtype=torch.int64)
    consistent = target.new_empty(target.shape[:2], dtype=torch.bool)
    op = torch.ops.lr_kernels.correspondence_cpu
    if name == "triton":
        from . import triton  # noqa: F401  (registers the Triton implementations)

        op = torch.ops.lr_kernels.correspondence_triton
    op(target, reference, columns, radius_squared, index, consistent)
    return index, consistent


def _check_size(target: Tensor, reference: Tensor, backend: str) -> None:
    """Refuse results and workspace beyond the memory."""
    (batch, tokens, channels), (rows, others, _) = target.shape, reference.shape
    needed = 9 * batch * tokens + 8 * (batch + rows) * others
    if backend == "triton":
        needed += (batch * tokens + rows * others) * channels * target.element_size()
    if backend == "reference":
        needed += 8 * (3 * batch * tokens * others + 2 * (batch * tokens + rows * others) * channels)
    check_memory(_OP, "target", needed, target.device)


def _check(target: Tensor, reference: Tensor, radius: float, grid: tuple[int, int] | None) -> tuple[int, int]:
    """The arguments, in the order of the signature; returns the columns of the grid and the radius as the kernels take
    it: squared distances between cells are integers, so its square is rounded down."""
    if target.dim() != 3 or target.shape[2] == 0:
        fail(_OP, "target", "shape (batch, tokens, channels), at least one channel", tuple(target.shape))
    if not target.is_floating_point():
        fail(_OP, "target", "one of float32, float16, bfloat16, float64", target.dtype, error=TypeError)
    batch, tokens, channels = target.shape
    shape = tuple(reference.shape)
    if len(shape) != 3 or not one_of(shape[0], 1, batch) or shape[1] == 0 or shape[2] != channels:
        fail(_OP, "reference", f"shape ({batch} or 1, tokens, {channels}), at least one token", shape)
    if reference.dtype != target.dtype:
        fail(_OP, "reference", str(target.dtype), reference.dtype, "cast both tensors to one dtype", TypeError)
    if reference.device != target.device:
        fail(_OP, "reference", str(target.device), reference.device)
    for name, x in (("target", target), ("reference", reference)):
        if channels > 1 and x.stride(2) != 1:
            fail(_OP, name, "a contiguous last dimension", f"stride {x.stride(2)}", "call .contiguous()")
        if x.shape[1] >= 2**31:  # the kernels hold indices in 32 bits
            fail(_OP, name, f"fewer than {2**31} tokens", x.shape[1])
    if not (radius >= 0 and math.isfinite(radius)):
        fail(_OP, "radius", "a finite number, at least 0", radius)
    if grid is None:
        if radius > 0:
            fail(_OP, "grid", "(rows, columns) for a radius above 0", None)
        return 1, 0
    if len(grid) != 2 or min(grid) < 0 or grid[0] * grid[1] != tokens:
        fail(_OP, "grid", f"(rows, columns) of {tokens} tokens", tuple(grid))
    return max(1, grid[1]), math.floor(min(radius, 2.0**30) ** 2)
