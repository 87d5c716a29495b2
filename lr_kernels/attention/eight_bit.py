"""quantize: keys and values in 8 bits, a scale for each token and head."""

import torch
from torch import Tensor

from ..runtime.checks import check_choice, fail
from ..runtime.schemas import EIGHT_BIT_LARGEST
from ..runtime.tensors import check_dense, written_out

OP = "quantize"


def quantize(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Keys or values in 8 bits, as a `Source` takes them: half the bytes of 16-bit ones, and 4 more for each head.

        scale[r, m, h] = max_d |x[r, m, h, d]| / largest          x8 = round(x / scale), so that x ≈ x8 · scale

    with the largest number of the dtype, 127 or 448. Ties go to the even number. A token and head of zeros has scale 0.

        key, key_scale = quantize(key)
        value, value_scale = quantize(value)
        Source(key, value, key_scale=key_scale, value_scale=value_scale)

    Args:
        x: (R, M, H, D), of a floating dtype; computed in float32.
        dtype: torch.int8, or torch.float8_e4m3fn, whose numbers have three bits after the first: of normal numbers
            int8 keeps four times as much.

    Returns:
        (x8, scale): (R, M, H, D) in the dtype, and fp32 (R, M, H).

    Raises:
        TypeError, ValueError: an argument that does not fit, or numbers that are not finite. On a GPU and under
            torch.compile the numbers are not looked at: there a token and head that is not finite gets the scale NaN.
        NotImplementedError: x requires a gradient, which rounding does not have.
    """
    check_dense(OP, "x", x)
    if x.dim() != 4 or x.shape[3] == 0:
        fail(OP, "x", "shape (rows, tokens, heads, head_dim)", tuple(x.shape))
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        fail(OP, "x", "one of float32, float16, bfloat16, float64", x.dtype, error=TypeError)
    check_choice(OP, "dtype", dtype, list(EIGHT_BIT_LARGEST))
    if torch.is_grad_enabled() and x.requires_grad:
        hint = "rounding has none: pass x.detach()"
        fail(OP, "x", "a tensor without gradient", "one that requires it", hint, NotImplementedError)
    largest = EIGHT_BIT_LARGEST[dtype]
    wide = written_out(x).float()
    top = wide.abs().amax(3)
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not top.isfinite().all():
        fail(OP, "x", "finite numbers", "infinities or NaN")
    scale = torch.where(top.isfinite(), top / largest, torch.nan)
    steps = torch.where(scale[..., None] > 0, wide / scale[..., None], 0.0).clamp(-largest, largest)
    return (steps.round() if dtype == torch.int8 else steps).to(dtype), scale
