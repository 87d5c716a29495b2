"""correspondence: which reference token is most like each target token, and whether the way back agrees."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .. import reference as specification
from ..runtime import backends, modes
from ..runtime.checks import check_memory, check_number, check_pair, fail, one_of
from ..runtime.ops import kernel
from ..runtime.schemas import MAX_TOKENS
from ..runtime.tensors import resolved

_OP = "correspondence"
_FAR = 2.0**30
"""A radius that reaches every cell. Its square fits an int64."""
_MAX_CHANNELS = 2**24
"""The CPU kernel counts the channels of a few dozen tokens in 32 bits."""


def correspondence(
    target: Tensor,
    reference: Tensor,
    *,
    radius: float | Sequence[float] | Tensor = 0.0,
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
        radius: in cells of `grid`, Euclidean; 0: the very token. A number, or one for each row: a sequence of B
            numbers or a real tensor () or (B,) on the target's device. A tensor on a GPU is not looked at: there a
            negative radius and NaN count as 0.
        grid: (rows, columns) of the target's N tokens; needed for a radius above 0 and for one per row.
        backend: "auto", "cpu", "triton" or "reference". A name never falls back.

    Returns:
        index int64 (B, N) in [0, M) and consistent bool (B, N). Not differentiable. Of equal similarities the lowest
        index counts, both ways. A zero vector has similarity 0 to all. A token with a NaN or Inf is never chosen; as a
        target it has no match: index 0, consistent False, as have all targets where no reference token is finite.
        Similarities are computed in fp32, by Triton in TF32 where PyTorch allows it. Workspace: on the CPU
        8·B·M + 8·R·M bytes, R the reference's rows, and below 1 MiB per thread up to C = 2048; with Triton a copy of
        both inputs.

    Raises:
        ValueError: a shape, device, stride, size, radius or grid that does not fit (up to 2³¹ - 1 tokens of 2²⁴
        channels). TypeError: a dtype that does not fit, a radius that is none.
        RuntimeError: the named backend is not available.

    Features of a diffusion UNet as correspondences: L. Tang et al., arXiv 2306.03881.
    """
    if modes.transforms_active():
        modes.refuse_vmap(_OP, {"target": target, "reference": reference, "radius": radius})
    target, reference = resolved(_OP, "target", target), resolved(_OP, "reference", reference)
    _check(target, reference)
    radius = _check_radius(radius, target)
    columns = _columns(grid, target.shape[1], radius)
    target, reference = target.detach(), reference.detach()
    name = backends.choose(_OP, backend, target.device, target.dtype, argument="target")
    _check_size(target, reference, name)
    if name == "reference":
        return specification.correspondence(target, reference, radius=radius, grid=grid)
    index = target.new_empty(target.shape[:2], dtype=torch.int64)
    consistent = target.new_empty(target.shape[:2], dtype=torch.bool)
    kernel(_OP, name)(target, reference, columns, _squared(radius, target.device), index, consistent)
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


def _check(target: Tensor, reference: Tensor) -> None:
    """Shapes, dtypes, devices and strides of the features."""
    if target.dim() != 3 or target.shape[2] == 0:
        fail(_OP, "target", "shape (batch, tokens, channels), at least one channel", tuple(target.shape))
    if not target.is_floating_point():
        fail(_OP, "target", "one of float32, float16, bfloat16, float64", target.dtype, error=TypeError)
    batch, _, channels = target.shape
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
        if x.shape[1] > MAX_TOKENS:
            fail(_OP, name, f"fewer than {MAX_TOKENS + 1} tokens", x.shape[1])
    if channels > _MAX_CHANNELS:
        fail(_OP, "target", f"at most {_MAX_CHANNELS} channels", channels)


def _check_radius(radius: float | Sequence[float] | Tensor, target: Tensor) -> float | Tensor:
    """A number, or float64 (B,) or (1,) from 0 to _FAR."""
    batch, expected = target.shape[0], "a finite number, at least 0"
    if isinstance(radius, Tensor):
        if radius.dtype.is_complex or radius.dtype == torch.bool:
            fail(_OP, "radius", "a floating or integer dtype", radius.dtype, error=TypeError)
        if radius.dim() and radius.shape != (batch,):
            fail(_OP, "radius", f"a number, shape () or ({batch},)", f"shape {tuple(radius.shape)}")
        if radius.device != target.device:
            fail(_OP, "radius", str(target.device), radius.device)
        check_memory(_OP, "radius", 4 * 8 * radius.numel(), radius.device)  # the computation is in float64 then
        radius = radius.detach().reshape(-1).double()
        if radius.device.type == "cpu" and radius.numel() and not torch.compiler.is_compiling():
            low, high = (x.item() for x in radius.aminmax())
            if not (low >= 0 and math.isfinite(high)):
                fail(_OP, "radius", "finite numbers, at least 0", radius.tolist())
        return radius.nan_to_num(0.0).clamp(0.0, _FAR)
    if isinstance(radius, (list, tuple)):
        if len(radius) != batch:
            fail(_OP, "radius", f"a number, or {batch} for the rows", f"{len(radius)} numbers")
        for i, x in enumerate(radius):
            check_number(_OP, f"radius[{i}]", x, expected, low=0)
        # filled on the device, since a copy from the host would wait for the GPU
        rows = [torch.full((1,), min(x, _FAR), dtype=torch.float64, device=target.device) for x in radius]
        return torch.cat(rows) if rows else target.new_empty(0, dtype=torch.float64)
    check_number(_OP, "radius", radius, expected, low=0)
    return cast(float, radius)


def _columns(grid: tuple[int, int] | None, tokens: int, radius: float | Tensor) -> int:
    """The columns of the grid, at least 1."""
    if grid is None:
        if isinstance(radius, Tensor) or radius > 0:
            fail(_OP, "grid", "(rows, columns) for a radius above 0", None)
        return 1
    expected = f"(rows, columns) of {tokens} tokens"
    rows, columns = check_pair(_OP, "grid", grid, 0, expected)
    if rows * columns != tokens:
        fail(_OP, "grid", expected, (rows, columns))
    return max(1, columns)


def _squared(radius: float | Tensor, device: torch.device) -> Tensor:
    """As the kernels take it, int64 (B,) or (1,): squared distances between cells are integers, so it is rounded
    down."""
    if isinstance(radius, Tensor):
        return radius.square().floor().long()
    return torch.full((1,), math.floor(min(radius, _FAR) ** 2), dtype=torch.int64, device=device)
