"""Sources whose keys and values are in 8 bits: a call is that on their dequantized numbers, on every backend."""

import math
import os
import subprocess
import sys

import pytest
import torch
from attention_oracle import attention
from eight_bit_inputs import as_numbers, in_8_bits, problem
from torch import Tensor

from lr_kernels import Source, multi_source_attention, plan_attention, quantize, reference
from lr_kernels.attention.prepare import prepare
from lr_kernels.attention.tables import lay_out
from lr_kernels.testing import (
    CASES,
    EXTREMES,
    AttentionCase,
    AttentionInputs,
    assert_matches,
    check_attention,
    extreme_inputs,
)

INT8, E4M3 = torch.int8, torch.float8_e4m3fn
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OP = r"lr_kernels\.multi_source_attention: "
OPS = torch.ops.lr_kernels
BY_ID = {case.id: case for case in CASES}


def equals_the_call_on_numbers(inputs: AttentionInputs, backend: str = "cpu", **options) -> Tensor:
    """Bit for bit, out and lse; returns out."""
    plain = [as_numbers(s, inputs.query.dtype) for s in inputs.sources]
    one_group = len({s.softmax_group for s in plain}) == 1
    options = {"query_groups": inputs.query_groups, "return_lse": one_group, "backend": backend, **options}
    found, expected = (multi_source_attention(inputs.query, x, **options) for x in (inputs.sources, plain))
    for x, y in zip(*((found, expected) if one_group else ((found,), (expected,)))):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    return found[0] if one_group else found


@pytest.mark.parametrize("kind", [INT8, E4M3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.fault(number=1)
def test_a_call_is_that_on_the_dequantized_numbers(case, dtype, kind):
    """Masks, groups, rows, biases, strengths, value_index, several softmax groups; all sources in 8 bits, and some."""
    for kinds in ((kind,), (None, kind), (kind, None, E4M3, INT8)):
        equals_the_call_on_numbers(problem(case, dtype, *kinds))


@pytest.mark.parametrize("kind", [INT8, E4M3], ids=str)
@pytest.mark.parametrize("case_id", ["shared-reference", "d37", "everything", "everything-grouped"])
@pytest.mark.fault(number=1)
def test_matches_the_reference_in_float64(case_id, kind):
    for dtype in DTYPES:
        inputs = problem(BY_ID[case_id], dtype, kind, None)
        check_attention(lambda *a, **k: multi_source_attention(*a, backend="cpu", **k), inputs)


def test_in_float64_nothing_is_rounded():
    inputs = problem(BY_ID["everything"], torch.float64, INT8, E4M3)
    found = multi_source_attention(inputs.query, inputs.sources, query_groups=inputs.query_groups)
    for s in inputs.sources:
        assert s.key.element_size() == 1
    exact = [
        s._replace(
            key=s.key.double() * s.key_scale.double()[..., None],
            value=s.value.double() * s.value_scale.double()[..., None], key_scale=None, value_scale=None,
        )
        for s in inputs.sources
    ]  # fmt: skip
    truth = torch.from_numpy(attention(inputs.query, exact, inputs.query_groups)[0])
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("head_dim", range(1, 257))
@pytest.mark.fault(number=23)
def test_every_head_dim(head_dim):
    case = AttentionCase("", batch=1, queries=20, heads=1, head_dim=head_dim, keys=(11, 6), rows=(None, 1), visible=0.7)
    equals_the_call_on_numbers(problem(case, DTYPES[head_dim % 3], *((INT8, E4M3) if head_dim % 2 else (E4M3, INT8))))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
@pytest.mark.fault(number=1)
def test_every_instruction_set(isa):
    """LR_KERNELS_ISA is read once, so each runs in its own process; one that is missing falls to the best there is."""
    code = (
        "from test_eight_bit import *\n"
        "for case in CASES[::2]:\n"
        "    for dtype in DTYPES:\n"
        "        equals_the_call_on_numbers(problem(case, dtype, INT8, E4M3, None))\n"
        "for dtype in DTYPES:\n"
        "    test_every_pattern_of_bits(dtype)\n"
        "    test_products_that_are_subnormal(dtype)\n"
    )
    environment = {**os.environ, "LR_KERNELS_ISA": isa, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=os.path.dirname(__file__))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.fault(number=1)
def test_long_sources_cross_blocks_and_tiles(dtype):
    case = AttentionCase("", batch=1, queries=1100, heads=1, keys=(1000, 700), rows=(None, 1), visible=0.6)
    equals_the_call_on_numbers(problem(case, dtype, INT8, E4M3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.fault(number=12)
def test_every_pattern_of_bits(dtype):
    """A query that sees one key gets its value: all 256 patterns, as torch converts them, with and without NaN."""
    for kind in (INT8, E4M3):
        every = torch.arange(256).to(torch.uint8)
        for bits in (every.view(kind), torch.where(every & 0x7F == 0x7F, 0, every).view(kind)):
            value = bits.repeat(5, 1)[None, :, None, :]  # (1, 5, 1, 256)
            scale = torch.tensor([1.0, -0.3, 0.0, 2.0**118.9, -(2.0**119)])[None, :, None]
            zero = torch.zeros_like(value.view(torch.int8)).view(kind)
            source = Source(zero, value, key_scale=scale, value_scale=scale)
            query, see = torch.zeros(1, 5, 1, 256, dtype=dtype), (2 ** torch.arange(5))[None].to(torch.uint8)
            source = source._replace(key_groups=see)
            out = multi_source_attention(query, [source], query_groups=see, backend="cpu")
            expected = (bits.float() * scale[..., None]).to(dtype)
            torch.testing.assert_close(out, expected.view(out.shape), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_that_are_subnormal(dtype):
    for kind, factor in ((INT8, 1e-38), (E4M3, 1e-37), (INT8, 1e-7), (E4M3, 1e-45)):
        inputs = problem(BY_ID["shared-reference"], dtype, kind)
        inputs.sources = [s._replace(value_scale=s.value_scale * factor) for s in inputs.sources]
        equals_the_call_on_numbers(inputs)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.fault(number=4)
def test_scales_of_any_shape_and_strides(backend, device):
    """One for all, one per head, one per token; permuted and sliced; zero and negative ones. Odd rows of bits."""
    on = device if backend == "triton" else "cpu"
    query = torch.randn(2, 20, 3, 24, device=on)
    wide = torch.randint(-128, 128, (2, 31, 3, 25), dtype=torch.int8, device=on)
    bits = wide[:, :, :, 1:]
    scales = [torch.randn(shape, device=on) / 50 for shape in ((1, 1, 1), (2, 1, 1), (1, 31, 1), (1, 1, 3), (2, 31, 3))]
    scales += [(torch.randn(3, 62, 2, device=on) / 50).permute(2, 1, 0)[:, 1::2], torch.zeros(2, 31, 3, device=on)]
    scales += [torch.full((), 0.02, device=on).expand(2, 31, 3)]
    for key_scale, value_scale in zip(scales, [*scales[1:], scales[0]]):
        source = Source(bits, bits, key_scale=key_scale, value_scale=value_scale)
        equals_the_call_on_numbers(AttentionInputs(query, [source]), backend)


@pytest.mark.parametrize("extreme", [x for x in EXTREMES if x[0] == "products"] + [("logit_bias", -1e30)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.fault(number=14)
def test_extreme_logits(extreme, dtype):
    """The walk in double reads 8 bits too."""
    inputs = extreme_inputs(extreme, dtype, keys=(70, 45), rows=(None, 1), visible=0.8)
    for kinds in ((INT8, E4M3), (None, INT8)):
        sources = [s if kind is None else in_8_bits(s, kind) for s, kind in zip(inputs.sources, kinds)]
        equals_the_call_on_numbers(AttentionInputs(inputs.query, sources))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("where", ["key", "value", "key_scale", "value_scale"])
@pytest.mark.fault(number=12)
def test_nan_reaches_only_queries_that_see_it(where, backend, device):
    on = device if backend == "triton" else "cpu"
    inputs = problem(AttentionCase("", batch=1, queries=20, groups=2, keys=(20, 30)), torch.bfloat16, E4M3, INT8)
    source = inputs.sources[0]
    poisoned = getattr(source, where).clone()
    poisoned.view(torch.uint8 if where in ("key", "value") else torch.float32)[0, 5, 0] = (
        0x7F if where in ("key", "value") else math.nan
    )
    source = source._replace(**{where: poisoned})
    move = lambda s: Source._make(x.to(on) if isinstance(x, Tensor) else x for x in s)  # noqa: E731
    out = multi_source_attention(
        inputs.query.to(on), [move(source), move(inputs.sources[1])], query_groups=inputs.query_groups.to(on),
        backend=backend,
    ).cpu()  # fmt: skip
    sees = (inputs.query_groups[0] & source.key_groups[0, 5]) != 0
    assert out[0, sees, 0].isnan().any(-1).all() and sees.any() and not sees.all()
    assert out[0, ~sees].isfinite().all() and out[0, :, 1].isfinite().all()


def test_nan_in_hidden_8_bit_keys_is_ignored():
    inputs = problem(AttentionCase("", visible=0.5), torch.bfloat16, E4M3)
    clean = equals_the_call_on_numbers(inputs)
    for s in inputs.sources:
        hidden = ~s.key_mask.expand(s.key.shape[0], -1)
        s.key.view(torch.uint8)[hidden], s.value_scale[hidden] = 0x7F, math.nan
    assert torch.equal(equals_the_call_on_numbers(inputs), clean)


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("mixed", batch=1, queries=20, heads=1, head_dim=37, keys=(70, 20), rows=(None, 1)),
        AttentionCase("masked", queries=20, heads=1, head_dim=80, keys=(40, 33), groups=2, visible=0.6),
        AttentionCase("grouped", batch=1, queries=20, keys=(20, 33, 9), rows=(None, 1, 1), head_dim=16,
                      key_bias=True, logit_scale=(1.0, -0.5, 0.7), value_index=True, softmax_groups=(0, 1, 1)),
    ],
    ids=lambda c: c.id,
)  # fmt: skip
@pytest.mark.parametrize("kinds", [(INT8,), (E4M3, None), (None, INT8, E4M3)], ids=str)
@pytest.mark.fault(number=1)
def test_triton_matches_the_reference(case, kinds, device):
    for dtype in DTYPES:
        inputs = problem(case, dtype, *kinds)
        on = AttentionInputs(
            inputs.query.to(device),
            [Source._make(x.to(device) if isinstance(x, Tensor) else x for x in s) for s in inputs.sources],
            None if inputs.query_groups is None else inputs.query_groups.to(device),
        )
        check_attention(lambda *a, **k: multi_source_attention(*a, backend="triton", **k), on)
        if device == "cpu":  # the interpreter's tiles are the same
            equals_the_call_on_numbers(on, "triton")


def test_triton_computes_extreme_logits_again(device):
    inputs = problem(AttentionCase("", batch=1, queries=20, heads=1, keys=(40, 20)), torch.float32, INT8, None)
    first = inputs.sources[0]
    inputs.sources[0] = first._replace(key_scale=first.key_scale * 1e18)
    inputs = AttentionInputs(inputs.query.to(device) * 1e18, [
        Source._make(x.to(device) if isinstance(x, Tensor) else x for x in s) for s in inputs.sources
    ])  # fmt: skip
    check_attention(lambda *a, **k: multi_source_attention(*a, backend="triton", **k), inputs)


# ---- modes of PyTorch


def test_passes_opcheck(device):
    inputs = problem(BY_ID["shared-reference"], torch.bfloat16, None, INT8)
    if device == "cpu":
        tables = lay_out(inputs.query, inputs.sources, plan_attention([None] * 2), 0.3)
        for backend in ("cpu", "triton"):
            out, lse = torch.full_like(inputs.query, math.nan), torch.full(inputs.query.shape[:3], math.nan)
            out = out.contiguous()
            torch.library.opcheck(
                getattr(OPS, f"multi_source_attention_{backend}").default, (inputs.query, *tables, out, lse)
            )


def test_compiles_without_break_or_recompile():
    inputs = problem(BY_ID["groups-2"], torch.bfloat16, None, INT8)

    def layer(query, own, key, value, key_scale, value_scale):
        key, value = key.clone(), value.clone()
        eight = Source(key, value, key_scale=key_scale, value_scale=value_scale)
        return multi_source_attention(query, [own, eight])

    def whole(x):
        return Source(*quantize(x)[:1], quantize(x)[0], key_scale=quantize(x)[1], value_scale=quantize(x)[1])

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    own, s = Source(*inputs.sources[0][:2]), inputs.sources[1]
    arguments = (inputs.query, own, s.key, s.value, s.key_scale, s.value_scale)
    assert torch.equal(compiled(*arguments), layer(*arguments))
    x = torch.randn(1, 9, 2, 8)
    for found, expected in zip(torch.compile(whole, fullgraph=True, backend="aot_eager")(x), whole(x)):
        assert found is expected or torch.equal(found, expected)


def test_autocast_leaves_8_bits_alone():
    inputs = problem(BY_ID["shared-reference"], torch.float32, None, INT8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = multi_source_attention(inputs.query, inputs.sources)
    own = inputs.sources[0]
    own = own._replace(key=own.key.bfloat16(), value=own.value.bfloat16())
    assert torch.equal(found, multi_source_attention(inputs.query.bfloat16(), [own, inputs.sources[1]]))


@pytest.mark.fault(number=28)
def test_gradients_are_those_of_the_reference():
    inputs = problem(BY_ID["shared-reference"], torch.float32, None, INT8)
    own, eight = inputs.sources

    def gradients(as_8_bits: bool, **options) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.query, own.key, eight.key_scale)]
        query, key, scale = leaves
        source = eight._replace(key_scale=scale)
        sources = [own._replace(key=key), source if as_8_bits else as_numbers(source, torch.float32)]
        return torch.autograd.grad(multi_source_attention(query, sources, **options).square().sum(), leaves)

    expected = gradients(False, backend="reference")
    for found, wanted in zip(gradients(True), expected):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("what", ["query", "key_scale", "value_scale"])
@pytest.mark.fault(number=16)
def test_gradients_are_refused_by_name(what, backend, device):
    inputs = problem(BY_ID["shared-reference"], torch.float32, None, INT8)
    query, (own, eight) = inputs.query, inputs.sources
    if what == "query":
        query = query.clone().requires_grad_()
    else:
        eight = eight._replace(**{what: getattr(eight, what).clone().requires_grad_()})
    with pytest.raises(NotImplementedError, match=OP + r"gradients beside an 8-bit key\[1\]: not supported by backend"):
        multi_source_attention(query, [own, eight], backend=backend)
    with torch.no_grad():
        multi_source_attention(query, [own, eight], backend="cpu")


# ---- what is refused

X = torch.randn(2, 5, 2, 8)
EIGHT = in_8_bits(Source(X, X), INT8)
WRONG = {
    "no key_scale": (EIGHT._replace(key_scale=None), ValueError,
                     r"key_scale\[0\]: expected a tensor, since key\[0\] is torch.int8, got None"),
    "no value_scale": (EIGHT._replace(value_scale=None), ValueError, r"value_scale\[0\]: expected a tensor, since"),
    "a scale alone": (Source(X, X, key_scale=torch.ones(1, 1, 1)), ValueError,
                      r"key_scale\[0\]: expected None, since key\[0\] is torch.float32, got a tensor"),
    "a scale of values alone": (Source(X, X, value_scale=torch.ones(1, 1, 1)), ValueError, r"value_scale\[0\]: expec"),
    "two kinds": (EIGHT._replace(value=X.to(E4M3)), TypeError,
                  r"value\[0\]: expected torch.int8 as key\[0\], got torch.float8_e4m3fn"),
    "plain values": (EIGHT._replace(value=X), TypeError, r"value\[0\]: expected torch.int8 as key\[0\], got torch.fl"),
    "plain keys": (EIGHT._replace(key=X), TypeError, r"value\[0\]: expected torch.float32 as key\[0\], got torch.int8"),
    "uint8": (EIGHT._replace(key=EIGHT.key.view(torch.uint8)), TypeError,
              r"key\[0\]: expected torch.float32, torch.int8, torch.float8_e4m3fn, got torch.uint8"),
    "e5m2": (EIGHT._replace(key=X.to(torch.float8_e5m2)), TypeError, r"key\[0\]: .*got torch.float8_e5m2"),
    "e4m3fnuz": (EIGHT._replace(value=X.to(torch.float8_e4m3fnuz)), TypeError, r"value\[0\]: .*got torch.float8_e4m3f"),
    "no tensor": (EIGHT._replace(key_scale=0.1), TypeError, r"key_scale\[0\]: expected a tensor or None, got float"),
    "two dimensions": (EIGHT._replace(key_scale=torch.ones(5, 2)), ValueError,
                       r"key_scale\[0\]: expected shape \(2 or 1, 5 or 1, 2 or 1\), got \(5, 2\)"),
    "other tokens": (EIGHT._replace(value_scale=torch.ones(2, 4, 2)), ValueError, r"value_scale\[0\]: expected shape"),
    "a scale in bf16": (EIGHT._replace(key_scale=EIGHT.key_scale.bfloat16()), TypeError,
                        r"key_scale\[0\]: expected torch.float32, got torch.bfloat16"),
    "a scale elsewhere": (EIGHT._replace(key_scale=EIGHT.key_scale.to("meta")), ValueError,
                          r"key_scale\[0\]: expected cpu, got meta"),
    "a sparse scale": (EIGHT._replace(key_scale=EIGHT.key_scale.to_sparse()), ValueError,
                       r"key_scale\[0\]: expected a dense tensor"),
    "int16": (Source(X.short(), X.short()), TypeError, r"key\[0\]: expected torch.float32, got torch.int16; cast all"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.fault(number=17)
def test_what_does_not_fit_is_refused(name):
    source, error, message = WRONG[name]
    for backend in ("auto", "cpu", "reference"):
        with pytest.raises(error, match=OP + message):
            multi_source_attention(X, [source], backend=backend)


@pytest.mark.parametrize("query", [X.to(torch.int8), X.to(E4M3)], ids=["int8", "e4m3"])
@pytest.mark.fault(number=17)
def test_a_query_in_8_bits_is_refused(query):
    with pytest.raises(TypeError, match=OP + "query: expected one of float32, float16, bfloat16, float64, got torch"):
        multi_source_attention(query, [EIGHT])


def test_a_lazy_scale_is_written_out():
    lazy = EIGHT._replace(key_scale=torch._neg_view(-EIGHT.key_scale))
    assert torch.equal(multi_source_attention(X, [lazy]), multi_source_attention(X, [EIGHT]))
    zero = EIGHT._replace(value_scale=torch._efficientzerotensor((1, 1, 1)))
    assert (multi_source_attention(X, [zero]) == 0).all()


@pytest.mark.fault(number=44)
def test_numbers_that_the_reference_would_write_out_count_against_the_memory():
    bits = torch.zeros(1, 1, 1, 256, dtype=torch.int8).expand(2**20, 2**12, 2, 256)
    source = Source(bits, bits, torch.zeros(1).int(), key_scale=torch.ones(1, 1, 1), value_scale=torch.ones(1, 1, 1))
    with pytest.raises(ValueError, match=OP + "backend 'reference': expected a call that fits the memory"):
        prepare(torch.zeros(1, 1, 2, 256), [source], None, None, False, None, "reference")


# ---- quantize


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kind", "largest", "error"), [(INT8, 127, 1 / 254), (E4M3, 448, 1 / 28)], ids=["int8", "e4m3"]
)
def test_quantize_keeps_a_number_of_each_token_and_head(dtype, kind, largest, error):
    x = torch.randn(2, 9, 3, 16).to(dtype)
    x[0, 4, 1] = 0
    bits, scale = quantize(x, kind)
    top = x.float().abs().amax(-1)
    assert bits.dtype == kind and bits.shape == x.shape and scale.dtype == torch.float32 and scale.shape == (2, 9, 3)
    assert (bits.float().abs().amax(-1) == torch.where(top > 0, largest, 0)).all()
    assert (bits[0, 4, 1].float() == 0).all() and scale[0, 4, 1] == 0
    torch.testing.assert_close(scale, top / largest, rtol=0, atol=0)
    assert ((bits.float() * scale[..., None] - x.float()).abs() <= error * 1.001 * top[..., None]).all()


def test_quantize_rounds_ties_to_even():
    x = torch.tensor([127.0, 0.5, 1.5, -2.5, 3.5, -0.5]).view(1, 1, 1, 6)
    assert quantize(x)[0].flatten().tolist() == [127, 0, 2, -2, 4, 0]
    x = torch.tensor([448.0, 17.0, 19.0, -1.0625, -1.1875]).view(1, 1, 1, 5)
    assert quantize(x, E4M3)[0].float().flatten().tolist() == [448, 16, 20, -1, -1.25]


def test_quantize_takes_the_smallest_and_the_largest_numbers():
    for size in (1e-45, 1e-39, 3e38):
        for kind in (INT8, E4M3):
            bits, scale = quantize(size * torch.tensor([[[[1.0, -1.0, 0.5]]]]), kind)
            assert (bits.float() * scale[..., None]).isfinite().all()
    assert quantize(torch.zeros(2, 0, 3, 4))[1].shape == (2, 0, 3)


def test_quantize_makes_sources_of_half_the_bytes_that_match():
    query, key, value = (torch.randn(1, 64, 2, 128).bfloat16() for _ in range(3))
    eight = in_8_bits(Source(key, value), INT8)
    assert eight.key.nbytes + eight.key_scale.nbytes == key.nbytes * (128 + 4) // 256
    truth = reference.multi_source_attention(query.double(), [Source(key.double(), value.double())])
    error = (multi_source_attention(query, [eight]).double() - truth).norm() / truth.norm()
    assert error < 0.02
    assert_matches(multi_source_attention(query, [eight]), reference.multi_source_attention(query, [eight]),
                   reference.multi_source_attention(query.double(), [eight]))  # fmt: skip


QUANTIZE = {
    "list": (([1.0],), TypeError, "x: expected a tensor, got list"),
    "three dimensions": ((torch.ones(2, 3, 4),), ValueError, r"x: expected shape \(rows, tokens, heads, head_dim\)"),
    "no channels": ((torch.ones(2, 3, 4, 0),), ValueError, "x: expected shape"),
    "integers": ((torch.ones(1, 1, 1, 1).int(),), TypeError, "x: expected one of float32, float16, bfloat16, float64"),
    "8 bits": ((X.to(E4M3),), TypeError, "x: expected one of float32.*got torch.float8_e4m3fn"),
    "uint8": ((X, torch.uint8), ValueError, "dtype: expected one of torch.int8, torch.float8_e4m3fn, got torch.uint8"),
    "a name": ((X, "int8"), ValueError, "dtype: expected one of torch.int8, torch.float8_e4m3fn, got 'int8'"),
    "infinity": (
        (torch.full((1, 1, 1, 2), math.inf),),
        ValueError,
        "x: expected finite numbers, got infinities or NaN",
    ),
    "NaN": ((torch.full((1, 1, 1, 2), math.nan),), ValueError, "x: expected finite numbers"),
    "gradient": ((X.clone().requires_grad_(),), NotImplementedError, "x: expected a tensor without gradient"),
    "sparse": ((X.to_sparse(),), ValueError, "x: expected a dense tensor"),
}


@pytest.mark.parametrize("name", QUANTIZE)
def test_quantize_refuses(name):
    arguments, error, message = QUANTIZE[name]
    with pytest.raises(error, match=r"lr_kernels\.quantize: " + message):
        quantize(*arguments)


def test_a_token_that_is_not_finite_stays_so_where_nobody_looks():
    """As on a GPU: under torch.compile."""
    x = torch.randn(1, 3, 1, 8)
    x[0, 1, 0, 2] = math.inf
    for kind in (INT8, E4M3):
        bits, scale = torch.compile(quantize, fullgraph=True, backend="aot_eager")(x, kind)
        numbers = bits.float() * scale[..., None]
        assert numbers[0, 1].isnan().all() and numbers[0, ::2].isfinite().all()
