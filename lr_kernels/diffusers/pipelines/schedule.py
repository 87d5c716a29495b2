"""From a diffusers scheduler to the coefficient tables of step_blend, and the walk along them."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from ...denoising.coefficients import (
    PREDICTION_TYPES,
    SCHEDULES,
    blend_schedule,
    sigma_coefficients,
    signal_and_noise,
    step_coefficients,
)
from ...denoising.step_blend import step_blend
from ...runtime.checks import check_choice, check_integer, check_number, fail
from ...runtime.schemas import COLUMNS

_OP = "LayoutRetouch"
DEFAULT_SWITCH = 0.3
"""The default of layout_steps and retouch_start as a share of the steps. With 6 of 20, layouts stay and identity comes
back."""

Blend = str | Callable[[int], float] | Sequence[float] | Tensor

_REQUIRED: dict[type, dict[str, tuple]] = {
    DDIMScheduler: {"clip_sample": (False,), "thresholding": (False,)},
    EulerDiscreteScheduler: {"timestep_type": ("discrete",)},
    DPMSolverMultistepScheduler: {
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "thresholding": (False,),
        "use_flow_sigmas": (False,),
        "variance_type": (None,),
    },
}
"""The schedulers whose step is a row of a table, and what their configurations must say for it."""


@dataclass(frozen=True, eq=False)
class Solver:
    """How a diffusers scheduler walks from noise to an image, as tables of step_blend: of `solver` or `solver_of`."""

    timesteps: Tensor
    """(steps,) the timesteps that the UNet gets; floating numbers for Euler"""
    alphas: Tensor
    """float64 (steps + 1,) on the CPU: latents before step i are alphas[i]·x0 + sigmas[i]·noise; the last is the level
    of the result"""
    sigmas: Tensor
    """float64 (steps + 1,) on the CPU, see `alphas`"""
    input_scales: tuple[float, ...]
    """(steps,): the UNet's input before step i is input_scales[i]·latents"""
    multistep: bool
    """whether a step also needs the prediction of the clean latents of the step before"""
    prediction_type: str
    """what the models predict, one of `PREDICTION_TYPES`"""
    stochastic: bool
    """whether eta may be above 0"""
    coefficients: Callable[..., Tensor]
    """`step_coefficients` or `sigma_coefficients` of the levels, to be told guidance_scale, blend_weights and eta"""

    @property
    def steps(self) -> int:
        """How many the scheduler takes."""
        return len(self.timesteps)

    @property
    def signals(self) -> list[float]:
        """(steps + 1) how much of the latents is signal, α/√(α² + σ²), whatever scale a scheduler keeps them at."""
        return (self.alphas / (self.alphas**2 + self.sigmas**2).sqrt()).tolist()

    @property
    def walk(self) -> tuple:
        """What must be equal in two runs for one to use the latents of the other."""
        levels = (tuple(x.tolist()) for x in (self.timesteps, self.alphas, self.sigmas))
        return (self.prediction_type, *levels)

    def table(self, *, guidance_scale: float, eta: float = 0.0, weights: Tensor | None = None) -> Tensor:
        """The table for (unconditional, conditional) predictions, with weights (steps,) those of two models.

        Returns:
            fp32 (steps, 1, K + 9) on the device of `timesteps`.

        Raises:
            NotImplementedError: an eta that is not 0, where the scheduler adds no noise.
            ValueError: see `step_coefficients`, `sigma_coefficients`.
        """
        keywords = {"eta": eta} if self.stochastic else {}
        if eta != 0 and not self.stochastic:
            fail(_OP, "eta", "0 for this scheduler", eta, "DDIMScheduler takes another one", NotImplementedError)
        table = self.coefficients(guidance_scale=guidance_scale, blend_weights=weights, **keywords)
        return table.to(self.timesteps.device)


class Stepper:
    """Takes latents through one run of a solver, a call of step_blend for each step.

    A multistep solver has no history in the first step that is taken, whichever it is: that step is of first order, as
    those of diffusers are. Histories are the predictions of all models together.
    """

    def __init__(self, solver: Solver, table: Tensor, *, backend: str = "auto"):
        self.table, self._multistep, self._backend = table, solver.multistep, backend
        self._history: Tensor | None = None  # the clean latents that the step before predicted
        self._spare: Tensor | None = None  # memory for the clean latents that this step predicts

    def step(
        self,
        i: int,
        latents: Tensor,
        predictions: Sequence[Tensor],
        *,
        mask: Tensor | None = None,
        background: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Latents (n, C, h, w) before step i -> those after it. The other arguments are those of `step_blend`."""
        table, clean = self.table, None
        if self._multistep:
            if self._history is None:
                table = _first_order(table, i)
            if self._spare is None:
                self._spare = torch.empty_like(latents, memory_format=torch.contiguous_format)
            clean = self._spare
        latents = step_blend(
            latents,
            predictions,
            table,
            i,
            mask=mask,
            background=background,
            noise=noise,
            history=self._history,
            history_out=clean,
            backend=self._backend,
        )
        self._history, self._spare = clean, self._history
        return latents


def solver(
    scheduler: Any,
    num_inference_steps: int,
    device: torch.device | str,
    *,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Solver:
    """Set the timesteps of a scheduler and say how it walks along them.

    Args:
        timesteps, sigmas: in place of a number of steps, as the stock pipelines take them.

    Raises:
        NotImplementedError: see `solver_of`. ValueError: timesteps or sigmas that the scheduler does not take.
    """
    check_scheduler(scheduler)
    for name, x in (("timesteps", timesteps), ("sigmas", sigmas)):
        if x is None:
            continue
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            hint = "pass num_inference_steps, or use an EulerDiscreteScheduler"
            fail(_OP, name, f"None, since {type(scheduler).__name__} takes none", type(x).__name__, hint)
        scheduler.set_timesteps(**{name: x}, device=device)
        return solver_of(scheduler)
    if num_inference_steps > scheduler.config.num_train_timesteps:
        most = scheduler.config.num_train_timesteps
        fail(_OP, "num_inference_steps", f"at most {most}, as many as the model was trained on", num_inference_steps)
    scheduler.set_timesteps(num_inference_steps, device=device)
    result = solver_of(scheduler)
    if result.steps != num_inference_steps:
        spacing = scheduler.config.timestep_spacing
        _refuse("num_inference_steps", f"a number of steps that {spacing!r} spacing makes", num_inference_steps)
    return result


def solver_of(scheduler: Solver | SchedulerMixin) -> Solver:
    """The solver of a scheduler whose timesteps are set; a solver is returned as it is.

    Raises:
        NotImplementedError: a scheduler, a configuration of it or a list of timesteps for which a step is no row of a
            table.
    """
    if isinstance(scheduler, Solver):
        return scheduler
    check_scheduler(scheduler)
    if scheduler.num_inference_steps is None:
        fail(_OP, "scheduler", "one whose timesteps are set", "none", "call set_timesteps first")
    times, last = scheduler.timesteps, scheduler.config.num_train_timesteps - 1
    if not ((times >= 0) & (times <= last)).all():
        hint = f"try another number of steps or timestep_spacing than {scheduler.config.timestep_spacing!r}"
        _refuse("scheduler.timesteps", f"0 to {last}", f"{times.min().item():g} to {times.max().item():g}", hint)
    return _by_timesteps(scheduler) if isinstance(scheduler, DDIMScheduler) else _by_sigmas(scheduler)


def _by_timesteps(scheduler: DDIMScheduler) -> Solver:
    """The solver of DDIM. A step goes to t - T // steps, which is the next timestep only where the spacing is even."""
    config, times = scheduler.config, scheduler.timesteps.cpu()
    following = times - config.num_train_timesteps // scheduler.num_inference_steps
    levels = scheduler.alphas_cumprod.cpu().double()
    final = torch.as_tensor(scheduler.final_alpha_cumprod).cpu().double()
    now, result = levels[times], final if following[-1] < 0 else levels[following[-1]]
    if config.prediction_type == "epsilon" and now[0] == 0:
        _refuse("scheduler.prediction_type", "v_prediction, since timesteps start at pure noise", "epsilon")
    now = torch.cat([now, result.reshape(1)])
    return Solver(
        timesteps=scheduler.timesteps,
        alphas=now.sqrt(),
        sigmas=(1 - now).sqrt(),
        input_scales=(1.0,) * len(times),
        multistep=False,
        prediction_type=config.prediction_type,
        stochastic=True,
        coefficients=partial(
            step_coefficients,
            levels,
            times,
            next_timesteps=following,
            final_alpha_cumprod=final,
            prediction_type=config.prediction_type,
        ),
    )


def _by_sigmas(scheduler: EulerDiscreteScheduler | DPMSolverMultistepScheduler) -> Solver:
    """The solver of Euler and DPM-Solver++ 2M, on whatever list of σ the scheduler has made."""
    config, steps = scheduler.config, len(scheduler.timesteps)
    sigmas = scheduler.sigmas[: steps + 1].cpu().double()  # Euler's log_linear interpolation makes one too many
    keywords = {"solver": "euler", "prediction_type": config.prediction_type}
    multistep = isinstance(scheduler, DPMSolverMultistepScheduler)
    if multistep:
        few = config.lower_order_final and steps < 15  # the number at which diffusers draws the line
        keywords.update(solver="dpmpp_2m", euler_at_final=config.euler_at_final or few)
    alphas, noises = signal_and_noise(sigmas, keywords["solver"], config.prediction_type)
    return Solver(
        timesteps=scheduler.timesteps,
        alphas=alphas,
        sigmas=noises,
        input_scales=(1.0,) * steps if multistep else tuple((1 / (1 + sigmas[:-1] ** 2).sqrt()).tolist()),
        multistep=multistep,
        prediction_type=config.prediction_type,
        stochastic=False,
        coefficients=partial(sigma_coefficients, sigmas, **keywords),
    )


def _first_order(table: Tensor, i: int) -> Tensor:
    """The table with a row i that needs no history: it takes the prediction of its own step, c·sample + d·G, for it."""
    table = table.clone()
    first = table.shape[2] - len(COLUMNS)
    a, e, h, c, d = (first + COLUMNS.index(name) for name in ("a", "e", "h", "c", "d"))
    row = table[i].double()
    table[i, :, a] = (row[:, a] + row[:, h] * row[:, c]).float()
    table[i, :, e] = (row[:, e] + row[:, h] * row[:, d]).float()
    table[i, :, h] = 0
    return table


def check_scheduler(scheduler: Any) -> None:
    """Refuse, with NotImplementedError, every scheduler whose step is no row of a table of step_blend."""
    if type(scheduler) not in _REQUIRED:
        names = ", ".join(kind.__name__ for kind in _REQUIRED)
        hint = "use DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)"
        _refuse("scheduler", f"one of {names}", type(scheduler).__name__, hint)
    for name, allowed in {**_REQUIRED[type(scheduler)], "prediction_type": PREDICTION_TYPES}.items():
        got = scheduler.config[name]
        if got not in allowed:
            expected = ("one of " if len(allowed) > 1 else "") + ", ".join(map(str, allowed))
            clips = name in ("clip_sample", "thresholding")
            hint = "a step that clips is not linear in the predictions" if clips else ""
            _refuse(f"scheduler.{name}", expected, got, hint)


def _refuse(argument: str, expected: str, got: object, hint: str = "") -> NoReturn:
    fail(_OP, argument, expected, got, hint, NotImplementedError)


def ddim_table(
    scheduler: DDIMScheduler,
    *,
    guidance_scale: float,
    eta: float = 0.0,
    weights: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The table of `Solver.table` for a `DDIMScheduler` whose timesteps are set, on `device`."""
    if not isinstance(scheduler, DDIMScheduler):
        _refuse("scheduler", "a DDIMScheduler", type(scheduler).__name__)
    return solver_of(scheduler).table(guidance_scale=guidance_scale, eta=eta, weights=weights).to(device)


def blend_weights(blend: Blend, layout_steps: int, steps: int) -> Tensor:
    """Weight of the personalized model at each step: fp32 (steps,) in [0, 1].

    Args:
        blend: "hard", "linear" or "cosine", see `blend_schedule`; or step -> weight; or one weight per step, where
            `layout_steps` is not used.

    Raises:
        ValueError: a weight that is NaN or outside [0, 1], layout_steps outside 0 to steps, a wrong number of weights.
    """
    if isinstance(blend, str):
        check_choice(_OP, "layout_blend", blend, SCHEDULES)
        return blend_schedule(blend, steps, layout_steps)
    if not callable(blend) and not isinstance(blend, Iterable):
        fail(_OP, "layout_blend", f"one of {', '.join(SCHEDULES)}, a function or {steps} weights", repr(blend))
    weights = [blend(i) for i in range(steps)] if callable(blend) else list(blend)
    weights = [w.reshape(()) if isinstance(w, Tensor) and w.numel() == 1 else w for w in weights]
    if len(weights) != steps:
        fail(_OP, "layout_blend", f"{steps} weights, one per step", len(weights))
    expected = "a weight in [0, 1]"
    weights = [check_number(_OP, f"layout_blend[{i}]", w, expected, 0, 1) for i, w in enumerate(weights)]
    return torch.tensor(weights, dtype=torch.float32)


def step_in_schedule(name: str, step: int | None, default: int, lowest: int, highest: int) -> int:
    """`step`, of any integer type, or the default for None; inside [lowest, highest]."""
    value, hint = default if step is None else step, "a number of steps, not a share of them"
    return check_integer(_OP, name, value, lowest, f"{lowest} to {highest}", highest, hint)
