"""step_blend: the next latents of a denoising step in one pass, and the coefficient tables that drive it."""

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from . import backends, reference
from .checks import fail

_OP = "step_blend"
MAX_PREDICTIONS = 6
PREDICTION_TYPES = ("epsilon", "v_prediction")
BACKGROUNDS = ("latents", "clean")
SCHEDULES = ("hard", "linear", "cosine")


def step_blend(
    sample: Tensor,
    predictions: Sequence[Tensor],
    coefficients: Tensor,
    step: int | Tensor,
    *,
    mask: Tensor | None = None,
    background: Tensor | None = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The next latents: guidance, model blend, scheduler update and mask blend, reading every tensor once.

        next = a·sample + Σ_k w_k·prediction_k + σ·noise
        next = m·next + (1 - m)·(p·background + q·noise)          where a mask is given

    with w_0 … w_{K-1}, a, σ, p, q = coefficients[step, row]. Sums are fp32, rounded once to the sample's dtype.

    Args:
        sample: (B, C, height, width), fp32, fp16 or bf16 (the reference backend also float64).
        predictions: 1 to 6 tensors like sample. One whose weight is 0 is not read: a NaN in it has no effect.
        coefficients: fp32 (steps, B or 1, K + 4), from `step_coefficients`.
        step: the row of the table, an int or an int32 or int64 tensor of one element on the sample's device.
        mask: bool or float (B or 1, height, width) in [0, 1]: 1 takes the denoised latents, 0 the background.
        background: like sample; needed with a mask.
        noise: like sample; None leaves out the terms of σ and q.
        out: like sample, contiguous, receives the result; a fresh large tensor costs more time than the arithmetic.
        backend: "auto", "cpu", "triton" or "reference". A name never falls back.
        Tensors like sample are read in place where only their batch stride is free, else through one contiguous copy.

    Returns:
        (B, C, height, width) in the sample's dtype; `out` where it is given.

    Raises:
        ValueError: a shape, device, step or argument that does not fit; `out` shares memory with an input.
        TypeError: a dtype that does not fit. RuntimeError: the named backend is not available.
        NotImplementedError: a named kernel backend where a gradient is required.
        A step tensor on a GPU, or in a compiled graph, is not checked here.
    """
    _check(sample, predictions, coefficients, mask, background, noise, out)
    step = _checked_step(step, coefficients)
    inputs = [sample, *predictions, coefficients, *(x for x in (background, noise, mask) if x is not None)]
    if out is not None:
        _check_out(out, inputs)
    lacking = ["gradients"] if torch.is_grad_enabled() and any(x.requires_grad for x in inputs) else []
    name = backends.choose(_OP, backend, sample.device, sample.dtype, lacking, "sample")
    if name == "reference":
        result = reference.step_blend(
            sample, predictions, coefficients, step, mask=mask, background=background, noise=noise
        )
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty_like(sample, memory_format=torch.contiguous_format)
    op = torch.ops.lr_kernels.step_blend_cpu
    if name == "triton":
        from . import triton  # noqa: F401  (registers the Triton implementations)

        op = torch.ops.lr_kernels.step_blend_triton
    op(
        _dense_rows(sample),
        [_dense_rows(x) for x in predictions],
        coefficients.contiguous(),
        _step_tensor(step, sample.device),
        None if mask is None else mask.float().contiguous(),
        None if background is None else _dense_rows(background),
        None if noise is None else _dense_rows(noise),
        out,
    )
    return out


def step_coefficients(
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    *,
    final_alpha_cumprod: float | Tensor,
    guidance_scale: float | Sequence[float] | Tensor,
    prediction_type: str = "epsilon",
    eta: float = 0.0,
    blend_weights: Sequence[float] | Tensor | None = None,
    keep_background: str = "latents",
) -> Tensor:
    """The table of `step_blend` for DDIM with classifier-free guidance and, where asked, a blend of two models.

    With ᾱ the level of a step, ᾱ' that of the next timestep (`final_alpha_cumprod` after the last), and
    σ = η·√((1 - ᾱ')/(1 - ᾱ)·(1 - ᾱ/ᾱ')), the update is a·sample + e·prediction + σ·noise:

        epsilon:       a = √(ᾱ'/ᾱ),                           e = √(1 - ᾱ' - σ²) - √(ᾱ'·(1 - ᾱ)/ᾱ)
        v_prediction:  a = √(ᾱ'·ᾱ) + √((1 - ᾱ' - σ²)(1 - ᾱ)),   e = √((1 - ᾱ' - σ²)·ᾱ) - √(ᾱ'·(1 - ᾱ))

    The prediction is (1 - g)·unconditional + g·conditional, and (1 - w)·vanilla + w·personal of those.
    J. Song et al., arXiv 2010.02502, equations 12 and 16; the blend of models: stage 1 of arXiv 2407.09779.

    Args:
        alphas_cumprod: (T,) the schedule's ᾱ, in (0, 1]; v_prediction also takes 0.
        timesteps: (steps,) integers in [0, T), as the sampler visits them: ᾱ must not fall.
        final_alpha_cumprod: ᾱ' of the last step.
        guidance_scale: g, one number or one per step.
        prediction_type: "epsilon" or "v_prediction".
        eta: η in [0, 1]; above 0 the call of step_blend needs noise.
        blend_weights: (steps,) w in [0, 1], see `blend_schedule`. None: predictions are (uncond, cond). Given: (vanilla
            uncond, vanilla cond, personal uncond, personal cond); at w = 0 and 1 the other model is not read.
        keep_background: what the background of step_blend holds. "latents": latents of the next step's noise level,
            copied (p = 1, q = 0). "clean": clean latents, noised here to that level (p = √ᾱ', q = √(1 - ᾱ')).

    Returns:
        fp32 (steps, 1, K + 4), K = 2 or 4, on the CPU, computed in float64.

    Raises:
        ValueError: a value outside its range, NaN included. TypeError: timesteps that are not integers.
    """
    op = "step_coefficients"
    if prediction_type not in PREDICTION_TYPES:
        fail(op, "prediction_type", "one of " + ", ".join(PREDICTION_TYPES), repr(prediction_type))
    if keep_background not in BACKGROUNDS:
        fail(op, "keep_background", "one of " + ", ".join(BACKGROUNDS), repr(keep_background))
    if not 0 <= eta <= 1:
        fail(op, "eta", "a number in [0, 1]", eta)
    now, after = _noise_levels(op, alphas_cumprod, timesteps, final_alpha_cumprod, prediction_type)
    steps = len(now)
    guidance = _per_step(op, "guidance_scale", guidance_scale, steps)
    if not guidance.isfinite().all():
        fail(op, "guidance_scale", "finite numbers", guidance_scale)
    # at ᾱ = 1 nothing is left to remove and 0/0 means 0
    variance = torch.where(now < 1, (1 - after) / (1 - now) * (1 - now / after), 0)
    sigma = eta * variance.sqrt()
    direction = (1 - after - sigma**2).clamp(min=0).sqrt()
    if prediction_type == "epsilon":
        a = (after / now).sqrt()
        e = direction - (after * (1 - now) / now).sqrt()
    else:
        a = (after * now).sqrt() + direction * (1 - now).sqrt()
        e = direction * now.sqrt() - (after * (1 - now)).sqrt()
    columns = [(1 - guidance) * e, guidance * e]
    if blend_weights is not None:
        w = _per_step(op, "blend_weights", blend_weights, steps)
        if not ((w >= 0) & (w <= 1)).all():
            fail(op, "blend_weights", "numbers in [0, 1]", w.tolist())
        columns = [(1 - w) * x for x in columns] + [w * x for x in columns]
    level = after if keep_background == "clean" else torch.ones_like(after)
    return torch.stack([*columns, a, sigma, level.sqrt(), (1 - level).sqrt()], dim=1)[:, None].float()


def blend_schedule(kind: str, steps: int, layout_steps: int, *, ramp_steps: int | None = None) -> Tensor:
    """Weight of the personal model at each step of step-blended denoising: 0 first, for the layout, then 1.

        w_i = r(min(1, (i - layout_steps + 1) / (ramp_steps + 1)))   for i >= layout_steps, else 0

    "hard" has no ramp: the switch of stage 1 of Layout-and-Retouch (arXiv 2407.09779), with layout_steps its λ1.
    "linear": r(u) = u. "cosine": r(u) = (1 - cos(πu)) / 2.

    Args:
        kind: "hard", "linear" or "cosine".
        steps: number of denoising steps. layout_steps: 0 to steps; how many use the vanilla model alone.
        ramp_steps: how many steps after those lie strictly between 0 and 1. Default: as many as layout_steps, at most
            the rest.

    Returns:
        fp32 (steps,) in [0, 1], for `step_coefficients(blend_weights=…)`.

    Raises:
        ValueError: an unknown kind, a count out of range, or ramp_steps with "hard".
    """
    op = "blend_schedule"
    if kind not in SCHEDULES:
        fail(op, "kind", "one of " + ", ".join(SCHEDULES), repr(kind))
    if steps < 1:
        fail(op, "steps", "at least 1", steps)
    if not 0 <= layout_steps <= steps:
        fail(op, "layout_steps", f"0 to {steps}", layout_steps)
    if ramp_steps is not None and not 0 <= ramp_steps <= steps - layout_steps:
        fail(op, "ramp_steps", f"0 to {steps - layout_steps}, the steps after layout_steps", ramp_steps)
    if kind == "hard":
        if ramp_steps:
            fail(op, "ramp_steps", "None for kind 'hard'", ramp_steps)
        ramp_steps = 0
    elif ramp_steps is None:
        ramp_steps = min(layout_steps, steps - layout_steps)
    ramp = ((torch.arange(steps, dtype=torch.float64) - layout_steps + 1) / (ramp_steps + 1)).clamp(0, 1)
    return (ramp if kind != "cosine" else (1 - (math.pi * ramp).cos()) / 2).float()


def _noise_levels(
    op: str,
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    final_alpha_cumprod: float | Tensor,
    prediction_type: str,
) -> tuple[Tensor, Tensor]:
    """float64 (steps,) each: ᾱ of every timestep and of the one after it."""
    alphas = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
    if alphas.dim() != 1:
        fail(op, "alphas_cumprod", "shape (T,)", tuple(alphas.shape))
    times = torch.as_tensor(timesteps).cpu()
    if times.is_floating_point() or times.dtype == torch.bool:
        fail(op, "timesteps", "an integer dtype", times.dtype, error=TypeError)
    if times.dim() != 1 or not len(times):
        fail(op, "timesteps", "shape (steps,), at least one step", tuple(times.shape))
    if not ((times >= 0) & (times < len(alphas))).all():
        fail(op, "timesteps", f"integers in [0, {len(alphas)})", times.tolist())
    now = alphas[times.long()]
    after = torch.cat([now[1:], torch.as_tensor(final_alpha_cumprod, dtype=torch.float64).cpu().reshape(1)])
    levels = torch.cat([now, after[-1:]])
    if not ((levels >= 0) & (levels <= 1)).all():
        fail(op, "alphas_cumprod", "numbers in [0, 1]", levels.tolist())
    if not (after > 0).all() or (prediction_type == "epsilon" and not (now > 0).all()):
        fail(op, "alphas_cumprod", "numbers above 0", levels.tolist(), "only v_prediction starts from pure noise")
    if not (after >= now).all():
        fail(op, "timesteps", "an order in which alphas_cumprod does not fall", times.tolist())
    return now, after


def _per_step(op: str, name: str, x: float | Sequence[float] | Tensor, steps: int) -> Tensor:
    """A number or one per step -> float64 (steps,)."""
    x = torch.as_tensor(x, dtype=torch.float64).cpu()
    if tuple(x.shape) not in ((), (steps,)):
        fail(op, name, f"a number or shape ({steps},)", tuple(x.shape))
    return x.expand(steps)


def _dense_rows(x: Tensor) -> Tensor:
    """(B, C, height, width) with each row contiguous and the batch stride free."""
    if x.is_contiguous():
        return x
    _, _, height, width = x.shape
    return x if x.stride()[1:] == (height * width, width, 1) else x.contiguous()


def _step_tensor(step: int | Tensor, device: torch.device) -> Tensor:
    """int32 (1,)"""
    if isinstance(step, Tensor):
        return step.reshape(1).int() if step.dim() != 1 or step.dtype != torch.int32 else step
    return torch.full((1,), step, dtype=torch.int32, device=device)


def _checked_step(step: int | Tensor, coefficients: Tensor) -> int | Tensor:
    """The step, where it is known without waiting for a device: inside the schedule."""
    if isinstance(step, Tensor):
        if step.numel() != 1:
            fail(_OP, "step", "one element", f"shape {tuple(step.shape)}")
        if step.dtype not in (torch.int32, torch.int64):
            fail(_OP, "step", "int32 or int64", step.dtype, error=TypeError)
        if step.device != coefficients.device:
            fail(_OP, "step", str(coefficients.device), step.device)
        if step.device.type != "cpu" or torch.compiler.is_compiling():
            return step
    elif not isinstance(step, int):
        fail(_OP, "step", "an int or an integer tensor", type(step).__name__, error=TypeError)
    value = int(step)
    if not 0 <= value < coefficients.shape[0]:
        fail(_OP, "step", f"0 to {coefficients.shape[0] - 1}, the steps of coefficients", value)
    return step


def _check(
    sample: Tensor,
    predictions: Sequence[Tensor],
    coefficients: Tensor,
    mask: Tensor | None,
    background: Tensor | None,
    noise: Tensor | None,
    out: Tensor | None,
) -> None:
    """Shapes, dtypes and devices of every argument, in the order of the signature."""
    shape, dtype, device = sample.shape, sample.dtype, sample.device
    if len(shape) != 4:
        fail(_OP, "sample", "shape (batch, channels, height, width)", tuple(shape))
    if not dtype.is_floating_point:
        fail(_OP, "sample", "one of float32, float16, bfloat16, float64", dtype, error=TypeError)
    count = len(predictions)
    if not 1 <= count <= MAX_PREDICTIONS:
        fail(_OP, "predictions", f"1 to {MAX_PREDICTIONS}", count)
    for i, x in enumerate(predictions):
        if x.shape != shape or x.dtype != dtype or x.device != device:
            _fail_like(f"predictions[{i}]", x, sample)
    batch, _, height, width = shape
    table = coefficients.shape
    if len(table) != 3 or table[1] not in (1, batch) or table[2] != count + 4:
        fail(_OP, "coefficients", f"shape (steps, {batch} or 1, {count + 4})", tuple(table))
    if coefficients.dtype != torch.float32:
        fail(_OP, "coefficients", "float32", coefficients.dtype, error=TypeError)
    if coefficients.device != device:
        fail(_OP, "coefficients", str(device), coefficients.device)
    if (mask is None) != (background is None):
        given, missing = ("mask", "background") if background is None else ("background", "mask")
        fail(_OP, missing, f"a tensor, since {given} is given", None)
    if mask is not None:
        if mask.dim() != 3 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (height, width):
            fail(_OP, "mask", f"shape ({batch} or 1, {height}, {width})", tuple(mask.shape))
        if mask.dtype != torch.bool and not mask.is_floating_point():
            fail(_OP, "mask", "bool or a floating dtype", mask.dtype, error=TypeError)
        if mask.device != device:
            fail(_OP, "mask", str(device), mask.device)
    for name, optional in (("background", background), ("noise", noise), ("out", out)):
        if optional is not None and (optional.shape != shape or optional.dtype != dtype or optional.device != device):
            _fail_like(name, optional, sample)


def _fail_like(name: str, x: Tensor, sample: Tensor) -> NoReturn:
    if x.shape != sample.shape:
        fail(_OP, name, f"shape {tuple(sample.shape)}", tuple(x.shape))
    if x.dtype != sample.dtype:
        fail(_OP, name, str(sample.dtype), x.dtype, "cast all tensors to one dtype", TypeError)
    fail(_OP, name, str(sample.device), x.device)


def _check_out(out: Tensor, inputs: Sequence[Tensor]) -> None:
    """`out` can take the result, and writing it changes no input."""
    if not out.is_contiguous():
        fail(_OP, "out", "a contiguous tensor", f"strides {out.stride()}")
    if out.requires_grad and torch.is_grad_enabled():
        fail(_OP, "out", "a tensor that requires no gradient", "one that does")
    if torch.compiler.is_compiling() or out.numel() == 0:
        return  # a traced tensor has no address
    start, end = _extent(out)
    for x in inputs:
        first, last = _extent(x)
        if first < end and start < last:
            fail(_OP, "out", "memory of its own", "memory that an input shares", "pass another tensor")


def _extent(x: Tensor) -> tuple[int, int]:
    """First address of x and the address after its last element."""
    start = x.data_ptr()
    if x.is_contiguous():
        return start, start + x.nbytes
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1
    return start, start + reach * x.element_size()
