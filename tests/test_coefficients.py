"""The coefficient tables: whole runs against the schedulers of diffusers, guidance and blends, and errors for wrong
arguments."""

import math
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from lr_kernels import blend_schedule, sigma_coefficients, step_blend, step_coefficients
from lr_kernels.runtime.schemas import COLUMNS
from lr_kernels.testing import assert_matches

SHAPE = (2, 4, 8, 8)
GUIDANCE = 7.5
LEVELS = {"alphas_cumprod": [0.9, 0.5], "timesteps": [1, 0], "final_alpha_cumprod": 1.0}


def latents(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=g) for _ in range(count)]


def guided(uncond, cond, scale=GUIDANCE):
    return uncond + scale * (cond - uncond)


# ---- runs of the schedulers ----


def ddim(prediction_type="epsilon", steps=20, dtype=torch.float64, **config):
    """DDIM with the schedule's tensors in `dtype`, so that float64 is the truth."""
    config = {"prediction_type": prediction_type, "set_alpha_to_one": False, "steps_offset": 1} | config
    s = DDIMScheduler(clip_sample=False, **config)
    s.alphas_cumprod = s.alphas_cumprod.to(dtype)
    s.final_alpha_cumprod = s.final_alpha_cumprod.to(dtype)
    s.set_timesteps(steps)
    return s


def ddim_table(s, **keywords):
    return step_coefficients(s.alphas_cumprod, s.timesteps, final_alpha_cumprod=s.final_alpha_cumprod, **keywords)


EULER, FLOW, DPM = EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler
BY_EULER, BY_2M = {"solver": "euler"}, {"solver": "dpmpp_2m"}
RUNS = {  # scheduler, its configuration, steps, arguments of sigma_coefficients
    "euler": (EULER, {}, 12, BY_EULER),
    "euler-v": (EULER, {"prediction_type": "v_prediction", "use_karras_sigmas": True}, 20, BY_EULER),
    "euler-to-sigma-min": (EULER, {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading"}, 10, BY_EULER),
    "flow": (FLOW, {}, 10, BY_EULER),
    "flow-shifted": (FLOW, {"shift": 3.0}, 28, BY_EULER),
    "dpm": (DPM, {}, 12, BY_2M),
    "dpm-v": (DPM, {"prediction_type": "v_prediction", "use_karras_sigmas": True}, 20, BY_2M),
    "dpm-to-sigma-min": (DPM, {"final_sigmas_type": "sigma_min"}, 20, BY_2M),
    "dpm-euler-at-final": (DPM, {"final_sigmas_type": "sigma_min"}, 10, BY_2M | {"euler_at_final": True}),
    "dpm-flow": (DPM, {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}, 20, BY_2M),
}
NAMES = {"flow_prediction": "flow", None: "flow"}


@contextmanager
def double_precision():
    """While it lasts schedulers that cast to float32 cast to float64: what they compute, without its rounding."""

    class Torch(SimpleNamespace):
        float32 = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    with pytest.MonkeyPatch.context() as patch:
        for scheduler in (EULER, FLOW, DPM):
            patch.setattr(sys.modules[scheduler.__module__], "torch", Torch())
        yield


def predictions_of(i):
    """(unconditional, conditional) of step i, whatever the input: a model would enlarge the rounding of a run."""
    return latents(2, seed=i + 1)


def scheduler_run(s, start, **keywords):
    """(model's input, next latents) of every step."""
    x, found = start, []
    for i, t in enumerate(s.timesteps):
        x_in = s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else x
        prediction = guided(*(y.to(x.dtype) for y in predictions_of(i)))
        x = s.step(prediction, t, x, return_dict=False, **keywords)[0]
        found.append((x_in, x))
    return found


def table_run(coefficients, start, x_in, **keywords):
    """The same by step_blend: it makes the inputs after the first, and carries the history."""
    x, found, history = start, [], None
    for i in range(len(coefficients)):
        both, x0 = torch.empty(2 * len(x), *x.shape[1:]), torch.empty_like(x)
        step = {"history": history, "model_input": both, "history_out": x0}
        x = step_blend(x, predictions_of(i), coefficients, i, **step, **keywords, backend="cpu")
        found.append((x_in, x))
        x_in, also = both.chunk(2)
        assert torch.equal(x_in, also)
        history = x0
    return found


def check_runs(found, low, exact):
    assert len(found) == len(low) == len(exact) >= 10
    for i, (ours, by_low, by_exact) in enumerate(zip(found, low, exact)):
        for name, *three in zip(("model_input", "next"), ours, by_low, by_exact):
            assert_matches(*three, f"{name} of step {i}")


@pytest.mark.parametrize("name", RUNS)
def test_runs_match_diffusers(name):
    scheduler, config, steps, arguments = RUNS[name]

    def prepared(dtype):
        s = scheduler(**config)
        s.set_timesteps(steps)
        s.sigmas = s.sigmas.to(dtype)
        return s

    s = prepared(torch.float32)
    scale = s.sigmas[0] if scheduler is EULER else 1.0
    start = latents(1)[0] * scale
    kind = s.config.get("prediction_type")
    table = sigma_coefficients(s.sigmas, guidance_scale=GUIDANCE, prediction_type=NAMES.get(kind, kind), **arguments)
    x_in = start / (1 + scale**2) ** 0.5 if scheduler is EULER else start
    low, same = scheduler_run(s, start), prepared(torch.float64)
    with double_precision():
        exact = scheduler_run(same, start.double())
    check_runs(table_run(table, start, x_in), low, exact)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [10, 20, 13])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_ddim_runs_match_diffusers(prediction_type, eta, steps, spacing):
    start, noise = latents(2)

    def run(dtype):
        extra = {"eta": eta, "variance_noise": noise.to(dtype)} if eta else {}
        s = ddim(prediction_type, steps, dtype, timestep_spacing=spacing)
        return scheduler_run(s, start.to(dtype), **extra)

    s = ddim(prediction_type, steps, timestep_spacing=spacing)
    following = s.timesteps - 1000 // steps
    keywords = {"guidance_scale": GUIDANCE, "eta": eta, "prediction_type": prediction_type}
    table = ddim_table(s, next_timesteps=following, **keywords)
    assert torch.equal(table, ddim_table(s, **keywords))  # the default
    found = table_run(table, start, start, noise=noise if eta else None)
    check_runs(found, run(torch.float32), run(torch.float64))


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_ddim_runs_from_pure_noise_match_diffusers(spacing):
    config = {"timestep_spacing": spacing, "rescale_betas_zero_snr": True}
    start = latents(1)[0]
    low, exact = (
        scheduler_run(ddim("v_prediction", 13, dtype, **config), start.to(dtype))
        for dtype in (torch.float32, torch.float64)
    )
    table = ddim_table(ddim("v_prediction", 13, **config), guidance_scale=GUIDANCE, prediction_type="v_prediction")
    check_runs(table_run(table, start, start), low, exact)


def test_where_steps_go_is_asked_where_it_cannot_be_told():
    s = ddim(steps=7, timestep_spacing="linspace")
    s.timesteps = s.timesteps[2:]
    with pytest.raises(
        ValueError, match=r"next_timesteps: expected those of timesteps that are not evenly spaced, got"
    ):
        ddim_table(s, guidance_scale=GUIDANCE)
    given = ddim_table(s, guidance_scale=GUIDANCE, next_timesteps=s.timesteps - 1000 // 7)
    assert torch.equal(given, ddim_table(ddim(steps=7, timestep_spacing="linspace"), guidance_scale=GUIDANCE)[2:])
    s = ddim(steps=7)  # evenly spaced
    whole = ddim_table(s, guidance_scale=GUIDANCE)
    s.timesteps = s.timesteps[2:]
    assert torch.equal(ddim_table(s, guidance_scale=GUIDANCE), whole[2:])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [20, 7])
def test_ddim_steps_and_clean_latents_match_diffusers(prediction_type, steps):
    exact, low = (ddim(prediction_type, steps, dtype) for dtype in (torch.float64, torch.float32))
    coefficients = ddim_table(exact, guidance_scale=GUIDANCE, prediction_type=prediction_type)
    sample, uncond, cond = latents(3)

    def truth(s, dtype, t):
        x, u, c = (y.to(dtype) for y in (sample, uncond, cond))
        result = s.step(guided(u, c), t, x)
        return result.prev_sample, result.pred_original_sample

    for i, t in enumerate(exact.timesteps):
        x0 = torch.empty(SHAPE)
        out = step_blend(sample, [uncond, cond], coefficients, i, history_out=x0)
        for name, *three in zip(
            ("next", "x0"), (out, x0), truth(low, torch.float32, t), truth(exact, torch.float64, t)
        ):
            assert_matches(*three, f"{name} of step {i}")


# ---- guidance, blends, backgrounds ----


def test_blend_of_two_models_matches_diffusers():
    exact, low = (ddim(steps=10, dtype=dtype) for dtype in (torch.float64, torch.float32))
    weights = blend_schedule("cosine", 10, 3)
    coefficients = ddim_table(exact, guidance_scale=5.0, blend_weights=weights)
    sample, *predictions = latents(5)

    def truth(s, dtype, i):
        x, a, b, c, d = (y.to(dtype) for y in (sample, *predictions))
        w = weights[i].to(dtype)
        return s.step((1 - w) * guided(a, b, 5) + w * guided(c, d, 5), s.timesteps[i], x).prev_sample

    for i in range(10):
        out = step_blend(sample, predictions, coefficients, i)
        assert_matches(out, truth(low, torch.float32, i), truth(exact, torch.float64, i), f"step {i}")


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("guidance", [None, 3.0], ids=["conditional", "guided"])
@pytest.mark.parametrize("pag", [None, 2.0], ids=["", "pag"])
def test_weights_of_the_predictions(models, guidance, pag):
    """G is affine in each prediction, so unit predictions read the weights off."""
    per_model = 1 + (guidance is not None) + (pag is not None)
    blend = {"blend_weights": [0.25, 1.0]} if models == 2 else {}
    table = step_coefficients(**LEVELS, guidance_scale=guidance, pag_scale=pag, **blend)
    count = per_model * models
    assert table.shape == (2, 1, count + len(COLUMNS)) and table.dtype == torch.float32

    def formula(predictions):
        uncond = predictions.pop(0) if guidance is not None else 0
        cond = predictions.pop(0)
        result = cond if guidance is None else uncond + guidance * (cond - uncond)
        return result + pag * (cond - predictions.pop(0)) if pag is not None else result

    for step, w in enumerate(blend.get("blend_weights", [0.0, 0.0])):
        for k in range(count):
            units = [float(i == k) for i in range(count)]
            each = [formula(units[i * per_model : (i + 1) * per_model]) for i in range(models)]
            expected = each[0] if models == 1 else (1 - w) * each[0] + w * each[1]
            assert table[step, 0, k].item() == pytest.approx(expected, rel=1e-6, abs=0)


def test_scales_per_step():
    both = step_coefficients(**LEVELS, guidance_scale=[1.0, 4.0], pag_scale=[3.0, 0.0])
    for i, (g, pag) in enumerate(((1.0, 3.0), (4.0, 0.0))):
        assert torch.equal(both[i], step_coefficients(**LEVELS, guidance_scale=g, pag_scale=pag)[i])
    assert both[1, 0, 2] == 0


@pytest.mark.parametrize("w", [0.0, 1.0])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp_2m"])
@pytest.mark.fault(number=34)
def test_endpoints_are_the_single_model_bitwise(w, backend, solver):
    keywords = {"guidance_scale": 7.5, "prediction_type": "v_prediction", "pag_scale": 1.5}

    def table(**blend):
        if solver == "ddim":
            return ddim_table(ddim("v_prediction", 6), eta=1.0, **keywords, **blend)
        return sigma_coefficients([14.0, 7.0, 3.0, 1.5, 0.7, 0.2, 0.0], solver=solver, **keywords, **blend)

    sample, noise, history, *predictions = latents(9)
    used, unused = (predictions[3:], predictions[:3]) if w else (predictions[:3], predictions[3:])
    for x in unused:
        x.fill_(math.nan)
    given = {"noise": noise, "history": history, "backend": backend}
    for i in range(6):
        expected = step_blend(sample, used, table(), i, **given)
        assert torch.equal(step_blend(sample, predictions, table(blend_weights=[w] * 6), i, **given), expected)


def backgrounds():
    """{name: (table with keep_background="clean", step -> (clean, noise) -> noisy latents in float64)}."""
    sigmas = torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)
    exact = ddim(steps=5)
    norm = (1 + sigmas**2).sqrt()

    def of(solver, prediction_type):
        return sigma_coefficients(
            sigmas, solver=solver, prediction_type=prediction_type, guidance_scale=1.0, keep_background="clean"
        )

    return {
        "ddim": (
            ddim_table(exact, guidance_scale=1.0, keep_background="clean")[:-1],
            lambda i, x, z: exact.add_noise(x, z, exact.timesteps[i + 1]),
        ),
        "euler": (of("euler", "epsilon"), lambda i, x, z: x + sigmas[i + 1] * z),
        "flow": (of("euler", "flow"), lambda i, x, z: (1 - sigmas[i + 1]) * x + sigmas[i + 1] * z),
        "dpm": (of("dpmpp_2m", "epsilon"), lambda i, x, z: (x + sigmas[i + 1] * z) / norm[i + 1]),
    }


@pytest.mark.parametrize("name", ["ddim", "euler", "flow", "dpm"])
@pytest.mark.parametrize("by", ["mask", "keep_rows"])
def test_clean_backgrounds_are_noised_to_the_next_level(name, by):
    coefficients, noisy = backgrounds()[name]
    sample, uncond, cond, background, noise, history = latents(6)
    given = {"background": background, "noise": noise, "history": history}
    region = {"mask": torch.zeros(1, 8, 8)} if by == "mask" else {"keep_rows": torch.ones(2, dtype=torch.bool)}
    for i in range(len(coefficients)):
        out = step_blend(sample, [uncond, cond], coefficients, i, **region, **given)
        exact = noisy(i, background.double(), noise.double())
        assert_matches(out, exact.float(), exact, f"step {i}")


def test_background_latents_are_copied_bitwise():
    sample, uncond, cond, background = latents(4)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    for table in (
        ddim_table(ddim(steps=5), guidance_scale=3.0),
        sigma_coefficients([3.0, 2.0, 1.0, 0.0], solver="euler", guidance_scale=3.0),
    ):
        out = step_blend(sample, [uncond, cond], table, 2, mask=mask, background=background)
        assert torch.equal(out, background)


def test_pure_noise_starts_v_prediction():
    pure = {"alphas_cumprod": [0.9, 0.5, 0.0], "timesteps": [2, 1, 0], "final_alpha_cumprod": 1.0}
    table = step_coefficients(**pure, guidance_scale=1.0, prediction_type="v_prediction", eta=1.0)
    assert table.shape == (3, 1, 2 + len(COLUMNS)) and table.isfinite().all()
    with pytest.raises(ValueError, match=r"step_coefficients: alphas_cumprod: .*v_prediction"):
        step_coefficients(**pure, guidance_scale=1.0)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_pure_noise_starts_flow(solver):
    table = sigma_coefficients([1.0, 0.5, 0.2, 0.0], solver=solver, prediction_type="flow", guidance_scale=None)
    assert table.shape == (3, 1, 1 + len(COLUMNS)) and table.isfinite().all()


def test_blend_schedules():
    assert blend_schedule("hard", 6, 2).tolist() == [0, 0, 1, 1, 1, 1]
    assert blend_schedule("hard", 3, 0).tolist() == [1, 1, 1]
    assert blend_schedule("hard", 3, 3).tolist() == [0, 0, 0]
    assert blend_schedule("linear", 6, 2, ramp_steps=3).tolist() == [0, 0, 0.25, 0.5, 0.75, 1]
    assert blend_schedule("linear", 6, 2, ramp_steps=0).tolist() == blend_schedule("hard", 6, 2).tolist()
    cosine = blend_schedule("cosine", 6, 2, ramp_steps=3)
    assert cosine[[0, 1, 5]].tolist() == [0, 0, 1] and cosine[3].item() == 0.5 and (cosine.diff() >= 0).all()
    by_default = blend_schedule("linear", 10, 3)
    assert (by_default[:3] == 0).all() and (by_default[6:] == 1).all() and 0 < by_default[3] < by_default[5] < 1


# ---- errors ----

SHARED_ERRORS = [
    ({"blend_weights": [0.0, math.nan]}, ValueError, "blend_weights: expected numbers in"),
    ({"blend_weights": [0.0, 1.01]}, ValueError, "blend_weights: expected numbers in"),
    ({"blend_weights": [-0.1, 1.0]}, ValueError, "blend_weights: expected numbers in"),
    ({"blend_weights": [0.5]}, ValueError, "blend_weights: expected a number or shape"),
    ({"guidance_scale": math.inf}, ValueError, "guidance_scale: expected finite"),
    ({"guidance_scale": 1e39}, ValueError, "guidance_scale: expected finite float32 numbers, got 1e[+]39"),
    ({"guidance_scale": [1.0, 2.0, 3.0]}, ValueError, "guidance_scale: expected a number or shape"),
    ({"pag_scale": math.nan}, ValueError, "pag_scale: expected finite"),
    ({"pag_scale": 3e38, "guidance_scale": 3e38}, ValueError, "pag_scale: expected a sum"),
    ({"prediction_type": "sample"}, ValueError, "prediction_type: expected one of epsilon"),
    ({"keep_background": "pixels"}, ValueError, "keep_background: expected one of latents"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *SHARED_ERRORS,
        ({"prediction_type": "flow"}, ValueError, "prediction_type: expected one of epsilon"),
        ({"eta": 1.5}, ValueError, "eta: expected a number in"),
        ({"eta": math.nan}, ValueError, "eta: expected a number in"),
        ({"timesteps": [2, 0]}, ValueError, "timesteps: expected integers in"),
        ({"timesteps": [-1, 0]}, ValueError, "timesteps: expected integers in"),
        ({"timesteps": [0, 1]}, ValueError, "timesteps: expected an order"),
        ({"timesteps": []}, TypeError, "timesteps: expected an integer dtype"),
        ({"timesteps": [[1, 0]]}, ValueError, "timesteps: expected shape"),
        ({"timesteps": [1.0, 0.0]}, TypeError, "timesteps: expected an integer dtype"),
        ({"alphas_cumprod": [[0.9]]}, ValueError, "alphas_cumprod: expected shape"),
        ({"alphas_cumprod": [0.9, math.nan]}, ValueError, "alphas_cumprod: expected numbers in"),
        ({"alphas_cumprod": [0.9, 1e-90]}, ValueError, "alphas_cumprod: expected levels whose coefficients"),
        ({"final_alpha_cumprod": 1.1}, ValueError, r"final_alpha_cumprod: expected a number in \(0, 1\], got 1.1"),
        ({"final_alpha_cumprod": math.nan}, ValueError, "final_alpha_cumprod: expected a number in"),
        ({"final_alpha_cumprod": 0.0}, ValueError, "final_alpha_cumprod: expected a number in"),
        ({"final_alpha_cumprod": [1.0, 1.0]}, ValueError, "final_alpha_cumprod: expected a number in"),
        ({"final_alpha_cumprod": 0.8}, ValueError, "final_alpha_cumprod: expected at least 0.9, the level"),
        ({"next_timesteps": [0]}, ValueError, "next_timesteps: expected 2 integers below 2"),
        ({"next_timesteps": [2, -1]}, ValueError, "next_timesteps: expected 2 integers below 2"),
        ({"next_timesteps": [0, 1]}, ValueError, r"next_timesteps: expected levels in \(0, 1\] that are not below"),
        ({"next_timesteps": [0.0, -1.0]}, TypeError, "next_timesteps: expected an integer dtype"),
    ],
)
@pytest.mark.fault(number=34)
def test_errors_of_step_coefficients(changes, error, message):
    with pytest.raises(error, match=rf"^lr_kernels\.step_coefficients: {message}"):
        step_coefficients(**({"guidance_scale": 2.0} | LEVELS | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *SHARED_ERRORS,
        ({"solver": "ddim"}, ValueError, "solver: expected one of euler, dpmpp_2m, got 'ddim'"),
        ({"sigmas": [1.0]}, ValueError, "sigmas: expected shape"),
        ({"sigmas": [[1.0, 0.0]]}, ValueError, "sigmas: expected shape"),
        ({"sigmas": [2.0, math.nan, 0.0]}, ValueError, "sigmas: expected numbers above 0, the last at least 0"),
        ({"sigmas": [math.inf, 1.0, 0.0]}, ValueError, "sigmas: expected numbers above 0"),
        ({"sigmas": [2.0, 0.0, 0.0]}, ValueError, "sigmas: expected numbers above 0"),
        ({"sigmas": [2.0, 1.0, -1.0]}, ValueError, "sigmas: expected numbers above 0"),
        ({"sigmas": [2.0, 1.0, math.nan]}, ValueError, "sigmas: expected numbers above 0"),
        ({"sigmas": [1.0, 2.0, 0.0]}, ValueError, "sigmas: expected numbers that do not rise"),
        ({"sigmas": [2.0, 1.0, 1.00001]}, ValueError, "sigmas: expected numbers that do not rise"),
        ({"sigmas": [1e39, 1.0, 0.0]}, ValueError, "sigmas: expected levels whose coefficients"),
        ({"prediction_type": "flow", "sigmas": [1.1, 0.5, 0.0]}, ValueError, "sigmas: expected .* at most 1"),
    ],
)
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
@pytest.mark.fault(number=34)
def test_errors_of_sigma_coefficients(changes, error, message, solver):
    call = {"sigmas": [14.0, 2.0, 0.0], "guidance_scale": 2.0, "solver": solver}
    with pytest.raises(error, match=rf"^lr_kernels\.sigma_coefficients: {message}"):
        sigma_coefficients(**(call | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("soft", 5, 2, None), "kind: expected one of hard"),
        (("hard", 0, 0, None), "steps: expected at least 1"),
        (("hard", 5, 6, None), "layout_steps: expected 0 to 5"),
        (("hard", 5, 2, 1), "ramp_steps: expected None"),
        (("linear", 5, 2, 4), "ramp_steps: expected 0 to 3"),
    ],
)
def test_blend_schedule_errors(call, message):
    kind, steps, layout_steps, ramp_steps = call
    with pytest.raises(ValueError, match=rf"^lr_kernels\.blend_schedule: {message}"):
        blend_schedule(kind, steps, layout_steps, ramp_steps=ramp_steps)
