"""The walks of diffusers schedulers by step_blend, latents of given images, and the layout stage's blend weights."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from test_coefficients import double_precision, guided

from lr_kernels.diffusers import blend_weights, ddim_table, invert, renoise
from lr_kernels.diffusers.pipelines.schedule import Stepper, solver, solver_of, step_in_schedule
from lr_kernels.testing import assert_matches

DDIM, EULER, DPM = DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler
GUIDANCE = 3.0
SHAPE = (2, 4, 6, 6)

EPSILON, V = {"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}
LINSPACE, LEADING, TRAILING = ({"timestep_spacing": x} for x in ("linspace", "leading", "trailing"))
ZERO_SNR, TO_SIGMA_MIN = {"rescale_betas_zero_snr": True}, {"final_sigmas_type": "sigma_min"}
KARRAS, EXPONENTIAL, LU = ({f"use_{x}": True} for x in ("karras_sigmas", "exponential_sigmas", "lu_lambdas"))
LOG_LINEAR = {"interpolation_type": "log_linear"}
ONE_ORDER, EULER_AT_FINAL = {"lower_order_final": False}, {"euler_at_final": True}

CONFIGURATIONS = [
    (DDIM, EPSILON | LINSPACE),
    (DDIM, EPSILON | LEADING | {"set_alpha_to_one": False}),
    (DDIM, EPSILON | LEADING | ZERO_SNR),
    (DDIM, EPSILON | TRAILING | {"beta_schedule": "squaredcos_cap_v2"}),
    (DDIM, V | LINSPACE | ZERO_SNR),
    (DDIM, V | LEADING),
    (DDIM, V | TRAILING | ZERO_SNR | {"set_alpha_to_one": False}),
    (EULER, EPSILON | LINSPACE),
    (EULER, EPSILON | LEADING | KARRAS | TO_SIGMA_MIN),
    (EULER, EPSILON | TRAILING | EXPONENTIAL),
    (EULER, EPSILON | LINSPACE | ZERO_SNR),
    (EULER, V | LINSPACE | KARRAS | {"sigma_min": 0.1, "sigma_max": 10.0}),
    (EULER, V | LEADING | LOG_LINEAR | TO_SIGMA_MIN),
    (EULER, V | TRAILING | ZERO_SNR),
    (EULER, V | TRAILING | EXPONENTIAL | ZERO_SNR | TO_SIGMA_MIN),
    (DPM, EPSILON | LINSPACE),
    (DPM, EPSILON | LEADING | KARRAS | TO_SIGMA_MIN),
    (DPM, EPSILON | TRAILING | EXPONENTIAL | TO_SIGMA_MIN | ONE_ORDER),
    (DPM, EPSILON | TRAILING | LU | EULER_AT_FINAL | TO_SIGMA_MIN),
    (DPM, EPSILON | LINSPACE | LU | ONE_ORDER),
    (DPM, EPSILON | LINSPACE | LU | TO_SIGMA_MIN | {"beta_schedule": "squaredcos_cap_v2"}),
    (DPM, EPSILON | LINSPACE | {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    (DPM, EPSILON | TRAILING | ZERO_SNR),
    (DPM, V | LINSPACE | TO_SIGMA_MIN),
    (DPM, V | LEADING | EULER_AT_FINAL | TO_SIGMA_MIN | ONE_ORDER),
    (DPM, V | TRAILING | ZERO_SNR),
    (DPM, V | TRAILING | KARRAS | ZERO_SNR | ONE_ORDER),
]


def words(configuration):
    kind, config = configuration
    return "-".join([kind.__name__, *(x if isinstance(x, str) else f"{name}={x}" for name, x in config.items())])


every_configuration = pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=words)


def scheduler_of(configuration, steps=None):
    """A scheduler on Stable Diffusion's noise levels."""
    kind, config = configuration
    base = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = kind(**base | ({"clip_sample": False} if kind is DDIM else {}) | config)
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def noise_of(seed, count=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPE, generator=g)


def predictions_of(i):
    """(unconditional, conditional) by the vanilla model and by the personalized one in step i, whatever the input."""
    return noise_of(i + 1, 4)


def stock_runs(scheduler, start, combine, first=0, **keywords):
    """[(model's input, next latents) of every step from `first` on] by the scheduler, in float32 and in float64.

    combine: (step, four predictions) -> what the scheduler is given.
    """

    def run(s, dtype):
        if hasattr(s, "set_begin_index"):
            s.set_begin_index(first)
        x, found = start.to(dtype), []
        extra = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in keywords.items()
        }
        for i in range(first, len(s.timesteps)):
            x_in = s.scale_model_input(x, s.timesteps[i])
            x = s.step(combine(i, predictions_of(i).to(dtype)), s.timesteps[i], x, return_dict=False, **extra)[0]
            found.append((x_in, x))
        return found

    precise = copy.deepcopy(scheduler)
    for name in {"alphas_cumprod", "final_alpha_cumprod", "sigmas"} & vars(scheduler).keys():
        setattr(precise, name, getattr(precise, name).double())
    low = run(copy.deepcopy(scheduler), torch.float32)
    with double_precision():
        return low, run(precise, torch.float64)


def check_run(scheduler, first=0, weights=None, eta=0.0):
    """Compare a run of the solver from step `first` on with the scheduler's; with weights, one of two models."""
    way, models = solver_of(scheduler), 1 if weights is None else 2
    level = (way.alphas[first] ** 2 + way.sigmas[first] ** 2).sqrt().item()
    start, noise = noise_of(0)[0] * level, noise_of(99)[0]
    extra = {"eta": eta, "variance_noise": noise} if eta else {}

    def combine(i, predictions):
        vanilla, personal = (guided(*predictions[k : k + 2], GUIDANCE) for k in (0, 2))
        return vanilla if weights is None else (1 - weights[i].item()) * vanilla + weights[i].item() * personal

    low, precise = stock_runs(scheduler, start, combine, first, **extra)
    stepper = Stepper(way, way.table(guidance_scale=GUIDANCE, eta=eta, weights=weights))
    x = start
    assert way.steps - first == len(low) == len(precise)
    for i, by_low, by_precise in zip(range(first, way.steps), low, precise):
        x_in = x * way.input_scales[i]
        x = stepper.step(i, x, predictions_of(i)[: 2 * models], noise=noise if eta else None)
        for what, *three in zip(("input", "latents"), (x_in, x), by_low, by_precise):
            assert_matches(*three, f"{what} of step {i}")


# ---- the steps of diffusers ----


@every_configuration
@pytest.mark.parametrize("steps", [7, 20, 50])
def test_runs_are_those_of_the_scheduler(configuration, steps):
    scheduler = scheduler_of(configuration, steps)
    check_run(scheduler)
    other = scheduler_of(configuration)
    way = solver(other, steps, "cpu")
    assert torch.equal(way.timesteps, scheduler.timesteps) and way.timesteps is other.timesteps
    assert way.steps == steps == len(way.alphas) - 1 == len(way.sigmas) - 1
    assert way.multistep == (configuration[0] is DPM)


@pytest.mark.parametrize(("steps", "timestep"), [(7, 0), (20, -1)])
def test_the_last_step_of_ddim_goes_to_the_level_of_the_result(steps, timestep):
    """From 142 to 142 - 1000 // 7, and from 49 to 49 - 1000 // 20, which is past the last level."""
    scheduler = scheduler_of((DDIM, TRAILING), steps)
    level = (scheduler.final_alpha_cumprod if timestep < 0 else scheduler.alphas_cumprod[timestep]).double()
    way = solver_of(scheduler)
    assert torch.equal(way.alphas[-1], level.sqrt()) and torch.equal(way.sigmas[-1], (1 - level).sqrt())


@pytest.mark.parametrize("steps", [1, 2, 14, 15])
def test_few_steps_of_dpm_solver_end_as_those_of_the_scheduler(steps):
    """Below 15 the last one is of first order."""
    check_run(scheduler_of((DPM, EPSILON | LINSPACE | TO_SIGMA_MIN), steps))


@every_configuration
@pytest.mark.parametrize("first", [1, 6, 19])
def test_runs_that_start_midway_are_those_of_the_scheduler(configuration, first):
    check_run(scheduler_of(configuration, 20), first=first)


@every_configuration
def test_blends_of_two_models_are_given_to_the_scheduler_as_one(configuration):
    weights = torch.tensor([0.0, 0.0, 0.25, 1.0, 0.5, 0.0, 1.0])
    check_run(scheduler_of(configuration, 7), weights=weights)


@every_configuration
@pytest.mark.parametrize("w", [0.0, 1.0])
@pytest.mark.fault(number=34)
def test_endpoints_are_the_single_model_bitwise(configuration, w):
    way = solver(scheduler_of(configuration), 7, "cpu")
    one = Stepper(way, way.table(guidance_scale=GUIDANCE))
    two = Stepper(way, way.table(guidance_scale=GUIDANCE, weights=torch.full((7,), w)))
    x = y = noise_of(0)[0]
    for i in range(7):
        predictions = predictions_of(i)
        used, unused = (predictions[2:], predictions[:2]) if w else (predictions[:2], predictions[2:])
        x = one.step(i, x, used.clone())
        unused.fill_(torch.nan)
        y = two.step(i, y, predictions)
        assert torch.equal(x, y)


@pytest.mark.parametrize("configuration", [x for x in CONFIGURATIONS if x[0] is DDIM], ids=words)
@pytest.mark.parametrize("eta", [0.4, 0.9])
@pytest.mark.parametrize("steps", [7, 20])
def test_noisy_runs_are_those_of_the_scheduler(configuration, eta, steps):
    """At 1 diffusers takes the root of 0, which from zero SNR it rounds to a negative number."""
    check_run(scheduler_of(configuration, steps), eta=eta)


@pytest.mark.parametrize("kind", [DDIM, EULER, DPM])
def test_backgrounds_are_kept_beside_the_history(kind):
    way = solver(scheduler_of((kind, EPSILON)), 7, "cpu")
    table = way.table(guidance_scale=GUIDANCE)
    mask, background = torch.zeros(1, *SHAPE[2:], dtype=torch.bool), noise_of(50)[0]
    mask[:, :3] = True
    masked, free = Stepper(way, table), Stepper(way, table)
    x = y = noise_of(0)[0]
    for i in range(7):
        x = masked.step(i, x, predictions_of(i)[:2], mask=mask, background=background)
        y = free.step(i, y, predictions_of(i)[:2])
        assert torch.equal(x[:, :, :3], y[:, :, :3]) and torch.equal(x[:, :, 3:], background[:, :, 3:])


def test_ddim_table_is_that_of_the_solver():
    scheduler = scheduler_of((DDIM, EPSILON), 7)
    keywords = {"guidance_scale": GUIDANCE, "eta": 0.5, "weights": torch.linspace(0, 1, 7)}
    assert torch.equal(ddim_table(scheduler, **keywords), solver_of(scheduler).table(**keywords))
    with pytest.raises(NotImplementedError, match="scheduler: expected a DDIMScheduler, got EulerDiscreteScheduler"):
        ddim_table(scheduler_of((EULER, EPSILON), 7), guidance_scale=GUIDANCE)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (EulerAncestralDiscreteScheduler, {}, "scheduler: expected one of DDIMScheduler, EulerDiscreteScheduler, DPM"),
        (type("Other", (DDIM,), {}), {}, "scheduler: expected one of .*, got Other"),
        (DDIM, {"clip_sample": True}, "scheduler.clip_sample: expected False, got True; a step that clips"),
        (DDIM, {"thresholding": True}, "scheduler.thresholding: expected False, got True; a step that clips"),
        (DDIM, {"prediction_type": "sample"}, "scheduler.prediction_type: expected one of epsilon, v_prediction, got"),
        (EULER, {"prediction_type": "sample"}, "scheduler.prediction_type: expected one of epsilon, v_prediction, got"),
        (EULER, {"timestep_type": "continuous"}, "scheduler.timestep_type: expected discrete, got continuous"),
        (DPM, {"prediction_type": "flow_prediction"}, "scheduler.prediction_type: expected one of epsilon"),
        (DPM, {"algorithm_type": "sde-dpmsolver++"}, r"scheduler.algorithm_type: expected dpmsolver\+\+, got sde-"),
        (DPM, {"solver_order": 1}, "scheduler.solver_order: expected 2, got 1"),
        (DPM, {"solver_order": 3}, "scheduler.solver_order: expected 2, got 3"),
        (DPM, {"solver_type": "heun"}, "scheduler.solver_type: expected midpoint, got heun"),
        (DPM, {"thresholding": True}, "scheduler.thresholding: expected False, got True"),
        (DPM, {"use_flow_sigmas": True}, "scheduler.use_flow_sigmas: expected False, got True"),
        (DPM, {"variance_type": "learned"}, "scheduler.variance_type: expected None, got learned"),
        (
            DDIM,
            LINSPACE | ZERO_SNR,
            "scheduler.prediction_type: expected v_prediction, since .* pure noise, got epsilon",
        ),
    ],
)
def test_other_schedulers_are_refused_by_name(kind, config, message):
    scheduler = kind(**({"clip_sample": False} if issubclass(kind, DDIM) else {}) | config)
    with pytest.raises(NotImplementedError, match=rf"^lr_kernels\.LayoutRetouch: {message}"):
        solver(scheduler, 10, "cpu")


@pytest.mark.parametrize("kind", [DDIM, EULER, DPM])
def test_numbers_of_steps_that_do_not_fit_the_spacing_are_refused(kind):
    """Where diffusers makes one timestep too many, -1."""
    with pytest.raises(NotImplementedError, match="timesteps: expected 0 to 999, got -1 to 999; try another number"):
        solver(scheduler_of((kind, TRAILING)), 61, "cpu")


def test_clipped_schedules_of_fewer_steps_are_refused():
    config = TRAILING | {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -2.0}
    with pytest.raises(NotImplementedError, match=r"num_inference_steps: expected .* 'trailing' spacing makes, got 50"):
        solver(scheduler_of((DPM, config)), 50, "cpu")


def test_schedulers_without_timesteps_are_refused():
    with pytest.raises(ValueError, match="scheduler: expected one whose timesteps are set, got none; call set_timest"):
        solver_of(scheduler_of((EULER, EPSILON)))


@pytest.mark.parametrize("kind", [EULER, DPM])
@pytest.mark.parametrize("eta", [0.5, torch.nan])
def test_noise_is_refused_where_the_scheduler_adds_none(kind, eta):
    way = solver(scheduler_of((kind, EPSILON)), 7, "cpu")
    with pytest.raises(NotImplementedError, match=r"eta: expected 0 for this scheduler, got .*; DDIMScheduler takes"):
        way.table(guidance_scale=GUIDANCE, eta=eta)


# ---- latents of given images ----


@every_configuration
def test_renoised_latents_are_those_of_the_scheduler(configuration):
    scheduler = scheduler_of(configuration, 20)
    clean, noise = noise_of(0, 2)
    found = renoise(clean, noise, scheduler, start=3)
    assert len(found) == 18 and found[-1] is clean
    for i, x in enumerate(found[:-1], 3):
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(i)  # of Karras' timesteps some are the same
        low, precise = (
            scheduler.add_noise(clean.to(dtype), noise.to(dtype), scheduler.timesteps[i : i + 1])
            for dtype in (torch.float32, torch.float64)
        )
        assert_matches(x, low, precise, f"before step {i}")


def linear_model(x, t):
    """A prediction that depends on the input and on the timestep."""
    return 0.3 * x.flip(-1) + 0.1 * x.roll(1, -2) + float(t) / 1000


def inverted(way, clean, model=linear_model):
    """The definition of the inversion, in the dtype of the clean latents: they, and then noisier and noisier ones."""
    found = [clean]
    for k in range(way.steps):
        now, after = way.steps - k, way.steps - k - 1
        at = min(now, way.steps - 1)
        alpha, sigma = way.alphas[now].item(), way.sigmas[now].item()
        x, x_in = found[-1], found[-1] / (alpha**2 + sigma**2) ** 0.5
        noise = model(x_in, way.timesteps[at])
        if way.prediction_type == "v_prediction":
            level = (way.alphas[at] ** 2 + way.sigmas[at] ** 2).sqrt()
            noise = (way.sigmas[at] / level).item() * x_in + (way.alphas[at] / level).item() * noise
        found.append(way.alphas[after].item() * (x - sigma * noise) / alpha + way.sigmas[after].item() * noise)
    return found[::-1]


@every_configuration
@pytest.mark.parametrize("steps", [7, 20])
def test_inversion_is_its_definition(configuration, steps):
    scheduler = scheduler_of(configuration, steps)
    way, clean = solver_of(scheduler), noise_of(0)[0]
    found, low, precise = invert(linear_model, clean, scheduler), inverted(way, clean), inverted(way, clean.double())
    assert len(found) == steps + 1 and found[-1] is clean
    for i, three in enumerate(zip(found, low, precise)):
        assert_matches(*three, f"before step {i}")
    later = invert(linear_model, clean, way, start=4)
    assert len(later) == steps - 3 and all(map(torch.equal, later, found[4:]))


@pytest.mark.parametrize("prediction", [EPSILON, V], ids=["epsilon", "v_prediction"])
@pytest.mark.parametrize("other", [EULER, DPM])
def test_inversion_is_that_of_ddim_by_every_solver(prediction, other):
    """At the same timesteps, which trailing ones of numbers that divide 1000 are, but for the scale of the latents."""
    clean = noise_of(0)[0]
    by_ddim, by_other = (scheduler_of((kind, prediction | TRAILING), 20) for kind in (DDIM, other))
    assert torch.equal(by_ddim.timesteps, by_other.timesteps.long())
    way = solver_of(by_other)
    scale = 1 / (way.alphas**2 + way.sigmas**2).sqrt()
    precise = inverted(solver_of(by_ddim), clean.double())
    low = inverted(solver_of(by_ddim), clean)
    for i, x in enumerate(invert(linear_model, clean, by_other)):
        assert_matches(x * scale[i].item(), low[i], precise[i], f"before step {i}")


def comes_back(configuration):
    """Whether sampling undoes an inversion of a constant noise. Not where the first latents are so noisy that rounding
    hides the image, and not by DDIM with linspace, whose steps do not go to the timesteps of the list."""
    kind, config = configuration
    noisy = config.keys() & {"rescale_betas_zero_snr", "beta_schedule"}
    return (
        not noisy
        and config["prediction_type"] == "epsilon"
        and (kind, config["timestep_spacing"]) != (DDIM, "linspace")
    )


@pytest.mark.parametrize("configuration", filter(comes_back, CONFIGURATIONS), ids=words)
def test_sampling_undoes_the_inversion_of_a_constant_noise(configuration):
    scheduler = scheduler_of(configuration, 10)
    way = solver_of(scheduler)
    clean, noise = noise_of(0, 2)

    def constant(x, t):
        return noise.to(x.dtype)

    x = invert(constant, clean, way)[0]
    low, _ = stock_runs(scheduler, inverted(way, clean, constant)[0], lambda i, predictions: constant(predictions, i))
    stepper = Stepper(way, way.table(guidance_scale=1))
    first = (clean.double() - way.sigmas[-1] * noise) / way.alphas[-1]  # clean latents without their noise
    for i in range(way.steps):
        x = stepper.step(i, x, [noise, noise])
        precise = way.alphas[i + 1] * first + way.sigmas[i + 1] * noise
        assert_matches(x, low[i][1], precise, f"latents of step {i}")


@pytest.mark.parametrize("step", [0, 3, np.int64(3), np.uint8(5), torch.tensor(4)])
def test_steps_of_any_integer_type(step):
    found = step_in_schedule("layout_steps", step, 2, 0, 5)
    assert found == int(step) and type(found) is int


def test_the_default_step():
    assert step_in_schedule("layout_steps", None, 2, 0, 5) == 2


@pytest.mark.parametrize("step", [-1, 6, True, np.True_, 2.0, np.float64(2), "2", [2]])
@pytest.mark.fault(number=34)
def test_steps_outside_the_schedule(step):
    with pytest.raises(ValueError, match="layout_steps: expected 0 to 5, got"):
        step_in_schedule("layout_steps", step, 2, 0, 5)


def test_blend_weights():
    assert blend_weights("hard", 2, 5).tolist() == [0, 0, 1, 1, 1]
    assert blend_weights(lambda i: i / 4, 0, 5).tolist() == [0, 0.25, 0.5, 0.75, 1]
    for kind in ("linear", "cosine"):
        weights = blend_weights(kind, 2, 6)
        assert weights[:2].tolist() == [0, 0] and weights[-1] == 1 and (weights.diff() >= 0).all()
