"""From a diffusers scheduler to the coefficient tables of step_blend."""

import math
from collections.abc import Callable, Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..checks import fail
from ..coefficients import PREDICTION_TYPES, blend_schedule, step_coefficients

_OP = "layout_retouch"
DEFAULT_SWITCH = 0.3
"""Share of the steps for layout_steps and retouch_start: with 6 of 20, layouts stay and identity comes back."""

Blend = str | Callable[[int], float] | Sequence[float] | Tensor


def check_scheduler(scheduler: object) -> None:
    """Refuse, with NotImplementedError, every scheduler whose step is not a linear DDIM update."""

    def refuse(argument: str, expected: str, got: object, hint: str = "") -> None:
        fail(_OP, argument, expected, got, hint, NotImplementedError)

    if not isinstance(scheduler, DDIMScheduler):
        hint = "use DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"
        refuse("scheduler", "a DDIMScheduler", type(scheduler).__name__, hint)
    for name in ("clip_sample", "thresholding"):
        if scheduler.config[name]:
            refuse(f"scheduler.{name}", "False", True, "a step that clips is not linear in the predictions")
    if scheduler.config.prediction_type not in PREDICTION_TYPES:
        refuse("scheduler.prediction_type", "one of " + ", ".join(PREDICTION_TYPES), scheduler.config.prediction_type)


def ddim_table(
    scheduler: DDIMScheduler,
    *,
    guidance_scale: float,
    eta: float = 0.0,
    weights: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """`step_coefficients` of a scheduler whose timesteps are set, for (uncond, cond) predictions of one or two models.

    A step goes to the next timestep of the list. `DDIMScheduler.step` goes to t - T // steps instead, which is the same
    wherever the spacing is even.
    """
    return step_coefficients(
        scheduler.alphas_cumprod,
        scheduler.timesteps,
        final_alpha_cumprod=scheduler.final_alpha_cumprod,
        guidance_scale=guidance_scale,
        prediction_type=scheduler.config.prediction_type,
        eta=eta,
        blend_weights=weights,
    ).to(device)


def blend_weights(blend: Blend, layout_steps: int, steps: int) -> Tensor:
    """Weight of the personalized model at each step: fp32 (steps,) in [0, 1].

    Args:
        blend: "hard", "linear" or "cosine", see `blend_schedule`; or step -> weight; or one weight per step, where
            `layout_steps` is not used.

    Raises:
        ValueError: a weight that is NaN or outside [0, 1], layout_steps outside 0 to steps, a wrong number of weights.
    """
    if isinstance(blend, str):
        return blend_schedule(blend, steps, layout_steps)
    weights = [float(w) for w in ([blend(i) for i in range(steps)] if callable(blend) else blend)]
    if len(weights) != steps:
        fail(_OP, "layout_blend", f"{steps} weights, one per step", len(weights))
    for i, w in enumerate(weights):
        if math.isnan(w) or not 0 <= w <= 1:
            fail(_OP, f"layout_blend[{i}]", "a weight in [0, 1]", w)
    return torch.tensor(weights)


def step_in_schedule(name: str, step: int | None, default: int, lowest: int, highest: int) -> int:
    """`step`, or the default for None, inside [lowest, highest]."""
    step = default if step is None else step
    if not isinstance(step, int) or not lowest <= step <= highest:
        fail(_OP, name, f"{lowest} to {highest}", step)
    return step
