"""step_blend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.checks import fail
from .precision import compute_dtype

__all__ = ["step_blend"]


def step_blend(
    sample: Tensor,
    predictions: Sequence[Tensor],
    coefficients: Tensor,
    step: int | Tensor,
    *,
    mask: Tensor | None = None,
    background: Tensor | None = None,
    noise: Tensor | None = None,
    history: Tensor | None = None,
    keep_rows: Tensor | None = None,
    model_input: Tensor | None = None,
    history_out: Tensor | None = None,
) -> Tensor:
    """The next latents of one denoising step, in one pass; also writes `model_input` and `history_out` where given.

        G    = Σ_k g_k·prediction_k
        next = a·sample + e·G + σ·noise + h·history
        kept = p·background + q·noise
        next = m·next + (1 - m)·kept                where a mask is given; next = kept in the rows of keep_rows
        x0   = c·sample + d·G                       0 in the rows of keep_rows
        history_out = x0, model_input = s·next, written n times along the batch

    sample, predictions (K <= 6), background, noise, history, history_out: (B, C, height, width); model_input
    (n·B, C, height, width); mask (B or 1, height, width) in [0, 1]; keep_rows bool (B,). coefficients fp32
    (steps, B or 1, K + 9): the columns are g_0 … g_{K-1}, a, e, σ, h, p, q, c, d, s.

    A term whose coefficient is 0 is left out: its tensor is not read, so a NaN in it has no effect. That holds for G as
    a whole where e or d is 0, and on either side of a mask of 0 or 1. Another coefficient's tensor must be there.
    """
    dtype, count = compute_dtype(sample.dtype), len(predictions)
    columns = coefficients[int(step)].to(dtype)[:, :, None, None, None].unbind(1)
    a, e, sigma, h, p, q, c, d, s = columns[count:]
    for name, x, weights in (
        ("noise", noise, (sigma, q if background is not None else sigma)),
        ("history", history, (h,)),
    ):
        if x is None and any(bool(weight.any()) for weight in weights):
            expected = f"a tensor, since its coefficient in step {int(step)} is not 0"
            fail("step_blend", name, expected, None, error=RuntimeError)

    def total(*terms: tuple[Tensor, Tensor | None]) -> Tensor:
        result = torch.zeros_like(sample, dtype=dtype)
        for weight, x in terms:
            if x is not None:
                result = result + torch.where(weight == 0, 0, weight * x.to(dtype))
        return result

    guided = total(*zip(columns[:count], predictions))
    result = total((a, sample), (e, guided), (sigma, noise), (h, history))
    kept = total((p, background), (q, noise))
    clean = total((c, sample), (d, guided))
    if mask is not None:
        m = mask.to(dtype)[:, None]
        result = torch.where(m == 1, result, torch.where(m == 0, kept, m * result + (1 - m) * kept))
    if keep_rows is not None:
        keep = keep_rows[:, None, None, None]
        result, clean = torch.where(keep, kept, result), torch.where(keep, 0, clean)
    if history_out is not None:
        history_out.copy_(clean)
    if model_input is not None and model_input.numel():
        model_input.copy_((s * result).repeat(len(model_input) // len(sample), 1, 1, 1))
    return result.to(sample.dtype)
