"""The coefficient tables of step_blend: guidance, blend of models and update of DDIM, Euler and DPM-Solver++."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.checks import check_choice, check_integer, check_memory, check_number, fail
from ..runtime.schemas import COLUMNS
from ..runtime.tensors import resolved

PREDICTION_TYPES = ("epsilon", "v_prediction")
SIGMA_PREDICTION_TYPES = (*PREDICTION_TYPES, "flow")
SOLVERS = ("euler", "dpmpp_2m")
BACKGROUNDS = ("latents", "clean")
SCHEDULES = ("hard", "linear", "cosine")

_ROUNDING = 1e-6
"""The relative amount by which a σ may rise. diffusers computes the last σ of some lists in another way than the
others, so that it rises by rounding."""

PerStep = float | Sequence[float] | Tensor
"""One number, or one per step."""


def step_coefficients(
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    *,
    final_alpha_cumprod: float | Tensor,
    guidance_scale: PerStep | None,
    prediction_type: str = "epsilon",
    next_timesteps: Tensor | Sequence[int] | None = None,
    eta: float = 0.0,
    blend_weights: Sequence[float] | Tensor | None = None,
    pag_scale: PerStep | None = None,
    keep_background: str = "latents",
) -> Tensor:
    """The table of `step_blend` for DDIM, with guidance and, where asked, a blend of two models.

    With ᾱ the level of a step, ᾱ' the one it goes to, α = √ᾱ and s = η·√((1 - ᾱ')/(1 - ᾱ)·(1 - ᾱ/ᾱ')), the update is

        next = √ᾱ'·x0 + √(1 - ᾱ' - s²)·(sample - α·x0)/√(1 - ᾱ) + s·noise
        epsilon: x0 = (sample - √(1 - ᾱ)·G)/α        v_prediction: x0 = α·sample - √(1 - ᾱ)·G

    (J. Song et al., arXiv 2010.02502, equations 12 and 16). G is one model's guided prediction, or
    (1 - w)·vanilla + w·personal of two (stage 1 of arXiv 2407.09779), each with guidance g (arXiv 2207.12598) and
    perturbed-attention guidance s_pag (arXiv 2403.17377):

        unconditional + g·(conditional - unconditional) + s_pag·(conditional - perturbed)

    Args:
        alphas_cumprod: (T,) the schedule's ᾱ, in (0, 1]; v_prediction also takes 0.
        timesteps: (steps,) integers in [0, T), as the sampler visits them: ᾱ must not fall.
        final_alpha_cumprod: ᾱ' of the last step, in (0, 1].
        next_timesteps: (steps,) integers below T: where each step goes, below 0 to `final_alpha_cumprod`. Default: as
            `DDIMScheduler.step`. That is to the next timestep in a list of even spacing; in a whole list of "linspace"
            or "trailing" it is to timesteps - T // steps. Of another list it cannot be known.
        guidance_scale: g, one number or one per step. None: there is no unconditional prediction.
        prediction_type: "epsilon" or "v_prediction".
        eta: η in [0, 1]; above 0 the call of step_blend needs noise.
        blend_weights: (steps,) w in [0, 1], see `blend_schedule`; at 0 and 1 the other model is not read. None: one
            model.
        pag_scale: s_pag, one number or one per step. None: there is no perturbed prediction.
        keep_background: what the background of step_blend holds. "latents": latents of the next step's noise level,
            copied (p = 1, q = 0). "clean": clean latents, noised here to that level (p = √ᾱ', q = √(1 - ᾱ')).

    Returns:
        fp32 (steps, 1, K + 9) on the CPU, computed in float64; the columns: `reference.step_blend`. The K predictions
        are (unconditional, conditional, perturbed), without those that are not there; with blend_weights, those of the
        vanilla model and then those of the personal one. Tables of the rows of a batch join along dimension 1.

    Raises:
        ValueError: a value outside its range, NaN included; unevenly spaced timesteps of another kind without
            next_timesteps. TypeError: timesteps that are not integers.
    """
    op = "step_coefficients"
    check_choice(op, "prediction_type", prediction_type, PREDICTION_TYPES)
    check_choice(op, "keep_background", keep_background, BACKGROUNDS)
    eta = check_number(op, "eta", eta, "a number in [0, 1]", 0, 1)
    now, after = _noise_levels(op, alphas_cumprod, timesteps, next_timesteps, final_alpha_cumprod, prediction_type)
    # at ᾱ = 1 nothing is left to remove and 0/0 means 0
    variance = torch.where(now < 1, (1 - after) / (1 - now) * (1 - now / after), 0)
    return _table(
        op,
        "alphas_cumprod",
        _prediction_weights(op, len(now), guidance_scale, blend_weights, pag_scale),
        (now.sqrt(), (1 - now).sqrt()),
        (after.sqrt(), (1 - after).sqrt()),
        prediction_type,
        keep_background,
        noise=eta * variance.sqrt(),
    )


def sigma_coefficients(
    sigmas: Tensor | Sequence[float],
    *,
    solver: str,
    guidance_scale: PerStep | None,
    prediction_type: str = "epsilon",
    blend_weights: Sequence[float] | Tensor | None = None,
    pag_scale: PerStep | None = None,
    keep_background: str = "latents",
    euler_at_final: bool = False,
) -> Tensor:
    """The table of `step_blend` for solvers on a list of σ: Euler, flow-match Euler and DPM-Solver++ 2M.

    Latents are α·x0 + σ_x·ε, and a step goes from (α, σ_x) at σ to (α', σ_x') at the next σ':

        next = σ_x'/σ_x·sample + (α' - α·σ_x'/σ_x)·(x0 + κ·(x0 - history))

    | solver   | prediction_type       | α, σ_x             | κ            | diffusers                        |
    |----------|-----------------------|--------------------|--------------|----------------------------------|
    | euler    | epsilon, v_prediction | 1, σ               | 0            | EulerDiscreteScheduler           |
    | euler    | flow                  | 1 - σ, σ           | 0            | FlowMatchEulerDiscreteScheduler  |
    | dpmpp_2m | epsilon, v_prediction | (1, σ)/√(1 + σ²)   | Δλ/(2·Δλ_-1) | DPMSolverMultistepScheduler      |
    | dpmpp_2m | flow                  | 1 - σ, σ           | Δλ/(2·Δλ_-1) | the same with use_flow_sigmas    |

    with λ = log(α/σ_x) and Δλ its growth in this step, Δλ_-1 in the step before. κ is 0 in the first step, where σ' is
    0, and in the last step with euler_at_final. (T. Karras et al., arXiv 2206.00364; C. Lu et al., arXiv 2211.01095,
    algorithm 2.) For "dpmpp_2m" pass step_blend a history_out in every step and the last one as history; use two
    tensors in turn. "euler" with epsilon or v_prediction scales the model's input: `model_input` of step_blend is
    next/√(1 + σ'²); the first input, sample/√(1 + σ²), is the caller's.

    Args:
        sigmas: (steps + 1,), never rising but by rounding, above 0 but for the last, which may be 0; at most 1 for
            "flow". The attribute `sigmas` of the diffusers scheduler.
        solver: "euler" or "dpmpp_2m".
        guidance_scale: g, one number or one per step. None: there is no unconditional prediction.
        prediction_type: "epsilon", "v_prediction" or "flow" (noise minus clean latents).
        blend_weights, pag_scale: as in `step_coefficients`.
        keep_background: what the background of step_blend holds. "latents": latents of the next step's noise level,
            copied (p = 1, q = 0). "clean": clean latents, noised here to that level (p = α', q = σ_x').
        euler_at_final: whether the last step of "dpmpp_2m" is of first order although its σ' is not 0.

    Returns:
        fp32 (steps, 1, K + 9), as `step_coefficients`.

    Raises:
        ValueError: a value outside its range, NaN included.
    """
    op = "sigma_coefficients"
    check_choice(op, "solver", solver, SOLVERS)
    check_choice(op, "prediction_type", prediction_type, SIGMA_PREDICTION_TYPES)
    check_choice(op, "keep_background", keep_background, BACKGROUNDS)
    _check_size(op, "sigmas", sigmas)
    levels = resolved(op, "sigmas", torch.as_tensor(sigmas, dtype=torch.float64).cpu())
    if levels.dim() != 1 or len(levels) < 2:
        fail(op, "sigmas", "shape (steps + 1,), at least one step", tuple(levels.shape))
    limit = 1.0 if prediction_type == "flow" else math.inf
    if not ((levels[:-1] > 0) & (levels[:-1] <= limit) & levels[:-1].isfinite()).all() or not levels[-1] >= 0:
        expected = "numbers above 0" + (" and at most 1" if limit == 1 else "") + ", the last at least 0"
        fail(op, "sigmas", expected, levels.tolist())
    if not (levels[1:] <= levels[:-1] * (1 + _ROUNDING)).all():
        fail(op, "sigmas", "numbers that do not rise", levels.tolist())
    alpha, sigma = signal_and_noise(levels, solver, prediction_type)
    kappa = torch.zeros_like(levels[1:])
    if solver == "dpmpp_2m":
        growth = (alpha / sigma).log().diff()
        kappa[1:] = growth[1:] / (2 * growth[:-1])
        if euler_at_final or levels[-1] == 0:
            kappa[-1] = 0
    return _table(
        op,
        "sigmas",
        _prediction_weights(op, len(kappa), guidance_scale, blend_weights, pag_scale),
        (alpha[:-1], sigma[:-1]),
        (alpha[1:], sigma[1:]),
        prediction_type,
        keep_background,
        kappa=kappa,
        scale=1.0 if prediction_type == "flow" else 1 / (alpha**2 + sigma**2).sqrt()[1:],
    )


def signal_and_noise(sigmas: Tensor, solver: str, prediction_type: str) -> tuple[Tensor, Tensor]:
    """α and σ_x of latents α·x0 + σ_x·ε at every σ, as the table of `sigma_coefficients` says."""
    if prediction_type == "flow":
        return 1 - sigmas, sigmas
    if solver == "euler":
        return torch.ones_like(sigmas), sigmas
    norm = (1 + sigmas**2).sqrt()
    return 1 / norm, sigmas / norm


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
        fp32 (steps,) in [0, 1], for blend_weights of the tables.

    Raises:
        ValueError: an unknown kind, a count out of range, or ramp_steps with "hard".
    """
    op = "blend_schedule"
    check_choice(op, "kind", kind, SCHEDULES)
    steps = check_integer(op, "steps", steps, 1, "at least 1")
    layout_steps = check_integer(op, "layout_steps", layout_steps, 0, f"0 to {steps}", steps)
    if ramp_steps is not None:
        rest = steps - layout_steps
        expected = f"0 to {rest}, the steps after layout_steps"
        ramp_steps = check_integer(op, "ramp_steps", ramp_steps, 0, expected, rest)
    check_memory(op, "steps", 40 * steps, torch.device("cpu"))
    if kind == "hard":
        if ramp_steps:
            fail(op, "ramp_steps", "None for kind 'hard'", ramp_steps)
        ramp_steps = 0
    elif ramp_steps is None:
        ramp_steps = min(layout_steps, steps - layout_steps)
    ramp = ((torch.arange(steps, dtype=torch.float64) - layout_steps + 1) / (ramp_steps + 1)).clamp(0, 1)
    return (ramp if kind != "cosine" else (1 - (math.pi * ramp).cos()) / 2).float()


def pack_columns(weights: Tensor, **columns: Tensor | float) -> Tensor:
    """(steps, K) weights of the predictions and COLUMNS by name, (steps,) or a number each -> fp32 (steps, 1, K + 9).

    A column that is not named is 0.
    """
    values = (torch.as_tensor(columns.get(name, 0.0), dtype=weights.dtype) for name in COLUMNS)
    return torch.cat([weights, *(x.expand(len(weights))[:, None] for x in values)], 1)[:, None].float()


def _table(
    op: str,
    levels: str,
    weights: Tensor,
    now: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    prediction_type: str,
    keep_background: str,
    *,
    noise: Tensor | float = 0.0,
    kappa: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """The table of all solvers. With latents α·x0 + σ·ε and x0 = c·sample + d·G,

        next = r·sample + (α' - r·α)·(x0 + κ·(x0 - history)) + s·noise,   r = √(σ'² - s²)/σ

    now: (α, σ) and after: (α', σ'), which come from the argument `levels`; noise (s), kappa and scale: (steps,) each.
    """
    (alpha, sigma), (alpha_after, sigma_after) = now, after
    if prediction_type == "epsilon":
        c, d = 1 / alpha, -sigma / alpha
    elif prediction_type == "v_prediction":
        norm = (alpha**2 + sigma**2).sqrt()
        c, d = alpha / norm**2, -sigma / norm
    else:
        c, d = torch.ones_like(alpha), -sigma
    remaining = torch.where(sigma > 0, (sigma_after**2 - noise**2).clamp(min=0).sqrt() / sigma, 0)
    gain = alpha_after - remaining * alpha
    clean = keep_background == "clean"
    table = pack_columns(
        weights,
        a=remaining + gain * (1 + kappa) * c,
        e=gain * (1 + kappa) * d,
        sigma=noise,
        h=-gain * kappa,
        p=alpha_after if clean else 1.0,
        q=sigma_after if clean else 0.0,
        c=c,
        d=d,
        s=scale,
    )
    if not table.isfinite().all():
        fail(op, levels, "levels whose coefficients are finite in float32", (sigma / alpha).tolist())
    return table


def _prediction_weights(
    op: str,
    steps: int,
    guidance_scale: PerStep | None,
    blend_weights: Sequence[float] | Tensor | None,
    pag_scale: PerStep | None,
) -> Tensor:
    """float64 (steps, K): G = Σ g_k·prediction_k."""
    conditional, columns = torch.ones(steps, dtype=torch.float64), []
    if guidance_scale is not None:
        conditional = _finite_per_step(op, "guidance_scale", guidance_scale, steps)
        columns.append(1 - conditional)
    if pag_scale is None:
        columns.append(conditional)
    else:
        perturbed = _finite_per_step(op, "pag_scale", pag_scale, steps)
        columns += [conditional + perturbed, -perturbed]
    if blend_weights is not None:
        w = _per_step(op, "blend_weights", blend_weights, steps)
        if not ((w >= 0) & (w <= 1)).all():
            fail(op, "blend_weights", "numbers in [0, 1]", w.tolist())
        columns = [(1 - w) * x for x in columns] + [w * x for x in columns]
    weights = torch.stack(columns, 1)
    if not weights.float().isfinite().all():
        fail(op, "pag_scale", "a sum with guidance_scale that is finite in float32", pag_scale)
    return weights


def _noise_levels(
    op: str,
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    next_timesteps: Tensor | Sequence[int] | None,
    final_alpha_cumprod: float | Tensor,
    prediction_type: str,
) -> tuple[Tensor, Tensor]:
    """float64 (steps,) each: ᾱ of every timestep, and the one that its step goes to."""
    _check_size(op, "alphas_cumprod", alphas_cumprod)
    alphas = resolved(op, "alphas_cumprod", torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu())
    if alphas.dim() != 1:
        fail(op, "alphas_cumprod", "shape (T,)", tuple(alphas.shape))
    times = _integers(op, "timesteps", timesteps)
    if times.dim() != 1 or not len(times):
        fail(op, "timesteps", "shape (steps,), at least one step", tuple(times.shape))
    if not ((times >= 0) & (times < len(alphas))).all():
        fail(op, "timesteps", f"integers in [0, {len(alphas)})", times.tolist())
    now = alphas[times]
    if not ((now >= 0) & (now <= 1)).all():
        fail(op, "alphas_cumprod", "numbers in [0, 1]", now.tolist())
    if not (now[1:] > 0).all() or (prediction_type == "epsilon" and not now[0] > 0):
        fail(op, "alphas_cumprod", "numbers above 0", now.tolist(), "only v_prediction starts from pure noise")
    if not (now.diff() >= 0).all():
        fail(op, "timesteps", "an order in which alphas_cumprod does not fall", times.tolist())
    final = torch.as_tensor(final_alpha_cumprod, dtype=torch.float64).cpu()
    if final.numel() != 1 or not 0 < final <= 1:
        fail(op, "final_alpha_cumprod", "a number in (0, 1]", final.tolist())
    if final < now[-1]:
        fail(op, "final_alpha_cumprod", f"at least {now[-1].item()}, the level of the last timestep", final.item())
    if next_timesteps is None:
        following = _next_timesteps(op, times, len(alphas))
    else:
        following = _integers(op, "next_timesteps", next_timesteps)
    if following.shape != times.shape or not (following < len(alphas)).all():
        fail(op, "next_timesteps", f"{len(times)} integers below {len(alphas)}", following.tolist())
    after = torch.where(following < 0, final.reshape(1), alphas[following.clamp(min=0)])
    if not ((after >= now) & (after > 0) & (after <= 1)).all():
        fail(op, "next_timesteps", "levels in (0, 1] that are not below those of timesteps", after.tolist())
    return now, after


def _next_timesteps(op: str, times: Tensor, trained: int) -> Tensor:
    """Where the steps of `DDIMScheduler` go from timesteps (steps,) that it may have made; ValueError where that cannot
    be told."""
    steps, place = len(times), torch.arange(len(times), dtype=torch.float64)
    linspace = (trained - 1) * (1 - place / max(steps - 1, 1))
    trailing = trained * (1 - place / steps) - 1
    if any(((times - exact).abs() <= 0.5 + _ROUNDING).all() for exact in (linspace, trailing)):
        return times - trained // steps
    if len(times.diff().unique()) > 1:
        hint = "of a DDIMScheduler they are timesteps - num_train_timesteps // num_inference_steps"
        fail(op, "next_timesteps", "those of timesteps that are not evenly spaced", None, hint)
    return torch.cat([times[1:], times.new_full((1,), -1)])


def _check_size(op: str, name: str, x: Tensor | Sequence[float]) -> None:
    """Refuse a table beyond the memory: some twenty float64 columns while it is made."""
    check_memory(op, name, 160 * (x.numel() if isinstance(x, Tensor) else len(x)), torch.device("cpu"))


def _integers(op: str, name: str, x: Tensor | Sequence[int]) -> Tensor:
    _check_size(op, name, x)
    result = resolved(op, name, torch.as_tensor(x).cpu())
    if result.is_floating_point() or result.dtype == torch.bool:
        fail(op, name, "an integer dtype", result.dtype, error=TypeError)
    return result.long()


def _per_step(op: str, name: str, x: PerStep, steps: int) -> Tensor:
    """A number or one per step -> float64 (steps,)."""
    result = torch.as_tensor(x, dtype=torch.float64).cpu()
    if tuple(result.shape) not in ((), (steps,)):
        fail(op, name, f"a number or shape ({steps},)", tuple(result.shape))
    return result.expand(steps)


def _finite_per_step(op: str, name: str, x: PerStep, steps: int) -> Tensor:
    result = _per_step(op, name, x, steps)
    if not result.float().isfinite().all():
        fail(op, name, "finite float32 numbers", x)
    return result
