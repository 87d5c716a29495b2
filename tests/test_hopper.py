"""The Hopper attention (CUDA C++) without a card: its kernels on the emulator, against the specification.

tests/test_hopper_faults.py shows that the emulator finds faults, tests/test_cuda_compile.py what nvcc makes of the
kernels. On a card, tests/test_gpu.py runs them.
"""

import functools
from dataclasses import replace

import emulated
import pytest
import torch
from eight_bit_inputs import in_8_bits
from emulated import Timing
from hypothesis import given, settings
from hypothesis import strategies as st

from lr_kernels import Source, multi_source_attention, plan_attention
from lr_kernels.attention import hopper
from lr_kernels.attention.tables import lay_out
from lr_kernels.runtime import ops
from lr_kernels.testing import (
    CASES,
    EXTREMES,
    AttentionCase,
    attention_inputs,
    check_attention,
    extreme_inputs,
)

HEAD_DIMS = (40, 64, 80, 128, 160, 256)
"""Those of the configurations; all others are computed in the next larger one."""
DTYPES = (torch.bfloat16, torch.float16)
TIMINGS = (
    Timing(0), Timing(1), Timing(2, seed=1), Timing(2, seed=2, multiprocessors=2), Timing(0, seed=3, parts=2),
    Timing(2, seed=4, parts=3), Timing(1, multiprocessors=1),
)  # fmt: skip
"""How the hardware may behave; the cases take them in turn."""


def check(inputs, timing: Timing = TIMINGS[0], **keywords) -> None:
    check_attention(functools.partial(emulated.attend, timing=timing), inputs, **keywords)


def in_turn(choices, number: int):
    return choices[number % len(choices)]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.id for case in CASES])
@pytest.mark.fault(number=1)
def test_cases_in_every_configuration(number, head_dim):
    turn = number + HEAD_DIMS.index(head_dim)
    inputs = attention_inputs(replace(CASES[number], head_dim=head_dim), in_turn(DTYPES, turn))
    check(inputs, in_turn(TIMINGS, turn + number // len(TIMINGS)))


@pytest.mark.parametrize("kind", [{}, {"visible": 0.5}, {"key_bias": True}], ids=["dense", "listed", "biased"])
@pytest.mark.parametrize("head_dim", [d for d in range(8, 257, 8) if d not in HEAD_DIMS])
@pytest.mark.fault(number=23)
def test_every_head_dim(head_dim, kind):
    case = AttentionCase("any", batch=1, queries=20, heads=2, head_dim=head_dim, keys=(70, 45), **kind)
    check(attention_inputs(case, in_turn(DTYPES, head_dim // 8)))


@st.composite
def drawn_cases(draw):
    sources = draw(st.integers(1, 5))
    batch = draw(st.integers(1, 3))
    table = st.tuples(*[st.integers(-1, 1)] * batch)
    grouped = draw(st.booleans()) and sources > 1
    return AttentionCase(
        "drawn",
        batch=batch,
        queries=draw(st.integers(1, 300)),
        heads=draw(st.integers(1, 3)),
        head_dim=8 * draw(st.integers(1, 20) | st.sampled_from([5, 8, 10, 16, 20, 32])),
        keys=tuple(draw(st.integers(1, 400)) for _ in range(sources)),
        rows=tuple(draw(st.none() | st.just(1) | table) for _ in range(sources)),
        visible=draw(st.none() | st.sampled_from([0.05, 0.3, 0.9])),
        groups=draw(st.sampled_from([0, 0, 2, 4])),
        key_bias=draw(st.booleans()),
        logit_scale=draw(st.none() | st.tuples(*[st.sampled_from([1.0, 0.7, -0.5, 0.0])] * sources)),
        value_index=draw(st.integers(0, 3)) == 0,
        softmax_groups=tuple(range(sources)) if grouped else None,
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=drawn_cases(), dtype=st.sampled_from(DTYPES), timing=st.sampled_from(TIMINGS), seed=st.integers(0, 99))
def test_drawn_shapes(case, dtype, timing, seed):
    check(attention_inputs(case, dtype, seed), timing._replace(seed=timing.seed and timing.seed + seed))


@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.fault(number=14)
def test_numbers_that_leave_fp32(extreme, parts):
    for kind, head_dim in (({}, 64), ({"key_bias": True}, 40), ({"visible": 0.5, "groups": 2}, 256)):
        for dtype in DTYPES:
            check(extreme_inputs(extreme, dtype, head_dim=head_dim, batch=1, heads=1, **kind), Timing(parts=parts))


@pytest.mark.parametrize("far", [0, 1])
def test_one_of_two_softmax_groups_leaves_fp32(far):
    case = AttentionCase("far", batch=1, heads=1, head_dim=64, keys=(90, 90), rows=(None, None), softmax_groups=(0, 1))
    inputs = attention_inputs(case, torch.bfloat16)
    bias = torch.full((1, 90), torch.finfo(torch.float32).min)
    inputs.sources[far] = inputs.sources[far]._replace(key_bias=bias)
    check(inputs)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_without_keys(parts):
    """Lists shorter than a tile, and fewer tiles than parts."""
    for extreme in (("key_bias", torch.finfo(torch.float32).min), ("key_bias", 0.0), ("logit_bias", -1e38)):
        for visible in (0.05, 0.0, None):
            inputs = extreme_inputs(
                extreme, torch.bfloat16, head_dim=64, keys=(150, 20), rows=(None, 1), visible=visible
            )
            check(inputs, Timing(parts=parts))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.fault(number=12)
def test_a_number_that_is_not_finite_reaches_those_who_see_it(bad):
    for place in ("key", "value", "query"):
        inputs = attention_inputs(AttentionCase("bad", head_dim=64, visible=0.6), torch.bfloat16)
        source = inputs.sources[0]
        tensor = inputs.query if place == "query" else getattr(source, place)
        seen = 0 if place == "query" else int(source.key_mask[0].nonzero()[0])
        tensor[0, seen, 1, 3] = bad
        check(inputs)


@pytest.mark.fault(number=11)
@pytest.mark.fault(number=13)
def test_hidden_keys_do_not_matter():
    inputs = attention_inputs(AttentionCase("hidden", head_dim=64, visible=0.5, rows=(1, 1)), torch.bfloat16)
    expected = emulated.attend(inputs.query, inputs.sources)
    for source in inputs.sources:
        source.key[:, ~source.key_mask[0]] = source.value[:, ~source.key_mask[0]] = torch.nan
    assert torch.equal(emulated.attend(inputs.query, inputs.sources), expected)


@pytest.mark.fault(number=9)
def test_empty_dimensions():
    for shape, keys in (((0, 5, 2, 64), 7), ((2, 0, 2, 64), 7), ((2, 5, 0, 64), 7), ((2, 5, 2, 64), 0)):
        query = torch.randn(shape).bfloat16()
        source = Source(*torch.randn(2, max(shape[0], 1), keys, *shape[2:]).bfloat16())
        out, lse = emulated.attend(query, [source], return_lse=True)
        assert out.shape == query.shape and not out.any()
        assert (lse == -torch.inf).all()


@pytest.mark.fault(number=4)
def test_views_are_read_in_place():
    """Also those that TMA cannot describe: keys and heads that share memory."""
    wide = torch.randn(2, 90, 3, 2, 64).bfloat16()
    query = wide[:, :70, 0]
    views = {
        "fused": wide[:, :, 1],
        "heads first": wide[:, :, 1].transpose(1, 2).contiguous().transpose(1, 2),
        "heads shared": wide[:, :, 1, :1].expand(-1, -1, 2, -1),
        "one key": wide[:, :1, 1].expand(-1, 90, -1, -1),
        "every other": wide[:, ::2, 1],
        "reversed rows": wide[[1, 0], :, 1],
    }
    for name, key in views.items():
        assert hopper.lacks(query, [Source(key, key)], False, True) == [], name
        written = key.contiguous()
        expected = emulated.attend(query, [Source(written, written)])
        assert torch.equal(emulated.attend(query, [Source(key, key)]), expected)


@pytest.mark.fault(number=30)
@pytest.mark.fault(number=31)
def test_same_bits_in_every_order_of_events():
    inputs = attention_inputs(
        AttentionCase("bits", batch=3, queries=150, head_dim=64, keys=(300, 70), rows=(None, 1), visible=0.6),
        torch.bfloat16,
    )
    expected = emulated.attend(inputs.query, inputs.sources)
    for timing in (Timing(1), Timing(2, 1), Timing(2, 2, 1), Timing(0, 3, 5)):
        assert torch.equal(emulated.attend(inputs.query, inputs.sources, timing=timing), expected)
    order = torch.tensor([2, 0, 1])
    first, second = inputs.sources
    turned = [Source(first.key[order], first.value[order], key_mask=first.key_mask[order]), second]
    assert torch.equal(emulated.attend(inputs.query[order], turned), expected[order])


def test_lse_in_double_and_fp32_agree():
    inputs = attention_inputs(AttentionCase("lse", head_dim=64), torch.bfloat16)
    for parts in (1, 2):
        single, double = (
            emulated.attend(inputs.query, inputs.sources, return_lse=True, timing=Timing(parts=parts), lse_dtype=dtype)[
                1
            ]
            for dtype in (torch.float32, torch.float64)
        )
        assert torch.equal(double.float(), single)


def test_small_layers_are_split():
    """256 tokens and 8 heads are 32 work items for 132 multiprocessors: each gets a part of the keys."""
    shape = {"batch": 2, "queries": 256, "heads": 8, "head_dim": 160}
    case = AttentionCase("small", **shape, keys=(256, 256, 256), rows=(None, None, 1))
    inputs = attention_inputs(case, torch.bfloat16)
    whole = emulated.attend(inputs.query, inputs.sources, timing=Timing(parts=1))
    split = emulated.attend(inputs.query, inputs.sources)
    assert not torch.equal(split, whole)  # other roundings: so it was split
    check(inputs)


# ---- What the kernel does not take


def direct(**changes):
    """A direct call of the op, right but for the changes."""
    emulated.library()
    call = {"query": torch.randn(1, 5, 2, 64).bfloat16(), "key": torch.randn(1, 7, 2, 64).bfloat16(), **changes}
    query, key = call["query"], call["key"]
    tables = lay_out(query, [Source(key, call.get("value", key))], plan_attention([None]), None)
    out = call.get("out")
    ops.kernel("multi_source_attention", "cuda")(query, *tables, torch.empty_like(query) if out is None else out, None)


def shifted(*shape: int) -> torch.Tensor:
    """A view that starts 2 bytes behind a multiple of 16."""
    return torch.randn(torch.Size(shape).numel() + 1).bfloat16()[1:].view(shape)


REFUSALS = {
    "float32": {"query": torch.randn(1, 5, 2, 64), "key": torch.randn(1, 7, 2, 64)},
    "head_dim that is not a multiple of 8": {
        "query": torch.randn(1, 5, 2, 36).bfloat16(), "key": torch.randn(1, 7, 2, 36).bfloat16()
    },
    "query whose rows": {"query": torch.randn(1, 5, 2, 68).bfloat16()[..., :64]},
    "key whose rows": {"key": torch.randn(1, 7, 2, 68).bfloat16()[..., :64]},
    "value whose rows": {"value": torch.randn(1, 7, 2, 68).bfloat16()[..., :64]},
    "out whose rows": {"out": shifted(1, 5, 2, 64)},
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSALS)
@pytest.mark.fault(number=16)
def test_direct_calls_are_refused_by_name(reason):
    direct()
    with pytest.raises(RuntimeError, match=rf"lr_kernels.multi_source_attention: query: expected .*got {reason}"):
        direct(**REFUSALS[reason])


@pytest.mark.fault(number=5)
def test_the_op_copies_what_starts_off_16_bytes():
    """As in a compiled model, which learns its tensors' addresses when the op is called."""
    query, key, value = shifted(1, 5, 2, 64), shifted(1, 7, 2, 64), shifted(1, 7, 2, 64)
    expected = emulated.attend(*(query.clone(), [Source(key.clone(), value.clone())]))
    assert torch.equal(emulated.attend(query, [Source(key, value)]), expected)


def test_a_traced_call_knows_strides_alone():
    def known(x):
        return x + 1 if hopper._aligned(x) else x - 1

    traced = torch.compile(known, backend="eager", fullgraph=True)
    assert torch.equal(traced(torch.zeros(2, 3, 4, 16)), torch.ones(2, 3, 4, 16))
    assert torch.equal(traced(torch.zeros(2, 3, 4, 17)[..., :16]), -torch.ones(2, 3, 4, 16))


@pytest.mark.fault(number=16)
def test_what_lacks_is_said_by_name():
    query, key = torch.randn(1, 5, 2, 64).bfloat16(), torch.randn(1, 7, 2, 64).bfloat16()
    good = [Source(key, key)]
    assert hopper.lacks(query, good, False, True) == []
    assert hopper.lacks(query, good, False, False) == ["devices other than compute capability 9.0"]
    assert hopper.lacks(query, good, True, True) == ["gradients"]
    assert hopper.lacks(query, [*good, in_8_bits(good[0], torch.int8)], False, True) == []
    assert hopper.lacks(query.float(), good, False, True) == ["float32"]
    odd = query[..., :36].contiguous()
    assert hopper.lacks(odd, [Source(odd, odd)], False, True)[0] == "head_dim 36, which is no multiple of 8"
    for name, call in {
        "query": (shifted(1, 5, 2, 64), good),
        "key[1]": (query, [*good, Source(shifted(1, 7, 2, 64), key)]),
        "value[0]": (query, [Source(key, torch.randn(1, 7, 2, 68).bfloat16()[..., :64])]),
    }.items():
        assert hopper.lacks(*call, False, True) == [f"{name} whose rows do not start at multiples of 16 bytes"]


# ---- Calls that go to the op as they are


def call(**changes) -> dict:
    generator = torch.Generator().manual_seed(0)
    query, *parts = (torch.randn(2, 40, 2, 64, generator=generator).bfloat16() for _ in range(7))
    mask = torch.rand(1, 40, generator=generator) < 0.5
    sources = [
        Source(*parts[:2]), Source(*parts[2:4], key_mask=mask),
        Source(*parts[4:], rows=torch.tensor([1, -1], dtype=torch.int32)),
    ]  # fmt: skip
    plan = plan_attention([None, mask, None])
    right = dict(query=query, sources=sources, query_groups=None, scale=None, return_lse=False, plan=plan)
    return {**right, **changes}


def as_it_is(**changes):
    emulated.set_timing(Timing())
    return hopper.direct_call(ops.attention_flat_cuda, **call(**changes))


def test_a_call_goes_to_the_op_as_it_is():
    inputs = attention_inputs(
        AttentionCase("direct", head_dim=64, visible=0.5, groups=2, keys=(70, 90, 33), rows=(None, (1, -1), 1),
                      key_bias=True, value_index=True, softmax_groups=(0, 1, 1)), torch.bfloat16)  # fmt: skip
    full = lambda x: torch.full((2, 2), x)  # noqa: E731
    sources = [
        s._replace(logit_scale=full(1.2), logit_bias=full(0.3), value_index=s.value_index.int()) for s in inputs.sources
    ]
    plan = plan_attention([s.key_mask for s in sources], [s.key_groups for s in sources], inputs.query_groups)
    result = as_it_is(query=inputs.query, sources=sources, query_groups=inputs.query_groups, plan=plan)
    assert torch.equal(result, emulated.attend(inputs.query, sources, inputs.query_groups))

    expected = call()
    result = as_it_is(return_lse=True)
    whole = emulated.attend(expected["query"], expected["sources"], return_lse=True)
    assert all(map(torch.equal, result, whole))
    first = [Source(*expected["sources"][0][:2])]
    result = as_it_is(sources=first, plan=None, scale=0.3)
    assert torch.equal(result, emulated.attend(expected["query"], first, scale=0.3))


class Mine(torch.Tensor):
    pass


def calls_for_python() -> dict[str, dict]:
    sources = call()["sources"]
    first = sources[0]
    return {
        "fp32": {"query": torch.randn(2, 40, 2, 64)},
        "wrong number of dimensions": {"query": torch.randn(40, 64).bfloat16()},
        "head_dim 36": {"query": torch.randn(2, 40, 2, 36).bfloat16()},
        "sources of another kind": {"sources": iter(sources)},
        "scale of another kind": {"scale": 1},
        "scale that is no number": {"scale": float("nan")},
        "scale beyond float32": {"scale": 1e39},
        "return_lse of another kind": {"return_lse": 1},
        "masks without a plan": {"plan": None},
        "another plan": {"plan": plan_attention([None, torch.ones(1, 40, dtype=torch.bool), None])},
        "a plan for fewer sources": {"sources": sources[:2]},
        "a source of another kind": {"sources": [first, tuple(sources[1]), sources[2]]},
        "a number as strength": {"sources": [first._replace(logit_scale=0.5), *sources[1:]]},
        "rows in int64": {"sources": [*sources[:2], sources[2]._replace(rows=torch.tensor([0, 1]))]},
        "groups that do not ascend": {"sources": [first._replace(softmax_group=1), *sources[1:]]},
        "two weights in a group": {
            "sources": [first, sources[1], sources[2]._replace(weight=torch.ones(2, 40))]
        },
        "keys of another shape": {"sources": [Source(first.key[:, :, :1], first.value), *sources[1:]]},
        "keys off 16 bytes": {"sources": [Source(shifted(2, 40, 2, 64), first.value), *sources[1:]]},
        "gradients": {"query": torch.randn(2, 40, 2, 64).bfloat16().requires_grad_()},
        "8-bit keys without a scale": {
            "sources": [in_8_bits(first, torch.int8)._replace(key_scale=None), *sources[1:]]
        },
        "a scale alone": {"sources": [first._replace(key_scale=torch.ones(1, 1, 1)), *sources[1:]]},
        "a subclass": {"sources": [first._replace(key=first.key.as_subclass(Mine)), *sources[1:]]},
    }  # fmt: skip


@pytest.mark.parametrize("name", calls_for_python())
def test_all_other_calls_come_back(name):
    assert as_it_is(**calls_for_python()[name]) is None


def test_modes_come_back():
    with torch.autocast("cpu"):
        assert as_it_is() is None
    changed = call()
    changed["sources"][1].key_mask[0, 0] ^= True
    assert hopper.direct_call(ops.attention_flat_cuda, **changed) is None  # the plan is of before

    def inside(x):
        assert as_it_is() is None
        return x.sum()

    torch.func.grad(inside)(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        assert as_it_is() is None


def test_only_a_hopper_card_gets_them():
    assert hopper.op_for(torch.zeros(1)) is None
    assert hopper.op_for("no tensor") is None
    with pytest.raises(RuntimeError, match="backend: 'cuda' cannot run"):
        arguments = call()
        multi_source_attention(arguments.pop("query"), arguments.pop("sources"), **arguments, backend="cuda")
