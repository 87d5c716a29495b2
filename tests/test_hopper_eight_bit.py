"""The Hopper attention on sources in 8 bits, on the emulator: a call is that on their dequantized numbers."""

from dataclasses import replace

import emulated
import pytest
import torch
from eight_bit_inputs import as_numbers, in_8_bits, problem
from emulated import Timing
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hopper import DTYPES, HEAD_DIMS, TIMINGS, as_it_is, call, check, drawn_cases, in_turn, shifted

from lr_kernels import Source
from lr_kernels.attention import hopper
from lr_kernels.testing import CASES, EXTREMES, AttentionCase, AttentionInputs, extreme_inputs

INT8, E4M3 = torch.int8, torch.float8_e4m3fn
KINDS = ((INT8,), (E4M3,), (None, INT8), (E4M3, None), (INT8, E4M3))
"""Of the sources in turn; None: not in 8 bits."""


def equals_the_call_on_numbers(inputs: AttentionInputs, timing: Timing = TIMINGS[0]) -> None:
    """Bit for bit. Every source has a key_bias, so that both calls are of the general kind."""
    sources = [s._replace(key_bias=torch.zeros(1, s.key.shape[1])) if s.key_bias is None else s for s in inputs.sources]
    plain = [as_numbers(s, inputs.query.dtype) for s in sources]
    found, expected = (
        emulated.attend(inputs.query, x, inputs.query_groups, return_lse=True, timing=timing) for x in (sources, plain)
    )
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.id for case in CASES])
@pytest.mark.fault(number=1)
def test_a_call_is_that_on_the_dequantized_numbers(number):
    """With one softmax group, since the result of several has no lse."""
    case = replace(CASES[number], head_dim=in_turn(HEAD_DIMS, number), softmax_groups=None)
    for turn in (number, number + 2):
        inputs = problem(case, in_turn(DTYPES, turn), *in_turn(KINDS, turn))
        equals_the_call_on_numbers(inputs, in_turn(TIMINGS, turn))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.fault(number=1)
def test_matches_the_specification_in_every_configuration(head_dim):
    first = HEAD_DIMS.index(head_dim)
    shape = {"batch": 2, "queries": 131, "heads": 2, "head_dim": head_dim}
    cases = (
        AttentionCase("dense", **shape, keys=(300, 70), rows=(None, 1)),
        AttentionCase("listed", **shape, keys=(290, 170), rows=(None, (1, -1)), visible=0.6, groups=2),
        AttentionCase("moved", **shape, keys=(150, 40), rows=(None, 1), value_index=True, key_bias=True),
        AttentionCase("softmaxes", **shape, keys=(150, 40), rows=(None, 1), softmax_groups=(0, 1)),
    )
    for turn, case in enumerate((*cases, *cases), first):
        check(problem(case, in_turn(DTYPES, turn), *in_turn(KINDS, turn)), in_turn(TIMINGS, turn))


@pytest.mark.parametrize("head_dim", [d for d in range(8, 257, 8) if d not in HEAD_DIMS])
@pytest.mark.fault(number=23)
def test_every_head_dim(head_dim):
    case = AttentionCase("any", batch=1, queries=20, heads=2, head_dim=head_dim, keys=(270, 45))
    equals_the_call_on_numbers(problem(case, in_turn(DTYPES, head_dim // 8), INT8, E4M3))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=drawn_cases(), dtype=st.sampled_from(DTYPES), kinds=st.sampled_from(KINDS), timing=st.sampled_from(TIMINGS))
def test_drawn_shapes(case, dtype, kinds, timing):
    check(problem(case, dtype, *kinds), timing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.fault(number=12)
def test_every_pattern_of_bits(dtype):
    """A query that sees one key gets its value: all 256 patterns, as torch converts them."""
    for kind in (INT8, E4M3):
        bits = torch.arange(256).to(torch.uint8).view(kind)
        value = bits.repeat(3, 1)[None, :, None, :]  # (1, 3, 1, 256)
        scale = torch.tensor([1.0, -0.3, 0.0])[None, :, None]
        source = Source(torch.zeros_like(value.view(torch.int8)).view(kind), value, key_scale=scale, value_scale=scale)
        query, see = torch.zeros(1, 3, 1, 256, dtype=dtype), torch.tensor([[1, 2, 4]], dtype=torch.uint8)
        out = emulated.attend(query, [source._replace(key_groups=see)], see)
        expected = (bits.float() * scale[..., None]).to(dtype)
        torch.testing.assert_close(out, expected.view(out.shape), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
@pytest.mark.fault(number=14)
def test_numbers_that_leave_fp32(extreme):
    inputs = extreme_inputs(extreme, torch.bfloat16, head_dim=64, batch=1, heads=1)
    numbers = [in_8_bits(s, INT8) for s in inputs.sources]
    check(AttentionInputs(inputs.query, numbers, inputs.query_groups))


@pytest.mark.parametrize("where", ["key", "value", "key_scale", "value_scale"])
@pytest.mark.fault(number=12)
def test_nan_reaches_those_who_see_it(where):
    inputs = problem(AttentionCase("nan", head_dim=64, visible=0.6), torch.bfloat16, E4M3)
    source = inputs.sources[0]
    seen = int(source.key_mask[0].nonzero()[0])
    if where in ("key", "value"):
        getattr(source, where).view(torch.uint8)[0, seen, 1, 3] = 0x7F
    else:
        getattr(source, where)[0, seen, 1] = torch.nan
    check(inputs)


@pytest.mark.fault(number=11)
def test_hidden_keys_do_not_matter():
    inputs = problem(AttentionCase("hidden", head_dim=64, visible=0.5, rows=(1, 1)), torch.bfloat16, E4M3)
    expected = emulated.attend(inputs.query, inputs.sources)
    for source in inputs.sources:
        hidden = ~source.key_mask[0]
        source.key.view(torch.uint8)[:, hidden] = 0x7F
        source.value_scale[:, hidden] = torch.nan
    assert torch.equal(emulated.attend(inputs.query, inputs.sources), expected)


@pytest.mark.fault(number=4)
def test_views_and_scales_of_any_strides():
    wide = in_8_bits(Source(torch.randn(2, 90, 2, 192), torch.randn(2, 90, 2, 192)), INT8)
    query = torch.randn(2, 70, 2, 64).bfloat16()
    scales = [torch.rand(shape) for shape in ((1, 1, 1), (2, 1, 1), (1, 90, 1), (1, 1, 2), (2, 90, 2))]
    scales += [torch.rand(4, 90, 2).permute(2, 1, 0)[:, :, 1:3], torch.tensor(0.02).expand(2, 90, 2)]
    for i, scale in enumerate(scales):
        first = 8 * i  # rows at multiples of 8 bytes
        key, value = wide.key[..., first : first + 64], wide.value[:, :, :1, first : first + 64].expand(-1, -1, 2, -1)
        source = Source(key, value, key_scale=scale, value_scale=scales[i - 1])
        assert hopper.lacks(query, [source], False, True) == []
        equals_the_call_on_numbers(AttentionInputs(query, [source], None))


def test_same_bits_in_every_order_of_events():
    case = AttentionCase("bits", batch=2, queries=150, head_dim=64, keys=(300, 70), rows=(None, 1), visible=0.6)
    inputs = problem(case, torch.bfloat16, INT8, E4M3)
    expected = emulated.attend(inputs.query, inputs.sources)
    for timing in (Timing(1), Timing(2, 1), Timing(2, 2, 1), Timing(0, 3, 5)):
        assert torch.equal(emulated.attend(inputs.query, inputs.sources, timing=timing), expected)


def test_a_call_goes_to_the_op_as_it_is():
    arguments = call()
    first, *others = arguments["sources"]
    for kind in (INT8, E4M3):
        sources = [in_8_bits(first, kind), *others]
        expected = emulated.attend(arguments["query"], sources, return_lse=True)
        found = as_it_is(**{**arguments, "sources": sources, "return_lse": True})
        assert all(map(torch.equal, found, expected))


@pytest.mark.fault(number=16)
def test_rows_off_8_bytes_are_refused_or_copied():
    query = torch.randn(1, 5, 2, 64).bfloat16()
    odd = in_8_bits(Source(torch.randn(1, 7, 2, 68), torch.randn(1, 7, 2, 68)), INT8)
    narrow = odd._replace(key=odd.key[..., :64], value=odd.value[..., :64])
    assert hopper.lacks(query, [narrow], False, True) == [
        f"{name}[0] whose rows do not start at multiples of 8 bytes" for name in ("key", "value")
    ]
    with pytest.raises(RuntimeError, match="got key whose rows are not at multiples of 8 numbers"):
        emulated.attend(query, [narrow])
    start = in_8_bits(Source(shifted(1, 7, 2, 64), shifted(1, 7, 2, 64)), INT8)
    moved = start._replace(key=torch.cat([torch.zeros(1).char(), start.key.flatten()])[1:].view(start.key.shape))
    assert torch.equal(emulated.attend(query, [moved]), emulated.attend(query, [start]))
