"""step_blend: the CPU kernel against the specification in float64, which memory is read and written, the op, and
errors for wrong arguments."""

import math
import re

import pytest
import torch
from draw import FLOATS, Arguments, Draw
from hypothesis import given, settings
from hypothesis import strategies as st
from step_blend_inputs import make

from lr_kernels import reference
from lr_kernels.denoising.step_blend import step_blend
from lr_kernels.runtime.schemas import COLUMNS
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
    "history": {"history": True},
    "model-input-twice": {"copies": 2},
    "model-input-three-times": {"copies": 3, "shape": (1, 4, 16, 16)},
    "rows-to-keep": {"keep": (True, False, True), "shape": (3, 2, 9, 11), "noise": True},
    "everything": {
        "count": 6,
        "rows": 3,
        "shape": (3, 4, 17, 19),
        "mask": "float",
        "noise": True,
        "history": True,
        "keep": (False, True, False),
        "copies": 2,
    },
}
OUTPUTS = ("model_input", "history_out")


def cast(arguments, keywords, dtype):
    """Copies of the arguments, the latents in another dtype, not the coefficients and masks."""
    sample, predictions, coefficients = arguments
    kept = ("mask", "keep_rows")
    keywords = {k: v if k in kept or v is None else v.to(dtype, copy=k in OUTPUTS) for k, v in keywords.items()}
    return (sample.to(dtype), [x.to(dtype) for x in predictions], coefficients), keywords


def results(function, arguments, step, keywords, **options):
    """{name: tensor} of the result and of the outputs in keywords."""
    out = function(*arguments, step, **keywords, **options)
    return {"out": out} | {name: keywords[name] for name in OUTPUTS if name in keywords}


def check(arguments, keywords, dtype, step=1):
    arguments, keywords = cast(arguments, keywords, dtype)

    def by_reference(precision):
        positional, named = cast(arguments, keywords, precision)
        return results(reference.step_blend, positional, step, named)

    low, exact = by_reference(dtype), by_reference(torch.float64)
    found = results(step_blend, arguments, step, keywords, backend="cpu")
    assert found["out"].is_contiguous()
    for name, x in found.items():
        assert x.dtype == dtype
        assert_matches(x, low[name], exact[name], name)


def right_call(draw: Draw) -> Arguments:
    shape, dtype = (draw.size(0, 3), draw.size(1, 3), draw.size(0, 9), draw.size(1, 9)), draw.random.choice(FLOATS)
    batch, count, steps = shape[0], draw.size(1, 6), draw.size(1, 4)

    def latents(wanted: bool = True) -> torch.Tensor | None:
        return draw.tensor(*shape, dtype=dtype) if wanted else None

    masked, kept, noise, history = (draw.rarely() for _ in range(4))
    table = draw.tensor(steps, draw.one_or(batch), count + len(COLUMNS))
    for name, wanted in (("sigma", noise), ("q", noise), ("h", history)):
        table[..., count + COLUMNS.index(name)] *= wanted
    mask = draw.bits(draw.one_or(batch), *shape[2:]).float() if masked else None
    step = draw.below(steps, 1) if draw.rarely() else None
    copies = draw.tensor(2 * batch, *shape[1:], dtype=dtype) if draw.rarely() else None
    return [
        latents(), [latents() for _ in range(count)], table, step, steps - 1, mask, latents(masked or kept),
        latents(noise), latents(history), draw.bits(batch) if kept else None, latents(), copies, latents(draw.rarely()),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, dtype):
    check(*make(**CASES[case]), dtype)


@pytest.mark.fault(number=2)
def test_rows_beyond_int32_are_computed(tmp_path):
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**31 + 64, dtype=torch.bfloat16)
    far = memory.as_strided((2, 1, 4, 4), (2**31 + 32, 16, 4, 1))
    far.copy_(torch.randn(far.shape))
    table = torch.randn(1, 1, 1 + len(COLUMNS))
    table[..., [1 + COLUMNS.index(x) for x in ("sigma", "h")]] = 0
    results = (step_blend(x, [x], table, 0, backend="cpu") for x in (far, far.contiguous()))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.fault(number=5)
def test_views_at_an_odd_element(dtype):
    (sample, predictions, table), _ = cast(*make(count=2), dtype)
    odd = [torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x) for x in (sample, *predictions)]
    expected = step_blend(sample, predictions, table, 1, backend="cpu")
    assert torch.equal(step_blend(odd[0], odd[1:], table, 1, backend="cpu"), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 20), st.integers(0, 20)),
    count=st.integers(1, 6),
    mask=st.sampled_from([None, "bool", "float"]),
    noise=st.booleans(),
    history=st.booleans(),
    keep=st.booleans(),
    copies=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape, count, mask, noise, history, keep, copies, dtype):
    rows = [i % 2 == 0 for i in range(shape[0])] if keep else None
    options = {"count": count, "mask": mask, "noise": noise, "history": history, "keep": rows, "copies": copies}
    check(*make(shape=shape, **options), dtype)


@pytest.mark.parametrize(
    "step", [1, torch.tensor(1), torch.tensor([1], dtype=torch.int32), torch.tensor([[1]])], ids=lambda s: str(s)
)
def test_step_forms(step):
    arguments, _ = make()
    for by in ("cpu", "reference"):
        assert torch.equal(step_blend(*arguments, step, backend=by), step_blend(*arguments, 1, backend=by))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_out_is_overwritten_and_returned(backend):
    arguments, keywords = make(mask="float", noise=True)
    out = torch.full(arguments[0].shape, math.nan)
    assert step_blend(*arguments, 2, **keywords, out=out, backend=backend) is out
    assert torch.equal(out, step_blend(*arguments, 2, **keywords, backend=backend))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_model_input_is_the_scaled_result_n_times(backend):
    arguments, keywords = make(copies=3, mask="float", rows=2)
    arguments[2][..., -1] = torch.tensor([1.0, 0.25])
    out = step_blend(*arguments, 0, **keywords, backend=backend)
    scaled = out * torch.tensor([1.0, 0.25])[:, None, None, None]
    assert torch.equal(keywords["model_input"], scaled.repeat(3, 1, 1, 1))


def test_a_history_changes_no_other_result():
    arguments, keywords = make(count=4, history=True, copies=1)
    expected = step_blend(*arguments, 0, history=keywords["history"], backend="cpu")
    assert torch.equal(step_blend(*arguments, 0, **keywords, backend="cpu"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_too_large_for_the_caches_are_those_of_the_rows(dtype):
    arguments, keywords = cast(*make(shape=(8, 4, 384, 384), history=True, copies=2), dtype)
    sample, predictions, coefficients = arguments
    written = torch.full_like(sample, math.nan, memory_format=torch.contiguous_format)  # pages of its own already
    found = results(step_blend, arguments, 0, keywords, out=written, backend="cpu")
    assert torch.equal(found["out"], step_blend(*arguments, 0, history=keywords["history"], backend="cpu"))
    for b in range(8):
        row = slice(b, b + 1)
        part = {k: x[row] if k == "history" else torch.empty_like(x[row]) for k, x in keywords.items() if x is not None}
        alone = (sample[row], [x[row] for x in predictions], coefficients)
        for name, x in results(step_blend, alone, 0, part, backend="cpu").items():
            assert torch.equal(found[name][b::8], x.expand_as(found[name][b::8]))


def test_nothing_is_written_around_the_outputs():
    arguments, _ = make(shape=(1, 1, 5, 7))
    memory = torch.full((3, 2 * 35 + 2), math.nan)
    out, history_out = (x[1:36].view(1, 1, 5, 7) for x in memory[:2])
    model_input = memory[2, 1:71].view(2, 1, 5, 7)
    step_blend(*arguments, 0, out=out, history_out=history_out, model_input=model_input, backend="cpu")
    assert memory[:, 0].isnan().all() and memory[:2, 36:].isnan().all() and memory[2, 71].isnan()
    assert memory[:2, 1:36].isfinite().all() and memory[2, 1:71].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 2, 16, 16), (1, 8, 600, 600)], ids=["small", "past-the-caches"])
@pytest.mark.fault(number=5)
def test_misaligned_views_are_read(shape):
    arguments, _ = make(shape=shape)
    elements = math.prod(shape)
    shifted = torch.empty(elements + 1)[1:].view(shape).copy_(arguments[0])
    out = torch.zeros(elements + 1)[1:].view(shape).fill_(math.nan)
    expected = step_blend(*arguments, 0, backend="cpu")
    assert torch.equal(step_blend(shifted, *arguments[1:], 0, out=out, backend="cpu"), expected)


def test_expanded_background_is_read_in_place():
    arguments, keywords = make(mask="float")
    shared = keywords["background"][:1].expand(2, -1, -1, -1)
    expected = step_blend(*arguments, 0, mask=keywords["mask"], background=shared.clone(), backend="cpu")
    assert torch.equal(step_blend(*arguments, 0, mask=keywords["mask"], background=shared, backend="cpu"), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.fault(number=11)
def test_a_tensor_of_coefficient_zero_is_not_read(backend):
    (sample, predictions, coefficients), keywords = make(count=3, mask="float", noise=True, history=True, copies=2)
    columns = [3 + COLUMNS.index(name) for name in ("a", "sigma", "h", "p", "q", "c")]
    coefficients[:, :, [1, *columns]] = 0
    expected = results(step_blend, (sample, predictions, coefficients), 0, keywords, backend=backend)
    expected = {name: x.clone() for name, x in expected.items()}
    for x in (predictions[1], sample, keywords["noise"], keywords["history"], keywords["background"]):
        x.fill_(math.nan)
    found = results(step_blend, (sample, predictions, coefficients), 0, keywords, backend=backend)
    for name, x in found.items():
        assert torch.equal(x, expected[name]) and x.isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("column", "clean"), [("e", "history_out"), ("d", "out")])
@pytest.mark.fault(number=11)
def test_predictions_reach_only_where_e_and_d_let_them(column, clean, backend):
    (sample, predictions, coefficients), keywords = make(history=True)
    coefficients[:, :, 2 + COLUMNS.index(column)] = 0
    predictions[0].fill_(math.nan)
    found = results(step_blend, (sample, predictions, coefficients), 0, keywords, backend=backend)
    assert {name for name, x in found.items() if x.isnan().any()} == {clean}
    coefficients[:, :, [2 + COLUMNS.index(x) for x in "ed"]] = 0
    found = results(step_blend, (sample, predictions, coefficients), 0, keywords, backend=backend)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.fault(number=11)
def test_rows_to_keep_read_the_background_alone(backend):
    (sample, predictions, coefficients), keywords = make(mask="float", noise=True, history=True, copies=2)
    keywords["keep_rows"] = torch.tensor([False, True])
    coefficients[0, 0, 2 + COLUMNS.index("p")], coefficients[0, 0, 2 + COLUMNS.index("q")] = 1, 0
    coefficients[0, 0, -1] = 0.5
    for x in (sample, *predictions, keywords["noise"], keywords["history"]):
        x[1] = math.nan
    found = results(step_blend, (sample, predictions, coefficients), 0, keywords, backend=backend)
    assert torch.equal(found["out"][1], keywords["background"][1])
    assert torch.equal(found["model_input"], 0.5 * found["out"].repeat(2, 1, 1, 1))
    assert (found["history_out"][1] == 0).all()
    del keywords["keep_rows"]
    alone = results(step_blend, (sample, predictions, coefficients), 0, keywords, backend=backend)
    assert torch.equal(found["out"][0], alone["out"][0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("column", "name"), [("sigma", "noise"), ("q", "noise"), ("h", "history")])
@pytest.mark.fault(number=16)
def test_a_missing_tensor_is_not_dropped(column, name, backend):
    arguments, keywords = make(mask="float", rows=2)
    arguments[2][1, 1, 2 + COLUMNS.index(column)] = 1e-3
    step_blend(*arguments, 0, **keywords, backend=backend)
    with pytest.raises(RuntimeError, match=rf"lr_kernels\.step_blend: {name}: expected a tensor, since .* step 1 "):
        step_blend(*arguments, 1, **keywords, backend=backend)
    if column == "q":  # concerns the background alone
        step_blend(*arguments, 1, backend=backend)


@pytest.mark.fault(number=11)
def test_nan_on_the_side_the_mask_does_not_take():
    (sample, predictions, coefficients), keywords = make(mask="bool")
    inside = keywords["mask"][:, None].expand(sample.shape)
    keywords["background"][inside] = math.nan
    predictions[0][~inside] = math.inf
    assert step_blend(sample, predictions, coefficients, 0, **keywords, backend="cpu").isfinite().all()


@pytest.mark.fault(number=12)
def test_live_nan_stays_at_its_element():
    arguments, keywords = make(mask="float", noise=True)
    arguments[1][0][1, 2, 3, 4] = math.nan
    keywords["mask"].clamp_(0.25, 0.75)
    out = step_blend(*arguments, 0, **keywords, backend="cpu")
    assert torch.equal(out.isnan(), reference.step_blend(*arguments, 0, **keywords).isnan())
    assert out.isnan().sum() == 1


@pytest.mark.fault(number=13)
def test_garbage_past_the_tail():
    arguments, _ = make(shape=(1, 1, 3, 7))
    padded = torch.cat([arguments[0].reshape(21), torch.full((19,), math.nan)])
    view = padded[:21].view(1, 1, 3, 7)
    assert torch.equal(step_blend(view, *arguments[1:], 0, backend="cpu"), step_blend(*arguments, 0, backend="cpu"))


@pytest.mark.fault(number=30)
def test_threads_do_not_change_a_bit():
    arguments, keywords = make(shape=(4, 4, 96, 96), mask="float", noise=True, history=True, copies=2)
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = results(step_blend, arguments, 0, keywords, backend="cpu")
            seen.append({name: x.clone() for name, x in found.items()})
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, other[name]) for other in seen[1:] for name, x in seen[0].items())


@pytest.mark.fault(number=31)
def test_permuting_the_batch_permutes_the_result():
    keep = (False, True, False, False)
    arguments, keywords = make(shape=(4, 3, 9, 9), rows=4, mask="float", mask_rows=4, noise=True, keep=keep)
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


# ---- gradients, torch.library and torch.compile ----


@pytest.mark.fault(number=28)
def test_gradients_use_the_reference():
    (sample, predictions, coefficients), keywords = make(mask="float", history=True)
    sample = sample.clone().requires_grad_()
    out = step_blend(sample, predictions, coefficients, 1, **keywords)
    (out.sum() + keywords["history_out"].sum()).backward()
    a, c = (coefficients[1, 0, 2 + COLUMNS.index(x)] for x in "ac")
    expected = (a * keywords["mask"] + c)[:, None].expand(sample.shape)
    assert_matches(sample.grad, expected, expected.double())
    with pytest.raises(NotImplementedError, match=r"step_blend: gradients: .*'cpu'.*'reference'"):
        step_blend(sample, predictions, coefficients, 1, backend="cpu")


def op_arguments(step=None, row=1, **case):
    (sample, predictions, coefficients), keywords = make(**case)
    names = ("mask", "background", "noise", "history", "keep_rows")
    rest = [None if keywords.get(name) is None else keywords[name].contiguous() for name in names]
    outputs = (torch.full(sample.shape, math.nan), *(keywords.get(name) for name in OUTPUTS))
    dense = [x.contiguous() for x in predictions]
    return (sample.contiguous(), dense, coefficients, step, row, *rest, *outputs)


@pytest.mark.parametrize("case", ["one-prediction", "shared-float-mask", "mask-noise", "everything"])
@pytest.mark.fault(number=26)
@pytest.mark.fault(number=27)
def test_passes_opcheck(case):
    op = torch.ops.lr_kernels.step_blend_cpu.default
    torch.library.opcheck(op, op_arguments(**CASES[case]))
    torch.library.opcheck(op, op_arguments(torch.tensor([2], dtype=torch.int32), 0, **CASES[case]))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_the_op_refuses_a_step_outside_the_schedule(wrong):
    for step, row in ((None, wrong), (torch.tensor([wrong], dtype=torch.int32), 0)):
        with pytest.raises(RuntimeError, match="step: expected 0 to 2"):
            torch.ops.lr_kernels.step_blend_cpu(*op_arguments(step, row))


WRONG = {  # argument of the op: what it must refuse, since it would read or write out of bounds
    0: lambda x: x[0],
    1: lambda x: [x[0], x[1][:, :, :-1]],
    2: lambda x: x[..., :-1].contiguous(),
    5: lambda x: x[:, :-1].contiguous(),
    6: lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    7: lambda x: x.bfloat16(),
    10: lambda x: x[:, ::2],
    11: lambda x: x[:-1],
    12: lambda x: x.double(),
}


@pytest.mark.parametrize("place", WRONG)
@pytest.mark.fault(number=45)
def test_the_op_refuses_what_does_not_fit(place):
    op = torch.ops.lr_kernels.step_blend_cpu.default
    arguments = list(op_arguments(**CASES["everything"]))
    op(*arguments)
    arguments[place] = WRONG[place](arguments[place])
    name = op._schema.arguments[place].name
    wrong = f"{name}[1]" if name == "predictions" else name
    with pytest.raises(RuntimeError, match=rf"lr_kernels\.step_blend: {re.escape(wrong)}: expected"):
        op(*arguments)


@pytest.mark.fault(number=29)
def test_compiles_without_breaks_or_recompiles():
    arguments, keywords = make(mask="float", noise=True, history=True, keep=(False, True), copies=2)
    sample, predictions, coefficients = arguments
    compiled = torch.compile(step_blend, fullgraph=True, backend="aot_eager")
    compiled(*arguments, torch.tensor(0), **keywords)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            blended = (sample, predictions, coefficients * (step + 1))
            other = keywords | {
                "mask": (keywords["mask"] + 0.1 * step).clamp(max=1),
                "keep_rows": torch.tensor([step == 1, False]),
            }
            expected = results(step_blend, blended, step, other)
            expected = {name: x.clone() for name, x in expected.items()}
            found = results(compiled, blended, torch.tensor(step), other)
            assert all(torch.equal(x, expected[name]) for name, x in found.items())


@pytest.mark.fault(number=29)
def test_int_steps_recompile_once():
    arguments, _ = make(steps=6)
    compiled = torch.compile(step_blend, fullgraph=True, backend="aot_eager")
    compiled(*arguments, 2)
    compiled(*arguments, 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (4, 5):
            assert torch.equal(compiled(*arguments, step), step_blend(*arguments, step))
