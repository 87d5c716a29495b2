"""step_blend: the kernel against the float64 reference, the DDIM tables against diffusers, and the error rows."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from lr_kernels import reference
from lr_kernels.step_blend import blend_schedule, step_blend, step_coefficients
from lr_kernels.testing import assert_matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {
    "one-prediction": {"count": 1},
    "four-predictions": {"count": 4, "shape": (2, 4, 64, 64)},
    "six-predictions": {"count": 6},
    "rows-of-coefficients": {"rows": 3, "shape": (3, 4, 5, 7)},
    "noise": {"noise": True},
    "bool-mask": {"mask": "bool", "mask_rows": 2},
    "shared-float-mask": {"mask": "float"},
    "mask-noise": {"mask": "float", "mask_rows": 2, "noise": True, "count": 4, "rows": 2},
    "odd-plane-over-many-segments": {"mask": "float", "noise": True, "shape": (1, 3, 97, 101)},
    "one-pixel": {"mask": "float", "shape": (2, 1, 1, 1)},
}


def randn(shape, generator, layout="batch-slice"):
    """A tensor that is not contiguous: a slice of a wider batch, or channels last."""
    if layout == "channels-last":
        return torch.randn(shape, generator=generator).to(memory_format=torch.channels_last)
    return torch.randn(shape[0], 2, *shape[1:], generator=generator)[:, 1]


def make(*, count=2, shape=(2, 4, 9, 11), rows=1, steps=3, mask=None, mask_rows=1, noise=False, seed=0):
    """(positional arguments without step, keyword arguments) in float32."""
    g = torch.Generator().manual_seed(seed)
    predictions = [randn(shape, g, "channels-last" if i == 1 else "batch-slice") for i in range(count)]
    coefficients = torch.randn(steps, rows, count + 4, generator=g)
    keywords = {"noise": randn(shape, g) if noise else None}
    if mask is not None:
        m = torch.rand(mask_rows, *shape[2:], generator=g)
        keywords |= {"mask": m > 0.5 if mask == "bool" else (1.5 * m - 0.25).clamp(0, 1), "background": randn(shape, g)}
    return (randn(shape, g), predictions, coefficients), keywords


def cast(arguments, keywords, dtype):
    """The latents, not the coefficients and the mask, in another dtype."""
    sample, predictions, coefficients = arguments
    keywords = {k: v if k == "mask" or v is None else v.to(dtype) for k, v in keywords.items()}
    return (sample.to(dtype), [x.to(dtype) for x in predictions], coefficients), keywords


def check(arguments, keywords, dtype, step=1):
    arguments, keywords = cast(arguments, keywords, dtype)
    exact, exact_keywords = cast(arguments, keywords, torch.float64)
    out = step_blend(*arguments, step, **keywords, backend="cpu")
    assert out.dtype == dtype and out.is_contiguous()
    truth = reference.step_blend(*exact, step, **exact_keywords)
    assert_matches(out, reference.step_blend(*arguments, step, **keywords), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, dtype):
    check(*make(**CASES[case]), dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 20), st.integers(0, 20)),
    count=st.integers(1, 6),
    mask=st.sampled_from([None, "bool", "float"]),
    noise=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape, count, mask, noise, dtype):
    check(*make(count=count, shape=shape, mask=mask, noise=noise), dtype)


@pytest.mark.parametrize(
    "step", [1, torch.tensor(1), torch.tensor([1], dtype=torch.int32), torch.tensor([[1]])], ids=lambda s: str(s)
)
def test_step_forms(step):
    arguments, _ = make()
    expected = step_blend(*arguments, 1, backend="cpu")
    assert torch.equal(step_blend(*arguments, step, backend="cpu"), expected)
    assert torch.equal(
        step_blend(*arguments, step, backend="reference"), step_blend(*arguments, 1, backend="reference")
    )


def test_out_is_overwritten_and_returned():
    arguments, keywords = make(mask="float", noise=True)
    out = torch.full(arguments[0].shape, math.nan)
    assert step_blend(*arguments, 2, **keywords, out=out, backend="cpu") is out
    assert torch.equal(out, step_blend(*arguments, 2, **keywords, backend="cpu"))
    assert step_blend(*arguments, 2, **keywords, out=out, backend="reference") is out


def test_nothing_is_written_around_out():
    arguments, _ = make(shape=(1, 1, 5, 7))
    memory = torch.full((37,), math.nan)
    step_blend(*arguments, 0, out=memory[1:36].view(1, 1, 5, 7), backend="cpu")
    assert memory[0].isnan() and memory[36].isnan() and memory[1:36].isfinite().all()


def test_misaligned_views():
    arguments, _ = make(shape=(1, 2, 16, 16))
    shifted = torch.empty(513)[1:].view(1, 2, 16, 16).copy_(arguments[0])
    assert torch.equal(step_blend(shifted, *arguments[1:], 0, backend="cpu"), step_blend(*arguments, 0, backend="cpu"))


def test_expanded_background_is_read_in_place():
    arguments, keywords = make(mask="float")
    shared = keywords["background"][:1].expand(2, -1, -1, -1)
    expected = step_blend(*arguments, 0, mask=keywords["mask"], background=shared.clone(), backend="cpu")
    assert torch.equal(step_blend(*arguments, 0, mask=keywords["mask"], background=shared, backend="cpu"), expected)


def test_11_prediction_of_weight_zero_is_not_read():
    (sample, predictions, coefficients), keywords = make(count=3, noise=True)
    coefficients[:, :, [1, 3, 4]] = 0  # the second prediction, a and σ
    expected = step_blend(sample, predictions, coefficients, 0, **keywords, backend="cpu")
    for x in (predictions[1], sample, keywords["noise"]):
        x.fill_(math.nan)
    assert torch.equal(step_blend(sample, predictions, coefficients, 0, **keywords, backend="cpu"), expected)
    assert expected.isfinite().all()


def test_11_nan_on_the_side_the_mask_does_not_take():
    (sample, predictions, coefficients), keywords = make(mask="bool")
    inside = keywords["mask"][:, None].expand(sample.shape)
    keywords["background"][inside] = math.nan
    predictions[0][~inside] = math.inf
    assert step_blend(sample, predictions, coefficients, 0, **keywords, backend="cpu").isfinite().all()


def test_12_live_nan_stays_at_its_element():
    arguments, keywords = make(mask="float", noise=True)
    arguments[1][0][1, 2, 3, 4] = math.nan
    keywords["mask"].clamp_(0.25, 0.75)
    out = step_blend(*arguments, 0, **keywords, backend="cpu")
    assert torch.equal(out.isnan(), reference.step_blend(*arguments, 0, **keywords).isnan())
    assert out.isnan().sum() == 1


def test_13_garbage_past_the_tail():
    arguments, _ = make(shape=(1, 1, 3, 7))
    padded = torch.full((1, 40), math.nan)
    padded[:, :21] = arguments[0].reshape(1, 21)
    view = padded[:, :21].view(1, 1, 3, 7)
    assert torch.equal(step_blend(view, *arguments[1:], 0, backend="cpu"), step_blend(*arguments, 0, backend="cpu"))


def test_30_threads_do_not_change_a_bit():
    arguments, keywords = make(shape=(4, 4, 96, 96), mask="float", noise=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(step_blend(*arguments, 0, **keywords, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_31_permuting_the_batch_permutes_the_result():
    arguments, keywords = make(shape=(4, 3, 9, 9), rows=4, mask="float", mask_rows=4, noise=True)
    sample, predictions, coefficients = arguments
    order = torch.tensor([2, 0, 3, 1])
    permuted = step_blend(
        sample[order],
        [x[order] for x in predictions],
        coefficients[:, order],
        1,
        **{k: v[order] for k, v in keywords.items()},
        backend="cpu",
    )
    assert torch.equal(permuted, step_blend(*arguments, 1, **keywords, backend="cpu")[order])


# ---- the tables ----


def scheduler(prediction_type, steps, dtype=torch.float64):
    """DDIM with the schedule's tensors in `dtype`, so that float64 is the truth."""
    s = DDIMScheduler(prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    s.alphas_cumprod = s.alphas_cumprod.to(dtype)
    s.final_alpha_cumprod = s.final_alpha_cumprod.to(dtype)
    s.set_timesteps(steps)
    return s


def table(s, **keywords):
    return step_coefficients(s.alphas_cumprod, s.timesteps, final_alpha_cumprod=s.final_alpha_cumprod, **keywords)


def latents(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 8, 8, generator=g) for _ in range(count)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [20, 7])
def test_ddim_columns_match_diffusers(prediction_type, eta, steps):
    exact, low = (scheduler(prediction_type, steps, dtype) for dtype in (torch.float64, torch.float32))
    coefficients = table(exact, guidance_scale=7.5, eta=eta, prediction_type=prediction_type)
    sample, uncond, cond, noise = latents(4)

    def truth(s, dtype, t):
        x, u, c, z = (y.to(dtype) for y in (sample, uncond, cond, noise))
        return s.step(u + 7.5 * (c - u), t, x, eta=eta, variance_noise=z if eta else None).prev_sample

    for i, t in enumerate(exact.timesteps):
        out = step_blend(sample, [uncond, cond], coefficients, i, noise=noise if eta else None)
        assert_matches(out, truth(low, torch.float32, t), truth(exact, torch.float64, t), f"step {i}")


def test_blend_of_two_models_matches_diffusers():
    exact, low = (scheduler("epsilon", 10, dtype) for dtype in (torch.float64, torch.float32))
    weights = blend_schedule("cosine", 10, 3)
    coefficients = table(exact, guidance_scale=5.0, blend_weights=weights)
    sample, *predictions = latents(5)

    def truth(s, dtype, i):
        x, a, b, c, d = (y.to(dtype) for y in (sample, *predictions))
        w = weights[i].to(dtype)
        mixed = (1 - w) * (a + 5 * (b - a)) + w * (c + 5 * (d - c))
        return s.step(mixed, s.timesteps[i], x).prev_sample

    for i in range(10):
        out = step_blend(sample, predictions, coefficients, i)
        assert_matches(out, truth(low, torch.float32, i), truth(exact, torch.float64, i), f"step {i}")


def test_clean_background_matches_add_noise():
    exact, low = (scheduler("epsilon", 5, dtype) for dtype in (torch.float64, torch.float32))
    coefficients = table(exact, guidance_scale=1.0, keep_background="clean")
    sample, uncond, cond, background, noise = latents(5)
    for i, t in enumerate(exact.timesteps[1:]):
        out = step_blend(
            sample, [uncond, cond], coefficients, i, mask=torch.zeros(1, 8, 8), background=background, noise=noise
        )
        truth = exact.add_noise(background.double(), noise.double(), t)
        assert_matches(out, low.add_noise(background, noise, t), truth, f"step {i}")


def test_background_latents_are_copied_bitwise():
    coefficients = table(scheduler("epsilon", 5), guidance_scale=3.0)
    sample, uncond, cond, background = latents(4)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    out = step_blend(sample, [uncond, cond], coefficients, 2, mask=mask, background=background)
    assert torch.equal(out, background)


@pytest.mark.parametrize("w", [0.0, 1.0])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_34_endpoints_are_the_single_model_bitwise(w, backend):
    s = scheduler("v_prediction", 6)
    keywords = {"guidance_scale": 7.5, "eta": 1.0, "prediction_type": "v_prediction"}
    single, blended = table(s, **keywords), table(s, **keywords, blend_weights=[w] * 6)
    sample, *predictions = latents(5)
    noise = latents(1, seed=1)[0]
    used, unused = (predictions[2:], predictions[:2]) if w else (predictions[:2], predictions[2:])
    for x in unused:
        x.fill_(math.nan)
    for i in range(6):
        expected = step_blend(sample, used, single, i, noise=noise, backend=backend)
        assert torch.equal(step_blend(sample, predictions, blended, i, noise=noise, backend=backend), expected)


def test_guidance_per_step():
    s = scheduler("epsilon", 4)
    per_step = table(s, guidance_scale=[1.0, 2.0, 3.0, 4.0])
    for i in range(4):
        assert torch.equal(per_step[i], table(s, guidance_scale=i + 1.0)[i])


def test_pure_noise_starts_v_prediction():
    coefficients = step_coefficients(
        [0.9, 0.5, 0.0], [2, 1, 0], final_alpha_cumprod=1.0, guidance_scale=1.0, prediction_type="v_prediction", eta=1.0
    )
    assert coefficients.shape == (3, 1, 6) and coefficients.dtype == torch.float32 and coefficients.isfinite().all()
    with pytest.raises(ValueError, match=r"step_coefficients: alphas_cumprod: .*v_prediction"):
        step_coefficients([0.9, 0.5, 0.0], [2, 1, 0], final_alpha_cumprod=1.0, guidance_scale=1.0)


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


# ---- gradients, torch.library and torch.compile ----


def test_28_gradients_use_the_reference():
    (sample, predictions, coefficients), keywords = make(mask="float")
    sample = sample.clone().requires_grad_()
    step_blend(sample, predictions, coefficients, 1, **keywords).sum().backward()
    expected = (coefficients[1, 0, 2] * keywords["mask"])[:, None].expand(sample.shape)
    assert_matches(sample.grad, expected, expected.double())
    with pytest.raises(NotImplementedError, match=r"step_blend: gradients: .*'cpu'.*'reference'"):
        step_blend(sample, predictions, coefficients, 1, **keywords, backend="cpu")


def op_arguments(**case):
    (sample, predictions, coefficients), keywords = make(**case)
    dense = [x.contiguous() for x in (sample, *predictions)]
    step = torch.tensor([1], dtype=torch.int32)
    rest = [keywords.get("mask"), keywords.get("background"), keywords["noise"]]
    rest = [None if x is None else x.contiguous() for x in rest]
    return (dense[0], dense[1:], coefficients, step, *rest, torch.full(dense[0].shape, math.nan))


@pytest.mark.parametrize("case", ["one-prediction", "shared-float-mask", "mask-noise"])
def test_26_opcheck(case):
    torch.library.opcheck(torch.ops.lr_kernels.step_blend_cpu.default, op_arguments(**CASES[case]))


def test_the_op_refuses_a_step_outside_the_schedule():
    arguments = list(op_arguments())
    for wrong in (-1, 3):
        arguments[3] = torch.tensor([wrong], dtype=torch.int32)
        with pytest.raises(RuntimeError, match="step: expected 0 to 2"):
            torch.ops.lr_kernels.step_blend_cpu(*arguments)


def test_29_compiles_without_breaks_or_recompiles():
    arguments, keywords = make(mask="float", noise=True)
    sample, predictions, coefficients = arguments
    compiled = torch.compile(step_blend, fullgraph=True, backend="aot_eager")
    compiled(*arguments, torch.tensor(0), **keywords)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            blended = (sample, predictions, coefficients * (step + 1))
            other = keywords | {"mask": (keywords["mask"] + 0.1 * step).clamp(max=1)}
            expected = step_blend(*blended, step, **other)
            assert torch.equal(compiled(*blended, torch.tensor(step), **other), expected)


def test_29_int_steps_recompile_once():
    arguments, _ = make(steps=6)
    compiled = torch.compile(step_blend, fullgraph=True, backend="aot_eager")
    compiled(*arguments, 2)
    compiled(*arguments, 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (4, 5):
            assert torch.equal(compiled(*arguments, step), step_blend(*arguments, step))


# ---- errors ----

SHAPE = (2, 4, 9, 11)
MASK = torch.ones(1, 9, 11)
X = torch.zeros(SHAPE)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sample": torch.zeros(2, 4, 9)}, ValueError, "sample: expected shape"),
        ({"sample": torch.zeros(SHAPE, dtype=torch.int32)}, TypeError, "sample: expected one of float32"),
        ({"predictions": []}, ValueError, "predictions: expected 1 to 6, got 0"),
        ({"predictions": [X] * 7}, ValueError, "predictions: expected 1 to 6, got 7"),
        ({"predictions": [X, torch.zeros(2, 4, 9, 10)]}, ValueError, r"predictions\[1\]: expected shape"),
        ({"predictions": [X, X.half()]}, TypeError, r"predictions\[1\]: expected torch.float32, got torch.float16"),
        ({"predictions": [X.to("meta"), X]}, ValueError, r"predictions\[0\]: expected cpu, got meta"),
        ({"coefficients": torch.zeros(3, 6)}, ValueError, "coefficients: expected shape"),
        ({"coefficients": torch.zeros(3, 1, 5)}, ValueError, "coefficients: expected shape"),
        ({"coefficients": torch.zeros(3, 3, 6)}, ValueError, "coefficients: expected shape"),
        ({"coefficients": torch.zeros(3, 1, 6).double()}, TypeError, "coefficients: expected float32"),
        ({"coefficients": torch.zeros(3, 1, 6, device="meta")}, ValueError, "coefficients: expected cpu"),
        ({"step": 3}, ValueError, "step: expected 0 to 2, the steps of coefficients, got 3"),
        ({"step": -1}, ValueError, "step: expected 0 to 2"),
        ({"step": torch.tensor(3)}, ValueError, "step: expected 0 to 2"),
        ({"step": torch.tensor([0, 1])}, ValueError, "step: expected one element"),
        ({"step": torch.tensor(1.0)}, TypeError, "step: expected int32 or int64"),
        ({"step": 1.0}, TypeError, "step: expected an int"),
        ({"step": torch.tensor(1, device="meta")}, ValueError, "step: expected cpu, got meta"),
        ({"mask": MASK}, ValueError, "background: expected a tensor, since mask is given"),
        ({"background": X}, ValueError, "mask: expected a tensor, since background is given"),
        ({"mask": MASK[0], "background": X}, ValueError, "mask: expected shape"),
        ({"mask": MASK.expand(3, -1, -1), "background": X}, ValueError, "mask: expected shape"),
        ({"mask": MASK.long(), "background": X}, TypeError, "mask: expected bool or a floating dtype"),
        ({"mask": MASK.to("meta"), "background": X}, ValueError, "mask: expected cpu, got meta"),
        ({"mask": MASK, "background": X[:1]}, ValueError, "background: expected shape"),
        ({"noise": X.double()}, TypeError, "noise: expected torch.float32"),
        ({"out": torch.zeros(1)}, ValueError, "out: expected shape"),
        ({"out": X.to(memory_format=torch.channels_last)}, ValueError, "out: expected a contiguous tensor"),
        ({"backend": "mkl"}, ValueError, "backend: expected one of auto"),
        ({"backend": "cuda"}, RuntimeError, "backend: 'cuda' cannot run"),
        ({"sample": X.double(), "predictions": [X.double()] * 2, "backend": "cpu"}, TypeError, "one of float32"),
    ],
)
def test_rows7_17_18_34_errors(changes, error, message):
    call = {"sample": X, "predictions": [X, X], "coefficients": torch.zeros(3, 1, 6), "step": 0} | changes
    with pytest.raises(error, match=r"^lr_kernels\.step_blend: .*" + message.removeprefix("^")):
        step_blend(**call)


@pytest.mark.parametrize("which", ["sample", "predictions", "background", "noise", "mask", "shifted"])
def test_06_out_overlaps_an_input(which):
    arguments, keywords = make(mask="float", noise=True, shape=(2, 4, 9, 11))
    memory = torch.zeros(2 * 4 * 9 * 11 + 1)
    out = memory[:-1].view(2, 4, 9, 11)
    sample, predictions, coefficients = arguments
    if which == "sample":
        sample = out
    elif which == "predictions":
        predictions = [predictions[0], out]
    elif which == "shifted":
        sample = memory[1:].view(2, 4, 9, 11)
    elif which == "mask":
        keywords["mask"] = memory[-100:-1].view(1, 9, 11)
    else:
        keywords[which] = out
    with pytest.raises(ValueError, match="step_blend: out: expected memory of its own"):
        step_blend(sample, predictions, coefficients, 0, **keywords, out=out)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"blend_weights": [0.0, math.nan]}, ValueError, "blend_weights: expected numbers in"),
        ({"blend_weights": [0.0, 1.01]}, ValueError, "blend_weights: expected numbers in"),
        ({"blend_weights": [-0.1, 1.0]}, ValueError, "blend_weights: expected numbers in"),
        ({"blend_weights": [0.5]}, ValueError, "blend_weights: expected a number or shape"),
        ({"guidance_scale": math.inf}, ValueError, "guidance_scale: expected finite"),
        ({"guidance_scale": [1.0, 2.0, 3.0]}, ValueError, "guidance_scale: expected a number or shape"),
        ({"eta": 1.5}, ValueError, "eta: expected a number in"),
        ({"eta": math.nan}, ValueError, "eta: expected a number in"),
        ({"prediction_type": "sample"}, ValueError, "prediction_type: expected one of epsilon"),
        ({"keep_background": "pixels"}, ValueError, "keep_background: expected one of latents"),
        ({"timesteps": [2, 0]}, ValueError, "timesteps: expected integers in"),
        ({"timesteps": [-1, 0]}, ValueError, "timesteps: expected integers in"),
        ({"timesteps": [0, 1]}, ValueError, "timesteps: expected an order"),
        ({"timesteps": []}, TypeError, "timesteps: expected an integer dtype"),
        ({"timesteps": [[1, 0]]}, ValueError, "timesteps: expected shape"),
        ({"timesteps": [1.0, 0.0]}, TypeError, "timesteps: expected an integer dtype"),
        ({"alphas_cumprod": [[0.9]]}, ValueError, "alphas_cumprod: expected shape"),
        ({"alphas_cumprod": [0.9, math.nan]}, ValueError, "alphas_cumprod: expected numbers in"),
        ({"final_alpha_cumprod": 1.1}, ValueError, "alphas_cumprod: expected numbers in"),
    ],
)
def test_34_table_errors(changes, error, message):
    call = {"alphas_cumprod": [0.9, 0.5], "timesteps": [1, 0], "final_alpha_cumprod": 1.0, "guidance_scale": 2.0}
    with pytest.raises(error, match=rf"^lr_kernels\.step_coefficients: {message}"):
        step_coefficients(**(call | changes))


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
